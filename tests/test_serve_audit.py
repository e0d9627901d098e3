"""The server's audit log: a line for everything that was asked or done, whatever came of it, and a chain."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from serving import Running
from test_serve_process import Process, read_and_kill

from fastllm.serve.audit import AuditLog
from fastllm.serve.audit_verify import verify

KEY, ADMIN = "k" * 24, "a" * 24
HEADERS = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_hf(tiny.make_model("llama"), tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture
def server(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setenv("FASTLLM_API_KEY", KEY)
    monkeypatch.setenv("FASTLLM_ADMIN_KEY", ADMIN)
    with Running(model, audit_log=tmp_path / "audit.jsonl") as running:
        yield running


def lines(path: Path) -> list[dict[str, Any]]:
    """Requests that are noted in a log."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [item for item in found if item["kind"] == "request"]


def test_every_request_has_a_line(server: Running, tmp_path: Path) -> None:
    body = json.dumps({"prompt": "the river", "max_tokens": 5, "n": 2, "seed": 1}).encode()
    kind = {"content-type": "application/json"}
    with server.client(headers=HEADERS) as client:
        answer = client.post(
            "/v1/completions", content=body, headers={**kind, "x-request-id": "first"}
        ).json()
        asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=asked) as response:
            found = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        client.post("/v1/completions", json={"prompt": "a", "temperature": -1})
        client.post("/v1/embeddings", json={"input": "a"})
        with client.stream(
            "POST",
            "/v1/completions",
            json={"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True},
        ) as response:
            next(response.iter_lines())
        client.get("/v1/models")
        client.post("/v1/completions", json={}, headers={"authorization": "Bearer wrong"})
        client.post("/admin/models/tiny/rollback", headers={"authorization": f"Bearer {ADMIN}"})
        time.sleep(0.3)
    server.stop()
    entries = lines(tmp_path / "audit.jsonl")
    assert [(entry["route"], entry["status"], entry["who"]) for entry in entries] == [
        ("POST /v1/completions", 200, "env-1"),
        ("POST /v1/chat/completions", 200, "env-1"),
        ("POST /v1/completions", 400, "env-1"),
        ("POST /v1/embeddings", 200, "env-1"),
        ("POST /v1/completions", 499, "env-1"),
        ("POST /admin/models/tiny/rollback", 409, "admin env-1"),
    ]
    first, chat, refused, embedded, left, _ = entries
    assert (first["id"], first["model"], first["client"]) == ("first", "tiny", "127.0.0.1")
    assert first["prompt_sha256"] == hashlib.sha256(body).hexdigest()
    texts = [choice["text"] for choice in answer["choices"]]
    assert first["answers_sha256"] == [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    assert first["generated_tokens"] == answer["usage"]["completion_tokens"]
    assert first["finish_reasons"] == [choice["finish_reason"] for choice in answer["choices"]]
    streamed = "".join(
        choice["delta"].get("content", "") for item in found[:-1] for choice in json.loads(item)["choices"]
    )
    assert chat["answers_sha256"] == ([hashlib.sha256(streamed.encode()).hexdigest()] if streamed else [])
    assert refused["error"] == "invalid_value"
    assert embedded["prompt_tokens"] > 0
    assert left["generated_tokens"] > 0
    assert KEY not in (tmp_path / "audit.jsonl").read_text()
    assert verify(tmp_path / "audit.jsonl").ok


def test_a_log_that_is_full_refuses(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastllm.errors import AuditError

    log = server.server.state.audit
    assert isinstance(log, AuditLog)

    async def full() -> Any:
        raise AuditError("audit.jsonl", "full")

    monkeypatch.setattr(log, "reserve_async", full)
    with server.client(headers=HEADERS) as client:
        response = client.post("/v1/completions", json={"prompt": "a"})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "audit_log"
        assert client.get("/v1/models").status_code == 200


def test_a_kill_leaves_a_chain(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for _ in range(3):
        with (
            Process(model, "--audit-log", str(path), "--audit-fsync", "0") as server,
            server.client() as client,
        ):
            for number in range(5):
                client.post("/v1/completions", json={"prompt": f"{number}", "max_tokens": 3})
            body = {"prompt": "a", "max_tokens": 200, "stream": True, "ignore_eos": True}
            with (
                pytest.raises(httpx.TransportError),
                client.stream("POST", "/v1/completions", json=body) as response,
            ):
                read_and_kill(response, server)
    with Process(model, "--audit-log", str(path)) as server:
        assert server.end(signal.SIGTERM) == 0
    report = verify(path)
    assert report.ok, report
    assert len(lines(path)) >= 12
