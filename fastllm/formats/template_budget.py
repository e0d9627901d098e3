"""What one rendering of a chat template may use, and the checks that keep it to that.

Steps (loop rounds, calls, operators), time, the length of any one string and the characters made in all are
counted while a template runs; operations whose result could be far larger than their operands are checked
before they run.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError

from fastllm.formats.template_text import join_text

TEXT_CHARS_MAX = 8 << 20  # one string, the rendered text included
MADE_CHARS_MAX = 512 << 20  # all strings that operators make in one rendering
ITEMS_MAX = 1 << 20  # one list
STEPS_MAX = 2_000_000
TIME_S_MAX = 5.0
INT_BITS_MAX = 4096
WIDTH_MAX = 10_000  # padding, number of slices
INDENT_MAX = 64
_LONG_CHARS = 1 << 16  # making a text of this length takes a while
CONTAINER_COST_CHARS = 256  # what a list counts for among the characters made


class BudgetError(TemplateError):
    """A rendering took more steps, time or memory than one may."""


class Budget:
    """What one rendering has used."""

    def __init__(self) -> None:
        self.steps = 0
        self.made_chars = 0
        self.deadline = time.monotonic() + TIME_S_MAX
        # id of a container -> the container (so that no other gets its id), its size
        self._sizes: dict[int, tuple[Any, int]] = {}

    def step(self) -> None:
        self.steps += 1
        if self.steps > STEPS_MAX:
            raise BudgetError(f"the template took more than {STEPS_MAX} steps")
        if not self.steps & 63:
            self._check_time()

    def _check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise BudgetError(f"the template ran for more than {TIME_S_MAX} s")

    def make(self, chars: int) -> None:
        """Called before a string of `chars` characters is made."""
        self.made_chars += chars
        if chars > _LONG_CHARS:
            self._check_time()
        if chars > TEXT_CHARS_MAX:
            raise BudgetError(f"the template made a text of more than {TEXT_CHARS_MAX} characters")
        if self.made_chars > MADE_CHARS_MAX:
            raise BudgetError(f"the template made more than {MADE_CHARS_MAX} characters in all")

    def size(self, value: Any) -> int:
        """About how many characters `str(value)` has.

        A list that holds another one twice, and so on for thirty levels, is small in memory but not when it
        is written out or compared; so every container's full size is known from those of its parts, and
        bounded.
        """
        if isinstance(value, str):
            return len(value)
        if not isinstance(value, (list, tuple, dict)):
            return 16
        known = self._sizes.get(id(value))
        if known is not None:
            return known[1]
        if isinstance(value, dict):
            total = sum(self.size(key) + self.size(item) + 8 for key, item in value.items())
        else:
            total = sum(self.size(item) + 4 for item in value)
        if total > TEXT_CHARS_MAX or len(value) > ITEMS_MAX:
            raise BudgetError(f"the template made a list of more than {TEXT_CHARS_MAX} characters")
        self.make(CONTAINER_COST_CHARS + 8 * len(value))
        self._sizes[id(value)] = (value, total)
        return total


    def end(self) -> None:
        """Let go of what the rendering held."""
        self._sizes.clear()


_budget: ContextVar[Budget] = ContextVar("fastllm_template_budget")


def begin() -> Budget:
    """Start the budget of a rendering in this thread (or task)."""
    budget = Budget()
    _budget.set(budget)
    return budget


def current() -> Budget:
    budget = _budget.get(None)  # None while a template is compiled
    return begin() if budget is None else budget


def counted_join(parts: Iterable[str]) -> str:
    pieces = list(parts)
    current().make(sum(map(len, pieces)))
    return join_text(pieces)


def counted(items: Iterable[Any]) -> Iterator[Any]:
    step = current().step
    for item in items:
        step()
        yield item


def bounded(value: Any) -> Any:
    """`value`, unless it is a container too large to be written out."""
    if isinstance(value, (list, tuple, dict)):
        current().size(value)
    return value


def to_text(value: Any) -> str:
    return str(bounded(value))


def check_product(budget: Budget, left: Any, right: Any) -> None:
    if isinstance(left, int):
        left, right = right, left
    if not isinstance(right, int):
        return
    if isinstance(left, int):
        _check_bits(left.bit_length() + right.bit_length())
    elif isinstance(left, str):
        budget.make(len(left) * max(right, 0))
    elif isinstance(left, (list, tuple)) and len(left) * right > ITEMS_MAX:
        raise BudgetError(f"the template made a list of more than {ITEMS_MAX} items")


def check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        _check_bits(base.bit_length() * exponent)


def _check_bits(bits: int) -> None:
    if bits > INT_BITS_MAX:
        raise BudgetError(f"the template made an integer of more than {INT_BITS_MAX} bits")


def check_width(*values: Any) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > WIDTH_MAX:
            raise BudgetError(f"the template asked for a width of more than {WIDTH_MAX}")


def check_format(text: str) -> None:
    """Refuse format strings that pad to a width which is huge or not there to be read."""
    if re.search(r"\d{5}|%[^%a-zA-Z]*\*|:[^{}]*\{", text):
        raise SecurityError("a format string with a computed or very large width")


def check_replace(budget: Budget, text: str, old: Any, new: Any) -> None:
    places = text.count(str(old)) if old else len(text) + 1
    budget.make(len(text) + places * len(str(new)))


def check_text_call(
    budget: Budget, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if name in ("center", "ljust", "rjust", "zfill"):
        check_width(*args, *kwargs.values())
    elif name == "replace" and len(args) >= 2:
        check_replace(budget, text, args[0], args[1])
    elif name == "join" and args:
        budget.make(budget.size(args[0]) + len(text) * len(args[0]))
    else:
        budget.make(len(text))
