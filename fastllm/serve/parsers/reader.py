"""Text that arrives in pieces, and the generators that read it.

A generator yields where it needs a character that is not there yet, and goes on when there is one or when the
text has ended. So a format is written as if its text lay there as a whole, and what it finds cannot depend on
where the pieces were cut. `Reader` keeps only what has not been read, so that the cost is linear in the
length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Wait: TypeAlias = Generator[None, None, T]  # yields while it waits for text, returns a T

SPACES = " \t\r\n"
_SPACES = re.compile(r"[ \t\r\n]+")


class MalformedError(Exception):
    """The text is not what it began as. Never leaves this package."""


class Reader:
    """What has arrived and not been read.

    Attributes:
        final: nothing more will arrive.
    """

    def __init__(self, text: str = "", *, final: bool = False) -> None:
        self.final = final
        self._text = text
        self._at = 0
        self._record: list[str] | None = None

    def put(self, text: str) -> None:
        """More text."""
        self._text = self._text[self._at :] + text
        self._at = 0

    @property
    def available(self) -> int:
        """Characters that can be taken."""
        return len(self._text) - self._at

    def take(self, count: int) -> str:
        """The next `count` characters, which are available."""
        taken = self._text[self._at : self._at + count]
        self._at += count
        if self._record is not None:
            self._record.append(taken)
        return taken

    def find(self, word: str) -> int:
        """How many characters lie before `word`; -1 where it is not in what is available."""
        found = self._text.find(word, self._at)
        return found if found < 0 else found - self._at

    def held_back(self, word: str) -> int:
        """How many of the last characters may be the beginning of `word`."""
        if self.final:
            return 0
        for size in range(min(len(word) - 1, self.available), 0, -1):
            if self._text.endswith(word[:size]):
                return size
        return 0

    # -- a record of what is taken ---------------------------------------------------------------------------

    def record(self) -> None:
        """Record from here on."""
        self._record = []

    def recorded(self) -> str:
        """What has been taken since `record`; ends the recording."""
        text = "".join(self._record or ())
        self._record = None
        return text

    # -- waiting ---------------------------------------------------------------------------------------------

    def peek(self) -> Wait[str]:
        """The next character, "" at the end."""
        while self._at >= len(self._text):
            if self.final:
                return ""
            yield
        return self._text[self._at]

    def literal(self, word: str) -> Wait[bool]:
        """Whether `word` is next; if it is, it has been taken."""
        while not self._text.startswith(word, self._at):
            if self.final or self.available >= len(word) or not word.startswith(self._text[self._at :]):
                return False
            yield
        self.take(len(word))
        return True

    def expect(self, word: str) -> Wait[None]:
        """Take `word`.

        Raises:
            MalformedError: something else is next.
        """
        if not (yield from self.literal(word)):
            raise MalformedError

    def run(self, pattern: re.Pattern[str], most: int) -> Wait[str]:
        """The characters that are next and match `pattern`, a set with a plus behind it.

        Raises:
            MalformedError: there are more than `most`.
        """
        pieces: list[str] = []
        count = 0
        while True:
            found = pattern.match(self._text, self._at)
            if found is not None:
                count += found.end() - found.start()
                if count > most:
                    raise MalformedError
                pieces.append(self.take(found.end() - found.start()))
            if self._at < len(self._text) or self.final:
                return "".join(pieces)
            yield

    def piece(self, pattern: re.Pattern[str]) -> str:
        """What is available of the characters that match `pattern`, without waiting."""
        found = pattern.match(self._text, self._at)
        return "" if found is None else self.take(found.end() - found.start())

    def spaces(self) -> Wait[None]:
        """Take the spaces that are next."""
        while True:
            self.piece(_SPACES)
            if self._at < len(self._text) or self.final:
                return
            yield
