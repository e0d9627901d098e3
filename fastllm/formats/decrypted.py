"""The plain text of an encrypted file, in memory alone, for the readers that otherwise map a file.

Nothing is decrypted before it is asked for: a chunk is opened when a view of it is made, checked, and copied
into anonymous memory. `release` gives pages back, and a later view decrypts them again. So loading a model
holds the tensors that are being packed, not the whole file.

                view                     release
    page  EMPTY ────► VALID (plain text) ───────► EMPTY

The memory is locked against swapping where the system allows it (RLIMIT_MEMLOCK, CAP_IPC_LOCK) and is left
out of core dumps. A view is valid until its range is released: unlike a mapped file, memory that was given
back does not come again by itself. Whoever releases a tensor must be done with its views.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastllm.errors import ModelFileError
from fastllm.formats.checkpoint import CheckpointTensor, DeferredTensor
from fastllm.formats.encryption import TAG_BYTES, EncryptedFile, is_encrypted
from fastllm.formats.keys import KeySource
from fastllm.formats.mapped import MappedFile

logger = logging.getLogger(__name__)

_PAGE = mmap.PAGESIZE
_MLOCK_ONFAULT = 1
_MADV_DONTDUMP = 16
_MADV_DONTNEED_LOCKED = 24  # since Linux 5.18


def open_mapped(path: str | os.PathLike[str], keys: KeySource | None = None) -> MappedFile:
    """A file for reading: mapped, or decrypted if it begins as an encrypted one does.

    Args:
        path: the file.
        keys: where the key of an encrypted one is; None: in the environment.

    Raises:
        ModelFileError: as `MappedFile` or `EncryptedFile`.
        RequestError: it is encrypted, and there is no key.
    """
    if is_encrypted(path):
        return DecryptedFile(path, KeySource() if keys is None else keys)
    return MappedFile(path)


class DecryptedFile(MappedFile):
    """An encrypted file with the interface of a mapped one, whose bytes are the plain text.

    Attributes:
        path: the file, as given.
        size: length of the plain text, bytes.
        locked: whether the plain text cannot be swapped out.

    Raises:
        ModelFileError, RequestError: as `EncryptedFile`; the plain text is empty.
    """

    encrypted = True

    def __init__(self, path: str | os.PathLike[str], keys: KeySource) -> None:
        self.path = Path(path)
        file = EncryptedFile(self.path, keys)
        self.size = file.header.length
        if self.size == 0:
            file.close()
            raise ModelFileError(str(self.path), "the file is empty", offset=0)
        self._plain: _PlainText | None = _PlainText(file)
        self.locked = self._plain.locked
        self._ready = 0  # bytes that `beginning` has decrypted

    def view(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """uint8[nbytes] of the plain text from byte `offset`, read-only, valid until `release`."""
        return self._memory().view(offset, nbytes)

    def tensor(
        self, name: str, shape: tuple[int, ...], dtype: str, offset: int, nbytes: int
    ) -> CheckpointTensor:
        """A tensor that is decrypted when its data is asked for; `close` does not end that."""
        return DeferredTensor(name, shape, dtype, self._memory().view, offset, nbytes)

    def read(self, offset: int, nbytes: int) -> bytes:
        return self._memory().view(offset, nbytes).tobytes()

    def beginning(self, end: int) -> memoryview:
        memory = self._memory()
        # Twice as much each time, so that a head of any length takes few calls.
        end = min(max(end, 2 * self._ready, memory.chunk_bytes), self.size)
        if end > self._ready:
            memory.fill(0, end)
            self._ready = end
        return memoryview(memory.buffer)[: self._ready].toreadonly()

    def sha256(self) -> bytes:
        memory = self._memory()
        digest = hashlib.sha256()
        for piece in memory.chunks():
            digest.update(piece)
        return digest.digest()

    def release(self, offset: int, nbytes: int) -> None:
        """Give the whole pages in a range back; a later view decrypts them again."""
        if self._plain is not None:
            self._plain.release(offset, nbytes)

    def close(self) -> None:
        """Give the memory back. Views and tensors that are held stay valid; the last one frees it."""
        self._plain = None

    def _memory(self) -> _PlainText:
        if self._plain is None:
            raise ValueError(f"{self.path} is closed")
        return self._plain


class _PlainText:
    """Anonymous memory as long as the plain text, filled chunk by chunk. Threads may share one.

    It is kept account of by units: pages, or chunks where those are smaller.

    Invariant: what a unit holds is the plain text where `_valid` says so; it is not written to then.
    """

    def __init__(self, file: EncryptedFile) -> None:
        self._file = file
        self.chunk_bytes = file.header.chunk_bytes
        self._size = file.header.length
        self.buffer = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = np.frombuffer(self.buffer, np.uint8)
        self._unit = min(_PAGE, self.chunk_bytes)
        self._valid = np.zeros(-(-self._size // self._unit), np.bool_)
        self._seen = np.zeros(file.header.chunks, np.bool_)  # chunks that were opened at least once
        self._sealed = bytearray(min(self.chunk_bytes, self._size) + TAG_BYTES)  # what a file has of a chunk
        self._lock = threading.Lock()  # for these three, and for writing to the memory
        for advice in (_MADV_DONTDUMP, mmap.MADV_HUGEPAGE):  # making pages one by one takes longer than AES
            self._advise(advice, 0, self._size)
        self.locked = _lock_pages(self._bytes.ctypes.data, self._size)
        if not self.locked:
            logger.info(
                "%s: its plain text is not locked in memory and may be swapped out: that takes a memlock "
                "limit of %d bytes, or CAP_IPC_LOCK",
                file.path,
                self._size,
            )

    def view(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        self.fill(offset, nbytes)
        view = self._bytes[offset : offset + nbytes]
        view.flags.writeable = False
        return view

    def fill(self, offset: int, nbytes: int) -> None:
        """Decrypt what of a range is not there."""
        if nbytes == 0:
            return
        per_chunk = self.chunk_bytes // self._unit
        first, last = offset // self._unit, -(-(offset + nbytes) // self._unit)
        for index in range(first // per_chunk, -(-last // per_chunk)):
            begin, end = index * per_chunk, min((index + 1) * per_chunk, len(self._valid))
            wanted = slice(max(begin, first), min(end, last))
            if self._valid[wanted].all():
                continue
            with self._lock:
                if self._valid[wanted].all():  # another thread was first
                    continue
                # The first time all of it, for the neighbours; later only what was asked for.
                if not self._seen[index]:
                    wanted = slice(begin, end)
                self._open(index, begin, wanted)
                self._seen[index] = self._valid[wanted] = True

    def _open(self, index: int, origin: int, wanted: slice) -> None:
        """Decrypt chunk `index`, which begins at unit `origin`, into those of the wanted units that are not
        valid. The lock is held."""
        start = origin * self._unit
        length = min(self.chunk_bytes, self._size - start)
        if wanted.stop - wanted.start == -(-length // self._unit) and not self._valid[wanted].any():
            self._file.chunk_into(index, self._sealed, memoryview(self.buffer)[start : start + length])
            return
        plain = np.frombuffer(self._file.chunk(index), np.uint8)
        for unit in np.flatnonzero(~self._valid[wanted]) + wanted.start:
            first = int(unit) * self._unit
            last = min(first + self._unit, self._size)
            self._bytes[first:last] = plain[first - start : last - start]

    def chunks(self) -> Iterator[bytes]:
        """The plain text, chunk by chunk; none of it is kept."""
        return map(self._file.chunk, range(self._file.header.chunks))

    def release(self, offset: int, nbytes: int) -> None:
        """Give the whole pages in a range back. What shares a page with others stays."""
        first = -(-offset // _PAGE) * _PAGE
        end = offset + nbytes
        end = self._size if end >= self._size else end // _PAGE * _PAGE
        if first >= end:
            return
        with self._lock:
            self._valid[first // self._unit : -(-end // self._unit)] = False
            try:
                self.buffer.madvise(
                    _MADV_DONTNEED_LOCKED if self.locked else mmap.MADV_DONTNEED, first, end - first
                )
            except OSError:  # a kernel that keeps what is locked
                _libc().munlock(
                    ctypes.c_void_p(self._bytes.ctypes.data + first), ctypes.c_size_t(end - first)
                )
                self._advise(mmap.MADV_DONTNEED, first, end - first)

    def _advise(self, advice: int, start: int, length: int) -> None:
        try:
            self.buffer.madvise(advice, start, length)
        except OSError as error:  # the kernel is too old for it, or was built without: nothing depends on it
            logger.debug("madvise %d: %s", advice, error)


def _lock_pages(address: int, nbytes: int) -> bool:
    """Keep pages in memory from when they are first written to. Whether the system does."""
    try:
        mlock2 = _libc().mlock2
    except (OSError, AttributeError):  # a C library without it
        return False
    locked: bool = mlock2(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _MLOCK_ONFAULT) == 0
    return locked


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
