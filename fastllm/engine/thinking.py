"""A budget for what a model thinks before it answers: when it is used up, the end of the reasoning is forced.

              the opening marker          the closing marker
    COMES ──────────────────────► OPEN ───────────────────────────────────────► OVER
      │                            │                                             ▲
      ├── anything else ───────────┼─────────────────────────────────────────────┤
      │                            └── budget used up ──► ENDS ── all of `end` ──┘
      └── the prompt has opened it: begins as OPEN

What is forced is one token after the other, by a mask that allows nothing else; up to there a mask allows
everything, so that nothing is guessed ahead of the budget and no token depends on how steps were cut.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable

import numpy as np

from fastllm.engine.completion import Tokenizer
from fastllm.engine.grammar import Mask, pack_mask
from fastllm.errors import RequestError
from fastllm.sampling_params import ThinkingBudget

_SPACES = b" \t\r\n"


class ThoughtLimit:
    """A request's budget in tokens of its model. Shared by its sequences.

    Args:
        free: what the request allows at all; None: anything.
        ends: tokens that end a sequence. While a form is still to come they are not allowed.

    Attributes:
        free: the mask while the model may think.

    Raises:
        RequestError: field "thinking_budget": the tokenizer cannot write its end.
    """

    def __init__(
        self,
        budget: ThinkingBudget,
        tokenizer: Tokenizer,
        vocab_size: int,
        free: Mask | None = None,
        ends: Iterable[int] = (),
    ) -> None:
        self.tokens = math.inf if budget.tokens is None else budget.tokens
        self.before_form = budget.before_form
        self.opening = budget.opening.encode()
        self.closing = budget.closing.encode()
        self.opened = budget.opened
        try:
            end = tokenizer.encode(budget.text, add_special_tokens=False, parse_special=True)
        except RequestError as error:
            raise RequestError("thinking_budget", error.value, error.limit) from error
        if not end or max(end) >= vocab_size:
            raise RequestError("thinking_budget", budget.text, "an end that the model has tokens for")
        if free is None:
            free = ~np.zeros((vocab_size + 31) // 32, np.uint32)
            free[-1] >>= -vocab_size % 32
            if budget.before_form:
                free &= ~pack_mask(ends, vocab_size)
        self.free = free
        self.end = [(token, pack_mask([token], vocab_size)) for token in end]
        for mask in (self.free, *(mask for _, mask in self.end)):
            mask.flags.writeable = False
        self._tokenizer = tokenizer

    def text(self, token: int) -> bytes:
        """What a token stands for."""
        return self._tokenizer.token_bytes(token)

    def tokens_of(self, text: bytes) -> list[int]:
        """Tokens that stand for a text."""
        words = text.decode("utf-8", "replace")
        return self._tokenizer.encode(words, add_special_tokens=False, parse_special=False) if words else []


class _State(enum.Enum):
    COMES = 0
    OPEN = 1
    ENDS = 2
    OVER = 3


class Thought:
    """How far one sequence is with its budget."""

    __slots__ = ("_at", "_count", "_state", "_text", "limit", "rest")

    def __init__(self, limit: ThoughtLimit) -> None:
        self.limit = limit
        self.rest = b""  # of the token that ended it, spaces left out
        self._state = _State.OPEN if limit.opened else _State.COMES
        self._text = b""  # not read yet, or what may be the beginning of a marker
        self._count = 0  # tokens so far
        self._at = 0  # of `end`

    @property
    def over(self) -> bool:
        """Whether the budget is of no concern any more."""
        return self._state is _State.OVER

    @property
    def mask(self) -> Mask:
        """What may come next."""
        return self.limit.end[self._at][1] if self._state is _State.ENDS else self.limit.free

    @property
    def forced(self) -> int | None:
        """The only token that may come next, if there is one."""
        return self.limit.end[self._at][0] if self._state is _State.ENDS else None

    def give_up(self) -> None:
        """Nothing is forced from here on."""
        self._state = _State.OVER

    def take(self, tokens: list[int]) -> None:
        """Read what was sampled."""
        for token in tokens:
            self._take(token)

    def _take(self, token: int) -> None:
        limit = self.limit
        self._count += 1
        if self._state is _State.ENDS:
            self._at += 1
            if self._at == len(limit.end):
                self._state = _State.OVER
            return
        if self._state is _State.OVER:
            return
        self._text += limit.text(token)
        if self._state is _State.COMES:
            begun = self._text.lstrip(_SPACES)
            if begun.startswith(limit.opening):
                self._state, self._text = _State.OPEN, begun[len(limit.opening) :]
            elif not limit.opening.startswith(begun):
                self._state = _State.OVER
        if self._state is _State.OPEN:
            if limit.closing in self._text:
                self._state = _State.OVER
                self.rest = self._text.partition(limit.closing)[2].lstrip(_SPACES)
            elif self._count >= limit.tokens:
                self._state = _State.ENDS
            else:
                self._text = self._text[-len(limit.closing) :]
