"""Reading a Hugging Face model directory: config.json and safetensors, in one file or sharded.

Layout of a safetensors file::

    u64 length of the header (little-endian)
    the header: a JSON object, name -> {"dtype", "shape", "data_offsets": [begin, end]}
    data: the tensors one behind the other; offsets count from here

The header is parsed here and not by the safetensors library, because that does not give the places of the
tensors, and so no views of the mapping. The rules are the same and all of them are checked: offsets in the
file, no overlap and no hole, and shape times element size equal to the bytes.

Nothing but JSON and safetensors is ever read from the directory: pickled weights are refused, and code that
config.json names in `auto_map` is not looked at.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllm.errors import ModelFileError, RequestError, UnsupportedModelError
from fastllm.formats.checkpoint import Checkpoint, CheckpointTensor, Fields, printable
from fastllm.formats.decrypted import open_mapped
from fastllm.formats.encryption import MAGIC, decrypt_small
from fastllm.formats.keys import KeySource
from fastllm.formats.mapped import MappedFile

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_CONFIG_BYTES = 1 << 21
MAX_INDEX_BYTES = 1 << 26
# JSON values, by their commas and brackets. A short value costs some 25 times its text as a Python object; so
# many of them cost less than 16 times the text and 64 MB. A tensor has nine, and no file 80,000 tensors.
MAX_VALUES = 750_000
MAX_DIMS = 32
_MAX_INT = (1 << 63) - 1

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")

# Bits of an element. GGUF and safetensors spell the types that they share alike.
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


def read_json(path: Path, limit: int, keys: KeySource | None = None) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes, decrypted if need be.

    Raises:
        ModelFileError: the file is missing, too large, not UTF-8, not JSON, or not an object.
    """
    return parse_json(path, read_small(path, limit, keys))


def read_small(path: Path, limit: int, keys: KeySource | None = None) -> bytes:
    """The bytes of a file, decrypted if need be, of which there may be `limit` at most.

    Raises:
        ModelFileError: the file is missing, not a regular file, or too large.
    """
    try:
        if path.exists() and not path.is_file():  # opening a FIFO would wait
            raise ModelFileError(str(path), "not a regular file")
        with open(path, "rb") as file:
            text = file.read(limit + 1)
    except OSError as error:
        raise ModelFileError(str(path), error.strerror or str(error)) from error
    if text.startswith(MAGIC):
        return decrypt_small(path, KeySource() if keys is None else keys, limit)
    if len(text) > limit:
        raise ModelFileError(str(path), f"larger than {limit} bytes")
    return text


class SafetensorsFile:
    """One safetensors file, its header fully checked, mapped.

    Attributes:
        path: the file.
        infos: tensor name to `TensorPlace`, in the order of the data.
        metadata: the strings under `__metadata__`.
        encrypted: whether it is encrypted on disk.

    Raises:
        ModelFileError: the file is damaged.
        UnsupportedModelError: a tensor has an element type that is not known.
    """

    def __init__(self, path: str | os.PathLike[str], keys: KeySource | None = None) -> None:
        self.path = Path(path)
        self._file = open_mapped(self.path, keys)
        self.encrypted = self._file.encrypted
        try:
            self.metadata, self.infos = _read_header(self._file)
        except BaseException:
            self._file.close()
            raise

    def tensor(self, name: str) -> CheckpointTensor:
        place = self.infos[name]
        return self._file.tensor(name, place.shape, place.dtype, place.offset, place.nbytes)

    def sha256(self) -> bytes:
        """The digest of the whole file, decrypted if need be."""
        return self._file.sha256()

    def release(self, name: str) -> None:
        place = self.infos[name]
        self._file.release(place.offset, place.nbytes)

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Shape (row-major), element type, absolute offset and length in bytes of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


