"""A record's results for people: a Markdown table and a chart.

The chart has a bar per row with the ratio to the best peer, its interval as a line, and a
tick where the ratio has to be.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from rows import ANCHOR_LIMITS, ANCHOR_SHARE

from fastllm.bench.svg import AMBER, BLUE, FAINT, INK, RED, page

PAIRS_LEAST = 15
FASTLLM = "fastllm"
Result = dict[str, Any]


def write(out: Path, record: dict[str, Any], table: str, drawing: str) -> None:
    """OUT.json, .md and .svg. The record takes its name once it is complete: it is what cannot be remade."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".part")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(out.with_suffix(".json"))
    out.with_suffix(".md").write_text(table)
    out.with_suffix(".svg").write_text(drawing)


def verdict(result: Result) -> str:
    """Whether the row's bars are met, or why that cannot be said."""
    if not result["checks"]:
        return ""
    reached = all(check["met"] for check in result["checks"])
    why = []
    if any(check["pairs"] < PAIRS_LEAST for check in result["checks"]):
        why.append(f"{min(check['pairs'] for check in result['checks'])} of {PAIRS_LEAST} pairs")
    for check in result["checks"]:
        credited = check.get("credited")
        if credited and check["met"] and not credited["met"]:
            share = ANCHOR_SHARE / credited["factor"]
            why.append(
                f"{credited['peer']} at {share:.0%} of its anchor; {credited['value']:.3g} if it had 85 %"
            )
    why += [f"without {name}" for check in result["checks"] for name in check.get("not_measured", ())]
    if why:
        return f"does not count ({'; '.join(why)}); {'reached' if reached else 'not reached'}"
    return "yes" if reached else "**no**"


def _number(value: float, unit: str) -> str:
    return (
        f"{value:.2f}" if unit == "s" or value < 10 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
    )


def _money(result: Result, name: str | None) -> str:
    dollars = result["programs"].get(name, {}).get("dollars_per_million_tokens")
    return "" if dollars is None else f"{dollars:.4f}" if dollars < 0.1 else f"{dollars:.3f}"


def _checks(result: Result) -> str:
    parts = []
    for check in result["checks"]:
        sign = "≤" if check.get("at_most") else "≥"
        parts.append(f"{sign} {check['bar']:g} {check['what']}: {check['value']:.3g}")
    return "; ".join(parts)


def markdown(record: dict[str, Any], results: Sequence[Result]) -> str:
    """The table, with what it was measured on."""
    peers = list(dict.fromkeys(name for result in results for name in result["programs"] if name != FASTLLM))
    head = ["model", "row", FASTLLM, *peers, "ratio to the best peer", "of the limit", "bar: reached", "met"]
    head.append("$ per million tokens, fastllm / best peer")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for result in results:
        programs, unit = result["programs"], result["unit"]
        cells = [result["model"], result["row"] + ("" if unit == "tokens/s" else f", {unit}")]
        for name in (FASTLLM, *peers):
            cells.append(_number(programs[name]["median"], unit) if name in programs else "")
        best = result.get("best_peer")
        ratio = result.get("ratio")
        cells.append(
            f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) × {best}" if ratio else ""
        )
        share = programs.get(FASTLLM, {}).get("of_limit")
        cells.append(f"{share:.0%} ({result['limit']['by']})" if share else "")
        cells += [_checks(result), verdict(result)]
        ours, theirs = _money(result, FASTLLM), _money(result, best)
        cells.append(f"{ours} / {theirs}" if ours and theirs else ours)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*_preface(record, results), "", *lines, "", *_settings(results), ""])


def _preface(record: dict[str, Any], results: Sequence[Result]) -> list[str]:
    machine = record["parts"][-1]["machine"]
    typical = {name: median(item[name] for item in record["limits"]) for name in ANCHOR_LIMITS}
    peers = "; ".join(f"{name} {_version(about)}" for name, about in record["peers"].items())
    loads = [item["load_average"] for item in record["measurements"]]
    return [
        "# fastllm and its peers, side by side",
        "",
        f"Made by `bench/compare.py`; {machine['date']}, commit {machine['commit'][:12]}, "
        f"{machine['processor']}, {record['threads']} threads, instruction set {machine['isa']}, "
        f"KV cache {record['kv_cache_dtype']}. "
        f"Limits measured in each round, medians: int8 {typical['int8'] / 1e9:.0f} Gop/s, reading memory "
        f"{typical['read'] / 1e9:.1f} GB/s. Load average {min(loads):.1f} to {max(loads):.1f}. "
        f"Peers: {peers or 'none'}. A machine at {record['dollars_per_hour']:g} $ per hour.",
        "",
        "tokens/s are medians; a ratio is the median over interleaved rounds with its 95 % interval, and the "
        "interval's lower end has to reach the bar. fastllm's time includes sampling, llama.cpp's does not. "
        "A row counts with at least 15 rounds. A peer that comes to less than 85 % of its earlier figure in "
        "relation to the limit is given what it lacks, and the bar has to hold all the same. What the rows "
        "are: `bench/rows.py`.",
    ]


