"""References to a hub: through the real huggingface_hub library, offline, on a cache made here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fastllm.errors import ModelSourceError, RequestError, UnsupportedModelError
from fastllm.formats.source import resolve

WEIGHTS = b"GGUF"


def test_hub_references_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelSourceError, match=r"need huggingface_hub; pip install 'fastllm\[hub\]'"):
        resolve("hf:org/name")


def hub_repository(cache: Path, files: dict[str, bytes]) -> Path:
    """A repository in the layout of huggingface_hub's cache, as if it had been downloaded."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    base = cache / "models--org--name"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text(commit)
    snapshot = base / "snapshots" / commit
    for name, data in files.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(data)
    return snapshot


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The real library, offline, with a cache of the test's own."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = pytest.importorskip("huggingface_hub")
    for name in ("hf_hub_download", "snapshot_download"):
        real = getattr(hub, name)

        def with_cache(*args: Any, _real: Any = real, **more: Any) -> Any:
            return _real(*args, cache_dir=str(tmp_path / "hub"), **more)

        monkeypatch.setattr(hub, name, with_cache)
    return tmp_path / "hub"


def test_hub_directory_and_file_offline(hub_cache: Path) -> None:
    snapshot = hub_repository(
        hub_cache, {"config.json": b"{}", "model.safetensors": b"w", "x.gguf": WEIGHTS, "sub/y.gguf": WEIGHTS}
    )
    assert resolve("hf:org/name", progress=False) == snapshot
    assert resolve("hf:org/name:x.gguf", progress=False) == snapshot / "x.gguf"
    assert resolve("hf:org/name:sub/y.gguf", progress=False) == snapshot / "sub" / "y.gguf"
    with pytest.raises(ModelSourceError, match=r"hf:org/name:z\.gguf: "):
        resolve("hf:org/name:z.gguf", progress=False)
    with pytest.raises(ModelSourceError, match="hf:org/other: "):
        resolve("hf:org/other", progress=False)


def test_hub_repository_of_gguf_files(hub_cache: Path) -> None:
    snapshot = hub_repository(hub_cache, {"config.json": b"{}", "a.gguf": WEIGHTS})
    assert resolve("hf:org/name", progress=False) == snapshot / "a.gguf"
    (snapshot / "b.gguf").write_bytes(WEIGHTS)
    with pytest.raises(RequestError, match=r"hf:org/name:FILE with one of a\.gguf, b\.gguf"):
        resolve("hf:org/name", progress=False)


def test_hub_repository_without_usable_weights(hub_cache: Path) -> None:
    snapshot = hub_repository(hub_cache, {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(UnsupportedModelError, match="only pickled weights"):
        resolve("hf:org/name", progress=False)
    (snapshot / "pytorch_model.bin").unlink()
    with pytest.raises(ModelSourceError, match="no safetensors"):
        resolve("hf:org/name", progress=False)
