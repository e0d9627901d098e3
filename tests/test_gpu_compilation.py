"""What the compiler makes of the Triton kernels, for every entry of the tables: no GPU is needed for that.

compile_gpu_kernels.py does it, in processes of its own: here the kernels may be interpreted. They begin as
soon as the tests are collected (`begin_early`).
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "compile_gpu_kernels.py"
# Not fastllm.kernels.tiles': whoever imports the kernels decides whether they are interpreted.
ARCHITECTURES = sorted(file.stem for file in (SCRIPT.parents[1] / "kernels" / "tables").glob("*.json"))
SHARED_BYTES = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10}  # that a program may have


_POOL = ThreadPoolExecutor(2)
_RESULTS: dict[str, Future[list[dict[str, Any]]]] = {}
_RUNNING: list[subprocess.Popen[str]] = []


def begin_early() -> None:
    """Start compiling, two architectures at a time, in processes that give way to all others."""
    for architecture in ARCHITECTURES:
        _RESULTS[architecture] = _POOL.submit(_compile, architecture)
    atexit.register(_end)


def _compile(architecture: str) -> list[dict[str, Any]]:
    """What compile_gpu_kernels.py says of each kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    gently = ["nice", "-n", "19"] if shutil.which("nice") else []
    with tempfile.TemporaryDirectory() as cache:
        process = subprocess.Popen(
            [*gently, sys.executable, "-W", "ignore", SCRIPT, architecture],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environment, "TRITON_CACHE_DIR": cache},
        )  # fmt: skip
        _RUNNING.append(process)
        output, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]
    return [json.loads(line) for line in output.splitlines()]


def _end() -> None:
    """The tests were broken off."""
    _POOL.shutdown(wait=False, cancel_futures=True)
    for process in _RUNNING:
        if process.poll() is None:
            process.kill()


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[dict[str, Any]]]:
    """Architecture -> what compile_gpu_kernels.py says of each kernel."""
    return {architecture: result.result() for architecture, result in _RESULTS.items()}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills_and_shared_memory_suffices(
    architecture: str, compiled: dict[str, list[dict[str, Any]]]
) -> None:
    kernels = compiled[architecture]
    assert len(kernels) >= (60 if architecture == "sm_90" else 20)
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert not {"LDL", "STL"} & kernel["operations"].keys(), kernel
        assert kernel["shared"] <= SHARED_BYTES[architecture], kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensor_cores_multiply(architecture: str, compiled: dict[str, list[dict[str, Any]]]) -> None:
    for kernel in compiled[architecture]:
        if kernel["path"] == "others":
            continue
        operations = kernel["operations"]
        if architecture == "sm_90":
            wanted = {"IGMMA" if kernel["path"] == "int8" else "HGMMA"}
            if kernel["path"] == "attention" or (kernel["tile"] and kernel["tile"][1] < 16):
                wanted.add("HMMA")  # compilers differ about 8 columns
            assert not kernel["serialized"], kernel  # ptxas keeps several wgmma in flight
        else:
            wanted = {"IMMA" if kernel["path"] == "int8" else "HMMA"}
        assert wanted & operations.keys(), kernel
        # Weights do not go through the conversion unit: what is left converts sub-scales and indices.
        assert operations.get("I2F", 0) <= 16 or kernel["path"] == "int8", kernel


def test_hopper_reads_by_the_copy_engine(compiled: dict[str, list[dict[str, Any]]]) -> None:
    for kernel in compiled["sm_90"]:
        if kernel["tile"] and kernel["tile"][5] and not kernel["layout"].startswith(("u5", "u6")):
            assert kernel["operations"].get("UTMALDG", 0) > 0, kernel
