"""Models that come, go, change and change back while requests run."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from lora_files import save_adapter
from serving import Running

ADMIN = "admin-key-for-these-tests"
BODY = {"prompt": "the river ran past", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models "one", "two" and "three" of different weights, and an adapter of "one"."""
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two", "three")):
        network = tiny.make_model("llama", seed=seed)
        tiny.save_hf(network, place / name)
        if name == "one":
            save_adapter(place / "adapter", network, seed=7)
    (place / "broken").mkdir()
    (place / "broken" / "config.json").write_text("{}")
    return place


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setenv("FASTLLM_ADMIN_KEY", ADMIN)
    with Running(folder / "one", version="1", model_roots=[folder]) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client(headers={"authorization": f"Bearer {ADMIN}"}) as found:
        yield found


def text(client: httpx.Client, **more: Any) -> str:
    response = client.post("/v1/completions", json={**BODY, **more})
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def load(client: httpx.Client, folder: Path, which: str, version: str, **more: Any) -> httpx.Response:
    body = {"name": "tiny", "version": version, "model": str(folder / which), **more}
    return client.post("/admin/models", json=body)


def states(client: httpx.Client) -> dict[str, str]:
    return {item["version"]: item["state"] for item in client.get("/admin/models").json()["models"]}


def test_swap_and_roll_back(client: httpx.Client, folder: Path, server: Running) -> None:
    first = text(client)
    assert load(client, folder, "two", "2").json()["state"] == "current"
    second = text(client)
    assert second != first
    assert client.get("/v1/models").json()["data"][0]["version"] == "2"
    assert load(client, folder, "three", "3", activate=False).json()["state"] == "standby"
    assert text(client) == second
    found = client.post("/admin/models/tiny/activate", json={"version": "3", "keep": True})
    assert found.json()["state"] == "current"
    third = text(client)
    assert third not in (first, second)
    assert states(client) == {"2": "standby", "3": "current"}
    assert client.post("/admin/models/tiny/rollback").json()["version"] == "2"
    assert text(client) == second
    assert client.post("/admin/models/tiny/rollback").json()["version"] == "1"  # loaded again
    assert text(client) == first
    assert client.post("/admin/models/tiny/rollback").status_code == 409
    assert text(client) == first


def test_old_streams_finish_on_the_old_weights(client: httpx.Client, folder: Path, server: Running) -> None:
    long = {**BODY, "max_tokens": 200, "ignore_eos": True}
    expected = text(client, **long)

    def slow(engine: Any) -> None:
        original = engine._executor.submit

        def submit(batch: Any) -> Any:
            time.sleep(0.01)
            return original(batch)

        engine._executor.submit = submit

    server.on_engine(slow)
    (old,) = server.server.state.models.all()
    with (
        server.client() as reader,
        reader.stream("POST", "/v1/completions", json={**long, "stream": True}) as got,
    ):
        lines = got.iter_lines()
        found = [next(lines)]
        assert load(client, folder, "two", "2").status_code == 200
        assert text(client) != expected[: len(text(client))]
        assert old.llm.is_running
        assert states(client) == {"1": "retiring", "2": "current"}
        found += [line for line in lines if line and "[DONE]" not in line]
    pieces = [json.loads(line.removeprefix("data: ")) for line in found]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected
    end = time.monotonic() + 5
    while old.llm.is_running or states(client) != {"2": "current"}:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_server_may_end_while_a_version_retires(
    client: httpx.Client, folder: Path, server: Running
) -> None:
    def slow(engine: Any) -> None:
        original = engine._executor.submit

        def submit(batch: Any) -> Any:
            time.sleep(0.05)
            return original(batch)

        engine._executor.submit = submit

    server.on_engine(slow)
    long = {**BODY, "max_tokens": 200, "ignore_eos": True, "stream": True}
    with server.client() as reader, reader.stream("POST", "/v1/completions", json=long) as got:
        lines = got.iter_lines()
        next(lines)
        assert load(client, folder, "two", "2").status_code == 200
        assert states(client) == {"1": "retiring", "2": "current"}
        for _ in range(2):  # the second time: at once
            server.loop.call_soon_threadsafe(server.server.leave)
        found = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert found[-1]["error"]["code"] == "engine_dead"
    server.stop()


