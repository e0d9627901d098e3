"""One line of an audit log, and how each is tied to the line before it.

A line is a JSON object and a newline. Its first member is "seq", counting from 0 through all files of the
log; its last two are "prev", the hash of the line before (64 zeros for the first), and "hash":

    hash = H(the line's bytes up to and without ',"hash":...}', and '}')

H is SHA-256, or HMAC-SHA-256 where the log has a key. The hash covers "prev", and so everything before it.
Without a key whoever can write to the file can make a whole chain anew; with one that takes the key.

The texts of a request are not in the log, only their hashes, to prove later what was asked and said. The
hash of a short text can be found by trying texts, so with a key that is an HMAC too, under another key.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GENESIS = "0" * 64
_SEQUENCE = re.compile(rb'\{"seq":(0|[1-9][0-9]{0,17}),')
_LINKS = re.compile(rb',"prev":"([0-9a-f]{64})","hash":"([0-9a-f]{64})"\}')
_LINKS_BYTES = len(b',"prev":"') + 64 + len(b'","hash":"') + 64 + len(b'"}')
_HASH_BYTES = len(b',"hash":"') + 64 + len(b'"')


class Hasher:
    """The hashes of a log.

    Args:
        key: 32 bytes, or None.

    Attributes:
        text_kind: what the hash of a text is called in a line: "sha256" or "hmac_sha256".
    """

    def __init__(self, key: bytes | None) -> None:
        self._chain = None if key is None else hmac.digest(key, b"fastllm audit chain", "sha256")
        self._text = None if key is None else hmac.digest(key, b"fastllm audit text", "sha256")
        self.text_kind = "sha256" if key is None else "hmac_sha256"

    def line(self, body: bytes) -> str:
        """Of a line without its hash, in hexadecimal."""
        return _digest(self._chain, body)

    def text(self, text: str | bytes) -> str:
        """Of a prompt or an answer: a str counts as UTF-8, lone surrogates included."""
        return _digest(self._text, text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))


def _digest(key: bytes | None, data: bytes) -> str:
    if key is None:
        return hashlib.sha256(data).hexdigest()
    return hmac.digest(key, data, "sha256").hex()


class Chain:
    """The end of a chain, to which lines are added.

    Attributes:
        sequence: number of the next line.
        previous: hash of the last one.
    """

    def __init__(self, hasher: Hasher, sequence: int = 0, previous: str = GENESIS) -> None:
        self._hasher = hasher
        self.sequence = sequence
        self.previous = previous

    def add(self, body: Mapping[str, Any]) -> bytes:
        """The next line, newline included; `body` has neither "seq" nor "prev" nor "hash"."""
        told = {"seq": self.sequence, **body, "prev": self.previous}
        text = json.dumps(told, separators=(",", ":"), allow_nan=False).encode("ascii")
        self.previous = self._hasher.line(text)
        self.sequence += 1
        return b'%b,"hash":"%b"}\n' % (text[:-1], self.previous.encode("ascii"))


@dataclass(frozen=True, slots=True)
class Line:
    """A line as it was found.

    Attributes:
        sequence, previous, hash: as it says.
        genuine: whether its hash is that of its bytes.
        raw: the line without its newline.
    """

    sequence: int
    previous: str
    hash: str
    genuine: bool
    raw: bytes

    def body(self) -> dict[str, Any]:
        """Its members; of no meaning unless it is genuine. Empty where it is no JSON object."""
        try:
            value = json.loads(self.raw)
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}


def parse_line(raw: bytes, hasher: Hasher) -> Line | None:
    """A line without its newline; None: it has not the form of one."""
    start = _SEQUENCE.match(raw)
    links = _LINKS.fullmatch(raw, max(len(raw) - _LINKS_BYTES, 0))
    if start is None or links is None:
        return None
    previous, said = links[1].decode(), links[2].decode()
    genuine = hmac.compare_digest(hasher.line(raw[: -_HASH_BYTES - 1] + b"}"), said)
    return Line(int(start[1]), previous, said, genuine, raw)
