"""What happens to running requests when many more arrive: the gaps between their tokens.

    python bench/load_spike.py --record [--model REFERENCE]      what steps take, measured on this machine
    python bench/load_spike.py                                   a simulation with that, by a virtual clock
    python bench/load_spike.py --real [--model REFERENCE]        the same arrivals on the real engine

Requests arrive at random, 8.5 times as many a second during one second. Without a target every step takes as
many tokens of prompts as fit; with one, chunks and admission follow it (`target_itl_ms`). The simulation runs
the real scheduler and engine on an executor that computes nothing and moves the clock on by what a step of
that shape takes, so that only the scheduling is judged; on the real engine the machine's own unrest adds to
it. Writes docs/benchmarks/load_spike.json and .md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import machine
import numpy as np

from fastllm.engine.engine import Engine, EngineConfig
from fastllm.engine.hooks import EngineHook, Step, Tokens
from fastllm.executor.base import Executor, StepBatch, StepResult
from fastllm.loading import ModelOptions, load_model
from fastllm.sampling_params import SamplingParams

OUT = machine.ROOT / "docs" / "benchmarks" / "load_spike"
SPIKE = 8.5
SPIKE_SECONDS = 1.0
PROMPT, ANSWER = (64, 512), (32, 128)  # tokens, least and most
HINGE = 4  # tokens of a step from which on one more costs more


# -- what steps take -----------------------------------------------------------------------------------------


class Timed:
    """An executor, and what its steps were and took."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner
        self.steps: list[tuple[int, int, float, float]] = []

    @property
    def block_size(self) -> int:
        return self._inner.block_size

    def kv_capacity(self) -> int:
        return self._inner.kv_capacity()

    def submit(self, batch: Any) -> int:
        started = time.perf_counter()
        ticket = self._inner.submit(batch)
        seconds = time.perf_counter() - started
        self.steps.append((batch.num_tokens, batch.num_rows, batch.context, seconds))
        return ticket

    def collect(self, ticket: int) -> StepResult:
        return self._inner.collect(ticket)

    def close(self) -> None:
        self._inner.close()


def features(tokens: float, rows: float, context: float) -> list[float]:
    return [1.0, tokens, max(tokens - HINGE, 0.0), rows, context]


def record(model: str) -> dict[str, Any]:
    """Steps of all sizes on the real executor, and the weights of `features` that explain them."""
    random = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    steps = []
    for budget in (12, 48, 128, 512):
        options = ModelOptions(
            model=model, max_model_len=2048, enable_prefix_caching=False, max_num_batched_tokens=budget
        )
        engine = load_model(options).engine
        timed = Timed(engine._executor)
        engine._executor = timed
        for running in (1, 2, 4, 8, 16, 32, 48):
            for i in range(running if budget >= 48 else min(running, 8)):
                prompt = random.integers(100, engine.scheduler.vocab_size, int(random.integers(*PROMPT)))
                engine.add_request(f"{running} {i}", prompt.tolist(), params)
            while engine.has_unfinished():
                engine.step()
        engine.close()
        steps += timed.steps[20:]
    matrix = np.array([features(*step[:3]) for step in steps])
    seconds = np.array([step[3] for step in steps])
    weights = _fit(matrix / seconds[:, None])
    ratios = seconds / (matrix @ weights)
    spread = [float(np.quantile(ratios, q)) for q in (0.05, 0.5, 0.95)]
    return {"weights": weights.tolist(), "steps": len(steps), "measured_by_model": spread}


def _fit(matrix: np.ndarray) -> np.ndarray:
    """The weights, none negative, for which matrix @ weights is nearest to 1: of relative errors the absolute
    values, by least squares that are weighted anew."""
    weights = np.zeros(matrix.shape[1])
    trust = np.ones(len(matrix))
    for _ in range(20):
        root = np.sqrt(trust)
        used = np.ones(matrix.shape[1], bool)
        while True:
            weights[:] = 0.0
            weights[used] = np.linalg.lstsq(matrix[:, used] * root[:, None], root, rcond=None)[0]
            if (weights >= 0).all():
                break
            used &= weights >= 0
        trust = 1 / np.maximum(np.abs(matrix @ weights - 1), 0.02)
    return weights


