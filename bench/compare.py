"""fastllm and its peers, side by side: the same weights, the same token counts, in turns.

    python bench/peers.py install llama.cpp vllm openvino onnxruntime transformers         once
    python bench/compare.py --quick                                         a look, a minute or two
    python bench/compare.py                                                 everything, hours
    python bench/compare.py --models smollm2-q4_0 --rows prefill-512,decode-1 --append    a part of it
    python bench/compare.py --isa avx2                                      both sides with AVX2 alone
    python bench/compare.py --report                                        the table and chart anew

Every measurement is a process of its own (programs that are slow to load wait between theirs), in the
program's own environment. In each round of a row the programs take turns, so that a change of the machine's
pace meets all of them. A peer's settings are all tried in the first rounds; the best one goes on. The
machine's limits are measured in each round. Rows: bench/rows.py. Models: bench/models.py.

Writes OUT.json (everything measured, after every round), OUT.md (the table) and OUT.svg (the chart). With
--append the record grows; it must be of the same sources, files, versions and settings. Run it on a machine
that does nothing else: the record says how busy it was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import machine
import models
import peaks
import peers
import report
import results
import roofline
import rows
from programs import PROGRAMS, FastLLM, Figure, Options, Program, Setting
from rows import Row

OUT = machine.ROOT / "docs" / "benchmarks" / "compare"
QUICK = {
    "models": "smollm2-q4_0",
    "rows": "prefill-512,decode-1,decode-8",
    "peers": "llama.cpp",
    "pairs": 3,
    "repeats": 1,
    "trial": 1,
    "out": machine.ROOT / "build" / "bench" / "quick",
}
DEFAULT_MODELS = ("smollm2-q4_0", "smollm2-q4_1", "1b-q4_0", *rows.FORMATS)
SAME = ("threads", "isa", "kv_cache_dtype", "dollars_per_hour")  # in all parts of a record


class Reference(FastLLM):
    """fastllm on the Q4_0 file: what other file types are compared with."""

    name = results.REFERENCE

    def __init__(self, model: str, options: Options) -> None:
        super().__init__("1b-q4_0", options)


# -- the record ----------------------------------------------------------------------------------------------


def new_record(options: argparse.Namespace) -> dict[str, Any]:
    head = {name: getattr(options, name) for name in SAME}
    return {**head, "parts": [], "peers": {}, "models": {}, "limits": [], "measurements": []}


def begin(options: argparse.Namespace, chosen: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The record to write to, with this part in it.

    Raises:
        SystemExit: --append, and the parts would not be comparable.
    """
    file = options.out.with_suffix(".json")
    record = json.loads(file.read_text()) if options.append and file.exists() else new_record(options)
    about = machine.describe(["fastllm", "numpy", "tokenizers"])
    about["isa"] = options.isa or about["isa"]
    for name in SAME:
        _same(name, record[name], getattr(options, name))
    if record["parts"]:
        before = record["parts"][0]["machine"]
        for name in ("source", "processor", "processors"):
            _same(name, before[name], about[name])
    for name, version in chosen.items():
        _same(f"version of {name}", record["peers"].setdefault(name, version), version)
    shape = {name: getattr(options, name) for name in ("pairs", "trial", "repeats", "slow_pairs")}
    record["parts"].append({"machine": about, **shape})
    return record


def _same(what: str, before: Any, now: Any) -> None:
    if before != now:
        raise SystemExit(f"--append: {what}: the record has {before!r}, this run {now!r}; use another --out")


def add_model(record: dict[str, Any], name: str) -> None:
    path = models.path(name)
    facts = machine.file_facts(path)
    if name in record["models"]:
        _same(f"model {name}", record["models"][name]["sha256"], facts["sha256"])
    record["models"][name] = {**facts, "work": roofline.to_record(roofline.work_of(path))}


def add_directory(record: dict[str, Any], path: Path) -> None:
    """What programs read that need another form of the weights."""
    if path.is_dir():
        files = sorted([*path.glob("*.safetensors"), *path.glob("*.onnx*")])
        record["models"][path.name] = {"files": [machine.file_facts(file) for file in files]}


