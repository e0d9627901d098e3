"""What guessing tokens brings: the same requests with prompt lookup and without, in turns.

    python bench/speculation.py                        15 pairs of each kind of text, a quarter of an hour
    python bench/speculation.py --kinds file-1600,story --pairs 3 --out build/bench/speculation
    python bench/speculation.py --report docs/benchmarks/speculation.json       the table anew

    file-N     a file of N tokens, then its first 48 tokens again: the answer repeats it, greedily
    rewrite    a chat in which a page is to be written once more, greedily
    code       a file goes on, greedily
    prose      a story goes on, greedily (a small model falls into loops, which are guessed)
    story      a story goes on at temperature 1
    batch-N    N such stories at once

Two processes with the model loaded, one that guesses; which of the two begins changes from pair to pair, and
so does the place in the text. Every request gives 256 tokens, past any end-of-sequence token, and all must be
equal on both sides. What counts is the time from the first token to the last one: the prompt costs both the
same. Goals: 1.8 where an answer repeats its prompt (file-N, rewrite), elsewhere never below 0.97. A ratio is
the median of the pairs, with the order statistics that enclose the true median with 95 %.

Writes OUT.json (every pair) and OUT.md. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import machine
import models
import results
from processes import Watched

from fastllm.loading import read_tokenizer

OUT = machine.ROOT / "docs" / "benchmarks" / "speculation"
TEXTS = machine.ROOT / "tests" / "data" / "quality"
WORKER = machine.ROOT / "bench" / "measure" / "with_requests.py"
TOKENS = 256  # of an answer
AGAIN = 48  # tokens of a file that stand in the prompt a second time
PAGE = 300  # tokens of what a chat asks to rewrite
BEFORE = 200  # tokens that a text which goes on begins with
SIDES = ("plain", "guessing")
REPEATS = ("file-400", "file-800", "file-1600", "rewrite")
KINDS = (*REPEATS, "code", "prose", "story", "batch-4", "batch-16")
GOAL_REPEATS, GOAL_ELSEWHERE = 1.8, 0.97

Request = dict[str, Any]


# -- the requests --------------------------------------------------------------------------------------------


class Texts:
    """Pieces of the texts of tests/data/quality, as tokens."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = read_tokenizer(path)
        self._tokens = {
            name: self._tokenizer.encode((TEXTS / f"{name}.txt").read_text()) for name in ("code", "prose")
        }

    def piece(self, name: str, size: int, stream: random.Random) -> list[int]:
        """`size` neighbouring tokens of a text, from anywhere."""
        tokens = self._tokens[name]
        begin = stream.randrange(len(tokens) - size)
        return tokens[begin : begin + size]

    def file(self, size: int, stream: random.Random) -> list[int]:
        piece = self.piece("code", size, stream)
        return [*piece, *self._tokenizer.encode("\n\n"), *piece[:AGAIN]]

    def rewrite(self, stream: random.Random) -> list[int]:
        page = self._tokenizer.decode(self.piece("prose", PAGE, stream))
        asked = f"Write the following text once more, word for word:\n\n{page}"
        return self._tokenizer.encode(
            f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{page[:80]}"
        )


def requests_of(kind: str, texts: Texts, seed: int) -> list[Request]:
    """The requests of one pair, as bench/measure/with_requests.py takes them."""
    stream = random.Random(seed)
    name, _, number = kind.partition("-")
    makers: dict[str, Callable[[], list[int]]] = {
        "file": lambda: texts.file(int(number), stream),
        "rewrite": lambda: texts.rewrite(stream),
        "code": lambda: texts.piece("code", BEFORE, stream),
    }
    make = makers.get(name, lambda: texts.piece("prose", BEFORE, stream))
    return [
        {
            "at": 0.0,
            "prompt": make(),
            "tokens": TOKENS,
            "temperature": 1.0 if name in ("story", "batch") else 0.0,
            "seed": stream.getrandbits(32),
        }
        for _ in range(int(number) if name == "batch" else 1)
    ]


# -- measuring -----------------------------------------------------------------------------------------------


def start(side: str, options: argparse.Namespace, path: Path) -> Watched:
    setup = {
        "model": str(path),
        "threads": options.threads,
        "max_model_len": 4096,
        "kv_cache_tokens": 16384,
        "speculative_config": {"method": "ngram"} if side == "guessing" else None,
    }
    process = Watched([sys.executable, str(WORKER), json.dumps(setup)], {})
    process.line()
    return process


