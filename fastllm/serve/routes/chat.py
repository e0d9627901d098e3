"""/v1/chat/completions."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastllm.formats.tokenizer import Tokenizer
from fastllm.outputs import CompletionOutput
from fastllm.sampling_params import SamplingParams
from fastllm.serve import logprobs
from fastllm.serve.answers import EventStream, JsonAnswer, to_json
from fastllm.serve.call import Call
from fastllm.serve.conversation import Answer, Choice, Conversation, Piece
from fastllm.serve.errors import HTTPError
from fastllm.serve.parsers import (
    ArgumentsDelta,
    CallBegun,
    Content,
    Event,
    Reasoning,
    parse_tool_choice,
    parse_tools,
)
from fastllm.serve.protocol.chat import ChatRequest
from fastllm.serve.protocol.sampling import form_of, to_params
from fastllm.serve.routes.common import FINGERPRINT, RESPONSES, begin, now, takes
from fastllm.serve.state import ServerState
from fastllm.structured_outputs import StructuredOutputsParams

router = APIRouter()
DONE = b"data: [DONE]\n\n"
CHUNK_END = b"]}\n\n"


@router.post("/v1/chat/completions", responses=RESPONSES, openapi_extra=takes(ChatRequest))
async def chat_completions(request: Request) -> Response:
    """Answer a conversation. With `stream`, server-sent events."""
    state, call, body = await begin(request, ChatRequest)
    answer = ChatAnswer(state, call, body)
    seconds = state.config.limits.request_seconds
    return EventStream(answer.events(), seconds) if body.stream else JsonAnswer(answer.body(), seconds)


class ChatAnswer:
    """One answer in OpenAI's shape."""

    def __init__(self, state: ServerState, call: Call, body: ChatRequest) -> None:
        self._body = body
        self._created = now()
        self._reasons = body.include_reasoning is not False
        self._answer = Answer(state, call, conversation_of(body), "chatcmpl")
        self._generation = self._answer.generation

    # ---- all at once -------------------------------------------------------------------------------------

    async def body(self) -> dict[str, Any]:
        """The answer as JSON."""
        choices = await self._answer.choices()
        tokenizer = await self._generation.served.llm.get_tokenizer()
        return {
            **self._head("chat.completion"),
            "choices": [self._choice(tokenizer, choice) for choice in choices],
            "usage": self._generation.usage.body(),
        }

    def _choice(self, tokenizer: Tokenizer, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
        if choice.calls:
            message["content"] = choice.content or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function",
                 "function": {"name": call.name, "arguments": call.arguments}}
                for call in choice.calls
            ]  # fmt: skip
        if choice.reasoning and self._reasons:
            message["reasoning_content"] = choice.reasoning
        return {
            "index": choice.item.index,
            "message": message,
            "logprobs": self._logprobs(tokenizer, choice.item),
            "finish_reason": choice.finish_reason,
        }

    # ---- in pieces ---------------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        begun: set[int] = set()
        head = b""
        async with contextlib.aclosing(self._answer.pieces()) as pieces:
            async for piece in pieces:
                if not head:
                    head = b"data: " + to_json(self._head("chat.completion.chunk"))[:-1] + b',"choices":['
                    tokenizer = await self._generation.served.llm.get_tokenizer()
                if piece.index not in begun:
                    begun.add(piece.index)
                    yield head + _chunk(piece.index, b'{"role":"assistant","content":""}') + CHUNK_END
                for chunk in self._chunks(tokenizer, piece):
                    yield head + chunk + CHUNK_END
        options = self._body.stream_options
        if options is not None and options.include_usage:
            yield head + b'],"usage":' + to_json(self._generation.usage.body()) + b"}\n\n"
        yield DONE

    def _chunks(self, tokenizer: Tokenizer, piece: Piece) -> list[bytes]:
        """The chunks' choices for what is new. Its log probabilities go with the first of them."""
        deltas = [delta for event in piece.events if (delta := self._delta(event))]
        found = self._logprobs(tokenizer, piece.item)
        if found is not None and not deltas:
            deltas = [
                b'{"content":""}'
            ]  # a token that shows nothing yet has its log probability all the same
        chunks = []
        for delta in deltas:
            chunks.append(_chunk(piece.index, delta, found))
            found = None
        if piece.finish_reason is not None:
            chunks.append(_chunk(piece.index, b"{}", None, piece.finish_reason))
        return chunks

    def _delta(self, event: Event) -> bytes | None:
        if isinstance(event, Content):
            return b'{"content":' + json.dumps(event.text).encode() + b"}"
        if isinstance(event, Reasoning):
            if not self._reasons:
                return None
            return b'{"reasoning_content":' + json.dumps(event.text).encode() + b"}"
        if isinstance(event, CallBegun):
            function = {"name": event.name, "arguments": ""}
            call = {"index": event.index, "id": event.id, "type": "function", "function": function}
            return to_json({"tool_calls": [call]})
        if isinstance(event, ArgumentsDelta):
            return to_json({"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]})
        return None

    # ---- both --------------------------------------------------------------------------------------------

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._generation.id,
            "object": kind,
            "created": self._created,
            "model": self._generation.model,
            "system_fingerprint": FINGERPRINT,
        }

    def _logprobs(self, tokenizer: Tokenizer, item: CompletionOutput) -> dict[str, Any] | None:
        if item.logprobs is None:
            return None
        return logprobs.of_chat(tokenizer, item.token_ids, item.logprobs, self._body.top_logprobs or 0)


def conversation_of(body: ChatRequest) -> Conversation:
    """
    Raises:
        RequestError, HTTPError: naming the field.
    """
    field, form = form_of(body)
    choice = parse_tool_choice(parse_tools(body.tools), body.tool_choice, body.parallel_tool_calls)
    fields = {}
    if body.reasoning_effort is not None:
        fields["reasoning_effort"] = ("reasoning_effort", body.reasoning_effort)
    return Conversation(
        model=body.model,
        messages=body.messages,
        params=params_of(body, form),
        choice=choice,
        template_kwargs=body.chat_template_kwargs,
        template_fields=fields,
        add_generation_prompt=body.add_generation_prompt is not False,
        form=field,
        cache_salt=body.cache_salt,
        priority=body.priority or 0,
        thinking_tokens=body.thinking_token_budget,
    )


def params_of(body: ChatRequest, form: StructuredOutputsParams | None) -> SamplingParams:
    """
    Raises:
        RequestError, HTTPError: naming the field.
    """
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise HTTPError(
            400, "max_tokens and max_completion_tokens: one of them", param="max_completion_tokens",
            code="invalid_value",
        )  # fmt: skip
    if body.top_logprobs is not None and not body.logprobs:
        raise HTTPError(400, "top_logprobs: only with logprobs", param="top_logprobs", code="invalid_value")
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    top = (body.top_logprobs or 0) if body.logprobs else None
    return to_params(body, max_tokens=most, logprobs=top, structured_outputs=form)


def _chunk(index: int, delta: bytes, found: dict[str, Any] | None = None, reason: str | None = None) -> bytes:
    """One choice of a chunk."""
    text = b'{"index":%d,"delta":%b,"logprobs":' % (index, delta)
    text += b"null" if found is None else to_json(found)
    return text + (
        b',"finish_reason":null}' if reason is None else b',"finish_reason":"%b"}' % reason.encode()
    )
