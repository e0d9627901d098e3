"""What a benchmark record says about where it was made: machine, commit, versions, model file."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastllm.bench.about import package_version, processor

ROOT = Path(__file__).resolve().parent.parent


def _shown(argument: str) -> str:
    """An argument as a record keeps it: of an absolute path the last part, which says what it was."""
    return os.path.basename(argument) if os.path.isabs(argument) else argument


def describe(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Command, date, commit, source, processor, memory, instruction set and versions of the packages."""
    from fastllm import _core

    return {
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *map(_shown, sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        "source": source(),
        "processor": processor(),
        "processors": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "load_average": os.getloadavg()[0],
        "isa": _core.isa(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in packages},
    }


def commit() -> str:
    """The commit of the working tree, with "+" if something in it has changed since."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def source() -> str:
    """One SHA-256 for all files that fastllm is built and run from on a CPU."""
    digest = hashlib.sha256()
    for name in _git("ls-files", "CMakeLists.txt", "pyproject.toml", "csrc", "fastllm").splitlines():
        path = ROOT / name
        content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


def file_facts(path: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a model file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()
