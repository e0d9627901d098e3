"""The server under load: clients that leave, queues that end, time that is up, a server told to leave."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from serving import Running, events

from fastllm.serve.admission import Admission, Seats
from fastllm.serve.call import Call
from fastllm.serve.config import Limits
from fastllm.serve.errors import HTTPError

LONG = {"prompt": "the river ran past", "max_tokens": 230, "ignore_eos": True, "stream": True}
CHAT = {
    "messages": [{"role": "user", "content": "a"}], "max_tokens": 200, "ignore_eos": True, "stream": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_hf(tiny.make_model("llama"), tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Running]:
    with Running(path, limits={"queued": 2}, engine={"max_num_seqs": 2}) as running:
        yield running


def slow(server: Running, seconds: float) -> None:
    """From now on every step takes at least so long."""

    def set_up(engine: Any) -> None:
        executor = engine._executor
        original = getattr(executor, "_quick", None) or executor.submit

        def submit(batch: Any) -> Any:
            time.sleep(seconds)
            return original(batch)

        executor._quick, executor.submit = original, submit

    server.on_engine(set_up)


def wait_until_idle(server: Running, seconds: float = 5.0) -> None:
    """Nothing runs or waits, and nobody holds a block."""
    end = time.monotonic() + seconds
    while True:
        load = server.on_engine(lambda engine: engine.load())
        (served,) = server.server.state.models.all()
        left = load.num_running, load.num_waiting, load.num_used_blocks
        left += served.leases, served.seats.taken, server.server.state.running
        if not any(left):
            return
        assert time.monotonic() < end, left
        time.sleep(0.01)


# Clients that leave


@given(
    st.sampled_from(("/v1/completions", "/v1/chat/completions", "/v1/embeddings")),
    st.booleans(),
    st.integers(1, 2),
    st.floats(0.0, 0.06),
    st.booleans(),
)
def test_a_client_that_leaves_frees_its_blocks(
    server: Running, route: str, streaming: bool, n: int, seconds: float, form: bool
) -> None:
    """At any moment: before there are tokens, while it waits, in its prompt, in its answer, at the end."""
    slow(server, 0.002)
    body: dict[str, Any] = {"input": "the river ran past a small town " * 5}
    if route != "/v1/embeddings":
        body = {**(CHAT if "chat" in route else LONG), "stream": streaming, "n": n}
        if form:
            body = {**body, "ignore_eos": False, "guided_regex": "[ab]{150}"}
    raw = json.dumps(body).encode()
    head = f"POST {route} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    connections = [server.connect() for _ in range(3)]
    for connection in connections:
        connection.sendall(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
    time.sleep(seconds)
    for connection in connections:
        connection.close()
    wait_until_idle(server)
    server.on_engine(lambda engine: engine.check())


def test_leaving_costs_one_step(server: Running) -> None:
    slow(server, 0.05)
    with server.client() as client, client.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        assert server.on_engine(lambda engine: engine.load().num_running) == 1
    begin = time.monotonic()
    wait_until_idle(server)
    assert time.monotonic() - begin < 0.5
    slow(server, 0.0)


# Queues


def test_a_queue_that_is_full(server: Running) -> None:
    slow(server, 0.01)
    seen: list[httpx.Response] = []

    def ask(_: int) -> int:
        with server.client() as client:
            response = client.post("/v1/completions", json={**LONG, "max_tokens": 60, "stream": False})
        if response.status_code != 200:
            seen.append(response)
        return response.status_code

    with ThreadPoolExecutor(12) as pool:
        statuses = list(pool.map(ask, range(12)))
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 4
    for response in seen:
        assert response.json()["error"]["code"] == "overloaded"
        assert int(response.headers["retry-after"]) >= 1
    slow(server, 0.0)
    wait_until_idle(server)
    # A request of more sequences than the queue has room for is served when it is alone.
    with server.client() as client:
        found = client.post("/v1/completions", json={"prompt": ["a", "b"], "n": 4, "max_tokens": 2})
    assert len(found.json()["choices"]) == 8


def test_limits_of_a_key(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLLM_API_KEY", "a" * 20 + "," + "b" * 20)
    with Running(path, limits={"rate": "3/hour", "concurrent": 1}) as server:
        slow(server, 0.01)

        def headers(key: str) -> dict[str, str]:
            return {"authorization": f"Bearer {key * 20}"}

        with server.client() as client:
            with client.stream("POST", "/v1/completions", json=LONG, headers=headers("a")) as response:
                lines = response.iter_lines()  # held: without it the connection is closed
                next(lines)
                with server.client() as other:
                    body = {"prompt": "a", "max_tokens": 1}
                    refused = other.post("/v1/completions", json=body, headers=headers("a"))
                    assert refused.status_code == 429
                    assert refused.json()["error"]["code"] == "concurrency_limit_exceeded"
                    assert other.post("/v1/completions", json=body, headers=headers("b")).status_code == 200
            wait_until_idle(server)
            for expected in (200, 200, 429):
                found = client.post("/v1/completions", json=body, headers=headers("a"))
                assert found.status_code == expected
            assert found.json()["error"]["code"] == "rate_limit_exceeded"
            assert 3000 < int(found.headers["retry-after"]) <= 3601
            assert client.post("/v1/completions", json=body, headers=headers("b")).status_code == 200


async def test_two_requests_at_once_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the storage of the rates takes."""
    admission = Admission(Limits(rate="100/hour", concurrent=1))
    assert admission._limiter is not None
    hit = admission._limiter.hit

    async def slow_hit(*arguments: Any, **more: Any) -> bool:
        await asyncio.sleep(0.01)
        return bool(await hit(*arguments, **more))

    monkeypatch.setattr(admission._limiter, "hit", slow_hit)
    seats = Seats(4, 4)

    async def enter() -> None:
        async with admission.enter(Call("id", "", "POST", "/", key="a"), seats, 1):
            await asyncio.sleep(0.05)

    done = await asyncio.gather(enter(), enter(), return_exceptions=True)
    (refused,) = [item for item in done if item is not None]
    assert isinstance(refused, HTTPError)
    assert refused.code == "concurrency_limit_exceeded"
    assert seats.taken == 0
    await enter()


