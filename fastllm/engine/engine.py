"""The engine: requests in, one step at a time, outputs out.

`Engine` joins the scheduler (which tokens next), an executor (computes them) and the completions (text, stop
strings, logprobs). It runs in the caller's thread, one call at a time, and starts none of its own.
"""

from __future__ import annotations

import logging
import numbers
import os
import random
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from fastllm.engine import hooks as events
from fastllm.engine.adapters import Adapter, Adapters
from fastllm.engine.block_pool import BlockPool
from fastllm.engine.completion import (
    Completion,
    DetokenizerFactory,
    Tokenizer,
    TokenTexts,
    incremental_detokenizer,
    row_logprobs,
)
from fastllm.engine.constraints import Constraint, Constraints
from fastllm.engine.drafter import Drafter, NgramDrafter
from fastllm.engine.hooks import EngineHook, HookTable
from fastllm.engine.interrupt import InterruptGuard
from fastllm.engine.model_drafter import ModelDrafter
from fastllm.engine.offload import Offload, check_options, open_offload
from fastllm.engine.pooling import PooledPrompt, PoolingRequest
from fastllm.engine.profile import Profile
from fastllm.engine.request import Request
from fastllm.engine.scheduler import Scheduler
from fastllm.engine.sequence import Sequence, pack_token_ids, prefix_root
from fastllm.engine.step_batch import StepBatch
from fastllm.engine.stop import StopStrings
from fastllm.engine.structured import Guides
from fastllm.errors import EngineDeadError, RequestError
from fastllm.executor.base import AdapterHost, Executor, Pipelined, PreparedAdapter, Sleeper, StepResult
from fastllm.outputs import EmbeddingOutput, RequestOutput
from fastllm.pooling_params import PoolingParams
from fastllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

logger = logging.getLogger(__name__)

