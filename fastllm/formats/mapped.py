"""A read-only memory-mapped file, the ground that both checkpoint readers stand on.

Nothing is copied: a view is a NumPy array over the mapping, and it keeps the mapping alive for as long as
it lives. A file that another process cuts short while it is mapped ends in SIGBUS, as with every mapping;
replace model files by renaming, never by writing over them.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastllm.errors import ModelFileError
from fastllm.formats.checkpoint import CheckpointTensor

_PAGE = mmap.ALLOCATIONGRANULARITY


class MappedFile:
    """A regular, non-empty file mapped read-only.

    Attributes:
        path: the file, as given.
        size: its length in bytes when it was opened.
        encrypted: whether it is encrypted on disk; then this is a `DecryptedFile`.

    Raises:
        ModelFileError: the file is missing, unreadable, empty, or not a regular file.
    """

    encrypted = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            # O_NONBLOCK: opening a FIFO must not wait for a writer; it means nothing for a regular file.
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    raise ModelFileError(str(self.path), "not a regular file")
                self.size = status.st_size
                if self.size == 0:
                    raise ModelFileError(str(self.path), "the file is empty", offset=0)
                self._buffer = mmap.mmap(fd, self.size, access=mmap.ACCESS_READ)
            finally:
                os.close(fd)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path, or cut short in between
            raise ModelFileError(str(self.path), getattr(error, "strerror", None) or str(error)) from error
        self._closed = False

    def view(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """uint8[nbytes] over the mapping from byte `offset`, read-only; not necessarily aligned."""
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        if nbytes == 0:
            empty = np.empty(0, np.uint8)
            empty.flags.writeable = False
            return empty
        return np.frombuffer(self._buffer, np.uint8, nbytes, offset)

    def tensor(
        self, name: str, shape: tuple[int, ...], dtype: str, offset: int, nbytes: int
    ) -> CheckpointTensor:
        """A tensor whose data is that range; nothing is read for it."""
        return CheckpointTensor(name, shape, dtype, self.view(offset, nbytes))

    def read(self, offset: int, nbytes: int) -> bytes:
        """A copy of a range."""
        return self._buffer[offset : offset + nbytes]

    def beginning(self, end: int) -> memoryview:
        """The file from its first byte to `end` at least, or as far as it can be read at no cost."""
        return memoryview(self._buffer)

    def sha256(self) -> bytes:
        """The digest of the whole file, decrypted if need be."""
        return hashlib.sha256(self._buffer).digest()

    def release(self, offset: int, nbytes: int) -> None:
        """Drop the pages of a range from this process; a later read brings them back unchanged.

        Whole pages around the range are dropped. That is harmless to neighbours in a read-only mapping.
        """
        if self._closed or nbytes == 0:
            return
        start = offset // _PAGE * _PAGE
        self._buffer.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)

    def close(self) -> None:
        """Give the memory back. Views that are still held stay valid; the last one unmaps the file."""
        if self._closed:
            return
        self.release(0, self.size)
        self._closed = True
        with suppress(BufferError):  # views are held
            self._buffer.close()
