"""What the prefix cache has to forget, kept in a file for a later hit.

    evicted block ── read_blocks ──► queue ── seal, by the writer's thread ──► slot of the file
                                       │                                        │
    block of a new sequence ◄── write_blocks ◄───── open, verify ◄──────────────┘

`BlockPool` notes which block loses which content. Until something else is written to the block its bytes are
still there: `Offload.save` reads them, before every step and before anything is brought back. `Scheduler`
asks `Offload.restore` for what follows the known prefix of a sequence that it admits. The blocks are then as
if the sequence had computed them.

The file is a cache. A block that is not in it is computed, so nothing here fails: where the writer does not
keep up, blocks are dropped; what cannot be written or read, or does not pass its check, is forgotten. No step
waits for a write.

Invariants (`OffloadFile.check` recomputes every one of them)
=============================================================

    F1  A slot is free, holds one block of the index, or is being written to; there are `num_slots` of them.
    F2  A content is in the queue or in the index, never in both.
    F3  There are at most as many slots and queued blocks as the limits say.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastllm.engine.block_pool import BlockPool
from fastllm.engine.block_seal import TAIL, ChecksumSeal, EncryptingSeal, Seal, check_encryption
from fastllm.errors import CapacityError, RequestError
from fastllm.executor.base import BlockStore

logger = logging.getLogger(__name__)

UInt8Array = npt.NDArray[np.uint8]

QUEUE_BYTES = 128 << 20  # that wait for the writer at most; but always QUEUE_BLOCKS
QUEUE_BLOCKS = 8
PAGE = 4096  # slots begin at multiples of it
QUIET_SECONDS = 60.0  # between two complaints in the log
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Offload:
    """Moves blocks between an executor and a file. Called by the thread that calls the engine.

    Args:
        store: the executor.
        pool: its blocks; from here on it notes evictions.
        file: closed with this object.
    """

    def __init__(self, store: BlockStore, pool: BlockPool, file: OffloadFile) -> None:
        self.file = file
        self._store = store
        self._pool = pool
        pool.evicted = []

    def save(self) -> None:
        """Queue the contents that the pool has noted. Their bytes are still in place: this is called before
        anything writes to the cache. Interrupted, it is done again by the next call."""
        noted = self._pool.evicted
        if noted:
            self.file.put([content for _, content in noted], lambda places: self._read(noted, places))
            noted.clear()

    def _read(self, noted: Sequence[tuple[int, bytes]], places: Sequence[int]) -> UInt8Array:
        data = np.empty((len(places), self._store.block_bytes), np.uint8)
        self._store.read_blocks(np.array([noted[place][0] for place in places], np.int32), data)
        return data

    def restore(self, contents: Sequence[bytes], blocks: Sequence[int]) -> int:
        """Bring contents back, from the first on, as far as they are there.

        Args:
            contents: content hashes of consecutive blocks of a sequence.
            blocks: a block for each, held by that sequence alone; what is in the others afterwards is
                undefined.

        Returns:
            How many of the blocks have their contents now.
        """
        self.save()
        count = 0
        for content, block in zip(contents, blocks, strict=True):
            data = self.file.get(content)
            if data is None:
                break
            self._store.write_blocks(np.array([block], np.int32), data[np.newaxis])
            count += 1
        self.file.touch(reversed(contents[:count]))  # the end of a prefix is of no use without its beginning
        return count

    def reset(self) -> None:
        """Forget everything."""
        self.file.reset()

    def close(self) -> None:
        """Close the file. May be called again."""
        self.file.close()

    def check(self) -> None:
        """Raises AssertionError where an invariant of the file is broken."""
        self.file.check()


class OffloadFile:
    """Blocks by their content hashes, in a file without a name and a queue before it.

    `put`, `get`, `touch`, `reset` and `close` are called by one thread; another one, its own, writes. In a
    process forked from the one that made it, nothing is found and nothing is put.

    Args:
        block_bytes: bytes of a block, >= 1.
        max_bytes: size that the file has at most.
        directory: where it is made, in no name's reach and readable for this user alone; None: the system's
            temporary directory.
        encrypted: see `EncryptingSeal`; otherwise blocks are written as they are, with a `ChecksumSeal`.

    Raises:
        CapacityError: not one block fits into max_bytes.
        RequestError: no file can be made in the directory, or encryption is not installed.

    Attributes:
        max_blocks: slots that the file may have; fewer once there was no space for more.
        num_dropped: blocks that were not taken, or not written, so far.
        num_failed: blocks that could not be read, or did not pass their check, so far.
    """

    def __init__(
        self,
        block_bytes: int,
        max_bytes: int,
        directory: str | os.PathLike[str] | None = None,
        *,
        encrypted: bool = False,
    ) -> None:
        self.block_bytes = block_bytes
        self.slot_bytes = -(-block_bytes // PAGE) * PAGE
        self.max_blocks = max_bytes // self.slot_bytes
        if self.max_blocks < 1:
            raise CapacityError(
                f"kv_offload_bytes: one block of {block_bytes} bytes", asked=self.slot_bytes, had=max_bytes,
                would_fit=0, unit="bytes",
            )  # fmt: skip
        self._most_blocks = self.max_blocks
        self.max_queued = max(QUEUE_BYTES // block_bytes, QUEUE_BLOCKS)
        self.num_dropped = 0
        self.num_failed = 0
        self._seal: Seal = EncryptingSeal() if encrypted else ChecksumSeal()
        self._buffer = np.empty(block_bytes + TAIL, np.uint8)  # of what `get` reads
        self._index: OrderedDict[bytes, tuple[int, bytes]] = (
            OrderedDict()
        )  # slot, check; longest unused first
        self._queue: OrderedDict[bytes, UInt8Array] = OrderedDict()
        self._num_slots = 0
        self._free: list[int] = []
        self._writing: int | None = None  # the slot
        self._reading: bytes | None = None  # the content whose slot is not to be written to
        self._era = 0  # how often everything was forgotten
        self._closed = False
        self._process = os.getpid()
        self._complained = -QUIET_SECONDS
        self._changed = threading.Condition()
        self._file = make_file(directory)
        self._writer = threading.Thread(target=self._write_queue, name="fastllm-offload", daemon=True)
        try:
            self._writer.start()
        except BaseException:
            os.close(self._file)
            raise

    # ---- what is there -----------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        """Blocks that would be found, those in the queue included."""
        return len(self._index) + len(self._queue)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._num_slots * self.slot_bytes

    def put(self, contents: Sequence[bytes], read: Callable[[list[int]], UInt8Array]) -> None:
        """Queue blocks that are not there yet; those that are count as used. Where the queue has no room for
        all of them, the first ones are dropped.

        Args:
            contents: their hashes, each once; those that are of more use later.
            read: gives the bytes of the blocks at these places of contents, (len, block_bytes), which do not
                change afterwards.
        """
        if self._unusable():
            return
        with self._changed:
            self._touch(contents)
            places = [
                place
                for place, content in enumerate(contents)
                if content not in self._index and content not in self._queue
            ]
            room = max(self.max_queued - len(self._queue), 0) if self.max_blocks else 0
            self.num_dropped += max(len(places) - room, 0)
            places = places[len(places) - min(room, len(places)) :]
        if not places:
            return
        try:
            data = read(places)
        except MemoryError:
            self.num_dropped += len(places)
            self._complain("no memory for %d blocks", len(places))
            return
        with self._changed:
            for place, block in zip(places, data, strict=True):
                self._queue[contents[place]] = block
            self._changed.notify_all()

    def get(self, content: bytes) -> UInt8Array | None:
        """A block's bytes (block_bytes,), valid until the next call; None: it is not there, or no more."""
        if self._unusable():
            return None
        with self._changed:
            queued = self._queue.get(content)
            entry = self._index.get(content)
            self._reading = content if entry is not None else None
        if queued is not None or entry is None:
            return queued
        block = self._read(content, *entry)
        with self._changed:
            self._reading = None
            if block is not None:
                self._index.move_to_end(content)
            else:
                del self._index[content]
                self._free.append(entry[0])
                self.num_failed += 1
        return block

    def touch(self, contents: Iterable[bytes]) -> None:
        """Count contents as used, the last of them as the last one."""
        if self._unusable():
            return
        with self._changed:
            self._touch(contents)

    def _touch(self, contents: Iterable[bytes]) -> None:
        for content in contents:
            if content in self._index:
                self._index.move_to_end(content)

    def reset(self) -> None:
        """Forget everything, and give the space back."""
        if self._unusable():
            return
        with self._changed:
            self._index.clear()
            self._queue.clear()
            self._free.clear()
            self._num_slots = 0
            self.max_blocks = self._most_blocks
            self._reading = self._writing = None
            self._era += 1
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)

    def wait(self) -> None:
        """Wait until the queue is written."""
        with self._changed:
            while (self._queue or self._writing is not None) and not self._unusable():
                self._changed.wait()

    def close(self) -> None:
        """Forget everything and close the file, with which it is gone. May be called again."""
        if self._file < 0:
            return
        if self._process == os.getpid():
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            self._writer.join()
            self._index.clear()
            self._queue.clear()
        self._closed = True
        file, self._file = self._file, -1
        os.close(file)

    def _unusable(self) -> bool:
        return self._closed or self._process != os.getpid()

    # ---- reading and writing -----------------------------------------------------------------------------

    def _read(self, content: bytes, slot: int, check: bytes) -> UInt8Array | None:
        try:
            count = read_at(self._file, self._buffer[: self.block_bytes], slot * self.slot_bytes)
        except OSError as error:
            self._complain("a block cannot be read: %s", error)
            return None
        block = None if count < self.block_bytes else self._seal.open(content, self._buffer, check)
        if block is None:
            self._complain("a block is not what was written (%d bytes of %d)", count, self.block_bytes)
        return block

    def _write_queue(self) -> None:
        """What the writer's thread does: one block after the other, until the file is closed."""
        while True:
            block = failure = None  # an idle writer keeps no memory
            with self._changed:
                self._writing = None
                self._changed.notify_all()
                while not self._queue and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                content, block = next(iter(self._queue.items()))  # there it is found until it is written
                era = self._era
                slot = self._writing = self._take_slot()
            check = None
            if slot is not None:
                try:
                    check = self._write(content, block, slot)
                except Exception as error:  # the cache goes on without this block
                    failure = error
            with self._changed:
                if era != self._era:  # the slot is nobody's
                    continue
                del self._queue[content]
                if slot is not None and check is not None:
                    self._index[content] = (slot, check)
                    continue
                self.num_dropped += 1
                if slot is not None:
                    self._give_back(slot)
                full = isinstance(failure, OSError) and failure.errno in NO_SPACE
                if full:
                    self.max_blocks = self._num_slots
            if full:
                logger.warning(
                    "KV offload: no space (%s); the file keeps %d blocks", failure, self._num_slots
                )
            elif failure is not None:
                self._complain("a block cannot be written: %r", failure)

    def _take_slot(self) -> int | None:
        """A slot to write to: a free one, a new one, or that of the block that was unused for longest."""
        if self._free:
            return self._free.pop()
        if self._num_slots < self.max_blocks:
            self._num_slots += 1
            return self._num_slots - 1
        for content in self._index:
            if content != self._reading:
                return self._index.pop(content)[0]
        return None

    def _give_back(self, slot: int) -> None:
        """A slot that could not be written to; the last one there is exists no more, perhaps never did."""
        if slot == self._num_slots - 1:
            self._num_slots -= 1
        else:
            self._free.append(slot)

    def _write(self, content: bytes, block: UInt8Array, slot: int) -> bytes:
        """Seal a block and write it to a slot. Returns its check."""
        data, check = self._seal.close(content, block)
        done = 0
        while done < len(data):
            count = write_at(self._file, data[done:], slot * self.slot_bytes + done)
            if count < 1:
                raise OSError(errno.EIO, "nothing was written")
            done += count
        return check

    def _complain(self, text: str, *values: object) -> None:
        """Log what went wrong, but not each time."""
        now = time.monotonic()
        if now - self._complained >= QUIET_SECONDS:
            self._complained = now
            logger.warning("KV offload: " + text, *values)

    def check(self) -> None:
        """Recompute the invariants from scratch.

        Raises:
            AssertionError: one is broken; the message begins with its number.
        """
        with self._changed:
            slots = [slot for slot, _ in self._index.values()] + self._free
            if self._writing is not None and not self._closed:
                slots.append(self._writing)
            whole = sorted(slots) == list(range(self._num_slots))
            both = self._index.keys() & self._queue.keys()
            if not whole and not self._closed:
                raise AssertionError(f"F1: of {self._num_slots} slots these are in use or free: {slots}")
            if both:
                raise AssertionError(f"F2: {len(both)} blocks are both queued and written")
            if len(self._queue) > self.max_queued or self._num_slots > self.max_blocks:
                raise AssertionError(f"F3: {len(self._queue)} queued, {self._num_slots} slots")


