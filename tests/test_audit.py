"""The audit log: what a line says, that any edit is found, rotation, failing disks, full queues."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm.cli import run
from fastllm.errors import AuditError, RequestError
from fastllm.formats.keys import key_id
from fastllm.serve import audit_files
from fastllm.serve.audit import AuditLog, AuditRecord
from fastllm.serve.audit_chain import Hasher
from fastllm.serve.audit_files import rotated_files
from fastllm.serve.audit_verify import verify

KEY = bytes(range(32))
OTHER = bytes(range(1, 33))


def record(number: int = 0, **fields: Any) -> AuditRecord:
    named: dict[str, Any] = {"request_id": f"r{number}", "route": "/v1/completions", "prompt": f"p{number}"}
    return AuditRecord(**{**named, **fields})


def lines(path: Path) -> list[dict[str, Any]]:
    files = [*rotated_files(path).values(), *([path] if path.exists() else [])]
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]


def written(path: Path, count: int, key: bytes | None = None, **options: Any) -> None:
    with AuditLog(path, key=key, **options) as log:
        for number in range(count):
            log.record(record(number))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


# ---- what a line says --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, KEY])
def test_a_line_says_everything_but_the_texts(key: bytes | None, path: Path) -> None:
    with AuditLog(path, key=key) as log:
        log.record(
            AuditRecord(
                request_id="r\n1",
                route="/v1/chat/completions",
                who="key-7",
                client="10.0.0.1:5",
                model="smol",
                prompt_tokens=5,
                cached_tokens=4,
                generated_tokens=3,
                finish_reasons=("stop", None),
                status=200,
                error=None,
                duration_s=1.23456,
                prompt="a secret \ud800",
                answers=("one", b"two"),
                extra={"tenant": "x", "n": 2},
            )
        )
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert b"secret" not in path.read_bytes()
    begin, opened, line, closed = lines(path)
    assert [begin["kind"], opened["kind"], line["kind"], closed["kind"]] == [
        "begin",
        "open",
        "request",
        "close",
    ]
    assert [entry["seq"] for entry in (begin, opened, line, closed)] == [0, 1, 2, 3]
    kind = "sha256" if key is None else "hmac_sha256"
    text = Hasher(key).text
    expected = {
        "kind": "request", "id": "r\n1", "who": "key-7", "client": "10.0.0.1:5",
        "route": "/v1/chat/completions", "model": "smol",
        "prompt_tokens": 5, "cached_tokens": 4, "generated_tokens": 3, "finish_reasons": ["stop", None],
        "status": 200, "error": None, "duration_ms": 1234.56,
        f"prompt_{kind}": text("a secret \ud800"), f"answers_{kind}": [text("one"), text("two")],
        "extra": {"tenant": "x", "n": 2},
    }  # fmt: skip
    assert {name: line[name] for name in expected} == expected
    assert line.keys() - expected.keys() == {"seq", "time", "prev", "hash"}
    written_at = datetime.fromisoformat(line["time"].removesuffix("Z") + "+00:00")
    assert abs(time.time() - written_at.timestamp()) < 60
    if key is None:
        assert text("one") == hashlib.sha256(b"one").hexdigest()


def test_the_chain_by_its_description(path: Path) -> None:
    written(path, 3)
    before = "0" * 64
    for raw in path.read_bytes().splitlines():
        body, _, said = raw.rpartition(b',"hash":"')
        line = json.loads(raw)
        assert line["prev"] == before
        before = hashlib.sha256(body + b"}").hexdigest()
        assert said == before.encode() + b'"}'


def test_whatever_a_record_holds_there_is_a_line(path: Path) -> None:
    strange: Any = object()
    odd = [
        record(0, who="x" * 5000, prompt_tokens=2**70, duration_s=float("nan"), status=strange),
        record(1, answers=None),
        record(2, finish_reasons=5),
        record(3, duration_s=float("inf"), extra={"a": float("nan"), "b": strange}),
        record(4, prompt=7),
    ]
    with AuditLog(path) as log:
        for item in odd:
            try:
                log.record(item)
            except TypeError:  # where the mistake is the caller's
                continue
        log.flush()
        assert log.pending == 0
    assert verify(path).ok
    found = [line for line in lines(path) if line["kind"] == "request"]
    assert len(found[0]["who"]) == 1025
    assert [line["id"] for line in found] == ["r0", "r2", "r3"]
    assert "malformed" in found[1]


# ---- any edit is found -------------------------------------------------------------------------------------


@st.composite
def edits(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with lines removed, moved, repeated or inserted, or a byte changed, inserted or removed:
    anywhere but by cutting off the end behind a line."""
    rows = content.splitlines(keepends=True)
    count = len(rows)
    kind = draw(st.sampled_from(["byte", "insert", "delete", "remove", "swap", "repeat", "forge"]))
    place = draw(st.integers(0, len(content) - 2))
    if kind == "byte":
        value = draw(st.integers(1, 255))
        return content[:place] + bytes([content[place] ^ value]) + content[place + 1 :]
    if kind == "insert":
        return content[:place] + draw(st.binary(min_size=1, max_size=3)) + content[place:]
    if kind == "delete":
        return content[:place] + content[place + draw(st.integers(1, 3)) :]
    first = draw(st.integers(0, count - 2))
    if kind == "remove":
        end = draw(st.integers(first + 1, count - 1))
        return b"".join(rows[:first] + rows[end:])
    second = draw(st.integers(first + 1, count - 1))
    if kind == "swap":
        rows[first], rows[second] = rows[second], rows[first]
    elif kind == "repeat":
        rows.insert(second, rows[first])
    else:
        rows.insert(second, rows[first].replace(b'"r', b'"x'))
    return b"".join(rows)


