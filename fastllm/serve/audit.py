"""The audit log: one line for each request, in a chain of hashes, written off the path of requests.

    server: reserve() ─► Reservation ─► commit(AuditRecord) ─► queue ─► its thread: hash, chain, write, fsync

A request that was given a reservation has a place in the queue: its commit waits for nothing and cannot fail
for want of room. So a server asks for one before it begins a request, and refuses the request (or waits) if
there is none. Nothing is dropped: where the disk does not take lines they stay in the queue, in order, and
are tried again, while new reservations wait or are refused.

What a crash of the process costs is the lines in the queue; a crash of the machine, those that were not yet
on the disk (`fsync`). `flush` waits until there are none. Lines and files: `audit_chain.py`,
`audit_files.py`; checking: `audit_verify.py`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

from fastllm.errors import AuditError, RequestError
from fastllm.formats.keys import KEY_BYTES
from fastllm.serve.audit_files import AuditFiles
from fastllm.serve.audit_record import AuditRecord, record_body, text_bytes

__all__ = ["AuditLog", "AuditRecord", "Reservation"]

logger = logging.getLogger(__name__)

_BATCH = 512  # lines that are written together at most
_FIRST_RETRY, _LAST_RETRY = 0.05, 5.0  # seconds


class Reservation:
    """A place in the queue for one record: to be committed, or cancelled, once."""

    __slots__ = ("_log", "_open")

    def __init__(self, log: AuditLog) -> None:
        self._log = log
        self._open = True

    def commit(self, record: AuditRecord) -> None:
        """Hand a record over. Waits for nothing.

        Raises:
            AuditError: the log was closed meanwhile, or this was used before.
            TypeError: its prompt or an answer is no text.
        """
        if not self._open:
            raise AuditError(str(self._log.path), "the reservation was used before")
        nbytes = text_bytes(record)
        self._open = False
        self._log._put(record, nbytes)

    def cancel(self) -> None:
        """Give the place back: there is nothing to record. After `commit` it does nothing."""
        if self._open:
            self._open = False
            self._log._give_back(1, 0)

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            logger.error("%s: a request has ended without a record", self._log.path)
            self.cancel()


class AuditLog:
    """An audit log, open for writing. Any thread may call any method.

    Args:
        path: the file; older ones get numbers behind their names. Its directory exists.
        key: 32 bytes for HMACs, in place of plain hashes; see `audit_chain.py` for what that is worth.
        fsync: "line": a line counts as written once it is on the disk (lines that come together share an
            fsync); or seconds that a line may take to get there.
        when_full: what happens to a reservation that there is no room for: "wait", or "refuse".
        max_queue: reservations and lines that wait, at most.
        max_queue_bytes: texts that wait to be hashed, beyond which there is no room either.
        max_file_bytes: size from which on a new file is begun.

    Raises:
        RequestError: an argument is out of its range.
        AuditError: the log cannot be written, another process writes to it, it was written with another key,
            or its end is not genuine.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        key: bytes | None = None,
        fsync: str | float = 1.0,
        when_full: str = "wait",
        max_queue: int = 10_000,
        max_queue_bytes: int = 64 << 20,
        max_file_bytes: int = 256 << 20,
    ) -> None:
        _check(path, key, fsync, when_full)
        for name, value in (("max_queue", max_queue), ("max_queue_bytes", max_queue_bytes),
                            ("max_file_bytes", max_file_bytes)):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**63:
                raise RequestError(name, value, "an integer in 1..2**63-1")
        self.path = Path(path)
        self._interval = None if isinstance(fsync, str) else float(fsync)
        self._waits = when_full == "wait"
        self._max_queue, self._max_bytes = max_queue, max_queue_bytes
        self._files = AuditFiles(self.path, key, max_file_bytes)
        self._pid = os.getpid()
        self._queue: SimpleQueue[_Item] = SimpleQueue()
        # For the next six. An RLock: `Reservation.__del__` may come in while it is held.
        self._lock = threading.RLock()
        self._room = threading.Condition(self._lock)
        self._waiting: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()
        self._used = self._used_bytes = 0
        self._closed = False
        self._failure: OSError | None = None
        self._dead = False  # the thread has ended by an error of its own
        self._give_up = threading.Event()
        self._deadline = float("inf")  # of the last attempts, once it is being closed
        self._thread = threading.Thread(target=self._run, name="fastllm-audit", daemon=True)
        self._thread.start()
        self._at_exit = _close_at_exit(weakref.ref(self))
        atexit.register(self._at_exit)

    # ---- recording ---------------------------------------------------------------------------------------

    def reserve(self) -> Reservation:
        """A place for one record.

        Raises:
            AuditError: there is no room, or the disk does not take lines, and `when_full` is "refuse"; or the
                log is closed.
        """
        with self._lock:
            while not self._take():
                self._room.wait()
        return Reservation(self)

    async def reserve_async(self) -> Reservation:
        """As `reserve`, without holding up the event loop."""
        while True:
            with self._lock:
                if self._take():
                    return Reservation(self)
                loop = asyncio.get_running_loop()
                turn: asyncio.Future[None] = loop.create_future()
                self._waiting.append((loop, turn))
            try:
                await turn
            except asyncio.CancelledError:
                # If it was this one's turn, the next may have it.
                with self._lock:
                    self._wake()
                raise

    def record(self, record: AuditRecord) -> None:
        """`reserve` and commit. Raises as `reserve`."""
        self.reserve().commit(record)

    async def record_async(self, record: AuditRecord) -> None:
        """`reserve_async` and commit. Raises as `reserve`."""
        (await self.reserve_async()).commit(record)

    def _take(self) -> bool:
        """Whether there was a place. The lock is held."""
        if self._closed or os.getpid() != self._pid:
            raise AuditError(str(self.path), "the audit log is closed")
        # While the disk fails, lines that are on their way have places, and nobody else gets one.
        if self._failure is None and self._used < self._max_queue and self._used_bytes < self._max_bytes:
            self._used += 1
            return True
        if self._waits and not self._dead:
            return False
        raise AuditError(str(self.path), self._why() or "the queue of the audit log is full")

    def _put(self, record: AuditRecord, nbytes: int) -> None:
        with self._lock:
            if self._closed:
                self._used -= 1
                raise AuditError(str(self.path), "the audit log is closed")
            self._used_bytes += nbytes
            self._queue.put(_Item(time.time(), record, nbytes))

    def _give_back(self, count: int, nbytes: int) -> None:
        with self._lock:
            self._used -= count
            self._used_bytes -= nbytes
            self._wake()

    def _wake(self) -> None:
        """Let everybody who waits try again. The lock is held."""
        self._room.notify_all()
        while self._waiting:
            loop, turn = self._waiting.popleft()
            with contextlib.suppress(RuntimeError):  # that loop is closed
                loop.call_soon_threadsafe(_resolve, turn)

    # ---- what has been written ---------------------------------------------------------------------------

    @property
    def head(self) -> tuple[int, str]:
        """Sequence and hash of the last line that is on the disk: kept elsewhere, it proves later that
        nothing was cut off the end (`verify(..., head=...)`)."""
        synced = self._files.synced
        assert synced is not None  # a log begins with a line
        return synced

    @property
    def failure(self) -> str | None:
        """Why the disk does not take lines at present; None: it does."""
        with self._lock:
            return self._why()

    @property
    def pending(self) -> int:
        """Reservations, and lines that are not written yet."""
        with self._lock:
            return self._used

    def flush(self, timeout: float | None = None) -> None:
        """Wait until everything that was committed before is on the disk.

        Raises:
            AuditError: it took longer than `timeout` seconds, or the log is closed. Nothing is lost by that.
        """
        done = threading.Event()
        with self._lock:
            if self._closed:
                raise AuditError(str(self.path), "the audit log is closed")
            self._queue.put(_Item(0.0, None, 0, done))
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while not done.wait(min(max(end - time.monotonic(), 0.0), 1.0)):
            if time.monotonic() >= end or not self._thread.is_alive():
                raise AuditError(str(self.path), self.failure or f"not on the disk after {timeout} seconds")

    def close(self, timeout: float = 10.0) -> None:
        """Write what there is, and a last line that says so. May be called again.

        Raises:
            AuditError: the disk did not take it within `timeout` seconds; with the number of lines lost.
        """
        with self._lock:
            first = not self._closed
            self._closed = True
            if first:
                self._deadline = time.monotonic() + timeout
                self._give_up.set()
                self._queue.put(_Item(0.0, None, 0, None, last=True))
            self._wake()
        if os.getpid() != self._pid:
            return
        self._thread.join()
        if first:
            atexit.unregister(self._at_exit)
            lost, why = self._files.unsynced, self.failure
            self._files.close()
            if lost or not self._queue.empty():
                lost += self._queue.qsize()
                raise AuditError(str(self.path), f"{lost} lines are not known to be on the disk: {why}")

    def __enter__(self) -> AuditLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _why(self) -> str | None:
        error = self._failure
        return None if error is None else f"cannot be written: {error.strerror or error}"

    # ---- the writer's thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # nothing is expected here; but nobody may wait for what never comes
            logger.exception("%s: the audit log has failed", self.path)
            with self._lock:
                self._failure, self._dead = OSError(f"{type(error).__name__}: {error}"), True
                self._wake()

    def _work(self) -> None:
        due: float | None = None  # when what was written has to be on the disk
        while True:
            batch = self._next(None if due is None else due - time.monotonic())
            last = any(item.last for item in batch)
            for item in batch:
                if item.record is not None:
                    self._files.add(record_body(item.record, self._files.hasher), item.seconds)
            if last:
                self._files.add({"kind": "close"})
            if batch and due is None and self._interval is not None:
                due = time.monotonic() + self._interval
            late = due is not None and due <= time.monotonic()
            events = [item.done for item in batch if item.done is not None]
            sync = self._interval is None or late or bool(events) or last
            if self._write(sync) and sync:
                due = None
            for event in events:
                event.set()
            records = sum(item.record is not None for item in batch)
            self._give_back(records, sum(item.nbytes for item in batch))
            if last:
                return

    def _next(self, timeout: float | None) -> list[_Item]:
        """What has come: waits for it, at most `timeout` seconds."""
        batch: list[_Item] = []
        with contextlib.suppress(Empty):
            batch.append(self._queue.get(timeout=None if timeout is None else max(timeout, 0.0)))
            while len(batch) < _BATCH and not batch[-1].last:
                batch.append(self._queue.get_nowait())
        return batch

    def _write(self, sync: bool) -> bool:
        """Until it is written, or time is over. Whether it is."""
        pause = _FIRST_RETRY
        while True:
            try:
                self._files.flush(sync=sync)
                self._files.rotate()
            except OSError as error:
                with self._lock:
                    fresh = self._failure is None
                    self._failure = error
                    self._wake()  # those that rather fail than wait
                if fresh:
                    logger.error("%s: cannot write the audit log, trying again: %s", self.path, error)
                if time.monotonic() >= self._deadline:
                    return False
                self._give_up.wait(min(pause, max(self._deadline - time.monotonic(), 0.0)))
                if self._give_up.is_set():  # being closed: often, and not for long
                    time.sleep(_FIRST_RETRY)
                pause = min(2 * pause, _LAST_RETRY)
                continue
            with self._lock:
                failed, self._failure = self._failure is not None, None
                if failed:
                    self._wake()
            if failed:
                logger.warning("%s: the audit log can be written again", self.path)
            return True