def test_time_that_is_up(path: Path) -> None:
    with Running(path, limits={"request_seconds": 0.3}) as server:
        slow(server, 0.02)
        with server.client() as client:
            response = client.post("/v1/completions", json={**LONG, "stream": False})
            assert response.status_code == 504
            assert response.json()["error"]["code"] == "timeout"
            with client.stream("POST", "/v1/completions", json=LONG) as stream:
                assert stream.status_code == 200
                found = [json.loads(item) for item in events(stream)]
            assert found[-1]["error"]["code"] == "timeout"
            assert len(found) > 2
        wait_until_idle(server)


def test_a_reader_that_takes_nothing_holds_nobody_up(server: Running) -> None:
    with server.connect() as connection:
        raw = json.dumps({**LONG, "logprobs": 20}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
        with server.client() as client:
            for _ in range(3):
                assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
    wait_until_idle(server)


# The end


@pytest.mark.parametrize("streaming", [False, True])
def test_draining(path: Path, streaming: bool) -> None:
    """What runs is finished, nothing new is taken, and /ready says so before."""
    server = Running(path, drain_delay=0.4)
    slow(server, 0.01)
    answers: list[Any] = []

    def ask() -> None:
        with server.client() as client:
            body = {**LONG, "stream": streaming, "max_tokens": 100}
            with client.stream("POST", "/v1/completions", json=body) as response:
                if streaming:
                    answers.append(events(response))
                else:
                    answers.append(json.loads(response.read()))

    thread = threading.Thread(target=ask)
    with server.client() as client:
        assert client.get("/ready").status_code == 200
        thread.start()
        time.sleep(0.2)
        server.loop.call_soon_threadsafe(server.server.leave)
        time.sleep(0.1)
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
        time.sleep(0.4)
        refused = client.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
    with pytest.raises(httpx.ConnectError), server.client() as client:
        client.get("/health")
    thread.join()
    server.stop()
    if streaming:
        assert answers[0][-1] == "[DONE]"
    else:
        assert answers[0]["usage"]["completion_tokens"] == 100


def test_draining_ends_somewhere(path: Path) -> None:
    server = Running(path, drain_seconds=0.3)
    slow(server, 0.05)
    with server.client() as client, client.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        begin = time.monotonic()
        server.stop()
        assert time.monotonic() - begin < 4
        found = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert found[-1]["error"]["code"] == "engine_dead"


def test_an_engine_that_dies(path: Path) -> None:
    with Running(path) as server:
        slow(server, 0.01)
        with server.client() as client, client.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)

            def break_it(engine: Any) -> None:
                def submit(batch: Any) -> Any:
                    raise MemoryError("gone")

                engine._executor.submit = submit

            server.on_engine(break_it)
            found = [json.loads(line.removeprefix("data: ")) for line in lines if line]
            assert found[-1]["error"]["code"] == "engine_dead"
            with server.client() as other:
                assert other.get("/health").status_code == 503
                assert other.get("/ready").status_code == 503
                answer = other.post("/v1/completions", json={"prompt": "a"})
                assert answer.status_code == 503
                assert answer.json()["error"]["code"] == "engine_dead"
