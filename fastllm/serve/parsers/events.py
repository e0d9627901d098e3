"""What the parsers of an answer report: reasoning, content and tool calls, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thought before its answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer that is no tool call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A tool call has begun.

    Attributes:
        index: 0, 1, ... in the order of the answer.
        id: of this call, new.
        name: of the function, one of those that were offered.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """A piece of a call's arguments. All pieces together are the JSON text of an object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """A tool call has ended.

    Attributes:
        complete: False only where arguments are streamed: the answer broke off, or was no JSON from here on.
    """

    index: int
    complete: bool


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of an answer.

    Attributes:
        num_calls: tool calls in it.
        complete: all of them are.
    """

    num_calls: int
    complete: bool

    @property
    def tools_called(self) -> bool:
        return self.num_calls > 0


Event: TypeAlias = "Reasoning | Content | CallBegun | ArgumentsDelta | CallEnded | Finished"


def merge_events(events: Iterable[Event]) -> list[Event]:
    """The same events, where neighbours of one kind are one."""
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, (Content, Reasoning)) and type(last) is type(event):
            merged[-1] = type(event)(last.text + event.text)
        elif (
            isinstance(event, ArgumentsDelta)
            and isinstance(last, ArgumentsDelta)
            and last.index == event.index
        ):
            merged[-1] = ArgumentsDelta(event.index, last.text + event.text)
        else:
            merged.append(event)
    return merged
