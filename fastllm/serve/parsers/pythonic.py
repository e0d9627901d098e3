"""Calls as a Python list, which some templates for Llama 3.2 and 4 ask for: the answer is the list.

    [f(a=1, b="x"), g()]

Arguments have names; their values are what `python_text` reads. `<|python_start|>` or `<|python_tag|>` may
stand before it, `<|python_end|>` after it. The list comes out as a whole when it is complete, streamed or
not: until then it may turn out to be text. (Source: Meta's prompt format for Llama 3.2 and 4.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from fastllm.errors import RequestError
from fastllm.serve.parsers.lark import Lark
from fastllm.serve.parsers.python_text import convert_value
from fastllm.serve.parsers.reader import MalformedError, Wait
from fastllm.serve.parsers.tool_choice import Tool
from fastllm.serve.parsers.tool_parser import ToolParser

TAGS = ("<|python_start|>", "<|python_tag|>")
END = "<|python_end|>"
_WORD = re.compile(r"[A-Za-z0-9_]+")
_KEYWORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEYWORD_CHARACTERS = 256
# What a schema of arguments may say besides, so that each argument can stand for itself.
_SCHEMA_KEYS = frozenset(
    ("type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "$id")
)


class PythonicParser(ToolParser):
    def _parse(self) -> Wait[None]:
        self._reader.record()
        yield from self._attempt(self._answer())

    def _answer(self) -> Wait[None]:
        reader = self._reader
        yield from reader.spaces()
        if (yield from reader.peek()) == "<":
            if not (yield from reader.literal(TAGS[0])):
                yield from reader.expect(TAGS[1])
            yield from reader.spaces()
        yield from reader.expect("[")
        found: list[tuple[str, str]] = []
        while True:
            yield from reader.spaces()
            found.append((yield from self._call()))
            yield from reader.spaces()
            if (yield from reader.literal("]")):
                break
            yield from reader.expect(",")
        for name, arguments in found:
            self._name = name
            self._arguments.append(arguments)
            self._end_call()
            if self.done:
                return
        yield from reader.spaces()
        left = reader.recorded()
        if not (yield from reader.literal(END)):
            self._put_content(left)

    def _call(self) -> Wait[tuple[str, str]]:
        reader = self._reader
        name = yield from self._bare_name()
        yield from reader.expect("(")
        self._set_name(name)
        keys: dict[str, None] = {}
        pieces: list[str] = []
        yield from reader.spaces()
        while not (yield from reader.literal(")")):
            if keys:
                pieces.append(", ")
            key = yield from reader.run(_WORD, _KEYWORD_CHARACTERS)
            if key in keys or _KEYWORD.fullmatch(key) is None:
                raise MalformedError
            keys[key] = None
            yield from reader.spaces()
            yield from reader.expect("=")
            yield from reader.spaces()
            pieces.append(f"{json.dumps(key)}: ")
            yield from convert_value(reader, pieces.append)
            yield from reader.spaces()
            if not (yield from reader.literal(",")):
                yield from reader.expect(")")
                break
            yield from reader.spaces()
        return name, "{" + "".join(pieces) + "}"


def calls(lark: Lark, tools: Sequence[Tool], most: int) -> str:
    call = lark.rule("call", " | ".join(_call_rule(lark, tool) for tool in tools))
    further = lark.up_to(most - 1, f"{lark.text(', ')} {call}")
    return f"{lark.text('[')} {call} {further} {lark.text(']')}"


def free(lark: Lark, tools: Sequence[Tool], most: int) -> str:
    """A list of calls, or text that does not look like the beginning of one."""
    return f"{lark.text_not_beginning('[', '<|')} | {calls(lark, tools, most)}"


def _call_rule(lark: Lark, tool: Tool) -> str:
    """f(a=..., b=...): what is required has to be there, in the order of the schema. Values are JSON."""
    schema = tool.schema
    place = f"{tool.place}.function.parameters"
    for key in schema:
        if key not in _SCHEMA_KEYS and key not in lark.annotations:
            limit = "properties and required alone, for calls that are written as Python"
            raise RequestError(f"{place}.{key}", schema[key], limit)
    properties = dict(schema.get("properties", {}))
    required = list(schema.get("required", ()))
    for key in required:
        properties.setdefault(key, {})
    definitions: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    # From the last argument to the first: the rule for what comes from an argument on, when something stands
    # before it (True) and when nothing does.
    rest = {True: '""', False: '""'}
    for key, value in reversed(properties.items()):
        if _KEYWORD.fullmatch(key) is None:
            limit = "names of Python's, for calls that are written as Python"
            raise RequestError(f"{place}.properties", key, limit)
        if isinstance(value, bool):
            value = {} if value else {"not": {}}
        body = lark.json({**definitions, **value})
        rest = {
            further: lark.rule(
                "arguments",
                f"{lark.text((', ' if further else '') + key + '=')} {body} {rest[True]}"
                + ("" if key in required else f" | {rest[further]}"),
            )
            for further in (True, False)
        }
    return f"{lark.text(tool.name + '(')} {rest[False]} {lark.text(')')}"
