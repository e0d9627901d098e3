"""Keys of 256 bits for encryption at rest and for the audit log: where they come from, and how they are read.

A key is 32 random bytes, written as 64 hexadecimal digits or as base64, in an environment variable or in a
file that nobody else can read. A passphrase is not a key: nothing here stretches one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import secrets
import stat
from pathlib import Path

from fastllm.errors import RequestError

KEY_BYTES = 32
KEY_ENV = "FASTLLM_MODEL_KEY"
KEY_FILE_ENV = "FASTLLM_MODEL_KEY_FILE"

_LIMIT = "32 random bytes as 64 hexadecimal digits or as base64"
_MAX_FILE_BYTES = 4096
_HEX = re.compile(r"[0-9a-fA-F]{64}")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{43}=?")


def generate_key() -> str:
    """A new key, as 64 hexadecimal digits."""
    return secrets.token_hex(KEY_BYTES)


def parse_key(text: str, field: str) -> bytes:
    """The 32 bytes of a key in hexadecimal or base64 (either alphabet, padded or not).

    Raises:
        RequestError: it is something else, or all of its bytes are the same. The text is not in the message.
    """
    text = text.strip()
    if _HEX.fullmatch(text):
        key = bytes.fromhex(text)
    elif _BASE64.fullmatch(text):
        try:
            key = base64.urlsafe_b64decode(text.rstrip("=").replace("+", "-").replace("/", "_") + "=")
        except binascii.Error:
            key = b""
    else:
        key = b""
    # 43 characters have two bits to spare: a key must have one spelling, or it was cut.
    if len(key) != KEY_BYTES:
        raise RequestError(field, f"{len(text)} characters that are not", _LIMIT)
    if len(set(key)) == 1:
        raise RequestError(field, "the same byte 32 times", _LIMIT)
    return key


def read_key_file(path: str | os.PathLike[str], field: str = "key_file") -> bytes:
    """The key in a file; a pipe will do.

    Raises:
        RequestError: as `read_private`, or it holds no key.
    """
    place, content = os.fspath(path), read_private(path, field, _MAX_FILE_BYTES)
    try:
        return parse_key(content.decode("ascii"), f"{field} {place}")
    except UnicodeDecodeError:
        raise RequestError(f"{field} {place}", f"{len(content)} bytes that are not text", _LIMIT) from None


def read_private(path: str | os.PathLike[str], field: str, most: int) -> bytes:
    """What is in a file that others cannot open, or in a pipe: at most `most` bytes and one more.

    Raises:
        RequestError: the file is not there, or other users can read or write it. A group may read it where
            that is how it was given to this user: it belongs to somebody else, who is in no need of the
            group.
    """
    place = os.fspath(path)
    try:
        with open(place, "rb") as file:
            status = os.fstat(file.fileno())
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode)):
                raise RequestError(field, place, "a file")
            shared = 0o037 if status.st_uid not in (os.geteuid(), os.getuid()) else 0o077
            if status.st_mode & shared:
                mode = stat.S_IMODE(status.st_mode)
                raise RequestError(
                    field, f"{place}, mode {mode:04o}", "a file that no other user can open (chmod 600)"
                )
            return file.read(most + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(field, place, f"a file with a key ({reason})") from error


def read_key_env(name: str, field: str = "key_env") -> bytes:
    """The key in an environment variable.

    Raises:
        RequestError: there is no such variable, or it holds no key.
    """
    value = os.environ.get(name)
    if not value:
        raise RequestError(field, name, "the name of an environment variable that is set")
    return parse_key(value, name)


def write_key_file(path: str | os.PathLike[str], key: str) -> None:
    """A new file of mode 0600 with a key.

    Raises:
        RequestError: there is something at that path already.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(path, flags, 0o600), "w", encoding="ascii") as file:
            file.write(key + "\n")
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise RequestError("out", os.fspath(path), "a path that does not exist yet") from None


def key_id(key: bytes) -> str:
    """16 hexadecimal digits by which a key can be told from others; they say nothing about it."""
    return hashlib.sha256(b"fastllm key id\0" + key).hexdigest()[:16]


class KeySource:
    """Where the key of encrypted models is, read when the first encrypted file is met, and kept from then on:
    the file may be gone when a model wakes from sleep.

    Args:
        key_file: a file with the key; None: what FASTLLM_MODEL_KEY holds, or the file that
            FASTLLM_MODEL_KEY_FILE names.
    """

    def __init__(self, key_file: str | os.PathLike[str] | None = None) -> None:
        if key_file is not None and not (isinstance(key_file, (str, os.PathLike)) and os.fspath(key_file)):
            raise RequestError("key_file", key_file, "a path, or None")
        # Absolute: the process may go elsewhere before the key is needed.
        self._file = None if key_file is None else Path(os.path.abspath(key_file))
        self._key: bytes | None = None

    @classmethod
    def of(cls, key: bytes) -> KeySource:
        """A source that has the key already."""
        source = cls()
        source._key = key
        return source

    @property
    def file(self) -> Path | None:
        """The file that was named, absolute; None: the environment says."""
        return self._file

    def key(self, what: str) -> bytes:
        """The key.

        Args:
            what: the encrypted file that it is for, for the error.

        Raises:
            RequestError: there is none, or it cannot be read.
        """
        if self._key is None:
            self._key = self._read(what)
        return self._key

    def _read(self, what: str) -> bytes:
        if self._file is not None:
            return read_key_file(self._file)
        if os.environ.get(KEY_ENV):
            return read_key_env(KEY_ENV)
        named = os.environ.get(KEY_FILE_ENV)
        if named:
            return read_key_file(named, KEY_FILE_ENV)
        limit = f"the key of {what}, which is encrypted: a path, or {KEY_ENV} or {KEY_FILE_ENV}"
        raise RequestError("key_file", None, f"{limit} in the environment")

    def __repr__(self) -> str:  # never the key
        return f"KeySource({'' if self._file is None else str(self._file)!r})"
