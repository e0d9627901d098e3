"""Strings that remember which of their characters a chat template wrote itself.

`TemplateText` is a `str` in every respect; besides, it knows the spans that come from the template (or from
names such as `bos_token` that the model defines). Control tokens are recognised in those spans and nowhere
else. What a template does to strings keeps the spans where this file says how; any other operation returns a
plain `str`, whose text then counts as somebody else's. Losing a span can cost a control token, never make
one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

Span = tuple[int, int]  # [start, end)
_MIXED_COPIES_MAX = 1000


class TemplateText(str):
    """A `str` with the spans of it that are the template's own. Made from a plain `str` it has none."""

    __slots__ = ("_spans",)
    _spans: tuple[Span, ...]

    def __new__(cls, text: object = "", spans: Iterable[Span] = ()) -> TemplateText:
        made = super().__new__(cls, text)
        made._spans = tuple(spans)
        return made

    @classmethod
    def own(cls, text: str) -> TemplateText:
        """Text that is the template's from end to end."""
        return cls(text, [(0, len(text))] if text else ())

    def __str__(self) -> str:
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str.__str__(self), self._spans

    # -- joining ---------------------------------------------------------------------------------------------

    def __add__(self, other: str) -> str:
        return join_text((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return join_text((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> str:
        plain: str = super().__mul__(count)
        if self._spans == ((0, len(self)),):
            return TemplateText.own(plain)
        copies = count.__index__()
        return join_text([self] * copies) if self._spans and copies <= _MIXED_COPIES_MAX else plain

    __rmul__ = __mul__

    def join(self, parts: Iterable[str]) -> str:
        pieces: list[str] = []
        for part in parts:
            if pieces:
                pieces.append(self)
            pieces.append(part)
        return join_text(pieces)

    def __mod__(self, values: Any) -> str:
        return format_percent(self, values, str.__str__(self) % values)

    # -- cutting ---------------------------------------------------------------------------------------------

    def _cut(self, start: int, end: int) -> TemplateText:
        clipped = ((max(a, start) - start, min(b, end) - start) for a, b in self._spans)
        return TemplateText(str.__getitem__(self, slice(start, end)), [(a, b) for a, b in clipped if a < b])

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if isinstance(key, slice):
            start, end, step = key.indices(len(self))
            return self._cut(start, max(start, end)) if step == 1 else super().__getitem__(key)
        index = key.__index__()
        plain = super().__getitem__(index)  # raises IndexError
        return self._cut(index % len(self), index % len(self) + 1) if plain else plain

    def strip(self, chars: str | None = None) -> str:
        start = len(self) - len(super().lstrip(chars))
        return self._cut(start, max(start, len(super().rstrip(chars))))

    def lstrip(self, chars: str | None = None) -> str:
        return self._cut(len(self) - len(super().lstrip(chars)), len(self))

    def rstrip(self, chars: str | None = None) -> str:
        return self._cut(0, len(super().rstrip(chars)))

    def removeprefix(self, prefix: str) -> str:
        return self._cut(len(self) - len(super().removeprefix(prefix)), len(self))

    def removesuffix(self, suffix: str) -> str:
        return self._cut(0, len(super().removesuffix(suffix)))

    def _locate(self, parts: Iterable[str]) -> list[Any]:
        """The same parts, which follow each other in this text, as cuts of it."""
        found, position = [], 0
        for part in parts:
            start = self.find(part, position)
            position = start + len(part)
            found.append(self._cut(start, position))
        return found

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        parts = super().split(sep, maxsplit)
        return self._locate(parts) if sep is None else self._spaced(parts, len(sep))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        parts = super().rsplit(sep, maxsplit)
        return self._locate(parts) if sep is None else self._spaced(parts, len(sep))

    def _spaced(self, parts: list[str], gap: int) -> list[Any]:
        found, position = [], 0
        for part in parts:
            found.append(self._cut(position, position + len(part)))
            position += len(part) + gap
        return found

    def splitlines(self, keepends: bool = False) -> list[Any]:
        found, position = [], 0
        for line, kept in zip(super().splitlines(), super().splitlines(True), strict=True):
            found.append(self._cut(position, position + len(kept if keepends else line)))
            position += len(kept)
        return found

    def partition(self, sep: str) -> Any:
        return tuple(self._spaced(list(super().partition(sep)), 0))

    def rpartition(self, sep: str) -> Any:
        return tuple(self._spaced(list(super().rpartition(sep)), 0))

    # -- changing --------------------------------------------------------------------------------------------

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:
            return super().replace(old, new, count)
        left = count.__index__()
        pieces: list[str] = []
        start = 0
        while left and (at := self.find(old, start)) >= 0:
            pieces += [self._cut(start, at), new]
            start, left = at + len(old), left - 1
        return join_text([*pieces, self._cut(start, len(self))])

    def _same_length(self, changed: str) -> str:
        """Case changes; where one changes the length too the places are unknown."""
        return TemplateText(changed, self._spans) if len(changed) == len(self) else changed

    def lower(self) -> str:
        return self._same_length(super().lower())

    def upper(self) -> str:
        return self._same_length(super().upper())

    def title(self) -> str:
        return self._same_length(super().title())

    def capitalize(self) -> str:
        return self._same_length(super().capitalize())

    def swapcase(self) -> str:
        return self._same_length(super().swapcase())


def spans_of(text: str) -> tuple[Span, ...]:
    """The spans of `text` that a template wrote: sorted, disjoint, not empty, none adjacent to the next."""
    return text._spans if isinstance(text, TemplateText) else ()


def join_text(parts: Iterable[str]) -> str:
    """`"".join(parts)` that keeps the spans; adjacent ones become one."""
    pieces = list(parts)
    if not any(isinstance(piece, TemplateText) for piece in pieces):
        return "".join(pieces)
    return TemplateText("".join(pieces), _shifted(pieces))


def format_percent(form: TemplateText, values: Any, plain: str) -> str:
    """`plain`, which is `form % values`, with spans where `form` has no conversions but %s and %%."""
    given = list(values) if isinstance(values, tuple) else [values]
    pieces: list[str] = []
    done = 0
    for found in re.finditer("%(.?)", form, re.DOTALL):
        pieces.append(form[done : found.start()])
        done = found.end()
        if found[1] == "%":
            pieces.append(form[found.start() : found.start() + 1])
        elif found[1] == "s" and given:
            pieces.append(str(given.pop(0)))
        else:
            return plain
    return _if_same(join_text([*pieces, form[done:]]), plain)


def format_braces(form: TemplateText, args: Sequence[Any], kwargs: Mapping[str, Any], plain: str) -> str:
    """`plain`, which is `form.format(...)`, with spans where all fields of `form` are bare names."""
    pieces: list[str] = []
    done = count = 0
    for found in re.finditer(r"\{(\w*)\}|[{}]", form):
        name = found[1]
        if name is None:  # an escaped brace or more than a name
            return plain
        pieces.append(form[done : found.start()])
        done = found.end()
        if not name:
            name, count = str(count), count + 1
        value = args[int(name)] if name.isdecimal() and int(name) < len(args) else kwargs.get(name)
        pieces.append(str(value))
    return _if_same(join_text([*pieces, form[done:]]), plain)


def _if_same(text: str, plain: str) -> str:
    return text if text == plain else plain


def _shifted(pieces: Iterable[str]) -> Iterator[Span]:
    position = 0
    open_span: Span | None = None
    for piece in pieces:
        if isinstance(piece, TemplateText):
            for a, b in piece._spans:
                if open_span is not None and open_span[1] == position + a:
                    open_span = (open_span[0], position + b)
                    continue
                if open_span is not None:
                    yield open_span
                open_span = (position + a, position + b)
        position += len(piece)
    if open_span is not None:
        yield open_span
