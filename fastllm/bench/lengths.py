"""Lengths in tokens, fixed or drawn: what `--prompt-tokens` and `--output-tokens` take.

| text | length |
|---|---|
| `128` | always 128 |
| `uniform:64:256` | each from 64 to 256 equally likely, both included |
| `normal:128:32` | normal with mean 128 and standard deviation 32, rounded |
| `lognormal:128:64` | log-normal with these (of the lengths, not of their logarithms), rounded |

A drawn length is at least 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fastllm.errors import RequestError

_FORMS = "a number, uniform:LOW:HIGH, normal:MEAN:DEVIATION or lognormal:MEAN:DEVIATION"


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths.

    Attributes:
        text: as it was given.
        kind: "fixed", "uniform", "normal" or "lognormal".
        first, second: its parameters.
    """

    text: str
    kind: str
    first: float
    second: float = 0.0

    @classmethod
    def parse(cls, field: str, text: str) -> Lengths:
        """From one of the forms above.

        Args:
            field: the option, for the error.

        Raises:
            RequestError: it is none of them, or would not give lengths of at least 1.
        """
        kind, *numbers = text.split(":") if ":" in text else ("fixed", text)
        try:
            values = [float(number) for number in numbers]
        except ValueError:
            raise RequestError(field, text, _FORMS) from None
        if len(values) != {"fixed": 1, "uniform": 2, "normal": 2, "lognormal": 2}.get(kind):
            raise RequestError(field, text, _FORMS)
        if not all(math.isfinite(value) for value in values) or not 1 <= values[0] <= 1e9:
            raise RequestError(field, text, "lengths of 1 to 1e9")
        if kind in ("fixed", "uniform") and any(value != int(value) for value in values):
            raise RequestError(field, text, "whole numbers")
        if kind == "uniform" and not values[0] <= values[1] <= 1e9:
            raise RequestError(field, text, "LOW of at most HIGH")
        if kind in ("normal", "lognormal") and not 0 <= values[1] <= 1e9:
            raise RequestError(field, text, "a deviation of 0 to 1e9")
        return cls(text, kind, *values)

    def draw(self, random: np.random.Generator) -> int:
        """One length."""
        if self.kind == "fixed":
            return int(self.first)
        if self.kind == "uniform":
            return int(random.integers(int(self.first), int(self.second) + 1))
        if self.kind == "normal":
            return max(1, round(random.normal(self.first, self.second)))
        spread = math.log1p((self.second / self.first) ** 2)
        return max(1, round(random.lognormal(math.log(self.first) - spread / 2, math.sqrt(spread))))
