"""What the layers above see of a model on disk, whichever format it has: its configuration and tensors.

Configuration values are read through `Fields`, whose getters check the type and name the file and the key
when it is not the expected one; nothing above this layer meets a bare KeyError or TypeError.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt

from fastllm.errors import ModelFileError, RequestError

if TYPE_CHECKING:
    from fastllm.formats.keys import KeySource


class Missing(Enum):
    """The type of `REQUIRED`, the default of a getter whose key must be there."""

    REQUIRED = "required"


REQUIRED: Final = Missing.REQUIRED


def printable(name: str, limit: int = 100) -> str:
    """A name from a file in a form that is safe to put into one line of an error message."""
    shown = name if name.isprintable() and name else repr(name)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointTensor:
    """One tensor as the file stores it.

    Attributes:
        name: its name in the file.
        shape: row-major, outermost first; a GGUF matrix with ne = [K, N] has shape (N, K).
        dtype: storage type, spelled as ggml does: "F32", "F16", "BF16", "Q4_0", ...
        data: uint8[nbytes], a read-only view of the mapped file. A safetensors tensor need not start at a
            multiple of its element size.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    data: npt.NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        """Length of `data`, which is not read for it."""
        return self.data.size

    def beginning(self, count: int) -> npt.NDArray[np.uint8]:
        """The first `count` bytes of `data`, or all where it has fewer; the rest is not read."""
        return self.data[:count]

    def rows(self, first: int, count: int) -> CheckpointTensor:
        """Rows [first, first + count) as a tensor of their own, on the same memory."""
        row = self.nbytes // self.shape[0]
        data = self.data[first * row : (first + count) * row]
        return CheckpointTensor(self.name, (count, *self.shape[1:]), self.dtype, data)


class DeferredTensor(CheckpointTensor):
    """A tensor whose bytes are made when they are asked for, as those of an encrypted file are.

    Args:
        name, shape, dtype: as of `CheckpointTensor`.
        view: gives count bytes from an offset, both in the file's terms.
        offset, nbytes: where the data is.
    """

    __slots__ = ("_nbytes", "_offset", "_view")

    _view: Callable[[int, int], npt.NDArray[np.uint8]]
    _offset: int
    _nbytes: int

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        view: Callable[[int, int], npt.NDArray[np.uint8]],
        offset: int,
        nbytes: int,
    ) -> None:
        for field, value in (("name", name), ("shape", shape), ("dtype", dtype), ("_view", view),
                             ("_offset", offset), ("_nbytes", nbytes)):  # fmt: skip
            object.__setattr__(self, field, value)  # of a frozen class

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        """uint8[nbytes], read-only."""
        return self._view(self._offset, self._nbytes)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def beginning(self, count: int) -> npt.NDArray[np.uint8]:
        return self._view(self._offset, min(count, self._nbytes))

    def rows(self, first: int, count: int) -> CheckpointTensor:
        row = self._nbytes // self.shape[0]
        shape, offset = (count, *self.shape[1:]), self._offset + first * row
        return DeferredTensor(self.name, shape, self.dtype, self._view, offset, count * row)