@pytest.mark.parametrize("key", [None, KEY])
@given(data=st.data())
def test_any_edit_is_found(key: bytes | None, data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("edit") / "audit.jsonl"
    written(path, 5, key)
    content = path.read_bytes()
    edited = data.draw(edits(content))
    path.write_bytes(edited)
    try:
        report = verify(path, key)
    except RequestError:  # the edit was of what the log says of its key
        assert edited != content
        return
    assert report.ok == (edited == content)


@pytest.mark.parametrize(
    ("edit", "kinds", "line", "sequence"),
    [
        (lambda rows: rows[:3] + rows[4:], ["removed"], 4, 3),
        (lambda rows: rows[1:], ["removed", "removed"], 1, None),
        (lambda rows: [*rows[:3], rows[3].replace(b'"r1"', b'"r9"'), *rows[4:]], ["changed"], 4, 3),
        (lambda rows: [*rows[:3], rows[4], rows[3], *rows[5:]], ["reordered"], 5, 3),
        (lambda rows: [*rows[:5], rows[3], *rows[5:]], ["inserted"], 6, 3),
        (lambda rows: [*rows[:3], b"abc\n", *rows[4:]], ["damaged"], 4, None),
    ],
)  # fmt: skip
def test_it_says_which_line(
    edit: Any, kinds: list[str], line: int, sequence: int | None, path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    written(path, 5)
    path.write_bytes(b"".join(edit(path.read_bytes().splitlines(keepends=True))))
    problems = verify(path).problems
    assert [problem.kind for problem in problems] == kinds
    assert (problems[0].line, problems[0].sequence) == (line, sequence)
    assert run(["audit", "verify", str(path)]) == 1
    assert f"audit.jsonl:{line}: {kinds[0]}: " in capsys.readouterr().out


def test_a_forger_without_the_key_is_found(path: Path) -> None:
    """The whole chain made anew: only the key tells, or a head that was kept elsewhere."""
    written(path, 5, KEY)
    head = verify(path, KEY).head
    assert head is not None
    path.unlink()
    written(path, 5, OTHER)
    content = path.read_bytes().replace(lines(path)[0]["key"].encode(), key_id(KEY).encode())
    path.write_bytes(content)
    assert len(verify(path, KEY).problems) == 8
    path.unlink()
    written(path, 5)
    with pytest.raises(RequestError, match="written without a key"):
        verify(path, KEY)
    assert verify(path).ok
    assert [problem.kind for problem in verify(path, head=head).problems] == ["removed"]


def test_a_cut_end_is_found_with_a_head(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with AuditLog(path) as log:
        log.record(record(1))
        log.flush()
        head = log.head
        assert head == (2, lines(path)[2]["hash"])
    assert verify(path, head=head).ok
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(rows[:2]))
    assert verify(path).ok
    assert not verify(path).closed
    assert not verify(path, head=head).ok
    argument = f"{head[0]}:{head[1]}"
    assert run(["audit", "verify", str(path), "--head", argument]) == 1
    assert "cut off" in capsys.readouterr().out
    assert run(["audit", "verify", str(path), "--head", "5"]) == 2
    assert run(["audit", "verify", str(path)]) == 0
    assert run(["audit", "verify", str(path.with_name("none"))]) == 2


# ---- starting again ----------------------------------------------------------------------------------------


def test_the_chain_goes_on_when_the_log_is_opened_again(path: Path) -> None:
    for number in range(3):
        written(path, number, KEY)
    report = verify(path, KEY)
    assert (report.ok, report.lines, report.requests, report.closed) == (True, 10, 3, True)
    assert [line["seq"] for line in lines(path)] == list(range(10))


@given(cut=st.integers(1, 400), key=st.sampled_from([None, KEY]))
def test_a_torn_line_is_mended(cut: int, key: bytes | None, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("torn") / "audit.jsonl"
    written(path, 3, key)
    content = path.read_bytes()
    content = content[: len(content) - cut]
    if cut > 1 and content.endswith(b"\n"):
        content = content[:-1]
    path.write_bytes(content)
    before = verify(path, key)
    assert before.ok
    torn = content.rpartition(b"\n")[2]
    assert before.torn_bytes == len(torn)
    written(path, 1, key)
    report = verify(path, key)
    assert report.ok
    assert report.recoveries == (1 if torn else 0)
    if torn:
        recovery = next(line for line in lines(path) if line["kind"] == "recovery")
        whole = torn.endswith(b'"}') and content + b"\n" in path.read_bytes()
        assert recovery["kept"] == whole
        assert (recovery["bytes"], recovery["sha256"]) == (len(torn), hashlib.sha256(torn).hexdigest())


@pytest.mark.parametrize("size", [0, 1, 30, 200])
def test_a_crash_within_the_first_line(size: int, path: Path) -> None:
    written(path, 0)
    path.write_bytes(path.read_bytes()[:size])
    written(path, 2)
    report = verify(path)
    assert (report.ok, report.requests, report.recoveries) == (True, 2, int(size > 0))


def test_what_is_no_log_is_left_alone(path: Path) -> None:
    for content in (b"precious", b"precious\n", b'{"a": 1}\n', bytes(100)):
        path.write_bytes(content)
        with pytest.raises(AuditError, match="audit log"):
            AuditLog(path)
        assert path.read_bytes() == content


def test_a_log_with_a_forged_end_is_not_gone_on_with(path: Path) -> None:
    written(path, 2)
    path.write_bytes(path.read_bytes().replace(b'"close"', b'"open"'))
    with pytest.raises(AuditError, match=r"last line \(sequence 4\) is not genuine"):
        AuditLog(path)


def test_another_key_is_refused(path: Path) -> None:
    written(path, 2, KEY)
    for key, words in ((None, "not without a key"), (OTHER, "not with key")):
        with pytest.raises(AuditError, match=words):
            AuditLog(path, key=key)
        with pytest.raises(RequestError, match="key"):
            verify(path, key)
    written(path, 1, KEY)
    assert verify(path, KEY).ok


def test_nobody_else_may_write(path: Path) -> None:
    with AuditLog(path), pytest.raises(AuditError, match="another audit log is writing"):
        AuditLog(path)
    AuditLog(path).close()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"fsync": "never"}, "fsync"),
        ({"fsync": 0}, "fsync"),
        ({"fsync": True}, "fsync"),
        ({"when_full": "drop"}, "when_full"),
        ({"max_queue": 0}, "max_queue"),
        ({"max_file_bytes": True}, "max_file_bytes"),
        ({"key": b"short"}, "key"),
        ({"path": ""}, "path"),
        ({"path": "/nowhere/at/all/audit.jsonl"}, "path"),
    ],
)
def test_bad_arguments(options: dict[str, Any], field: str, path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        AuditLog(**{"path": path, **options})
    assert caught.value.field == field
    assert not path.exists()


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "link", "pipe"):
        with pytest.raises(AuditError, match=name):
            AuditLog(tmp_path / name)


