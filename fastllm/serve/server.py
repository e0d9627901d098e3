"""The process: loads the first model, listens, and leaves in peace.

    start ──► load the model ──► listen ──► SIGTERM ──► leaving ──► draining ──► close ──► exit 0
                  │                          (SIGINT)   /ready     no new work,  engines,
               exit 2: an error                         says no,   running       logs
               that is explained                        for        requests
                                                        drain_delay  finish, for
                                                                     drain_seconds

A second signal ends the draining at once. Requests that are left then get an error, not a cut line.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from fastllm.errors import RequestError
from fastllm.serve import logs
from fastllm.serve.app import make_app
from fastllm.serve.config import TLS_VERSIONS, ServeConfig
from fastllm.serve.connection import connection_class
from fastllm.serve.loader import EngineLoader
from fastllm.serve.models import Models, Source
from fastllm.serve.state import ServerState
from fastllm.serve.telemetry import Telemetry

logger = logging.getLogger(__name__)
GRACE_SECONDS = 2.0  # that requests have to say their error once their engine is closed


class Server(uvicorn.Server):
    """uvicorn, with signals and shutdown as drawn above."""

    def _log_started_message(self, listeners: Any) -> None:
        """`main_loop` says it."""

    def __init__(
        self, config: uvicorn.Config, state: ServerState, started: Callable[[Server], None] | None
    ) -> None:
        super().__init__(config)
        self.state = state
        self._on_start = started
        self._leaving = asyncio.Event()
        self._hurry = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        main = threading.current_thread() is threading.main_thread()
        caught = (signal.SIGINT, signal.SIGTERM) if main else ()  # elsewhere they cannot be caught
        for number in caught:
            loop.add_signal_handler(number, self.leave)
        try:
            yield
        finally:
            for number in caught:
                loop.remove_signal_handler(number)

    @property
    def port(self) -> int:
        """Where it listens."""
        found: int = self.servers[0].sockets[0].getsockname()[1]
        return found

    def leave(self) -> None:
        """Begin to leave; called again, at once."""
        if self._leaving.is_set():
            self._hurry.set()
        self._leaving.set()

    async def main_loop(self) -> None:
        scheme = "http" if self.config.ssl is None else "https"
        logger.info("listening on %s://%s:%d", scheme, self.config.host, self.port)
        if self.state.config.port_file is not None:
            write_whole(self.state.config.port_file, str(self.port))
        if self._on_start is not None:
            self._on_start(self)
        ticking = asyncio.ensure_future(super().main_loop())  # the Date header, once a second
        try:
            await self._leaving.wait()
            await self._drain()
        finally:
            self.should_exit = True
            await ticking

    async def _drain(self) -> None:
        state, config = self.state, self.state.config
        state.leaving = True
        logger.info("leaving: /ready says no")
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), config.drain_delay)
        state.draining = True
        for server in self.servers:
            server.close()
        logger.info("draining: %d requests are running", state.running)
        deadline = asyncio.get_running_loop().time() + config.drain_seconds
        while state.running and not self._hurry.is_set():
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                break
            waits = [asyncio.ensure_future(item) for item in (state.idle.wait(), self._hurry.wait())]
            await asyncio.wait(waits, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for item in waits:
                item.cancel()
        if state.running:
            logger.warning("%d requests did not end in time", state.running)
        await state.models.close()


def make_server(
    config: ServeConfig, state: ServerState, started: Callable[[Server], None] | None = None
) -> Server:
    """A server that is ready to `serve`; `started` is called once it listens."""
    options: dict[str, Any] = {}
    if config.certfile is not None:
        options.update(ssl_certfile=str(config.certfile), ssl_keyfile=str(config.keyfile))
        options.update(ssl_keyfile_password=config.key_password)
    settings = uvicorn.Config(
        make_app(state),
        host=config.host,
        port=config.port,
        http=connection_class(config.limits),
        ws="none",
        lifespan="off",
        loop="auto",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=config.limits.connections,
        timeout_keep_alive=config.limits.idle_seconds,  # type: ignore[arg-type]  # whole seconds to its types
        timeout_graceful_shutdown=max(int(GRACE_SECONDS), 1),
        **options,
    )
    settings.load()
    if settings.ssl is not None:
        settings.ssl.minimum_version = TLS_VERSIONS[config.tls_version]
    return Server(settings, state, started)


async def serve(config: ServeConfig, started: Callable[[Server], None] | None = None) -> None:
    """Run a server until it is told to leave.

    Args:
        started: called once it listens.

    Raises:
        FastLLMError: the settings contradict each other, or the model cannot be loaded.
    """
    telemetry = Telemetry(config.otlp_endpoint)
    models = Models(EngineLoader(config, telemetry), config.limits.queued)
    state = ServerState(config, models, telemetry)
    sockets = bind(config.host, config.port)  # before the model is loaded: that takes longer
    try:
        if config.model is not None:
            name, *aliases = config.names
            source = Source(name, config.version, config.model, config.engine, config.loras, aliases)
            await models.load(source)
            models.activate(name, config.version)
        await make_server(config, state, started).serve(sockets)
    finally:
        for item in sockets:
            item.close()
        await models.close()
        await state.close()


def write_whole(path: Path, text: str) -> None:
    """A file that is there with all of its text, or not at all."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    partial.replace(path)


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets of an address, which do not listen yet; all of the same port.

    Raises:
        RequestError: there is no such address, or it is taken.
    """
    found: list[socket.socket] = []
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(infos):
            item = socket.socket(family, kind, protocol)
            found.append(item)
            item.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                item.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            item.bind((address[0], port, *address[2:]))
            port = item.getsockname()[1]
    except OSError as error:
        for item in found:
            item.close()
        raise RequestError("host and port", f"{host}:{port}", f"an address that is free ({error})") from error
    return found


def run(config: ServeConfig) -> None:
    """`serve` in an event loop of its own, with logs as the settings have them."""
    logs.set_up(config.log_format, config.log_level)
    settings = uvicorn.Config(lambda: None, loop="auto", log_config=None)
    factory = settings.get_loop_factory()
    loop = factory() if factory is not None else asyncio.new_event_loop()
    try:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(serve(config))
    finally:
        asyncio.set_event_loop(None)
        loop.close()
