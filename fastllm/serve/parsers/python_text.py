"""Python literals as a model writes them in a call, turned into JSON while they arrive.

Strings in either quotes, numbers, True, False, None, lists, and dicts with strings for keys; JSON's own words
and escapes too. Everything else (names, tuples, sets, sums, f-strings, triple quotes) is malformed. Nothing
is evaluated.
"""

from __future__ import annotations

import json
import re

from fastllm.serve.parsers.json_text import MAX_DEPTH, MAX_NUMBER_CHARACTERS, NUMBER, Put
from fastllm.serve.parsers.reader import MalformedError, Reader, Wait

_PLAIN = re.compile(r"""[^'"\\]+""")
_WORD = re.compile(r"[A-Za-z]+")
_NUMBER_CHARACTERS = re.compile(r"[-+.0-9eE]+")
_DECIMAL = re.compile(r"([-+]?)([0-9]*)(?:\.([0-9]*))?([eE][-+]?[0-9]+)?")
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPE = re.compile(
    r"\\(?:(x)([0-9a-fA-F]{2})|(u)([0-9a-fA-F]{4})|(U)([0-9a-fA-F]{8})|([0-7]{1,3})|(.))", re.DOTALL
)
_SIMPLE = {
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "b": "\b",
    "f": "\f",
    "a": "\a",
    "v": "\v",
    "\n": "",
    "\\": "\\",
    "'": "'",
    '"': '"',
    "/": "/",  # the last is JSON's
}


def convert_value(reader: Reader, put: Put) -> Wait[None]:
    """Take one literal, which begins here, and give the JSON text of its value to `put` in pieces.

    Raises:
        MalformedError: it is none, breaks off, or is nested more than MAX_DEPTH deep.
    """
    closing: list[str] = []
    while True:
        first = yield from reader.peek()
        if first and first in "{[":
            if len(closing) == MAX_DEPTH:
                raise MalformedError
            closing.append("}" if first == "{" else "]")
            put(reader.take(1))
            yield from reader.spaces()
            if (yield from reader.peek()) != closing[-1]:
                if first == "{":
                    yield from _key(reader, put)
                continue
        elif first and first in "'\"":
            put((yield from convert_string(reader)))
        elif first.isascii() and first.isalpha():
            word = yield from reader.run(_WORD, 5)
            if word not in _WORDS:
                raise MalformedError
            put(_WORDS[word])
        else:
            put(_number((yield from reader.run(_NUMBER_CHARACTERS, MAX_NUMBER_CHARACTERS))))
        while closing:  # what may follow a value
            yield from reader.spaces()
            after = yield from reader.peek()
            if after == ",":
                reader.take(1)
                yield from reader.spaces()
                after = yield from reader.peek()
                if after != closing[-1]:  # else the comma was the last
                    put(", ")
                    if closing[-1] == "}":
                        yield from _key(reader, put)
                    break
            if after != closing[-1]:
                raise MalformedError
            put(reader.take(1))
            closing.pop()
        else:
            return


def convert_string(reader: Reader) -> Wait[str]:
    """Take one string in either quotes; its value as JSON text."""
    quote = reader.take(1)
    pieces: list[str] = []
    while True:
        pieces.append(reader.piece(_PLAIN))
        after = yield from reader.peek()
        if not after:
            raise MalformedError
        if after == "\\":
            reader.take(1)
            after = yield from reader.peek()
            if not after:
                raise MalformedError
            pieces.append("\\" + reader.take(1))
        elif after == quote:
            reader.take(1)
            break
        elif after in "'\"":  # the other quotes
            pieces.append(reader.take(1))
    value = _unescape("".join(pieces))
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a pair, which UTF-8 has no bytes for
        return json.dumps(value)
    return json.dumps(value, ensure_ascii=False)


def _unescape(written: str) -> str:
    value = _ESCAPE.sub(_character, written)
    if "\\" in written and any("\ud800" <= c <= "\udfff" for c in value):
        # JSON's habit, and none of Python's: two escapes for one character
        value = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    return value


def _character(found: re.Match[str]) -> str:
    code = found[2] or found[4] or found[6]
    if code is not None:
        number = int(code, 16)
        if number > 0x10FFFF:
            raise MalformedError
        return chr(number)
    if found[7] is not None:
        return chr(int(found[7], 8))
    return _SIMPLE.get(found[8], found[0])


def _number(text: str) -> str:
    """A decimal number as JSON writes it: no plus before it, digits on both sides of the point."""
    if NUMBER.fullmatch(text):
        return text
    found = _DECIMAL.fullmatch(text)
    if found is None or not (found[2] or found[3]) or (found[2].startswith("0") and found[2].strip("0")):
        raise MalformedError
    sign = "-" if found[1] == "-" else ""
    whole = found[2].lstrip("0") or "0"
    point = f".{found[3] or '0'}" if found[3] is not None else ""
    return f"{sign}{whole}{point}{found[4] or ''}"


def _key(reader: Reader, put: Put) -> Wait[None]:
    first = yield from reader.peek()
    if not first or first not in "'\"":
        raise MalformedError
    put((yield from convert_string(reader)))
    yield from reader.spaces()
    yield from reader.expect(":")
    put(": ")
    yield from reader.spaces()
