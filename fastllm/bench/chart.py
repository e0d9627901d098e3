"""A record's chart: TTFT and ITL percentiles, and over time requests, tokens and latencies of the last
round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from fastllm.bench import svg
from fastllm.bench.report import describe_load, printable
from fastllm.bench.summary import QUANTILES

WIDTH, LEFT, PLOT_WIDTH = 860, 64, 772
BARS_TOP, BARS, GAP = 84, 120, 60
TIME_TOP, TIME, ROW = 268, 96, 152

Points = Sequence[tuple[float, float]]


def chart(record: dict[str, Any]) -> str:
    """The whole page."""
    last, settings = record["rounds"][-1], record["settings"]
    parts: list[str] = []
    width = (PLOT_WIDTH - GAP) / 2
    latency = last["summary"]["latency_ms"]
    waits = "ttft_scheduled" if settings["rate"] is not None else "ttft"
    for place, (name, title, color) in enumerate(
        ((waits, "time to first token, ms", svg.BLUE), ("itl", "inter-token latency, ms", svg.AMBER))
    ):
        parts += _bars(latency[name], LEFT + place * (width + GAP), width, title, color)
    rows = last["series"]
    seconds = max(1.0, float(len(rows)))
    for place, (title, lines) in enumerate(_panels(rows)):
        parts += _over_time(title, lines, TIME_TOP + place * ROW, seconds, settings["spikes"])
    below = f"{printable(last['server']['model'])}; {describe_load(settings)}"
    if len(below) > 130:
        below = below[:127] + "..."
    return svg.page(WIDTH, TIME_TOP + 3 * ROW, "Load on a server", below, parts)


def _panels(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[tuple[str, str, Points]]]]:
    def counts(name: str) -> Points:
        return [(row["second"] + 0.5, float(row[name])) for row in rows]

    def quantiles(name: str, which: str) -> Points:
        return [(row["second"] + 0.5, row[name][which]) for row in rows if row[name] is not None]

    return [
        (
            "requests",
            [
                ("due, a second", svg.GRAY, counts("due")),
                ("done, a second", svg.GREEN, counts("done")),
                ("under way", svg.PURPLE, counts("under_way")),
                ("failed, a second", svg.RED, counts("failed")),
            ],
        ),
        ("pieces of text a second", [("", svg.GREEN, counts("pieces"))]),
        (
            "ms",
            [
                ("first token p50", svg.BLUE, quantiles("ttft_ms", "p50")),
                ("first token p99", svg.ROSE, quantiles("ttft_ms", "p99")),
                ("between tokens p50", svg.AMBER, quantiles("itl_ms", "p50")),
                ("between tokens p99", svg.RED, quantiles("itl_ms", "p99")),
            ],
        ),
    ]


def _text(x: float, y: float, text: str, anchor: str = "start", fill: str = svg.INK) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="11" fill="{fill}">'
        f"{escape(text)}</text>"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bars(found: dict[str, float] | None, x: float, width: float, title: str, color: str) -> list[str]:
    """A bar for each percentile."""
    parts = [_text(x, BARS_TOP - 12, title)]
    bottom = BARS_TOP + BARS
    if found is None:
        return [*parts, _text(x, bottom, "none", fill=svg.MUTED)]
    names = (*QUANTILES, "max")
    most = max(found["max"], 1e-9)
    step = width / len(names)
    for index, name in enumerate(names):
        tall = (BARS - 16) * found[name] / most
        middle = x + step * (index + 0.5)
        shade = svg.GRAY if name == "max" else color
        parts.append(
            f'<rect x="{middle - step * 0.3:.1f}" y="{bottom - tall:.1f}" width="{step * 0.6:.1f}" '
            f'height="{tall:.1f}" fill="{shade}"/>'
        )
        parts.append(_text(middle, bottom - tall - 4, _number(found[name]), "middle"))
        parts.append(_text(middle, bottom + 15, name, "middle", svg.MUTED))
    return parts


def _over_time(
    title: str,
    lines: Sequence[tuple[str, str, Points]],
    y: float,
    seconds: float,
    spikes: Sequence[dict[str, float]],
) -> list[str]:
    """A panel of lines over the seconds of the round; spikes are shaded."""

    def x_of(at: float) -> float:
        return LEFT + PLOT_WIDTH * min(at, seconds) / seconds

    shown = [line for line in lines if any(value for _, value in line[2])]
    top = _round_up(max([value for line in shown for _, value in line[2]], default=1.0))
    parts = []
    for spike in spikes:
        begin, end = x_of(spike["at"]), x_of(spike["at"] + spike["seconds"])
        parts.append(
            f'<rect x="{begin:.1f}" y="{y}" width="{end - begin:.1f}" height="{TIME}" '
            f'fill="{svg.FAINT}" opacity="0.5"/>'
        )
    for share in (0.0, 0.5, 1.0):
        at = y + TIME * (1 - share)
        parts.append(f'<path d="M{LEFT} {at:.1f}h{PLOT_WIDTH}" stroke="{svg.FAINT}"/>')
        parts.append(_text(LEFT - 6, at + 4, _number(top * share), "end", svg.MUTED))
    step = _round_up(seconds / 8) if seconds > 8 else 1.0
    for number in range(int(seconds / step) + 1):
        label = f"{_number(number * step)} s"
        parts.append(_text(x_of(number * step), y + TIME + 14, label, "middle", svg.MUTED))
    parts.append(_text(LEFT, y - 8, title))
    legend = LEFT + 12.0 + 6.2 * len(title)
    for name, color, points in shown:
        path = " ".join(f"{x_of(at):.1f},{y + TIME * (1 - value / top):.1f}" for at, value in points)
        if len(points) > 1:
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        else:
            at, value = points[0]
            parts.append(
                f'<circle cx="{x_of(at):.1f}" cy="{y + TIME * (1 - value / top):.1f}" r="3" fill="{color}"/>'
            )
        if name:
            parts.append(f'<rect x="{legend:.1f}" y="{y - 17}" width="9" height="9" fill="{color}"/>')
            parts.append(_text(legend + 13, y - 8, name))
            legend += 32 + 6.2 * len(name)
    return parts


def _round_up(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9)))
