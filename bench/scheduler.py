"""What scheduling costs: schedule + update per step, and the Python share of a whole engine step.

    python bench/scheduler.py [--json FILE]

The executor here computes nothing (its result is made beforehand), so what is measured is the host's work
alone: first the scheduler by itself with 1 to 1,024 decoding sequences of prompts of their own, all of whose
blocks are hashed and remembered, then `Engine.step` with detokenizing and outputs. Goals: schedule + update
within 20 us + 0.5 us per running sequence; `Engine.step` at 32 sequences within 1,000 us.

A sequence fills a block, which is then hashed, every BLOCK_SIZE steps. So steps are taken by their place in
that period: of each place the median over the steady state, in microseconds. "schedule+update" is the mean of
these, with sequences that fill their blocks at different times; "all hash" is the place at which every
sequence fills a block, where all do so together.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fastllm.engine.engine import Engine, EngineConfig
from fastllm.engine.scheduler import Scheduler
from fastllm.engine.sequence import Sequence, prefix_root
from fastllm.executor.base import StepBatch, StepResult
from fastllm.sampling_params import RequestOutputKind, SamplingParams

VOCAB = 50_000
BLOCK_SIZE = 16
PROMPT = 100  # tokens
STEPS = 400


class IdleExecutor:
    """Answers every row with the same token, at no cost."""

    block_size = BLOCK_SIZE

    def __init__(self, max_rows: int) -> None:
        self._results = [self._result(rows) for rows in range(max_rows + 1)]
        self._rows = 0

    @staticmethod
    def _result(rows: int) -> StepResult:
        tokens = np.full(rows, 7, np.int32)
        floats = np.zeros(rows, np.float32)
        return StepResult(
            tokens, floats, np.ones(rows, np.int32), tokens.reshape(rows, 1), floats.reshape(rows, 1)
        )

    def kv_capacity(self) -> int:
        return 1024 * (PROMPT + STEPS + BLOCK_SIZE) // BLOCK_SIZE

    def submit(self, batch: StepBatch) -> int:
        self._rows = len(batch.row_seq)
        return 0

    def collect(self, ticket: int) -> StepResult:
        return self._results[self._rows]

    def close(self) -> None:
        pass


class WordTokenizer:
    vocab_size = VOCAB
    eos_token_ids = frozenset({2})

    def token_bytes(self, id: int) -> bytes:
        return b" word"


class WordDetokenizer:
    """The least that a detokenizer can do."""

    def __init__(self, tokenizer: Any, prompt: Any, skip_special_tokens: bool) -> None:
        pass

    def push(self, ids: Any) -> str:
        return " word"

    def flush(self) -> str:
        return ""


def real_tokenizer(reference: str) -> Any:
    """The tokenizer of a model, with fastllm's own detokenizer."""
    from fastllm.formats.checkpoint import open_checkpoint
    from fastllm.formats.source import resolve
    from fastllm.formats.tokenizer import load_tokenizer

    with open_checkpoint(resolve(reference)) as checkpoint:
        return load_tokenizer(checkpoint)


def prompt_of(number: int, together: bool) -> np.ndarray:
    """Token ids that no other prompt begins with; unless `together`, prompts are of all lengths that end at
    different places of a block."""
    length = PROMPT if together else PROMPT + number % BLOCK_SIZE
    return (np.arange(length, dtype=np.int32) + number * 37) % (VOCAB - 3) + 3


