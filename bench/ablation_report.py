"""A record of bench/ablation.py for people: results, a table and a chart, from the record alone.

A figure is the median over the rounds; a ratio is the median of the rounds' ratios, since two rows of one
round were measured one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import mean, median
from typing import Any

import report
import roofline

from fastllm.bench import svg

Record = dict[str, Any]
Result = dict[str, Any]


def quantile(values: Sequence[float], share: float) -> float:
    """The least value that at least this share of them does not exceed."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


# -- results -------------------------------------------------------------------------------------------------


def results(record: Record) -> list[Result]:
    """One for each row that has rounds."""
    found: list[Result] = []
    above: dict[str, Any] | None = None
    for row in record["rows"]:
        if not row["rounds"]:
            continue
        found.append(_result(record, row))
        if above is not None:
            found[-1]["ratio"] = _ratio(record, above, row)
        above = row
    return found


def _result(record: Record, row: dict[str, Any]) -> Result:
    rounds, keeps = row["rounds"], row["keeps"]
    work = roofline.from_record(record["model"]["work"])
    mean_answer = mean(record["answer_tokens"])

    def middle(figure: Callable[[dict[str, Any]], float]) -> float:
        return median(figure(its) for its in rounds)

    rate = middle(_tokens_per_second)
    result = {
        "name": row["name"],
        "title": row["title"],
        "rounds": len(rounds),
        "tokens_per_second": rate,
        "least": min(map(_tokens_per_second, rounds)),
        "most": max(map(_tokens_per_second, rounds)),
        "requests_per_second": rate / mean_answer,
        "gap_p50": middle(lambda its: its["gap_p50"]),
        "gap_p99": middle(lambda its: its["gap_p99"]),
        "at_once": middle(lambda its: its["at_once"]),
        "most_at_once": max(its["most_at_once"] for its in rounds),
        "weight_bytes": rounds[0]["weight_bytes"],
        "kv_bytes": middle(lambda its: _kv_bytes(record, row, its)),
        "resident_bytes": middle(lambda its: its["peak_bytes"] - its["import_peak_bytes"]),
        "of_int8_peak": middle(lambda its: _operations(work, its) / its["seconds"] / _int8_peak(record)),
        "dollars_per_million_tokens": record["dollars_per_hour"] / 3600 / rate * 1e6,
        "preemptions": middle(lambda its: its["preemptions"]),
        "prefix_share": middle(lambda its: its["prefix_hits"] / max(its["prefix_queries"], 1)),
        "draft_tokens": middle(lambda its: its["draft_tokens"]),
        "accepted_tokens": middle(lambda its: its["accepted_tokens"]),
    }
    if keeps:  # else its requests are single tokens
        result["first_p50"] = middle(lambda its: quantile(its["first_seconds"], 0.5))
        result["first_p99"] = middle(lambda its: quantile(its["first_seconds"], 0.99))
        result["request_p50"] = middle(lambda its: quantile(its["request_seconds"], 0.5))
    return result


def _tokens_per_second(its: dict[str, Any]) -> float:
    return float(its["generated"] / its["seconds"])


def _int8_peak(record: Record) -> float:
    """What the machine can do, in operations a second: a neighbour slows down some of the measurements."""
    return float(max(its["int8"] for its in record["limits"]))


def _operations(work: roofline.Work, its: dict[str, Any]) -> float:
    """Of the products with weights: every computed token through the layers, and through the head all that
    were sampled or guessed in vain."""
    heads = its["generated"] + its["draft_tokens"] - its["accepted_tokens"]
    return 2.0 * (work.layer_weights * its["computed"] + work.head_weights * heads)