def _version(about: dict[str, Any]) -> str:
    return str(next(value for key, value in about.items() if key != "python"))


def _settings(results: Sequence[Result]) -> list[str]:
    lines = ["Settings that were best:", ""]
    for result in results:
        for name, entry in result["programs"].items():
            for setting in entry["settings"]:
                if setting:
                    shown = ", ".join(f"{key} {value}" for key, value in setting.items())
                    lines.append(f"- {result['model']}, {result['row']}: {name} with {shown}")
    return lines if len(lines) > 2 else []


# -- chart ---------------------------------------------------------------------------------------------------

WIDTH, LEFT, RIGHT, TOP, LINE = 860, 230, 150, 64, 24
BAR, MISSED, TICK = BLUE, AMBER, RED


def chart(record: dict[str, Any], results: Sequence[Result]) -> str:
    """One bar per row that has a ratio, of speeds."""
    shown = [result for result in results if "ratio" in result and result["row"] != "memory"]
    most = max([max(r["ratio"]["high"], _bar_of(r) or 0) for r in shown], default=1.0)
    top = max(2, math.ceil(most))
    height = TOP + LINE * len(shown) + 40

    def x(ratio: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * min(ratio, top) / top

    machine = record["parts"][-1]["machine"]
    title = "fastllm against the best peer on the same weights: times as fast"
    below = f"{machine['processor']}, {record['threads']} threads, {machine['isa']}"
    below += f"; commit {machine['commit'][:8]}; line: 95 % interval; red: the bar"
    parts = []
    for mark in range(0, top + 1, max(1, top // 10)):
        parts.append(
            f'<path d="M{x(mark):.1f} {TOP - 8}V{height - 30}" stroke="{FAINT}"/>'
            f'<text x="{x(mark):.1f}" y="{height - 14}" text-anchor="middle">{mark}</text>'
        )
    for index, result in enumerate(shown):
        y = TOP + index * LINE
        parts.extend(_bar(result, y, x))
    return page(WIDTH, height, title, below, parts)


def _bar_of(result: Result) -> float | None:
    """The bar, where it is a ratio to a peer."""
    for check in result["checks"]:
        if check["what"].startswith("× ") and not check.get("at_most"):
            return float(check["bar"])
    return None


def _bar(result: Result, y: int, x: Any) -> list[str]:
    ratio, bar = result["ratio"], _bar_of(result)
    middle = y + LINE / 2 - 2
    color = MISSED if bar is not None and ratio["low"] < bar else BAR
    label = escape(f"{result['model']}  {result['row']}")
    note = escape(f"{ratio['median']:.2f} × {result['best_peer']}")
    drawn = [
        f'<text x="{LEFT - 8}" y="{middle + 4:.1f}" text-anchor="end">{label}</text>',
        f'<rect x="{LEFT}" y="{y + 2}" width="{x(ratio["median"]) - LEFT:.1f}" height="{LINE - 8}" '
        f'fill="{color}"/>',
        f'<line x1="{x(ratio["low"]):.1f}" x2="{x(ratio["high"]):.1f}" y1="{middle}" y2="{middle}" '
        f'stroke="{INK}" stroke-width="2"/>',
        f'<text x="{max(x(ratio["high"]), x(ratio["median"])) + 6:.1f}" y="{middle + 4:.1f}">{note}</text>',
    ]
    if bar is not None:
        drawn.append(
            f'<line x1="{x(bar):.1f}" x2="{x(bar):.1f}" y1="{y}" y2="{y + LINE - 4}" stroke="{TICK}" '
            f'stroke-width="3"/>'
        )
    return drawn
