"""What stands before every route: host, origin, key, content type, body. Pure ASGI, so that streams pass.

In this order, the first that fails answers:

    Host        one of the allowed ones (against DNS rebinding)                        403
    Origin      where a browser sends one: this server's own, or an allowed one        403
    key         all routes but OPEN_ROUTES and the page; /admin/ an administrator's    401, 403
    draining    no new work after SIGTERM                                              503
    body        application/json, within its size and its time                         415, 413, 408

The body is read here as a whole, so that no route can forget its bounds; what a route reads afterwards tells
it of the client's leaving alone. What a route raises becomes an answer here, in OpenAI's shape.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastllm.serve import logs
from fastllm.serve.call import CALL, Call
from fastllm.serve.disconnect import Disconnected
from fastllm.serve.errors import HTTPError, as_http, encode
from fastllm.serve.state import ServerState

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_ROUTES = frozenset(("/health", "/ready"))
PAGE_ROUTES = re.compile(r"/|/page/[a-z0-9_.-]+")
ADMIN = "/admin/"
READS = frozenset(("GET", "HEAD", "OPTIONS"))  # methods that ask for nothing to be done
CLIENT_GONE = 499  # in logs, as nginx has it
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class Guard:
    """See the module."""

    def __init__(self, app: App, state: ServerState) -> None:
        self._app = app
        self._state = state
        self._hosts = state.config.hosts
        self._origins = frozenset(origin.lower() for origin in state.config.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks WebSocket
            await send({"type": "websocket.close", "code": 1003})
            return
        headers = _Headers(scope["headers"])
        given = headers.one(b"x-request-id")
        request_id = given.decode() if given and _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        client = scope.get("client")
        call = Call(request_id, client[0] if client else "", scope["method"], scope["path"])
        call.trace = {
            name.decode(): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        scope[CALL] = call
        answer = _Answer(send, call, self._cross_origin(headers))
        self._state.began()
        with logs.request(request_id):
            await self._serve(scope, headers, receive, answer, call)

    async def _serve(
        self, scope: Scope, headers: _Headers, receive: Receive, answer: _Answer, call: Call
    ) -> None:
        try:
            try:
                self._check_host(headers)
                self._check_origin(headers)
                if call.method == "OPTIONS" and headers.one(b"access-control-request-method") is not None:
                    await answer.preflight()
                    return
                self._authenticate(call, headers)
                if self._state.draining and call.path not in OPEN_ROUTES:
                    raise HTTPError(503, "the server is shutting down", code="draining", retry_after=1)
                body = await self._body(call, headers, receive)
                if call.method not in READS:
                    await self._state.note(call, body)
                await self._app(scope, _replay(body, receive), answer.send)
            except (asyncio.CancelledError, Disconnected):
                raise
            except Exception as error:
                found = as_http(error)
                if found.status >= 500 and not isinstance(error, HTTPError):
                    logger.error("%s %s failed", call.method, call.path, exc_info=error)
                await answer.fail(found)
        except (Disconnected, ConnectionError):
            call.status = CLIENT_GONE
        except asyncio.CancelledError:
            call.status = call.status or CLIENT_GONE
            raise
        finally:
            await self._state.ended(call)

    # ---- what is checked ---------------------------------------------------------------------------------

    def _check_host(self, headers: _Headers) -> None:
        hosts = headers.all(b"host")
        if len(hosts) > 1:
            raise HTTPError(400, "more than one Host header", code="bad_host")
        if self._hosts is not None and (not hosts or _name_of(hosts[0]) not in self._hosts):
            raise HTTPError(403, "this Host is not served here", code="bad_host")

    def _check_origin(self, headers: _Headers) -> None:
        origin = headers.one(b"origin")
        if origin is None or self._own(origin, headers) or self._cross_origin(headers):
            return
        raise HTTPError(403, "pages of this Origin may not call", code="bad_origin")

    def _own(self, origin: bytes, headers: _Headers) -> bool:
        """Whether the page that calls came from here. The scheme is not compared: TLS may end before us."""
        return origin.partition(b"://")[2].lower() == (headers.one(b"host") or b"").lower() != b""

    def _cross_origin(self, headers: _Headers) -> bytes | None:
        """The allowed origin of another place that calls."""
        origin = headers.one(b"origin")
        if origin is not None and origin.decode("latin-1").lower() in self._origins:
            return origin
        return None

    def _authenticate(self, call: Call, headers: _Headers) -> None:
        state, path = self._state, call.path
        presented = _presented(headers)
        if path.startswith(ADMIN):
            if not state.admin_keys:
                raise HTTPError(403, "there is no administrator: the server was started without admin keys")
            key = None if presented is None else state.admin_keys.find(presented)
            if key is None:
                raise HTTPError(401, "an administrator's key is needed", code="invalid_api_key")
            call.key, call.admin = key.name, True
            return
        if path in OPEN_ROUTES or (state.config.page and PAGE_ROUTES.fullmatch(path)):
            return
        if not state.api_keys:
            return
        key = None if presented is None else state.api_keys.find(presented)
        if key is None:
            raise HTTPError(401, "a valid API key is needed", code="invalid_api_key")
        call.key = key.name

    async def _body(self, call: Call, headers: _Headers, receive: Receive) -> bytes:
        limits = self._state.config.limits
        declared = headers.one(b"content-length")
        if declared is not None and int(declared) > limits.body_bytes:  # digits: httptools has looked
            raise HTTPError(413, f"a body of more than {limits.body_bytes} bytes", code="body_too_large")
        try:
            body = await asyncio.wait_for(_read(receive, limits.body_bytes), limits.body_seconds)
        except asyncio.TimeoutError:
            raise HTTPError(408, "the body did not come in time", code="timeout") from None
        if call.method in ("POST", "PUT", "PATCH") and body:
            kind = (headers.one(b"content-type") or b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                raise HTTPError(415, "the content type has to be application/json", code="bad_content_type")
        return body


class _Headers:
    """Headers by name, in lower case."""

    def __init__(self, raw: list[tuple[bytes, bytes]]) -> None:
        self._raw = raw

    def one(self, name: bytes) -> bytes | None:
        return next((value for key, value in self._raw if key == name), None)

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self._raw if key == name]


class _Answer:
    """The way out: adds headers, and keeps what was said for the log."""

    def __init__(self, send: Send, call: Call, origin: bytes | None) -> None:
        self._send = send
        self._call = call
        self._extra: list[tuple[bytes, bytes]] = [
            (b"x-request-id", call.request_id.encode()),
            (b"x-content-type-options", b"nosniff"),
        ]
        if origin is not None:
            self._extra += [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]
        self._started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            self._call.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self._extra]}
        await self._send(message)

    async def fail(self, error: HTTPError) -> None:
        """Answer with an error; where the answer has begun, cut it off."""
        self._call.error_code = error.code or error.type
        if self._started:
            raise ConnectionError  # the client sees an answer that does not end
        body = encode(error, self._call.path)
        headers = [(name.encode(), value.encode()) for name, value in error.headers().items()]
        headers.append((b"content-length", str(len(body)).encode()))
        if error.status in (408, 413) or error.code == "draining":  # nothing more is to come this way
            headers.append((b"connection", b"close"))
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    async def preflight(self) -> None:
        """Answer a browser that asks whether it may."""
        headers = [
            (b"access-control-allow-methods", b"GET, POST, DELETE"),
            (b"access-control-allow-headers", b"authorization, content-type, x-api-key, x-request-id"),
            (b"access-control-max-age", b"600"),
        ]
        await self.send({"type": "http.response.start", "status": 204, "headers": headers})
        await self.send({"type": "http.response.body", "body": b""})


async def _read(receive: Receive, most: int) -> bytes:
    """The whole body, as long as it is no longer than `most`."""
    pieces, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        piece = message.get("body", b"")
        size += len(piece)
        if size > most:
            raise HTTPError(413, f"a body of more than {most} bytes", code="body_too_large")
        pieces.append(piece)
        more = message.get("more_body", False)
    return b"".join(pieces)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body once, and then what is left: the client's leaving."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _presented(headers: _Headers) -> str | None:
    """The key of a request, as OpenAI's or as Anthropic's clients send it."""
    scheme, _, rest = (headers.one(b"authorization") or b"").partition(b" ")
    value = rest.strip() if scheme.lower() == b"bearer" else headers.one(b"x-api-key")
    return value.decode("latin-1") if value else None


def _name_of(host: bytes) -> str:
    """A Host header without its port."""
    text = host.decode("latin-1").lower()
    return text[: text.rindex("]") + 1] if text.startswith("[") and "]" in text else text.partition(":")[0]
