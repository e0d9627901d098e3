"""Typed reading of hyperparameters, with the promise that none is silently ignored.

A `Fields` remembers what was read. `finish` then refuses every field that nobody read, nobody listed as
harmless, and that is not null: an unread field could change what the model answers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from fastllm.errors import ModelFileError, UnsupportedModelError

_REQUIRED: Any = object()


def _type_name(value: object) -> str:
    """The type in words that fit GGUF and JSON alike."""
    if value is None:
        return "null"
    if isinstance(value, (bool, np.bool_)):
        return "bool"
    if isinstance(value, (int, np.integer)):
        return "integer"
    if isinstance(value, (float, np.floating)):
        return "float"
    if isinstance(value, str):
        return "string"
    if isinstance(value, Mapping):
        return "object"
    return "array"


class Fields:
    """The hyperparameters of one checkpoint, or one object inside them.

    Args:
        source: path of the file, for messages.
        values: field name -> value.
        prefix: what the file puts before the names used here ("llama."), also used in messages. Fields
            without it concern somebody else.
    """

    def __init__(
        self, source: str, values: Mapping[str, Any], prefix: str = "", *, shown: str | None = None
    ) -> None:
        self.source = source
        self._values = {k[len(prefix) :]: v for k, v in values.items() if k.startswith(prefix)}
        self._shown = prefix if shown is None else shown
        self._read: set[str] = set()

    def key(self, name: str) -> str:
        """The full name of a field, as the file spells it."""
        return self._shown + name

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._values.get(name) is not None

    def bad(self, name: str, reason: str) -> ModelFileError:
        """The error for a field whose value cannot be."""
        return ModelFileError(self.source, reason, key=self.key(name))

    def unsupported(
        self, name: str, note: str = "is not implemented, and would change the answer"
    ) -> Exception:
        """The error for a field whose value asks for something that fastllm does not do."""
        return UnsupportedModelError(
            f"{self.source}: {self.key(name)} = {_shown(self._values.get(name))} {note}"
        )

    def integer(self, name: str, default: int = _REQUIRED, *, least: int = 1, most: int = 2**31 - 1) -> int:
        """An integer in [least, most]. One value per layer is accepted when all are equal.

        Raises:
            ModelFileError: missing without a default, of another type, or out of range.
            UnsupportedModelError: the layers differ.
        """
        value = self._get(name, default)
        if isinstance(value, (list, tuple, np.ndarray)) and len(value) > 0:
            if any(entry != value[0] for entry in value):
                raise self.unsupported(name, "differs between layers, which is not implemented")
            value = value[0]
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise self.bad(name, f"expected integer, got {_type_name(value)}")
        if not least <= value <= most:
            raise self.bad(name, f"expected an integer from {least} to {most}, got {value}")
        return int(value)

    def number(
        self, name: str, default: float = _REQUIRED, *, above: float = 0.0, most: float = 1e30
    ) -> float:
        """A finite number in (above, most]; integers count. Errors as for `integer`."""
        value = self._get(name, default)
        if isinstance(value, (bool, np.bool_)) or not isinstance(
            value, (int, float, np.integer, np.floating)
        ):
            raise self.bad(name, f"expected float, got {_type_name(value)}")
        if not (math.isfinite(value) and above < value <= most):
            raise self.bad(name, f"expected a number above {above:g} and up to {most:g}, got {value}")
        return float(value)

    def boolean(self, name: str, default: bool = _REQUIRED) -> bool:
        """A bool. Errors as for `integer`."""
        value = self._get(name, default)
        if not isinstance(value, (bool, np.bool_)):
            raise self.bad(name, f"expected bool, got {_type_name(value)}")
        return bool(value)

    def string(self, name: str, default: str = _REQUIRED) -> str:
        """A string. Errors as for `integer`."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.bad(name, f"expected string, got {_type_name(value)}")
        return value

    def strings(self, name: str) -> list[str]:
        """A list of strings, empty when absent. Errors as for `integer`."""
        value = self._get(name, [])
        if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
            raise self.bad(name, f"expected an array of strings, got {_type_name(value)}")
        return list(value)

    def section(self, name: str) -> Fields:
        """The fields of a nested object, none when absent."""
        value = self._get(name, {})
        if not isinstance(value, Mapping):
            raise self.bad(name, f"expected object, got {_type_name(value)}")
        return Fields(self.source, value, shown=self.key(name) + ".")

    def expect(self, name: str, *allowed: object) -> None:
        """Accepts the field when it is absent, null or one of `allowed`.

        Raises:
            UnsupportedModelError: it has another value.
        """
        value = self._get(name, None)
        if value is not None and not any(_type_name(value) == _type_name(a) and value == a for a in allowed):
            raise self.unsupported(name)

    def finish(self, harmless: Collection[str] = ()) -> None:
        """Refuses what nobody read.

        Raises:
            UnsupportedModelError: naming the first such field and its value.
        """
        for name, value in self._values.items():
            if name not in self._read and name not in harmless and value is not None:
                raise self.unsupported(name, "is unknown to fastllm, and could change the answer")

    def _get(self, name: str, default: Any) -> Any:
        self._read.add(name)
        value = self._values.get(name)
        if value is None:
            if default is _REQUIRED:
                raise self.bad(name, "missing")
            return default
        return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
