"""From a record's raw measurements to its results: medians, ratios with intervals, bars, limits, validity.

Everything here is computed from the record alone, so that a record that grew in several runs, or was made
elsewhere, gives its table again at any time.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import roofline
import rows
from rows import Row

from fastllm.bench.intervals import median_interval

Record = dict[str, Any]
Round = tuple[int, int]
"""Part and number."""

FASTLLM = "fastllm"
REFERENCE = "fastllm, Q4_0"  # what other file types are compared with


def _interval(values: Sequence[float]) -> dict[str, Any]:
    low, high, level = median_interval(values)
    return {"median": median(values), "low": low, "high": high, "level": level, "pairs": len(values)}


# -- a program's figures -------------------------------------------------------------------------------------


def figures(record: Record, model: str, row: Row) -> dict[str, dict[Round, dict[str, Any]]]:
    """Program -> round -> its measurement, with the setting that was best in that part.

    Settings are tried in a part's first rounds and only the best goes on; so that is the one with the
    most rounds, and if they are equal the one with the better median.
    """
    groups: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for item in record["measurements"]:
        if (item["model"], item["row"]) == (model, row.name):
            groups[item["program"], item["part"]][json.dumps(item["setting"], sort_keys=True)].append(item)
    found: dict[str, dict[Round, dict[str, Any]]] = defaultdict(dict)
    sign = -1 if row.lower_is_better else 1
    for (program, part), settings in groups.items():
        best = max(settings.values(), key=lambda items: (len(items), sign * _median_value(items)))
        for item in best:
            found[program][part, item["round"]] = item
    return dict(found)


def _median_value(items: Sequence[dict[str, Any]]) -> float:
    return float(median(item["value"] for item in items))


def ratios(row: Row, ours: dict[Round, dict[str, Any]], theirs: dict[Round, dict[str, Any]]) -> list[float]:
    """How many times better ours is, in every round that both were measured in."""
    both = [(ours[key]["value"], theirs[key]["value"]) for key in sorted(ours.keys() & theirs.keys())]
    return [their / our if row.lower_is_better else our / their for our, their in both]


# -- one row -------------------------------------------------------------------------------------------------


def result(record: Record, model: str, row: Row) -> dict[str, Any]:
    """One row of the table."""
    found = figures(record, model, row)
    limits = _limits(record, model, row)
    shown = {name: median(item[name] for item in limits.values()) for name in rows.ANCHOR_LIMITS}
    work = roofline.from_record(record["models"][model]["work"])
    peers = [name for name in found if name != FASTLLM]
    better = min if row.lower_is_better else max
    out: dict[str, Any] = {
        "model": model,
        "row": row.name,
        "unit": row.unit,
        "limits": shown,
        "programs": {},
    }
    limit, binding = None, None
    if not row.lower_is_better:
        limit, binding = roofline.limit(row, work, shown, record["kv_cache_dtype"])
        out["limit"] = {"tokens_per_second": limit, "by": binding}
    for name, rounds in found.items():
        values = [item["value"] for item in rounds.values()]
        entry: dict[str, Any] = {"median": median(values), "rounds": len(values)}
        entry["settings"] = list({json.dumps(i["setting"]): i["setting"] for i in rounds.values()}.values())
        if limit:
            entry["of_limit"] = entry["median"] / limit
            entry["dollars_per_million_tokens"] = record["dollars_per_hour"] / 3600 / entry["median"] * 1e6
        out["programs"][name] = entry
    if peers:
        out["best_peer"] = better(peers, key=lambda name: out["programs"][name]["median"])
    if FASTLLM in found and peers:
        pairs = ratios(row, found[FASTLLM], found[out["best_peer"]])
        if pairs:
            out["ratio"] = _interval(pairs)
    # The anchors are those of native builds.
    out["anchors"] = [] if record["isa"] else list(_anchors(model, row, work, out))
    out["checks"] = list(_checks(record, model, row, found, out))
    return out


def _limits(record: Record, model: str, row: Row) -> dict[Round, dict[str, float]]:
    """The machine's limits in every round of this row: its pace changes, and figures are held against what
    it could do at that time."""
    found: dict[Round, dict[str, float]] = {}
    for item in record["limits"]:
        if (item["model"], item["row"]) != (model, row.name):
            continue
        part = item["part"]
        # An older record has them once, measured before the row's first round.
        rounds = [item["round"]] if "round" in item else range(record["parts"][part]["pairs"])
        for number in rounds:
            found[part, number] = {name: item[name] for name in rows.ANCHOR_LIMITS}
    return found


def _checks(
    record: Record, model: str, row: Row, found: dict[str, dict[Round, dict[str, Any]]], out: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """What the row has to reach; `value` is the unfavourable end of the interval, `met` compares it."""
    ours = found.get(FASTLLM)
    if not ours:
        return
    if row.kind in ("load", "memory"):
        yield from _start_checks(model, row, [item["more"] for item in ours.values()])
    if REFERENCE in found:
        yield from _format_checks(record, model, row, ratios(row, ours, found[REFERENCE]))
        return
    bar = rows.BARS.get((rows.family(model), row.name)) if model.endswith("-q4_0") else None
    if record["isa"] == "avx2":
        bar = rows.AHEAD
    if bar is None or row.lower_is_better:
        return
    if "read" in bar.against:
        work = roofline.from_record(record["models"][model]["work"])
        limits = _limits(record, model, row)
        most = {key: roofline.limit(row, work, limits[key], record["kv_cache_dtype"])[0] for key in ours}
        reached = _interval([item["value"] / most[key] for key, item in ours.items()])
        yield _at_least(f"of the {out['limit']['by']} limit", reached, bar.least, bar.goal)
        return
    there = [name for name in bar.against if name in found]
    if there:
        name = max(there, key=lambda name: out["programs"][name]["median"])
        reached = _interval(ratios(row, ours, found[name]) or [float("nan")])
        missing = [name for name in bar.against if name not in found]
        check = _at_least(f"× {name}", reached, bar.least, bar.goal)
        credited = _credited(row, {name: found[name] for name in there}, ours, out["anchors"])
        if credited:
            check["credited"] = {**credited, "met": credited["value"] >= bar.least}
        yield {**check, "not_measured": missing} if missing else check


def _credited(
    row: Row,
    theirs: dict[str, dict[Round, dict[str, Any]]],
    ours: dict[Round, dict[str, Any]],
    anchors: Sequence[dict[str, Any]],
) -> dict[str, Any] | None:
    """The ratio that remains when a peer below its anchor is given what it lacks; the least of them."""
    lacking = {item["peer"]: rows.ANCHOR_SHARE / item["share"] for item in anchors if not item["valid"]}
    left = {
        name: _interval(ratios(row, ours, theirs[name]) or [float("nan")])["low"] / lacking[name]
        for name in theirs
        if name in lacking
    }
    if not left:
        return None
    least = min(left, key=left.__getitem__)
    return {"peer": least, "factor": lacking[least], "value": left[least]}


def _at_least(what: str, reached: dict[str, Any], least: float, goal: float) -> dict[str, Any]:
    return {
        "what": what,
        "value": reached["low"],
        "median": reached["median"],
        "pairs": reached["pairs"],
        "bar": least,
        "goal": goal,
        "met": reached["low"] >= least,
    }


def _at_most(what: str, values: Sequence[float], most: float) -> dict[str, Any]:
    reached = _interval(values)
    shown = {"what": what, "value": reached["high"], "median": reached["median"], "pairs": len(values)}
    return {**shown, "bar": most, "at_most": True, "met": reached["high"] <= most}


def _start_checks(model: str, row: Row, runs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    about = [run["about"] for run in runs]
    if row.kind == "load":
        most = rows.LOAD_SECONDS_MOST.get(rows.family(model))
        if most:
            yield _at_most("s from LLM() to a token", [run["load_to_first_seconds"] for run in runs], most)
        yield _at_most("s to import", [item["import_seconds"] for item in about], rows.IMPORT_SECONDS_MOST)
    else:
        shares = [
            (run["peak_bytes"] - item["import_peak_bytes"]) / (item["weight_bytes"] + item["kv_cache_bytes"])
            for run, item in zip(runs, about, strict=True)
        ]
        yield _at_most("× (weights + KV)", shares, rows.MEMORY_MOST)


def _format_checks(record: Record, model: str, row: Row, values: Sequence[float]) -> Iterator[dict[str, Any]]:
    if not values:
        return
    least, what = rows.FORMAT_LEAST, "× Q4_0"
    if row.kind == "decode":  # what it reads per token may grow, and the time with it
        here, there = (_bytes(record, name) for name in (model, "1b-q4_0"))
        values = [value * here / there for value in values]
        what = "× Q4_0 per byte"
    yield _at_least(what, _interval(values), least, 0.95)


def _bytes(record: Record, model: str) -> float:
    work = record["models"][model]["work"]
    return float(work["layer_bytes"] + work["head_bytes"])


def _anchors(model: str, row: Row, work: roofline.Work, out: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Whether the peers were what they can be: their share of the limit now by that of the anchor."""
    for name, tokens in rows.ANCHORS.get((model, row.name), {}).items():
        if name in out["programs"]:
            then = tokens / roofline.limit(row, work, rows.ANCHOR_LIMITS)[0]
            share = out["programs"][name]["of_limit"] / then
            yield {"peer": name, "share": share, "valid": share >= rows.ANCHOR_SHARE}


def results(record: Record) -> list[dict[str, Any]]:
    """All rows, in the order in which they were first measured."""
    seen = dict.fromkeys((item["model"], item["row"]) for item in record["measurements"])
    return [result(record, model, rows.parse(name)) for model, name in seen]
