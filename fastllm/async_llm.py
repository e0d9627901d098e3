"""`AsyncLLM`: a model to call from asyncio, with the names that vLLM's users know."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fastllm.engine_thread import CLOSED, Admission, EngineThread, Mailbox, Output, aborted_output
from fastllm.errors import EngineDeadError, RequestError
from fastllm.formats.source import DEFAULT_MODEL
from fastllm.loading import ModelOptions, load_model
from fastllm.lora import AdapterLoader, LoRARequest, parse_loras
from fastllm.outputs import EmbeddingOutput, RequestOutput
from fastllm.pooling_params import PoolingParams
from fastllm.prompts import (
    Message,
    Prompt,
    PromptType,
    parse_params,
    parse_pooling_params,
    parse_prompt,
    render_chat,
    tokenize,
)
from fastllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from fastllm.engine.constraints import Constraint
    from fastllm.engine.engine import Engine, EngineLoad
    from fastllm.engine.hooks import EngineHook
    from fastllm.engine.profile import Profile
    from fastllm.formats.tokenizer import Tokenizer

# Text up to this length is tokenized where it stands; that takes less than a millisecond.
_INLINE_CHARACTERS = 4096


class AsyncLLM:
    """A model, loaded and ready, for event loops.

    One thread runs the engine; requests of any number of tasks, event loops and threads share its batches.
    An idle AsyncLLM takes no processor time, a reader that is slow or blocked never holds the others up.
    Making one loads the model and takes as long as that does.

    Args and errors: those of `LLM`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        key_file: str | os.PathLike[str] | None = None,
        sha256: str | None = None,
        tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        block_size: int = 16,
        enable_prefix_caching: bool = True,
        kv_offload_bytes: int | None = None,
        kv_offload_dir: str | os.PathLike[str] | None = None,
        kv_offload_encrypted: bool | None = None,
        speculative_config: Mapping[str, Any] | None = None,
        target_itl_ms: float | None = None,
        kv_cache_memory_bytes: int | None = None,
        kv_cache_tokens: int | None = None,
        kv_cache_memory_share: float | None = None,
        threads: int | None = None,
        max_loras: int = 8,
        async_scheduling: bool = True,
        seed: int = 0,
        device: str = "cpu",
        dtype: str = "auto",
        deterministic: bool = False,
        tensor_parallel_size: int = 1,
        hooks: Sequence[EngineHook] = (),
        progress: bool = True,
    ) -> None:
        options = ModelOptions(
            model=model,
            key_file=key_file,
            sha256=sha256,
            tokenizer=tokenizer,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            enable_prefix_caching=enable_prefix_caching,
            kv_offload_bytes=kv_offload_bytes,
            kv_offload_dir=kv_offload_dir,
            kv_offload_encrypted=kv_offload_encrypted,
            speculative_config=speculative_config,
            target_itl_ms=target_itl_ms,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            kv_cache_tokens=kv_cache_tokens,
            kv_cache_memory_share=kv_cache_memory_share,
            threads=threads,
            max_loras=max_loras,
            async_scheduling=async_scheduling,
            seed=seed,
            device=device,
            dtype=dtype,
            deterministic=deterministic,
            tensor_parallel_size=tensor_parallel_size,
            progress=progress,
        )
        loaded = load_model(options, hooks)
        self._begin(loaded.engine, loaded.tokenizer, loaded.max_model_len)

    @classmethod
    def _from_parts(cls, engine: Engine, tokenizer: Tokenizer) -> AsyncLLM:
        """An AsyncLLM around an engine that was made elsewhere; it takes the engine over."""
        llm = cls.__new__(cls)
        llm._begin(engine, tokenizer, engine.config.max_model_len)
        return llm

    def _begin(self, engine: Engine, tokenizer: Tokenizer, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._max_num_seqs = engine.config.max_num_seqs
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._bells: _LoopBells = weakref.WeakKeyDictionary()
        self._preparing: dict[str, _Preparation] = {}
        self._workers = ThreadPoolExecutor(1, thread_name_prefix="fastllm-tokenize")
        self._constraints = engine.constraints
        # Of its own: texts do not wait for files. The thread starts with the first adapter.
        self._loaders = ThreadPoolExecutor(1, thread_name_prefix="fastllm-adapter")
        self._thread = EngineThread(engine)
        self._adapters = AdapterLoader(self._thread)

    # ---- generating --------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: PromptType,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Continue a prompt; outputs come as the engine's steps do.

        With output_kind CUMULATIVE a slow reader gets the newest output and not those that it replaces, with
        DELTA what is new since the last, joined. To close the generator, or to cancel the task that waits
        in it, ends the request within a step. Nothing begins before the first step of the iteration.

        Args:
            prompt: text, {"prompt": text} or {"prompt_token_ids": [ids]}.
            sampling_params: None: `SamplingParams()`.
            request_id: a name that no unfinished request has; None: one is made up.
            lora_request: the adapter to answer with. One that has a path and is not loaded yet is loaded
                first, off the event loop.
            priority: lower is served first, and may interrupt what is higher; equal ones go by arrival.

        Raises:
            RequestError: the prompt or the parameters are malformed.

        Raises (in the iteration):
            RequestError, CapacityError: the request cannot be served; nothing was begun.
            ModelFileError, UnsupportedModelError: the adapter cannot be loaded; see `add_lora`.
            EngineDeadError: the AsyncLLM is closed, or its engine has failed.
        """
        parsed = parse_prompt(prompt)
        (params,) = parse_params(sampling_params, 1)
        (lora,) = parse_loras(lora_request, 1)
        return self._generate(self._tokenizing(parsed, lora), params, request_id, priority, parsed.cache_salt)

    def encode(
        self,
        prompt: PromptType,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[EmbeddingOutput, None]:
        """Embed a prompt; there is one output.

        Args:
            pooling_params: None: `PoolingParams()`.
            prompt, request_id, lora_request, priority: as for `generate`.

        Raises:
            As `generate`.
        """
        parsed = parse_prompt(prompt)
        params = parse_pooling_params(pooling_params)
        (lora,) = parse_loras(lora_request, 1)
        return self._generate(self._tokenizing(parsed, lora), params, request_id, priority, parsed.cache_salt)

    def _tokenizing(self, parsed: Prompt, lora: LoRARequest | None) -> _Preparation:
        inline = parsed.text is None or parsed.token_ids is not None or len(parsed.text) <= _INLINE_CHARACTERS
        return _Preparation(parsed.text, lambda: tokenize(self._tokenizer, parsed), lora, inline=inline)

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a conversation. The template is rendered off the event loop.

        Args:
            messages: [{"role": "user", "content": "..."}, ...].
            add_generation_prompt, chat_template, chat_template_kwargs, tools: as for `LLM.chat`.
            sampling_params, request_id, lora_request, priority: as for `generate`.
            cache_salt: cached blocks are shared only with requests of the same one.

        Raises:
            As `generate` and `LLM.chat`.
        """
        (params,) = parse_params(sampling_params, 1)

        def render() -> Sequence[int]:
            return render_chat(
                self._tokenizer,
                messages,
                add_generation_prompt=add_generation_prompt,
                chat_template=chat_template,
                chat_template_kwargs=chat_template_kwargs,
                tools=tools,
            )

        (lora,) = parse_loras(lora_request, 1)
        work = _Preparation(None, render, lora, inline=False)
        return self._generate(work, params, request_id, priority, cache_salt)

    async def _generate(
        self,
        work: _Preparation,
        params: SamplingParams | PoolingParams,
        request_id: str | None,
        priority: int,
        cache_salt: str | None,
    ) -> AsyncGenerator[Any, None]:
        """The outputs are of the kind that the parameters are for."""
        if request_id is None:
            request_id = f"fastllm-{next(self._numbers)}"
        self._thread.check_health()
        ids, constraint = await self._prepare(work, request_id, params)
        if work.aborted:
            yield aborted_output(request_id, work.text, ids, params)
            return
        bell = self._bell(asyncio.get_running_loop())
        mailbox: _AsyncMailbox[Any] = _AsyncMailbox(request_id, params.output_kind, bell)
        finished = False
        try:
            adapter = None if work.lora is None else work.lora.lora_name
            self._thread.post(
                Admission(mailbox, work.text, ids, params, priority, "", cache_salt, adapter, constraint)
            )
            while not finished:
                output = await mailbox.next()
                finished = output.finished
                yield output
        finally:
            # Perhaps on behalf of the garbage collector, in any thread: nothing here waits.
            if not finished:
                self._thread.discard([mailbox])

    async def _prepare(
        self, work: _Preparation, request_id: str, params: SamplingParams | PoolingParams
    ) -> tuple[Sequence[int], Constraint | None]:
        """Token ids, the adapter and the constraint, off the event loop where that takes long; `abort`
        reaches the request all the same."""
        loading = work.lora is not None and self._adapters.missing(work.lora)
        constrained = isinstance(params, SamplingParams) and params.constrained
        if work.inline and not loading and not constrained:
            return work.run(), None

        def load_and_run() -> Sequence[int]:
            self._adapters.load_all([work.lora])
            return work.run()

        with self._lock:
            if request_id in self._preparing:
                raise RequestError("request_id", request_id, "a name that no unfinished request has")
            self._preparing[request_id] = work
        try:
            try:
                future = self._loaders.submit(load_and_run) if loading else self._workers.submit(work.run)
            except RuntimeError as error:  # they were shut down a moment ago
                raise EngineDeadError(CLOSED) from error
            ids = await asyncio.wrap_future(future)
            if not isinstance(params, SamplingParams) or not params.constrained or work.aborted:
                return ids, None
            return ids, await asyncio.wrap_future(self._constraints.submit(params))
        finally:
            with self._lock:
                del self._preparing[request_id]

    def _bell(self, loop: asyncio.AbstractEventLoop) -> _LoopBell:
        with self._lock:
            bell = self._bells.get(loop)
            if bell is None:
                bell = self._bells[loop] = _LoopBell(loop)
            return bell

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End one request or several, in any state. Returns at once; unknown ids are ignored.

        Their generators yield a last output with finish_reason "abort", and what there was until then.
        """
        ids = (request_id,) if isinstance(request_id, str) else tuple(request_id)
        with self._lock:
            for name in ids:
                if name in self._preparing:
                    self._preparing[name].aborted = True
        self._thread.abort(ids)

    # ---- pause, sleep, cache, profile --------------------------------------------------------------------

    async def pause_generation(
        self, *, wait_for_inflight_requests: bool = False, clear_cache: bool = True
    ) -> None:
        """Compute nothing until `resume_generation`: requests that come meanwhile wait, in their order.

        Args:
            wait_for_inflight_requests: let those that there are come to their end first; else they are
                aborted.
            clear_cache: forget what the prefix cache holds, as for a change of the model.

        Raises:
            RequestError: an argument is no bool.
            EngineDeadError: the AsyncLLM is closed, or its engine has failed.
        """
        for name, value in (
            ("wait_for_inflight_requests", wait_for_inflight_requests),
            ("clear_cache", clear_cache),
        ):
            if not isinstance(value, bool):
                raise RequestError(name, value, "a bool")
        paused = self._thread.pause(wait=wait_for_inflight_requests, reset_prefix_cache=clear_cache)
        await asyncio.wrap_future(paused)

    async def resume_generation(self) -> None:
        """Go on after `pause_generation`; without it, do nothing."""
        await asyncio.wrap_future(self._thread.resume())

    async def is_paused(self) -> bool:
        """Whether `pause_generation` was called and `resume_generation` not yet."""
        return self._thread.is_paused

    async def sleep(self, level: int = 1, *, mode: str = "refuse") -> None:
        """`LLM.sleep` without holding up the event loop."""
        await asyncio.wrap_future(self._thread.sleep(level, mode))

    async def wake_up(self) -> None:
        """`LLM.wake_up` without holding up the event loop."""
        await asyncio.wrap_future(self._thread.call(lambda engine: engine.wake_up()))

    async def is_sleeping(self) -> bool:
        """Whether it sleeps."""
        return await asyncio.wrap_future(self._thread.call(lambda engine: engine.is_sleeping))

    async def reset_prefix_cache(self) -> None:
        """Forget what cached blocks hold: no later request finds them. What runs is not disturbed."""
        await asyncio.wrap_future(self._thread.call(lambda engine: engine.reset_prefix_cache()))

    async def load(self) -> EngineLoad:
        """How busy the engine is: sequences, blocks, what the prefix cache did; between two steps."""
        return await asyncio.wrap_future(self._thread.call(lambda engine: engine.load()))

    async def start_profile(self) -> Profile:
        """Measure where the time of the steps goes, until `stop_profile`.

        Returns:
            The profile, which is complete then; see `LLM.profile`.

        Raises:
            RequestError: another profile is being taken.
            EngineDeadError: the AsyncLLM is closed, or its engine has failed.
        """
        return await asyncio.wrap_future(self._thread.call(lambda engine: engine.start_profile()))

    async def stop_profile(self) -> None:
        """End the measurement; without one, do nothing."""
        await asyncio.wrap_future(self._thread.call(lambda engine: engine.stop_profile()))

    # ---- adapters ----------------------------------------------------------------------------------------

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Load a LoRA adapter off the event loop; see `LLM.add_lora`."""
        (lora,) = parse_loras([lora_request], 1)
        if lora is None:
            raise RequestError("lora_request", None, "a LoRARequest")
        try:
            future = self._loaders.submit(self._adapters.load, lora)
        except RuntimeError as error:  # closed
            raise EngineDeadError(CLOSED) from error
        return await asyncio.wrap_future(future)

    async def remove_lora(self, lora_name: str) -> bool:
        """Unload an adapter; see `LLM.remove_lora`."""
        # Shielded: whoever stops waiting does not take the command back.
        return await asyncio.shield(asyncio.wrap_future(self._adapters.remove(lora_name)))

    async def list_loras(self) -> list[LoRARequest]:
        """The loaded adapters in the order in which they were loaded."""
        return self._adapters.loaded()

    # ---- state -------------------------------------------------------------------------------------------

    async def check_health(self) -> None:
        """Raises EngineDeadError when the engine is closed or has failed."""
        self._thread.check_health()

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_running

    @property
    def errored(self) -> bool:
        """Whether the engine has failed."""
        return self._thread.failure is not None

    @property
    def dead_error(self) -> EngineDeadError | None:
        """The failure, its cause chained; None where there was none."""
        return self._thread.failure

    @property
    def max_model_len(self) -> int:
        """Most tokens of a sequence, prompt included."""
        return self._max_model_len

    @property
    def max_num_seqs(self) -> int:
        """Most sequences that run at once; further ones wait."""
        return self._max_num_seqs

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    async def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer: `encode`, `decode`, `apply_chat_template`."""
        return self._tokenizer

    # ---- the end -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """End all requests, stop the threads and give the memory back; waits for the step that is under way.

        May be called again, and from any thread. Unfinished generators raise EngineDeadError.
        """
        self._thread.stop()
        self._workers.shutdown(wait=True)
        self._loaders.shutdown(wait=True)
        self._thread.join()

    def shutdown(self) -> None:
        """The same as `close`."""
        self.close()

    async def aclose(self) -> None:
        """`close` without holding up the event loop."""
        self._thread.stop()
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def run() -> None:
            self.close()
            loop.call_soon_threadsafe(_settle, done)

        closer = threading.Thread(target=run, name="fastllm-close")
        closer.start()
        await done
        closer.join()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __enter__(self) -> AsyncLLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_thread"):  # not there if __init__ failed
            self._thread.stop()


class _Preparation:
    """What must be done before a request has token ids."""

    __slots__ = ("aborted", "inline", "lora", "run", "text")

    def __init__(
        self, text: str | None, run: Callable[[], Sequence[int]], lora: LoRARequest | None, *, inline: bool
    ) -> None:
        self.text = text
        self.lora = lora
        self.run = run
        self.inline = inline
        self.aborted = False


class _AsyncMailbox(Mailbox[Output]):
    """A mailbox whose reader awaits."""

    __slots__ = ("posted",)

    def __init__(self, request_id: str, kind: RequestOutputKind, bell: _LoopBell) -> None:
        super().__init__(request_id, kind, bell)
        self.posted = asyncio.Event()

    async def next(self) -> Output:
        while True:
            self.posted.clear()
            output = self.take()
            if output is not None:
                return output
            await self.posted.wait()


class _LoopBell:
    """Wakes the readers of one event loop: one call into the loop per step, however many they are.

    While such a call is under way nothing more is scheduled, so a loop that is blocked does not pile them up.
    """

    __slots__ = ("_loop", "_posted", "_scheduled")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._posted: deque[_AsyncMailbox[Any]] = deque()
        self._scheduled = False

    def post(self, mailbox: Mailbox[Any]) -> None:
        assert isinstance(mailbox, _AsyncMailbox)
        self._posted.append(mailbox)

    def ring(self) -> bool:
        loop = self._loop()
        if loop is None or loop.is_closed():  # its readers will never come
            return False
        if not self._scheduled:
            self._scheduled = True  # before it can run
            try:
                loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # closed a moment ago
                return False
        return True

    def _deliver(self) -> None:
        """On the event loop."""
        self._scheduled = False  # before looking: what is posted from now on rings again
        while self._posted:
            self._posted.popleft().posted.set()


_LoopBells = weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopBell]


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
