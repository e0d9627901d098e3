"""What the server costs: over the engine's own API, and a request with every security feature on.

    python bench/server.py [--rounds 9] [--out NAME]

Processes take turns, round by round, on the same model:

    engine    `AsyncLLM`, called in its own process
    plain     `python -m fastllm.serve` without keys
    secure    the same with TLS 1.3, hashed keys, limits of rate and concurrency, and an audit log with a key

**A request**: 100 of 1 token, one after the other, on one connection, ten from each in turn; milliseconds.
What a server adds to the engine's median is what it costs. **Throughput**: 32 clients at once, each with 2
requests of 64 tokens, streamed; tokens per second. The clients are tasks of a process of their own, which has
the processors with the server. They do little more than read bytes, and the processor time that they take all
the same is subtracted in the last column. Goals: under 2.8 ms a request with
everything on, and less than 5 % of throughput.

Writes OUT.json (every round) and OUT.md. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import models
import trustme

from fastllm import AsyncLLM, RequestOutputKind, SamplingParams
from fastllm.bench.intervals import median_interval
from fastllm.formats.keys import generate_key, write_key_file
from fastllm.serve.keys import make_key

OUT = machine.ROOT / "docs" / "benchmarks" / "server"
SIDES = ("engine", "plain", "secure")
REQUESTS, TURNS = 100, 10  # of one token, and how often the sides change
CLIENTS, EACH, TOKENS, PROMPT = 32, 2, 64, 16
SINGLE = {"max_tokens": 1, "temperature": 0}
STREAMED = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}


def prompts(count: int, size: int, seed: int) -> list[list[int]]:
    stream = random.Random(seed)
    return [[stream.randrange(100, 20_000) for _ in range(size)] for _ in range(count)]


# -- the engine's own API ------------------------------------------------------------------------------------


async def engine_side(model: str) -> None:
    """A process of its own: a line of JSON for each line that comes."""
    llm = AsyncLLM(model, max_num_seqs=CLIENTS, max_model_len=1024, progress=False)

    async def answer(ids: list[int], params: SamplingParams) -> None:
        async for _ in llm.generate({"prompt_token_ids": ids}, params):
            pass

    async def single(ids: list[int]) -> float:
        begin = time.perf_counter()
        await answer(ids, SamplingParams(**SINGLE, output_kind=RequestOutputKind.FINAL_ONLY))
        return time.perf_counter() - begin

    async def client(own: list[list[int]]) -> None:
        for ids in own:
            await answer(ids, SamplingParams(**STREAMED, output_kind=RequestOutputKind.DELTA))

    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        what, seed = line.split()
        print(json.dumps(await measure(what, int(seed), single, client)), flush=True)
    await llm.aclose()


async def measure(what: str, seed: int, single: Any, client: Any) -> Any:
    """Of "requests": seconds of each of some; of "clients": seconds of all together, and how many of a
    processor this process took meanwhile."""
    if what == "requests":
        return [await single(ids) for ids in prompts(REQUESTS // TURNS, 8, seed)]
    work = prompts(CLIENTS * EACH, PROMPT, seed)
    begin, own = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client(work[i::CLIENTS]) for i in range(CLIENTS)))
    return time.perf_counter() - begin, time.process_time() - own


# -- the server ----------------------------------------------------------------------------------------------


class Line(asyncio.Protocol):
    """A connection that does as little as it can: what a client's library takes is not the server's cost."""

    def __init__(self, headers: dict[str, str]) -> None:
        own = {"host": "localhost", "content-type": "application/json", **headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in own.items())
        self._head = f"POST /v1/completions HTTP/1.1\r\n{lines}content-length: ".encode()
        self._transport: asyncio.Transport
        self._answer: asyncio.Future[bytes]
        self._parts: list[bytes] = []
        self._left: int | None = None  # bytes that are still to come; None: until the last chunk

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def ask(self, body: dict[str, Any]) -> asyncio.Future[bytes]:
        """The whole answer, as it came."""
        text = json.dumps(body).encode()
        self._parts.clear()
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(b"%b%d\r\n\r\n%b" % (self._head, len(text), text))
        return self._answer

    def data_received(self, data: bytes) -> None:
        if not self._parts:
            head, _, rest = data.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), data
            length = re.search(rb"content-length: (\d+)", head)
            self._left = None if length is None else int(length[1]) - len(rest)
        elif self._left is not None:
            self._left -= len(data)
        self._parts.append(data)
        if self._left == 0 or (self._left is None and data.endswith(b"0\r\n\r\n")):
            self._answer.set_result(b"".join(self._parts))

    def connection_lost(self, error: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_exception(error or ConnectionError("the server closed the connection"))

    def close(self) -> None:
        self._transport.close()


class Served:
    """A server, and its clients."""

    def __init__(self, model: str, folder: Path, *, secure: bool) -> None:
        options = ["--max-num-seqs", str(CLIENTS), "--max-model-len", "1024", "--log-level", "info"]
        self._headers: dict[str, str] = {}
        self._tls: ssl.SSLContext | None = None
        if secure:
            options += self._secure(folder)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastllm.serve", "--model", model, "--port", "0", *options],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            found = re.search(r"listening on (https?)://[^:]*:(\d+)", line)
            if found:
                self._port = int(found[2])
                break
        else:
            raise SystemExit("the server did not start")
        self._log = subprocess.Popen(
            ["cat"], stdin=self._process.stderr, stdout=subprocess.DEVNULL
        )  # takes its log

    def _secure(self, folder: Path) -> list[str]:
        authority = trustme.CA()
        issued = authority.issue_cert("localhost")
        issued.private_key_pem.write_to_path(folder / "tls.key")
        issued.cert_chain_pems[0].write_to_path(folder / "tls.crt")
        self._tls = ssl.create_default_context()
        authority.configure_trust(self._tls)
        key, line = make_key("bench")
        others = [make_key(f"other-{number}")[1] for number in range(99)]
        (folder / "keys").write_text("\n".join([*others, line]))
        (folder / "keys").chmod(0o600)
        write_key_file(folder / "audit.key", generate_key())
        self._headers = {"authorization": f"Bearer {key}"}
        return [
            *("--ssl-certfile", str(folder / "tls.crt"), "--ssl-keyfile", str(folder / "tls.key")),
            *("--api-key-file", str(folder / "keys"), "--rate-limit", "1000000/minute"),
            *("--max-concurrent", "1000", "--audit-log", str(folder / "audit.jsonl")),
            *("--audit-key-file", str(folder / "audit.key")),
        ]

    async def measure(self, what: str, seed: int) -> Any:
        lines = [await self._connect() for _ in range(1 if what == "requests" else CLIENTS)]
        free = list(lines)

        async def single(ids: list[int]) -> float:
            begin = time.perf_counter()
            await lines[0].ask({"prompt": ids, **SINGLE})
            return time.perf_counter() - begin

        async def client(own: list[list[int]]) -> None:
            line = free.pop()
            for ids in own:
                answer = await line.ask({"prompt": ids, **STREAMED, "stream": True})
                assert b"data: [DONE]" in answer
            free.append(line)

        try:
            return await measure(what, seed, single, client)
        finally:
            for line in lines:
                line.close()

    async def _connect(self) -> Line:
        loop = asyncio.get_running_loop()
        _, line = await loop.create_connection(
            lambda: Line(self._headers), "localhost", self._port, ssl=self._tls
        )
        return line

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.wait()


# -- all -----------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> dict[str, Any]:
    model = str(models.path(options.model))
    record: dict[str, Any] = {
        "machine": machine.describe(["fastllm", "fastapi", "uvicorn", "uvloop"]),
        "model": machine.file_facts(Path(model)),
        "rounds": [],
    }
    engine = subprocess.Popen(
        [sys.executable, __file__, "--engine", model],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert engine.stdin is not None
    assert engine.stdout is not None
    while engine.stdout.readline().strip() != "ready":
        pass
    with tempfile.TemporaryDirectory() as folder:
        servers = {side: Served(model, Path(folder), secure=side == "secure") for side in ("plain", "secure")}

        def ask(side: str, what: str, seed: int) -> Any:
            if side != "engine":
                return asyncio.run(servers[side].measure(what, seed))
            engine.stdin.write(f"{what} {seed}\n")
            engine.stdin.flush()
            return json.loads(engine.stdout.readline())

        for number in range(options.rounds + 1):  # the first one warms up
            found: dict[str, Any] = {"load_average": os.getloadavg()[0]}
            found.update((side, {"request_seconds": []}) for side in SIDES)
            for turn in range(TURNS):
                for side in SIDES[turn % 3 :] + SIDES[: turn % 3]:
                    found[side]["request_seconds"] += ask(side, "requests", number * TURNS + turn)
            for side in SIDES[number % 3 :] + SIDES[: number % 3]:
                seconds, clients = ask(side, "clients", number)
                found[side]["tokens_per_second"] = CLIENTS * EACH * TOKENS / seconds
                if side != "engine":  # whose clients are its own process
                    left = seconds - clients / len(os.sched_getaffinity(0))
                    found[side]["tokens_per_second_without_clients"] = CLIENTS * EACH * TOKENS / left
            if number:
                record["rounds"].append(found)
                save(record, options.out)
                print(f"{number}/{options.rounds}", file=sys.stderr, flush=True)
        for server in servers.values():
            server.close()
    engine.stdin.close()
    engine.wait()
    return record


def table(record: dict[str, Any]) -> str:
    about, rounds = record["machine"], record["rounds"]
    lines = [
        "# What the server costs",
        "",
        f"Made by `bench/server.py`; {about['date']}, {about['processor']}, {record['model']['name']}, "
        f"{len(rounds)} rounds in turns. A request: 8 tokens in, 1 out, one after the other. Throughput: "
        f"{CLIENTS} clients, {PROMPT} tokens in, {TOKENS} out, streamed, the clients on the same processors. "
        "Medians with their 95 % intervals.",
        "",
        "| | ms a request, p50 | p99 | over the engine, ms | tokens/s | of the engine "
        "| without the clients' time |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for side in SIDES:
        single = [round_[side]["request_seconds"] for round_ in rounds]
        p50 = statistics.median(statistics.median(item) for item in single) * 1e3
        p99 = statistics.median(sorted(item)[int(0.99 * len(item))] for item in single) * 1e3
        more = [
            (statistics.median(round_[side]["request_seconds"])
             - statistics.median(round_["engine"]["request_seconds"])) * 1e3
            for round_ in rounds
        ]  # fmt: skip
        speed = statistics.median(round_[side]["tokens_per_second"] for round_ in rounds)
        shares = [
            [round_[side].get(name, 0.0) / round_["engine"]["tokens_per_second"] for round_ in rounds]
            for name in ("tokens_per_second", "tokens_per_second_without_clients")
        ]
        over, ratios = "", ["", ""]
        if side != "engine":
            low, high, _ = median_interval(more)
            over = f"{statistics.median(more):.2f} ({low:.2f} to {high:.2f})"
            for i, share in enumerate(shares):
                low, high, _ = median_interval(share)
                ratios[i] = f"{statistics.median(share):.3f} ({low:.3f} to {high:.3f})"
        lines.append(f"| {side} | {p50:.2f} | {p99:.2f} | {over} | {speed:.0f} | {ratios[0]} | {ratios[1]} |")
    return "\n".join(lines) + "\n"


def save(record: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record) + "\n")
    out.with_suffix(".md").write_text(table(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-q4_1", help="a name of bench/models.py")
    parser.add_argument("--rounds", type=int, default=9, help="(9)")
    parser.add_argument("--out", type=Path, default=OUT, help="without suffix")
    parser.add_argument("--engine", metavar="MODEL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        asyncio.run(engine_side(options.engine))
        return
    run(options)
    print(options.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
