"""One SHA-256 for a whole model, of its files as they are on disk: encrypted ones as they were encrypted.

Of a single file it is that of its bytes, as `sha256sum` prints it. Of a directory it is that of a text with a
line for each file, sorted by name in byte order: its digest in hexadecimal, two spaces, its name ("/" between
the parts), a newline. That is what `sha256sum` prints for the same files, so that

    cd MODEL && find -L * -type f ! -name fastllm.json | LC_ALL=C sort | xargs -d '\\n' sha256sum | sha256sum

gives the same (where no folder inside has hidden files). Every file counts, those in folders too, except
hidden ones and fastllm.json, the stamp of fastllm's own cache.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterator
from pathlib import Path

from fastllm.errors import ModelFileError, RequestError
from fastllm.formats.model_cache import STAMP_NAME, sha256_of

_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


def model_files(path: Path) -> list[str]:
    """The names of a model directory's files, relative to it, sorted by their bytes.

    Raises:
        ModelFileError: a name that is no single line of text; a link to a folder above.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            raise ModelFileError(folder, "a folder that contains itself")
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            relative = Path(folder, name).relative_to(path).as_posix()
            if not name.startswith(".") and relative != STAMP_NAME and Path(folder, name).is_file():
                if not relative.isprintable() or "\\" in relative:
                    raise ModelFileError(str(path), f"a file of the name {relative!r:.100}")
                found.append(relative)
    return sorted(found, key=os.fsencode)


def model_sha256(path: Path, *, progress: bool = False) -> str:
    """The digest of a model on disk, in hexadecimal.

    Args:
        path: a file, or a directory.
        progress: show a bar on a terminal.

    Raises:
        ModelFileError: it cannot be read.
    """
    try:
        if not path.is_dir():
            return sha256_of(path, progress=progress)
        digest = hashlib.sha256()
        for name in model_files(path):
            digest.update(f"{sha256_of(path / name, progress=progress)}  {name}\n".encode())
        return digest.hexdigest()
    except OSError as error:
        raise ModelFileError(str(error.filename or path), error.strerror or str(error)) from error


def check_sha256(value: object) -> None:
    """Raises RequestError for what is no digest."""
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise RequestError("sha256", value, "64 hexadecimal digits")


class VerifiedModel:
    """A model whose digest has been compared; `check_unchanged` afterwards says that no file was replaced or
    written to since.

    Raises:
        ModelFileError: it has another digest, or cannot be read.
    """

    def __init__(self, path: Path, sha256: str, *, progress: bool = False) -> None:
        self.path = path
        self._before = dict(self._marks())
        found = model_sha256(path, progress=progress)
        if not hmac.compare_digest(found, sha256.lower()):
            raise ModelFileError(str(path), f"expected sha256 {sha256.lower()}, found {found}")

    def check_unchanged(self) -> None:
        """Raises ModelFileError where a file is not the one any more that was verified. By file number, size
        and times: it is there for what happens, and does not stop who can write to the files at any moment.
        """
        if dict(self._marks()) != self._before:
            raise ModelFileError(str(self.path), "changed on disk while it was loaded")

    def _marks(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        try:
            for name in model_files(self.path) if self.path.is_dir() else ["."]:
                status = os.stat(self.path / name)
                yield (
                    name,
                    (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns),
                )
        except OSError as error:
            raise ModelFileError(str(error.filename or self.path), error.strerror or str(error)) from error
