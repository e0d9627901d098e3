"""Prometheus metrics of HTTP, and the ASGI middleware that takes them.

    app.add_middleware(MetricsMiddleware, metrics=HttpMetrics(registry))  # the outermost

Names and labels are those of prometheus-fastapi-instrumentator, which vLLM's server has, too:

    http_requests_total{handler, method, status}    counter
    http_request_duration_seconds{handler, method}  histogram, to the last byte of the answer
    http_requests_inprogress{method}                gauge

Only what the server defines becomes a label: `handler` is the route's template (/v1/models/{name}), never a
path, and UNMATCHED where no route is; a method that HTTP does not know is OTHER; `status` is the exact code.
So clients cannot make series. A request whose client left before there was a status counts as 499, one that
raised as 500.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

from fastllm.serve.extra import missing

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
except ImportError as error:
    raise missing("http_metrics", "prometheus-client", "serve") from error

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"))
OTHER = "OTHER"
UNMATCHED = "unmatched"
CLIENT_LEFT = 499  # as nginx calls it
SECONDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
    *(120.0, 300.0, 600.0, 1800.0),
)


class HttpMetrics:
    """Counts requests. To be called from any thread.

    Args:
        registry: where they are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "http_requests",
            "Requests answered, by route template, method and status.",
            ("handler", "method", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "From a request's head to the last byte of its answer.",
            ("handler", "method"),
            buckets=SECONDS,
            registry=registry,
        )
        self._in_progress = Gauge(
            "http_requests_inprogress", "Requests being answered.", ("method",), registry=registry
        )

    def begin(self, method: str) -> float:
        """A request has come. Returns what `end` wants as `begun`."""
        self._in_progress.labels(_method(method)).inc()
        return time.monotonic()

    def end(self, begun: float, handler: str, method: str, status: int) -> None:
        """It is answered, in whichever way."""
        method = _method(method)
        self._in_progress.labels(method).dec()
        self._requests.labels(handler, method, str(status)).inc()
        self._seconds.labels(handler, method).observe(time.monotonic() - begun)


def _method(name: str) -> str:
    return name if name in METHODS else OTHER


class MetricsMiddleware:
    """Pure ASGI: counts each HTTP request once, streamed answers until they end.

    Args:
        app: what is inside.
        metrics: where it is counted.
        excluded: route templates that are not counted, such as "/health".
    """

    def __init__(self, app: App, metrics: HttpMetrics, excluded: Iterable[str] = ()) -> None:
        self.app = app
        self._metrics = metrics
        self._excluded = frozenset(excluded)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._excluded:
            await self.app(scope, receive, send)
            return
        status = 0  # none yet

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        method = scope["method"]
        begun = self._metrics.begin(method)
        failed = 500
        try:
            await self.app(scope, receive, note)
            failed = CLIENT_LEFT  # it returned without an answer
        except asyncio.CancelledError:
            failed = CLIENT_LEFT
            raise
        finally:
            self._metrics.end(begun, handler_of(scope), method, status or failed)


def handler_of(scope: Scope) -> str:
    """The template of the route that a request has taken, once the router has seen it; UNMATCHED for none. Of
    a mounted app it is the one that this app knows.

    The route is in the scope, but newer versions of FastAPI leave there what a router declares; the template
    with the prefix under which it was included is beside it. Older ones of Starlette leave the endpoint only,
    whose route is looked up.
    """
    fastapi = scope.get("fastapi")
    template = None
    if isinstance(fastapi, Mapping):
        template = _template(fastapi.get("effective_route_context"))
    if template is None:
        template = _template(scope.get("route"))
    if template is None and (endpoint := scope.get("endpoint")) is not None:
        routes = getattr(scope.get("app"), "routes", ())
        template = next((_template(item) for item in _flat(routes) if _endpoint(item) is endpoint), None)
    return UNMATCHED if template is None else template


def _flat(routes: Iterable[Any]) -> Iterable[Any]:
    for route in routes:
        yield route
        yield from _flat(getattr(route, "routes", None) or ())


def _endpoint(route: Any) -> Any:
    return getattr(route, "endpoint", None)


def _template(route: Any) -> str | None:
    path = getattr(route, "path", None)
    return path if isinstance(path, str) else None