def save(record: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    """All three files; the table's rows."""
    table = results.results(record)
    shown = report.markdown(record, table), report.chart(record, table)
    report.write(out, {**record, "results": table}, *shown)
    return table


# -- measuring -----------------------------------------------------------------------------------------------


class Trial:
    """Which setting of a program goes on: all are tried in the first rounds, then the best alone."""

    def __init__(self, row: Row, settings: list[Setting], rounds: int) -> None:
        self._row, self._rounds = row, rounds
        self._settings = settings
        self._values: dict[str, list[float]] = defaultdict(list)

    def settings(self, number: int) -> list[Setting]:
        """Those to measure in a round."""
        if number == self._rounds and len(self._settings) > 1:
            better = min if self._row.lower_is_better else max
            self._settings = [better(self._settings, key=self._median)]
        return self._settings

    def add(self, setting: Setting, value: float) -> None:
        self._values[json.dumps(setting)].append(value)

    def _median(self, setting: Setting) -> float:
        return statistics.median(self._values[json.dumps(setting)])


def measure_row(
    record: dict[str, Any], model: str, row: Row, programs: list[Program], options: argparse.Namespace
) -> None:
    """All rounds of one row, saved after each."""
    part = len(record["parts"]) - 1
    where = {"part": part, "model": model, "row": row.name}
    trials = {program.name: Trial(row, program.settings(row), options.trial) for program in programs}
    for number in range(options.pairs):
        line = []
        measured = peaks.measure(options.threads, record["isa"], seconds=0.05, mebibytes=256)
        record["limits"].append({**where, "round": number, **measured})
        for program in programs:
            starts = row.kind in ("load", "memory")
            if starts and program.slow_to_load and number >= options.slow_pairs:
                continue
            for setting in trials[program.name].settings(number):
                figure: Figure = program.measure(row, setting, seed=number)
                trials[program.name].add(setting, figure.value)
                record["measurements"].append(
                    {
                        **where,
                        "round": number,
                        "program": program.name,
                        "setting": setting,
                        "value": figure.value,
                        "samples": figure.samples,
                        "more": figure.more,
                        "load_average": os.getloadavg()[0],
                    }
                )
                line.append(f"{program.name} {figure.value:.1f}")
        save(record, options.out)
        print(f"{model} {row.name} {number + 1}/{options.pairs}: {'  '.join(line)}", file=sys.stderr)


def programs_for(model: str, names: list[str], options: Options) -> list[Program]:
    """fastllm first; on the other file types also fastllm on Q4_0."""
    others = [PROGRAMS[name](model, options) for name in names]
    if model in rows.FORMATS:
        others = [Reference(model, options), *others]
    return [FastLLM(model, options), *others]


def choose_peers(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name -> versions of those that take part."""
    asked = options.peers.split(",") if options.peers is not None else list(peers.INSTALL)
    if options.isa and options.peers is None:
        asked = ["llama.cpp"]  # the others choose their instruction set themselves
    chosen: dict[str, dict[str, Any]] = {}
    for name in filter(None, asked):
        if name not in peers.INSTALL:
            raise SystemExit(f"--peers: no such peer: {name}; there are {', '.join(peers.INSTALL)}")
        version = peers.installed(name)
        if version is not None:
            chosen[name] = version
        elif options.peers is not None:
            raise SystemExit(f"--peers: {name} is not installed: python bench/peers.py install {name}")
    return chosen


def run(options: argparse.Namespace) -> None:
    chosen = choose_peers(options)
    names = options.models.split(",") if options.models else list(DEFAULT_MODELS)
    work: list[tuple[str, list[Row]]] = []
    for model in names:
        asked = options.rows.split(",") if options.rows else rows.default(model)
        work.append((model, [rows.parse(row) for row in asked]))
    record = begin(options, chosen)
    shared = Options(options.threads, options.repeats, options.isa, options.kv_cache_dtype)
    for model, its_rows in work:
        add_model(record, model)
        taking_part = list(chosen)
        if options.peers is None and model != "smollm2-q4_0":
            taking_part = [name for name in chosen if name == "llama.cpp" and model not in rows.FORMATS]
        if model in rows.FORMATS:
            add_model(record, "1b-q4_0")
        programs = programs_for(model, taking_part, shared)
        for program in programs:
            add_directory(record, program.path() if hasattr(program, "path") else Path())
        try:
            for row in its_rows:
                able = [program for program in programs if program.settings(row)]
                measure_row(record, model, row, able, options)
        finally:
            for program in programs:
                program.close()


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="other defaults: a few rows, few rounds")
    parser.add_argument("--models", help="with commas between; " + ", ".join(models.NAMES))
    parser.add_argument("--rows", help="with commas between; otherwise those of the model's family")
    parser.add_argument(
        "--peers",
        help="with commas between; otherwise all on smollm2-q4_0, llama.cpp on smollm2-q4_1 and 1b-q4_0",
    )
    parser.add_argument("--pairs", type=int, default=15, help="rounds (15)")
    parser.add_argument("--trial", type=int, default=2, help="rounds in which all settings are tried (2)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements in a process (3)")
    parser.add_argument("--slow-pairs", type=int, default=2, help="loads of programs that load slowly (2)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--isa", default="", help="FASTLLM_ISA; avx2 takes llama.cpp's AVX2 build as well")
    parser.add_argument("--kv-cache-dtype", default="auto", help="fastllm's")
    parser.add_argument("--dollars-per-hour", type=float, default=0.1, help="price of the machine (0.1)")
    parser.add_argument("--out", type=Path, default=OUT, help="without suffix")
    parser.add_argument("--append", action="store_true", help="to the record that is there")
    parser.add_argument("--report", action="store_true", help="only write the table and chart of the record")
    if quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args()
    if options.out == OUT and options.isa:
        options.out = OUT.with_name(f"compare-{options.isa}")
    if options.report:
        save(json.loads(options.out.with_suffix(".json").read_text()), options.out)
    else:
        run(options)
    print(options.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
