"""Two records of the same load side by side: ratios, with intervals over the rounds that stood next to each
other.

Round k of one is divided by round k of the other: the machine's pace changes, and rounds that were measured
in turns (A, B, A, B, ...) share it. The interval is that of the median of the ratios (`intervals.py`); below
six rounds it is all of them, and says with what probability it holds the true one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from fastllm.bench.intervals import median_interval
from fastllm.errors import RequestError

Record = dict[str, Any]

# What may differ without making it another load.
_FREE = {"base_url", "model", "extra", "keep_alive", "timeout", "connect_timeout", "silence_timeout", "slo"}


@dataclass(frozen=True)
class Ratio:
    """A figure of A divided by that of B.

    Attributes:
        name: the figure.
        more_is_better: what a ratio above 1 means.
        first, second: its medians over the rounds.
        ratio: the median of the rounds' ratios.
        low, high, level: an interval for that, and the probability that it holds; of one round there is none.
        rounds: how many pairs there were.
    """

    name: str
    more_is_better: bool
    first: float
    second: float
    ratio: float
    low: float | None
    high: float | None
    level: float | None
    rounds: int


def _latency(name: str, column: str) -> Callable[[dict[str, Any]], float | None]:
    def read(summary: dict[str, Any]) -> float | None:
        found = summary["latency_ms"][name]
        return None if found is None else float(found[column])

    return read


def _figures(
    settings: dict[str, Any], same_slo: bool
) -> dict[str, tuple[bool, Callable[[dict[str, Any]], float | None]]]:
    """Name -> whether more is better, and how a summary is read."""
    suffix = "" if settings["rate"] is None else "_scheduled"
    found: dict[str, tuple[bool, Callable[[dict[str, Any]], float | None]]] = {}
    names = {
        "ttft" + suffix: "TTFT",
        "itl": "ITL",
        "tpot": "time per output token",
        "e2e" + suffix: "whole request",
    }
    for name, title in names.items():
        for column in ("p50", "p99"):
            found[f"{title} {column}, ms"] = (False, _latency(name, column))
    for name, title in (
        ("requests_per_second", "requests per second"),
        ("output_tokens_per_second", "output tokens per second"),
        ("prompt_tokens_per_second", "prompt tokens per second"),
    ):
        found[title] = (True, lambda summary, name=name: float(summary[name]))  # type: ignore[misc]
    if same_slo:
        found["goodput, requests per second"] = (True, _goodput)
    return found


def _goodput(summary: dict[str, Any]) -> float | None:
    return float(summary["goodput"]["requests_per_second"]) if "goodput" in summary else None


def check_same_load(first: Record, second: Record) -> None:
    """Raises RequestError if the two were not measured under the same load."""
    ours, theirs = first["settings"], second["settings"]
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in _FREE and ours.get(name) != theirs.get(name):
            raise RequestError(f"compare: {name}", theirs.get(name), f"{ours.get(name)!r}, as in the other")


def compare(first: Record, second: Record) -> list[Ratio]:
    """Every figure that both have.

    Raises:
        RequestError: they were not measured under the same load, or one has no rounds.
    """
    check_same_load(first, second)
    pairs = [(a["summary"], b["summary"]) for a, b in zip(first["rounds"], second["rounds"], strict=False)]
    if not pairs:
        raise RequestError("compare", 0, "records with rounds")
    found = []
    same_slo = first["settings"]["slo"] == second["settings"]["slo"]
    for name, (more_is_better, read) in _figures(first["settings"], same_slo).items():
        values = [(read(a), read(b)) for a, b in pairs]
        both = [(a, b) for a, b in values if a and b]  # of a zero there is no ratio
        if not both:
            continue
        ratios = [a / b for a, b in both]
        low, high, level = median_interval(ratios) if len(ratios) > 1 else (None, None, None)
        ours, theirs = (median(side) for side in zip(*both, strict=True))
        found.append(Ratio(name, more_is_better, ours, theirs, median(ratios), low, high, level, len(ratios)))
    return found


def interleaved(first: Record, second: Record) -> bool:
    """Whether the rounds were measured in turns, one of each record, whichever came first."""
    begins = [
        (each["began_unix"], side) for side, record in enumerate((first, second)) for each in record["rounds"]
    ]
    sides = [side for _, side in sorted(begins)]
    return len(sides) % 2 == 0 and all(a != b for a, b in zip(sides[::2], sides[1::2], strict=True))


def table(ratios: list[Ratio]) -> list[list[str]]:
    """Rows of text, a heading first."""
    rows = [["", "A", "B", "A / B", "interval", "rounds", "better"]]
    for each in ratios:
        interval = "one round: none"
        if each.low is not None and each.high is not None and each.level is not None:
            interval = f"{each.low:.3f} to {each.high:.3f} ({each.level:.0%})"
        better = "neither"
        if each.low is not None and each.high is not None and (each.low > 1 or each.high < 1):
            better = "A" if (each.ratio > 1) == each.more_is_better else "B"
        elif each.low is None:
            better = "?"
        cells = [each.name, f"{each.first:,.2f}", f"{each.second:,.2f}", f"{each.ratio:.3f}", interval]
        rows.append([*cells, str(each.rounds), better])
    return rows


def remarks(first: Record, second: Record) -> list[str]:
    """What a reader should know of how the two were measured."""
    found = []
    ours, theirs = len(first["rounds"]), len(second["rounds"])
    if ours != theirs:
        found.append(
            f"A has {ours} rounds, B has {theirs}: the first {min(ours, theirs)} of each are compared."
        )
    if not interleaved(first, second):
        found.append(
            "The rounds were not measured in turns: a change of the machine's pace is in the ratios."
        )
    seeds = [[each["seed"] for each in record["rounds"]] for record in (first, second)]
    if any(a != b for a, b in zip(*seeds, strict=False)):
        found.append("Rounds that are compared had other seeds: they asked other things.")
    for name, record in (("A", first), ("B", second)):
        failed = sum(each["summary"]["failed"] for each in record["rounds"])
        if failed:
            found.append(f"{name}: {failed} requests failed.")
    return found