@dataclass(frozen=True, slots=True)
class _Item:
    """Something for the writer: a record with its time and the size of its texts, an event to set once all
    before it is on the disk, or the end."""

    seconds: float
    record: AuditRecord | None
    nbytes: int
    done: threading.Event | None = None
    last: bool = False


def _resolve(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)


def _close_at_exit(log: weakref.ref[AuditLog]) -> Any:
    def close() -> None:
        there = log()
        if there is not None:
            there.close()

    return close


def _check(path: object, key: object, fsync: object, when_full: object) -> None:
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise RequestError("path", path, "a path")
    if not os.path.isdir(Path(os.fspath(path)).absolute().parent):
        raise RequestError("path", os.fspath(path), "a file in a directory that exists")
    if key is not None and (not isinstance(key, bytes) or len(key) != KEY_BYTES):
        raise RequestError("key", "something else", f"{KEY_BYTES} bytes, or None")
    real = isinstance(fsync, (int, float)) and not isinstance(fsync, bool)
    if fsync != "line" and not (real and 0 < float(str(fsync)) <= 3600):
        raise RequestError("fsync", fsync, '"line", or seconds in (0, 3600]')
    if when_full not in ("wait", "refuse"):
        raise RequestError("when_full", when_full, '"wait" or "refuse"')
