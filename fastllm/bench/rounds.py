"""Record files of `serve`: written, read again, and added to.

    {"format": "fastllm.bench.serve", "version": 1, "settings": ..., "rounds": [round, ...]}

A round has when it began, its seed, the machine and the command, what the server said of itself, the requests
with all their times, and the figures made from them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastllm.bench.about import about
from fastllm.bench.load import Round
from fastllm.bench.options import ServeOptions
from fastllm.bench.probe import Server
from fastllm.bench.record import RequestRecord
from fastllm.bench.summary import series, spread, summarize
from fastllm.errors import RequestError

FORMAT, VERSION = "fastllm.bench.serve", 1
LAG_MS_MOST, CORE_MOST = 10.0, 0.5  # beyond these the generator itself may have made answers late

Record = dict[str, Any]


def new_record(options: ServeOptions) -> Record:
    """A record without a round."""
    return {"format": FORMAT, "version": VERSION, "settings": options.to_json(), "rounds": []}


def make_round(
    found: Round, options: ServeOptions, server: Server, seed: int, arguments: Sequence[str]
) -> dict[str, Any]:
    """A round as it stands in a record."""
    requests = [record.to_json(found.start) for record in found.requests]
    records = [RequestRecord.from_json(request) for request in requests]
    chunks = sum(record.chunks for record in records)
    length = max(found.seconds, 1e-9)
    made: dict[str, Any] = {
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(found.wall_start)),
        "began_unix": found.wall_start,
        "seed": seed,
        "stopped": found.stopped,
        "about": about(arguments),
        "server": {"model": server.model, **server.about, "left_out": sorted(server.left_out)},
        "summary": summarize(records, found.seconds, options.slo, options.spikes),
        "generator": {
            "cpu_seconds": found.cpu_seconds,
            "core": found.cpu_seconds / length,
            "cpu_us_per_chunk": found.cpu_seconds / chunks * 1e6 if chunks and options.stream else None,
            "timer_lag_ms": spread(found.lags),
        },
        "series": series(records, found.seconds),
        "requests": requests,
    }
    made["notes"] = [*server.notes, *notes(made, options)]
    return made


def notes(made: dict[str, Any], options: ServeOptions) -> list[str]:
    """What a reader should know before trusting a round's figures."""
    summary, generator = made["summary"], made["generator"]
    found = []
    if made["stopped"]:
        found.append("Stopped before its end.")
    if summary["failed"]:
        found.append(f"{summary['failed']} of {summary['requests']} requests failed.")
    if "chunks" in summary["counted_by"]:
        found.append("The server reports no `usage`: output tokens are pieces of text, of one token or more.")
    elif (summary["tokens_per_piece"] or 1.0) > 1.05:
        each = summary["tokens_per_piece"]
        found.append(f"A piece of text held {each:.2f} tokens on average; ITL is between pieces.")
    if not options.stream:
        found.append("Not streamed: there is no time to a first token, and none between tokens.")
    elif summary["without_text"]:
        found.append(f"{summary['without_text']} answers had no text.")
    wanted = [r["wanted_output_tokens"] for r in made["requests"] if "wanted_output_tokens" in r]
    got = summary["output_tokens_mean"]
    if options.ignore_eos and wanted and got and summary["counted_by"] == ["usage"]:
        short = sum(
            r.get("output_tokens", 0) < r["wanted_output_tokens"]
            for r in made["requests"]
            if r["status"] == "ok" and "wanted_output_tokens" in r
        )
        if short:
            found.append(f"{short} answers ended before the length that was asked for.")
    if summary["retried"]:
        found.append(
            f"{summary['retried']} requests were sent again: the server had closed their connection."
        )
    lag = generator["timer_lag_ms"]
    if (lag and lag["p99"] > LAG_MS_MOST) or generator["core"] > CORE_MOST:
        late = f"{lag['p99']:.1f} ms at p99" if lag else "unknown"
        found.append(
            f"The generator itself was late ({late}) or busy ({generator['core']:.0%} of a core): "
            "latencies include that."
        )
    return found


def read_record(path: Path) -> Record:
    """A record file.

    Raises:
        RequestError: it cannot be read, or is none.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise RequestError("record", str(path), f"a file that can be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise RequestError("record", str(path), f"JSON ({error})") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("version") != VERSION:
        raise RequestError("record", str(path), f"a record of serve, version {VERSION}")
    if not isinstance(found.get("rounds"), list) or not isinstance(found.get("settings"), dict):
        raise RequestError("record", str(path), "a record with settings and rounds")
    return found


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_record(path: Path, record: Record) -> None:
    """Write a record, requests one a line."""
    head = {**record, "rounds": []}
    rounds = []
    for each in record["rounds"]:
        lines = ",\n  ".join(json.dumps(request, separators=(",", ":")) for request in each["requests"])
        rest = json.dumps({name: value for name, value in each.items() if name != "requests"})
        rounds.append(f'{rest[:-1]}, "requests": [\n  {lines}]}}')
    text = json.dumps(head)
    assert text.endswith('"rounds": []}')
    write_text(path, text.removesuffix("]}") + ",\n ".join(rounds) + "]}\n")