def _kv_bytes(record: Record, row: dict[str, Any], its: dict[str, Any]) -> float:
    """Of the cache, what sequences hold at most: blocks, or reservations."""
    if not row["keeps"]:
        return 0.0
    block = its["kv_cache_bytes"] / its["num_blocks"]
    if row["reserves"]:
        return float(its["most_at_once"] * -(-record["max_model_len"] // its["block_size"]) * block)
    return float(its["peak_blocks"] * block)


def _ratio(record: Record, above: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    """By tokens per second; where requests arrive at a rate, which bounds those, by the median request."""
    pairs = list(zip(above["rounds"], row["rounds"], strict=False))
    if record["rate"]:
        values = [quantile(a["request_seconds"], 0.5) / quantile(b["request_seconds"], 0.5) for a, b in pairs]
    else:
        values = [_tokens_per_second(b) / _tokens_per_second(a) for a, b in pairs]
    return {"median": median(values), "low": min(values), "high": max(values)}


def save(record: Record, out: Path) -> None:
    """OUT.json, .md and .svg."""
    table = results(record)
    report.write(out, {**record, "results": table}, markdown(record, table), chart(record, table))


# -- table ---------------------------------------------------------------------------------------------------

HEAD = (
    "",
    "sequences at once, mean (most)",
    "weights + KV held at the peak, MB",
    "resident peak less import, MB",
    "tokens/s",
    "requests/s",
    "first token p50 / p99, s",
    "between tokens p50 / p99, ms",
    "request p50, s",
    "of the int8 peak",
    "$ per million tokens",
)


def markdown(record: Record, table: Sequence[Result]) -> str:
    """The table, with what it was measured on."""
    by = "request p50: times as fast as above" if record["rate"] else "× the row above (least to most)"
    head = [*HEAD, by]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    lines += ["| " + " | ".join(_cells(result)) + " |" for result in table]
    return "\n".join([*_preface(record), "", *lines, "", *_notes(record, table), ""])


def _cells(result: Result) -> list[str]:
    keeps = "request_p50" in result
    ratio = result.get("ratio")
    held = f"{result['weight_bytes'] / 1e6:.0f} + {result['kv_bytes'] / 1e6:.0f}"
    return [
        result["title"],
        f"{result['at_once']:.1f} ({result['most_at_once']})",
        held,
        f"{result['resident_bytes'] / 1e6:.0f}",
        _number(result["tokens_per_second"]),
        _number(result["requests_per_second"]),
        f"{_number(result['first_p50'])} / {_number(result['first_p99'])}" if keeps else "not measured",
        f"{_number(result['gap_p50'] * 1e3)} / {_number(result['gap_p99'] * 1e3)}",
        _number(result["request_p50"]) if keeps else "not measured",
        f"{result['of_int8_peak']:.0%}",
        f"{result['dollars_per_million_tokens']:.3f}",
        f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "",
    ]


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _preface(record: Record) -> list[str]:
    about = record["machine"]
    prompts, answers = record["prompt_tokens"], record["answer_tokens"]
    loads = [its["load_average"] for row in record["rows"] for its in row["rounds"]]
    arrivals = f"arriving at random, {record['rate']:g} a second" if record["rate"] else "all there at once"
    cache = record["reservations"] * record["max_model_len"]
    return [
        "# What each optimization brings",
        "",
        f"Made by `bench/ablation.py`; {about['date']}, commit {about['commit'][:12]}, {about['processor']}, "
        f"{record['threads']} threads, instruction set {about['isa']}, model {record['model']['name']}. "
        f"Int8 peak, the greatest of the rounds: {_int8_peak(record) / 1e9:.0f} Gop/s. "
        f"Load average {min(loads):.1f} to {max(loads):.1f}. A machine at "
        f"{record['dollars_per_hour']:g} $ per hour.",
        "",
        f"The same {len(prompts)} requests in every row, {arrivals}: a common beginning of "
        f"{record['system']} tokens, then {record['own'][0]} to {record['own'][1]} of their own, answers of "
        f"{record['answer'][0]} to {record['answer'][1]}; together {sum(prompts):,} tokens of prompts and "
        f"{sum(answers):,} generated. The cache has room for {cache:,} tokens in int16, which is "
        f"{record['reservations']} sequences of the greatest length, {record['max_model_len']}; int8 gets as "
        f"many bytes. Every row has what the row above has, except for what its name says; medians of "
        f"{len(record['limits'])} interleaved rounds, each in a process of its own.",
    ]


def _notes(record: Record, table: Sequence[Result]) -> list[str]:
    known = {result["name"]: result for result in table}
    lines = [
        "- The products' operations, prompts and what is computed twice included, are held against the int8 "
        "peak: a share says how busy the machine is, not how useful the work is.",
        "- The first token's time and the request's begin with the arrival: the queue is in them.",
    ]
    answers = record.get("answers", {})
    if "no-cache" in known:
        lines.append(
            f"- The traditional loop is measured on {record['sampled']} tokens a round, drawn from all "
            f"{sum(record['answer_tokens']):,}, each computed from the whole text before it. Between tokens: "
            "what one of them takes. requests/s follow from tokens/s. K and V are not kept."
        )
    if any(row["reserves"] for row in record["rows"]):
        lines.append(
            f"- Up to continuous batching a sequence holds a reservation of {record['max_model_len']} tokens."
        )
    if "static" in known:
        lines.append(
            "- In a static batch nothing is padded; a sequence that has ended leaves its place empty."
        )
    for name in ("paged", "prefix", "int8", "lookup"):
        if name in known and known[name]["preemptions"]:
            lines.append(
                f"- {known[name]['title'].removeprefix('+ ')}: {known[name]['preemptions']:.0f} sequences a "
                "round lost their blocks to earlier ones and were computed again."
            )
    if "prefix" in known:
        lines.append(f"- Of the prompts {known['prefix']['prefix_share']:.0%} were in the prefix cache.")
    if "lookup" in known:
        its = known["lookup"]
        lines.append(
            f"- Prompt lookup: {its['accepted_tokens']:.0f} of {its['draft_tokens']:.0f} guesses were right."
        )
    lines.append("- All answers are equal, token by token, among the rows with one type of cache.")
    if "int8" in answers:
        lines.append(
            f"- With int8 {answers['int8']['equal']} of {len(record['answer_tokens'])} are those of int16 to "
            "the last token."
        )
    return lines


# -- chart ---------------------------------------------------------------------------------------------------

WIDTH, LEFT, RIGHT, TOP, LINE = 860, 310, 130, 64, 30


def chart(record: Record, table: Sequence[Result]) -> str:
    """A bar per row, tokens per second in doublings, and the ratio to the row above."""
    about = record["machine"]
    rates = [result["tokens_per_second"] for result in table] or [1.0]
    low = math.floor(math.log2(min(rates))) - 1
    high = max(math.ceil(math.log2(max(rates))), low + 2)
    height = TOP + LINE * len(table) + 40

    def x(rate: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log2(rate) - low) / (high - low)

    parts = []
    for power in range(low, high + 1):
        parts.append(
            f'<path d="M{x(2.0**power):.1f} {TOP - 8}V{height - 30}" stroke="{svg.FAINT}"/>'
            f'<text x="{x(2.0**power):.1f}" y="{height - 14}" text-anchor="middle">{2.0**power:,g}</text>'
        )
    for index, result in enumerate(table):
        parts += _bar(result, TOP + LINE * index, x)
    below = f"tokens/s, in doublings; {about['processor']}, {record['threads']} threads, {about['isa']}; "
    below += f"{record['model']['name']}; commit {about['commit'][:8]}; line: least to most of the rounds"
    return svg.page(WIDTH, height, "What each optimization brings", below, parts)


def _bar(result: Result, y: int, x: Callable[[float], float]) -> list[str]:
    rate, ratio, middle = result["tokens_per_second"], result.get("ratio"), y + LINE / 2 - 3
    note = _number(rate) + (f"   × {ratio['median']:.2f}" if ratio else "")
    color = svg.GRAY if result["name"] == "no-cache" else svg.BLUE
    return [
        f'<text x="{LEFT - 8}" y="{middle + 4:.1f}" text-anchor="end">{escape(result["title"])}</text>',
        f'<rect x="{LEFT}" y="{y + 2}" width="{x(rate) - LEFT:.1f}" height="{LINE - 10}" fill="{color}"/>',
        f'<line x1="{x(result["least"]):.1f}" x2="{x(result["most"]):.1f}" y1="{middle}" y2="{middle}" '
        f'stroke="{svg.INK}" stroke-width="2"/>',
        f'<text x="{x(max(rate, result["most"])) + 6:.1f}" y="{middle + 4:.1f}">{note}</text>',
    ]
