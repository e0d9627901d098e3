"""A soak: many users for a while, most of them rude. Nothing may leak, and no answer may change.

    python tests/soak.py [--seconds 120] [--users 24] [--seed 0] [--model MODEL]

Users send requests of all kinds to one `AsyncLLM` whose KV cache is too small for them: some read to the
end, some walk away, some abort, some ask for what cannot be served. Meanwhile one request is sent again and
again: its answer, and the prompt's embedding, must keep their bits. `Engine.check` runs every second. At the
end all blocks are free, and memory, threads and open files are what they were after the first quarter of the
time. Prints one line; fails with a traceback.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable

import numpy as np

from fastllm import AsyncLLM, CapacityError, PoolingParams, RequestError, RequestOutput, SamplingParams
from fastllm.engine.engine import Engine
from fastllm.formats.source import DEFAULT_MODEL

RSS_GROWTH_MAX_BYTES = 48 << 20
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
CANARY = ("The capital of France is", SamplingParams(temperature=0.8, seed=11, max_tokens=12, logprobs=1))


def rss_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def footprint() -> tuple[int, int]:
    """Threads and open files of this process."""
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def fingerprint(output: RequestOutput) -> list[tuple[int, int]]:
    """Token ids with the bits of their log-probabilities."""
    completion = output.outputs[0]
    assert completion.logprobs is not None
    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
    return [(token, int(np.float32(entries[token].logprob).view(np.int32))) for token, entries in pairs]


class Soak:
    """One run: its users, what they count, and what must not change."""

    def __init__(self, llm: AsyncLLM, seconds: float, seed: int) -> None:
        self.llm = llm
        self.end = time.monotonic() + seconds
        self.random = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.expected: tuple[list[tuple[int, int]], bytes] | None = None

    def running(self) -> bool:
        return time.monotonic() < self.end

    def request(self) -> tuple[str, SamplingParams]:
        pick = self.random
        prompt = " ".join(pick.choices(WORDS, k=pick.choice((1, 5, 20, 60, 120))))
        params = SamplingParams(
            temperature=pick.choice((0.0, 0.7, 1.2)),
            top_p=pick.choice((1.0, 0.9)),
            top_k=pick.choice((0, 40)),
            n=pick.choice((1, 1, 1, 2)),
            max_tokens=pick.choice((1, 8, 40, 120)),
            repetition_penalty=pick.choice((1.0, 1.1)),
            logprobs=pick.choice((None, 0, 3)),
            prompt_logprobs=pick.choice((None, None, 1)),
            stop=pick.choice((None, ["."])),
            seed=pick.choice((None, 5)),
        )
        return prompt, params

    async def user(self, name: int) -> None:
        """One request after the other, with a different manner each time."""
        number = 0
        while self.running():
            number += 1
            manner = self.random.choices(
                ("reads", "embeds", "leaves", "aborts", "cancels", "impossible"), (6, 2, 1, 1, 1, 1)
            )[0]
            await getattr(self, manner)(f"user-{name}-{number}")
            self.counts[manner] += 1

    async def reads(self, name: str) -> None:
        last = None
        async for output in self.llm.generate(*self.request(), name):
            last = output
        assert last is not None
        assert last.finished
        assert all(completion.finish_reason in ("stop", "length") for completion in last.outputs)
        self.counts["tokens"] += sum(len(completion.token_ids) for completion in last.outputs)
        self.counts["preemptions"] += last.metrics.num_preemptions if last.metrics else 0

    async def embeds(self, name: str) -> None:
        prompt, _ = self.request()
        params = PoolingParams(pooling=self.random.choice(("last", "mean")))
        (output,) = [output async for output in self.llm.encode(prompt, params, name)]
        assert output.finish_reason == "stop"
        assert abs(float(np.linalg.norm(output.embedding)) - 1.0) < 1e-5

    async def leaves(self, name: str) -> None:
        async with contextlib.aclosing(self.llm.generate(*self.request(), name)) as stream:
            async for _ in stream:
                break

    async def aborts(self, name: str) -> None:
        last = None
        async for output in self.llm.generate(*self.request(), name):
            last = output
            await self.llm.abort(name)
        assert last is not None
        assert last.finished

    async def cancels(self, name: str) -> None:
        task = asyncio.ensure_future(self.reads(name))
        await asyncio.sleep(self.random.random() * 0.3)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def impossible(self, name: str) -> None:
        try:
            async for _ in self.llm.generate("word " * 2000, SamplingParams(max_tokens=5), name):
                raise AssertionError("a prompt longer than the model was served")
        except (RequestError, CapacityError):
            pass

    async def canary(self) -> None:
        while self.running():
            last = None
            async for output in self.llm.generate(*CANARY):
                last = output
            assert last is not None
            (pooled,) = [output async for output in self.llm.encode(CANARY[0], PoolingParams(pooling="mean"))]
            answer = fingerprint(last), pooled.embedding.tobytes()
            self.expected = self.expected or answer
            assert answer == self.expected, f"{answer} is not {self.expected}"
            self.counts["canaries"] += 1
            await asyncio.sleep(0.2)

    async def on_engine(self, function: Callable[[Engine], int | None]) -> int | None:
        return await asyncio.wrap_future(self.llm._thread.call(function))

    async def watch(self, warm_at: float) -> tuple[int, tuple[int, int]]:
        """Checks the engine every second; resident bytes and footprint once it is warm."""
        warm = None
        while self.running():
            await self.on_engine(Engine.check)
            self.counts["checks"] += 1
            if warm is None and time.monotonic() >= warm_at:
                warm = rss_bytes(), footprint()
            await asyncio.sleep(1.0)
        assert warm is not None
        return warm


async def soak(model: str, seconds: float, users: int, seed: int) -> str:
    """Runs all; returns the line to print. AssertionError: something leaked, or an answer changed."""
    start = time.monotonic()
    async with AsyncLLM(
        model, max_model_len=320, kv_cache_tokens=1280, max_num_seqs=users, progress=False
    ) as llm:
        run = Soak(llm, seconds, seed)
        everybody = [run.user(name) for name in range(users)]
        watching = asyncio.ensure_future(run.watch(start + seconds / 4))
        await asyncio.gather(run.canary(), *everybody)
        rss_warm, footprint_warm = await watching
        await run.on_engine(Engine.check)
        held = await run.on_engine(lambda engine: engine.pool.num_blocks - engine.pool.num_free)
        assert held == 0, f"{held} blocks were not given back"
        assert footprint() == footprint_warm, f"threads and files: {footprint_warm}, then {footprint()}"
        growth = rss_bytes() - rss_warm
        assert growth < RSS_GROWTH_MAX_BYTES, f"resident memory grew by {growth} bytes"
    assert run.counts["preemptions"] > 0, "the cache was never full"
    assert run.counts["canaries"] > 1
    done = ", ".join(f"{count} {name}" for name, count in sorted(run.counts.items()))
    return (
        f"{time.monotonic() - start:.0f} s, {users} users: {done}; resident memory {growth / 2**20:+.1f} MiB"
    )


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--users", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    options = parser.parse_args()
    print(asyncio.run(soak(options.model, options.seconds, options.users, options.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
