"""One request over HTTP, measured.

aiohttp rather than httpx: with 64 streams of 25 tokens a second each, from a server that does nothing else,
it took 45 us of the generator's processor time per token, httpx 127 us (means of two turns each, event and
JSON read). Times are taken when aiohttp hands over what arrived, before anything of it is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import aiohttp

from fastllm.bench import dialect
from fastllm.bench.record import OK, RequestRecord
from fastllm.bench.sse import SSEError, SSEParser
from fastllm.errors import RequestError

# Shorter than servers keep an idle connection (5 s in uvicorn and llama-server), so that they do not close it
# just when it is used again.
KEEP_ALIVE_SECONDS = 2.0
_DONE_SECONDS = 1.0  # for the rest of an answer after its [DONE]
_MOST_BODY_BYTES = 64 << 20


@dataclass(frozen=True)
class Timeouts:
    """Seconds for a whole request, for connecting, and for silence once connected."""

    total: float = 600.0
    connect: float = 10.0
    silence: float = 120.0


class Client:
    """Sends requests to one server. Made by `connect`."""

    def __init__(self, session: aiohttp.ClientSession, base: str, endpoint: str, stream: bool) -> None:
        self._session = session
        self._base = base
        self._url = base + dialect.PATHS[endpoint]
        self._endpoint = endpoint
        self._stream = stream
        self.server_header: str | None = None

    async def send(self, body: bytes, record: RequestRecord) -> None:
        """Make one request and fill its record; what fails, fails there. Only a cancellation is raised."""
        record.sent = time.perf_counter()
        try:
            while True:
                try:
                    await self._send(body, record)
                    break
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionResetError):
                    # The server closed an idle connection while the request was on its way: not a failure of
                    # its own. Each turn uses such a connection up.
                    if not record.reused or record.first_byte is not None:
                        raise
                    record.retried, record.reused = True, False
        except (SSEError, dialect.BadAnswer) as error:
            record.fail("bad answer", str(error))
        except dialect.ServerSaid as error:
            record.fail("error in the answer", str(error))
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError) as error:
            record.fail(*explain(error))
        finally:
            if record.end is None:
                record.end = time.perf_counter()
            if record.output_tokens is not None:
                record.counted_by = "usage"
            elif record.tokens:
                record.output_tokens, record.counted_by = len(record.tokens), "chunks"

    async def get_json(self, path: str) -> tuple[int, Any]:
        """Status and content of a GET; the content is None where it is no JSON.

        Raises:
            aiohttp.ClientError, OSError, TimeoutError: no answer came.
        """
        timeout = aiohttp.ClientTimeout(total=10.0)
        async with self._session.get(self._base + path, timeout=timeout, allow_redirects=False) as response:
            self.server_header = response.headers.get("Server", self.server_header)
            try:
                return response.status, json.loads(await _read(response, 1 << 20))
            except (ValueError, RecursionError, dialect.BadAnswer):
                return response.status, None

    async def _send(self, body: bytes, record: RequestRecord) -> None:
        async with self._session.post(
            self._url, data=body, allow_redirects=False, trace_request_ctx=record
        ) as response:
            record.first_byte = time.perf_counter()
            record.http_status = response.status
            self.server_header = response.headers.get("Server", self.server_header)
            if response.status != 200:
                record.fail(f"HTTP {response.status}")  # it stands even if the body does not come
                detail = dialect.error_body(await _read(response, 1 << 16))
                record.detail = " ".join(detail.split())[:300] or None
            elif self._stream:
                kind = response.headers.get("Content-Type", "")
                if not kind.startswith("text/event-stream"):
                    raise dialect.BadAnswer(f"a stream was asked for, {kind or 'no type'} came")
                await self._read_stream(response.content, record)
            else:
                content = await _read(response, _MOST_BODY_BYTES)
                record.end = time.perf_counter()
                self._take(content, record)
                record.status = OK

    async def _read_stream(self, content: aiohttp.StreamReader, record: RequestRecord) -> None:
        parser = SSEParser()
        async for piece in content.iter_any():
            now = time.perf_counter()
            for event in parser.feed(piece):
                if event.data == "[DONE]":
                    record.end, record.status = now, OK
                    await _finish(content)
                    return
                self._take_event(event.data, event.name, record, now)
        now = time.perf_counter()
        for event in parser.close():
            if event.data != "[DONE]":
                self._take_event(event.data, event.name, record, now)
            else:
                record.finish_reason = record.finish_reason or "[DONE]"
        record.end = now
        if record.finish_reason is None:
            record.fail("cut short", "the stream ended with neither [DONE] nor a finish_reason")
        else:
            record.status = OK

    def _take_event(self, data: str, name: str, record: RequestRecord, now: float) -> None:
        if name == "error":
            raise dialect.ServerSaid(dialect.error_body(data.encode()))
        if self._take(data, record):
            record.tokens.append(now)

    def _take(self, text: str | bytes, record: RequestRecord) -> bool:
        """Note what a chunk says. Returns whether it brings text."""
        chunk = dialect.read_chunk(self._endpoint, text, stream=self._stream)
        record.chunks += 1
        record.finish_reason = chunk.finish_reason or record.finish_reason
        if chunk.prompt_tokens is not None:
            record.prompt_tokens = chunk.prompt_tokens
        if chunk.cached_tokens is not None:
            record.cached_tokens = chunk.cached_tokens
        if chunk.output_tokens is not None:
            record.output_tokens = chunk.output_tokens
        return chunk.text


@contextlib.asynccontextmanager
async def connect(
    base: str,
    endpoint: str,
    *,
    stream: bool = True,
    headers: Mapping[str, str] | None = None,
    timeouts: Timeouts | None = None,
    keep_alive: bool = True,
    ca_file: str | None = None,
) -> AsyncIterator[Client]:
    """A client for one server, with as many connections as it takes."""
    timeouts = timeouts or Timeouts()
    try:
        trust = ssl.create_default_context(cafile=ca_file) if ca_file else True
    except OSError as error:
        raise RequestError("ca", ca_file, f"a file of certificates ({error.strerror or error})") from error
    if keep_alive:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS, ssl=trust)
    else:
        connector = aiohttp.TCPConnector(limit=0, force_close=True, ssl=trust)
    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(_note_reuse)
    timeout = aiohttp.ClientTimeout(
        total=timeouts.total, sock_connect=timeouts.connect, sock_read=timeouts.silence
    )
    sent = {"Content-Type": "application/json", **(headers or {})}
    async with aiohttp.ClientSession(
        connector=connector, headers=sent, timeout=timeout, trace_configs=[trace]
    ) as session:
        yield Client(session, base, endpoint, stream)


async def _note_reuse(
    session: aiohttp.ClientSession, context: SimpleNamespace, _: aiohttp.TraceConnectionReuseconnParams
) -> None:
    if isinstance(context.trace_request_ctx, RequestRecord):
        context.trace_request_ctx.reused = True


async def _read(response: aiohttp.ClientResponse, most: int) -> bytes:
    found = bytearray()
    async for piece in response.content.iter_any():
        found += piece
        if len(found) > most:
            raise dialect.BadAnswer(f"an answer of more than {most} bytes")
    return bytes(found)


async def _finish(content: aiohttp.StreamReader) -> None:
    """Read to the end, so that the connection can be used again; a server that goes on talking loses it."""

    async def rest() -> None:
        async for _ in content.iter_any():
            pass

    with contextlib.suppress(asyncio.TimeoutError, aiohttp.ClientError, OSError):
        await asyncio.wait_for(rest(), _DONE_SECONDS)


def explain(error: BaseException) -> tuple[str, str]:
    """Kind and detail of a failure to get an answer."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return "timeout: connecting", ""
    if isinstance(error, aiohttp.SocketTimeoutError):
        return "timeout: silence", ""
    if isinstance(error, asyncio.TimeoutError):
        return "timeout: whole request", ""
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError):
        return "TLS", str(error)
    if isinstance(error, aiohttp.ClientConnectorError):
        return "no connection", error.strerror or str(error)
    if isinstance(
        error,
        aiohttp.ServerDisconnectedError
        | aiohttp.ClientPayloadError
        | aiohttp.ClientOSError
        | ConnectionError,
    ):
        return "cut short", "the server closed the connection"
    if isinstance(error, aiohttp.ClientResponseError):
        return "bad answer", f"no HTTP: {error.message}"
    return "bad answer" if isinstance(error, ValueError) else "no connection", str(error)
