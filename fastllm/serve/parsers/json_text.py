"""JSON as a model writes it, checked while it arrives.

`scan_value` hands on the text of one value as it is, and never a character that makes it malformed. It keeps
its own stack of open brackets: depth costs memory of the parser, not of Python's stack, and is bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection

from fastllm.serve.parsers.reader import MalformedError, Reader, Wait

MAX_DEPTH = 128  # objects and arrays within each other; readers of JSON recurse
MAX_NUMBER_CHARACTERS = 1000  # Python reads integers of up to 4300 digits

Put = Callable[[str], object]

_SPACES = re.compile(r"[ \t\r\n]+")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_HEX = re.compile(r"[0-9a-fA-F]+")
_NUMBER_CHARACTERS = re.compile(r"[-+.0-9eE]+")
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")


def scan_value(reader: Reader, put: Put) -> Wait[None]:
    """Take one JSON value, which begins here, and give its text to `put` in pieces.

    Raises:
        MalformedError: it is no JSON, breaks off, or is nested more than MAX_DEPTH deep.
    """
    closing: list[str] = []
    while True:
        first = yield from reader.peek()
        if first and first in "{[":
            if len(closing) == MAX_DEPTH:
                raise MalformedError
            closing.append("}" if first == "{" else "]")
            put(reader.take(1))
            yield from _spaces(reader, put)
            if (yield from reader.peek()) != closing[-1]:
                if first == "{":
                    yield from _key(reader, put)
                continue
        elif first == '"':
            yield from scan_string(reader, put)
        elif first in ("t", "f", "n"):
            word = {"t": "true", "f": "false", "n": "null"}[first]
            yield from reader.expect(word)
            put(word)
        else:
            number = yield from reader.run(_NUMBER_CHARACTERS, MAX_NUMBER_CHARACTERS)
            if NUMBER.fullmatch(number) is None:
                raise MalformedError
            put(number)
        while closing:  # what may follow a value
            yield from _spaces(reader, put)
            after = yield from reader.peek()
            if after == ",":
                put(reader.take(1))
                yield from _spaces(reader, put)
                if closing[-1] == "}":
                    yield from _key(reader, put)
                break
            if after != closing[-1]:
                raise MalformedError
            put(reader.take(1))
            closing.pop()
        else:
            return


def scan_string(reader: Reader, put: Put) -> Wait[None]:
    """Take one JSON string, quotes included; as `scan_value`."""
    yield from reader.expect('"')
    put('"')
    while True:
        piece = reader.piece(_PLAIN)
        if piece:
            put(piece)
        after = yield from reader.peek()
        if after == '"':
            put(reader.take(1))
            return
        if after == "\\":
            yield from _escape(reader, put)
        elif not after or _PLAIN.match(after) is None:
            raise MalformedError


def read_string(reader: Reader, most: int) -> Wait[str]:
    """The text of a JSON string of at most `most` characters as it is written, without its quotes."""
    pieces: list[str] = []
    size = -2

    def put(text: str) -> None:
        nonlocal size
        size += len(text)
        if size > most:
            raise MalformedError
        pieces.append(text)

    yield from scan_string(reader, put)
    text: str = json.loads("".join(pieces))
    return text


def read_word(reader: Reader, words: Collection[str]) -> Wait[str]:
    """The text of a JSON string that is one of `words`.

    Raises:
        MalformedError: at the first character that leaves none of them possible.
    """
    yield from reader.expect('"')
    text = ""
    while True:
        after = yield from reader.peek()
        if after == '"' and text in words:
            reader.take(1)
            return text
        if after == "\\":
            pieces: list[str] = []
            yield from _escape(reader, pieces.append)
            text += json.loads(f'"{pieces[0]}"')
        else:
            text += after
        if not after or not any(word.startswith(text) for word in words):
            raise MalformedError
        if after != "\\":
            reader.take(1)


def is_object(text: str) -> bool:
    """Whether a text is one JSON object, and nothing besides."""
    reader = Reader(text.strip(" \t\r\n"), final=True)
    try:
        for _ in scan_value(reader, _ignore):
            pass
    except MalformedError:
        return False
    return reader.available == 0 and text.lstrip(" \t\r\n").startswith("{")


def _ignore(text: str) -> None:
    pass


def _spaces(reader: Reader, put: Put) -> Wait[None]:
    while True:
        piece = reader.piece(_SPACES)
        if piece:
            put(piece)
        if reader.available or reader.final:
            return
        yield


def _key(reader: Reader, put: Put) -> Wait[None]:
    yield from scan_string(reader, put)
    yield from _spaces(reader, put)
    yield from reader.expect(":")
    put(":")
    yield from _spaces(reader, put)


def _escape(reader: Reader, put: Put) -> Wait[None]:
    text = reader.take(1)
    after = yield from reader.peek()
    if not after or after not in '"\\/bfnrtu':
        raise MalformedError
    text += reader.take(1)
    if after == "u":
        for _ in range(4):
            digit = yield from reader.peek()
            if not digit or _HEX.match(digit) is None:
                raise MalformedError
            text += reader.take(1)
    put(text)
