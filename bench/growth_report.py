"""A record of bench/growth.py for people: results, tables and charts, from the record alone.

The charts are small multiples: for each axis its tokens per second, and for each series the shares of a
step's time as stacked columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from statistics import median_low
from typing import Any

import roofline
from rows import Row

from fastllm.bench import svg
from fastllm.engine.profile import GROUPS, StepTimes

Record = dict[str, Any]
Result = dict[str, Any]

TITLES = {
    "batch": ("the batch", "sequences at once"),
    "context": ("the context", "tokens of context, one sequence"),
    "threads": ("the threads", "threads"),
    "size": ("the size of the model", "million weights"),
}


def results(record: Record) -> list[Result]:
    """One for each point: tokens per second, and the step of the round in the middle."""
    return [_result(record, point) for point in record["points"] if point["rounds"]]


def _result(record: Record, point: dict[str, Any]) -> Result:
    rates = [its["tokens"] / its["seconds"] for its in point["rounds"]]
    middle = point["rounds"][rates.index(median_low(rates))]
    times = StepTimes(**{name: middle[name] for name in ("steps", "tokens", "seconds", "parts")})
    work = roofline.from_record(record["models"][point["model"]]["work"])
    one_step = Row("growth", "decode", point["batch"], point["context"], 1)
    limit, binding = roofline.limit(one_step, work, record["limits"][str(point["threads"])])
    return {
        **{name: point[name] for name in ("axis", "value", "model", "threads", "batch", "context")},
        "tokens_per_second": times.tokens_per_second,
        "least": min(rates),
        "most": max(rates),
        "rounds": len(rates),
        "milliseconds_per_step": times.seconds / times.steps * 1e3,
        "shares": {group: sum(its.values()) / times.seconds for group, its in times.groups().items()},
        "overhead": times.overhead,
        "of_limit": times.tokens_per_second / limit,
        "limit_by": binding,
    }


def _series(table: Sequence[Result], axis: str) -> dict[int, list[Result]]:
    """The results of an axis: by batch, unless that is what varies."""
    found: dict[int, list[Result]] = {}
    for result in table:
        if result["axis"] == axis:
            found.setdefault(0 if axis == "batch" else result["batch"], []).append(result)
    return found


def _name(batch: int) -> str:
    return f"{batch} sequences" if batch > 1 else "1 sequence"


def _axes(table: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result["axis"] for result in table))


def _groups(table: Sequence[Result]) -> list[str]:
    """Those with a time, in the profile's order."""
    there = {group for result in table for group in result["shares"]}
    return [group for group in (*GROUPS, *sorted(there - set(GROUPS))) if group in there]


def _value(value: float) -> str:
    return f"{value:,.0f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


# -- tables --------------------------------------------------------------------------------------------------


def markdown(record: Record, table: Sequence[Result]) -> str:
    """A table for each axis, with what it was measured on."""
    about = record["machine"]
    limit = record["limits"][str(record["threads"])]
    loads = [its["load_average"] for point in record["points"] for its in point["rounds"]]
    lines = [
        "# How the cost of decoding grows",
        "",
        f"Made by `bench/growth.py`; {about['date']}, commit {about['commit'][:12]}, {about['processor']}, "
        f"threads: {record['threads']}, instruction set {about['isa']}. Limits: int8 "
        f"{limit['int8'] / 1e9:.0f} Gop/s, reading memory {limit['read'] / 1e9:.1f} GB/s. Load average "
        f"{min(loads):.1f} to {max(loads):.1f}.",
        "",
        f"Decode steps of {record['model']}, and on the last axis of models of each size; "
        f"{record['rounds']} rounds of {record['steps']} steps, the points of an axis in turns. tokens/s are "
        "the median of the rounds, with the least and the most; the parts of the step are that round's. "
        "Overhead is scheduling, Python, the time between steps and what no part explains. What the parts "
        "are: [README.md](README.md).",
    ]
    for axis in _axes(table):
        title, unit = TITLES[axis]
        for batch, its in _series(table, axis).items():
            more = f", {_name(batch)}" if axis in ("threads", "size") else ""
            lines += ["", f"## With {title}{more}", "", *_table(its, unit)]
    return "\n".join(lines) + "\n"


