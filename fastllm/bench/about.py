"""What a record says about where it was made: command, machine, versions."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def about(arguments: Sequence[str]) -> dict[str, Any]:
    """Command, machine and versions."""
    return {
        "command": " ".join(["python -m fastllm.bench serve", *_shown(arguments)]),
        "system": platform.platform(),
        "processor": processor(),
        "processors": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            **{name: package_version(name) for name in ("fastllm", "aiohttp")},
        },
    }


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _shown(arguments: Sequence[str]) -> list[str]:
    """Arguments as a record keeps them: of an absolute path the last part, of a header its name."""
    found = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, equals, value = argument.partition("=")
        if before == "--header":
            argument = argument.partition(":")[0] + ": ..."
        elif option == "--header" and equals:
            argument = f"--header={value.partition(':')[0]}: ..."
        elif os.path.isabs(argument):
            argument = os.path.basename(argument)
        elif option.startswith("--") and os.path.isabs(value):
            argument = f"{option}={os.path.basename(value)}"
        found.append(shlex.quote(argument))
    return found


def package_version(package: str) -> str:
    """The version that is installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
