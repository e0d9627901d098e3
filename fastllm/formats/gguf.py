"""Reading GGUF files, versions 2 and 3, little-endian: a memory-mapped reader that trusts nothing.

Layout of a file (all numbers little-endian)::

    "GGUF"  u32 version  u64 number of tensors  u64 number of metadata keys
    metadata:  string key, u32 type, value                        (gguf_values.py)
    tensors:   string name, u32 n_dims, u64 ne[n_dims], u32 type, u64 offset
    padding to `general.alignment` (32 unless given)
    data:      each tensor at its offset from here, a multiple of the alignment

A string is a u64 length and that many bytes. ne[0] is the innermost dimension, the one cut into blocks.

Opening a file reads its head only, in time and memory proportional to the head; a file that breaks a rule
raises ModelFileError before anything is allocated by a number in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fastllm.errors import UnsupportedModelError
from fastllm.formats.checkpoint import Checkpoint, CheckpointTensor, Fields, printable
from fastllm.formats.decrypted import open_mapped
from fastllm.formats.ggml_types import BLOCK_SIZES, REMOVED_TYPES, GGMLType
from fastllm.formats.gguf_values import MAX_KEY_BYTES, Cursor, StringArray
from fastllm.formats.keys import KeySource

__all__ = ["BLOCK_SIZES", "GGMLType", "GGUFCheckpoint", "GGUFFields", "GGUFFile", "StringArray", "TensorInfo"]

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_TENSOR_NAME_BYTES = 64
# More than any model has by far; what each entry costs as Python objects stays under the fixed allowance.
MAX_TENSORS = 65_536
MAX_KEYS = 65_536

# The fewest bytes that an entry can take, to refuse a count that the file cannot hold.
_MIN_KEY_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: row-major, outermost first (the file's ne reversed).
        type: storage type.
        offset: absolute position in the file, bytes.
        nbytes: length of its data.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    nbytes: int


class GGUFFields(Fields):
    """GGUF metadata. Arrays of numbers are read-only NumPy arrays, arrays of strings `StringArray`."""

    names: ClassVar[Mapping[type, str]] = {
        bool: "bool",
        int: "uint32",
        float: "float32",
        str: "string",
        list: "array",
        dict: "object",
    }
    number_types: ClassVar[tuple[type, ...]] = (float,)

    def __init__(
        self, file: str | os.PathLike[str], values: Mapping[str, Any], types: Mapping[str, str]
    ) -> None:
        super().__init__(file, values)
        self._types = types

    def type_name(self, key: str) -> str:
        return self._types[key]


class GGUFFile:
    """The head of a GGUF file, fully checked, over the mapped file.

    Attributes:
        path, version, alignment: as in the file.
        encrypted: whether it is encrypted on disk.
        metadata: key to value, in the order of the file.
        infos: tensor name to `TensorInfo`, in the order of the file.
        data_offset: where the tensor data begins, bytes.

    Raises:
        ModelFileError: the file is damaged, big-endian, or of another version.
        UnsupportedModelError: a tensor has a type whose size is not known.
    """

    def __init__(self, path: str | os.PathLike[str], keys: KeySource | None = None) -> None:
        self.path = Path(path)
        self._file = open_mapped(self.path, keys)
        self.encrypted = self._file.encrypted
        try:
            cursor = Cursor(self._file)
            self.version, tensor_count, key_count = _read_start(cursor)
            self.metadata = _read_metadata(cursor, key_count)
            self.alignment = _alignment(self.metadata)
            relative = _read_infos(cursor, tensor_count)
            self.data_offset = -(-cursor.position // self.alignment) * self.alignment
            self.infos = _place(cursor, relative, self.data_offset, self.alignment)
        except BaseException:
            self._file.close()
            raise

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """uint8[nbytes] over the mapped file, read-only. KeyError for a name that is not there."""
        info = self.infos[name]
        return self._file.view(info.offset, info.nbytes)

    def tensor(self, name: str) -> CheckpointTensor:
        """A tensor, whose data is not read for it. KeyError for a name that is not there."""
        info = self.infos[name]
        return self._file.tensor(name, info.shape, info.type.name, info.offset, info.nbytes)

    def release(self, name: str) -> None:
        """Drop the pages of a tensor from this process; reading it again still works."""
        info = self.infos[name]
        self._file.release(info.offset, info.nbytes)

    def close(self) -> None:
        """Give the memory back; views and string arrays that are held stay readable."""
        self._file.close()


class _Tensors(Mapping[str, CheckpointTensor]):
    """Tensors by name; the views are made on lookup."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file

    def __getitem__(self, name: str) -> CheckpointTensor:
        return self._file.tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._file.infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.infos)

    def __len__(self) -> int:
        return len(self._file.infos)


class GGUFCheckpoint(Checkpoint):
    """A model in one GGUF file.

    Attributes:
        file: the reader underneath.

    Raises:
        UnsupportedModelError: the file is one part of a split model.
    """

    kind = "gguf"

    def __init__(self, path: str | os.PathLike[str], keys: KeySource | None = None) -> None:
        self.keys = KeySource() if keys is None else keys
        self.file = GGUFFile(path, self.keys)
        self.path = self.file.path
        self.config: GGUFFields = self.file.metadata
        self.generation_config = Fields(self.path, {})
        self.tensors = _Tensors(self.file)
        try:
            parts = self.config.integer("split.count", 1)
            if parts > 1:
                raise UnsupportedModelError(
                    f"{self.path}: one of {parts} parts of a split GGUF model; merge them into one file first"
                )
        except BaseException:
            self.close()
            raise

    @property
    def encrypted(self) -> bool:
        return self.file.encrypted

    def release(self, name: str) -> None:
        self.file.release(name)

    def close(self) -> None:
        self.file.close()


