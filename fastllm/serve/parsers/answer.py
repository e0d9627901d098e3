"""`AnswerParser`: one answer through all that reads it: control tokens out, reasoning, tool calls."""

from __future__ import annotations

from collections.abc import Iterable

from fastllm.serve.parsers.events import Content, Event, Finished, merge_events
from fastllm.serve.parsers.reasoning import ReasoningParser, SpecialTokenFilter, Thought
from fastllm.serve.parsers.tool_parser import ToolParser


class AnswerParser:
    """Reads one answer; `feed` what arrives, then `finish` once.

    Args:
        tools: None: no calls are looked for.
        reasoning: None: no reasoning is.
        special_tokens: None: the text has no control tokens.

    Attributes:
        done: nothing that follows matters; the answer may be ended.
        num_reasoning_tokens: tokens of the reasoning and its markers, as far as `count` was told of them.
    """

    def __init__(
        self,
        tools: ToolParser | None = None,
        reasoning: ReasoningParser | None = None,
        special_tokens: SpecialTokenFilter | None = None,
    ) -> None:
        self._tools = tools
        self._reasoning = reasoning
        self._special_tokens = special_tokens
        self.num_reasoning_tokens = 0
        self._undecided = 0  # tokens before it is known whether they are reasoning
        self._counts = reasoning is not None

    def count(self, tokens: int) -> None:
        """Say that what was fed last is the text of so many tokens."""
        if not self._counts or self._reasoning is None:
            return
        self._undecided += tokens
        if self._reasoning.thought is not Thought.COMES:
            if self._reasoning.reasoned:
                self.num_reasoning_tokens += self._undecided
            self._undecided = 0
            self._counts = self._reasoning.thought is Thought.OPEN

    @property
    def counts(self) -> bool:
        """Whether what comes may still be reasoning."""
        return self._counts

    @property
    def done(self) -> bool:
        return self._tools is not None and self._tools.done

    def feed(self, text: str) -> list[Event]:
        """More of the answer; what is certain now."""
        if self._special_tokens is not None:
            text = self._special_tokens.feed(text)
        return merge_events(self._read(text))

    def finish(self) -> list[Event]:
        """The answer has ended; the rest, and `Finished`."""
        events: list[Event] = []
        if self._special_tokens is not None:
            events += self._read(self._special_tokens.finish())
        if self._reasoning is not None:
            events += self._call_events(self._reasoning.finish())
        events += [Finished(0, True)] if self._tools is None else self._tools.finish()
        return merge_events(events)

    def _read(self, text: str) -> list[Event]:
        if not text:
            return []
        if self._reasoning is None:
            return self._call_events([Content(text)])
        return self._call_events(self._reasoning.feed(text))

    def _call_events(self, events: Iterable[Event]) -> list[Event]:
        if self._tools is None:
            return list(events)
        found: list[Event] = []
        for event in events:
            found += self._tools.feed(event.text) if isinstance(event, Content) else [event]
        return found
