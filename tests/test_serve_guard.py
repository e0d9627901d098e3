"""What stands before the routes: hosts, origins, keys, bodies, headers, and time."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from serving import Running

from fastllm import RequestError
from fastllm.serve.config import Limits, ServeConfig
from fastllm.serve.keys import KeyRing, make_key
from fastllm.serve.models import Models
from fastllm.serve.state import ServerState

BODY = {"prompt": "the river", "max_tokens": 2}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Keys by name, "file" and "admin file" the files."""
    folder = tmp_path_factory.mktemp("keys")
    found = {}
    for name, file in (("alice", "api"), ("bob", "api"), ("root", "admin")):
        found[name], line = make_key(name)
        with (folder / file).open("a") as opened:
            opened.write(f"# {name}\n\n{line}\n")
        (folder / file).chmod(0o600)
        found[file] = str(folder / file)
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_hf(tiny.make_model("llama"), tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="module")
def server(path: Path, keys: dict[str, str]) -> Iterator[Running]:
    limits = {"body_bytes": 2000, "header_bytes": 4000, "header_seconds": 1.0, "body_seconds": 1.0,
              "connections": 20, "prompt_tokens": 50}  # fmt: skip
    with Running(
        path,
        limits=limits,
        api_key_file=Path(keys["api"]),
        admin_key_file=Path(keys["admin"]),
        allowed_origins=["https://chat.example.org"],
    ) as running:
        yield running


@pytest.fixture
def client(server: Running, keys: dict[str, str]) -> Iterator[httpx.Client]:
    with server.client(headers={"authorization": f"Bearer {keys['alice']}"}) as found:
        yield found


# Keys


def test_every_route_but_the_open_ones_needs_a_key(server: Running) -> None:
    paths = server.server.config.app.app._app.openapi()["paths"]  # type: ignore[union-attr]
    asked = {(method.upper(), path) for path, item in paths.items() for method in item}
    asked.add(("GET", "/openapi.json"))
    assert ("POST", "/v1/chat/completions") in asked
    assert ("DELETE", "/admin/models/{name}") in asked
    with server.client() as client:
        for method, route in sorted(asked):
            response = client.request(method, re.sub(r"{\w+}", "x", route))
            if route in ("/health", "/ready"):
                assert response.status_code == 200, (method, route)
            else:
                assert response.status_code == 401, (method, route)
                error = response.json()["error"]
                if not route.startswith("/v1/messages"):  # Anthropic's shape has no codes
                    assert error["code"] == "invalid_api_key"
                assert error["type"] == "authentication_error"
                assert response.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/nothing").status_code == 401


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_keys(server: Running, keys: dict[str, str], header: str) -> None:
    def status(key: str, route: str = "/v1/models") -> int:
        value = (f"Bearer {key}" if header == "authorization" else key).strip().encode("latin-1")
        with server.client() as client:
            return client.get(route, headers={header: value}).status_code

    assert status(keys["alice"]) == status(keys["bob"]) == 200
    for wrong in ("", "x", keys["alice"][:-1], keys["alice"] + "x", keys["root"], "\xe9" * 20):
        assert status(wrong) == 401
    assert status(keys["alice"], "/admin/models") == 401
    assert status(keys["root"], "/admin/models") == 200


