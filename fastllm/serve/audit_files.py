"""The files of an audit log: appending, recovery after a crash, rotation, and the lock that keeps others out.

    audit.jsonl          the lines that come now, mode 0600
    audit.jsonl.000001   older ones, in the order of their numbers, mode 0400
    audit.jsonl.lock     locked while a process writes

Each file begins with a line of the kind "begin", which says its number. Writing goes

    add ──► unwritten ── write ──► unsynced ── fsync ──► on the disk

A line is kept until it is on the disk. When a write or an fsync fails, the file is cut back to what is known
to be there, and everything since is written again: a half-written line, or pages that the system gave up
after a failed fsync, leave no trace.

At the start, a last line without its newline is one whose writing was cut short by a crash. If it is whole
otherwise, it stays; if not, it goes, and a line of the kind "recovery" says how long it was and its SHA-256.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastllm.errors import AuditError
from fastllm.formats.keys import key_id
from fastllm.serve.audit_chain import Chain, Hasher, Line, parse_line

logger = logging.getLogger(__name__)

FORMAT = 1
_BLOCK = 1 << 16


def rotated_files(path: Path) -> dict[int, Path]:
    """The older files of a log, by number, in ascending order."""
    pattern = re.compile(re.escape(path.name) + r"\.(\d{6,})")
    found = {}
    for name in os.listdir(path.absolute().parent):
        match = pattern.fullmatch(name)
        if match:
            found[int(match[1])] = path.with_name(name)
    return dict(sorted(found.items()))


def time_text(seconds: float) -> str:
    """UTC, to the microsecond: 2026-01-31T12:00:00.000000Z."""
    whole, fraction = divmod(int(seconds * 1e6), 1_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{fraction:06d}Z"


class AuditFiles:
    """The files of a log, open for appending by one thread.

    Args:
        path: the newest file; its directory exists.
        key: 32 bytes, or None.
        max_bytes: size from which on a new file is begun.

    Raises:
        AuditError: another process has the log, it was written with another key or without one, its last line
            is not genuine, or it cannot be written.

    Attributes:
        hasher: the hashes of the log.
        synced: sequence and hash of the last line that is on the disk.
    """

    def __init__(self, path: Path, key: bytes | None, max_bytes: int) -> None:
        self.path = path.absolute()
        self._key = None if key is None else key_id(key)
        self._max_bytes = max_bytes
        self.hasher = Hasher(key)
        self._unsynced: list[bytes] = []
        self._unwritten: list[bytes] = []
        self._good: int | None = None  # size to go back to before anything is written
        self._told = False  # that no new file can be begun
        self._file = self._lock = -1
        self.synced: tuple[int, str] | None = None
        try:
            self._lock = self._acquire()
            self._number = max(rotated_files(self.path), default=0) + 1
            self._file = self._open()
            self._size = self._synced_size = os.fstat(self._file).st_size
            self._recover()
            self.add({"kind": "open", "pid": os.getpid()})
            self.flush(sync=True)
            self._sync_directory()
        except OSError as error:
            self._close()
            raise AuditError(str(self.path), error.strerror or str(error)) from error
        except BaseException:
            self._close()
            raise

    @property
    def unsynced(self) -> int:
        """Lines that were added and are not known to be on the disk."""
        return len(self._unsynced)

    def add(self, body: Mapping[str, Any], seconds: float | None = None) -> None:
        """Seal a line, of which `flush` takes care.

        Args:
            body: its members.
            seconds: its time since the epoch; None: now.
        """
        told = {"time": time_text(time.time() if seconds is None else seconds), **body}
        line = self._chain.add(told)
        self._unsynced.append(line)
        self._unwritten.append(line)

    def flush(self, *, sync: bool) -> None:
        """Write what was added; with `sync`, until it is on the disk.

        Raises:
            OSError: it failed. Nothing is lost: the next call tries everything again.
        """
        if self._file < 0:
            self._file = self._open()
        self._cut()
        if self._unwritten:
            data = b"".join(self._unwritten)
            self._good = self._size  # until all of it is there
            try:
                write_all(self._file, data)
            except OSError:
                with contextlib.suppress(OSError):  # no half line for as long as this lasts
                    self._cut()
                raise
            self._good = None
            self._size += len(data)
            self._unwritten = []
        if sync and self._unsynced:
            try:
                sync_file(self._file)
            except OSError:
                # The system may have given up any of the pages since the last time.
                self._good = self._synced_size
                self._unwritten = list(self._unsynced)
                raise
            self._synced_size = self._size
            self._unsynced = []
            self.synced = (self._chain.sequence - 1, self._chain.previous)

    def _cut(self) -> None:
        """After a failure: back to what is known to be there."""
        if self._good is not None:
            os.ftruncate(self._file, self._good)
            self._size = self._good
            self._good = None

    def rotate(self) -> None:
        """Begin a new file if this one is large enough. What fails is tried again by the next call.

        Raises:
            OSError: as `flush`, which it calls first.
        """
        if self._size < self._max_bytes:
            return
        self.flush(sync=True)
        older = self.path.with_name(f"{self.path.name}.{self._number:06d}")
        try:
            if os.path.lexists(older):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(older))
            os.rename(self.path, older)
        except OSError as error:
            if not self._told:
                logger.warning("%s: cannot begin a new file, going on in this one: %s", self.path, error)
            self._told = True
            return
        self._told = False
        with contextlib.suppress(OSError):
            os.fchmod(self._file, 0o400)
        os.close(self._file)
        self._file = -1
        self._number += 1
        self._size = self._synced_size = 0
        self._begin()
        self.flush(sync=True)
        self._sync_directory()

    def close(self) -> None:
        """Give files and lock back; what was not flushed is lost. May be called again."""
        self._close()

    def _begin(self) -> None:
        self.add({"kind": "begin", "format": FORMAT, "file": self._number, "key": self._key})

    def _acquire(self) -> int:
        """The lock, which goes with the process."""
        place = self.path.with_name(self.path.name + ".lock")
        lock = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise AuditError(str(self.path), "another audit log is writing to it") from None
        except OSError:
            os.close(lock)
            raise
        return lock

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.open(self.path, flags, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(self.path))
            os.fchmod(file, 0o600)
        except BaseException:
            os.close(file)
            raise
        return file

    def _recover(self) -> None:
        """Find the end of the chain, and mend what a crash left."""
        last, torn = read_end(self._file, str(self.path), self.hasher)
        before = rotated_files(self.path)
        if last is None and before:
            with open(before[self._number - 1], "rb") as file:
                last, rest = read_end(file.fileno(), file.name, self.hasher)
            if last is None or rest:
                raise AuditError(file.name, "is damaged; verify the log, and move it away to begin a new one")
            empty = True
        else:
            empty = last is None
        self._check_key(before)
        if last is not None and not last.genuine:
            raise AuditError(
                str(self.path),
                f"its last line (sequence {last.sequence}) is not genuine; verify the log, and move it away "
                "to begin a new one",
            )
        self._chain = Chain(self.hasher)
        if last is not None:
            self._chain = Chain(self.hasher, last.sequence + 1, last.hash)
        whole = parse_line(torn, self.hasher) if torn else None
        kept = (
            whole is not None
            and whole.genuine
            and (whole.sequence, whole.previous) == (self._chain.sequence, self._chain.previous)
        )
        if kept and whole is not None:
            write_all(self._file, b"\n")
            self._size += 1
            self._chain = Chain(self.hasher, whole.sequence + 1, whole.hash)
            empty = False
        elif torn:
            if empty and not torn.startswith(b'{"seq":'[: len(torn)]):
                raise AuditError(str(self.path), "is no audit log; name a file that does not exist yet")
            self._size -= len(torn)
            os.ftruncate(self._file, self._size)
        self._synced_size = self._size
        if empty:
            self._begin()
        if torn:
            digest = hashlib.sha256(torn).hexdigest()
            self.add({"kind": "recovery", "kept": kept, "bytes": len(torn), "sha256": digest})
            logger.warning("%s: its last line was cut short by a crash (%d bytes, %s)",
                           self.path, len(torn), "kept" if kept else "removed")  # fmt: skip

    def _check_key(self, before: Mapping[int, Path]) -> None:
        """The newest file that has a first line says which key the log is written with."""
        for place in (self.path, *reversed(list(before.values()))):
            with open(place, "rb") as file:
                first = file.readline(_BLOCK)
            line = parse_line(first[:-1], self.hasher) if first.endswith(b"\n") else None
            if line is None:
                continue
            key = line.body().get("key")
            if key != self._key:
                raise AuditError(str(place), f"was written {key_words(key)}, not {key_words(self._key)}")
            return

    def _sync_directory(self) -> None:
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _close(self) -> None:
        if self._lock >= 0:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # at once, even if a forked process still has it open
        for name in ("_file", "_lock"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)


def key_words(key: object) -> str:
    """What a begin line says of its key, in words."""
    return "without a key" if key is None else f"with key {key}"


def read_end(file: int, name: str, hasher: Hasher) -> tuple[Line | None, bytes]:
    """The last whole line of an open file, None if it has none; and the bytes after its newline.

    Raises:
        AuditError: the last line has not the form of one.
    """
    position = os.fstat(file).st_size
    tail = b""
    while position and tail.count(b"\n") < 2:
        start = max(position - _BLOCK, 0)
        tail = os.pread(file, position - start, start) + tail
        position = start
    whole, newline, torn = tail.rpartition(b"\n")
    if not newline:
        return None, tail
    line = parse_line(whole.rpartition(b"\n")[2], hasher)
    if line is None:
        raise AuditError(
            name,
            "its last line is no line of an audit log; verify the log, and move it away to begin a new one",
        )
    return line, torn


def write_all(file: int, data: bytes) -> None:
    """All bytes, to the end of a file."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def sync_file(file: int) -> None:
    """What was written is on the disk."""
    os.fdatasync(file)
