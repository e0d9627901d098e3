"""Models from a Hugging Face hub, through the huggingface_hub library (extra [hub]) and its own cache.

Everything that library honours holds here: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from fastllm.errors import FastLLMError, ModelSourceError, RequestError, UnsupportedModelError

_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# Folders hold the same weights for other programs; so do Mistral's consolidated files.
_UNWANTED = ["*/*", "consolidated*"]


def fetch_from_hub(reference: str, repository: str, file: str | None, *, progress: bool) -> Path:
    """The local path of a repository's model directory, or of one of its files.

    Raises:
        ModelSourceError: huggingface_hub is not installed, or the download failed.
        RequestError: the repository holds several GGUF files and none was named.
        UnsupportedModelError: it holds pickled weights only.
    """
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ModelSourceError(
            reference, "hf: references need huggingface_hub; pip install 'fastllm[hub]'"
        ) from error
    bars = importlib.import_module("huggingface_hub.utils")
    quiet = not progress and not bars.are_progress_bars_disabled()
    if quiet:
        bars.disable_progress_bars()
    try:
        if file is not None:
            return Path(hub.hf_hub_download(repository, file))
        return _directory(hub, reference, repository)
    except FastLLMError:
        raise
    except Exception as error:  # the library lets those of its HTTP client through as well
        said = str(error).strip().splitlines() or [""]
        raise ModelSourceError(reference, f"{type(error).__name__}: {said[0][:500]}") from error
    finally:
        if quiet:
            bars.enable_progress_bars()


def _directory(hub: Any, reference: str, repository: str) -> Path:
    folder = Path(hub.snapshot_download(repository, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
        return folder
    try:
        names = [str(name) for name in hub.HfApi().list_repo_files(repository)]
    except Exception:  # offline: what is in the cache has to do
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if len(ggufs) == 1:
        return Path(hub.hf_hub_download(repository, ggufs[0]))
    if ggufs:
        shown = ", ".join(ggufs[:8]) + (", ..." if len(ggufs) > 8 else "")
        raise RequestError("model", reference, f"hf:{repository}:FILE with one of {shown}")
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        raise UnsupportedModelError(f"{reference}: only pickled weights, which are never loaded")
    raise ModelSourceError(reference, "no safetensors with a config.json and no GGUF file in the repository")
