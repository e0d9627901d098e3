"""What a request says about tools: `tools`, `tool_choice` and `parallel_tool_calls`, checked before any work.

`parse_tools` and `parse_tool_choice` take OpenAI's forms and raise `RequestError`, whose field is the path of
what is at fault (`tools[2].function.parameters`). What a schema asks for is judged later, when a grammar is
made of it; here only its size, depth and kind are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastllm.errors import RequestError
from fastllm.structured_outputs import StructuredOutputsParams

MAX_TOOLS = 128
MAX_DESCRIPTION_CHARACTERS = 16 * 1024
MAX_CHARACTERS = 512 * 1024  # of all names, descriptions and schemas together
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

_TOOL_KEYS = ("type", "function")
_FUNCTION_KEYS = ("name", "description", "parameters", "strict")
CHOICE_FORMS = '"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'


@dataclass(frozen=True, slots=True)
class Tool:
    """One function that the model may call.

    Attributes:
        name: 1..64 characters of a-z, A-Z, 0-9, _ and -.
        description: for the model; None: none.
        parameters: JSON schema of the arguments as it was given; None: the function has no arguments.
        strict: the arguments have to obey the schema wherever the model may choose to call.
        place: of it in the request, for errors.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False
    place: str = field(default="tools[0]", compare=False)

    @property
    def schema(self) -> dict[str, Any]:
        """The schema of the arguments, which are an object."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters}

    def for_template(self) -> dict[str, Any]:
        """The form in which chat templates show it to the model."""
        parameters = {"type": "object", "properties": {}} if self.parameters is None else self.parameters
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = parameters
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which calls an answer may, or has to, consist of.

    Attributes:
        tools: that may be called; empty: none, and the answer is content.
        offered: that the model is told of; empty where it may not call any.
        required: the answer is calls, one at least.
        parallel: the answer may have several.
    """

    tools: tuple[Tool, ...] = ()
    offered: tuple[Tool, ...] = ()
    required: bool = False
    parallel: bool = True

    def for_template(self) -> list[dict[str, Any]] | None:
        """The `tools` of `render_chat`."""
        return [tool.for_template() for tool in self.offered] or None


def parse_tools(value: object, name: str = "tools") -> tuple[Tool, ...]:
    """The tools of a request.

    Args:
        value: a list of up to 128 `{"type": "function", "function": {"name": ..., "description": ...,
            "parameters": JSON schema, "strict": bool}}`; None counts as none.
        name: what an error calls it.

    Raises:
        RequestError: with the path of what is at fault.
    """
    if value is None:
        return ()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        raise RequestError(name, value, "a list of tools")
    if len(value) > MAX_TOOLS:
        raise RequestError(name, f"{len(value)} tools", f"at most {MAX_TOOLS} tools")
    found: dict[str, Tool] = {}
    left = MAX_CHARACTERS
    for index, item in enumerate(value):
        place = f"{name}[{index}]"
        tool, size = _parse_tool(item, place)
        if tool.name in found:
            raise RequestError(f"{place}.function.name", tool.name, "a name that no other tool has")
        left -= size
        if left < 0:
            raise RequestError(place, "more", f"tools of at most {MAX_CHARACTERS} characters in all")
        found[tool.name] = tool
    return tuple(found.values())


def _parse_tool(value: object, place: str) -> tuple[Tool, int]:
    function = _entries(value, place, _TOOL_KEYS)
    if function.get("type") != "function":
        raise RequestError(f"{place}.type", function.get("type"), '"function"')
    place_of_tool, place = place, f"{place}.function"
    function = _entries(function.get("function"), place, _FUNCTION_KEYS)
    name = function.get("name")
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise RequestError(f"{place}.name", name, "1..64 characters of a-z, A-Z, 0-9, _ and -")
    description = function.get("description")
    if description is not None:
        if not isinstance(description, str) or len(description) > MAX_DESCRIPTION_CHARACTERS:
            limit = f"a text of at most {MAX_DESCRIPTION_CHARACTERS} characters"
            raise RequestError(f"{place}.description", description, limit)
        _check_encodes(description, f"{place}.description")
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise RequestError(f"{place}.strict", strict, "true or false")
    parameters = function.get("parameters")
    size = len(name) + len(description or "")
    if parameters is not None:
        size += _check_schema(parameters, f"{place}.parameters")
    return Tool(name, description, parameters, bool(strict), place_of_tool), size