MAX_PRIORITY = 1_000_000
MAX_SALT_CHARACTERS = 1024
# A step waits so long for masks, as a share of the step before: they mostly take less, and a sequence that
# sits out a step has lost all of it.
MASK_SHARE = 0.1
MAX_MASK_SECONDS = 0.01
SLEEP_LEVELS = (1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        max_model_len: most tokens of a sequence, prompt included.
        max_num_seqs: most sequences running at once.
        max_num_batched_tokens: most tokens in a step, decodes and prompt chunks together.
        block_size: tokens per block of the KV cache; None: the executor's. Another value than the
            executor's is refused.
        vocab_size: token ids are below it; None: the tokenizer's.
        seed: where the seeds of requests without one come from.
        enable_prefix_caching: share blocks between requests that begin with the same tokens, and keep those
            of ended ones for as long as nobody needs them.
        cache_identity: what stands for model and kind of KV cache in the hashes of shared blocks: engines
            with the same one name the same contents alike.
        priority_interval: seconds of waiting that make up for one level of priority.
        target_itl_ms: milliseconds between two tokens of a sequence that steps are cut to; None: no such
            target. It decides how much of prompts goes into a step beside running decodes, and how many
            sequences run.
        num_speculative_tokens: most tokens of a sequence that a step guesses: a draft model does where there
            is one (`ModelDrafter`), else they are what stood there before (`NgramDrafter`); 0: none.
        prompt_lookup_min: tokens that must have stood somewhere before for a guess at what follows.
        draft_model_len: positions that the draft model has; None: as many as a sequence may have.
        max_loras: most LoRA adapters loaded at once.
        async_scheduling: while an executor that can do so (`Pipelined`: a GPU) computes a step, the next one
            is chosen and submitted, and the outputs of the one before are made. Answers are the same.
        kv_offload_bytes: size of a file that keeps what the prefix cache has to forget; None: nothing does.
        kv_offload_dir: where the file is made, without a name; None: the system's temporary directory.
        kv_offload_encrypted: whether what is in it is encrypted, with a key that nobody knows.
    """

    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int | None = None
    vocab_size: int | None = None
    seed: int = 0
    enable_prefix_caching: bool = True
    cache_identity: str = ""
    priority_interval: float = 10.0
    target_itl_ms: float | None = None
    num_speculative_tokens: int = 0
    prompt_lookup_min: int = 2
    draft_model_len: int | None = None
    max_loras: int = 8
    async_scheduling: bool = True
    kv_offload_bytes: int | None = None
    kv_offload_dir: str | os.PathLike[str] | None = None
    kv_offload_encrypted: bool = False


@dataclass(slots=True)
class _Flight:
    """A step that was submitted."""

    batch: StepBatch
    ticket: int
    since: float  # seconds of the clock
    result: StepResult | None = None  # once it is known, where it was waited for early


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is, at a moment between two steps.

    Attributes:
        num_running, num_waiting: sequences.
        num_free_blocks, num_used_blocks: of the KV cache, the sum of which is its size. Nobody holds a free
            one.
        num_cached_blocks: blocks that are known by their content, used or free.
        kv_usage: used blocks as a share of all, 0..1.
        num_prefix_queries, num_prefix_hits: prompt tokens looked up in the prefix cache so far, and found
            there.
        num_preemptions: sequences preempted so far.
        num_offloaded_blocks: blocks that were evicted from the KV cache and can be brought back; some may be
            in the cache as well.
        offloaded_bytes: size of the file that they are in.
        num_restored_tokens: tokens of blocks that were brought back so far; those of prompts among them are
            hits too.
    """

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_used_blocks: int
    num_cached_blocks: int
    kv_usage: float
    num_prefix_queries: int
    num_prefix_hits: int
    num_preemptions: int
    num_offloaded_blocks: int
    offloaded_bytes: int
    num_restored_tokens: int


class Engine:
    """Continuous batching of requests on one executor. Not thread-safe.

    Args:
        executor: computes the steps; the engine closes it.
        tokenizer: gives vocab_size, eos_token_ids and the text of tokens.
        config: limits.
        hooks: who is told of events.
        draft_executor: runs a smaller model of the same vocabulary, whose guesses are verified; with as many
            blocks as `executor`, of the same size. The engine closes it, too.
        detokenizer_factory: makes a sequence's detokenizer from (tokenizer, prompt_token_ids,
            skip_special_tokens); None: `fastllm.formats.detokenizer.IncrementalDetokenizer`.
        clock: seconds, monotonic; the only clock in the engine.

    Raises:
        RequestError: a limit is out of range or contradicts the executor, or there can be no file in
            kv_offload_dir.
        CapacityError: kv_offload_bytes is less than a block.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer,
        config: EngineConfig,
        hooks: SequenceOf[EngineHook] = (),
        *,
        draft_executor: Executor | None = None,
        detokenizer_factory: DetokenizerFactory | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check_config(config)
        if config.block_size is not None and config.block_size != executor.block_size:
            raise RequestError("block_size", config.block_size, f"the executor's ({executor.block_size})")
        self.config = config
        self.scheduler = Scheduler(
            num_blocks=executor.kv_capacity(),
            block_size=executor.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            vocab_size=tokenizer.vocab_size if config.vocab_size is None else config.vocab_size,
            priority_interval=config.priority_interval,
            target_itl=0.0 if config.target_itl_ms is None else config.target_itl_ms * 1e-3,
            drafter=_drafter(config, draft_executor, clock),
        )
        self.constraints = Constraints(tokenizer, self.scheduler.vocab_size, tokenizer.eos_token_ids)
        self._guides = Guides()
        self._pace = 0.0  # seconds of the step before, where sequences follow grammars
        self._root = prefix_root("fastllm", config.cache_identity, executor.block_size)
        host = executor if isinstance(executor, AdapterHost) else None
        self.adapters = Adapters(host, config.max_loras, self._root)
        self._executor = executor
        self._draft_executor = draft_executor
        self._sleep_together = [executor] if draft_executor is None else [executor, draft_executor]
        self._ahead = config.async_scheduling and isinstance(executor, Pipelined) and executor.steps_ahead > 0
        self._flight: _Flight | None = None  # a step that the next `step` waits for
        self._unnoted = False  # it moved sequences of which nobody was told yet
        self._collected = 0.0  # when a step's result was there, in seconds of the clock
        self._sleeping = 0  # the level, 0 while it is awake
        self._asleep: list[Sleeper] = []  # those of the executors that have to be woken
        self._tokenizer = tokenizer
        self._eos_token_ids = sorted(tokenizer.eos_token_ids)
        self._texts = TokenTexts(tokenizer)
        self._make_detokenizer = detokenizer_factory or incremental_detokenizer
        self._clock = clock
        self._listeners = tuple(hooks)
        self._hooks = HookTable(self._listeners)
        if self._hooks.cache:
            self.scheduler.pool.events = []
        self._profile: Profile | None = None
        self._delivered = 0.0  # when the newest tokens were known
        self._guard = InterruptGuard()
        self._seeds = random.Random(config.seed)
        self._requests: dict[str, Request | PoolingRequest] = {}
        self._ready: list[RequestOutput | EmbeddingOutput] = []  # made, but not returned yet
        self._cause: BaseException | None = None  # why the engine is dead
        self._obituary = ""
        self._lost: tuple[str, ...] = ()
        self._closed = False
        self._offload: Offload | None = None
        if config.kv_offload_bytes is not None:
            self._offload = open_offload(
                executor,
                self.scheduler.pool,
                config.kv_offload_bytes,
                config.kv_offload_dir,
                config.kv_offload_encrypted,
            )
            self.scheduler.offload = self._offload
        if self._hooks.started:
            pool = self.scheduler.pool
            self._hooks.emit(
                self._hooks.started, events.Started(self._clock(), config, pool.num_blocks, pool.block_size)
            )

    # ---- requests ----------------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams | PoolingParams,
        *,
        prompt: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        constraint: Constraint | None = None,
        adapter: str | None = None,
    ) -> None:
        """Put a request into the queue. A request that is refused changes nothing.

        Args:
            request_id: a name that no unfinished request has.
            prompt_token_ids: at least one id.
            params: how to sample; with `PoolingParams` the request gives one `EmbeddingOutput` instead.
            prompt: the prompt's text, handed on to the outputs.
            priority: lower is served first, and may take the place of running requests that are higher; equal
                ones are served in order of arrival. A level counts for `EngineConfig.priority_interval`
                seconds of waiting, so that nothing waits for ever.
            cache_salt: requests share cached blocks only with others of the same salt; None is one too.
            constraint: what `constraints.prepare(params)` gave, on another thread. Where it is missing and
                params call for one it is made here, and the caller waits.
            adapter: the name of a loaded LoRA adapter; None: the model as it is.

        Raises:
            RequestError: an argument is invalid, or the engine sleeps.
            CapacityError: the prompt can never fit: it leaves no room for a token in max_model_len (one that
                is pooled needs none), or is longer than the whole KV cache. (max_tokens is no reason to
                refuse: a sequence that reaches either bound ends with "length".)
            EngineDeadError: the engine is dead.
        """
        self.check_health()
        self.check_awake()
        if not isinstance(request_id, str) or not request_id:
            raise RequestError("request_id", request_id, "a non-empty string")
        if request_id in self._requests:
            raise RequestError("request_id", request_id, "a name that no unfinished request has")
        if not isinstance(params, (SamplingParams, PoolingParams)):
            raise RequestError("params", params, "SamplingParams or PoolingParams")
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
            raise RequestError("priority", priority, f"an integer in {-MAX_PRIORITY}..{MAX_PRIORITY}")
        item = None if adapter is None else self.adapters.find(adapter)
        root = self._prefix_root(cache_salt, item)
        vocab_size = self.scheduler.vocab_size
        packed = pack_token_ids(prompt_token_ids, vocab_size)
        params.check_vocabulary(vocab_size)
        if isinstance(params, PoolingParams):
            self.scheduler.length_limit(len(packed), params.max_tokens)
            self._add_pooling(request_id, packed, params, prompt, priority, root, item)
            return
        if params.min_tokens:
            stops = set(params.stop_ids) if params.ignore_eos else {*params.stop_ids, *self._eos_token_ids}
            if len(stops) >= vocab_size:
                raise RequestError("min_tokens", params.min_tokens, "0 where every token ends the sequence")
            if params.allowed_token_ids is not None and stops.issuperset(params.allowed_token_ids):
                limit = "0 where every one of allowed_token_ids ends the sequence"
                raise RequestError("min_tokens", params.min_tokens, limit)
        self.scheduler.length_limit(len(packed), params.max_tokens)
        if constraint is None and params.constrained:
            constraint = self.constraints.prepare(params)

        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed % 2**64
        request = Request(request_id, prompt, packed.tolist(), params, seed, self._clock(), item)
        stop_strings = StopStrings(params.stop_strings) if params.stop_strings else None
        for index in range(params.n):
            sequence = Sequence(
                request_id,
                packed,
                params,
                index=index,
                seed=seed,
                eos_token_ids=self._eos_token_ids,
                report_prompt=index == 0,
                priority=priority,
                root=root,
                bad_words=() if constraint is None else constraint.bad_words,
                adapter=-1 if item is None else item.index,
            )
            if constraint is not None and constraint.mask is not None:
                sequence.set_mask(constraint.mask)
            detokenizer = None
            if params.detokenize:
                detokenizer = self._make_detokenizer(
                    self._tokenizer, request.prompt_token_ids, params.skip_special_tokens
                )
            completion = Completion(
                sequence, params, detokenizer, stop_strings, self._texts if params.detokenize else None
            )
            sequence.owner = (request, completion)
            request.completions.append(completion)
        self._enqueue(request, constraint)

    def _add_pooling(
        self,
        request_id: str,
        packed: npt.NDArray[np.int32],
        params: PoolingParams,
        prompt: str | None,
        priority: int,
        root: bytes | None,
        adapter: Adapter | None,
    ) -> None:
        request = PoolingRequest(request_id, prompt, packed.tolist(), params, self._clock(), adapter)
        index = -1 if adapter is None else adapter.index
        sequence = Sequence(request_id, packed, params, priority=priority, root=root, adapter=index)
        pooled = PooledPrompt(sequence)
        sequence.owner = (request, pooled)
        request.completions.append(pooled)
        self._enqueue(request)

    def _enqueue(self, request: Request | PoolingRequest, constraint: Constraint | None = None) -> None:
        with self._guard:
            if constraint is not None and (constraint.grammar or constraint.thought):
                for completion in request.completions:
                    self._guides.add(completion.sequence, constraint)
            self._requests[request.request_id] = request
            if request.adapter is not None:
                request.adapter.users += 1
            leader, *followers = [completion.sequence for completion in request.completions]
            arrival = request.metrics.arrival_time
            self.scheduler.add(leader, arrival, followers)
            if self._hooks.queued:
                event = events.Queued(
                    arrival,
                    request.request_id,
                    len(request.prompt_token_ids),
                    request.params.n,
                    request.params,
                    None if request.adapter is None else request.adapter.name,
                )
                self._hooks.emit(self._hooks.queued, event)

    def _prefix_root(self, cache_salt: str | None, adapter: Adapter | None) -> bytes | None:
        """What a request's blocks are known by before their tokens; None: they are not shared."""
        if cache_salt is not None and not (
            isinstance(cache_salt, str) and 0 < len(cache_salt) <= MAX_SALT_CHARACTERS
        ):
            limit = f"a string of 1..{MAX_SALT_CHARACTERS} characters"
            raise RequestError("cache_salt", cache_salt, limit)
        if not self.config.enable_prefix_caching:
            return None
        root = self._root if adapter is None else adapter.root
        return root if cache_salt is None else prefix_root(root, cache_salt)

    def reset_prefix_cache(self) -> None:
        """Forget what cached blocks hold, in memory and in the file: no later request finds them. What runs
        is not disturbed."""
        with self._guard:
            self.scheduler.pool.reset_prefix_cache()
            if self._offload is not None:
                self._offload.reset()
            if self.scheduler.pool.events:
                self._emit_cache_events(self._clock())

    def add_adapter(self, name: str, adapter: PreparedAdapter) -> None:
        """Load a LoRA adapter. To be called between two steps; reading it beforehand (`adapters.read`) may be
        done in any thread.

        Raises:
            RequestError: the name is taken, or the adapter does not fit the model.
            CapacityError: there are `EngineConfig.max_loras`.
            EngineDeadError: the engine is dead.
        """
        self.check_health()
        with self._guard:
            self.adapters.add(name, adapter)

    def remove_adapter(self, name: str) -> bool:
        """Unload an adapter. No new request finds it; those that have it are served to their end, and with
        the last one its memory is free. To be called between two steps.

        Returns:
            Whether there was one of that name.
        """
        with self._guard:
            found = self.adapters.remove(name)
            self._sweep()
        return found

    def _sweep(self) -> None:
        """Free the adapters that nobody uses any more. A step that is still to be submitted may name one; to
        one that was this makes no difference."""
        submitted = self.scheduler.in_flight is None or self._flight is not None
        if submitted and not self._closed:
            self.adapters.sweep()

    def abort(self, request_id: str) -> None:
        """End a request in any state: its blocks are free at once, or when the step in flight is over.

        The next `step` returns its last output, with finish_reason "abort". An unknown id is ignored, since
        the request may just have finished.
        """
        request = self._requests.get(request_id)
        if request is not None:
            with self._guard:
                self._abort(request)
                self._ready.append(request.output())
                self._sweep()

    def _abort(self, request: Request | PoolingRequest, *, text: bool = True) -> None:
        for completion in request.completions:
            if completion.finish_reason is None:
                self._guides.discard(completion.sequence)
                self.scheduler.abort(completion.sequence)
                before = completion.num_tokens
                completion.cut("abort", text=text)
                if completion.num_tokens > before:
                    request.metrics.num_generated_tokens += completion.num_tokens - before
                    request.metrics.last_token_time = self._delivered
        request.num_running = 0
        self._close(request, self._clock())
        self._drop_moot_step()
        if self._hooks.aborted:
            event = events.Aborted(
                request.metrics.finished_time or 0.0,
                request.request_id,
                request.metrics,
                *self._occupancy(),
                None if self._cause is None else type(self._cause).__name__,
            )
            self._hooks.emit(self._hooks.aborted, event)

    def _close(self, request: Request | PoolingRequest, now: float) -> None:
        request.closed = True
        request.metrics.finished_time = now
        del self._requests[request.request_id]
        if request.adapter is not None:
            request.adapter.users -= 1

    def _occupancy(self) -> tuple[int, int, int]:
        """Sequences that run, that wait, and free blocks."""
        return self.scheduler.num_running, self.scheduler.num_waiting, self.scheduler.pool.num_free

    # ---- steps -------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput | EmbeddingOutput]:
        """Compute one step.

        Returns:
            One output for each request that moved (with FINAL_ONLY, or pooling: that is finished), in order
            of arrival, after those of requests that were aborted since the last step.

        Raises:
            EngineDeadError: the executor or the engine itself failed (the failure is chained), now or before.
                All requests are aborted; their ids are in the message and in `lost_request_ids`.
            KeyboardInterrupt: Ctrl-C came during the step. The step is complete, and the next call returns
                its outputs too: the requests can be continued or aborted.
        """
        self.check_health()
        with self._guard:
            self._step()
        ready, self._ready = self._ready, []
        return ready

    def _step(self) -> None:
        started = self._clock()
        scheduler = self.scheduler
        counted = False
        try:
            flight, self._flight = self._flight, None
            if flight is None:
                batch = self._schedule(started)
                if batch is None:
                    return
                flight = self._submit(batch)
            else:
                batch = flight.batch
            self._go_ahead()
            result = flight.result
            if result is None:
                result = self._executor.collect(flight.ticket)
                called, self._collected = max(flight.since, self._collected), self._clock()
                scheduler.observe(self._collected - called)
            counted = True
            moved = scheduler.update(result)
            if self._guides:
                self._guides.advance(moved)  # the workers go on while outputs are made
                self._pace = self._clock() - started
        except Exception as error:
            raise self._die(error) from error
        except BaseException as error:
            if counted:  # its tokens are lost
                raise self._die(error) from error
            scheduler.rollback()  # the same steps come again
            self._flight = None
            self._note_ahead(started)
            self._sweep()
            raise
        try:
            now = self._clock()
            self._deliver(moved, result, now)
            self._note_ahead(now)
            self._drop_moot_step()
            if scheduler.pool.events:
                self._emit_cache_events(now)
            if self.adapters.leaving:
                self._sweep()
            if self._hooks.step:
                delivery = self._clock() - now
                self._hooks.emit(
                    self._hooks.step,
                    events.Step(
                        now,
                        now - started,
                        batch.num_prefill_tokens,
                        batch.num_tokens - batch.num_prefill_tokens,
                        batch.num_seqs,
                        *self._occupancy(),
                        scheduler.pool.num_blocks,
                        delivery,
                        scheduler.pool.num_cached,
                        scheduler.num_prefix_queries,
                        scheduler.num_prefix_hits,
                        scheduler.num_preemptions,
                        *self._offloaded(),
                        scheduler.num_drafts,
                        scheduler.num_draft_tokens,
                        scheduler.num_accepted_tokens,
                        scheduler.num_accepted_at if scheduler.drafter is not None else (),
                    ),
                )
        except BaseException as error:  # tokens may be lost; going on would give wrong text
            raise self._die(error) from error

    def _submit(self, batch: StepBatch) -> _Flight:
        if self._offload is not None:
            self._offload.save()  # the step overwrites it
        since = self._clock()
        return _Flight(batch, self._executor.submit(batch), since)

    def _go_ahead(self) -> None:
        """Submit the step after the one that is computed now, if it can be told; a profile shows steps end to
        end, and has them so."""
        if self._ahead and self._profile is None and not self._guides and self.scheduler.assume():
            batch = self.scheduler.schedule()
            if batch is not None:
                self._unnoted = True
                self._flight = self._submit(batch)

    def _note_ahead(self, now: float) -> None:
        """Who is told of it may abort a request: not before its newest token is known."""
        if self._unnoted:
            self._unnoted = False
            self._note_scheduled(now)

    def _drop_moot_step(self) -> None:
        """Wait for a step that nobody waits for any more, so that its blocks are free."""
        if self._flight is not None and self.scheduler.moot:
            flight, self._flight = self._flight, None
            self._executor.collect(flight.ticket)
            self.scheduler.rollback()

    def _land(self) -> None:
        """Wait for the step that is computed now; what it yields is for the next `step`."""
        if self._flight is not None and self._flight.result is None:
            self._flight.result = self._executor.collect(self._flight.ticket)

    def _schedule(self, started: float) -> StepBatch | None:
        """The next step's batch. Where nothing can go on without a mask, this waits for one."""
        scheduler = self.scheduler
        patience: float | None = min(max(MASK_SHARE * self._pace, 0.0), MAX_MASK_SECONDS)
        while True:
            if self._guides.pending:
                self._take_masks(patience)
            try:
                batch = scheduler.schedule()
            except BaseException:
                self._note_scheduled(started)  # that much has happened
                raise
            if scheduler.preempted or scheduler.admitted:
                self._note_scheduled(started)
            if batch is not None or not self._guides.pending:
                return batch
            patience = None

    def _take_masks(self, patience: float | None) -> None:
        """Let held sequences go whose masks are there, and end those that have none."""
        touched: dict[str, Request] = {}
        for sequence, reason in self._guides.collect(patience):
            request: Request
            request, completion = sequence.owner
            logger.error(
                "request %s: its grammar has no next token (%.200s); it ends here",
                sequence.request_id,
                reason,
            )
            self.scheduler.abort(sequence)
            self._end_in_error(request, completion)
            touched[sequence.request_id] = request
        if touched:
            self._report(touched, self._clock())

    def _end_in_error(self, request: Request, completion: Completion) -> None:
        before = completion.num_tokens
        completion.cut("error")
        request.metrics.num_generated_tokens += completion.num_tokens - before
        request.num_running -= 1

    def _emit_cache_events(self, now: float) -> None:
        """Tell the hooks what has happened to cached blocks since the last time."""
        pool, table = self.scheduler.pool, self._hooks
        noted, pool.events = pool.events, []
        for event in events.cache_events(noted or (), now, pool.block_size):
            if isinstance(event, events.BlocksStored):
                table.emit(table.blocks_stored, event)
            elif isinstance(event, events.BlocksRemoved):
                table.emit(table.blocks_removed, event)
            else:
                table.emit(table.cache_cleared, event)

    def _note_scheduled(self, now: float) -> None:
        """Metrics and events of the sequences that this step preempted or admitted."""
        for sequence in self.scheduler.preempted:
            if sequence.owner is None:  # aborted by a hook a moment ago, here and below
                continue
            request, _ = sequence.owner
            request.metrics.num_preemptions += 1
            if self._hooks.preempted:
                event = events.Preempted(now, sequence.request_id, sequence.index, sequence.num_tokens)
                self._hooks.emit(self._hooks.preempted, event)
        for sequence in self.scheduler.admitted:
            if sequence.owner is None:
                continue
            request, _ = sequence.owner
            if request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = now
                request.metrics.num_cached_tokens = sequence.num_cached
            if self._hooks.scheduled:
                resumed = sequence.num_preemptions > 0
                self._hooks.emit(
                    self._hooks.scheduled,
                    events.Scheduled(now, sequence.request_id, sequence.index, resumed),
                )

    def _deliver(self, moved: list[Sequence], result: StepResult, now: float) -> None:
        """Turn a step's tokens into outputs."""
        touched: dict[str, Request | PoolingRequest] = {}
        num_tokens, intervals = self.scheduler.intervals(moved, now) if self._hooks.generated else (0, {})
        for sequence in moved:
            if sequence.owner is None:
                continue
            request: Request
            completion: Completion
            request, completion = sequence.owner
            if sequence.num_prompt_rows:
                if sequence.pools:
                    self._pool(sequence, result, touched)
                    continue
                self._add_prompt_logprobs(request, sequence, result)
            started = request.metrics.first_token_time is not None
            if started and completion.deferred and sequence.finish_reason is None and not self._hooks.tokens:
                continue
            before = completion.num_tokens
            if sequence.finish_reason == "error":
                why = "its constraints leave no token, or " if request.params.constrained else ""
                logger.error(
                    "request %s: %sthe logits are not numbers; it ends here", sequence.request_id, why
                )
                self._end_in_error(request, completion)
                touched[sequence.request_id] = request
                continue
            if not sequence.num_new:
                continue
            touched[sequence.request_id] = request
            stop = completion.advance(result)
            if stop is not None:
                self.scheduler.finish(sequence, stop)
                self._guides.discard(sequence)
                num_tokens -= sequence.num_output - completion.num_tokens  # what came after the stop string
            finish_reason = sequence.finish_reason
            if finish_reason is not None:
                completion.close(finish_reason, sequence.stop_reason)
                request.num_running -= 1
            self._note_tokens(request, sequence, completion.num_tokens - before, now)
        self._delivered = now
        if num_tokens:
            self._hooks.emit(self._hooks.generated, events.Generated(now, num_tokens, intervals))
        self._report(touched, now)

    def _report(self, touched: Mapping[str, Request | PoolingRequest], now: float) -> None:
        """Make the outputs of requests that moved."""
        for ending in touched.values():
            if ending.closed:
                continue
            if ending.num_running == 0:
                self._close(ending, now)
                self._ready.append(ending.output())
                if self._hooks.finished:
                    reasons = tuple(item.finish_reason or "" for item in ending.completions)
                    counts = tuple(item.num_tokens for item in ending.completions)
                    event = events.Finished(
                        now, ending.request_id, reasons, ending.metrics, counts, *self._occupancy()
                    )
                    self._hooks.emit(self._hooks.finished, event)
            elif ending.kind is not RequestOutputKind.FINAL_ONLY:
                self._ready.append(ending.output())

    def _pool(
        self, sequence: Sequence, result: StepResult, touched: dict[str, Request | PoolingRequest]
    ) -> None:
        """Take in the hidden states of a prompt; `touched` gets the request if that was the end."""
        request: PoolingRequest
        pooled: PooledPrompt
        request, pooled = sequence.owner
        pooled.advance(result)
        finish_reason = sequence.finish_reason
        if finish_reason == "error":
            logger.error("request %s: the hidden states are not numbers; it ends here", request.request_id)
            pooled.cut(finish_reason)
        elif finish_reason is not None:
            pooled.close(finish_reason)
        else:
            return
        request.num_running = 0
        touched[request.request_id] = request

    def _note_tokens(self, request: Request, sequence: Sequence, count: int, now: float) -> None:
        metrics = request.metrics
        metrics.num_generated_tokens += count
        metrics.last_token_time = now
        if metrics.first_token_time is None:
            metrics.first_token_time = now
            if self._hooks.first_token:
                event = events.FirstToken(
                    now, request.request_id, now - metrics.arrival_time, metrics.num_cached_tokens
                )
                self._hooks.emit(self._hooks.first_token, event)
        if self._hooks.tokens:
            self._hooks.emit(
                self._hooks.tokens,
                events.Tokens(now, request.request_id, sequence.index, count),
            )

    def _add_prompt_logprobs(self, request: Request, sequence: Sequence, result: StepResult) -> None:
        """Its prompt rows are the next positions of the prompt, in order, whatever the chunks were."""
        known = request.prompt_logprobs
        count = request.params.prompt_logprobs
        assert known is not None
        assert count is not None
        texts = self._texts if request.params.detokenize else None
        for row in range(sequence.first_row, sequence.first_row + sequence.num_prompt_rows):
            token = request.prompt_token_ids[len(known)]
            known.append(row_logprobs(result, row, token, count, texts))

    # ---- profile -----------------------------------------------------------------------------------------

    def start_profile(self) -> Profile:
        """Measure where the time of the steps goes, from the next one on. To be called between two steps.

        Raises:
            RequestError: there is a profile already.
        """
        if self._profile is not None:
            raise RequestError("profile", "a second one", "one at a time")
        self._land()
        self._profile = profile = Profile(
            self._executor, self._clock, len(self._requests), self.scheduler.drafter
        )
        self._executor = profile.executor
        self._hooks = HookTable((profile, *self._listeners))
        return profile

    def stop_profile(self) -> None:
        """End the measurement; without one, do nothing. To be called between two steps."""
        if self._profile is not None:
            self._executor = self._profile.executor.end()
            self._hooks = HookTable(self._listeners)
            self._profile = None

    # ---- sleep -------------------------------------------------------------------------------------------

    def sleep(self, level: int = 1) -> None:
        """Give memory back to the system until `wake_up`. Nothing may be unfinished.

        Args:
            level: 1: the KV cache, whose contents are lost; 2: the weights as well. One that sleeps already
                may be sent deeper.

        Raises:
            RequestError: another level; there are unfinished requests, which go on; or an executor that
                cannot.
            EngineDeadError: the engine is dead.
        """
        self.check_health()
        check_sleep_level(level)
        if self.has_unfinished():
            left = f"{len(self._requests)} unfinished requests, {len(self._ready)} outputs to be fetched"
            raise RequestError("sleep", left, "none")
        sleepers = []
        for executor in self._sleep_together:
            if not isinstance(executor, Sleeper):
                raise RequestError("sleep", type(executor).__name__, "an executor that can sleep")
            sleepers.append(executor)
        with self._guard:
            self.reset_prefix_cache()
            level = max(self._sleeping, level)
            for sleeper in sleepers:
                sleeper.sleep(level)
                if sleeper not in self._asleep:
                    self._asleep.append(sleeper)
                self._sleeping = level

    def wake_up(self) -> None:
        """Take the memory again that `sleep` gave back; without it, do nothing.

        Raises:
            RequestError, ModelFileError: the weights cannot be read again: the files are gone, damaged, or of
                another model. The engine sleeps on, as after any other error.
            MemoryError: there is no room.
            EngineDeadError: the engine is dead.
        """
        self.check_health()
        with self._guard:
            while self._asleep:
                self._asleep[-1].wake()
                self._asleep.pop()
            self._sleeping = 0

    @property
    def is_sleeping(self) -> bool:
        """Whether `sleep` was called and `wake_up` not yet."""
        return self._sleeping > 0

    def check_awake(self) -> None:
        """Raises RequestError while the engine sleeps."""
        if self._sleeping:
            raise RequestError("is_sleeping", True, "False: the engine takes requests after wake_up()")

    # ---- state -------------------------------------------------------------------------------------------

    def load(self) -> EngineLoad:
        """How busy the engine is. To be called between two steps."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        used = pool.num_blocks - pool.num_free
        return EngineLoad(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_free_blocks=pool.num_free,
            num_used_blocks=used,
            num_cached_blocks=pool.num_cached,
            kv_usage=used / pool.num_blocks,
            num_prefix_queries=scheduler.num_prefix_queries,
            num_prefix_hits=scheduler.num_prefix_hits,
            num_preemptions=scheduler.num_preemptions,
            num_offloaded_blocks=(offloaded := self._offloaded())[0],
            offloaded_bytes=offloaded[1],
            num_restored_tokens=offloaded[2],
        )

    def _offloaded(self) -> tuple[int, int, int]:
        """Blocks in the file, its bytes, tokens restored from it so far."""
        if self._offload is None:
            return 0, 0, 0
        file = self._offload.file
        return file.num_blocks, file.num_bytes, self.scheduler.num_restored_tokens

    @property
    def pool(self) -> BlockPool:
        """The blocks of the KV cache."""
        return self.scheduler.pool

    @property
    def request_ids(self) -> list[str]:
        """The unfinished requests in order of arrival."""
        return list(self._requests)

    @property
    def lost_request_ids(self) -> tuple[str, ...]:
        """The requests that died with the engine; empty while it lives."""
        return self._lost

    def has_unfinished(self) -> bool:
        """Whether `step` has something to do or to return."""
        return bool(self._requests) or bool(self._ready)

    def check_health(self) -> None:
        """Raises EngineDeadError, with the failure chained, when the engine is dead or closed."""
        if self._cause is not None:
            raise EngineDeadError(self._obituary) from self._cause
        if self._closed:
            raise EngineDeadError("the engine is closed")

    def _die(self, error: BaseException) -> EngineDeadError:
        """Abort everything and refuse to go on: the cache's contents are unknown after a failure."""
        self._cause = error
        self._lost = tuple(self._requests)
        names = ", ".join(self._lost[:16]) + (", ..." if len(self._lost) > 16 else "")
        self._obituary = (
            f"the engine stopped: {type(error).__name__}: {error}; {len(self._lost)} unfinished requests"
            + (f" were aborted: {names}" if self._lost else "")
        )
        self._flight = None
        self.scheduler.rollback()
        for request in list(self._requests.values()):
            self._abort(request, text=False)  # outputs are dropped
        self._ready.clear()
        return EngineDeadError(self._obituary)

    def close(self) -> None:
        """Abort all requests and close the executor. May be called again."""
        if self._closed:
            return
        self._closed = True
        self._flight = None
        self.scheduler.rollback()
        for request in list(self._requests.values()):
            self._abort(request, text=False)  # outputs are dropped
        self._ready.clear()
        self.constraints.close()
        self._guides.close()
        if self._offload is not None:
            self._offload.close()
        try:
            self._executor.close()
        finally:
            if self._draft_executor is not None:
                self._draft_executor.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check(self) -> None:
        """Recompute everything from scratch.

        Raises:
            AssertionError: the scheduler, or what the engine believes of it, is inconsistent.
        """
        self.scheduler.check()
        if self._offload is not None:
            self._offload.check()
        self.adapters.check(request.adapter for request in self._requests.values())
        live = {(item.request_id, item.index): item for item in self.scheduler.running}
        live.update({(item.request_id, item.index): item for item in self.scheduler.waiting})
        for request in self._requests.values():
            running = [item for item in request.completions if item.finish_reason is None]
            if not running or len(running) != request.num_running or request.closed:
                raise AssertionError(f"E1: {request.request_id} has {len(running)} unfinished sequences")
            for item in running:
                if live.pop((request.request_id, item.sequence.index), None) is not item.sequence:
                    raise AssertionError(f"E2: the scheduler does not have {item.sequence!r}")
                index = -1 if request.adapter is None else request.adapter.index
                if item.sequence.adapter != index:
                    raise AssertionError(
                        f"E5: {item.sequence!r} has adapter {item.sequence.adapter}, not {index}"
                    )
                behind = item.sequence.num_output - item.num_tokens
                if behind < 0 or (behind > 0 and not item.deferred):
                    raise AssertionError(f"E3: {item.num_tokens} tokens delivered of {item.sequence!r}")
        if live:
            raise AssertionError(f"E4: sequences that belong to no request: {list(live)}")


def _check_config(config: EngineConfig) -> None:
    """Raises RequestError for values of a kind that the scheduler, which looks at ranges, cannot take."""
    integers = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_speculative_tokens")
    kinds: tuple[tuple[tuple[str, ...], type, str], ...] = (
        ((*integers, "prompt_lookup_min"), numbers.Integral, "an integer"),
        (("priority_interval", "target_itl_ms"), numbers.Real, "a number"),
    )
    for names, kind, limit in kinds:
        for name in names:
            value = getattr(config, name)
            optional = name == "target_itl_ms" and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, kind)):
                raise RequestError(name, value, limit)
    check_options(
        config.kv_offload_bytes,
        config.kv_offload_dir,
        config.kv_offload_encrypted,
        config.enable_prefix_caching,
    )


def _drafter(
    config: EngineConfig, draft_executor: Executor | None, clock: Callable[[], float]
) -> Drafter | None:
    if not config.num_speculative_tokens:
        if draft_executor is not None:
            raise RequestError("num_speculative_tokens", 0, "1..64 where there is a draft model")
        return None
    if draft_executor is None:
        return NgramDrafter(config.num_speculative_tokens, config.prompt_lookup_min)
    length = config.max_model_len if config.draft_model_len is None else config.draft_model_len
    return ModelDrafter(draft_executor, config.num_speculative_tokens, max_model_len=length, clock=clock)


def check_sleep_level(level: object) -> None:
    """Raises RequestError unless `Engine.sleep` knows the level."""
    if isinstance(level, bool) or level not in SLEEP_LEVELS:
        raise RequestError("level", level, "one of " + ", ".join(map(str, SLEEP_LEVELS)))
