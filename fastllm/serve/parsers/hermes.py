"""Calls as Hermes, Qwen2.5, Qwen3 and SmolLM write them.

    <tool_call>
    {"name": "f", "arguments": {"a": 1}}
    </tool_call>

One block for each call; several objects, or an array of them, in one block are read too. The end of a block
may be missing. (Sources: the chat templates of Qwen2.5 and Qwen3, and SmolLM2's description of its tool use.)
"""

from __future__ import annotations

from collections.abc import Sequence

from fastllm.serve.parsers.lark import Lark
from fastllm.serve.parsers.reader import Wait
from fastllm.serve.parsers.tool_choice import Tool
from fastllm.serve.parsers.tool_parser import ToolParser

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesParser(ToolParser):
    def _parse(self) -> Wait[None]:
        while (yield from self._text_until(BEGIN)):
            yield from self._attempt(self._block())

    def _block(self) -> Wait[None]:
        yield from self._reader.spaces()
        yield from self._call_objects()
        yield from self._reader.spaces()
        if (yield from self._reader.literal(END)):
            self._reader.recorded()
        else:
            self._put_content(self._reader.recorded())


def calls(lark: Lark, tools: Sequence[Tool], most: int) -> str:
    body = lark.rule("call", _body(lark, tools))
    between = lark.text(f"\n{BEGIN}\n")
    return f"{lark.text(BEGIN + chr(10))} {body} {lark.up_to(most - 1, f'{between} {body}')}"


def free(lark: Lark, tools: Sequence[Tool], most: int) -> str:
    """Any text; a call wherever it says so."""
    head = lark.text_until(BEGIN)
    body = lark.rule("call", _body(lark, tools))
    count = "?" if most == 1 else "*"
    return f"({head} {lark.text(chr(10))} {body}){count} {lark.any_text()}"


def _body(lark: Lark, tools: Sequence[Tool]) -> str:
    end = lark.text(f"\n{END}")
    return " | ".join(f"{lark.call_object(tool, 'arguments')} {end}" for tool in tools)