class Fields(Mapping[str, Any]):
    """Read-only configuration values with getters that check types.

    As a mapping it gives the plain values. A getter without a default requires the key. A JSON null counts
    as an absent key for the getters.

    Raises (every getter):
        ModelFileError: for instance ``model.gguf: llama.rope.freq_base: expected float32, got string``.
    """

    # What an error calls each expected type, and which Python types pass for a number.
    names: ClassVar[Mapping[type, str]] = {
        bool: "boolean",
        int: "integer",
        float: "number",
        str: "string",
        list: "array",
        dict: "object",
        type(None): "null",
    }
    number_types: ClassVar[tuple[type, ...]] = (int, float)

    def __init__(self, file: str | os.PathLike[str], values: Mapping[str, Any], prefix: str = "") -> None:
        self.file = str(file)
        self._values = values
        self._prefix = prefix

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.file!r}, {len(self)} keys)"

    def type_name(self, key: str) -> str:
        """What the format calls the type of a value that is there."""
        return self.names.get(type(self._values[key]), type(self._values[key]).__name__)

    def error(self, key: str, reason: str) -> ModelFileError:
        """A ModelFileError about one key, to be raised by the caller."""
        return ModelFileError(self.file, reason, key=printable(self._prefix + key))

    def integer(
        self,
        key: str,
        default: int | Missing = REQUIRED,
        *,
        minimum: int | None = None,
        maximum: int | None = None,
    ) -> int:
        """An integer of any width, within `minimum` and `maximum` (both inclusive)."""
        value = self._get(key, default, (int,), int)
        bounds = [f"at least {minimum}"] if minimum is not None else []
        bounds += [f"at most {maximum}"] if maximum is not None else []
        if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
            raise self.error(key, f"expected {self.names[int]} of {' and '.join(bounds)}, got {value}")
        return int(value)

    def number(self, key: str, default: float | Missing = REQUIRED) -> float:
        """A finite floating-point number."""
        given = self._get(key, default, self.number_types, float)
        try:
            value = float(given)
        except OverflowError:  # an integer of more than 308 digits
            value = math.inf
        if not math.isfinite(value):
            raise self.error(key, f"expected finite {self.names[float]}, got {value}")
        return value

    def boolean(self, key: str, default: bool | Missing = REQUIRED) -> bool:
        """True or false; an integer is refused."""
        return bool(self._get(key, default, (bool,), bool))

    def string(self, key: str, default: str | Missing = REQUIRED) -> str:
        """A string; bytes of a GGUF file that are not UTF-8 are lone surrogates (surrogateescape)."""
        return str(self._get(key, default, (str,), str))

    def strings(self, key: str, default: Sequence[str] | Missing = REQUIRED) -> Sequence[str]:
        """An array of strings."""
        value = self._array(key, default)
        if isinstance(value, list | tuple):
            for index, item in enumerate(value):
                if not isinstance(item, str):
                    got = self.names.get(type(item), type(item).__name__)
                    raise self.error(f"{key}[{index}]", f"expected {self.names[str]}, got {got}")
        elif isinstance(value, np.ndarray):
            raise self.error(key, f"expected array of {self.names[str]}, got {self.type_name(key)}")
        return value  # type: ignore[no-any-return]  # checked above

    def integers(self, key: str, default: Sequence[int] | Missing = REQUIRED) -> list[int]:
        """An array of integers of any width, as Python ints."""
        value = self._array(key, default)
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "iu":
                raise self.error(key, f"expected array of {self.names[int]}, got {self.type_name(key)}")
            return value.tolist()  # type: ignore[no-any-return]  # of an integer dtype
        items = list(value)
        for index, item in enumerate(items):
            if not isinstance(item, int) or isinstance(item, bool):
                got = self.names.get(type(item), type(item).__name__)
                raise self.error(f"{key}[{index}]", f"expected {self.names[int]}, got {got}")
        return items

    def section(self, key: str, default: Mapping[str, Any] | Missing = REQUIRED) -> Fields:
        """A nested object, for instance ``rope_scaling`` of a config.json."""
        value = self._get(key, default, (dict,), dict)
        return type(self)(self.file, value, f"{self._prefix}{key}.")

    def _get(self, key: str, default: Any, accepted: tuple[type, ...], expected: type) -> Any:
        value = self._values.get(key)
        if value is None:
            if default is REQUIRED:
                raise self.error(key, f"expected {self.names[expected]}, got nothing")
            return default
        # bool is an int to Python, but never to a model file.
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
            raise self.error(key, f"expected {self.names[expected]}, got {self.type_name(key)}")
        return value

    def _array(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        if value is None:
            if default is REQUIRED:
                raise self.error(key, f"expected {self.names[list]}, got nothing")
            return default
        if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
            raise self.error(key, f"expected {self.names[list]}, got {self.type_name(key)}")
        return value


class Checkpoint(ABC):
    """A model on disk: configuration values and tensors that are views of mapped files.

    A context manager. Tensors taken before `close` stay readable for as long as they are held.

    Attributes:
        kind: "gguf" or "hf".
        path: the .gguf file, or the directory that holds config.json.
        config: the GGUF metadata, or the parsed config.json.
        generation_config: the parsed generation_config.json; empty where there is none.
        tensors: name to tensor, in the order of the file. A lookup makes a view and reads nothing.
        keys: where the key of encrypted files is, also for those that are read later (the tokenizer's).
    """

    kind: Literal["gguf", "hf"]
    path: Path
    config: Fields
    generation_config: Fields
    tensors: Mapping[str, CheckpointTensor]
    keys: KeySource

    @property
    @abstractmethod
    def encrypted(self) -> bool:
        """Whether weights are encrypted on disk."""

    @abstractmethod
    def release(self, name: str) -> None:
        """Tell the kernel that a tensor's pages are no longer needed; reading it again still works."""

    @abstractmethod
    def close(self) -> None:
        """Give the mapped memory back; calling it again does nothing."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_checkpoint(path: str | os.PathLike[str], keys: KeySource | None = None) -> Checkpoint:
    """Open a model that is on disk; `fastllm.formats.source.resolve` turns a reference into such a path.

    Args:
        path: a GGUF file, or a directory with config.json and safetensors; any of the files may be encrypted
            (`fastllm.formats.encryption`).
        keys: where the key of encrypted files is; None: in the environment.

    Raises:
        RequestError: there is nothing at `path`, or no key for what is encrypted.
        ModelFileError: the model is damaged.
        UnsupportedModelError: it is of a kind that fastllm does not read (pickled weights, split GGUF).
    """
    # Here, not above: both readers import this module.
    from fastllm.formats.gguf import GGUFCheckpoint
    from fastllm.formats.keys import KeySource
    from fastllm.formats.safetensors import SafetensorsCheckpoint

    place = Path(path)
    keys = KeySource() if keys is None else keys
    if place.is_dir():
        return SafetensorsCheckpoint(place, keys)
    if not place.exists():
        raise RequestError("model", str(path), "a .gguf file or a directory with config.json")
    return GGUFCheckpoint(place, keys)