def measure(process: Watched, requests: Sequence[Request]) -> tuple[dict[str, Any], list[list[int]]]:
    """One side of a pair: what the record keeps, and the tokens."""
    found = process.ask({"requests": requests, "group": 0})
    done = found["requests"]
    begin, end = max(one["first"] for one in done), max(one["last"] for one in done)
    kept = {
        "seconds": end - begin,
        "request_seconds": end,
        "steps": found["steps"],
        "draft_tokens": found["draft_tokens"],
        "accepted_tokens": found["accepted_tokens"],
    }
    return kept, [one["tokens"] for one in done]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All pairs; the record is saved after each."""
    kinds = options.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        raise SystemExit(f"--kinds: no such kind: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    path = Path(options.model) if Path(options.model).exists() else models.path(options.model)
    texts = Texts(path)
    record: dict[str, Any] = {
        "machine": machine.describe(["fastllm", "numpy", "tokenizers"]),
        "model": machine.file_facts(path),
        "threads": options.threads,
        "tokens": TOKENS,
        "pairs": {kind: [] for kind in kinds},
    }
    processes = {side: start(side, options, path) for side in SIDES}
    for number in range(options.pairs + 1):  # the first one warms up
        for kind in kinds:
            requests = requests_of(kind, texts, number)
            pair: dict[str, Any] = {"load_average": os.getloadavg()[0]}
            tokens = {}
            for side in SIDES[:: -1 if number % 2 else 1]:
                pair[side], tokens[side] = measure(processes[side], requests)
            if tokens["plain"] != tokens["guessing"]:
                raise SystemExit(f"{kind}: other tokens with guesses; they have to be equal")
            if number == 0:
                continue
            record["pairs"][kind].append(pair)
            ratio = pair["plain"]["seconds"] / pair["guessing"]["seconds"]
            print(f"{kind} {number}/{options.pairs}: {ratio:.2f}", file=sys.stderr, flush=True)
        if number:
            save(record, options.out)
    for process in processes.values():
        process.close()
    return record


# -- the report ----------------------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> str:
    """The page."""
    about = record["machine"]
    lines = [
        "# What guessing tokens brings",
        "",
        f"Made by `bench/speculation.py`; {about['date']}, {about['processor']}, "
        f"{record['threads']} threads, {record['model']['name']}. Answers of {record['tokens']} tokens, the "
        "same with and without; seconds from the first token to the last one. A ratio is the median of the "
        "pairs with its 95 % interval.",
        "",
        "| text | pairs | tokens/s plain | guessing | ratio | goal | tokens a step | guesses right |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind, pairs in record["pairs"].items():
        _, _, number = kind.partition("-")
        made = record["tokens"] * (int(number) if kind.startswith("batch") else 1)
        speed = {side: statistics.median(made / pair[side]["seconds"] for pair in pairs) for side in SIDES}
        ratios = [pair["plain"]["seconds"] / pair["guessing"]["seconds"] for pair in pairs]
        low, high, _ = results.median_interval(ratios)
        drafted = sum(pair["guessing"]["draft_tokens"] for pair in pairs)
        accepted = sum(pair["guessing"]["accepted_tokens"] for pair in pairs)
        steps = {side: sum(pair[side]["steps"] for pair in pairs) for side in SIDES}
        lines.append(
            f"| {kind} | {len(pairs)} | {speed['plain']:.0f} | {speed['guessing']:.0f} | "
            f"**{statistics.median(ratios):.2f}** ({low:.2f} to {high:.2f}) | "
            f"{GOAL_REPEATS if kind in REPEATS else GOAL_ELSEWHERE} | "
            f"{len(pairs) * made / steps['guessing']:.2f} | "
            f"{f'{accepted / drafted:.0%} of {drafted / len(pairs):.0f}' if drafted else 'none'} |"
        )
    return "\n".join(lines) + "\n"


def save(record: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-q4_1", help="a name of bench/models.py, or a GGUF file")
    parser.add_argument("--kinds", default=",".join(KINDS), help="with commas between; otherwise all")
    parser.add_argument("--pairs", type=int, default=15, help="(15)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=OUT, help="without suffix")
    parser.add_argument("--report", type=Path, help="only write the table of this record, beside it")
    options = parser.parse_args()
    if options.report:
        save(json.loads(options.report.read_text()), options.report.with_suffix(""))
        print(options.report.with_suffix(".md").read_text())
        return
    run(options)
    print(options.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