def test_no_request_is_dropped_by_changes(client: httpx.Client, folder: Path, server: Running) -> None:
    stop = threading.Event()
    wrong: list[str] = []
    answers: set[str] = set()

    def ask() -> None:
        with server.client() as own:
            while not stop.is_set():
                response = own.post("/v1/completions", json=BODY)
                if response.status_code == 200:
                    answers.add(response.json()["choices"][0]["text"])
                else:
                    wrong.append(response.text)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(2, 8):
        which = "one" if number % 2 else "two"
        assert load(client, folder, which, str(number)).status_code == 200
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(answers) == 2


def test_memory_really_returns(client: httpx.Client, folder: Path) -> None:
    """The KV cache of a version that is gone."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    cache = 64 << 20
    engine = {"kv_cache_memory_bytes": cache, "kv_cache_tokens": None, "enable_prefix_caching": False}
    assert load(client, folder, "two", "2", engine=engine).status_code == 200
    body = {**BODY, "prompt": [5] * 200, "n": 8}
    for _ in range(3):
        client.post("/v1/completions", json=body)
    held = resident()
    assert client.delete("/admin/models/tiny").status_code == 200
    assert resident() <= held
    assert client.post("/v1/completions", json=BODY).status_code == 503
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200
    assert load(client, folder, "one", "1").status_code == 200
    assert client.get("/ready").status_code == 200


def test_what_goes_wrong_leaves_what_there_was(client: httpx.Client, folder: Path) -> None:
    expected = text(client)
    assert load(client, folder, "broken", "2").status_code == 400
    assert load(client, folder, "missing", "2").status_code == 400
    assert load(client, folder, "two", "1").status_code == 409
    assert load(client, Path("/etc"), "passwd", "2").status_code == 403
    assert load(client, folder, "../../etc", "2").status_code == 403
    assert load(client, folder, "two", "2", model="hf:org/name").status_code == 403
    assert load(client, folder, "two", "2", loras={"x": "/etc"}).status_code == 403
    assert load(client, folder, "two", "2", engine={"hooks": []}).status_code == 400
    assert load(client, folder, "two", "2", engine={"kv_offload_dir": "/tmp"}).status_code == 403
    assert load(client, folder, "two", "2", engine={"threads": "x"}).status_code == 400
    other = {"name": "other", "version": "1", "model": str(folder / "two"), "aliases": ["tiny"]}
    assert client.post("/admin/models", json=other).status_code == 409
    assert client.post("/admin/models/tiny/activate", json={"version": "9"}).status_code == 404
    assert client.post("/admin/models/other/rollback").status_code == 404
    assert client.delete("/admin/models/other").status_code == 404
    assert client.delete("/admin/models/tiny", params={"version": "9"}).status_code == 404
    assert text(client) == expected
    assert states(client) == {"1": "current"}


def test_several_models_and_names(client: httpx.Client, folder: Path) -> None:
    one = text(client)
    body = {"name": "other", "version": "a", "model": str(folder / "two"), "aliases": ["another"]}
    assert client.post("/admin/models", json=body).status_code == 200
    assert text(client, model="tiny") == one
    assert text(client, model="other") == text(client, model="another") != one
    assert client.post("/v1/completions", json=BODY).status_code == 404  # which one?
    names = [item["id"] for item in client.get("/v1/models").json()["data"]]
    assert names == ["tiny", "other", "another"]
    assert client.delete("/admin/models/other").status_code == 200
    assert text(client) == one


def test_adapters_are_models(client: httpx.Client, folder: Path) -> None:
    plain = text(client)
    adapter = {"with-adapter": str(folder / "adapter")}
    assert load(client, folder, "one", "2", loras=adapter).status_code == 200
    assert text(client, model="tiny") == plain
    assert text(client, model="with-adapter") != plain
    entries = {item["id"]: item for item in client.get("/v1/models").json()["data"]}
    assert entries["with-adapter"]["parent"] == "tiny"
