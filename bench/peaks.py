"""The machine's own limits, measured: integer and float operations a second, bytes a second from memory.

    python bench/peaks.py [--threads N] [--seconds 0.2] [--mebibytes 512]

Compiles bench/peaks.cpp for this machine with the compiler at hand (CXX, else c++, g++ or clang++) into
build/bench/. `measure` is what the other benchmarks call; they state their figures as shares of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "bench" / "peaks.cpp"
FLAGS = ("-O3", "-march=native", "-std=c++20", "-pthread")

# Instruction set -> what its integer and fp32 peaks are called, best first.
INT8 = {"avx512vnni": "int8_avx512vnni", "avxvnni": "int8_avxvnni", "avx2": "int8_avx2"}
FP32 = {"avx512vnni": "fp32_avx512", "avxvnni": "fp32_avx2", "avx2": "fp32_avx2"}


def program() -> Path:
    """The compiled program, made anew when its source, the compiler or the processor changed."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise SystemExit("bench/peaks.py: no C++ compiler; set CXX")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    cpu = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0]
    what = "".join((SOURCE.read_text(), version, cpu, platform.machine(), *FLAGS))
    made = ROOT / "build" / "bench" / f"limits-{hashlib.sha256(what.encode()).hexdigest()[:12]}"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        partial = made.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(partial)], check=True)
        partial.replace(made)
    return made


def measure(threads: int, isa: str = "", seconds: float = 0.2, mebibytes: int = 512) -> dict[str, Any]:
    """The limits with so many threads, and those that count for code of an instruction set ("" or unknown:
    the best there is): "int8" and "fp32" in operations, "read" in bytes a second, over "rounds"."""
    command = [str(program()), str(threads), str(seconds), str(mebibytes)]
    rounds = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)

    def best(table: dict[str, str]) -> float:
        names = (
            [table[isa]] if table.get(isa) in rounds else [name for name in table.values() if name in rounds]
        )
        return max((max(rounds[name]) for name in names), default=float("nan"))

    read = max(max(values) for name, values in rounds.items() if name.startswith("read"))
    return {
        "int8": best(INT8),
        "fp32": best(FP32),
        "read": read,
        "threads": threads,
        "isa": isa,
        "rounds": rounds,
    }


def greater(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Of two measurements, what the machine can do: a neighbour slows down one of them at times."""
    return {name: max(before[name], after[name]) for name in ("int8", "fp32", "read")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=0.2, help="per round of each kind of arithmetic")
    parser.add_argument("--mebibytes", type=int, default=512, help="per thread, for reading")
    options = parser.parse_args()
    found = measure(options.threads, "", options.seconds, options.mebibytes)
    for name, values in found["rounds"].items():
        unit = "GB/s" if name.startswith("read") else "Gop/s"
        rounds = " ".join(f"{value / 1e9:.1f}" for value in values)
        print(f"{name:18s} {max(values) / 1e9:8.1f} {unit}   rounds {rounds}")


if __name__ == "__main__":
    main()
