"""A connection that cannot be held open or filled up for nothing: caps and deadlines before any request.

uvicorn reads HTTP with httptools, which sets no bound on the size of headers and none on the time that they
take (CVE-2025-48956 was that in another server). Here both have one, and so has the number of connections.
Between requests a connection stays open for longer than a client keeps it in its pool: else clients would
meet a connection that is just being closed. Where there are too many, the one that was idle longest makes
room. The body's bounds are `guard.py`'s.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fastllm.serve.config import Limits


class Connection(HttpToolsProtocol):
    """One client's connection; see `connection_class` for the class to use."""

    limits = Limits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._in_headers = True
        if len(self.connections) > self.limits.connections and not self._close_an_idle_one():
            self._refuse(503, "too many connections")
            return
        self._start_deadline()

    def _close_an_idle_one(self) -> bool:
        """Makes room: of the connections that wait for another request, the one that has waited longest."""
        idle = [
            (other.timeout_keep_alive_task.when(), other.transport)
            for other in self.connections
            if isinstance(other, Connection)
            and other.timeout_keep_alive_task is not None
            and not other.transport.is_closing()
        ]
        if not idle:
            return False
        min(idle, key=lambda one: one[0])[1].close()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._unfinished = len(data) if self._in_headers else 0
        super().data_received(data)
        # Within a header that has not ended nothing was counted yet.
        if self._in_headers and not self.transport.is_closing():
            self._header_bytes += self._unfinished
            if self._header_bytes > self.limits.header_bytes:
                self._refuse(431, f"request line and headers of more than {self.limits.header_bytes} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = 0
        self._in_headers = True
        self._counted = 0
        if self._deadline is None:
            self._start_deadline()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._stop_deadline()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn answers to what is no HTTP; also where a callback of ours has refused."""
        if self._counted > self.limits.header_bytes:
            self._refuse(431, f"request line and headers of more than {self.limits.header_bytes} bytes")
        else:
            self._refuse(400, "no valid HTTP request")

    def _count(self, size: int) -> None:
        self._counted += size
        if self._counted > self.limits.header_bytes:
            raise ValueError("headers too large")  # ends the parsing

    _counted = 0
    _unfinished = 0

    def _start_deadline(self) -> None:
        self._deadline = self.loop.call_later(self.limits.header_seconds, self._late)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self._refuse(408, "the request's headers did not come in time")

    def _refuse(self, status: int, message: str) -> None:
        """Answer without a request, and close."""
        self._stop_deadline()
        if self.cycle is not None and not self.cycle.response_complete:  # an answer is under way on it
            self.transport.close()
            return
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        body = json.dumps({"error": error}).encode()
        reason = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}
        head = (
            f"HTTP/1.1 {status} {reason.get(status, 'Service Unavailable')}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def connection_class(limits: Limits) -> type[Any]:
    """`Connection` with these limits, as uvicorn's `http` option takes it."""
    return type("Connection", (Connection,), {"limits": limits})
