"""How compare.py talks with a program that it measures in an environment of its own. Needs Python alone.

The script gets one JSON argument: {"model", "threads", "max_len", "max_seqs", "max_step_tokens", ...}. It
loads the model and answers one line of JSON for every line of JSON, a job:

    {"batch": B, "prompt": P, "generate": G, "repeats": R, "warmup": W, "seed": S}

B sequences of P random tokens each, different ones every time, generate G tokens each, greedily and past any
end-of-sequence token. The answer has a list with one entry per repeat:

    prefill_seconds   from handing over the prompts until every sequence has its first token
    decode_seconds    from there to the last token
    decoded           tokens that were generated in decode_seconds, over all sequences
    total_seconds     both, from handing over to the last token
    requests          how many of the B were run; fewer only where they are run one after the other

Standard output belongs to the answers; whatever else writes there is sent to standard error.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

LOWEST_ID = 100  # above the control tokens of the vocabularies in use


@dataclass
class Sample:
    """One repeat; see above."""

    prefill_seconds: float
    decode_seconds: float
    decoded: int
    total_seconds: float
    requests: int


Generate = Callable[[list[list[int]], int], Sample]
"""Prompts and tokens to generate for each -> what it took."""


def setup() -> dict[str, Any]:
    """The script's argument."""
    found: dict[str, Any] = json.loads(sys.argv[1])
    return found


def serve(generate: Generate, vocab: int, about: dict[str, Any]) -> None:
    """Answers jobs until standard input ends. `about` is told first, with the time at which it is ready."""
    out = _take_stdout()
    print(json.dumps({"ready": time.time(), **about}), file=out, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        samples = []
        for number, prompts in enumerate(_prompts(job, vocab)):
            sample = generate(prompts, job["generate"])
            if number >= job["warmup"]:
                samples.append(asdict(sample))
        print(json.dumps({"samples": samples, "done": time.time(), **status()}), file=out, flush=True)


def _prompts(job: dict[str, Any], vocab: int) -> Iterator[list[list[int]]]:
    stream = random.Random(job["seed"])
    for _ in range(job["warmup"] + job["repeats"]):
        yield [
            [stream.randrange(LOWEST_ID, vocab) for _ in range(job["prompt"])] for _ in range(job["batch"])
        ]


_taken: Any = None


def _take_stdout() -> Any:
    """Standard output, kept for the answers; libraries that print go to standard error from here on."""
    global _taken
    if _taken is None:
        _taken = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
    return _taken


def reserve_stdout() -> Any:
    """The file for the answers. To be called before a library that prints while it loads."""
    return _take_stdout()


def status() -> dict[str, int]:
    """Bytes of memory that this process has held at most, from the operating system."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return {"peak_bytes": int(line.split()[1]) * 1024}
    return {}


class Steps:
    """Turns "so many tokens so far per sequence" after every step into a Sample."""

    def __init__(self, sequences: int) -> None:
        self._sequences = sequences
        self._start = time.perf_counter()
        self._all_began = 0.0
        self._before = 0
        self._counts: dict[Any, int] = {}

    def after(self, counts: dict[Any, int]) -> None:
        """Sequences with new tokens, and how many each has now."""
        self._counts.update(counts)
        if not self._all_began and len(self._counts) == self._sequences and all(self._counts.values()):
            self._all_began = time.perf_counter()
            self._before = sum(self._counts.values())

    def sample(self) -> Sample:
        """Once all have ended."""
        end = time.perf_counter()
        return Sample(
            prefill_seconds=self._all_began - self._start,
            decode_seconds=end - self._all_began,
            decoded=sum(self._counts.values()) - self._before,
            total_seconds=end - self._start,
            requests=self._sequences,
        )
