"""From the records of a round to its figures. Everything is computed from the records alone.

| name | of one request |
|---|---|
| `ttft` | first text - sent |
| `ttft_scheduled` | first text - scheduled: what a user waits who comes at that time |
| `itl` | each gap between two pieces of text |
| `tpot` | (last text - first text) / (output tokens - 1) |
| `e2e`, `e2e_scheduled` | end - sent, end - scheduled |

A generator that waits for a slow server before it sends the next request measures few of the requests that a
stall would have delayed ("coordinated omission", G. Tene); counting from the scheduled time puts that back.

Latencies are those of requests that succeeded; of unfinished ones the times until they were cut off count as
far as they are known. Percentiles interpolate linearly between order statistics. Throughput is what was done
in the time from the start of the round until its last request had ended.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from fastllm.bench.arrivals import Spike
from fastllm.bench.record import FAILED, OK, UNFINISHED, RequestRecord

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
LATENCIES = ("ttft", "ttft_scheduled", "itl", "tpot", "e2e", "e2e_scheduled")
SLO_ITL_SHARE = 0.99  # of a request's gaps have to be within itl_ms

Records = Sequence[RequestRecord]


def spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Count, mean, percentiles and greatest, in milliseconds; None of nothing."""
    if not len(seconds):
        return None
    values = np.asarray(seconds, float) * 1e3
    found = {name: float(np.quantile(values, share)) for name, share in QUANTILES.items()}
    return {"count": len(values), "mean": float(values.mean()), **found, "max": float(values.max())}


def gaps(record: RequestRecord) -> list[float]:
    """Seconds between pieces of text that followed each other."""
    return [late - early for early, late in pairwise(record.tokens)]


def time_per_token(record: RequestRecord) -> float | None:
    """Seconds per output token after the first; None where there is no such token."""
    if len(record.tokens) < 2 or record.output_count < 2:
        return None
    return (record.tokens[-1] - record.tokens[0]) / (record.output_count - 1)


def latencies(records: Records) -> dict[str, list[float]]:
    """Every value of every latency, in seconds."""
    found: dict[str, list[float]] = {name: [] for name in LATENCIES}
    for record in records:
        if record.status == FAILED or record.sent is None:
            continue
        if record.first_token is not None:
            found["ttft"].append(record.first_token - record.sent)
            found["ttft_scheduled"].append(record.first_token - record.scheduled)
            found["itl"] += gaps(record)
        if record.status == OK and record.end is not None:
            found["e2e"].append(record.end - record.sent)
            found["e2e_scheduled"].append(record.end - record.scheduled)
            each = time_per_token(record)
            if each is not None:
                found["tpot"].append(each)
    return found


def meets(record: RequestRecord, slo: Mapping[str, float]) -> bool:
    """Whether a request succeeded within limits in milliseconds; waits count from its scheduled time.

    A limit on something that a request does not have (a gap, where there was one piece of text) is met.
    """
    if record.status != OK or record.end is None:
        return False
    found: dict[str, float | None] = {"e2e_ms": record.end - record.scheduled}
    found["ttft_ms"] = None if record.first_token is None else record.first_token - record.scheduled
    found["tpot_ms"] = time_per_token(record)
    between = sorted(gaps(record))
    found["itl_ms"] = between[math.ceil(SLO_ITL_SHARE * len(between)) - 1] if between else None
    return all((found[name] or 0.0) * 1e3 <= limit for name, limit in slo.items())


