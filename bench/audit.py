"""What the audit log costs a request: the time that `record` takes where it is called.

    python bench/audit.py [--records 20000] [--output OUT]

Records with a prompt of 2,000 characters and an answer of 500, one each half millisecond and one straight
after the other; with and without a key; an fsync each second and for each line. Microseconds of making the
record and handing it over (p50, p99, p99.9, the longest; processor time besides), and lines a second that the
log's own thread writes. All of it in OUT.json, a table in OUT.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

from fastllm.serve.audit import AuditLog, AuditRecord
from fastllm.serve.audit_verify import verify

KEY = bytes(range(32))


def measure(path: Path, key: bytes | None, fsync: str | float, pause: float, count: int) -> dict[str, Any]:
    prompt, answer = "p" * 2000, "a" * 500
    times, cpu = [], []
    with AuditLog(path, key=key, fsync=fsync) as log:
        begin = time.perf_counter()
        for number in range(count):
            start, used = time.perf_counter(), time.thread_time()
            log.record(
                AuditRecord(
                    request_id=f"chatcmpl-{number}",
                    route="/v1/chat/completions",
                    who="key-1",
                    client="192.0.2.7",
                    model="model",
                    prompt_tokens=500,
                    cached_tokens=100,
                    generated_tokens=120,
                    finish_reasons=("stop",),
                    status=200,
                    duration_s=0.5,
                    prompt=prompt,
                    answers=(answer,),
                )
            )
            cpu.append(time.thread_time() - used)
            times.append(time.perf_counter() - start)
            if pause:
                time.sleep(pause)
        log.flush()
        seconds = time.perf_counter() - begin
    report = verify(path, key)
    assert report.ok
    assert report.requests == count
    times.sort()
    cpu.sort()
    picked = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
    return {
        **{name: 1e6 * times[int(share * count)] for name, share in picked.items()},
        "longest": 1e6 * times[-1],
        "cpu_p50": 1e6 * cpu[count // 2],
        "cpu_p99": 1e6 * cpu[int(0.99 * count)],
        "lines_per_s": count / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--output", type=Path, default=Path("build/bench/audit"))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for key in (None, KEY):
            for fsync in (1.0, "line"):
                for pause in (0.0005, 0.0):
                    count = options.records if not pause else min(options.records, 4000)
                    path = Path(folder, f"{len(rows)}.jsonl")
                    facts = {"key": key is not None, "fsync": fsync, "pause_s": pause, "records": count}
                    rows.append({**facts, **measure(path, key, fsync, pause, count)})
    record = {**machine.describe(), "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    table = report(record)
    options.output.with_suffix(".md").write_text(table)
    print(table)


def report(record: dict[str, Any]) -> str:
    """The record as a page."""
    names = ("p50", "p99", "p99.9", "longest", "cpu_p50", "cpu_p99")
    lines = [
        "# The audit log",
        "",
        f"`{record['command']}` at {record['commit'][:12]} on {record['processor']}, "
        f"{record['processors']} processors, {record['date']}; load average {record['load_average']:.1f}. "
        "Microseconds that a request spends on its record, by the clock (which counts what other "
        "programs take from it) and of processor time. Where one comes straight after the other, they "
        "share the interpreter with the log's own thread all the time, which is where the long ones come "
        "from.",
        "",
        "| key | fsync | records come | p50 | p99 | p99.9 | longest | processor p50 | p99 | lines/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        come = f"each {row['pause_s'] * 1e3:g} ms" if row["pause_s"] else "at once"
        fsync = "each line" if row["fsync"] == "line" else f"within {row['fsync']:g} s"
        times = " | ".join(f"{row[name]:.1f}" for name in names)
        key = "yes" if row["key"] else "no"
        lines.append(f"| {key} | {fsync} | {come} | {times} | {row['lines_per_s']:,.0f} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
