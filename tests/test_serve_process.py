"""The server as a process: what it prints, how it ends, and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
import trustme

KEY = "k" * 24
CONTEXT = 8192  # tokens of the tiny model: seconds of generating, so what happens "in a stream" does
LONG = {"prompt": "the river ran", "max_tokens": 2000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.make_model("llama", max_position_embeddings=CONTEXT)
    return tiny.save_hf(made, tmp_path_factory.mktemp("serve") / "model")


class Process:
    """`python -m fastllm.serve` with some options, once it listens."""

    def __init__(self, model: Path, *options: str, **environment: str) -> None:
        command = [sys.executable, "-m", "fastllm.serve", "--model", str(model), "--port", "0"]
        self._log: list[str] = []
        self.process = subprocess.Popen(
            [*command, "--kv-cache-tokens", str(CONTEXT), "--threads", "1", *options],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "SKBUILD_EDITABLE_VERBOSE": "0", **environment},
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._log.append(line)
            found = re.search(r"listening on (https?)://[^:]*:(\d+)", line)
            if found:
                self.port = int(found[2])
                self.url = f"{found[1]}://localhost:{self.port}"
                return
        raise AssertionError("".join(self._log))

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, trust_env=False, **options)

    def end(self, number: signal.Signals) -> int:
        """Send a signal; the exit status."""
        self.process.send_signal(number)
        assert self.process.stderr is not None
        self._log += self.process.stderr.readlines()
        return self.process.wait(20)

    @property
    def log(self) -> list[str]:
        """All lines, once it has ended."""
        return self._log

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


def failure(*options: str, **environment: str) -> str:
    """What a server that does not start says, in one line."""
    done = subprocess.run(
        [sys.executable, "-m", "fastllm.serve", *options],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "SKBUILD_EDITABLE_VERBOSE": "0", **environment},
    )
    assert done.returncode == 2, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_sigterm_lets_streams_finish(model: Path) -> None:
    with Process(model, "--log-format", "json") as server, server.client() as client:
        with client.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.end(signal.SIGTERM) == 0
        entries = [json.loads(line) for line in server.log]
    assert any(entry["message"].startswith("draining") for entry in entries)
    (request,) = [entry for entry in entries if entry["logger"] == "fastllm.access"]
    assert len(request["request_id"]) == 24
    assert request["generated_tokens"] == LONG["max_tokens"]


def test_sigint_is_the_same(model: Path) -> None:
    with Process(model) as server:
        assert server.end(signal.SIGINT) == 0


def read_and_kill(response: httpx.Response, server: Process) -> None:
    for number, _ in enumerate(response.iter_lines()):
        if number == 3:
            server.process.kill()


def test_killed_in_a_stream_and_started_again(model: Path) -> None:
    answers = []
    short = {**LONG, "max_tokens": 200, "stream": False, "seed": 1}
    endless = {**LONG, "max_tokens": CONTEXT - 100}
    for _ in range(2):
        with Process(model, "--kv-offload-bytes", "1000000") as server, server.client() as client:
            answers.append(client.post("/v1/completions", json=short).json())
            with (
                pytest.raises(httpx.TransportError),
                client.stream("POST", "/v1/completions", json=endless) as response,
            ):
                read_and_kill(response, server)
            assert server.process.wait(10) == -signal.SIGKILL
    assert answers[0]["choices"] == answers[1]["choices"]


def test_what_keeps_it_from_starting(model: Path, tmp_path: Path) -> None:
    assert "API keys" in failure("--model", str(model), "--host", "0.0.0.0")
    assert "missing.gguf" in failure("--model", str(tmp_path / "missing.gguf"))
    assert "key file" in failure("--model", "none", "--api-key-file", str(tmp_path / "missing"))
    assert "--max-model-len" in failure("--model", str(model), "--max-model-len", "x")
    assert "rate" in failure("--model", str(model), "--rate-limit", "often")
    assert "NAME=PATH" in failure("--model", str(model), "--lora", "x")
    bad = tmp_path / "bad.jinja"
    bad.write_text("{% for %}")
    assert "chat_template" in failure("--model", str(model), "--chat-template", str(bad))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert "address" in failure("--model", "none", "--port", port).lower()


def test_keygen() -> None:
    command = [sys.executable, "-m", "fastllm.serve", "keygen", "alice"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert re.fullmatch(r"alice sha256:[0-9a-f]{64}\n", done.stdout)
    assert "sk-" in done.stderr
    assert "NAME" in failure("keygen")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ssl.SSLContext]:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return folder / "cert.pem", folder / "key.pem", context


@pytest.mark.parametrize("least", ["1.2", "1.3"])
def test_tls(model: Path, certificate: tuple[Path, Path, ssl.SSLContext], least: str) -> None:
    cert, key, context = certificate
    options = ("--ssl-certfile", str(cert), "--ssl-keyfile", str(key), "--ssl-min-version", least)
    with Process(model, *options) as server:
        assert server.url.startswith("https://")
        with server.client(verify=context) as client:
            assert client.get("/health").status_code == 200
        old = ssl.create_default_context(cadata=None)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_connection(("localhost", server.port), timeout=10) as plain:
            if least == "1.3":
                with pytest.raises(ssl.SSLError):
                    old.wrap_socket(plain, server_hostname="localhost")
            else:
                with old.wrap_socket(plain, server_hostname="localhost") as wrapped:
                    assert wrapped.version() == "TLSv1.2"


def test_an_idle_server_takes_no_processor(model: Path) -> None:
    with Process(model) as server:
        time.sleep(0.5)

        def used() -> int:
            fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])  # hundredths of a second

        before = used()
        time.sleep(3)
        assert used() - before <= 3  # 1 %
