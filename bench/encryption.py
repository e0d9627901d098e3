"""What encryption at rest costs: loading a model, its memory, and the answers' equality.

    python bench/encryption.py [MODEL] [--rounds 9] [--chunk-kib 128] [--output OUT]

Encrypts the model into a temporary directory and loads the plain and the encrypted one by turns, each in a
process of its own, the file in the page cache: seconds of `load_model` (tokenizer and packing included) and
of packing alone, the process's peak memory while packing above what it had before, and a greedy answer,
which must be the same. Then the cipher alone. Medians over the rounds, all of them in OUT.json, a table in
OUT.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

from fastllm import SamplingParams
from fastllm.formats.encryption import EncryptedFile
from fastllm.formats.keys import KeySource
from fastllm.formats.model_encryption import encrypt_model
from fastllm.formats.source import DEFAULT_MODEL, resolve

KEY = hashlib.sha256(b"of a benchmark").digest()
KINDS = ("plain", "encrypted")


def status_bytes(name: str) -> int:
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) << 10 for row in rows if row.startswith(name + ":"))


def measure(path: Path) -> dict[str, Any]:
    """In a process of its own: load the model once, and ask it something."""
    from fastllm.executor import cpu
    from fastllm.llm import LLM
    from fastllm.loading import ModelOptions, load_model

    packing: list[float] = []
    load = cpu.CpuExecutor._load

    def timed(self: Any, checkpoint: Any) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = status_bytes("VmRSS")
        begin = time.perf_counter()
        load(self, checkpoint)
        packing.append(time.perf_counter() - begin)
        packing.append(status_bytes("VmHWM") - before)

    cpu.CpuExecutor._load = timed  # type: ignore[method-assign]
    options = ModelOptions(model=path, kv_cache_tokens=1024, max_model_len=512, threads=2, progress=False)
    before = status_bytes("VmRSS")
    begin = time.perf_counter()
    loaded = load_model(options)
    seconds = time.perf_counter() - begin
    after = status_bytes("VmRSS") - before
    with LLM._from_parts(loaded.engine, loaded.tokenizer) as llm:
        answer = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=16))
    return {
        "load_s": seconds,
        "pack_s": packing[0],
        "packing_peak_bytes": int(packing[1]),
        "resident_bytes": after,
        "weight_bytes": loaded.weight_bytes,
        "tokens": list(answer[0].outputs[0].token_ids),
    }


def cipher_rate(path: Path) -> float:
    """Bytes of plain text a second, one thread, the file in the page cache."""
    file = EncryptedFile(path, KeySource.of(KEY))
    begin = time.perf_counter()
    for index in range(file.header.chunks):
        file.chunk(index)
    seconds = time.perf_counter() - begin
    file.close()
    return file.header.length / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--chunk-kib", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("build/bench/encryption"))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.one)))
        return
    plain = resolve(options.model)
    if plain.is_dir():
        parser.error("a model in one file")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        sealed = Path(folder, "model.enc")
        begin = time.perf_counter()
        encrypt_model(plain, sealed, KEY, chunk_bytes=options.chunk_kib << 10)
        encrypting = time.perf_counter() - begin
        rounds: list[dict[str, Any]] = []
        env = {**os.environ, "FASTLLM_MODEL_KEY": KEY.hex()}
        for _ in range(options.rounds):
            found: dict[str, Any] = {}
            for kind, path in zip(KINDS, (plain, sealed), strict=True):
                command = [sys.executable, __file__, "--one", str(path)]
                done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True)
                found[kind] = json.loads(done.stdout)
            assert found["plain"]["tokens"] == found["encrypted"]["tokens"]
            found["cipher_bytes_per_s"] = cipher_rate(sealed)
            rounds.append(found)
    record = {
        **machine.describe(["cryptography", "numpy"]),
        "file_bytes": plain.stat().st_size,
        "chunk_kib": options.chunk_kib,
        "encrypt_s": encrypting,
        "rounds": rounds,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    table = report(record)
    options.output.with_suffix(".md").write_text(table)
    print(table)


def report(record: dict[str, Any]) -> str:
    """The record as a page."""

    def median(kind: str, name: str) -> float:
        return statistics.median(found[kind][name] for found in record["rounds"])

    size, weights = record["file_bytes"], median("plain", "weight_bytes")
    rates = (f"{size / median(kind, 'pack_s') / 1e9:.2f}" for kind in KINDS)
    peaks = (f"{median(kind, 'packing_peak_bytes') / weights:.2f}" for kind in KINDS)
    grown = (f"{median(kind, 'resident_bytes') / 1e6:.0f}" for kind in KINDS)
    rows = [
        ("`load_model`, s", *(f"{median(kind, 'load_s'):.3f}" for kind in KINDS)),
        ("packing, s", *(f"{median(kind, 'pack_s'):.3f}" for kind in KINDS)),
        ("packing, GB/s of the file", *rates),
        ("peak while packing, above the memory before / packed weights", *peaks),
        ("memory that the process has grown by in the end, MB", *grown),
    ]
    ratio = statistics.median(
        found["encrypted"]["load_s"] / found["plain"]["load_s"] for found in record["rounds"]
    )
    rate = statistics.median(found["cipher_bytes_per_s"] for found in record["rounds"])
    lines = [
        "# Encryption at rest",
        "",
        f"`{record['command']}` at {record['commit'][:12]} on {record['processor']}, "
        f"{record['processors']} processors, {record['date']}; "
        f"load average {record['load_average']:.1f}; "
        f"cryptography {record['packages']['cryptography']}. "
        f"A file of {size / 1e6:.0f} MB in the page cache, chunks of {record['chunk_kib']} KiB, "
        f"medians of {len(record['rounds'])} rounds.",
        "",
        "| | plain | encrypted |",
        "|---|---|---|",
        *(f"| {name} | {plain} | {sealed} |" for name, plain, sealed in rows),
        "",
        f"Loading encrypted takes {ratio:.2f} times as long (median of each round's ratio). "
        f"Decrypting alone: {rate / 1e9:.2f} GB/s on one thread. "
        f"Encrypting took {record['encrypt_s']:.2f} s. The answers have the same tokens.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
