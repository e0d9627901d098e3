"""Who may call: API keys, known by their digests alone.

A key file has one key a line, `NAME sha256:DIGEST` or `NAME KEY`; empty lines and those that begin with # are
skipped. `python -m fastllm.serve keygen NAME` makes a key and its line. Keys in FASTLLM_API_KEY (with commas
between) are called "env-1", "env-2", ...

A key is 32 random bytes, so that a plain SHA-256 of it cannot be searched through; a key somebody thought up
can, and is refused where it is shorter than 16 characters. Comparing takes the same time whatever was
presented: its digest is held against every known one (CVE-2025-59425).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fastllm.errors import RequestError
from fastllm.formats.keys import read_private

SHORTEST = 16  # characters
FILE_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Key:
    """A key that is known.

    Attributes:
        name: what logs and limits call its owner.
        digest: SHA-256 of the key.
    """

    name: str
    digest: bytes


class KeyRing:
    """Keys of one kind.

    Raises:
        RequestError: two have the same name.
    """

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self._keys = tuple(keys)
        names = [key.name for key in self._keys]
        for name in names:
            if names.count(name) > 1:
                raise RequestError("key name", name, "a name that no other key has")

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, presented: str) -> Key | None:
        """The key that this is, None for none; in the same time for all."""
        digest = _digest(presented)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    @classmethod
    def read(cls, file: Path | None, variable: str) -> KeyRing:
        """Keys from a file and from an environment variable.

        Raises:
            RequestError: the file cannot be read, is readable by others, or has no key or a bad line.
        """
        keys = [] if file is None else list(_keys_of(file))
        if file is not None and not keys:  # else everybody would be let in
            raise RequestError("key file", str(file), "a file with at least one key")
        given = [item.strip() for item in os.environ.get(variable, "").split(",") if item.strip()]
        keys += [Key(f"env-{number}", _settle(variable, item)) for number, item in enumerate(given, 1)]
        return cls(keys)


def make_key(name: str) -> tuple[str, str]:
    """A new key, and its line for a key file.

    Raises:
        RequestError: the name has other characters than letters, digits, ".", "_" and "-".
    """
    key = "sk-" + secrets.token_urlsafe(32)
    return key, f"{_check_name('name', name)} sha256:{_digest(key).hex()}"


def _keys_of(file: Path) -> Iterable[Key]:
    content = read_private(file, "key file", FILE_BYTES)
    if len(content) > FILE_BYTES:
        raise RequestError("key file", str(file), f"at most {FILE_BYTES} bytes")
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError as error:
        raise RequestError("key file", str(file), "a file of text") from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        place = f"{file}: line {number}"
        words = line.split()
        if len(words) != 2:
            raise RequestError(place, f"{len(words)} words", "a name and a key, or its sha256:...")
        yield Key(_check_name(place, words[0]), _settle(place, words[1]))


def _settle(place: str, text: str) -> bytes:
    """The digest of a key, or that which stands there."""
    if text.startswith("sha256:"):
        match = _DIGEST.fullmatch(text)
        if match is None:
            raise RequestError(place, "sha256:...", "64 hexadecimal digits after sha256:")
        return bytes.fromhex(match[1])
    if len(text) < SHORTEST:
        raise RequestError(place, "a key", f"a key of at least {SHORTEST} characters")
    return _digest(text)


def _check_name(place: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise RequestError(place, name, "a name of letters, digits, '.', '_' and '-'")
    return name


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
