"""Answers that take a while: JSON at the end, or a stream of events. Both end with the client's leaving.

Nothing is sent before there is something to say, so that what goes wrong before is a plain error with its
status. Afterwards it is an event of the stream, which then ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from starlette.responses import Response

from fastllm.errors import FastLLMError
from fastllm.serve.call import call_of
from fastllm.serve.disconnect import while_connected
from fastllm.serve.errors import HTTPError, as_http, encode

Scope = Any
Receive = Any
Send = Any

_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events
]


def to_json(value: Any) -> bytes:
    """Compact, ASCII alone: lone surrogates stay what they were."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


class JsonAnswer(Response):
    """What `work` gives, as JSON.

    Args:
        seconds: that it may take from the request's arrival; None: any time.
    """

    def __init__(self, work: Coroutine[Any, Any, Any], seconds: float | None) -> None:
        super().__init__()
        self._work = work
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = _left(scope, self._seconds)
        body = to_json(await while_connected(receive, self._work, seconds=left))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class EventStream(Response):
    """Events, each of them bytes as they go over the wire.

    Args:
        events: ends the stream by its end; what it raises after its first event becomes an event.
        seconds: as above.
        error_event: how an error is put into the stream.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], seconds: float | None, *, error_event: str = ""
    ) -> None:
        super().__init__()
        self._events = events
        self._seconds = seconds
        self._name = f"event: {error_event}\n" if error_event else ""
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = _left(scope, self._seconds)
        try:
            await while_connected(receive, self._send_all(send), seconds=left)
        except FastLLMError as error:
            if not self._started:
                raise
            await self._send_error(scope, send, as_http(error))
        await send({"type": "http.response.body", "body": b""})

    async def _send_all(self, send: Send) -> None:
        async with contextlib.aclosing(self._events) as events:
            async for event in events:
                if not self._started:
                    self._started = True
                    await send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
                await send({"type": "http.response.body", "body": event, "more_body": True})

    async def _send_error(self, scope: Scope, send: Send, error: HTTPError) -> None:
        call_of(scope).error_code = error.code or error.type
        event = self._name.encode() + b"data: " + encode(error, scope["path"]) + b"\n\n"
        with contextlib.suppress(asyncio.TimeoutError):  # a reader that takes nothing does not hold us up
            await asyncio.wait_for(
                send({"type": "http.response.body", "body": event, "more_body": True}), timeout=1.0
            )


def _left(scope: Scope, seconds: float | None) -> float | None:
    return None if seconds is None else max(seconds - call_of(scope).seconds, 0.001)