def make_file(directory: str | os.PathLike[str] | None) -> int:
    """A new file without a name, open for reading and writing by this user alone. Returns its descriptor.

    Raises:
        RequestError: there can be none in the directory.
    """
    place = tempfile.gettempdir() if directory is None else os.fspath(directory)
    try:
        try:
            kind = os.O_TMPFILE | os.O_EXCL  # it cannot be given a name later either
            file = os.open(place, os.O_RDWR | os.O_CLOEXEC | kind, 0o600)
        except (AttributeError, OSError):  # not every system and file system has that
            file, name = tempfile.mkstemp(prefix="fastllm-", dir=place)
            os.unlink(name)
        os.fchmod(file, 0o600)
    except OSError as error:
        raise RequestError("kv_offload_dir", place, f"a directory for files ({error.strerror})") from error
    return file


def read_at(file: int, buffer: UInt8Array, offset: int) -> int:
    """Read from an offset. Returns how many bytes there were."""
    return os.preadv(file, [buffer.data], offset)


def write_at(file: int, data: memoryview, offset: int) -> int:
    """Write to an offset. Returns how many bytes were written."""
    return os.pwrite(file, data, offset)


def check_options(
    max_bytes: object, directory: object, encrypted: object, enable_prefix_caching: bool
) -> None:
    """Raises RequestError unless kv_offload_bytes, kv_offload_dir and kv_offload_encrypted can be had."""
    if not isinstance(encrypted, bool):
        raise RequestError("kv_offload_encrypted", encrypted, "a bool")
    if max_bytes is None:
        if directory is not None:
            raise RequestError("kv_offload_dir", directory, "None without kv_offload_bytes")
        if encrypted:
            raise RequestError("kv_offload_encrypted", encrypted, "False without kv_offload_bytes")
        return
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or not 1 <= max_bytes < 2**63:
        raise RequestError("kv_offload_bytes", max_bytes, "an integer in 1..2**63-1")
    if not enable_prefix_caching:
        raise RequestError("kv_offload_bytes", max_bytes, "None without enable_prefix_caching")
    if directory is not None:
        if not isinstance(directory, (str, os.PathLike)):
            raise RequestError("kv_offload_dir", directory, "a path of a directory")
        if not os.path.isdir(directory):
            raise RequestError("kv_offload_dir", os.fspath(directory), "a directory that exists")
    if encrypted:
        check_encryption()


def open_offload(
    executor: Any, pool: BlockPool, max_bytes: int, directory: str | os.PathLike[str] | None, encrypted: bool
) -> Offload:
    """The file for an engine's blocks.

    Raises:
        RequestError: the executor has no blocks to read, or as `OffloadFile`.
        CapacityError: as `OffloadFile`.
    """
    if not isinstance(executor, BlockStore):
        limit = f"None: {type(executor).__name__} cannot read and write blocks"
        raise RequestError("kv_offload_bytes", max_bytes, limit)
    file = OffloadFile(executor.block_bytes, max_bytes, directory, encrypted=encrypted)
    logger.info(
        "KV offload: a file of at most %d blocks x %d bytes in %s%s",
        file.max_blocks,
        file.slot_bytes,
        tempfile.gettempdir() if directory is None else os.fspath(directory),
        ", encrypted" if encrypted else "",
    )
    return Offload(executor, pool, file)
