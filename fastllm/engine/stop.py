"""Stop strings in streamed text: found across pieces, held back exactly as long as they could still match.

The stop strings form one Aho-Corasick automaton. Its state after a character is the longest suffix of the
text that is a prefix of some stop string, so the state's depth is how much text must be held back, and no
more. One transition per character, whatever the number and length of the stop strings.

The answer does not depend on how the text was cut into pieces: the text ends before the stop string that is
complete first; where several are complete at one character, before the longest of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """The automaton of one request's stop strings; immutable, shared by its sequences.

    Args:
        strings: non-empty strings, at least one.
    """

    __slots__ = ("_depth", "_fail", "_match", "_next")

    def __init__(self, strings: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]  # per state: character -> longer state
        self._depth: list[int] = [0]
        self._match: list[str | None] = [None]  # the longest stop string that ends here
        for string in strings:
            state = 0
            for character in string:
                longer = self._next[state].get(character)
                if longer is None:
                    longer = len(self._next)
                    self._next[state][character] = longer
                    self._next.append({})
                    self._depth.append(self._depth[state] + 1)
                    self._match.append(None)
                state = longer
            self._match[state] = string
        self._fail: list[int] = [0] * len(self._next)  # the longest proper suffix that is a state
        queue = deque(self._next[0].values())
        while queue:  # breadth first: the fail state is shorter, so it is complete
            state = queue.popleft()
            if self._match[state] is None:
                self._match[state] = self._match[self._fail[state]]
            for character, longer in self._next[state].items():
                self._fail[longer] = self._step(self._fail[state], character)
                queue.append(longer)

    def _step(self, state: int, character: str) -> int:
        while True:
            longer = self._next[state].get(character)
            if longer is not None:
                return longer
            if state == 0:
                return 0
            state = self._fail[state]

    def advance(self, state: int, character: str) -> tuple[int, str | None]:
        """The state after one more character, and the stop string that it completes, if any."""
        state = self._step(state, character)
        return state, self._match[state]

    def reject(self, state: int) -> int:
        """The state after a match at `state` was turned down: one that a longer match can still come from."""
        while state and not self._next[state]:
            state = self._fail[state]
        return state

    def held(self, state: int) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        return self._depth[state]


class StopMatcher:
    """Watches the text of one sequence.

    Args:
        strings: what to look for.
        include: whether the stop string stays in the text.
    """

    __slots__ = ("_held", "_include", "_state", "_strings")

    def __init__(self, strings: StopStrings, *, include: bool = False) -> None:
        self._strings = strings
        self._include = include
        self._state = 0
        self._held = ""

    def push(self, text: str, *, armed: bool = True) -> tuple[str, str | None]:
        """Take in more text.

        Args:
            text: what follows.
            armed: whether a stop string that is completed by this text counts. Its beginning may lie in
                text that came unarmed.

        Returns:
            The text that is certain to be output, and the stop string found, or None. After one was found
            nothing more may be pushed.
        """
        state = self._state
        strings = self._strings
        for position, character in enumerate(text):
            state, match = strings.advance(state, character)
            if match is not None:
                if armed:
                    self._state, held, self._held = 0, self._held, ""
                    whole = held + text[: position + 1]
                    return whole if self._include else whole[: len(whole) - len(match)], match
                state = strings.reject(state)
        self._state = state
        whole = self._held + text
        certain = len(whole) - strings.held(state)
        self._held = whole[certain:]
        return whole[:certain], None

    def flush(self) -> str:
        """The text that was held back, now that nothing follows."""
        held, self._held, self._state = self._held, "", 0
        return held
