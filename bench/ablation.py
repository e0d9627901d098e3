"""What each optimization brings: they are switched on one after the other, on the same requests.

    python bench/ablation.py --quick                   a look, into build/bench
    python bench/ablation.py                           everything, 10 minutes on two cores
    python bench/ablation.py --rate 3 --rows static,continuous,paged,prefix,int8     requests arrive at random
    python bench/ablation.py --report docs/benchmarks/ablation.json                  table and chart anew

The rows are configurations of one engine. Each measurement is a process of its own, so that its memory is
told apart; the rows take turns, round by round, so that a change of the machine's pace meets all of them. The
machine's int8 peak is measured in every round, and the greatest counts.

    no-cache     the traditional loop: every new token computes the whole text again, one request at a time.
                 Measured on tokens drawn from all answers, since all of them would take minutes a round
    one          with a KV cache, one request at a time
    static       B requests begin together, the next B when the last of them has ended
    continuous   the next request begins when one has ended; each holds a reservation of the greatest length,
                 so that B run at once: as many as the cache holds so
    paged        the cache is in blocks that a sequence takes as it grows, so that more run at once
    prefix       the blocks of the common beginning are computed and held once
    int8         a cache of as many bytes in int8, which holds about twice the tokens
    lookup       tokens are guessed from the text and verified (prompt lookup)

The requests are the same everywhere: a common system prompt, an own part from the texts of
tests/data/quality, answers of fixed lengths that are spread over their logarithm; every second one greedy,
the others at temperature 0.8 with a seed of their own. All answers must be equal, token by token, among the
rows with the default cache, and among those with int8.

Writes DIR/ablation.json (every round), .md (the table) and .svg (the chart); with --rate the name says so.
With --append, rounds are added to the record that is there, if it is of the same source, model, machine and
requests. Run it on a machine that does nothing else: the record says how busy it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ablation_report
import machine
import models
import peaks
import roofline
from processes import Watched

from fastllm.loading import read_tokenizer

OUT = machine.ROOT / "docs" / "benchmarks"
TEXTS = machine.ROOT / "tests" / "data" / "quality"
WORKER = machine.ROOT / "bench" / "measure" / "with_requests.py"
SYSTEM = (
    "You are the assistant of a small public library. Readers write to you about books, opening hours, "
    "loans, reservations, reading rooms and the computers on the second floor. Answer in the language "
    "of the question, in complete sentences, and keep to what you know: the catalogue, the house rules "
    "and the list of events of this month. If you do not know something, say so and name the desk that "
    "does. Never promise that a book is on its shelf; say what the catalogue says and when it was last "
    "returned. Loans run for four weeks and can be renewed twice, unless somebody else has reserved the "
    "book. Children under twelve need the signature of a parent. Fees begin on the third day after the "
    "end of a loan, twenty cents a day and book, and end at five euros. Do not give legal or medical "
    "advice, but show where the shelves for these subjects are. When a reader sends a passage and asks "
    "what it is from, look for its author and title first, then describe in two or three sentences what "
    "the passage is about, and say how sure you are. Quote at most two lines. Be friendly and brief. "
    "Here is the letter of the reader:\n\n"
)
SHAPE = ("threads", "seed", "max_model_len", "reservations", "system", "own", "answer", "rate")
TEMPERATURES = (0.0, 0.8)  # of the requests, in turns
QUICK = {
    "rounds": 1,
    "requests": 12,
    "sampled": 6,
    "out": machine.ROOT / "build" / "bench",
}


@dataclass(frozen=True)
class Case:
    """A row.

    Attributes:
        name: on the command line.
        title: in the table.
        keeps: whether K and V are kept from token to token.
        group: requests that begin together; 0: they need not. None: as many as reservations fit.
        reserves: whether a sequence holds room for the greatest length from its start.
        prefix, kv_cache_dtype, lookup: prefix cache, type of the KV cache, guessing.
    """

    name: str
    title: str
    keeps: bool = True
    group: int | None = 0
    reserves: bool = False
    prefix: bool = False
    kv_cache_dtype: str = "auto"
    lookup: bool = False

    def most_at_once(self, reservations: int, requests: int) -> int:
        """Sequences that may run at once."""
        if self.group == 1:
            return 1
        return reservations if self.reserves else requests

    def starts(self, reservations: int) -> int:
        """Requests that begin together; 0: they need not."""
        return reservations if self.group is None else self.group


CASES = (
    Case("no-cache", "traditional loop: no KV cache, one at a time", keeps=False, group=1),
    Case("one", "+ KV cache", group=1, reserves=True),
    Case("static", "+ static batches", group=None, reserves=True),
    Case("continuous", "+ continuous batching", reserves=True),
    Case("paged", "+ paged blocks"),
    Case("prefix", "+ prefix cache", prefix=True),
    Case("int8", "+ int8 KV cache", prefix=True, kv_cache_dtype="int8"),
    Case("lookup", "+ prompt lookup", prefix=True, kv_cache_dtype="int8", lookup=True),
)
REFERENCE = CASES[4]  # whose answers are the expected ones


# -- the requests --------------------------------------------------------------------------------------------


def workload(options: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    """The requests in order of arrival, as bench/measure/with_requests.py takes them."""
    encode = read_tokenizer(path).encode
    system = encode(SYSTEM)
    while len(system) < options.system:
        system += encode(SYSTEM)
    text = encode("\n\n".join(file.read_text() for file in sorted(TEXTS.glob("*.txt"))))
    stream = random.Random(options.seed)
    requests: list[dict[str, Any]] = []
    at = 0.0
    for index in range(options.requests):
        own = stream.randint(*options.own)
        begin = stream.randrange(len(text) - own)
        requests.append(
            {
                "at": at,
                "prompt": system[: options.system] + text[begin : begin + own],
                "tokens": round(math.exp(stream.uniform(*map(math.log, options.answer)))),
                "temperature": TEMPERATURES[index % len(TEMPERATURES)],
                "seed": stream.getrandbits(32),
            }
        )
        if options.rate:
            at += stream.expovariate(options.rate)
    return requests


def single_tokens(
    requests: Sequence[dict[str, Any]], answers: Sequence[list[int]], count: int, seed: int
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Tokens drawn from all answers, each as a request for this token alone: the text up to it is the prompt.
    Returns the requests, and the tokens that they must give."""
    places = [(index, place) for index, answer in enumerate(answers) for place in range(len(answer))]
    chosen = sorted(random.Random(seed).sample(places, min(count, len(places))))
    asked, expected = [], []
    for index, place in chosen:
        request, answer = requests[index], answers[index]
        asked.append({**request, "at": 0.0, "prompt": request["prompt"] + answer[:place], "tokens": 1})
        expected.append([answer[place]])
    return asked, expected