# ---- rotation ----------------------------------------------------------------------------------------------


def test_the_chain_goes_on_across_files(path: Path) -> None:
    for _ in range(2):
        with AuditLog(path, key=KEY, max_file_bytes=3000) as log:
            for number in range(60):
                log.record(record(number))
                if number % 3 == 0:
                    log.flush()
    older = rotated_files(path)
    assert list(older) == list(range(1, len(older) + 1))
    assert len(older) > 5
    assert {stat.S_IMODE(file.stat().st_mode) for file in older.values()} == {0o400}
    assert all(file.stat().st_size < 6000 for file in older.values())
    report = verify(path, KEY)
    assert (report.ok, report.requests, report.lines) == (True, 120, 120 + 4 + len(older) + 1)
    assert [line["seq"] for line in lines(path)] == list(range(report.lines))
    # A file in the middle, the first, its first line, two that changed places.
    names = list(older.values())
    content = {file: file.read_bytes() for file in names}
    names[2].unlink()
    assert [problem.kind for problem in verify(path, KEY).problems] == ["removed"]
    names[2].write_bytes(content[names[3]])
    assert not verify(path, KEY).ok
    names[2].write_bytes(content[names[2]])
    names[2].chmod(0o600)
    names[0].unlink()
    assert [problem.kind for problem in verify(path, KEY).problems] == ["removed"]
    assert verify(path, KEY, allow_missing_files=True).ok
    names[1].chmod(0o600)
    names[1].write_bytes(content[names[1]].partition(b"\n")[2])
    assert not verify(path, KEY, allow_missing_files=True).ok