class _Tensors(Mapping[str, CheckpointTensor]):
    """Tensors by name over all shards; the views are made on lookup."""

    def __init__(self, home: dict[str, SafetensorsFile]) -> None:
        self._home = home

    def __getitem__(self, name: str) -> CheckpointTensor:
        return self._home[name].tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)


class SafetensorsCheckpoint(Checkpoint):
    """A model directory.

    The weights are `model.safetensors`, or the shards that `model.safetensors.index.json` lists (it says
    which tensor is where, and a tensor that it does not list is no part of the model), or the only
    *.safetensors file there is.

    Raises:
        ModelFileError: a file is missing or damaged.
        UnsupportedModelError: the directory has pickled weights only.
        RequestError: the directory has no config.json.
    """

    kind = "hf"

    def __init__(self, path: str | os.PathLike[str], keys: KeySource | None = None) -> None:
        self.path = Path(path)
        self.keys = KeySource() if keys is None else keys
        config = self.path / "config.json"
        if not config.exists():
            raise RequestError("model", str(path), "a .gguf file or a directory with config.json")
        self.config = Fields(config, read_json(config, MAX_CONFIG_BYTES, self.keys))
        generation = self.path / "generation_config.json"
        self.generation_config = Fields(
            generation, read_json(generation, MAX_CONFIG_BYTES, self.keys) if generation.exists() else {}
        )
        self._files: list[SafetensorsFile] = []
        try:
            self._home = self._open_files()
        except BaseException:
            self.close()
            raise
        self.tensors = _Tensors(self._home)

    @property
    def encrypted(self) -> bool:
        return any(file.encrypted for file in self._files)

    def release(self, name: str) -> None:
        self._home[name].release(name)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _open(self, path: Path) -> SafetensorsFile:
        self._files.append(SafetensorsFile(path, self.keys))
        return self._files[-1]

    def _open_files(self) -> dict[str, SafetensorsFile]:
        index = self.path / INDEX_NAME
        if not (self.path / SINGLE_NAME).exists() and index.exists():
            return self._open_shards(index)
        file = self._open(_only_weights(self.path))
        return dict.fromkeys(file.infos, file)

    def _open_shards(self, index: Path) -> dict[str, SafetensorsFile]:
        weight_map = Fields(index, read_json(index, MAX_INDEX_BYTES, self.keys)).section("weight_map")
        if not weight_map:
            raise weight_map.error("weight_map", "lists no tensor")
        shards: dict[str, SafetensorsFile] = {}
        home: dict[str, SafetensorsFile] = {}
        for name in weight_map:
            shard = weight_map.string(name)
            if shard not in shards:
                if not _is_plain_name(shard):
                    raise weight_map.error(
                        name, f"expected the name of a .safetensors file in the directory, got {shard!r:.100}"
                    )
                shards[shard] = self._open(self.path / shard)
            if name not in shards[shard].infos:
                raise ModelFileError(str(self.path / shard), f"not there, though {INDEX_NAME} says so",
                                     tensor=printable(name))  # fmt: skip
            home[name] = shards[shard]
        return home


def _is_plain_name(name: str) -> bool:
    return name.endswith(".safetensors") and name.isprintable() and not set(name) & {"/", "\\", "\0"}


def _only_weights(directory: Path) -> Path:
    """The safetensors file of a directory without an index."""
    single = directory / SINGLE_NAME
    if single.exists():
        return single
    names = sorted(entry.name for entry in directory.iterdir())
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        return directory / found[0]
    if found:
        shown = ", ".join(found[:5])
        raise ModelFileError(str(directory), f"several safetensors files and no {INDEX_NAME}: {shown}")
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled:
        raise UnsupportedModelError(
            f"{directory}: the weights are pickled ({pickled[0]}), and pickle runs code when it is read; "
            "convert them to safetensors"
        )
    raise ModelFileError(str(directory), "no *.safetensors file")