def test_keys_are_compared_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key takes part in every comparison, by hmac.compare_digest (CVE-2025-59425)."""
    import hmac

    monkeypatch.setenv("KEYS", ",".join(f"{number}" * 20 for number in range(5)))
    ring = KeyRing.read(None, "KEYS")
    compared: list[bytes] = []
    original = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return original(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for key in ("0" * 20, "4" * 20, "other"):
        compared.clear()
        found = ring.find(key)
        assert (found and found.name) == {"0": "env-1", "4": "env-5", "o": None}[key[0]]
        assert len(compared) == 5


@pytest.mark.parametrize(
    "text",
    [
        "alice",
        "a b c",
        "al/ice sha256:" + "0" * 64,
        "a sha256:00",
        "a short",
        "a " + "k" * 20 + "\na " + "j" * 20,
        "",  # nobody could come in, or everybody
        "# alice\n\n",
    ],
)
def test_key_files_that_are_wrong(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(RequestError) as caught:
        KeyRing.read(file, "NOT_SET")
    assert "kkkk" not in str(caught.value)


def test_a_key_file_for_all_to_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(make_key("a")[1])
    file.chmod(0o640)
    with pytest.raises(RequestError, match="chmod 600"):
        KeyRing.read(file, "NOT_SET")
    with pytest.raises(RequestError, match="key file"):
        KeyRing.read(tmp_path / "missing", "NOT_SET")


def test_an_open_address_needs_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLLM_API_KEY", raising=False)
    models = Models(None, 0)  # type: ignore[arg-type]
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(RequestError, match="API keys"):
            ServerState(ServeConfig(host=host), models)
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        ServerState(ServeConfig(host=host), models)
    monkeypatch.setenv("FASTLLM_API_KEY", "k" * 20)
    ServerState(ServeConfig(host="0.0.0.0"), models)


def test_without_admin_keys_there_is_no_administrator(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLLM_ADMIN_KEY", raising=False)
    with Running(path) as running, running.client() as client:
        assert client.get("/v1/models").status_code == 200
        for headers in ({}, {"authorization": "Bearer"}, {"authorization": "Bearer x"}):
            assert client.get("/admin/models", headers=headers).status_code == 403


def test_salts_are_of_the_key(server: Running) -> None:
    from fastllm.serve.call import Call

    state = server.server.state

    def salt(key: str | None, given: str | None) -> str | None:
        return state.cache_salt(Call("id", "", "POST", "/", key=key), given)

    found = {salt(key, given) for key in ("alice", "bob") for given in (None, "x", "y")}
    assert len(found) == 6 - 0
    assert salt("alice", "x") == salt("alice", "x")
    assert salt(None, "x") == "x"
    assert "x" not in found


def test_keys_do_not_share_the_prefix_cache(server: Running, keys: dict[str, str]) -> None:
    body = {"prompt": "the river ran past a small town where nothing", "max_tokens": 1}

    def cached(key: str) -> int:
        with server.client(headers={"authorization": f"Bearer {keys[key]}"}) as client:
            usage = client.post("/v1/completions", json=body).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached("alice") == 0
    assert cached("alice") > 0
    assert cached("bob") == 0


# Host and origin


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:80", 200), ("127.0.0.1:9", 200), ("[::1]:80", 200),
        ("evil.example", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example", 403), ("", 403),
        ("[::2]", 403),
    ],
)  # fmt: skip
def test_host(client: httpx.Client, host: str, status: int) -> None:
    response = client.get("/v1/models", headers={"host": host})
    assert response.status_code == status
    assert client.get("/health", headers={"host": host}).status_code == status


def test_origin(client: httpx.Client, server: Running) -> None:
    def ask(origin: str) -> httpx.Response:
        return client.post("/v1/completions", json=BODY, headers={"origin": origin})

    assert ask(server.url).status_code == 200
    for origin in ("https://evil.example", "null", f"http://127.0.0.1:{server.port + 1}", "http://localhost"):
        assert ask(origin).status_code == 403, origin
    found = ask("https://chat.example.org")
    assert found.status_code == 200
    assert found.headers["access-control-allow-origin"] == "https://chat.example.org"
    asked = {"origin": "https://chat.example.org", "access-control-request-method": "POST"}
    with server.client() as nobody:  # browsers ask without the key
        assert nobody.options("/v1/completions", headers=asked).status_code == 204
        asked["origin"] = "https://evil.example"
        assert nobody.options("/v1/completions", headers=asked).status_code == 403


def test_request_ids(client: httpx.Client) -> None:
    assert (
        client.get("/version", headers={"x-request-id": "abc.1-2_3"}).headers["x-request-id"] == "abc.1-2_3"
    )
    for bad in ("a b", "x" * 129, "é", "a;b"):
        found = client.get("/version", headers={"x-request-id": bad.encode()}).headers["x-request-id"]
        assert found != bad
        assert len(found) == 24


# Bodies and headers


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
def test_content_type(client: httpx.Client, kind: str) -> None:
    response = client.post("/v1/completions", content=json.dumps(BODY), headers={"content-type": kind})
    assert response.status_code == 415
    kind = "Application/JSON; charset=utf-8"
    response = client.post("/v1/completions", content=json.dumps(BODY), headers={"content-type": kind})
    assert response.status_code == 200


def test_large_bodies(client: httpx.Client, server: Running) -> None:
    long = json.dumps({**BODY, "user": "x" * 3000}).encode()
    headers = {"content-type": "application/json"}
    assert client.post("/v1/completions", content=long, headers=headers).status_code == 413
    pieces = (long[at : at + 100] for at in range(0, len(long), 100))  # without a length
    assert client.post("/v1/completions", content=pieces, headers=headers).status_code == 413
    assert client.post("/v1/completions", json=BODY).status_code == 200


def test_prompt_tokens(client: httpx.Client) -> None:
    error = client.post("/v1/completions", json={**BODY, "prompt": [5] * 51}).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert client.post("/v1/completions", json={**BODY, "prompt": [5] * 50}).status_code == 200


def raw(server: Running, sent: bytes, *more: bytes, pause: float = 0.05) -> bytes:
    """What comes back until the server closes."""
    with server.connect() as connection:
        connection.sendall(sent)
        for piece in more:
            time.sleep(pause)
            try:
                connection.sendall(piece)
            except OSError:
                break
        found = b""
        try:
            while piece := connection.recv(65536):
                found += piece
        except ConnectionError:
            pass
        return found


def test_large_headers(server: Running) -> None:
    line = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
    assert b" 431 " in raw(server, line + b"x: " + b"y" * 5000 + b"\r\n\r\n")
    assert b" 431 " in raw(server, line + b"".join(b"x%d: y\r\n" % i for i in range(1000)) + b"\r\n")
    assert b" 431 " in raw(server, line + b"x: ", *[b"y" * 1000] * 8)
    assert b" 431 " in raw(server, b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert b" 200 " in raw(server, line + b"x: " + b"y" * 3000 + b"\r\nconnection: close\r\n\r\n")


def test_slow_headers_and_bodies(server: Running, keys: dict[str, str]) -> None:
    begin = time.monotonic()
    assert b" 408 " in raw(server, b"GET /health HTTP/1.1\r\n")
    assert b" 408 " in raw(server, b"")
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {keys['alice']}\r\n"
        "content-type: application/json\r\ncontent-length: 100\r\n\r\n"
    )
    assert b" 408 " in raw(server, head.encode() + b"{")
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    "sent", [b"nonsense\r\n\r\n", b"\x16\x03\x01" + b"\0" * 50, b"GET / HTTP/9.9\r\n\r\n"]
)
def test_what_is_no_http(server: Running, sent: bytes) -> None:
    found = raw(server, sent)
    assert b" 400 " in found
    assert b'"invalid_request_error"' in found


def test_two_hosts(server: Running) -> None:
    found = raw(server, b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: evil\r\nconnection: close\r\n\r\n")
    assert b" 400 " in found


def test_connections_end_somewhere(server: Running) -> None:
    held = [server.connect() for _ in range(40)]
    try:
        # Those that were accepted say nothing, and are told so after a second.
        answers = [connection.recv(100)[9:12] for connection in held]
        assert set(answers) == {b"503", b"408"}
        assert answers.count(b"408") >= 10
    finally:
        for connection in held:
            connection.close()
    time.sleep(0.2)
    with server.client() as client:
        assert client.get("/health").status_code == 200


def request_on(connection: socket.socket) -> bytes:
    connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    found = b""
    while not found.endswith(b"}"):
        found += connection.recv(1000) or b"}"
    return found


def test_an_idle_connection_makes_room(server: Running) -> None:
    """The one that was idle longest; one that has just been used stays."""
    held = [server.connect() for _ in range(20)]
    try:
        for connection in held:
            assert b" 200 " in request_on(connection)
        assert b" 200 " in request_on(held[0])
        with server.connect() as another:
            assert b" 200 " in request_on(another)
        assert held[1].recv(100) == b""
        assert b" 200 " in request_on(held[0])
        assert b" 200 " in request_on(held[2])
    finally:
        for connection in held:
            connection.close()


def test_a_connection_is_kept_for_another_request(path: Path) -> None:
    """For as long as is asked, and by default longer than what connects keeps it."""
    assert Limits().idle_seconds > 90
    with Running(path, limits={"idle_seconds": 0.3}) as running, running.connect() as connection:
        assert b" 200 " in request_on(connection)
        time.sleep(0.1)
        assert b" 200 " in request_on(connection)
        assert connection.recv(100) == b""


def test_an_error_within_says_nothing_of_the_inside(
    server: Running, client: httpx.Client, monkeypatch: Any
) -> None:
    def fail(asked: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(server.server.state.models, "find", fail)
    response = client.get("/v1/models/tiny")
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"