def summarize(
    records: Records, seconds: float, slo: Mapping[str, float], spikes: Sequence[Spike] = ()
) -> dict[str, Any]:
    """The figures of a round.

    Args:
        records: with times that count from its start.
        seconds: its length.
        slo: limits in milliseconds (see `meets`).
        spikes: before, during and after the first to the last of them is told apart.
    """
    done = [record for record in records if record.status == OK]
    counted = [record for record in records if record.status != FAILED]
    length = max(seconds, 1e-9)
    prompt = sum(record.prompt_tokens or 0 for record in done)
    output = sum(record.output_count for record in counted)
    pieces = sum(len(record.tokens) for record in done)
    found: dict[str, Any] = {
        "seconds": seconds,
        "requests": len(records),
        **{name: sum(record.status == name for record in records) for name in (OK, FAILED, UNFINISHED)},
        "errors": dict(Counter(record.error for record in records if record.error).most_common()),
        "error_details": _details(records),
        "requests_per_second": len(done) / length,
        "output_tokens": output,
        "output_tokens_per_second": output / length,
        "prompt_tokens": prompt,
        "prompt_tokens_per_second": prompt / length,
        "cached_tokens": sum(record.cached_tokens or 0 for record in done),
        "prompt_tokens_mean": prompt / len(done) if done else None,
        "output_tokens_mean": sum(record.output_count for record in done) / len(done) if done else None,
        "tokens_per_piece": sum(record.output_count for record in done) / pieces if pieces else None,
        "counted_by": sorted({record.counted_by for record in done if record.counted_by}),
        "without_text": sum(not record.tokens for record in done),
        "retried": sum(record.retried for record in records),
        "latency_ms": {name: spread(values) for name, values in latencies(records).items()},
        "send_lag_ms": spread([r.sent - r.scheduled for r in records if r.sent is not None]),
    }
    if slo:
        # What was cut off might have met them or not.
        ended = [record for record in records if record.status != UNFINISHED]
        good = sum(meets(record, slo) for record in ended)
        share = good / len(ended) if ended else None
        found["goodput"] = {"slo": dict(slo), "requests_per_second": good / length, "share": share}
    if spikes:
        found["phases"] = phases(records, spikes)
    return found


def _details(records: Records) -> dict[str, str]:
    """Of each kind of error what the first said."""
    found: dict[str, str] = {}
    for record in records:
        if record.error and record.detail:
            found.setdefault(record.error, record.detail)
    return found


def phases(records: Records, spikes: Sequence[Spike]) -> list[dict[str, Any]]:
    """Latencies before the spikes, from the first to the last of them, and after.

    A wait belongs to the time at which its request was due, a gap to that at which it ended.
    """
    edges = [0.0, min(s.at for s in spikes), max(s.end for s in spikes), math.inf]
    found = []
    for name, low, high in zip(("before", "spike", "after"), edges[:-1], edges[1:], strict=True):
        due = [record for record in records if low <= record.scheduled < high]
        waits = [r.tokens[0] - r.scheduled for r in due if r.tokens and r.status != FAILED]
        between = [
            late - early
            for record in records
            if record.status != FAILED
            for early, late in pairwise(record.tokens)
            if low <= late < high
        ]
        found.append(
            {
                "phase": name,
                "requests": len(due),
                "failed": sum(record.status == FAILED for record in due),
                "latency_ms": {"ttft_scheduled": spread(waits), "itl": spread(between)},
            }
        )
    return found


def series(records: Records, seconds: float) -> list[dict[str, Any]]:
    """What happened in each second of the round.

    `due`, `sent`, `done`, `failed` and `pieces` (of text) are counts of that second, `under_way` the requests
    sent and not ended at its end; `ttft_ms` is of the requests due in it (from then on), `itl_ms` of the gaps
    that ended in it.
    """
    count = max(1, math.ceil(seconds))
    rows: list[dict[str, Any]] = [
        {"second": number, "due": 0, "sent": 0, "done": 0, "failed": 0, "under_way": 0, "pieces": 0}
        for number in range(count)
    ]
    waits: list[list[float]] = [[] for _ in rows]
    between: list[list[float]] = [[] for _ in rows]

    def place(time: float) -> int:
        return min(max(int(time), 0), count - 1)

    changes = np.zeros(count, int)
    for record in records:
        rows[place(record.scheduled)]["due"] += 1
        if record.sent is not None:
            rows[place(record.sent)]["sent"] += 1
            changes[place(record.sent)] += 1
            if record.end is not None and record.status != UNFINISHED:
                changes[place(record.end)] -= 1
        if record.status != UNFINISHED and record.end is not None:
            rows[place(record.end)]["done" if record.status == OK else "failed"] += 1
        for early, late in zip([None, *record.tokens], record.tokens, strict=False):
            rows[place(late)]["pieces"] += 1
            if early is None:
                waits[place(record.scheduled)].append(late - record.scheduled)
            else:
                between[place(late)].append(late - early)
    for row, under_way, wait, gap in zip(rows, np.cumsum(changes).tolist(), waits, between, strict=True):
        row["under_way"] = under_way
        for name, values in (("ttft_ms", wait), ("itl_ms", gap)):
            found = spread(values)
            row[name] = None if found is None else {key: found[key] for key in ("p50", "p99", "max")}
    return rows
