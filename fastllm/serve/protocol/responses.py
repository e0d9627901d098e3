"""/v1/responses: OpenAI's body without state, and what it is as a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from fastllm.errors import RequestError
from fastllm.sampling_params import RequestOutputKind, SamplingParams
from fastllm.serve.conversation import Conversation
from fastllm.serve.errors import HTTPError
from fastllm.serve.parsers import ToolChoice, parse_tool_choice, parse_tools
from fastllm.serve.protocol.base import Body, Harmless
from fastllm.serve.protocol.chat import MESSAGES
from fastllm.serve.protocol.sampling import StreamOptions
from fastllm.structured_outputs import StructuredOutputsParams


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = Field(default=None, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    format: TextFormat | None = None


class ReasoningOptions(Body):
    effort: str | None = None


class ResponsesRequest(Harmless):
    """Input to answer. Nothing is kept between requests: all of a conversation is in `input`."""

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None


def conversation_of(body: ResponsesRequest) -> Conversation:
    """
    Raises:
        RequestError, HTTPError: naming the field.
    """
    given = {name: value for name in ("temperature", "top_p") if (value := getattr(body, name)) is not None}
    form = _form(body)
    logprobs = None
    if body.include and "message.output_text.logprobs" in body.include:
        logprobs = body.top_logprobs or 0
    elif body.top_logprobs:
        logprobs = body.top_logprobs
    try:
        params = SamplingParams(
            max_tokens=body.max_output_tokens,
            logprobs=logprobs,
            structured_outputs=form,
            output_kind=RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY,
            **given,
        )
    except RequestError as error:
        names = {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}
        raise RequestError(names.get(error.field, error.field), error.value, error.limit) from error
    fields = {}
    if body.reasoning is not None and body.reasoning.effort is not None:
        fields["reasoning_effort"] = ("reasoning.effort", body.reasoning.effort)
    return Conversation(
        model=body.model,
        messages=messages_of(body),
        params=params,
        choice=_choice(body),
        template_fields=fields,
        form="text.format" if form is not None else "",
    )


def _form(body: ResponsesRequest) -> StructuredOutputsParams | None:
    asked = None if body.text is None else body.text.format
    if asked is None or asked.type == "text":
        return None
    try:
        if asked.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if asked.schema_ is None:
            raise HTTPError(
                400, "text.format.schema: a schema is needed", param="text.format.schema",
                code="missing_required_parameter",
            )  # fmt: skip
        return StructuredOutputsParams(json=asked.schema_)
    except RequestError as error:
        raise RequestError("text.format.schema", error.value, error.limit) from error


def _choice(body: ResponsesRequest) -> ToolChoice:
    tools = None if body.tools is None else [_tool(tool, index) for index, tool in enumerate(body.tools)]
    choice = body.tool_choice
    if isinstance(choice, dict):
        if choice.get("type") != "function" or set(choice) - {"type", "name"}:
            raise RequestError("tool_choice", choice, '"auto", "none", "required" or a function\'s name')
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    return parse_tool_choice(parse_tools(tools), choice, body.parallel_tool_calls)


def _tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise RequestError(
            f"tools[{index}].type", tool.get("type"), '"function": nothing is run on this server'
        )
    function = {key: value for key, value in tool.items() if key != "type" and value is not None}
    return {"type": "function", "function": function}


# ---- input -------------------------------------------------------------------------------------------------


def messages_of(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The conversation in the form of chat completions."""
    found: list[dict[str, Any]] = []
    if body.instructions is not None:
        found.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*found, {"role": "user", "content": body.input}]
    if not 0 < len(body.input) <= MESSAGES:
        raise RequestError("input", f"{len(body.input)} items", f"1..{MESSAGES} items")
    for index, item in enumerate(body.input):
        _add(found, item, f"input[{index}]")
    return found


def _add(found: list[dict[str, Any]], item: Mapping[str, Any], place: str) -> None:
    """Put one item at the end of the conversation. What an assistant thought, said and called one after the
    other is one message."""
    kind = item.get("type", "message" if "role" in item else None)
    if kind == "message":
        _only(item, place, ("type", "role", "content", "id", "status", "phase"))
        role = item.get("role")
        message = {"role": role, "content": _text(item.get("content"), f"{place}.content")}
        if role == "assistant" and _continues(found, "content"):
            found[-1]["content"] = message["content"]
        else:
            found.append(message)
    elif kind == "function_call":
        _only(item, place, ("type", "call_id", "name", "arguments", "id", "status"))
        if not _continues(found, ""):
            found.append({"role": "assistant", "content": None})
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        found[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        _only(item, place, ("type", "call_id", "output", "id", "status"))
        text = _text(item.get("output"), f"{place}.output")
        found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
    elif kind == "reasoning":
        _only(item, place, ("type", "summary", "content", "id", "status", "encrypted_content"))
        thought = _text(item.get("content") or item.get("summary") or "", f"{place}.content")
        found.append({"role": "assistant", "content": "", "reasoning_content": thought})
    else:
        raise RequestError(f"{place}.type", kind, "message, function_call, function_call_output or reasoning")


def _continues(found: list[dict[str, Any]], key: str) -> bool:
    """Whether the last message is an assistant's that has no such entry yet, and no calls if it has one."""
    last = found[-1] if found else {}
    if last.get("role") != "assistant":
        return False
    return not key or (last.get(key) is None and "tool_calls" not in last)


def _text(value: object, place: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RequestError(place, value, "a text, or a list of texts")
    texts = []
    for index, part in enumerate(value):
        here = f"{place}[{index}]"
        kinds = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
        if not isinstance(part, Mapping) or part.get("type") not in kinds:
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise RequestError(f"{here}.type", kind, "input_text or output_text: this model reads text alone")
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{here}.text", part.get("text"), "a text")
        texts.append(part["text"])
    return "\n".join(texts)


def _only(given: Mapping[str, Any], place: str, known: tuple[str, ...]) -> None:
    for key, value in given.items():
        if key not in known and value is not None:
            name = f"{place}.{key[:80]}"
            raise HTTPError(400, f"{name}: not supported", param=name, code="unknown_parameter")
