"""One model in the cache: a folder that appears complete or not at all, with a stamp that says what is in it.

The stamp, `fastllm.json`, records the source and each file's size and sha256. A folder is filled under a
temporary name beside its place and renamed into it; a lock file keeps two processes from fetching the same
model twice, and where the file system knows no locks the rename alone still decides.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastllm.errors import ModelFileError, ModelSourceError
from fastllm.formats.safetensors import read_json

STAMP_NAME = "fastllm.json"
_STAMP_LIMIT = 1 << 20
_PIECE = 1 << 20
# What flock answers where there are no locks (some network file systems).
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@dataclass(frozen=True)
class StoredFile:
    """A file of a model: its name in the folder, bytes, and sha256 in hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Weights:
    """What was stored.

    Attributes:
        target: the file to open, or "." for the folder.
        files: every file.
    """

    target: str
    files: tuple[StoredFile, ...]


def tell(line: str) -> None:
    """One line to stderr for the person who waits."""
    print(f"fastllm: {line}", file=sys.stderr, flush=True)


def byte_bar(what: str, total: int, *, progress: bool) -> tqdm[Any]:
    """A progress bar over bytes, shown only on a terminal."""
    return tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=None if progress else True,
    )


def sha256_of(path: Path, *, progress: bool) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with (
        open(path, "rb") as file,
        byte_bar(f"verifying {path.name}", path.stat().st_size, progress=progress) as bar,
    ):
        while piece := file.read(_PIECE):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()


class CacheEntry:
    """The folder of one model.

    Args:
        folder: its place.
        reference: what it was fetched as, canonical.
        sha256: of the weights file, if known beforehand.
    """

    def __init__(self, folder: Path, reference: str, sha256: str | None) -> None:
        self.folder = folder
        self.reference = reference
        self.sha256 = sha256
        self.temporary_prefix = f".{folder.name}.tmp-"

    def find(self, *, verify: bool, progress: bool) -> Path | None:
        """The model if it is there and whole, else None.

        Sizes are compared every time, hashes with `verify`, or when the stamp is missing and the hash is
        known beforehand. A folder that cannot be checked counts as absent.
        """
        try:
            weights = self._read_stamp()
            if weights is None:
                return self._adopt(progress)
            for stored in weights.files:
                path = self.folder / stored.name
                if path.stat().st_size != stored.size:
                    return None
                if verify and sha256_of(path, progress=progress) != stored.sha256:
                    return None
        except OSError:
            return None
        return self.folder / weights.target

    @contextmanager
    def lock(self, *, progress: bool) -> Iterator[None]:
        """Hold the right to fill the folder; waits for another process that has it."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(self.folder.parent / f".{self.folder.name}.lock", "ab") as file:
            if self._acquire(file.fileno(), progress):
                # Nobody else is at work here: what a killed process left behind can go.
                for left in self.folder.parent.glob(f"{self.temporary_prefix}*"):
                    shutil.rmtree(left, ignore_errors=True)
            yield  # closing the file frees the lock

    def publish(self, filled: Path, weights: Weights, *, origin: str) -> Path:
        """Move a filled folder into its place, over a damaged one if need be.

        Raises:
            ModelSourceError: the weights are not the known ones.
        """
        self._check(weights)
        self._write_stamp(filled, weights, origin)
        if self.folder.exists():
            # Beside `filled`, and gone with it.
            self.folder.rename(filled.parent / "damaged")
        try:
            filled.rename(self.folder)
        except OSError as error:
            # Without locks another process can have been first; its folder is as good.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or self._read_stamp() is None:
                raise
        return self.folder / weights.target

    def _acquire(self, descriptor: int, progress: bool) -> bool:
        """Take the lock; False where the file system has none."""
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if progress:
                    tell(f"another process is fetching {self.reference}; waiting for it")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False
        return True

    def _check(self, weights: Weights) -> None:
        if self.sha256 is None:
            return
        for stored in weights.files:
            if stored.name == weights.target and stored.sha256 == self.sha256:
                return
        got = ", ".join(f"{stored.sha256} ({stored.name})" for stored in weights.files)
        raise ModelSourceError(self.reference, f"expected weights with sha256 {self.sha256}, got {got}")

    def _adopt(self, progress: bool) -> Path | None:
        """A folder without a usable stamp: taken over if its only GGUF file has the known hash."""
        found = sorted(self.folder.glob("*.gguf"))
        if self.sha256 is None or len(found) != 1 or sha256_of(found[0], progress=progress) != self.sha256:
            return None
        stored = StoredFile(found[0].name, found[0].stat().st_size, self.sha256)
        self._write_stamp(self.folder, Weights(stored.name, (stored,)), "found in the cache")
        return found[0]

    def _write_stamp(self, folder: Path, weights: Weights, origin: str) -> None:
        stamp = {
            "source": self.reference,
            "origin": origin,
            "target": weights.target,
            "files": {
                stored.name: {"size": stored.size, "sha256": stored.sha256} for stored in weights.files
            },
        }
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{STAMP_NAME}.")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(stamp, file, indent=2)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, folder / STAMP_NAME)

    def _read_stamp(self) -> Weights | None:
        """What the stamp says; None if it is missing, damaged, or about other weights than the known ones."""
        try:
            stamp = read_json(self.folder / STAMP_NAME, _STAMP_LIMIT)
            target = str(stamp["target"])
            files = tuple(
                StoredFile(name, int(facts["size"]), str(facts["sha256"]))
                for name, facts in stamp["files"].items()
            )
        except (ModelFileError, KeyError, TypeError, ValueError, AttributeError):
            return None
        plain = all(name == os.path.basename(name) and name not in ("", ".", "..") for name in stamp["files"])
        if not files or not plain or (target != "." and target not in stamp["files"]):
            return None
        weights = Weights(target, files)
        try:
            self._check(weights)
        except ModelSourceError:
            return None
        return weights
