"""Reasoning: what a model thinks between two markers before it answers.

    <think>                                    Qwen3, DeepSeek-R1 and many after them
    ... </think>
    the answer
    [THINK] ... [/THINK]                       Magistral

Either the model opens it, as the first thing, or the prompt has done so already (`opened`). Spaces next to a
marker belong to the format. What is never closed is reasoning to the end, and a marker anywhere else is
content.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Collection
from dataclasses import dataclass

from fastllm.errors import RequestError
from fastllm.serve.parsers.events import Content, Event, Reasoning, merge_events
from fastllm.serve.parsers.reader import SPACES, Reader, Wait


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """A pair of markers, and the text that ends reasoning in the middle."""

    name: str
    opening: str
    closing: str
    end: str

    @property
    def markers(self) -> tuple[str, str]:
        return self.opening, self.closing


REASONING_FORMATS = {
    form.name: form
    for form in (
        ReasoningFormat("think", "<think>", "</think>", "\n</think>\n\n"),
        ReasoningFormat("mistral_think", "[THINK]", "[/THINK]", "[/THINK]"),
    )
}


def find_reasoning_format(name: str) -> ReasoningFormat:
    """The format of this name.

    Raises:
        RequestError: there is none.
    """
    if name not in REASONING_FORMATS:
        raise RequestError("reasoning_parser", name, f"one of {', '.join(REASONING_FORMATS)}")
    return REASONING_FORMATS[name]


def detect_reasoning(template: str) -> str | None:
    """The name of the format whose end a chat template knows; None: there is none."""
    for form in REASONING_FORMATS.values():
        if form.closing in template:
            return form.name
    return None


class Thought(enum.Enum):
    """Where an answer begins."""

    COMES = 0  # before the reasoning, if there is any
    OPEN = 1  # within it
    OVER = 2  # behind it


def thought_of_prompt(name: str, prompt: str) -> Thought:
    """Where the answer to a prompt begins.

    Args:
        prompt: the text of it, or the end of that; a marker counts if nothing but spaces follows.
    """
    form = find_reasoning_format(name)
    end = prompt.rstrip(SPACES)
    if end.endswith(form.opening):
        return Thought.OPEN
    return Thought.OVER if end.endswith(form.closing) else Thought.COMES


class ReasoningParser:
    """Tells the reasoning of one answer from its content; `feed` what arrives, then `finish` once.

    Args:
        name: of the format.
        opened: the prompt ends within the reasoning.

    Attributes:
        thought: where in the answer it is.
        reasoned: whether there was reasoning, or there is.
    """

    def __init__(self, name: str, *, opened: bool = False) -> None:
        self.thought = Thought.COMES
        self.reasoned = False
        self._form = find_reasoning_format(name)
        self._opened = opened
        self._reader = Reader()
        self._events: list[Event] = []
        self._spaces: list[str] = []
        self._machine: Wait[None] | None = self._run()

    def feed(self, text: str) -> list[Event]:
        """More of the answer; `Reasoning` and `Content` that are certain now."""
        self._reader.put(text)
        return self._advance()

    def finish(self) -> list[Event]:
        """The answer has ended; the rest."""
        self._reader.final = True
        return self._advance()

    def _advance(self) -> list[Event]:
        if self._machine is not None:
            try:
                next(self._machine)
            except StopIteration:
                self._machine = None
        events = [event for event in merge_events(self._events) if event != Content("")]
        self._events.clear()
        return events

    def _run(self) -> Wait[None]:
        reader = self._reader
        reader.record()
        yield from reader.spaces()
        if (yield from reader.literal(self._form.opening)) or self._opened:
            reader.recorded()
            self.thought, self.reasoned = Thought.OPEN, True
            yield from self._reasoning()
        else:
            self._events.append(Content(reader.recorded()))
        self.thought = Thought.OVER
        while True:
            if reader.available:
                self._events.append(Content(reader.take(reader.available)))
            if reader.final:
                return
            yield

    def _reasoning(self) -> Wait[None]:
        reader, closing = self._reader, self._form.closing
        yield from reader.spaces()
        while True:
            found = reader.find(closing)
            count = found if found >= 0 else reader.available - reader.held_back(closing)
            self._put(reader.take(count))
            if found >= 0:
                reader.take(len(closing))
                self.thought = Thought.OVER
                yield from reader.spaces()
                return
            if reader.final:
                return
            yield

    def _put(self, text: str) -> None:
        """Reasoning, without the spaces at its end."""
        kept = text.rstrip(SPACES)
        if kept:
            self._events.append(Reasoning("".join(self._spaces) + kept))
            self._spaces.clear()
        self._spaces.append(text[len(kept) :])


class SpecialTokenFilter:
    """Takes the texts of control tokens out of an answer that was made with `skip_special_tokens=False`.

    Args:
        texts: of control tokens.
        keep: those that a parser behind this one wants.
    """

    def __init__(self, texts: Collection[str], keep: Collection[str] = ()) -> None:
        unwanted = sorted({text for text in texts if text} - set(keep), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, unwanted))) if unwanted else None
        self._beginnings = {text[:size] for text in unwanted for size in range(1, len(text))}
        self._most = max(map(len, unwanted), default=0) - 1
        self._held = ""

    def feed(self, text: str) -> str:
        """What is certain now of the text that is left."""
        if self._pattern is None:
            return text
        text = self._held + text
        pieces = []
        at = 0
        while True:
            found = self._pattern.search(text, at)
            # A longer token may begin where this one does, or before it, and not be all there yet.
            stop = self._undecided(text, at, len(text) if found is None else found.start() + 1)
            if found is None or stop <= found.start():
                break
            pieces.append(text[at : found.start()])
            at = found.end()
        self._held = text[stop:]
        return "".join((*pieces, text[at:stop]))

    def finish(self) -> str:
        """The rest, when the answer has ended."""
        if self._pattern is None:
            return ""
        text, self._held = self._held, ""
        return self._pattern.sub("", text)

    def _undecided(self, text: str, start: int, end: int) -> int:
        """Where the first beginning of a control token stands that reaches to the end of the text."""
        for place in range(max(start, len(text) - self._most), end):
            if text[place:] in self._beginnings:
                return place
        return end
