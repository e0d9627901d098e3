"""/v1/responses: OpenAI's newer API, without state."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastllm.outputs import CompletionOutput
from fastllm.serve import logprobs
from fastllm.serve.answers import EventStream, JsonAnswer, to_json
from fastllm.serve.call import Call
from fastllm.serve.conversation import Answer
from fastllm.serve.parsers import ArgumentsDelta, CallBegun, CallEnded, Content, Event, Reasoning
from fastllm.serve.protocol.responses import ResponsesRequest, conversation_of
from fastllm.serve.routes.common import RESPONSES, begin, now, takes
from fastllm.serve.state import ServerState

router = APIRouter()


@router.post("/v1/responses", responses=RESPONSES, openapi_extra=takes(ResponsesRequest))
async def responses(request: Request) -> Response:
    """Answer input. With `stream`, the events of this API."""
    state, call, body = await begin(request, ResponsesRequest)
    answer = ResponseAnswer(state, call, body)
    seconds = state.config.limits.request_seconds
    if body.stream:
        return EventStream(answer.events(), seconds, error_event="error")
    return JsonAnswer(answer.body(), seconds)


class ResponseAnswer:
    """One answer in the shape of this API."""

    def __init__(self, state: ServerState, call: Call, body: ResponsesRequest) -> None:
        self._body = body
        self._created = now()
        self._answer = Answer(state, call, conversation_of(body), "resp")
        self._output: list[dict[str, Any]] = []  # items; in a stream, those that have begun
        self._open = ""  # kind of the item that is being written
        self._number = 0  # of the next event
        self._waiting: list[Any] = []  # log probabilities that no content has taken yet

    # ---- all at once -------------------------------------------------------------------------------------

    async def body(self) -> dict[str, Any]:
        """The answer as JSON."""
        (choice,) = await self._answer.choices()
        if choice.reasoning:
            self._output.append(_reasoning(choice.reasoning, "completed"))
        if choice.content or not (choice.calls or choice.reasoning):
            self._output.append(_message(choice.content, "completed", await self._logprobs(choice.item)))
        self._output += [
            _function_call(call.id, call.name, call.arguments, "completed") for call in choice.calls
        ]
        if choice.finish_reason == "length":
            self._output[-1]["status"] = "incomplete"
        return self._response(choice.finish_reason)

    async def _logprobs(self, item: CompletionOutput) -> list[Any]:
        if item.logprobs is None:
            return []
        tokenizer = await self._answer.generation.served.llm.get_tokenizer()
        found = logprobs.of_chat(tokenizer, item.token_ids, item.logprobs, self._body.top_logprobs or 0)
        return list(found["content"])

    # ---- in pieces ---------------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        begun = False
        async with contextlib.aclosing(self._answer.pieces()) as pieces:
            async for piece in pieces:
                if not begun:
                    begun = True
                    for kind in ("response.created", "response.in_progress"):
                        yield self._event(kind, response=self._response(None))
                found = self._waiting + await self._logprobs(piece.item)
                for event in piece.events:
                    for written in self._written(event, found):
                        yield written
                    if isinstance(event, Content):
                        found = []
                self._waiting = found  # of tokens that show nothing yet
                if piece.finish_reason is not None:
                    if not self._output:
                        for written in self._switch(_message("", "in_progress", [])):
                            yield written
                    for written in self._close(
                        "incomplete" if piece.finish_reason == "length" else "completed"
                    ):
                        yield written
                    response = self._response(piece.finish_reason)
                    yield self._event(f"response.{response['status']}", response=response)

    def _written(self, event: Event, found: list[Any]) -> list[bytes]:
        """The events of what is new; `found`: its tokens' log probabilities, which go with content."""
        if isinstance(event, Content):
            begun = [] if self._open == "message" else self._switch(_message("", "in_progress", []))
            part = self._output[-1]["content"][0]
            part["text"] += event.text
            part["logprobs"] += found
            return [*begun, self._delta("output_text", event.text, content_index=0, logprobs=found)]
        if isinstance(event, Reasoning):
            begun = [] if self._open == "reasoning" else self._switch(_reasoning("", "in_progress"))
            self._output[-1]["content"][0]["text"] += event.text
            return [*begun, self._delta("reasoning_text", event.text, content_index=0)]
        if isinstance(event, CallBegun):
            return self._switch(_function_call(event.id, event.name, "", "in_progress"))
        if isinstance(event, ArgumentsDelta):
            self._output[-1]["arguments"] += event.text
            return [self._delta("function_call_arguments", event.text)]
        return self._close() if isinstance(event, CallEnded) else []

    def _switch(self, item: dict[str, Any]) -> list[bytes]:
        """Begin an item."""
        closed = self._close()
        self._output.append(item)
        self._open = item["type"]
        at = len(self._output) - 1
        shown = {**item, "content": []} if "content" in item else item
        events = [*closed, self._event("response.output_item.added", output_index=at, item=shown)]
        if "content" in item:
            place = {"output_index": at, "item_id": item["id"], "content_index": 0}
            events.append(self._event("response.content_part.added", **place, part=item["content"][0]))
        return events

    def _close(self, status: str = "completed") -> list[bytes]:
        """End the item that is being written."""
        if not self._open:
            return []
        self._open = ""
        at = len(self._output) - 1
        item = self._output[at]
        item["status"] = status
        place: dict[str, Any] = {"output_index": at, "item_id": item["id"]}
        if "content" not in item:
            done = {"arguments": item["arguments"], "name": item["name"]}
            events = [self._event("response.function_call_arguments.done", **place, **done)]
        else:
            place["content_index"] = 0
            part = item["content"][0]
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            more = {"logprobs": part["logprobs"]} if kind == "output_text" else {}
            events = [
                self._event(f"response.{kind}.done", **place, text=part["text"], **more),
                self._event("response.content_part.done", **place, part=part),
            ]
        return [*events, self._event("response.output_item.done", output_index=at, item=item)]

    def _delta(self, kind: str, text: str, **more: Any) -> bytes:
        at = len(self._output) - 1
        place = {"output_index": at, "item_id": self._output[at]["id"]}
        return self._event(f"response.{kind}.delta", **place, delta=text, **more)

    def _event(self, kind: str, **what: Any) -> bytes:
        found = {"type": kind, "sequence_number": self._number, **what}
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + to_json(found) + b"\n\n"

    # ---- both --------------------------------------------------------------------------------------------

    def _response(self, reason: str | None) -> dict[str, Any]:
        """The whole object; reason None: it is not finished."""
        body, generation = self._body, self._answer.generation
        status = "in_progress" if reason is None else "incomplete" if reason == "length" else "completed"
        usage = generation.usage
        return {
            "id": generation.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata if isinstance(body.metadata, dict) else {},
            "model": generation.model,
            "output": self._output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"}}
            if body.text is None
            else body.text.model_dump(by_alias=True, exclude_none=True),
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None
            if reason is None
            else {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached},
                "output_tokens": usage.generated,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning},
                "total_tokens": usage.prompt + usage.generated,
            },
        }


def _message(text: str, status: str, found: list[Any]) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": found}
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [part],
    }


def _reasoning(text: str, status: str) -> dict[str, Any]:
    part = {"type": "reasoning_text", "text": text}
    return {
        "id": f"rs_{uuid.uuid4().hex}",
        "type": "reasoning",
        "summary": [],
        "status": status,
        "content": [part],
    }


def _function_call(call_id: str, name: str, arguments: str, status: str) -> dict[str, Any]:
    return {
        "id": f"fc_{uuid.uuid4().hex}",
        "type": "function_call",
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
        "status": status,
    }
