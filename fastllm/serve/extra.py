"""What is said where a package of an extra is not installed."""

from __future__ import annotations

from fastllm.errors import FastLLMError


class MissingExtraError(FastLLMError, ImportError):
    """A part of fastllm needs packages that are installed with an extra.

    Attributes:
        extra: its name.
    """

    def __init__(self, what: str, package: str, extra: str) -> None:
        self.extra = extra
        super().__init__(f"{what}: needs the package {package} (pip install 'fastllm[{extra}]')")


def missing(what: str, package: str, extra: str) -> MissingExtraError:
    """The error to raise from an ImportError."""
    return MissingExtraError(what, package, extra)