class Simulated:
    """Computes nothing: every step takes what the recorded one took, on a clock of its own."""

    block_size = 16

    def __init__(self, weights: Sequence[float], num_blocks: int, vocab_size: int) -> None:
        self.now = 0.0
        self._weights = np.array(weights)
        self._blocks = num_blocks
        self._vocab_size = vocab_size
        self._random = np.random.default_rng(1)
        self._result: StepResult | None = None

    def clock(self) -> float:
        return self.now

    def kv_capacity(self) -> int:
        return self._blocks

    def submit(self, batch: StepBatch) -> int:
        shape = batch.num_tokens, batch.num_rows, batch.context  # type: ignore[attr-defined]
        self.now += float(np.dot(features(*shape), self._weights))
        rows = len(batch.row_seq)
        tokens = self._random.integers(0, self._vocab_size, rows).astype(np.int32)
        none = np.zeros((rows, 0), np.float32)
        self._result = StepResult(tokens, none[:, :0].sum(1), tokens, none.astype(np.int32), none)
        return 0

    def collect(self, ticket: int) -> StepResult:
        assert self._result is not None
        return self._result

    def close(self) -> None:
        pass


class AnyTokenizer:
    vocab_size = 32000
    eos_token_ids: frozenset[int] = frozenset()

    def token_bytes(self, id: int) -> bytes:
        return b"x"


# -- arrivals ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """One request."""

    at: float
    prompt: int
    answer: int


def arrivals(rate: float, before: float, after: float, seed: int) -> list[Arrival]:
    """Poisson arrivals: `rate` a second, SPIKE times as many in the second that begins at `before`."""
    random = np.random.default_rng(seed)
    found: list[Arrival] = []
    now = 0.0
    while now < before + SPIKE_SECONDS + after:
        in_spike = before <= now < before + SPIKE_SECONDS
        now += random.exponential(1 / (rate * SPIKE if in_spike else rate))
        found.append(Arrival(now, int(random.integers(*PROMPT)), int(random.integers(*ANSWER))))
    return found


