"""The one family of errors that fastllm raises for bad input, bad files and exhausted resources.

C++ and Cython raise these same classes. Each carries its facts as attributes, so that a server can
turn them into a response without parsing text.
"""

from __future__ import annotations

from typing import Any


class FastLLMError(Exception):
    """Base of every error that fastllm raises on purpose."""


class ModelFileError(FastLLMError):
    """A model file is damaged or contradicts itself.

    Attributes:
        file: path of the file.
        key: metadata key at fault, if one is.
        tensor: tensor at fault, if one is.
        offset: byte offset in the file at which the fault was found, if known.
    """

    def __init__(
        self,
        file: str,
        reason: str,
        *,
        key: str | None = None,
        tensor: str | None = None,
        offset: int | None = None,
    ) -> None:
        self.file = str(file)
        self.reason = reason
        self.key = key
        self.tensor = tensor
        self.offset = offset
        where = [self.file]
        if key is not None:
            where.append(key)
        if tensor is not None:
            where.append(f"tensor {tensor}")
        if offset is not None:
            where.append(f"offset {offset}")
        super().__init__(": ".join(where) + ": " + reason)


class UnsupportedModelError(FastLLMError):
    """The model is well formed, but of a kind that fastllm does not run (yet)."""


class ModelSourceError(FastLLMError):
    """A model could not be fetched, or what was fetched is not what was expected.

    Attributes:
        reference: the model reference, for instance "pypi:PACKAGE==VERSION".
        reason: what went wrong, with the last words of the tool that fetched it.
    """

    def __init__(self, reference: str, reason: str) -> None:
        self.reference = reference
        self.reason = reason
        super().__init__(f"{reference}: {reason}")


class RequestError(FastLLMError, ValueError):
    """A request, or an argument of a call, is invalid.

    Attributes:
        field: the argument or parameter at fault.
        value: what was given.
        limit: what would have been accepted, in words.
    """

    def __init__(self, field: str, value: Any, limit: str) -> None:
        self.field = field
        self.value = value
        self.limit = limit
        shown = repr(value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        super().__init__(f"{field}: expected {limit}, got {shown}")


class CapacityError(FastLLMError):
    """A request or a model can never fit into the memory it was given.

    Attributes:
        asked, had, would_fit: the arithmetic, in `unit`.
    """

    def __init__(self, what: str, *, asked: int, had: int, would_fit: int, unit: str) -> None:
        self.asked = asked
        self.had = had
        self.would_fit = would_fit
        self.unit = unit
        super().__init__(f"{what}: asked {asked} {unit}, had {had}, would fit {would_fit}")


class EngineDeadError(FastLLMError):
    """The engine stopped after an internal failure; the cause is chained."""


class AuditError(FastLLMError):
    """The audit log cannot take a line now, or is not what it should be.

    Attributes:
        file: path of the log.
        reason: why.
    """

    def __init__(self, file: str, reason: str) -> None:
        self.file = str(file)
        self.reason = reason
        super().__init__(f"{self.file}: {reason}")
