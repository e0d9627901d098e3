"""A server for tests: the real one, on a port of its own, in a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx

from fastllm.engine.engine import Engine
from fastllm.serve.config import Limits, ServeConfig
from fastllm.serve.server import Server, serve

T = TypeVar("T")
TINY: dict[str, Any] = {"max_num_seqs": 4, "threads": 1, "kv_cache_tokens": 2048}


class Running:
    """A server that runs until `stop`.

    Args:
        model: a path; None: no model.
        settings: of `ServeConfig`; `limits` as a dict, `engine` added to TINY.
    """

    def __init__(self, model: Path | str | None, **settings: Any) -> None:
        limits = Limits(**settings.pop("limits", {}))
        engine = {**TINY, **settings.pop("engine", {})}
        names = {"served_names": ["tiny"]} if model is not None else {}
        self.config = ServeConfig(
            model=None if model is None else str(model), port=0, limits=limits, engine=engine,
            **{**names, **settings},
        )  # fmt: skip
        self.server: Server
        self.failure: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)
        self._thread.start()
        self._ready.wait(60)
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        async def main() -> None:
            self.loop = asyncio.get_running_loop()
            await serve(self.config, self._started)

        try:
            asyncio.run(main())
        except BaseException as error:
            self.failure = error
        finally:
            self._ready.set()

    def _started(self, server: Server) -> None:
        self.server = server
        self.port = server.port
        self._ready.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> httpx.Client:
        """An HTTP client of this server."""
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, **options)

    def connect(self) -> socket.socket:
        """A plain connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def on_loop(self, function: Callable[[], Awaitable[T]]) -> T:
        """Run something on the server's event loop."""

        async def run() -> T:
            return await function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(30)

    def on_engine(self, function: Callable[[Engine], T]) -> T:
        """Ask the first model's engine, on its thread, between two steps."""
        (served, *_) = self.server.state.models.all()
        return served.llm._thread.call(function).result(30)

    def stop(self) -> None:
        """Leave, as by SIGTERM, and wait for the end."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.server.leave)
            self._thread.join(60)
        assert not self._thread.is_alive()
        if self.failure is not None:
            raise self.failure

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def events(response: httpx.Response) -> list[str]:
    """The data of a stream's events."""
    found = []
    for line in response.iter_lines():
        assert not line or line.startswith("data: "), line
        if line:
            found.append(line.removeprefix("data: "))
    return found
