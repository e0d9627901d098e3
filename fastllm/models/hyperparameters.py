"""Reading of hyperparameters with the promise that none is silently ignored.

`HyperParameters` reads through the checkpoint's typed `Fields` and remembers what was read. `finish` then
refuses every field that nobody read, nobody listed as harmless, and that is not null: it could change what
the model answers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from fastllm.errors import ModelFileError, UnsupportedModelError
from fastllm.formats.checkpoint import REQUIRED, Fields, Missing, printable


class HyperParameters:
    """The hyperparameters of one checkpoint, or one object inside them.

    Every reader raises ModelFileError, naming file and field, for a field that is missing without a default,
    of another type, or out of range.

    Args:
        fields: as the checkpoint gives them.
        prefix: what the file puts before the names used here ("llama."). Fields without it concern somebody
            else.
    """

    def __init__(self, fields: Fields, prefix: str = "") -> None:
        self._fields = fields
        self._prefix = prefix
        self._read: set[str] = set()

    @property
    def source(self) -> str:
        """Path of the file, for messages."""
        return self._fields.file

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._fields.get(self._prefix + name) is not None

    def given(self, name: str) -> bool:
        """Whether the field is there, null or not."""
        return self._prefix + name in self._fields

    def error(self, name: str, reason: str) -> ModelFileError:
        """The error for a field whose value cannot be, to be raised by the caller."""
        return self._fields.error(self._prefix + name, reason)

    def unsupported(self, name: str, why: str) -> UnsupportedModelError:
        """The error for a field that asks for something fastllm does not do, to be raised by the caller."""
        value = printable(repr(self._fields.get(self._prefix + name)))
        key = self._fields.error(self._prefix + name, "").key
        return UnsupportedModelError(f"{self.source}: {key} = {value}: {why}")

    def integer(
        self, name: str, default: int | Missing = REQUIRED, *, least: int = 1, most: int = 2**31 - 1
    ) -> int:
        """An integer in [least, most]. One value per layer is accepted where all are equal.

        Raises:
            UnsupportedModelError: the layers differ.
        """
        key = self._note(name)
        value: Any = self._fields.get(key)
        if not isinstance(value, (list, np.ndarray)) or len(value) == 0:
            return self._fields.integer(key, default, minimum=least, maximum=most)
        layers = self._fields.integers(key)
        if any(layer != layers[0] for layer in layers):
            raise self.unsupported(name, "layers that differ are not implemented")
        if not least <= layers[0] <= most:
            raise self.error(name, f"expected integers from {least} to {most}, got {layers[0]}")
        return layers[0]

    def number(self, name: str, default: float | Missing = REQUIRED) -> float:
        """A finite number above 0."""
        value = self._fields.number(self._note(name), default)
        if value <= 0.0:
            raise self.error(name, f"expected a number above 0, got {value:g}")
        return value

    def boolean(self, name: str, default: bool | Missing = REQUIRED) -> bool:
        """True or false."""
        return self._fields.boolean(self._note(name), default)

    def string(self, name: str, default: str | Missing = REQUIRED) -> str:
        """A string."""
        return self._fields.string(self._note(name), default)

    def strings(self, name: str) -> list[str]:
        """An array of strings, empty when absent."""
        return list(self._fields.strings(self._note(name), ()))

    def section(self, name: str) -> HyperParameters:
        """The fields of a nested object, none when absent. It has a `finish` of its own."""
        return HyperParameters(self._fields.section(self._note(name), {}))

    def expect(self, name: str, *allowed: bool | int | float | str) -> None:
        """Accepts a field that is absent, null, or has one of these values.

        Raises:
            UnsupportedModelError: it has another value.
        """
        value = self._fields.get(self._note(name))
        if value is not None and not any(_same(value, choice) for choice in allowed):
            raise self.unsupported(name, "is not implemented, and would change the answer")

    def finish(self, harmless: Collection[str] = ()) -> None:
        """Refuses what nobody read.

        Raises:
            UnsupportedModelError: naming the first such field and its value.
        """
        for key, value in self._fields.items():
            name = key.removeprefix(self._prefix)
            ours = key.startswith(self._prefix) and value is not None
            if ours and name not in self._read and name not in harmless:
                raise self.unsupported(name, "is unknown to fastllm, and could change the answer")

    def _note(self, name: str) -> str:
        self._read.add(name)
        return self._prefix + name


def _same(value: object, choice: bool | int | float | str) -> bool:
    """Equality that keeps apart what Python would mix up (True == 1)."""
    return isinstance(value, bool) == isinstance(choice, bool) and value == choice
