"""/v1/messages: Anthropic's body, and what it is as a conversation in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from fastllm.errors import RequestError
from fastllm.sampling_params import RequestOutputKind, SamplingParams
from fastllm.serve.conversation import Conversation
from fastllm.serve.errors import HTTPError
from fastllm.serve.parsers import ToolChoice, parse_tool_choice, parse_tools
from fastllm.serve.protocol.base import Body
from fastllm.serve.protocol.chat import MESSAGES


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    display: Literal["summarized"] | None = None


class CountRequest(Body):
    """What a message would be made of; `cache_control` and `metadata` change nothing here."""

    model: str | None = None
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MESSAGES)
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    cache_control: Any = None


class MessagesRequest(CountRequest):
    """A message that is wanted."""

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    metadata: Any = None
    service_tier: Any = None


def conversation_of(body: MessagesRequest) -> Conversation:
    """
    Raises:
        RequestError, HTTPError: naming the field.
    """
    if body.messages[-1].get("role") == "assistant":
        raise RequestError(
            "messages", "an assistant's message at the end", "a user's: no answer is continued"
        )
    given = {
        name: value
        for name in ("temperature", "top_p", "top_k")
        if (value := getattr(body, name)) is not None
    }
    try:
        params = SamplingParams(
            max_tokens=body.max_tokens,
            stop=body.stop_sequences or None,
            output_kind=RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY,
            **given,
        )
    except RequestError as error:
        field = "stop_sequences" if error.field == "stop" else error.field
        raise RequestError(field, error.value, error.limit) from error
    return Conversation(
        model=body.model,
        messages=messages_of(body),
        params=params,
        choice=choice_of(body),
        **thinking_of(body),
        thinking_tokens=None if body.thinking is None else body.thinking.budget_tokens,
    )


def thinking_of(body: CountRequest) -> dict[str, Any]:
    """What `thinking` says to a template: one that cannot be told reasons as it always does, which is what
    "enabled" asks for and "disabled" does not."""
    kind = None if body.thinking is None else body.thinking.type
    return {
        "template_fields": {"enable_thinking": ("thinking", False)} if kind == "disabled" else {},
        "template_hints": {"enable_thinking": True} if kind == "enabled" else {},
    }


def choice_of(body: CountRequest) -> ToolChoice:
    """Tools and the choice among them."""
    tools = parse_tools(None if body.tools is None else [_tool(tool, i) for i, tool in enumerate(body.tools)])
    asked = body.tool_choice
    if asked is None:
        return parse_tool_choice(tools)
    kind = asked.get("type")
    unknown = set(asked) - {"type", "name", "disable_parallel_tool_use"}
    if unknown:
        raise RequestError(f"tool_choice.{min(unknown)[:80]}", "it", "no such entry")
    alone = asked.get("disable_parallel_tool_use")
    if alone is not None and not isinstance(alone, bool):
        raise RequestError("tool_choice.disable_parallel_tool_use", alone, "true or false")
    if kind == "tool":
        choice: Any = {"type": "function", "function": {"name": asked.get("name")}}
    else:
        names = {"auto": "auto", "any": "required", "none": "none"}
        if not isinstance(kind, str) or kind not in names:
            raise RequestError("tool_choice.type", kind, "auto, any, none or tool")
        choice = names[kind]
    return parse_tool_choice(tools, choice, None if alone is None else not alone)


def _tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    if tool.get("type", "custom") not in ("custom", None):
        raise RequestError(f"tools[{index}].type", tool["type"], '"custom": nothing is run on this server')
    for key in tool:
        if key not in ("type", "name", "description", "input_schema", "cache_control", "strict"):
            raise RequestError(f"tools[{index}].{key[:80]}", "it", "no such entry")
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("input_schema"),
        "strict": tool.get("strict"),
    }
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


# ---- messages ----------------------------------------------------------------------------------------------


def messages_of(body: CountRequest) -> list[dict[str, Any]]:
    """In OpenAI's form: the system's text first, results of tools as messages of their own."""
    found: list[dict[str, Any]] = []
    if body.system is not None:
        found.append({"role": "system", "content": _text(body.system, "system")})
    for index, message in enumerate(body.messages):
        place = f"messages[{index}]"
        _only(message, place, ("role", "content"))
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant"):
            raise RequestError(f"{place}.role", role, "user or assistant")
        if isinstance(content, str):
            found.append({"role": role, "content": content})
            continue
        if not isinstance(content, list):
            raise RequestError(f"{place}.content", content, "a text, or a list of blocks")
        found += _user(content, place) if role == "user" else [_assistant(content, place)]
    return found


def _user(blocks: Sequence[Any], place: str) -> list[dict[str, Any]]:
    results, texts = [], []
    for index, block in enumerate(blocks):
        here = f"{place}.content[{index}]"
        kind = _kind(block, here)
        if kind == "text":
            texts.append(_block_text(block, here))
        elif kind == "tool_result":
            _only(block, here, ("type", "tool_use_id", "content", "is_error", "cache_control"))
            text = _text(block.get("content") or "", f"{here}.content")
            if block.get("is_error"):
                text = f"Error: {text}"
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        else:
            raise RequestError(f"{here}.type", kind, "text or tool_result: this model reads text alone")
    return [*results, {"role": "user", "content": "\n".join(texts)}] if texts or not results else results


def _assistant(blocks: Sequence[Any], place: str) -> dict[str, Any]:
    texts, calls, thoughts = [], [], []
    for index, block in enumerate(blocks):
        here = f"{place}.content[{index}]"
        kind = _kind(block, here)
        if kind == "text":
            texts.append(_block_text(block, here))
        elif kind == "thinking":
            _only(block, here, ("type", "thinking", "signature"))
            thoughts.append(block.get("thinking"))
        elif kind == "tool_use":
            _only(block, here, ("type", "id", "name", "input", "cache_control"))
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        else:
            raise RequestError(f"{here}.type", kind, "text, thinking or tool_use")
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if calls:
        message["tool_calls"] = calls
    if thoughts and all(isinstance(thought, str) for thought in thoughts):
        message["reasoning_content"] = "\n".join(thoughts)
    return message


def _text(value: object, place: str) -> str:
    """A text, or the texts of a list of text blocks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RequestError(place, value, "a text, or a list of text blocks")
    texts = []
    for index, block in enumerate(value):
        here = f"{place}[{index}]"
        kind = _kind(block, here)
        if kind != "text":
            raise RequestError(f"{here}.type", kind, '"text": this model reads text alone')
        texts.append(_block_text(block, here))
    return "\n".join(texts)


def _block_text(block: Mapping[str, Any], place: str) -> str:
    _only(block, place, ("type", "text", "cache_control", "citations"))
    text = block.get("text")
    if not isinstance(text, str):
        raise RequestError(f"{place}.text", text, "a text")
    return text


def _kind(block: object, place: str) -> Any:
    if not isinstance(block, Mapping):
        raise RequestError(place, block, "a block with a type")
    return block.get("type")


def _only(given: Mapping[str, Any], place: str, known: Sequence[str]) -> None:
    for key, value in given.items():
        if key not in known and value is not None:
            raise HTTPError(
                400,
                f"{place}.{key[:80]}: not supported",
                param=f"{place}.{key[:80]}",
                code="unknown_parameter",
            )