def parse_json(path: Path, text: bytes, offset: int = 0) -> dict[str, Any]:
    """The JSON object that a file has at `offset`.

    Raises:
        ModelFileError: not UTF-8, not JSON, not an object, or of too many values.
    """
    if sum(map(text.count, (b"{", b"[", b","))) > MAX_VALUES:
        raise ModelFileError(str(path), f"more than {MAX_VALUES} JSON values", offset=offset)
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ModelFileError(str(path), "not UTF-8", offset=offset + error.start) from None
    except json.JSONDecodeError as error:
        raise ModelFileError(str(path), f"not JSON: {error.msg}", offset=offset + error.pos) from None
    except (ValueError, RecursionError) as error:  # a duplicate key, a number too long, nested too deep
        raise ModelFileError(str(path), f"not usable JSON: {error}", offset=offset) from None
    if not isinstance(value, dict):
        raise ModelFileError(str(path), f"expected object, got {type(value).__name__}", offset=offset)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that is there twice has no one meaning."""
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {printable(twice)} is there twice")
    return values


def _read_header(file: MappedFile) -> tuple[dict[str, str], dict[str, TensorPlace]]:
    path = str(file.path)
    if file.size < 8:
        raise ModelFileError(path, f"truncated: {file.size} bytes are too few for a header", offset=0)
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise ModelFileError(path, f"a header of {length} bytes is longer than {MAX_HEADER_BYTES}", offset=0)
    if length > file.size - 8:
        raise ModelFileError(
            path,
            f"truncated: the header takes {length} bytes, {file.size - 8} are left in the file",
            offset=8,
        )
    header = Fields(path, parse_json(file.path, file.read(8, length), 8))
    metadata = header.section("__metadata__", {})
    strings = {key: metadata.string(key) for key in metadata}
    places = [
        (name, _place(header.section(name), name, path, 8 + length, file.size))
        for name in header
        if name != "__metadata__"
    ]
    places.sort(key=lambda item: (item[1].offset, item[1].nbytes))
    end = 8 + length
    for name, place in places:
        if place.offset != end:
            fault = "overlaps the tensor before it" if place.offset < end else "leaves a hole before it"
            raise ModelFileError(path, f"its data {fault}: expected to begin at byte {end}",
                                 tensor=printable(name), offset=place.offset)  # fmt: skip
        end += place.nbytes
    if end != file.size:
        raise ModelFileError(path, f"the tensors end at byte {end}, the file at {file.size}", offset=end)
    return strings, dict(places)


def _place(entry: Fields, name: str, path: str, data_offset: int, size: int) -> TensorPlace:
    """One entry of the header, checked by itself."""

    def error(reason: str, offset: int | None = None) -> ModelFileError:
        return ModelFileError(path, reason, tensor=printable(name), offset=offset)

    dtype = entry.string("dtype")
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        raise UnsupportedModelError(f"{path}: tensor {printable(name)}: unknown element type {dtype!r:.40}")
    shape = entry.integers("shape")
    # The bounds first: Python neither multiplies nor prints integers of any length in bounded time.
    if len(shape) > MAX_DIMS or not all(0 <= n <= _MAX_INT for n in shape):
        raise error(f"shape: expected at most {MAX_DIMS} dimensions from 0 to 2**63 - 1")
    offsets = entry.integers("data_offsets")
    if len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1] <= _MAX_INT:
        raise error("data_offsets: expected [begin, end] with 0 <= begin <= end < 2**63")
    begin, end = (data_offset + n for n in offsets)
    if end > size:
        raise error(f"truncated: its data ends at byte {end}, the file at {size}", begin)
    nbytes, odd_bits = divmod(math.prod(shape) * bits, 8)  # Python ints, which do not wrap
    if odd_bits or nbytes != end - begin:
        odd = f" and {odd_bits} bits" if odd_bits else ""
        raise error(f"{dtype} of shape {shape} takes {nbytes} bytes{odd}, its data has {end - begin}", begin)
    return TensorPlace(tuple(shape), dtype, begin, nbytes)
