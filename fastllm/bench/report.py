"""A record of `serve` for people: one table, as Markdown or in columns.

With several rounds a figure is the median over them, with the least and the greatest.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from fastllm.bench.summary import QUANTILES

Record = dict[str, Any]
Table = list[list[str]]

_TITLES = {
    "ttft": "time to first token",
    "ttft_scheduled": "the same, from the scheduled time",
    "itl": "inter-token latency",
    "tpot": "time per output token",
    "e2e": "whole request",
    "e2e_scheduled": "the same, from the scheduled time",
}
_COLUMNS = (*QUANTILES, "max")


def latency_table(record: Record) -> Table:
    """Latencies in milliseconds; those from the scheduled time only of an open loop, where they differ."""
    rows = [["ms", "count", "mean", *_COLUMNS]]
    summaries = [each["summary"] for each in record["rounds"]]
    for name, title in _TITLES.items():
        if name.endswith("_scheduled") and record["settings"]["rate"] is None:
            continue
        found = [s["latency_ms"][name] for s in summaries if s["latency_ms"][name] is not None]
        if found:
            cells = [_over([each[column] for each in found], "{:,.1f}") for column in ("mean", *_COLUMNS)]
            rows.append([title, f"{sum(each['count'] for each in found):,}", *cells])
    return rows


def figure_table(record: Record) -> Table:
    """Everything else: counts, throughput, goodput, errors, and what the generator took."""
    rounds = record["rounds"]
    summaries = [each["summary"] for each in rounds]

    def total(name: str) -> str:
        return f"{sum(each[name] for each in summaries):,}"

    def usual(name: str, shape: str = "{:,.2f}") -> str:
        return _over([each[name] for each in summaries if each[name] is not None], shape)

    rows = [["", ""]]
    ends = f"{total('ok')} done, {total('failed')} failed, {total('unfinished')} unfinished"
    rows.append(["requests", f"{total('requests')}: {ends}"])
    rows.append(["seconds", usual("seconds")])
    rows.append(["requests per second", usual("requests_per_second")])
    by = sorted({name for each in summaries for name in each["counted_by"]})
    rows.append(
        [
            "output tokens per second",
            usual("output_tokens_per_second") + (" (by chunks)" if "chunks" in by else ""),
        ]
    )
    rows.append(["prompt tokens per second", usual("prompt_tokens_per_second")])
    rows.append(
        ["prompt, output tokens per request", _both(usual, "prompt_tokens_mean", "output_tokens_mean")]
    )
    prompt, cached = (sum(each[name] for each in summaries) for name in ("prompt_tokens", "cached_tokens"))
    if cached and prompt:
        rows.append(["prompt tokens from the server's cache", f"{cached / prompt:.1%}"])
    if "goodput" in summaries[0]:
        slo = ", ".join(f"{name}={limit:g}" for name, limit in summaries[0]["goodput"]["slo"].items())
        good = _over([each["goodput"]["requests_per_second"] for each in summaries], "{:,.2f}")
        shares = [each["goodput"]["share"] for each in summaries if each["goodput"]["share"] is not None]
        rows.append([f"goodput ({slo})", f"{good} requests per second, {_over(shares, '{:.1%}')} of all"])
    errors: dict[str, int] = {}
    details: dict[str, str] = {}
    for each in summaries:
        details = {**each["error_details"], **details}
        for name, count in each["errors"].items():
            errors[name] = errors.get(name, 0) + count
    for name, count in errors.items():
        said = f" ({printable(details[name])[:80]})" if name in details else ""
        rows.append([f"error: {name}", f"{count:,}{said}"])
    generator = [each["generator"] for each in rounds]
    cost = [each["cpu_us_per_chunk"] for each in generator if each["cpu_us_per_chunk"] is not None]
    lag = [each["timer_lag_ms"]["p99"] for each in generator if each["timer_lag_ms"]]
    own = [f"{_over([each['core'] for each in generator], '{:.0%}')} of a core"]
    own += [f"{_over(cost, '{:,.0f}')} us per chunk"] if cost else []
    own += [f"timers late by {_over(lag, '{:.1f}')} ms at p99"] if lag else []
    rows.append(["the generator itself", ", ".join(own)])
    return rows


def phase_table(record: Record) -> Table:
    """Before, during and after spikes, if there were any; of the last round."""
    found = record["rounds"][-1]["summary"].get("phases", [])
    rows = [["last round", "requests", "failed", "TTFT p50", "p99", "ITL p50", "p99", "max"]] if found else []
    for each in found:
        ttft, itl = (each["latency_ms"][name] or {} for name in ("ttft_scheduled", "itl"))
        cells = [ttft.get("p50"), ttft.get("p99"), itl.get("p50"), itl.get("p99"), itl.get("max")]
        shown = ["" if cell is None else f"{cell:,.1f}" for cell in cells]
        rows.append([each["phase"], str(each["requests"]), str(each["failed"]), *shown])
    return rows


def remarks(record: Record) -> list[str]:
    """The notes of all rounds, each once."""
    several = len(record["rounds"]) > 1
    found: dict[str, None] = {}
    for number, each in enumerate(record["rounds"], 1):
        for note in each["notes"]:
            found[f"Round {number}: {note}" if several else note] = None
    return list(found)


def markdown(record: Record) -> str:
    """The whole report."""
    last, settings = record["rounds"][-1], record["settings"]
    facts, server = last["about"], last["server"]
    lines = [
        "# Load on a server",
        "",
        f"{last['began']}, `{facts['command']}`",
        "",
        f"Server: {settings['base_url']}, {settings['endpoint']}, model {_plain(server['model'])}"
        + "".join(f", {name} {_plain(server[name])}" for name in ("server", "version") if name in server)
        + f". Generator: fastllm {facts['versions']['fastllm']}, aiohttp {facts['versions']['aiohttp']}, "
        f"{_plain(facts['processor'])} ({facts['processors']} processors, load average "
        f"{facts['load_average']:.1f}).",
        "",
        f"Load: {describe_load(settings)}. Rounds: {len(record['rounds'])}"
        + ("; median over them (least to greatest)." if len(record["rounds"]) > 1 else "."),
    ]
    for table in (latency_table(record), figure_table(record), phase_table(record)):
        if len(table) > 1:
            lines += ["", *_markdown_table(table)]
    if notes := remarks(record):
        lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join([*lines, ""])


def terminal(record: Record) -> str:
    """The same in columns, without what the command line just said."""
    parts = []
    for table in (latency_table(record), figure_table(record), phase_table(record)):
        if len(table) > 1:
            parts.append("\n".join(columns([row for row in table if any(row)])))
    if notes := remarks(record):
        parts.append("\n".join(f"note: {note}" for note in notes))
    return "\n\n".join(parts)


def describe_load(settings: dict[str, Any]) -> str:
    """Arrivals, prompts and answers, in words."""
    if settings["rate"] is None:
        how = f"{settings['concurrency']} clients, each sending its next request when the last is done"
    else:
        how = f"{settings['arrivals']} arrivals, {settings['rate']:g} a second"
        if settings["arrivals"] == "gamma":
            how += f", burstiness {settings['burstiness']:g}"
        if settings["concurrency"]:
            how += f", at most {settings['concurrency']} under way"
    for spike in settings["spikes"]:
        how += f"; {spike['factor']:g} times as many for {spike['seconds']:g} s after {spike['at']:g} s"
    what = f"prompts of {settings['prompt_tokens']} tokens"
    if settings["dataset"] is not None:
        what = f"prompts of {_plain(settings['dataset'])}"
    elif settings["prefix_groups"]:
        what += f" after one of {settings['prefix_groups']} prefixes of {settings['prefix_tokens']}"
    if settings["output_tokens"] is not None:
        what += f", answers of {settings['output_tokens']}" + ("" if settings["ignore_eos"] else " at most")
    return f"{how}; {what}; {'streamed' if settings['stream'] else 'not streamed'}"


def _both(usual: Any, first: str, second: str) -> str:
    return f"{usual(first, '{:,.1f}') or '?'}, {usual(second, '{:,.1f}') or '?'}"


def _over(values: Sequence[float], shape: str) -> str:
    """Of several rounds: the median, the least and the greatest."""
    if not values:
        return ""
    middle = shape.format(median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({shape.format(min(values))} to {shape.format(max(values))})"


def printable(text: str) -> str:
    """A server's words without control characters, which neither a terminal nor XML would bear."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _plain(text: str) -> str:
    """The same, unable to be markup."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in printable(text))


def _markdown_table(table: Table) -> list[str]:
    head, *rows = table
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    escaped = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows]
    return lines + ["| " + " | ".join(row) + " |" for row in escaped]


def columns(table: Table) -> list[str]:
    """Lines of text with the first column on the left and the others on the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells if len(row) > 2 else [cells[0], row[1]]).rstrip())
    return lines