def check_answers(case: Case, answers: Sequence[list[int]], expected: Sequence[list[int]]) -> None:
    """
    Raises:
        SystemExit: a token differs.
    """
    for index, (got, wanted) in enumerate(zip(answers, expected, strict=True)):
        if got != wanted:
            place = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), None)
            where = f"{len(got)} tokens, not {len(wanted)}" if place is None else f"token {place} differs"
            raise SystemExit(f"{case.name}: request {index}: {where}; the answers have to be equal")


# -- measuring -----------------------------------------------------------------------------------------------


class Bench:
    """The requests, and how a configuration is run on them."""

    def __init__(self, options: argparse.Namespace, path: Path) -> None:
        self._options, self._path = options, path
        self.reservations = options.reservations
        self.requests = workload(options, path)
        longest = max(len(request["prompt"]) + request["tokens"] for request in self.requests)
        if longest > options.max_model_len:
            raise SystemExit(f"--max-model-len: {options.max_model_len} tokens, {longest} are needed")
        self._cache_bytes: int | None = None
        self._expected: dict[str, list[list[int]]] = {}
        self._singles: tuple[list[dict[str, Any]], list[list[int]]] | None = None

    def measure(self, case: Case) -> dict[str, Any]:
        """One process: its answers checked, its figures without the tokens.

        The first call sets the size of the cache and what the answers have to be; the first one with another
        type of cache sets those of its kind.
        """
        requests, expected = self.requests, self._expected.get(case.kv_cache_dtype)
        if not case.keeps:
            if self._singles is None:
                answers = self._expected[case.kv_cache_dtype]
                self._singles = single_tokens(
                    self.requests, answers, self._options.sampled, self._options.seed
                )
            requests, expected = self._singles
        command = [*shlex.split(self._options.under), sys.executable, str(WORKER)]
        process = Watched([*command, json.dumps(self._setup(case))], {})
        about = process.line()
        group = case.starts(self.reservations)
        found = process.ask({"requests": requests, "group": group})
        process.close()
        self._cache_bytes = self._cache_bytes or about["kv_cache_bytes"]
        answers = [one.pop("tokens") for one in found["requests"]]
        if expected is None:
            expected = self._expected[case.kv_cache_dtype] = answers
        check_answers(case, answers, expected)
        return {**about, **_figures(found, answers), "load_average": os.getloadavg()[0]}

    def _setup(self, case: Case) -> dict[str, Any]:
        options = self._options
        size: dict[str, Any] = {"kv_cache_tokens": options.reservations * options.max_model_len}
        if self._cache_bytes is not None:
            size = {"kv_cache_memory_bytes": self._cache_bytes}
        return {
            "model": str(self._path),
            "threads": options.threads,
            "max_model_len": options.max_model_len,
            "max_num_seqs": case.most_at_once(self.reservations, len(self.requests)),
            "enable_prefix_caching": case.prefix,
            "kv_cache_dtype": case.kv_cache_dtype,
            "speculative_config": {"method": "ngram"} if case.lookup else None,
            **size,
        }

    def answers(self) -> dict[str, Any]:
        """Of each type of cache: what identifies the answers, and how many are those of the default type."""
        plain = self._expected[REFERENCE.kv_cache_dtype]
        return {
            kind: {
                "sha256": hashlib.sha256(json.dumps(answers).encode()).hexdigest(),
                "equal": sum(one == other for one, other in zip(answers, plain, strict=True)),
            }
            for kind, answers in self._expected.items()
        }


