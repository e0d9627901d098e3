"""The middleware that counts HTTP requests: FastAPI and Starlette, streams, failures, clients that leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from prometheus_client import CollectorRegistry
from scrapes import Scrape
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from fastllm.serve.http_metrics import CLIENT_LEFT, HttpMetrics, MetricsMiddleware, handler_of


def scope(path: str, method: str = "GET") -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }


class Client:
    """Calls an app as a server does."""

    def __init__(self, app: Any, **options: Any) -> None:
        self.registry = CollectorRegistry()
        self.app = MetricsMiddleware(app, HttpMetrics(self.registry), **options)
        self.sent: list[Any] = []
        self.watch: Callable[[], None] = lambda: None

    async def get(self, path: str, method: str = "GET") -> int:
        self.sent = []
        asked = False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if asked:
                await asyncio.Event().wait()
            asked = True
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            self.sent.append(message)
            self.watch()

        await self.app(scope(path, method), receive, send)
        return int(self.sent[0]["status"]) if self.sent else 0

    def count(self, **labels: str) -> float:
        return Scrape(self.registry).value("http_requests_total", **labels)

    def series(self) -> set[tuple[str, str, str]]:
        return {
            (sample.labels["handler"], sample.labels["method"], sample.labels["status"])
            for sample in Scrape(self.registry)
            if sample.name == "http_requests_total"
        }

    @property
    def in_progress(self) -> float:
        scrape = Scrape(self.registry)
        return scrape.value("http_requests_inprogress") if scrape.has("http_requests_inprogress") else 0.0


def fastapi_app() -> FastAPI:
    app = FastAPI()
    router = APIRouter(prefix="/v1")

    @router.get("/models/{name}")
    async def model(name: str) -> str:
        return name

    @router.get("/stream/{name}")
    async def stream(name: str) -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"data\n"
                await asyncio.sleep(0.01)

        return StreamingResponse(pieces())

    @app.get("/refuse")
    async def refuse() -> None:
        raise HTTPException(429)

    @app.get("/fail")
    async def fail() -> None:
        raise ValueError("broken")

    @app.get("/slow")
    async def slow() -> None:
        await asyncio.sleep(60)

    deep = APIRouter()

    @deep.get("/deep/{name}")
    async def show(name: str) -> str:
        return name

    deeper = APIRouter()
    deeper.include_router(deep, prefix="/inner")
    app.include_router(router)
    app.include_router(deeper, prefix="/outer")
    other = FastAPI()
    other.include_router(deep, prefix="/mounted")
    app.mount("/sub", other)
    return app


async def test_handlers_are_templates() -> None:
    client = Client(fastapi_app())
    for name in ("one", "two", "three"):
        assert await client.get(f"/v1/models/{name}") == 200
    assert await client.get("/v1/models/one", "POST") == 405
    assert await client.get("/refuse") == 429
    for i in range(5):
        assert await client.get(f"/no/such/path/{i}") == 404
    assert client.count(handler="/v1/models/{name}", method="GET", status="200") == 3
    assert client.count(handler="/refuse", status="429") == 1
    assert client.count(handler="unmatched", status="404") == 5
    scrape = Scrape(client.registry, "")
    assert scrape.value("http_request_duration_seconds_count", handler="/v1/models/{name}", method="GET") == 3
    assert "/no/such" not in scrape.text
    assert client.in_progress == 0


async def test_handlers_have_the_prefixes_that_they_were_included_under() -> None:
    client = Client(fastapi_app())
    for name in ("one", "two"):
        assert await client.get(f"/outer/inner/deep/{name}") == 200
        assert await client.get(f"/sub/mounted/deep/{name}") == 200
        assert await client.get(f"/sub/none/{name}") == 404
    assert client.count(handler="/outer/inner/deep/{name}", status="200") == 2
    assert client.count(handler="/mounted/deep/{name}", status="200") == 2
    assert len(client.series()) == 3


async def test_a_route_may_be_known_by_its_endpoint_alone() -> None:
    """As in older versions of Starlette."""

    def endpoint() -> None: ...

    class Old:
        def __init__(self, path: str, endpoint: object = None, routes: Any = ()) -> None:
            self.path, self.endpoint, self.routes = path, endpoint, routes

    routes = [Old("/other", object()), Old("/mount", None, [Old("/{name}", endpoint)])]
    assert handler_of({"endpoint": endpoint, "app": Old("", None, routes)}) == "/{name}"
    assert handler_of({"endpoint": object(), "app": Old("", None, routes)}) == "unmatched"
    assert handler_of({}) == "unmatched"


async def test_methods_that_nobody_knows_make_no_series() -> None:
    client = Client(fastapi_app())
    for i in range(4):
        await client.get("/refuse", f"METHOD{i}")
    assert {method for _, method, _ in client.series()} == {"OTHER"}


async def test_a_stream_is_in_progress_until_its_end() -> None:
    client = Client(fastapi_app())
    seen = []
    client.watch = lambda: seen.append(client.in_progress)
    assert await client.get("/v1/stream/x") == 200
    assert seen == [1.0] * len(client.sent)
    assert client.in_progress == 0
    scrape = Scrape(client.registry)
    assert scrape.value("http_request_duration_seconds_sum", handler="/v1/stream/{name}") >= 0.02
    assert client.count(handler="/v1/stream/{name}", status="200") == 1


async def test_a_failure_is_500() -> None:
    client = Client(fastapi_app())
    with pytest.raises(ValueError, match="broken"):
        await client.get("/fail")
    assert client.count(handler="/fail", status="500") == 1
    assert client.in_progress == 0


async def test_a_failure_before_any_answer_is_500_too() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("broken")

    client = Client(app)
    with pytest.raises(ValueError, match="broken"):
        await client.get("/")
    assert client.count(handler="unmatched", status="500") == 1


async def test_a_client_that_leaves() -> None:
    client = Client(fastapi_app())
    task = asyncio.create_task(client.get("/slow"))
    await asyncio.sleep(0.05)
    assert client.in_progress == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert client.count(handler="/slow", status=str(CLIENT_LEFT)) == 1
    assert client.in_progress == 0


async def test_starlette_without_fastapi() -> None:
    async def show(request: Request) -> PlainTextResponse:
        return PlainTextResponse("text")

    inner = Mount("/inner", routes=[Route("/{name}", show)])
    client = Client(Starlette(routes=[Route("/items/{item}", show), inner]))
    assert await client.get("/items/7") == 200
    assert ("/items/{item}", "GET", "200") in client.series()


async def test_what_is_excluded_or_no_http_passes_through() -> None:
    client = Client(fastapi_app(), excluded=("/refuse",))
    assert await client.get("/refuse") == 429
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    other = Client(app)
    for kind in ("lifespan", "websocket"):
        await other.app({"type": kind}, None, None)  # type: ignore[arg-type]
    assert seen == ["lifespan", "websocket"]
    assert client.series() == other.series() == set()