def _check_schema(value: object, place: str) -> int:
    """A JSON schema of an object, within the limits of schemas; how long its text is."""
    if not isinstance(value, Mapping):
        raise RequestError(place, value, "a JSON schema of an object")
    try:
        text = StructuredOutputsParams(json=value).text
    except RequestError as error:
        raise RequestError(place, error.value, error.limit.removeprefix("json: ")) from error
    if value.get("type", "object") != "object":
        raise RequestError(f"{place}.type", value["type"], '"object": arguments have names')
    properties = value.get("properties", {})
    if not isinstance(properties, Mapping):
        raise RequestError(f"{place}.properties", properties, "an object of schemas")
    for key, item in properties.items():
        if not isinstance(item, (Mapping, bool)):
            raise RequestError(f"{place}.properties.{key[:80]}", item, "a JSON schema")
    required = value.get("required", [])
    if not isinstance(required, (list, tuple)) or not all(isinstance(key, str) for key in required):
        raise RequestError(f"{place}.required", required, "a list of names")
    return len(text)


def parse_tool_choice(
    tools: tuple[Tool, ...],
    tool_choice: object = None,
    parallel_tool_calls: object = None,
    name: str = "tool_choice",
) -> ToolChoice:
    """Which calls an answer may have.

    Args:
        tools: from `parse_tools`.
        tool_choice: one of OpenAI's forms; None: "auto" where there are tools.
        parallel_tool_calls: None counts as True.

    Raises:
        RequestError: something else, a name that no tool has, or calls required without tools.
    """
    if parallel_tool_calls is not None and not isinstance(parallel_tool_calls, bool):
        raise RequestError("parallel_tool_calls", parallel_tool_calls, "true or false")
    parallel = parallel_tool_calls is not False
    if isinstance(tool_choice, Mapping):
        chosen = _parse_named(tool_choice, name)
        for tool in tools:
            if tool.name == chosen:
                return ToolChoice((tool,), tools, True, False)
        raise RequestError(f"{name}.function.name", chosen, "the name of one of the tools")
    if tool_choice is None or tool_choice == "auto":
        return ToolChoice(tools, tools, False, parallel)
    if tool_choice == "none":
        return ToolChoice()
    if tool_choice == "required":
        if not tools:
            raise RequestError("tools", None, 'at least one tool where tool_choice is "required"')
        return ToolChoice(tools, tools, True, parallel)
    raise RequestError(name, tool_choice, CHOICE_FORMS)


def _parse_named(value: Mapping[str, Any], name: str) -> str:
    entries = _entries(value, name, _TOOL_KEYS)
    if entries.get("type") != "function":
        raise RequestError(f"{name}.type", entries.get("type"), '"function"')
    chosen = _entries(entries.get("function"), f"{name}.function", ("name",)).get("name")
    if not isinstance(chosen, str):
        raise RequestError(f"{name}.function.name", chosen, "a text")
    return chosen


def _entries(value: object, place: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    """A mapping that has no other keys than the known."""
    if not isinstance(value, Mapping):
        raise RequestError(place, value, f"an object with {', '.join(known)}")
    for key in value:
        if key not in known:
            raise RequestError(f"{place}.{str(key)[:80]}", value[key], f"no such entry; {', '.join(known)}")
    return value


def _check_encodes(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(place, text, "a text without lone surrogates") from None
