"""What the routes share: reading a body, and describing it for /openapi.json."""

from __future__ import annotations

import asyncio
import time
from typing import Any, TypeVar

from fastapi import Request

from fastllm.serve.call import Call, call_of
from fastllm.serve.protocol.base import Body, read
from fastllm.serve.state import ServerState

B = TypeVar("B", bound=Body)

INLINE_BYTES = 1 << 16  # of a body that is parsed where it stands; that takes less than a millisecond
FINGERPRINT = "fastllm"


async def begin(request: Request, kind: type[B]) -> tuple[ServerState, Call, B]:
    """The server, the call and its body.

    Raises:
        HTTPError: 400, the body is not what this route takes.
    """
    state: ServerState = request.app.state.server
    call = call_of(request.scope)
    raw = await request.body()
    if len(raw) <= INLINE_BYTES:
        return state, call, read(kind, raw)
    return state, call, await asyncio.to_thread(read, kind, raw)


def now() -> int:
    """Seconds since 1970, as answers say when they were made."""
    return int(time.time())


def takes(kind: type[Body]) -> dict[str, Any]:
    """The description of a route that takes such a body; the app adds the schemas that are referred to."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "x-body": kind.__name__,
    }


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
    }
    for status, text in {
        400: "the request is wrong; `param` says where",
        401: "no valid key",
        403: "this host, origin or key may not",
        404: "no such model",
        408: "the body did not come in time",
        413: "the body is too large",
        415: "the body is no JSON",
        429: "a limit of this key; see Retry-After",
        500: "a fault of the server",
        503: "no room, no model, or shutting down; see Retry-After",
        504: "not done in time",
    }.items()
}
