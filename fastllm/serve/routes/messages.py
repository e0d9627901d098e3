"""/v1/messages and /v1/messages/count_tokens: Anthropic's API."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastllm.sampling_params import SamplingParams
from fastllm.serve.answers import EventStream, JsonAnswer, to_json
from fastllm.serve.call import Call
from fastllm.serve.conversation import Answer, Conversation, Piece, prompt_of
from fastllm.serve.generation import Usage
from fastllm.serve.parsers import ArgumentsDelta, CallBegun, CallEnded, Content, Event, Reasoning
from fastllm.serve.protocol.messages import (
    CountRequest,
    MessagesRequest,
    choice_of,
    conversation_of,
    messages_of,
    thinking_of,
)
from fastllm.serve.routes.common import RESPONSES, begin, takes
from fastllm.serve.state import ServerState

router = APIRouter()
STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}


@router.post("/v1/messages", responses=RESPONSES, openapi_extra=takes(MessagesRequest))
async def messages(request: Request) -> Response:
    """Answer a conversation. With `stream`, Anthropic's events."""
    state, call, body = await begin(request, MessagesRequest)
    answer = MessageAnswer(state, call, conversation_of(body))
    seconds = state.config.limits.request_seconds
    if body.stream:
        return EventStream(answer.events(), seconds, error_event="error")
    return JsonAnswer(answer.body(), seconds)


@router.post("/v1/messages/count_tokens", responses=RESPONSES, openapi_extra=takes(CountRequest))
async def count_tokens(request: Request) -> Response:
    """How many tokens a conversation has as a prompt."""
    state, _, body = await begin(request, CountRequest)
    conversation = Conversation(
        model=body.model,
        messages=messages_of(body),
        params=SamplingParams(),
        choice=choice_of(body),
        **thinking_of(body),
    )

    async def work() -> dict[str, Any]:
        async with state.models.lease(body.model) as (served, _):
            tokenizer = served.llm.tokenizer
            ids, _ = await asyncio.to_thread(prompt_of, state, served, conversation, tokenizer)
        return {"input_tokens": len(ids)}

    return JsonAnswer(work(), state.config.limits.request_seconds)


class MessageAnswer:
    """One answer in Anthropic's shape."""

    def __init__(self, state: ServerState, call: Call, conversation: Conversation) -> None:
        self._answer = Answer(state, call, conversation, "msg")
        self._open: str | None = None  # kind of the block that is being written
        self._index = -1  # of it

    async def body(self) -> dict[str, Any]:
        """The answer as JSON."""
        (choice,) = await self._answer.choices()
        content: list[dict[str, Any]] = []
        if choice.reasoning:
            content.append({"type": "thinking", "thinking": choice.reasoning, "signature": ""})
        if choice.content:
            content.append({"type": "text", "text": choice.content})
        for call in choice.calls:
            given = json.loads(call.arguments)
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": given})
        return {
            **self._head(),
            "content": content,
            **_stop(choice.finish_reason, choice.item.stop_reason),
            "usage": _usage(self._answer.generation.usage),
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        begun = False
        async with contextlib.aclosing(self._answer.pieces()) as pieces:
            async for piece in pieces:
                if not begun:
                    begun = True
                    usage = {**_usage(self._answer.generation.usage), "output_tokens": 0}
                    head = {**self._head(), "content": [], **_stop(None, None), "usage": usage}
                    yield _event("message_start", message=head)
                for event in piece.events:
                    for written in self._written(event):
                        yield written
                if piece.finish_reason is not None:
                    for written in self._end(piece):
                        yield written

    def _written(self, event: Event) -> list[bytes]:
        if isinstance(event, Content):
            block = {"type": "text", "text": ""}
            return [*self._switch("text", block), self._delta("text_delta", text=event.text)]
        if isinstance(event, Reasoning):
            block = {"type": "thinking", "thinking": "", "signature": ""}
            return [*self._switch("thinking", block), self._delta("thinking_delta", thinking=event.text)]
        if isinstance(event, CallBegun):
            begun: dict[str, Any] = {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
            return self._switch(f"call {event.index}", begun)
        if isinstance(event, ArgumentsDelta):
            return [self._delta("input_json_delta", partial_json=event.text)]
        return self._close() if isinstance(event, CallEnded) else []

    def _switch(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        """Begin a block, unless it is the one that is open."""
        if kind == self._open:
            return []
        closed = self._close()
        self._open = kind
        self._index += 1
        return [*closed, _event("content_block_start", index=self._index, content_block=block)]

    def _close(self) -> list[bytes]:
        if self._open is None:
            return []
        self._open = None
        return [_event("content_block_stop", index=self._index)]

    def _delta(self, kind: str, **what: Any) -> bytes:
        return _event("content_block_delta", index=self._index, delta={"type": kind, **what})

    def _end(self, piece: Piece) -> list[bytes]:
        usage = {"output_tokens": self._answer.generation.usage.generated}
        return [
            *self._close(),
            _event("message_delta", delta=_stop(piece.finish_reason, piece.item.stop_reason), usage=usage),
            _event("message_stop"),
        ]

    def _head(self) -> dict[str, Any]:
        generation = self._answer.generation
        return {
            "id": generation.id,
            "type": "message",
            "role": "assistant",
            "model": generation.model,
        }


def _stop(reason: str | None, sequence: Any) -> dict[str, Any]:
    if isinstance(sequence, str) and reason == "stop":
        return {"stop_reason": "stop_sequence", "stop_sequence": sequence}
    return {"stop_reason": None if reason is None else STOP_REASONS[reason], "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts the tokens that the cache knew apart."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.generated,
    }


def _event(kind: str, **what: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + to_json({"type": kind, **what}) + b"\n\n"