def _figures(found: dict[str, Any], answers: Sequence[list[int]]) -> dict[str, Any]:
    """What the record keeps of a round: of the gaps their quantiles, of the requests their times."""
    requests = found.pop("requests")
    gaps = [gap for one in requests for gap in one["gaps"]]
    if not gaps:  # a request for every token
        gaps = [one["last"] - one["began"] for one in requests]
    return {
        **found,
        "generated": sum(map(len, answers)),
        "gap_p50": ablation_report.quantile(gaps, 0.5),
        "gap_p99": ablation_report.quantile(gaps, 0.99),
        "first_seconds": [round(one["first"] - one["at"], 6) for one in requests],
        "request_seconds": [round(one["last"] - one["at"], 6) for one in requests],
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds; the record is saved after each."""
    known = {case.name: case for case in CASES}
    names = options.rows.split(",") if options.rows else list(known)
    if unknown := set(names) - set(known):
        raise SystemExit(f"--rows: no such row: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    cases = [case for case in CASES if case.name in names]
    path = Path(options.model) if Path(options.model).exists() else models.path(options.model)
    bench = Bench(options, path)
    record: dict[str, Any] = {
        "machine": machine.describe(["fastllm", "numpy", "tokenizers"]),
        **{name: getattr(options, name) for name in (*SHAPE, "sampled", "dollars_per_hour")},
        "model": {**machine.file_facts(path), "work": roofline.to_record(roofline.work_of(path))},
        "prompt_tokens": [len(request["prompt"]) for request in bench.requests],
        "answer_tokens": [request["tokens"] for request in bench.requests],
        "limits": [],
        "rows": [{"name": case.name, "title": case.title, **_switches(case), "rounds": []} for case in cases],
    }
    file = out_of(options).with_suffix(".json")
    if options.append and file.exists():
        record = continued(json.loads(file.read_text()), record)
    bench.measure(REFERENCE)  # not counted: what the answers have to be
    for number in range(options.rounds):
        record["limits"].append(peaks.measure(options.threads, record["machine"]["isa"], 0.05, 64))
        for case, row in zip(cases, record["rows"], strict=True):
            row["rounds"].append(bench.measure(case))
            seconds = row["rounds"][-1]["seconds"]
            print(f"{case.name} {number + 1}/{options.rounds}: {seconds:.1f} s", file=sys.stderr)
        answers = bench.answers()
        if record.setdefault("answers", answers) != answers:
            raise SystemExit("--append: other answers than those of the rounds before")
        ablation_report.save(record, out_of(options))
    return record


def continued(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The record of earlier rounds, for more of the same.

    Raises:
        SystemExit: what was measured there is not the same.
    """
    for name, value in now.items():
        if name in ("machine", "limits", "rows"):
            continue
        if before[name] != json.loads(json.dumps(value)):
            raise SystemExit(f"--append: {name}: the record has another; use another --out")
    for name in ("source", "processor", "processors", "isa"):
        if before["machine"][name] != now["machine"][name]:
            raise SystemExit(f"--append: {name}: the record has {before['machine'][name]!r}")
    if [row["name"] for row in before["rows"]] != [row["name"] for row in now["rows"]]:
        raise SystemExit("--append: the record has other rows")
    return before


def _switches(case: Case) -> dict[str, bool]:
    return {"keeps": case.keeps, "reserves": case.reserves}


def out_of(options: argparse.Namespace) -> Path:
    """Where the record goes, without suffix."""
    folder: Path = options.out
    return folder / (f"ablation-{options.rate:g}-per-second" if options.rate else "ablation")


def _span(text: str) -> tuple[int, int]:
    low, _, high = text.partition(",")
    if not 1 <= int(low) <= int(high):
        raise ValueError
    return int(low), int(high)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="other defaults: one round, few requests")
    parser.add_argument("--model", default="smollm2-q4_1", help="a name of bench/models.py, or a GGUF file")
    parser.add_argument("--rows", help="with commas between; otherwise all")
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--requests", type=int, default=40, help="(40)")
    parser.add_argument("--system", type=int, default=200, help="tokens of the common beginning (200)")
    parser.add_argument("--own", type=_span, default=(20, 200), help="tokens after it, least,most (20,200)")
    parser.add_argument("--answer", type=_span, default=(8, 256), help="tokens, least,most (8,256)")
    parser.add_argument("--sampled", type=int, default=16, help="tokens of the row no-cache (16)")
    parser.add_argument("--max-model-len", type=int, default=768, help="tokens of a reservation (768)")
    parser.add_argument("--reservations", type=int, default=4, help="that the cache has room for (4)")
    parser.add_argument("--rate", type=float, default=0.0, help="arrivals a second; 0: all at once (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (0)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dollars-per-hour", type=float, default=0.1, help="price of the machine (0.1)")
    parser.add_argument("--under", default="", help='starts each measurement, as in "taskset -c 0,1"')
    parser.add_argument("--append", action="store_true", help="rounds to the record that is there")
    parser.add_argument("--out", type=Path, default=OUT, help="a folder")
    parser.add_argument("--report", type=Path, help="only write table and chart of this record, beside it")
    if "--quick" in arguments:
        parser.set_defaults(**QUICK)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    if options.report:
        out = options.report.with_suffix("")
        ablation_report.save(json.loads(options.report.read_text()), out)
    else:
        out = out_of(options)
        run(options)
    print(out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
