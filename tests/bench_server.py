"""A server of the OpenAI dialect that computes nothing: known delays, known faults, and a log of what it sent
when.

It runs on a thread of its own, so that the load generator can be tested in the main thread or in another
process. How it behaves is a `Behaviour`, which a test may change between requests.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Behaviour:
    """What the server does.

    Attributes:
        first, gap: seconds to the first token, and between tokens.
        piece: tokens in one event.
        fault: see `Server.fault` and, with "stream:" before it, `Server.answer`; "" for none.
        spared, faulty: so many requests are answered rightly first, and so many wrongly then (-1: all).
        usage: it reports usage.
        refused: fields of a body that it answers with HTTP 400.
        overhead: tokens that it adds to every prompt; a word is one token.
        end_of_text: answers end after so many tokens, unless ignore_eos is set.
    """

    first: float = 0.0
    gap: float = 0.0
    piece: int = 1
    fault: str = ""
    spared: int = 0
    faulty: int = -1
    usage: bool = True
    refused: tuple[str, ...] = ()
    overhead: int = 1
    end_of_text: int = 10**9
    key: str | None = None


@dataclass
class Sent:
    """One request as the server saw it; times on `time.perf_counter`."""

    path: str
    body: dict[str, Any]
    came: float
    tokens: list[float] = field(default_factory=list)
    connection: int = 0


class Server:
    """Made by `serving`."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.log: list[Sent] = []
        self.connections = 0
        self.url = ""

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = self.connections
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = head.split("\r\n")
                headers = {k.strip().lower(): v.strip() for k, _, v in (ln.partition(":") for ln in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = first.split(" ")
                if not await self.respond(writer, method, path, headers, body, connection):
                    break
        writer.close()

    async def respond(
        self,
        writer: asyncio.StreamWriter,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes,
        connection: int,
    ) -> bool:
        """Answer one request. Returns whether the connection goes on."""
        if self.behaviour.key and headers.get("authorization") != f"Bearer {self.behaviour.key}":
            return self.reply(writer, 401, {"error": {"message": "no such key"}})
        if method == "GET":
            if path == "/v1/models":
                return self.reply(writer, 200, {"object": "list", "data": [{"id": "tiny"}]})
            if path == "/version":
                return self.reply(writer, 200, {"version": "1.2.3"})
            return self.reply(writer, 404, {"detail": "Not Found"})
        sent = Sent(path, json.loads(body), time.perf_counter(), connection=connection)
        self.log.append(sent)
        for name in self.behaviour.refused:
            if name in sent.body:
                return self.reply(writer, 400, {"error": {"message": f"unknown field {name}"}})
        fault = self.behaviour.fault
        if self.behaviour.spared:
            self.behaviour.spared -= 1
            fault = ""
        elif fault and self.behaviour.faulty:
            self.behaviour.faulty -= 1
        else:
            fault = ""
        if fault and not fault.startswith("stream:"):
            return await self.fault(writer, fault)
        return await self.answer(writer, sent, fault.removeprefix("stream:"))

    def reply(self, writer: asyncio.StreamWriter, status: int, content: Any) -> bool:
        text = json.dumps(content).encode()
        writer.write(
            b"HTTP/1.1 %d X\r\nServer: fake/1\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (status, len(text), text)
        )
        return True

    async def fault(self, writer: asyncio.StreamWriter, fault: str) -> bool:
        if fault == "hang":
            await asyncio.sleep(3600)
        elif fault == "close":
            pass
        elif fault == "no http":
            writer.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
        elif fault == "html":
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 13\r\n\r\n<html></html>"
            )
        elif fault.isdigit():
            return self.reply(writer, int(fault), {"error": {"message": f"it is {fault}\x1b[31m"}})
        return False

    async def answer(self, writer: asyncio.StreamWriter, sent: Sent, fault: str) -> bool:
        """A right answer, unless a fault is wanted; most come half way through."""
        chat = sent.path.endswith("/chat/completions")
        body, behaviour = sent.body, self.behaviour
        tokens = int(body.get("max_tokens", 16))
        if not body.get("ignore_eos"):
            tokens = min(tokens, behaviour.end_of_text)
        prompt = " ".join(m["content"] for m in body["messages"]) if chat else body["prompt"]
        counted = len(prompt.split()) + behaviour.overhead
        usage = {"prompt_tokens": counted, "completion_tokens": tokens, "total_tokens": counted + tokens}
        await asyncio.sleep(behaviour.first)
        if not body.get("stream"):
            await asyncio.sleep(behaviour.gap * (tokens - 1))
            text = {"message": {"role": "assistant", "content": "x"}} if chat else {"text": "x"}
            choice = {"index": 0, "finish_reason": "length", **text}
            return self.reply(
                writer, 200, {"choices": [choice], **({"usage": usage} if behaviour.usage else {})}
            )
        writer.write(
            b"HTTP/1.1 200 OK\r\nServer: fake/1\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )

        def write(text: str) -> None:
            data = text.encode()
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))

        def event(**found: Any) -> None:
            write(f"data: {json.dumps({'id': 'cmpl-1', 'model': 'tiny', **found})}\n\n")

        if chat:
            event(
                choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
            )
        pieces = -(-tokens // behaviour.piece)
        for number in range(pieces):
            if number == pieces // 2 and fault:
                if fault == "error":
                    write('data: {"error": {"message": "out of memory", "code": 500}}\n\n')
                elif fault == "event":
                    write('event: error\ndata: {"message": "overloaded"}\n\n')
                elif fault == "nonsense":
                    write("data: {{{\n\n")
                elif fault == "list":
                    write("data: [1, 2]\n\n")
                elif fault == "hang":
                    await asyncio.sleep(3600)
                elif fault == "cut clean":
                    writer.write(b"0\r\n\r\n")
                    return True
                elif fault == "cut":
                    return False
            if number:
                await asyncio.sleep(behaviour.gap)
            sent.tokens.append(time.perf_counter())
            text = {"delta": {"content": " word"}} if chat else {"text": " word"}
            event(choices=[{"index": 0, "finish_reason": None, **text}])
            await writer.drain()
        if fault == "silent":
            await asyncio.sleep(3600)
        last = {"delta": {}} if chat else {"text": ""}
        event(choices=[{"index": 0, "finish_reason": "length", **last}])
        if behaviour.usage and body.get("stream_options", {}).get("include_usage"):
            event(choices=[], usage=usage)
        if fault != "no done":
            write("data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return fault != "no keep-alive"


@contextmanager
def serving(behaviour: Behaviour | None = None) -> Iterator[Server]:
    """A server on a free port of this machine, until the block ends."""
    server = Server(behaviour or Behaviour())
    ready = threading.Event()
    stop: list[Any] = []

    async def run() -> None:
        listening = await asyncio.start_server(server.connected, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        ended = asyncio.Event()
        stop.extend([asyncio.get_running_loop(), ended])
        ready.set()
        await ended.wait()
        listening.close()
        mine = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not mine]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield server
    finally:
        stop[0].call_soon_threadsafe(stop[1].set)
        thread.join(30)