def _table(table: Sequence[Result], unit: str) -> list[str]:
    groups = _groups(table)
    head = [unit, "tokens/s", "least to most", "ms/step", "of the limit", *groups, "overhead"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
    for result in table:
        cells = [_value(result["value"]), _rate(result["tokens_per_second"])]
        cells.append(f"{_rate(result['least'])} to {_rate(result['most'])}")
        cells.append(f"{result['milliseconds_per_step']:.2f}")
        cells.append(f"{result['of_limit']:.0%} ({result['limit_by']})")
        cells += [f"{result['shares'].get(group, 0.0):.1%}" for group in groups]
        lines.append("| " + " | ".join([*cells, f"{result['overhead']:.1%}"]) + " |")
    return lines


# -- charts --------------------------------------------------------------------------------------------------

WIDTH, TOP, ROW = 860, 96, 200  # of the page, of what stands above the panels, of a row of panels
PLOT_TOP, PLOT = 34, 120  # within a row
SPEED_LEFT, SPEED_WIDTH, SHARE_LEFT, SHARE_WIDTH, GAP = 64, 300, 430, 410, 34
COLORS = {
    "matmul": svg.BLUE,
    "attention": svg.AMBER,
    "norm, rope, activation": svg.GRAY,
    "sampling": svg.PURPLE,
    "scheduling": svg.GREEN,
    "Python": svg.RED,
    "between steps": svg.ROSE,
    "unaccounted": svg.INK,
}
LINES = (svg.BLUE, svg.AMBER)


def chart(record: Record, table: Sequence[Result]) -> str:
    """A row of panels for each axis."""
    about = record["machine"]
    axes = _axes(table)
    below = (
        f"{about['processor']}, {record['threads']} threads, {about['isa']}; commit {about['commit'][:8]}; "
    )
    below += f"{record['model']}; left: tokens/s, both scales in doublings; right: shares of a step's time"
    parts = _legend(_groups(table))
    for index, axis in enumerate(axes):
        y = TOP + ROW * index
        series = _series(table, axis)
        title, unit = TITLES[axis]
        parts.append(_text(16, y + 14, f"With {title}", weight="bold"))
        parts += _speed(series, y + PLOT_TOP, unit)
        width = (SHARE_WIDTH - GAP * (len(series) - 1)) / len(series)
        for place, (batch, its) in enumerate(series.items()):
            x = SHARE_LEFT + place * (width + GAP)
            heading = _name(batch) if len(series) > 1 else ""
            parts += _shares(its, x, width, y + PLOT_TOP, heading)
    return svg.page(WIDTH, TOP + ROW * len(axes), "How the cost of decoding grows", below, parts)


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", weight: str = "", small: bool = False
) -> str:
    more = (f' font-weight="{weight}"' if weight else "") + (' font-size="10"' if small else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _legend(groups: Sequence[str]) -> list[str]:
    parts, x = [], 16.0
    for group in groups:
        parts.append(
            f'<rect x="{x:.1f}" y="58" width="10" height="10" fill="{COLORS.get(group, svg.FAINT)}"/>'
        )
        parts.append(_text(x + 14, 67, group))
        x += 34 + 6.3 * len(group)
    return parts


def _speed(series: dict[int, list[Result]], y: float, unit: str) -> list[str]:
    """Tokens per second over the values, both in doublings: a straight line is a power."""
    rates = [result["tokens_per_second"] for its in series.values() for result in its]
    low, high = math.floor(math.log2(min(rates))), math.ceil(math.log2(max(rates)))
    high = max(high, low + 1)

    def height(rate: float) -> float:
        return y + PLOT * (high - math.log2(rate)) / (high - low)

    parts = []
    for power in range(low, high + 1, max(1, (high - low) // 4)):
        at = height(2.0**power)
        parts.append(f'<path d="M{SPEED_LEFT} {at:.1f}h{SPEED_WIDTH}" stroke="{svg.FAINT}"/>')
        parts.append(_text(SPEED_LEFT - 6, at + 4, f"{2.0**power:,g}", anchor="end"))
    values = list(dict.fromkeys(result["value"] for its in series.values() for result in its))
    place = _places(values)
    for value in values:
        x = SPEED_LEFT + SPEED_WIDTH * place(value)
        parts.append(_text(x, y + PLOT + 15, _short(value), anchor="middle", small=len(values) > 6))
    parts.append(_text(SPEED_LEFT + SPEED_WIDTH / 2, y + PLOT + 30, unit, anchor="middle", small=True))
    for (batch, its), color in zip(series.items(), LINES, strict=False):
        points = [(SPEED_LEFT + SPEED_WIDTH * place(r["value"]), height(r["tokens_per_second"])) for r in its]
        path = " ".join(f"{x:.1f},{at:.1f}" for x, at in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        for (x, at), result in zip(points, its, strict=True):
            parts.append(f'<circle cx="{x:.1f}" cy="{at:.1f}" r="3" fill="{color}"/>')
            shown = _rate(result["tokens_per_second"])
            parts.append(_text(x, at - 6, shown, anchor="middle", small=True))
        if len(series) > 1:
            x, at = points[-1]
            parts.append(_text(x + 8, at + 4, _name(batch), small=True))
    return parts


def _places(values: Sequence[float]) -> Callable[[float], float]:
    """Where a value stands, from 0 to 1, in doublings, with room at both ends."""
    low, high = math.log2(min(values)), math.log2(max(values))

    def place(value: float) -> float:
        return 0.06 + 0.88 * (math.log2(value) - low) / (high - low) if high > low else 0.5

    return place


def _short(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:.0f}"


def _shares(table: Sequence[Result], x: float, width: float, y: float, heading: str) -> list[str]:
    """A column for each value, its parts from below in the profile's order; the overhead above it."""
    parts = [_text(x, y - 16, heading, small=True)] if heading else []
    step = width / len(table)
    bar = min(step * 0.7, 48)
    for index, result in enumerate(table):
        middle, bottom = x + step * (index + 0.5), y + PLOT
        for group in _groups(table):
            tall = PLOT * result["shares"].get(group, 0.0)
            bottom -= tall
            color = COLORS.get(group, svg.FAINT)
            parts.append(
                f'<rect x="{middle - bar / 2:.1f}" y="{bottom:.2f}" width="{bar:.1f}" height="{tall:.2f}" '
                f'fill="{color}"/>'
            )
        overhead = f"{result['overhead']:.1%}"
        parts.append(_text(middle, y - 4, overhead, anchor="middle", small=True))
        parts.append(_text(middle, y + PLOT + 15, _short(result["value"]), anchor="middle", small=step < 40))
    parts.append(
        _text(x + width / 2, y + PLOT + 30, "above the columns: overhead", anchor="middle", small=True)
    )
    return parts
