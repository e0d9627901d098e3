"""How the cost of decoding grows: with the batch, the context, the threads and the size of the model.

    python bench/growth.py --quick                     a look, into build/bench/growth-quick
    python bench/growth.py                             everything, a quarter of an hour on two cores at most
    python bench/growth.py --axes batch,context        these alone
    python bench/growth.py --model smollm2-q4_1        the batch, context and threads of another model
    python bench/growth.py --report                    the tables and charts anew

Each axis varies one thing; its points take turns, round by round, so that a change of the machine's pace
meets all of them. A round generates with `LLM.generate` and takes its decode steps from `LLM.profile`: tokens
per second, and where the time of a step went. The models are random, of llama's shape, in Q4_0
(bench/models.py); the machine's limits are measured before and after every axis, and the greatest count.

Writes OUT.json (all rounds), OUT.md (tables) and OUT.svg (charts), after every round; a record of some axes
replaces one of all. Run it on a machine that does nothing else: the record says how busy it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import growth_report
import machine
import models
import numpy as np
import peaks
import report
import roofline

from fastllm import LLM, SamplingParams
from fastllm.executor.base import StepBatch
from fastllm.executor.cpu import CpuExecutor
from fastllm.formats.checkpoint import open_checkpoint
from fastllm.loading import ModelOptions, load_model
from fastllm.models.registry import spec_from_checkpoint

OUT = machine.ROOT / "docs" / "benchmarks" / "growth"
AXES = ("batch", "context", "threads", "size")
SIZES = ("30m-q4_0", "135m-q4_0", "360m-q4_0", "1b-q4_0")
CONTEXT = 128  # tokens of a sequence, where the context is not what varies
SERIES = (1, 32)  # sequences at once, where the batch is not what varies
CHUNK = 512  # tokens of a prompt in a step, where the context varies
LOWEST_ID = 100  # of random prompts, above the control tokens
QUICK = {
    "rounds": 2,
    "steps": 8,
    "most_batch": 8,
    "most_context": 2048,
    "sizes": ",".join(SIZES[:2]),
    "out": machine.ROOT / "build" / "bench" / "growth-quick",
}


@dataclass(frozen=True)
class Point:
    """What is measured.

    Attributes:
        axis: what varies; its value is in `value`.
        value: sequences, tokens of context, threads, or millions of weights.
        model, threads, batch: on what, with how many, for how many sequences at once.
        context: tokens of a sequence, on average over the steps.
    """

    axis: str
    value: float
    model: str
    threads: int
    batch: int
    context: int


def doubling(first: int, last: int) -> list[int]:
    """first, twice that, and so on; `last` always at the end."""
    values = []
    while first < last:
        values.append(first)
        first *= 2
    return [*values, last]


def points(axis: str, options: argparse.Namespace, weights: dict[str, float]) -> list[Point]:
    """The points of an axis. weights: millions by model."""
    model, threads = options.model, options.threads
    if axis == "batch":
        batches = doubling(1, options.most_batch)
        return [Point(axis, batch, model, threads, batch, CONTEXT) for batch in batches]
    if axis == "context":
        contexts = doubling(min(128, options.most_context), options.most_context)
        return [Point(axis, context, model, threads, 1, context) for context in contexts]
    if axis == "threads":
        return [
            Point(axis, count, model, count, batch, CONTEXT)
            for batch in SERIES
            for count in doubling(1, threads)
        ]
    return [
        Point(axis, weights[name], name, threads, batch, CONTEXT)
        for batch in SERIES
        for name in options.sizes.split(",")
    ]


# -- engines -------------------------------------------------------------------------------------------------


class PiecewisePrefill:
    """An executor that computes each piece of one prompt as if nothing came before it.

    A decode step takes as long as there are K and V to read, whatever they hold; attention between all pieces
    of a prompt of 32k tokens would take minutes before it. K and V are written where they belong.
    """

    def __init__(self, inner: CpuExecutor) -> None:
        self._inner = inner
        self.block_size = inner.block_size
        self.kv_capacity, self.collect, self.close = inner.kv_capacity, inner.collect, inner.close
        self.profile = inner.profile  # it tells its phases, too

    @property
    def phase_seconds(self) -> dict[str, float]:
        return self._inner.phase_seconds

    def submit(self, batch: StepBatch) -> int:
        one_token = len(batch.token_ids) == 1
        return self._inner.submit(batch if one_token else _Piece(batch, self.block_size))


class _Piece:
    """A step's batch with the chunk of one prompt, without what comes before it."""

    def __init__(self, batch: StepBatch, block_size: int) -> None:
        count, first = len(batch.token_ids), int(batch.positions[0])
        assert len(batch.seq_lens) == 1
        assert first % block_size == 0
        self._batch = batch
        self.positions = np.arange(count, dtype=np.int32)
        self.seq_lens = np.array([count], np.int32)
        self.block_tables = np.ascontiguousarray(batch.block_tables[:, first // block_size :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)


def load(chosen: Sequence[Point], steps: int) -> LLM:
    """For points of one axis, model and number of threads, with room for the largest."""
    first = chosen[0]
    most = max(point.batch for point in chosen)
    loaded = load_model(
        ModelOptions(
            model=models.path(first.model),
            threads=first.threads,
            max_model_len=max(point.context for point in chosen) + steps,
            max_num_seqs=most,
            max_num_batched_tokens=CHUNK if first.axis == "context" else most * CONTEXT,
            progress=False,
        )
    )
    if first.axis == "context":
        loaded.engine._executor = PiecewisePrefill(loaded.engine._executor)
    return LLM._from_parts(loaded.engine, loaded.tokenizer)


# -- measuring -----------------------------------------------------------------------------------------------


def measure(llm: LLM, point: Point, steps: int, stream: random.Random) -> dict[str, Any]:
    """One round: so many decode steps of all sequences together."""
    vocab = llm.get_tokenizer().vocab_size
    length = point.context - steps // 2
    prompts = [[stream.randrange(LOWEST_ID, vocab) for _ in range(length)] for _ in range(point.batch)]
    params = SamplingParams(temperature=0, max_tokens=steps + 1, ignore_eos=True)
    with llm.profile() as profile:
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    if (profile.decode.steps, profile.decode.tokens) != (steps, steps * point.batch):
        raise SystemExit(f"{point}: the sequences did not decode together: {profile.kinds()}")
    return {**asdict(profile.decode), "load_average": os.getloadavg()[0]}


def measure_axis(record: dict[str, Any], axis: str, options: argparse.Namespace) -> None:
    """All rounds of an axis, saved after each."""
    chosen = points(axis, options, {name: about["millions"] for name, about in record["models"].items()})
    entries = [{**asdict(point), "rounds": []} for point in chosen]
    record["points"] += entries
    groups: dict[tuple[str, int], list[Point]] = {}
    for point in chosen:
        groups.setdefault((point.model, point.threads), []).append(point)
    stream = random.Random(0)
    with contextlib.ExitStack() as stack:
        llms = {key: stack.enter_context(load(its, options.steps)) for key, its in groups.items()}
        for key, its in groups.items():  # what is done once is done before the first round
            measure(llms[key], min(its, key=lambda point: point.context), options.steps, stream)
        for number in range(options.rounds):
            for point, entry in zip(chosen, entries, strict=True):
                entry["rounds"].append(
                    measure(llms[point.model, point.threads], point, options.steps, stream)
                )
            save(record, options.out)
            print(f"{axis} {number + 1}/{options.rounds}", file=sys.stderr)


def save(record: dict[str, Any], out: Path) -> None:
    """All three files."""
    table = growth_report.results(record)
    shown = growth_report.markdown(record, table), growth_report.chart(record, table)
    report.write(out, {**record, "results": table}, *shown)


def add_model(record: dict[str, Any], name: str) -> int:
    """Facts of a model file; how long its context may be."""
    path = models.path(name)
    work = roofline.work_of(path)
    millions = (work.layer_weights + work.head_weights) / 1e6
    record["models"][name] = {**machine.file_facts(path), "millions": millions}
    record["models"][name]["work"] = roofline.to_record(work)
    with open_checkpoint(path) as checkpoint:
        return spec_from_checkpoint(checkpoint).context_length


def run(options: argparse.Namespace) -> None:
    axes = options.axes.split(",")
    if unknown := set(axes) - set(AXES):
        raise SystemExit(f"--axes: no such axis: {', '.join(sorted(unknown))}; there are {', '.join(AXES)}")
    record: dict[str, Any] = {
        "machine": machine.describe(["fastllm", "numpy", "tokenizers"]),
        **{name: getattr(options, name) for name in ("model", "threads", "rounds", "steps")},
        "models": {},
        "limits": {},
        "points": [],
    }
    if "size" in axes:
        for name in options.sizes.split(","):
            add_model(record, name)
    longest = add_model(record, options.model) - options.steps
    if longest < options.most_context and "context" in axes:
        print(f"{options.model}: contexts end at {longest} tokens", file=sys.stderr)
        options.most_context = longest
    counts = doubling(1, options.threads) if "threads" in axes else [options.threads]
    for axis in ("", *axes):
        if axis:
            measure_axis(record, axis, options)
        for threads in counts:
            found = peaks.measure(threads, record["machine"]["isa"], 0.1)
            known = record["limits"].get(str(threads), found)
            record["limits"][str(threads)] = {**found, **peaks.greater(known, found)}
    save(record, options.out)


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="other defaults: fewer points, rounds and steps")
    parser.add_argument("--axes", default=",".join(AXES), help="with commas between; " + ", ".join(AXES))
    parser.add_argument("--model", default="135m-q4_0", help="of all axes but size (135m-q4_0)")
    parser.add_argument("--sizes", default=",".join(SIZES), help="models of the size axis, commas between")
    parser.add_argument("--most-batch", type=int, default=128, help="sequences at once (128)")
    parser.add_argument("--most-context", type=int, default=32768, help="tokens of context (32768)")
    parser.add_argument("--rounds", type=int, default=3, help="(3)")
    parser.add_argument("--steps", type=int, default=32, help="decode steps in a round (32)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="at most (all)")
    parser.add_argument("--out", type=Path, default=OUT, help="without suffix")
    parser.add_argument("--report", action="store_true", help="only write tables and charts of the record")
    if quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args()
    if options.report:
        save(json.loads(options.out.with_suffix(".json").read_text()), options.out)
    else:
        run(options)
    print(options.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
