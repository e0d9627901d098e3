"""A soak: many users for a while, most of them rude. Nothing may leak, and no answer may change.

    python tests/soak.py [--seconds 120 | --requests 20000] [--users 24] [--seed 0] [--model MODEL] [--drafts]

MODEL is a model reference, or "tiny": random weights of `tiny.py` and two LoRA adapters, which thousands of
requests a minute can be sent to. Users send requests of all kinds to one `AsyncLLM` whose KV cache is too
small for them: some read to the end, some walk away, some abort, some ask for what cannot be served.
Meanwhile a few requests are sent again and again: their answers, and a prompt's embedding, must keep their
bits. `Engine.check` runs all the time, and the prefix cache is forgotten now and then. At the end all blocks
are free, every request has begun and ended once for the hooks, memory, threads and open files are what they
were after the first quarter, and nothing takes processor time. Prints one line; fails with a traceback.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import gc
import json
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fastllm import (
    AsyncLLM,
    CapacityError,
    LoRARequest,
    PoolingParams,
    RequestError,
    RequestOutput,
    SamplingParams,
)
from fastllm.engine import hooks as events
from fastllm.engine.engine import Engine
from fastllm.engine.hooks import EngineHook
from fastllm.formats.source import DEFAULT_MODEL
from fastllm.prompts import PromptType
from fastllm.structured_outputs import StructuredOutputsParams

T = TypeVar("T")

TINY = "tiny"
# 560 bytes for each of the last 15,000 of 20,000 requests. The buffers of larger models grow by more.
RSS_GROWTH_MAX_BYTES_TINY = 8 << 20
RSS_GROWTH_MAX_BYTES = 48 << 20
IDLE_SECONDS = 3.0
IDLE_SHARE_MAX = 0.01  # of one processor
CHECKS, CANARIES, RESETS = 200, 60, 25  # over the whole run
RETURNING_TOKENS = 80  # of a prompt whose blocks are evicted, and of those that evict them
WORDS = (
    "the",
    "river",
    "ran",
    "past",
    "a",
    "small",
    "town",
    "where",
    "nothing",
    "had",
    "ever",
    "happened",
    "yet",
)
BANNED = "q"
REGEX = "[a-c]{2,6}"
CHOICES = ["red", "green", "blue"]
FORMS: tuple[Mapping[str, Any], ...] = (
    {"regex": REGEX},
    {"choice": CHOICES},
    {"json": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}},
)
CANARY = "The capital of France is"
CANARY_PARAMS = (
    SamplingParams(temperature=0.8, seed=11, max_tokens=12, logprobs=1),
    SamplingParams(
        seed=12, max_tokens=12, logprobs=1, structured_outputs=StructuredOutputsParams(regex=REGEX)
    ),
)


def rss_bytes() -> int:
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def footprint() -> tuple[int, int]:
    """Threads and open files of this process. Workers of pools, which start when they are first needed and
    are few by construction, are left out."""
    threads = [item for item in threading.enumerate() if not re.search(r"_\d+$", item.name)]
    return len(threads), len(os.listdir("/proc/self/fd"))


def fingerprint(output: RequestOutput) -> list[tuple[int, int]]:
    """Token ids with the bits of their log-probabilities."""
    completion = output.outputs[0]
    assert completion.logprobs is not None
    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
    return [(token, int(np.float32(entries[token].logprob).view(np.int32))) for token, entries in pairs]


def check_form(form: StructuredOutputsParams, text: str) -> None:
    """The text of an output that has stopped."""
    if form.regex is not None:
        assert re.fullmatch(form.regex, text), text
    elif form.choice is not None:
        assert text in form.choice
    else:
        assert isinstance(json.loads(text)["a"], bool), text


class Tally(EngineHook):
    """Counts what the hooks are told of requests."""

    def __init__(self) -> None:
        self.queued = self.first_tokens = self.generated = self.finished = self.aborted = 0

    def on_queued(self, event: events.Queued) -> None:
        self.queued += 1

    def on_first_token(self, event: events.FirstToken) -> None:
        self.first_tokens += 1

    def on_finished(self, event: events.Finished) -> None:
        self.finished += 1
        self.generated += event.metrics.first_token_time is not None

    def on_aborted(self, event: events.Aborted) -> None:
        self.aborted += 1
        self.generated += event.metrics.first_token_time is not None

    def check(self) -> None:
        """Every request ended once, and had at most one first token. To be called when nothing runs."""
        assert self.queued == self.finished + self.aborted, vars(self)
        assert self.first_tokens == self.generated, vars(self)


class Soak:
    """One run: its users, what they count, and what must not change.

    Args:
        llm: what is soaked.
        seconds, requests: how long; one of them.
        adapters: that requests may have.
        longest: words of a prompt at most.
        kept_ids: that `allowed_token_ids` allows.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        seed: int,
        *,
        seconds: float | None,
        requests: int | None,
        adapters: list[LoRARequest],
        longest: int,
        kept_ids: list[int],
    ) -> None:
        self.llm = llm
        self.random = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.started = 0
        self.pace = 0.0  # seconds that a request of late has taken
        self._begin = time.monotonic()
        self._seconds = seconds
        self._requests = requests
        self._adapters = adapters
        self._words = (1, 5, longest // 6, longest // 2, longest)
        self._kept_ids = kept_ids
        self._expected: dict[str, Any] = {}

    def progress(self) -> float:
        """How much of the run is done; 1 and more: no request is to begin any more."""
        if self._requests is not None:
            return self.started / self._requests
        assert self._seconds is not None
        return (time.monotonic() - self._begin) / self._seconds

    # ---- users -------------------------------------------------------------------------------------------

    def prompt(self) -> PromptType:
        pick = self.random
        words = pick.choices(WORDS, k=pick.choice(self._words))
        if pick.random() < 0.5:  # some begin alike
            words[: len(WORDS)] = WORDS[: len(words)]
        return {"prompt": " ".join(words), "cache_salt": pick.choice((None, None, None, "one", "two"))}

    def params(self) -> SamplingParams:
        pick = self.random
        restriction = pick.choices(
            (
                {},
                {"structured_outputs": StructuredOutputsParams(**pick.choice(FORMS))},
                {"bad_words": [BANNED, "town where"]},
                {"allowed_token_ids": self._kept_ids},
                {"logit_bias": {pick.choice(self._kept_ids): 100.0}},  # one token again and again: guessed
            ),
            (7, 1, 1, 1, 1),
        )[0]
        formed = "structured_outputs" in restriction
        return SamplingParams(
            temperature=pick.choice((0.0, 0.7, 1.2)),
            top_p=pick.choice((1.0, 0.9)),
            top_k=pick.choice((0, 40)),
            n=pick.choice((1, 1, 1, 2, 3)),
            max_tokens=60 if formed else pick.choice((1, 8, 40, 90)),
            repetition_penalty=pick.choice((1.0, 1.1)),
            logprobs=pick.choice((None, 0, 3)),
            prompt_logprobs=pick.choice((None, None, 1)),
            stop=None if formed else pick.choice((None, ["."])),
            seed=pick.choice((None, 5)),
            **restriction,
        )

    def generate(self, name: str, params: SamplingParams) -> Any:
        lora = self.random.choice([None, None, *self._adapters])
        priority = self.random.choice((0, 0, 0, -1, 1))
        return self.llm.generate(self.prompt(), params, name, lora_request=lora, priority=priority)

    async def user(self, name: int) -> None:
        """One request after the other, with a different manner each time."""
        number = 0
        while self.progress() < 1.0:
            number += 1
            self.started += 1
            manner = self.random.choices(
                ("reads", "embeds", "leaves", "aborts", "cancels", "impossible"), (6, 2, 1, 2, 2, 1)
            )[0]
            await getattr(self, manner)(f"user-{name}-{number}")
            self.counts[manner] += 1

    async def reads(self, name: str) -> None:
        begin = time.monotonic()
        params = self.params()
        last = None
        async for output in self.generate(name, params):
            last = output
        assert last is not None
        assert last.finished
        for completion in last.outputs:
            assert completion.finish_reason in ("stop", "length"), completion
            if params.bad_words:
                assert BANNED not in completion.text
            if params.allowed_token_ids is not None:
                assert set(completion.token_ids) <= set(params.allowed_token_ids)
            if params.structured_outputs is not None and completion.finish_reason == "stop":
                check_form(params.structured_outputs, completion.text)
        self.counts["tokens"] += sum(len(completion.token_ids) for completion in last.outputs)
        self.counts["preemptions"] += last.metrics.num_preemptions if last.metrics else 0
        self.counts["cached tokens"] += last.num_cached_tokens or 0
        self.pace += 0.1 * (time.monotonic() - begin - self.pace)

    async def embeds(self, name: str) -> None:
        params = PoolingParams(pooling=self.random.choice(("last", "mean")))
        (output,) = [output async for output in self.llm.encode(self.prompt(), params, name)]
        assert output.finish_reason == "stop"
        assert abs(float(np.linalg.norm(output.embedding)) - 1.0) < 1e-5

    async def leaves(self, name: str) -> None:
        async with contextlib.aclosing(self.generate(name, self.params())) as stream:
            async for _ in stream:
                if self.random.random() < 0.3:
                    break

    async def aborts(self, name: str) -> None:
        """At a random moment: before it is queued, while it waits, in its prompt, in its answer, at its end,
        after it."""

        async def read() -> RequestOutput | None:
            last = None
            async for output in self.generate(name, self.params()):
                last = output
            return last

        task = asyncio.ensure_future(read())
        await asyncio.sleep(self.random.random() * 1.5 * self.pace)
        await self.llm.abort(name)
        last = await task
        assert last is not None
        assert last.finished

    async def cancels(self, name: str) -> None:
        task = asyncio.ensure_future(self.reads(name))
        await asyncio.sleep(self.random.random() * 1.5 * self.pace)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def impossible(self, name: str) -> None:
        try:
            async for _ in self.llm.generate("word " * 2000, SamplingParams(max_tokens=5), name):
                raise AssertionError("a prompt longer than the model was served")
        except (RequestError, CapacityError):
            pass

    # ---- what goes on beside them ------------------------------------------------------------------------

    async def regularly(self, times: int, action: Callable[[], Awaitable[object]]) -> None:
        """Something that is done so many times, spread over the run."""
        for turn in range(times):
            while self.progress() < turn / times:
                await asyncio.sleep(0.01)
            await action()

    async def canary(self) -> None:
        answers: dict[str, Any] = {}
        for params in CANARY_PARAMS:
            for lora in (None, *self._adapters):
                last = None
                async for output in self.llm.generate(CANARY, params, lora_request=lora):
                    last = output
                assert last is not None
                answers[f"{params.seed} {lora and lora.lora_name}"] = fingerprint(last)
        (pooled,) = [output async for output in self.llm.encode(CANARY, PoolingParams(pooling="mean"))]
        answers["embedding"] = pooled.embedding.tobytes()
        self._expected = self._expected or answers
        assert answers == self._expected
        self.counts["canaries"] += 1

    async def comes_back(self, capacity: int) -> None:
        """A prompt that has lost its blocks to others finds them in the file: the same answer, and restored
        tokens. To be called when nothing else runs."""
        pick = self.random
        prompt = pick.choices(self._kept_ids, k=RETURNING_TOKENS)
        params = SamplingParams(temperature=0.8, seed=13, max_tokens=8, logprobs=1)
        answers, restored = [], []
        for _ in range(2):
            async for output in self.llm.generate({"prompt_token_ids": prompt}, params):
                last = output
            answers.append(fingerprint(last))
            restored.append((await self.on_engine(Engine.load)).num_restored_tokens)
            for _ in range(capacity // RETURNING_TOKENS + 1):
                other = pick.choices(self._kept_ids, k=RETURNING_TOKENS)
                async for _ in self.llm.generate({"prompt_token_ids": other}, SamplingParams(max_tokens=1)):
                    pass
        assert answers[0] == answers[1]
        assert restored[1] > restored[0], "nothing came back from the file"

    async def compile(self) -> None:
        """Every form once, in peace: a grammar has three seconds, whatever else the machine does."""
        for form in FORMS:
            params = SamplingParams(max_tokens=1, structured_outputs=StructuredOutputsParams(**form))
            async for _ in self.llm.generate(CANARY, params):
                pass

    async def on_engine(self, function: Callable[[Engine], T]) -> T:
        return await asyncio.wrap_future(self.llm._thread.call(function))

    async def check(self) -> None:
        await self.on_engine(Engine.check)
        self.counts["checks"] += 1

    async def warm(self) -> tuple[int, tuple[int, int]]:
        """Resident bytes and footprint after a quarter of the run."""
        while self.progress() < 0.25:
            await asyncio.sleep(0.01)
        return rss_bytes(), footprint()

    async def idle_share(self) -> float:
        """What share of a processor this process takes while it has nothing to do."""
        begin, used = time.monotonic(), time.process_time()
        await asyncio.sleep(IDLE_SECONDS)
        return (time.process_time() - used) / (time.monotonic() - begin)


async def run_soak(
    path: str | Path,
    users: int,
    seed: int,
    *,
    seconds: float | None = None,
    requests: int | None = None,
    adapters: list[LoRARequest],
    longest: int,
    growth_max: int,
    **options: Any,
) -> str:
    """Runs all; returns the line to print. AssertionError: something leaked, or an answer changed."""
    start = time.monotonic()
    tally = Tally()
    before = threading.active_count(), footprint()
    async with AsyncLLM(path, max_num_seqs=users, progress=False, hooks=[tally], **options) as llm:
        tokenizer = await llm.get_tokenizer()
        kept = sorted({*tokenizer.encode(" ".join(WORDS)), *tokenizer.eos_token_ids})
        run = Soak(
            llm, seed, seconds=seconds, requests=requests, adapters=adapters, longest=longest, kept_ids=kept
        )
        await run.compile()
        work: list[Coroutine[Any, Any, None]] = [
            run.regularly(CHECKS, run.check),
            run.regularly(CANARIES, run.canary),
            run.regularly(RESETS, llm.reset_prefix_cache),
            *(run.user(name) for name in range(users)),
        ]
        warm, *_ = await asyncio.gather(run.warm(), *work)
        rss_warm, footprint_warm = warm
        took = time.monotonic() - start

        await run.on_engine(Engine.check)
        load = await run.on_engine(Engine.load)
        assert (load.num_running, load.num_waiting, load.num_used_blocks, load.kv_usage) == (0, 0, 0, 0.0), (
            load
        )
        capacity = await run.on_engine(lambda engine: engine.pool.num_blocks)
        if "kv_offload_bytes" in options:
            block_size = await run.on_engine(lambda engine: engine.pool.block_size)
            await run.comes_back(capacity * block_size)
        await llm.reset_prefix_cache()
        load = await run.on_engine(Engine.load)
        assert (load.num_free_blocks, load.num_cached_blocks) == (capacity, 0), load
        tally.check()
        assert footprint() == footprint_warm, f"threads and files: {footprint_warm}, then {footprint()}"
        growth = rss_bytes() - rss_warm
        assert growth < growth_max, f"resident memory grew by {growth} bytes, more than {growth_max}"
        idle = await run.idle_share()
        assert idle < IDLE_SHARE_MAX, f"{idle:.2%} of a processor with nothing to do"
        guesses = await run.on_engine(lambda engine: engine.scheduler.num_accepted_tokens)
        restored = (await run.on_engine(Engine.load)).num_restored_tokens
    after = threading.active_count(), footprint()
    assert after == before, f"threads, without pools, files: {before}, closed {after}"
    assert load.num_preemptions > 0, "the cache was never full"
    assert run.counts["canaries"] > 1
    if "speculative_config" in options:
        assert guesses > 0, "no guess was ever right"
    done = ", ".join(f"{count} {name}" for name, count in sorted(run.counts.items()))
    return (
        f"{took:.0f} s, {users} users, {run.started} requests, {tally.aborted} ended early: {done}, "
        f"{load.num_preemptions} preemptions in all, {guesses} tokens guessed right, {restored} restored; "
        f"resident memory {growth / 2**20:+.1f} MiB since a quarter; idle {idle:.2%} of a processor"
    )


def soak(
    model: str,
    users: int,
    seed: int,
    *,
    seconds: float | None = None,
    requests: int | None = None,
    drafts: bool = False,
) -> str:
    """A whole run in an event loop of its own; see the module's docstring. One of seconds and requests."""
    if model != TINY:
        return asyncio.run(
            run_soak(
                model, users, seed, seconds=seconds, requests=requests, adapters=[], longest=120,
                growth_max=RSS_GROWTH_MAX_BYTES, max_model_len=320, kv_cache_tokens=1280,
            )
        )  # fmt: skip
    import tiny
    from lora_files import save_adapter

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        network = tiny.make_model("llama")
        path = tiny.save_hf(network, place / "model")
        adapters = [
            LoRARequest(name, save_adapter(place / name, network, seed=number).path)
            for number, name in enumerate(("first", "second"))
        ]
        guesses = {"method": "draft_model", "model": path} if drafts else {"method": "ngram"}
        return asyncio.run(
            run_soak(
                path, users, seed, seconds=seconds, requests=requests, adapters=adapters,
                longest=35, growth_max=RSS_GROWTH_MAX_BYTES_TINY, kv_cache_tokens=1536, threads=2,
                speculative_config=guesses,
                target_itl_ms=20.0, kv_offload_bytes=4 << 20,
            )
        )  # fmt: skip


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float)
    length.add_argument("--requests", type=int)
    parser.add_argument("--users", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--drafts", action="store_true", help="the tiny model drafts for itself")
    options = parser.parse_args()
    seconds = 120.0 if options.seconds is None and options.requests is None else options.seconds
    if options.drafts and options.model != TINY:
        parser.error("--drafts needs --model tiny")
    print(
        soak(
            options.model, options.users, options.seed, seconds=seconds, requests=options.requests,
            drafts=options.drafts,
        )
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
