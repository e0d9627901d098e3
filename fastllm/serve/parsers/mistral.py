"""Calls as Mistral's models write them, in either of two ways.

    [TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]
    [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}

The markers are control tokens. In the second, `[CALL_ID]` and an id may stand before `[ARGS]`. (Sources: the
chat templates of Mistral Nemo and Mistral Small 3, and mistral-common's instruct tokenizers of versions 3, 11
and 13.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastllm.serve.parsers.lark import Lark
from fastllm.serve.parsers.reader import MalformedError, Wait
from fastllm.serve.parsers.tool_choice import Tool
from fastllm.serve.parsers.tool_parser import ToolParser, short_call_id

MARKER, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_ID = re.compile(r"[a-zA-Z0-9]+")


class MistralParser(ToolParser):
    new_id = staticmethod(short_call_id)

    def _parse(self) -> Wait[None]:
        while (yield from self._text_until(MARKER)):
            yield from self._attempt(self._calls())

    def _calls(self) -> Wait[None]:
        reader = self._reader
        yield from reader.spaces()
        first = yield from reader.peek()
        if first and first in "[{":
            yield from self._call_objects()
        else:
            yield from self._named_call()
        left = reader.recorded()
        self._put_content(left)

    def _named_call(self) -> Wait[None]:
        reader = self._reader
        self._set_name((yield from self._bare_name()))
        yield from reader.spaces()
        if (yield from reader.literal(ID)):
            yield from reader.run(_ID, 64)
        if not (yield from reader.literal(ARGUMENTS)) and (yield from reader.peek()) != "{":
            raise MalformedError
        yield from reader.spaces()
        yield from self._argument_object(self._put_arguments)
        self._end_call()


def array_calls(lark: Lark, tools: Sequence[Tool], most: int) -> str:
    """What follows the marker."""
    call = lark.rule("call", " | ".join(lark.call_object(tool, "arguments") for tool in tools))
    further = lark.up_to(most - 1, f"{lark.text(', ')} {call}")
    return f"{lark.text('[')} {call} {further} {lark.text(']')}"


def named_calls(lark: Lark, tools: Sequence[Tool], most: int) -> str:
    """What follows the marker. One call: a second would need the marker, which is no text."""
    return " | ".join(f"{lark.text(tool.name + ARGUMENTS)} {lark.arguments(tool)}" for tool in tools)