def _read_start(cursor: Cursor) -> tuple[int, int, int]:
    """Magic, version and the two counts."""
    begin = cursor.take(4, "the magic number")
    magic = cursor.file.read(begin, 4)
    if magic != b"GGUF":
        cursor.fail(f"not a GGUF file: it begins with {magic!r}", begin)
    version = cursor.u32("the version")
    if version not in VERSIONS:
        if version and version & 0xFFFF == 0:
            cursor.fail("a big-endian GGUF file; only little-endian ones are read", 4)
        cursor.fail(f"GGUF version {version}; versions 2 and 3 are read", 4)
    tensor_count = cursor.u64("the number of tensors")
    key_count = cursor.u64("the number of metadata keys")
    for what, count, limit, smallest, offset in (
        ("tensors", tensor_count, MAX_TENSORS, _MIN_TENSOR_BYTES, 8),
        ("metadata keys", key_count, MAX_KEYS, _MIN_KEY_BYTES, 16),
    ):
        if count > limit:
            cursor.fail(f"{count} {what} are more than {limit}", offset)
        if count * smallest > cursor.left:
            cursor.fail(f"truncated: {count} {what} take at least {count * smallest} bytes, "
                        f"{cursor.left} are left in the file", offset)  # fmt: skip
    return version, tensor_count, key_count


def _read_metadata(cursor: Cursor, count: int) -> GGUFFields:
    values: dict[str, Any] = {}
    types: dict[str, str] = {}
    for index in range(count):
        cursor.key = f"metadata key {index}"
        start = cursor.position
        key = cursor.name("the key", MAX_KEY_BYTES)
        cursor.key = key
        if key in values:
            cursor.fail("the key is there twice", start)
        values[key], types[key] = cursor.value()
        if key == "general.alignment" and not _is_alignment(values[key], types[key]):
            cursor.fail(f"expected uint32 power of two, got {types[key]} {values[key]!r:.50}", start)
    cursor.key = None
    return GGUFFields(cursor.file.path, values, types)


def _is_alignment(value: Any, type_name: str) -> bool:
    return type_name == "uint32" and value > 0 and value & (value - 1) == 0


def _alignment(metadata: GGUFFields) -> int:
    return int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))


def _read_infos(cursor: Cursor, count: int) -> dict[str, TensorInfo]:
    """The table of tensors; offsets are still relative to the data."""
    infos: dict[str, TensorInfo] = {}
    for index in range(count):
        cursor.tensor = str(index)
        start = cursor.position
        name = cursor.name("the tensor name", MAX_TENSOR_NAME_BYTES)
        cursor.tensor = name
        if name in infos:
            cursor.fail("the tensor is there twice", start)
        infos[name] = _read_info(cursor, name)
    cursor.tensor = None
    return infos


def _read_info(cursor: Cursor, name: str) -> TensorInfo:
    start = cursor.position
    n_dims = cursor.u32("the number of dimensions")
    if not 1 <= n_dims <= MAX_DIMS:
        cursor.fail(f"{n_dims} dimensions; 1 to {MAX_DIMS} are possible", start)
    shape_offset = cursor.position
    ne = [cursor.u64("a dimension") for _ in range(n_dims)]
    if 0 in ne:
        cursor.fail(f"a dimension is zero: {ne}", shape_offset)
    type_offset = cursor.position
    number = cursor.u32("the tensor type")
    try:
        kind = GGMLType(number)
    except ValueError:
        removed = REMOVED_TYPES.get(number)
        what = f"{removed} (type {number}), which the format has dropped" if removed else f"number {number}"
        raise UnsupportedModelError(
            f"{cursor.file.path}: tensor {printable(name)}: offset {type_offset}: unknown tensor type {what}"
        ) from None
    block, block_bytes = BLOCK_SIZES[kind]
    if ne[0] % block:
        cursor.fail(f"rows of {ne[0]} weights are not whole blocks of {block} ({kind.name})", shape_offset)
    nbytes = ne[0] // block * block_bytes
    for n in ne[1:]:
        nbytes *= n  # Python ints do not wrap
    if nbytes > cursor.file.size:
        cursor.fail(f"{kind.name} of ne = {ne} takes {nbytes} bytes, the file has {cursor.file.size}",
                    shape_offset)  # fmt: skip
    offset = cursor.u64("the data offset")
    return TensorInfo(name, tuple(reversed(ne)), kind, offset, nbytes)


def _place(
    cursor: Cursor, infos: dict[str, TensorInfo], data_offset: int, alignment: int
) -> dict[str, TensorInfo]:
    """Absolute offsets, each tensor's data inside the file, aligned, and apart from every other's."""
    size = cursor.file.size
    placed: dict[str, TensorInfo] = {}
    for name, info in infos.items():
        cursor.tensor = name
        begin = data_offset + info.offset
        if info.offset % alignment:
            cursor.fail(f"data offset {info.offset} is not a multiple of the alignment {alignment}", begin)
        if begin + info.nbytes > size:
            cursor.fail(f"truncated: its data ends at byte {begin + info.nbytes}, the file at {size}", begin)
        placed[name] = TensorInfo(name, info.shape, info.type, begin, info.nbytes)
    end, before = data_offset, ""
    for info in sorted(placed.values(), key=lambda info: info.offset):
        if info.offset < end:
            cursor.tensor = info.name
            cursor.fail(f"its data overlaps that of tensor {printable(before)}, which ends at byte {end}",
                        info.offset)  # fmt: skip
        end, before = info.offset + info.nbytes, info.name
    cursor.tensor = None
    return placed
