"""Metadata values of a GGUF file: a checked cursor over the mapping, and arrays of strings.

Every number from the file is a Python int, which cannot wrap, and is compared with the bytes that are left
before anything is read or allocated by it. Limits that keep a hostile file's objects in proportion to its
size stand here too.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NoReturn, overload

import numpy as np
import numpy.typing as npt

from fastllm.errors import ModelFileError
from fastllm.formats.checkpoint import printable
from fastllm.formats.mapped import MappedFile

MAX_KEY_BYTES = 65_535  # the format's own limit
MAX_STRING_BYTES = 1 << 28  # the largest real one is a whole tokenizer.json, some 30 MB
MAX_ARRAY_LENGTH = 1 << 24  # the largest real vocabulary has some 262,000 tokens and twice as many merges
MAX_ARRAY_DEPTH = 4
MAX_NESTED_ARRAYS = 65_536  # in one file; no known model nests any

_STRING = 8
_ARRAY = 9
_BOOL = 7
# Value type number: name, struct format, NumPy type.
_SCALARS: dict[int, tuple[str, struct.Struct, np.dtype[Any]]] = {
    number: (name, struct.Struct("<" + code), np.dtype(name).newbyteorder("<"))
    for number, name, code in (
        (0, "uint8", "B"),
        (1, "int8", "b"),
        (2, "uint16", "H"),
        (3, "int16", "h"),
        (4, "uint32", "I"),
        (5, "int32", "i"),
        (6, "float32", "f"),
        (_BOOL, "bool", "B"),
        (10, "uint64", "Q"),
        (11, "int64", "q"),
        (12, "float64", "d"),
    )
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class StringArray(Sequence[str]):
    """An array of strings that stays in the mapped file and is decoded when read.

    A string may hold any bytes: they decode as UTF-8 with surrogateescape, which loses nothing, so that
    ``text.encode("utf-8", "surrogateescape")`` gives the bytes back; `raw` gives them directly. To read all
    of them, iterate or take `list(strings)`: much faster than one by one.
    """

    __slots__ = ("_buffer", "_starts")
    _CHUNK = 8192  # strings decoded from one copied piece of the file

    def __init__(self, buffer: memoryview, starts: npt.NDArray[np.int64]) -> None:
        # starts[i] is where the length word of string i stands; one more for where the last string ends.
        self._buffer = buffer
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def raw(self, index: int) -> bytes:
        """The exact bytes of one string."""
        index = range(len(self))[index]  # negative ones too; IndexError past the end
        return bytes(self._buffer[int(self._starts[index]) + 8 : int(self._starts[index + 1])])

    def tolist(self) -> list[str]:
        """All strings, under the name that arrays of numbers have for it."""
        return list(self)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.raw(index).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), self._CHUNK):
            starts: list[int] = self._starts[first : first + self._CHUNK + 1].tolist()
            base = starts[0]
            piece = bytes(self._buffer[base : starts[-1]])
            for start, end in pairwise(starts):
                yield piece[start - base + 8 : end - base].decode("utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StringArray | list | tuple):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # as a list

    def __repr__(self) -> str:
        return f"StringArray({len(self)} strings)"


class Cursor:
    """A position in a mapped file that only moves over bytes that are there.

    Attributes:
        position: the next byte to read.
        key, tensor: what is being read, for errors.
    """

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.position = 0
        self.key: str | None = None
        self.tensor: str | None = None
        self._buffer = file.beginning(0)
        self._nested = 0

    @property
    def left(self) -> int:
        return self.file.size - self.position

    def fail(self, reason: str, offset: int | None = None) -> NoReturn:
        """Raise ModelFileError at `offset` (default: the current position)."""
        raise ModelFileError(
            str(self.file.path),
            reason,
            key=None if self.key is None else printable(self.key),
            tensor=None if self.tensor is None else printable(self.tensor),
            offset=self.position if offset is None else offset,
        )

    def take(self, nbytes: int, what: str, blame: int | None = None) -> int:
        """Step over `nbytes` bytes and return where they begin; an error is put at `blame` or there."""
        if nbytes > self.left:
            self.fail(f"truncated: {what} takes {nbytes} bytes, {self.left} are left in the file", blame)
        start = self.position
        self.position += nbytes
        if self.position > len(self._buffer):
            self._buffer = self.file.beginning(self.position)
        return start

    def u32(self, what: str) -> int:
        start = self.take(4, what)  # may replace the buffer
        return int(_U32.unpack_from(self._buffer, start)[0])

    def u64(self, what: str) -> int:
        start = self.take(8, what)
        return int(_U64.unpack_from(self._buffer, start)[0])

    def raw_string(self, what: str, limit: int) -> bytes:
        start = self.position
        length = self.u64(f"the length of {what}")
        if length > limit:
            self.fail(f"{what} of {length} bytes is longer than {limit}", start)
        begin = self.take(length, what, start)
        return bytes(self._buffer[begin : self.position])

    def name(self, what: str, limit: int) -> str:
        """A non-empty UTF-8 string of at most `limit` bytes."""
        start = self.position
        raw = self.raw_string(what, limit)
        if not raw:
            self.fail(f"{what} is empty", start)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8: {printable(repr(raw))}", start)

    def value(self) -> tuple[Any, str]:
        """A metadata value with its type: (the value, a name such as "uint32" or "array[string]")."""
        type_offset = self.position
        number = self.u32("the type of a value")
        if number == _ARRAY:
            return self._array(1)
        if number == _STRING:
            raw = self.raw_string("a string", MAX_STRING_BYTES)
            return raw.decode("utf-8", "surrogateescape"), "string"
        if number not in _SCALARS:
            self.fail(f"unknown value type {number}", type_offset)
        name, form, _ = _SCALARS[number]
        start = self.take(form.size, f"a value of type {name}")
        value = form.unpack_from(self._buffer, start)[0]
        if number == _BOOL:
            if value > 1:
                self.fail(f"expected bool 0 or 1, got {value}", start)
            value = bool(value)
        return value, name

    def _array(self, depth: int) -> tuple[Any, str]:
        start = self.position
        number = self.u32("the element type of an array")
        count_offset = self.position
        count = self.u64("the length of an array")
        if number not in _SCALARS and number not in (_STRING, _ARRAY):
            self.fail(f"unknown array element type {number}", start)
        if count > MAX_ARRAY_LENGTH:
            self.fail(f"array of {count} elements is longer than {MAX_ARRAY_LENGTH}", count_offset)
        if number == _STRING:
            return self._strings(count), "array[string]"
        if number == _ARRAY:
            return self._arrays(count, depth), "array[array]"
        name, form, dtype = _SCALARS[number]
        begin = self.take(count * form.size, f"an array of {count} elements of type {name}")
        # A copy: it is aligned, and does not keep the mapping alive.
        values = np.frombuffer(self._buffer, np.uint8 if number == _BOOL else dtype, count, begin).copy()
        if number == _BOOL:
            if count and values.max() > 1:
                bad = int(np.argmax(values > 1))
                self.fail(f"expected bool 0 or 1, got {values[bad]} as element {bad}", begin + bad)
            values = values.view(np.bool_)
        values.flags.writeable = False
        return values, f"array[{name}]"

    def _strings(self, count: int) -> StringArray:
        if count * 8 > self.left:
            self.fail(
                f"truncated: an array of {count} strings takes at least {count * 8} bytes, "
                f"{self.left} are left in the file"
            )
        # One step per string and no more: the only way along a chain of lengths. A position past the end
        # makes the next read fail, so only the last one is left to check.
        starts = array("q", [self.position])
        unpack, append, position = _U64.unpack_from, starts.append, self.position
        while len(starts) <= count:
            buffer = self._buffer
            try:
                for _ in range(count + 1 - len(starts)):
                    position += unpack(buffer, position)[0] + 8
                    append(position)
            except (struct.error, OverflowError):
                # Past what is there, or only past what can be read so far.
                if not len(buffer) < position + 8 <= self.file.size:
                    self._blame_string(starts)
                self._buffer = self.file.beginning(position + 8)
        if len(self._buffer) < position <= self.file.size:
            self._buffer = self.file.beginning(position)
        offsets = np.frombuffer(starts, np.int64)
        if position > self.file.size or (count and int(np.diff(offsets).max()) > MAX_STRING_BYTES + 8):
            self._blame_string(starts)
        self.position = position
        return StringArray(self._buffer, offsets)

    def _blame_string(self, starts: array[int]) -> NoReturn:
        """Find the element at fault in a chain of strings, and raise."""
        lengths = np.diff(np.frombuffer(starts, np.int64)) - 8
        long = np.flatnonzero(lengths > MAX_STRING_BYTES)
        # Where the chain broke off: after a string that reaches past the end, or at a length word that does.
        broken = len(starts) - 1 - (starts[-1] > self.file.size)
        bad = int(long[0]) if long.size else broken
        self.position = starts[bad]
        self.raw_string(f"element {bad} of an array of strings", MAX_STRING_BYTES)
        raise AssertionError("unreachable: the element at fault was read")

    def _arrays(self, count: int, depth: int) -> list[Any]:
        self._nested += count
        if depth >= MAX_ARRAY_DEPTH:
            self.fail(f"arrays are nested more than {MAX_ARRAY_DEPTH} deep")
        if self._nested > MAX_NESTED_ARRAYS:
            self.fail(f"more than {MAX_NESTED_ARRAYS} nested arrays")
        return [self._array(depth + 1)[0] for _ in range(count)]
