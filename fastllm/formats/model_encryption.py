"""Encrypting a model on disk, and decrypting it again: one file, or every file of a directory.

What comes out appears under its name complete or not at all. A file is written without a name first, where
the file system can do that, and so is gone with a process that is killed; a directory is filled under a
hidden name beside its place.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from fastllm.errors import ModelFileError, RequestError
from fastllm.formats.digest import model_files
from fastllm.formats.encryption import CHUNK_BYTES, TAG_BYTES, Cipher, EncryptedFile, is_encrypted, new_header
from fastllm.formats.keys import KeySource
from fastllm.formats.model_cache import byte_bar

# Permissions that what comes out keeps of the source's: plain text is for its owner alone.
_SEALED_MASK = 0o644
_PLAIN_MASK = 0o600

Convert = Callable[[Path, BinaryIO, Callable[[int], object]], None]


def encrypt_model(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    key: bytes,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    progress: bool = False,
) -> None:
    """Encrypt a model.

    Args:
        model: a file, or a directory, of which every file is taken but hidden ones.
        out: what does not exist yet.
        key: 32 bytes.
        chunk_bytes: plain text in a chunk; see `fastllm.formats.encryption`.
        progress: show a bar on a terminal.

    Raises:
        RequestError: `out` exists, `model` does not, or the package cryptography is not installed.
        ModelFileError: a file is encrypted already, cannot be read, or changes meanwhile.
        OSError: `out` cannot be written.
    """

    def convert(source: Path, target: BinaryIO, advance: Callable[[int], object]) -> None:
        if is_encrypted(source):
            raise ModelFileError(str(source), "is encrypted already")
        with _opened(source) as file:
            _encrypt(source, file, target, key, chunk_bytes, advance)

    _convert("encrypting", Path(model), Path(out), convert, _SEALED_MASK, progress)


def decrypt_model(
    model: str | os.PathLike[str], out: str | os.PathLike[str], key: bytes, *, progress: bool = False
) -> None:
    """Decrypt a model; what comes out is for its owner alone (mode 0600).

    Args:
        model: an encrypted file, or a directory; what in there is not encrypted is copied.
        out, key, progress: as for `encrypt_model`.

    Raises:
        RequestError: as for `encrypt_model`.
        ModelFileError: a file is damaged, or was encrypted with another key; a single one is not encrypted.
        OSError: `out` cannot be written.
    """
    keys = KeySource.of(key)
    single = not Path(model).is_dir()

    def convert(source: Path, target: BinaryIO, advance: Callable[[int], object]) -> None:
        if not single and not is_encrypted(source):
            with _opened(source) as plain:
                shutil.copyfileobj(plain, target)
            advance(source.stat().st_size)
            return
        file = EncryptedFile(source, keys)
        try:
            for index in range(file.header.chunks):
                target.write(file.chunk(index))
                advance(file.header.place(index)[1])
        finally:
            file.close()

    _convert("decrypting", Path(model), Path(out), convert, _PLAIN_MASK, progress)


def _encrypt(
    source: Path,
    file: BinaryIO,
    target: BinaryIO,
    key: bytes,
    chunk_bytes: int,
    advance: Callable[[int], object],
) -> None:
    header = new_header(os.fstat(file.fileno()).st_size, key, chunk_bytes)
    cipher = Cipher(header, key)
    target.write(cipher.header_bytes)
    for index in range(header.chunks):
        wanted = header.place(index)[1] - TAG_BYTES
        piece = _read(source, file, wanted)
        if len(piece) < wanted:
            raise ModelFileError(str(source), "became shorter while it was encrypted")
        target.write(cipher.seal(index, piece))
        advance(len(piece))
    if _read(source, file, 1):
        raise ModelFileError(str(source), "became longer while it was encrypted")


def _opened(source: Path) -> BinaryIO:
    try:
        return open(source, "rb")
    except OSError as error:
        raise ModelFileError(str(source), error.strerror or str(error)) from error


def _read(source: Path, file: BinaryIO, count: int) -> bytes:
    """`count` bytes, or what there is until the end."""
    try:
        return file.read(count)
    except OSError as error:
        raise ModelFileError(str(source), error.strerror or str(error)) from error


def _convert(what: str, model: Path, out: Path, convert: Convert, mask: int, progress: bool) -> None:
    if os.path.lexists(out):
        raise RequestError("out", str(out), "a path that does not exist yet")
    if not out.absolute().parent.is_dir():
        raise RequestError("out", str(out), "a path in a directory that exists")
    names = model_files(model) if model.is_dir() else ["."] if model.is_file() else []
    if not names:
        raise RequestError("model", str(model), "a file, or a directory with files")
    if out.absolute().resolve().is_relative_to(model.absolute().resolve()):
        raise RequestError("out", str(out), "a path outside the model")
    total = sum((model / name).stat().st_size for name in names)
    with byte_bar(f"{what} {model.name}", total, progress=progress) as bar:
        if not model.is_dir():
            with _appearing(out, model.stat().st_mode & mask) as target:
                convert(model, target, bar.update)
            return
        with _appearing_directory(out, model.stat().st_mode & (mask | (mask & 0o444) >> 2)) as folder:
            for name in names:
                place = folder / name
                place.parent.mkdir(parents=True, exist_ok=True)
                with _appearing(place, (model / name).stat().st_mode & mask) as target:
                    convert(model / name, target, bar.update)


@contextlib.contextmanager
def _appearing(out: Path, mode: int) -> Iterator[BinaryIO]:
    """A file to write to, which has its name once it is complete and on the disk."""
    folder = out.absolute().parent
    temporary: Path | None = None
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            descriptor = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        except OSError:  # a file system without files that have no name
            temporary = folder / f".{out.name}.{secrets.token_hex(4)}"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
            source = f"/proc/self/fd/{file.fileno()}" if temporary is None else str(temporary)
            _give_name(source, out, directory)
        os.fsync(directory)
    finally:
        os.close(directory)
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _give_name(source: str, out: Path, directory: int) -> None:
    """By a link, which does not replace what came there meanwhile; by a rename where there are no links."""
    try:
        # With dst_dir_fd it is linkat(), which follows the link that /proc has for a file without a name.
        os.link(source, out.name, dst_dir_fd=directory, follow_symlinks=True)
    except FileExistsError:
        raise RequestError("out", str(out), "a path that does not exist yet") from None
    except OSError:
        if source.startswith("/proc/"):
            raise
        os.rename(source, out)


@contextlib.contextmanager
def _appearing_directory(out: Path, mode: int) -> Iterator[Path]:
    """A directory to fill, which has its name once that is done without an error."""
    parent = out.absolute().parent
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=parent))
    try:
        yield temporary
        temporary.chmod(mode | 0o700)
        try:
            temporary.rename(out)  # an empty directory would be replaced, a full one is not
        except OSError as error:
            raise RequestError("out", str(out), "a path that does not exist yet") from error
        directory = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
