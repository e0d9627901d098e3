"""SIGKILL at any moment leaves an audit log that verifies, and that the next start goes on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastllm.errors import AuditError
from fastllm.serve.audit import AuditLog, AuditRecord
from fastllm.serve.audit_files import rotated_files
from fastllm.serve.audit_verify import verify

KEY = bytes(range(32))

WRITER = """
import sys
from fastllm.serve.audit import AuditLog, AuditRecord
log = AuditLog(sys.argv[1], key=bytes(range(32)), fsync="line", max_file_bytes=20_000)
print("ready", flush=True)
number = 0
while True:
    answers = ["a"] * (number % 50)
    log.record(AuditRecord(request_id=str(number), route="/", prompt="p" * 300, answers=answers))
    number += 1
    if number % 7 == 0:
        log.flush()
        print(number, flush=True)  # so many are on the disk
"""


def start(path: Path, code: str = WRITER) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_killed_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    acknowledged = 0
    for attempt in range(5):
        process = start(path)
        if attempt == 0:
            with pytest.raises(AuditError, match="another audit log"):
                AuditLog(path, key=KEY)
        time.sleep(0.03 + 0.037 * attempt)
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[0].split()
        acknowledged += int(said[-1]) if said else 0
        report = verify(path, KEY)
        assert report.ok, report.problems
        assert report.requests >= acknowledged
        assert not report.closed
        acknowledged = report.requests
    with AuditLog(path, key=KEY) as log:
        log.record(AuditRecord(request_id="last", route="/"))
    report = verify(path, KEY)
    assert (report.ok, report.closed, report.requests) == (True, True, acknowledged + 1)
    assert rotated_files(path)


def test_a_process_that_ends_closes_its_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    code = WRITER.partition("while True")[0] + "log.record(AuditRecord(request_id='1', route='/'))"
    process = start(path, code)
    process.communicate()
    assert process.returncode == 0
    report = verify(path, KEY)
    assert (report.ok, report.requests, report.closed) == (True, 1, True)


def test_a_forked_process_does_not_write_and_does_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    code = WRITER.partition("while True")[0] + (
        "import os, time, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try:\n"
        "        log.reserve()\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, flush=True)\n"
        "    time.sleep(30)\n"
        "    os._exit(0)\n"
        "time.sleep(0.3)\n"
        "log.close()\n"
        "print(child, flush=True)\n"
    )
    process = start(path, code)
    assert process.stdout is not None
    assert process.stdout.readline() == "AuditError\n"
    child = int(process.stdout.readline())
    try:
        with AuditLog(path, key=KEY) as log:
            log.record(AuditRecord(request_id="1", route="/"))
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()
    assert [json.loads(line)["kind"] for line in path.read_bytes().splitlines()] == [
        "begin", "open", "close", "open", "request", "close"
    ]  # fmt: skip
