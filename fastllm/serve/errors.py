"""Errors in OpenAI's shape, {"error": {"message", "type", "param", "code"}}, or in Anthropic's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteError

from fastllm.errors import (
    CapacityError,
    EngineDeadError,
    FastLLMError,
    ModelFileError,
    ModelSourceError,
    RequestError,
    UnsupportedModelError,
)

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}
ANTHROPIC_TYPES = {413: "request_too_large", 500: "api_error", 503: "overloaded_error", 504: "timeout_error"}


class HTTPError(FastLLMError):
    """An answer other than 200, and what it says.

    Attributes:
        status: of HTTP.
        param: the field at fault, if one is.
        code: for programs, such as "model_not_found".
        retry_after: seconds after which it may be tried again; None: not said.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def type(self) -> str:
        return TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """What the client gets."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> Mapping[str, str]:
        found = {"content-type": "application/json"}
        if self.retry_after is not None:
            found["retry-after"] = str(max(math.ceil(self.retry_after), 1))
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found


def encode(error: HTTPError, path: str = "") -> bytes:
    """The body as bytes, in the shape that clients of this path know; lone surrogates are escaped."""
    if path.startswith("/v1/messages"):
        kind = ANTHROPIC_TYPES.get(error.status, error.type)
        return json.dumps({"type": "error", "error": {"type": kind, "message": error.message}}).encode()
    return json.dumps(error.body()).encode()


def as_http(error: Exception) -> HTTPError:
    """Any exception as an answer. What we did not foresee says nothing of what is inside."""
    if isinstance(error, HTTPError):
        return error
    if isinstance(error, StarletteError):  # of the routing
        return HTTPError(error.status_code, str(error.detail))
    if isinstance(error, RequestValidationError):  # of a path or a query: bodies are read by the routes
        return HTTPError(400, "the path or the query is wrong", code="invalid_value")
    if isinstance(error, RequestError):
        return HTTPError(400, str(error), param=error.field, code="invalid_value")
    if isinstance(error, CapacityError):
        return HTTPError(400, str(error), code="context_length_exceeded")
    if isinstance(error, EngineDeadError):
        return HTTPError(503, "the engine has stopped", code="engine_dead")
    if isinstance(error, (UnsupportedModelError, ModelFileError, ModelSourceError)):
        return HTTPError(400, str(error), code="model_error")
    return HTTPError(500, "internal error", code="internal_error")
