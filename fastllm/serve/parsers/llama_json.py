"""Calls as Llama 3 writes them: the answer is a call, or several with semicolons between them.

    {"name": "f", "parameters": {"a": 1}}

`<|python_tag|>`, a control token, may stand before it. An object anywhere else is content. (Source: the chat
templates of Llama 3.1 and 3.2; they show one call at a time.)
"""

from __future__ import annotations

from collections.abc import Sequence

from fastllm.serve.parsers.lark import Lark
from fastllm.serve.parsers.reader import Wait
from fastllm.serve.parsers.tool_choice import Tool
from fastllm.serve.parsers.tool_parser import ToolParser

TAG = "<|python_tag|>"


class LlamaJSONParser(ToolParser):
    def _parse(self) -> Wait[None]:
        self._reader.record()
        yield from self._attempt(self._answer())

    def _answer(self) -> Wait[None]:
        reader = self._reader
        yield from reader.spaces()
        if (yield from reader.literal(TAG)):
            yield from reader.spaces()
        while not self.done:
            yield from self._call_object()
            yield from reader.spaces()
            if (yield from reader.literal(";")):
                yield from reader.spaces()
            after = yield from reader.peek()
            if after != "{":
                left = reader.recorded()
                self._put_content("" if not after else left)
                return


def calls(lark: Lark, tools: Sequence[Tool], most: int) -> str:
    """One call: the templates accept no more in an answer."""
    return lark.rule("call", " | ".join(lark.call_object(tool, "parameters") for tool in tools))


def free(lark: Lark, tools: Sequence[Tool], most: int) -> str:
    """A call, or text that does not look like the beginning of one."""
    return f"{lark.text_not_beginning('{', '<|')} | {calls(lark, tools, most)}"