def time_scheduler(count: int, params: SamplingParams, *, together: bool = False) -> list[float]:
    """Microseconds of schedule + update with `count` decoding sequences: by the place in the period of
    BLOCK_SIZE steps, the median. `together`: all sequences fill their blocks in the same step."""
    executor = IdleExecutor(count)
    scheduler = Scheduler(
        num_blocks=executor.kv_capacity(),
        block_size=BLOCK_SIZE,
        max_num_seqs=count,
        max_num_batched_tokens=count * (PROMPT + BLOCK_SIZE),  # all prompts in one step
        max_model_len=PROMPT + STEPS + 1,
        vocab_size=VOCAB,
    )
    root = prefix_root("bench")
    for i in range(count):
        scheduler.add(Sequence(str(i), prompt_of(i, together), params, seed=i, eos_token_ids=[2], root=root))
    times: list[list[float]] = [[] for _ in range(BLOCK_SIZE)]
    decoding = 0
    while decoding < STEPS // 2:
        start = time.perf_counter()
        batch = scheduler.schedule()
        middle = time.perf_counter()
        assert batch is not None
        result = executor.collect(executor.submit(batch))
        resumed = time.perf_counter()
        scheduler.update(result)
        end = time.perf_counter()
        if batch.num_tokens == batch.num_rows == count:
            times[decoding % BLOCK_SIZE].append((middle - start) + (end - resumed))
            decoding += 1
    return [statistics.median(place) * 1e6 for place in times]


def time_engine(count: int, params: SamplingParams, tokenizer: Any) -> float:
    """Median microseconds of Engine.step with `count` decoding sequences."""
    factory = None if tokenizer is not None else WordDetokenizer
    engine = Engine(
        IdleExecutor(count),
        tokenizer or WordTokenizer(),
        EngineConfig(
            max_model_len=PROMPT + STEPS + 1,
            max_num_seqs=count,
            max_num_batched_tokens=max(count, PROMPT) * 2,
            vocab_size=VOCAB,
        ),
        detokenizer_factory=factory,
    )
    for i in range(count):
        engine.add_request(str(i), list(range(3, 3 + PROMPT)), params)
    times = []
    while len(times) < STEPS // 2:
        start = time.perf_counter()
        outputs = engine.step()
        end = time.perf_counter()
        if engine.scheduler.num_running == count and (len(outputs) in (0, count)):
            times.append(end - start)
    return statistics.median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--model", help="detokenize with this model's tokenizer")
    options = parser.parse_args()
    plain = SamplingParams(max_tokens=STEPS, ignore_eos=True)
    penalized = SamplingParams(max_tokens=STEPS, ignore_eos=True, repetition_penalty=1.1)
    rows: list[dict[str, Any]] = []
    print("sequences  schedule+update us    goal us   with penalties us   all hash us")
    for count in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        goal = 20 + 0.5 * count
        row = {"sequences": count, "goal_us": goal}
        row["plain_us"] = statistics.mean(time_scheduler(count, plain))
        row["penalized_us"] = statistics.mean(time_scheduler(count, penalized))
        row["all_hash_us"] = max(time_scheduler(count, plain, together=True))
        rows.append(row)
        met = "" if row["plain_us"] <= goal else "  goal missed"
        print(
            f"{count:9d}  {row['plain_us']:18.1f}  {goal:9.1f}   {row['penalized_us']:17.1f}"
            f"   {row['all_hash_us']:11.1f}{met}"
        )

    tokenizer = real_tokenizer(options.model) if options.model else None
    print("\nEngine.step at 32 sequences, us (goal 1000)")
    steps: dict[str, float] = {}
    for kind in RequestOutputKind:
        for name, more in (
            ("", {}),
            (" + stop strings", {"stop": ["\n\n", "###"]}),
            (" + 5 logprobs", {"logprobs": 5}),
        ):
            if name == " + 5 logprobs" and kind is not RequestOutputKind.DELTA:
                continue
            params = SamplingParams(max_tokens=STEPS, ignore_eos=True, output_kind=kind, **more)
            steps[kind.name + name] = time_engine(32, params, tokenizer)
            print(f"{kind.name + name:30s} {steps[kind.name + name]:10.1f}")

    if options.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        record = {
            "command": " ".join(sys.argv), "commit": commit, "machine": platform.platform(),
            "python": platform.python_version(), "scheduler": rows, "engine_step_us": steps,
        }  # fmt: skip
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