class Gaps(EngineHook):
    """Seconds between two tokens of each sequence, with the moment of the second."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self.gaps: list[tuple[float, float]] = []
        self.steps: list[float] = []

    def on_tokens(self, event: Tokens) -> None:
        before = self._last.get(event.request_id)
        if before is not None:
            self.gaps.append((event.time, event.time - before))
        self._last[event.request_id] = event.time

    def on_step(self, event: Step) -> None:
        self.steps.append(event.duration)


def drive(
    engine: Engine, work: Sequence[Arrival], clock: Callable[[], float], wait: Callable[[float], None]
) -> list[float]:
    """Run the arrivals to their ends. Returns the times to the first token."""
    random = np.random.default_rng(5)
    begin, waits = clock(), []
    pending = list(work)
    while pending or engine.has_unfinished():
        while pending and clock() - begin >= pending[0].at:
            one = pending.pop(0)
            prompt = random.integers(100, engine.scheduler.vocab_size, one.prompt).tolist()
            params = SamplingParams(max_tokens=one.answer, ignore_eos=True, detokenize=False)
            engine.add_request(f"{one.at}", prompt, params)
        if not engine.has_unfinished():
            wait(begin + pending[0].at - clock())
            continue
        waits += [
            output.metrics.time_to_first_token or 0.0
            for output in engine.step()
            if output.finished and output.metrics is not None
        ]
    return waits


def summary(gaps: Gaps, waits: Sequence[float], before: float, target: float | None) -> dict[str, Any]:
    """p99 over the time from the spike on, in milliseconds."""
    after = [gap * 1e3 for at, gap in gaps.gaps if at >= before]
    early = [gap * 1e3 for at, gap in gaps.gaps if at < before]
    return {
        "target_ms": target,
        "before_p50_ms": float(np.quantile(early, 0.5)),
        "p50_ms": float(np.quantile(after, 0.5)),
        "p99_ms": float(np.quantile(after, 0.99)),
        "most_ms": max(after),
        "first_token_p50_ms": float(np.quantile(waits, 0.5)) * 1e3,
        "first_token_p99_ms": float(np.quantile(waits, 0.99)) * 1e3,
    }


def simulate(weights: Sequence[float], rate: float, seed: int, target: float | None) -> dict[str, Any]:
    """One run by the virtual clock."""
    executor, gaps = Simulated(weights, 8192, AnyTokenizer.vocab_size), Gaps()
    config = EngineConfig(max_model_len=2048, max_num_batched_tokens=512, target_itl_ms=target)
    engine = Engine(executor, AnyTokenizer(), config, [gaps], clock=executor.clock)

    def wait(seconds: float) -> None:
        executor.now += max(seconds, 1e-6)

    waits = drive(engine, arrivals(rate, 5.0, 3.0, seed), executor.clock, wait)
    return summary(gaps, waits, 5.0, target)


def real(model: str, rate: float, seed: int, target: float | None) -> dict[str, Any]:
    """One run of the real engine by the wall clock."""
    gaps = Gaps()
    options = ModelOptions(model=model, max_model_len=2048, target_itl_ms=target)
    engine = load_model(options, [gaps]).engine
    begin = time.monotonic()
    waits = drive(engine, arrivals(rate, 5.0, 3.0, seed), time.monotonic, lambda s: time.sleep(max(s, 0)))
    engine.close()
    return summary(gaps, waits, begin + 5.0, target)


# -- the table -----------------------------------------------------------------------------------------------


def markdown(record: dict[str, Any]) -> str:
    lines = [
        "# A spike of arrivals",
        "",
        f"Made by `bench/load_spike.py`; {record['machine']['date']}, {record['machine']['processor']}. "
        f"{record['rate']:g} requests a second, {SPIKE:g} times as many during one second; prompts of "
        f"{PROMPT[0]} to {PROMPT[1]} tokens, answers of {ANSWER[0]} to {ANSWER[1]}. Gaps between two tokens "
        "of a request, from the spike on; the target is twice the median gap before it.",
        "",
        "| run | target, ms | p50 gap before | p50 gap | p99 gap | greatest | over the target, p99 "
        "| first token p50 | p99 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in record["runs"]:
        over = "" if run["target_ms"] is None else f"{run['p99_ms'] - run['target_ms']:+.1f}"
        target = "" if run["target_ms"] is None else f"{run['target_ms']:.1f}"
        cells = [run["name"], target, *(f"{run[key]:.1f}" for key in ("before_p50_ms", "p50_ms", "p99_ms"))]
        cells += [f"{run['most_ms']:.1f}", over]
        cells += [f"{run[key]:.0f}" for key in ("first_token_p50_ms", "first_token_p99_ms")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--model", default=str(machine.ROOT / "build/bench/models/smollm2-q4_0.gguf"))
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second before the spike (2)")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    file = OUT.with_suffix(".json")
    known = json.loads(file.read_text()) if file.exists() else {}
    if options.record or "cost" not in known:
        known = {"cost": record(options.model), "runs": []}
    known["machine"] = machine.describe(["fastllm", "numpy"])
    known["rate"] = options.rate
    names = ["real"] if options.real else ["simulated"]
    known["runs"] = [run for run in known["runs"] if run["name"].split(",")[0] not in names]
    for name in names:
        for seed in range(options.seeds):

            def run(target: float | None, seed: int = seed, name: str = name) -> dict[str, Any]:
                if name == "real":
                    return real(options.model, options.rate, seed, target)
                return simulate(known["cost"]["weights"], options.rate, seed, target)

            free = run(None)
            held = run(2 * free["before_p50_ms"])
            known["runs"] += [
                {"name": f"{name}, seed {seed}", **free},
                {"name": f"{name}, seed {seed}", **held},
            ]
    file.write_text(json.dumps(known, indent=1) + "\n")
    OUT.with_suffix(".md").write_text(markdown(known))
    print(markdown(known))
    over = [run["p99_ms"] - run["target_ms"] for run in known["runs"] if run["target_ms"] is not None]
    print(f"p99 over the target, median of the runs: {statistics.median(over):+.1f} ms")


if __name__ == "__main__":
    main()
