"""The page's files: open to all, from here alone, and what they ask for exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tiny
from serving import Running

from fastllm.serve.protocol.chat import ChatRequest

FOLDER = Path(__file__).parents[1] / "fastllm" / "serve" / "page"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    model = tiny.save_hf(tiny.make_model("llama"), tmp_path_factory.mktemp("serve") / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLLM_API_KEY", "k" * 20)
        with Running(model) as running, running.client() as found:
            yield found


def test_files_need_no_key_and_load_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    asked = re.findall(r'(?:href|src)="([^"]+)"', page.text)
    assert sorted(asked) == ["/page/icon.svg", "/page/page.js", "/page/style.css"]
    for path in asked:
        assert client.get(path).status_code == 200
    for file in FOLDER.iterdir():
        found = re.findall(r"https?://[^\"'\s]+", file.read_text())
        assert set(found) <= {"http://www.w3.org/2000/svg"}, file.name
    assert client.get("/v1/models").status_code == 401


@pytest.mark.parametrize("name", ["other.js", "%2e%2e", "index.html%00", "../page.py", "..%2fpage.py"])
def test_nothing_else_is_there(client: httpx.Client, name: str) -> None:
    assert client.get(f"/page/{name}").status_code in (401, 404)


def test_every_element_and_field_exists() -> None:
    script, page = (FOLDER / "page.js").read_text(), (FOLDER / "index.html").read_text()
    ids = set(re.findall(r'id="([^"]+)"', page))
    wanted = set(re.findall(r'find\("([^"]+)"\)', script))
    charts = set(re.findall(r'draw\("([^"]+)"', script))
    assert wanted | charts | {f"{chart}-now" for chart in charts} <= ids
    listed = re.search(r"for \(const name of \[([^\]]+)\]\)", script)
    assert listed is not None
    fields = set(re.findall(r'"(\w+)"', listed[1]))
    assert len(fields) == 7
    assert fields <= set(ChatRequest.model_fields)
    assert fields <= ids


def test_a_server_without_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLLM_API_KEY", raising=False)
    model = tiny.save_hf(tiny.make_model("llama"), tmp_path / "model")
    with Running(model, page=False) as running, running.client() as client:
        assert client.get("/").status_code == 404
        assert client.get("/page/page.js").status_code == 404