def test_a_crash_between_two_files(path: Path) -> None:
    written(path, 3)
    path.rename(path.with_name("audit.jsonl.000001"))
    assert verify(path).ok
    written(path, 3)
    assert verify(path).ok
    assert [line["file"] for line in lines(path) if line["kind"] == "begin"] == [1, 2]


def test_a_file_that_cannot_be_renamed_is_gone_on_with(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(audit_files.os, "rename", rename)
    written(path, 30, max_file_bytes=1000, fsync="line")
    assert verify(path).requests == 30
    assert not rotated_files(path)


# ---- disks that fail ---------------------------------------------------------------------------------------


class Disk:
    """A disk that takes some bytes and then fails, until it is mended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self.syncs = True
        self.failures = 0
        monkeypatch.setattr(audit_files, "write_all", self.write_all)
        monkeypatch.setattr(audit_files, "sync_file", self.sync_file)

    def write_all(self, file: int, data: bytes) -> None:
        if self.room is not None:
            os.write(file, data[: self.room])
            if len(data) > self.room:
                self.failures += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room -= len(data)
            return
        os.write(file, data)

    def sync_file(self, file: int) -> None:
        if not self.syncs:
            self.failures += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def wait(self, count: int = 2) -> None:
        end = time.monotonic() + 10
        while self.failures < count:
            assert time.monotonic() < end
            time.sleep(0.005)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(monkeypatch)
    yield disk
    disk.room, disk.syncs = None, True


@pytest.mark.parametrize("room", [0, 1, 100, 450])
def test_a_full_disk_loses_nothing(room: int, path: Path, disk: Disk) -> None:
    log = AuditLog(path, when_full="refuse", fsync="line")
    places = [log.reserve() for _ in range(5)]
    disk.room = room
    log.record(record(100, answers=["x"] * 5))
    disk.wait()
    assert path.read_bytes().endswith(b"\n")  # no half line stays
    assert verify(path).ok
    for number, place in enumerate(places):
        place.commit(record(number))  # those that run finish all the same
    with pytest.raises(AuditError, match="cannot be written: No space left"):
        log.reserve()
    assert log.failure is not None
    with pytest.raises(AuditError, match="No space left"):
        log.flush(timeout=0.05)
    assert log.pending == 6
    disk.room = None
    log.flush(timeout=20)
    assert log.failure is None
    assert log.pending == 0
    log.record(record(7))
    log.close()
    assert [line["id"] for line in lines(path) if line["kind"] == "request"] == [
        "r100", "r0", "r1", "r2", "r3", "r4", "r7"
    ]  # fmt: skip
    assert verify(path).ok


def test_after_a_failed_fsync_everything_since_the_last_is_written_again(path: Path, disk: Disk) -> None:
    log = AuditLog(path, fsync=3600.0)
    log.record(record(0))
    log.flush()
    head = log.head
    disk.syncs = False
    log.record(record(1))
    log.record(record(2))
    with pytest.raises(AuditError, match="Input/output error"):
        log.flush(timeout=0.2)
    assert log.head == head
    # What the system gave up.
    os.truncate(path, path.stat().st_size - 10)
    disk.syncs = True
    log.flush(timeout=20)
    log.close()
    assert verify(path).ok
    assert [line["id"] for line in lines(path) if line["kind"] == "request"] == ["r0", "r1", "r2"]


def test_those_that_wait_go_on_when_the_disk_does(path: Path, disk: Disk) -> None:
    log = AuditLog(path, when_full="wait", fsync="line")
    disk.room = 0
    log.record(record(0))
    disk.wait()
    done = threading.Event()

    def later() -> None:
        log.record(record(1))
        done.set()

    thread = threading.Thread(target=later)
    thread.start()
    assert not done.wait(0.1)
    disk.room = None
    assert done.wait(20)
    thread.join()
    log.close()
    assert verify(path).requests == 2


def test_closing_says_what_was_lost(path: Path, disk: Disk) -> None:
    log = AuditLog(path)
    disk.room = 0
    for number in range(3):
        log.record(record(number))
    with pytest.raises(AuditError, match=r"4 lines are not known to be on the disk: .*No space left"):
        log.close(timeout=0.2)
    log.close()
    assert verify(path).ok
    with pytest.raises(AuditError, match="closed"):
        log.reserve()
    with pytest.raises(AuditError, match="closed"):
        log.flush()


def test_a_start_on_a_full_disk_fails(path: Path, disk: Disk) -> None:
    disk.room = 10
    with pytest.raises(AuditError, match="No space left"):
        AuditLog(path)
    disk.room = None
    AuditLog(path).close()
    assert verify(path).ok


def test_a_writer_that_breaks_keeps_nobody_waiting(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(path)

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by chance")

    monkeypatch.setattr(log._files, "flush", broken)
    log.record(record(0))
    with pytest.raises(AuditError, match="ZeroDivisionError: by chance"):
        log.flush()
    with pytest.raises(AuditError, match="ZeroDivisionError"):
        log.reserve()
    with pytest.raises(AuditError, match="not known to be on the disk"):
        log.close()


# ---- the queue ---------------------------------------------------------------------------------------------


def test_reservations_are_limited(path: Path) -> None:
    log = AuditLog(path, max_queue=2, when_full="refuse")
    one, two = log.reserve(), log.reserve()
    with pytest.raises(AuditError, match="queue of the audit log is full"):
        log.reserve()
    one.cancel()
    one.cancel()
    three = log.reserve()
    two.commit(record(2))
    with pytest.raises(AuditError, match="used before"):
        two.commit(record(2))
    two.cancel()
    three.commit(record(3))
    log.flush()
    assert log.pending == 0
    late = log.reserve()
    log.close()
    with pytest.raises(AuditError, match="closed"):
        late.commit(record(4))
    assert verify(path).requests == 2


def test_texts_are_limited_too(path: Path, disk: Disk) -> None:
    log = AuditLog(path, max_queue_bytes=1000, when_full="refuse")
    disk.room = 0
    log.record(record(0, prompt="x" * 999))
    place = log.reserve()
    place.commit(record(1, prompt="x" * 5000))
    with pytest.raises(AuditError):
        log.reserve()
    disk.room = None
    log.flush(timeout=20)
    log.reserve().cancel()
    log.close()


def test_a_forgotten_reservation_is_not_silent(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with AuditLog(path) as log:
        place = log.reserve()
        del place
        assert "ended without a record" in caplog.text
        assert log.pending == 0


async def test_an_event_loop_does_not_stand_still(path: Path, disk: Disk) -> None:
    log = AuditLog(path, max_queue=1, fsync="line")
    held = await log.reserve_async()
    waiting = [asyncio.ensure_future(log.record_async(record(number))) for number in range(5)]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in waiting)
    waiting[0].cancel()
    held.commit(record(9))
    await asyncio.wait_for(asyncio.gather(*waiting[1:]), 20)
    log.close()
    assert {line["id"] for line in lines(path) if line["kind"] == "request"} == {"r9", "r1", "r2", "r3", "r4"}
    with pytest.raises(AuditError, match="closed"):
        await log.reserve_async()


async def test_closing_ends_what_waits(path: Path) -> None:
    log = AuditLog(path, max_queue=1)
    held = log.reserve()
    task = asyncio.ensure_future(log.reserve_async())
    failed: list[BaseException] = []

    def wait() -> None:
        try:
            log.reserve()
        except AuditError as error:
            failed.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    await asyncio.sleep(0.05)
    await asyncio.to_thread(log.close)
    with pytest.raises(AuditError, match="closed"):
        await asyncio.wait_for(task, 20)
    thread.join(20)
    assert len(failed) == 1
    held.cancel()


@pytest.mark.parametrize("fsync", ["line", 0.01])
def test_many_threads(fsync: Any, path: Path) -> None:
    with AuditLog(path, fsync=fsync, max_queue=10, max_file_bytes=20_000) as log:

        def work(name: int) -> None:
            for number in range(100):
                log.record(record(1000 * name + number))

        threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = [int(line["id"][1:]) for line in lines(path) if line["kind"] == "request"]
    assert sorted(found) == sorted(1000 * name + number for name in range(4) for number in range(100))
    for name in range(4):  # each thread's in its order
        own = [number for number in found if number // 1000 == name]
        assert own == sorted(own)
    assert verify(path).ok


def test_lines_reach_the_disk_in_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = threading.Event()
    with AuditLog(path, fsync=0.05) as log:
        real = audit_files.sync_file

        def sync_file(file: int) -> None:
            real(file)
            synced.set()

        monkeypatch.setattr(audit_files, "sync_file", sync_file)
        log.record(record(0))
        assert synced.wait(20)


def test_verifying_a_log_in_use(path: Path) -> None:
    with AuditLog(path, max_file_bytes=2000, fsync=10.0) as log:
        stop = threading.Event()

        def work() -> None:
            number = 0
            while not stop.is_set():
                log.record(record(number))
                number += 1
                time.sleep(0.001)

        thread = threading.Thread(target=work)
        thread.start()
        for _ in range(20):
            report = verify(path)
            assert report.ok, report.problems
        stop.set()
        thread.join()
