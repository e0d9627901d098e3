"""Regenerates a table of tiles: times candidates on the GPU at hand and keeps the fastest for each M.

    python -m fastllm.kernels.tune kernels/tables/sm_90.json

Candidates compile side by side in processes of their own, then they are timed one after another, on one
shape. Kinds that it does not time stay as the file has them, or else as sm_89's table does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fastllm.kernels import products
from fastllm.kernels.layout import BLOCK, GpuMatrix
from fastllm.kernels.tiles import Tile
from fastllm.kernels.timing import rotating, seconds_per_call

KINDS = ("u4", "i8", "int8")
BOUNDS: dict[str, tuple[int, ...]] = {
    "u4": (8, 16, 32, 64, 128, 256, 512),
    "i8": (8, 16, 32, 64, 128, 256, 512),
    "int8": (16, 32, 64, 128, 256, 512, 1024, 4096),
}
# Columns per scale of the weights that are timed; 0: a scale per row.
GROUPS = {"u4": 128, "i8": 0, "int8": 0}
DEQUANTIZE_FROM = 1024
SHARED_BYTES = 226_000  # of a multiprocessor (sm_90); what does not fit elsewhere fails to compile


def candidates(kind: str, m: int) -> Iterator[Tile]:
    """Tiles worth a trial for M = m."""
    widths: tuple[int, ...]
    if kind == "int8":
        widths = (16,) if m <= 16 else (m,) if m <= 64 else (64, 128) if m <= 128 else (64, 128, 256)
        depths: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
        programs: tuple[int, ...] = (1, 2) if m <= 256 else (1,)
        descriptors: tuple[int, ...] = (1,)
    else:
        widths = (8,) if m <= 8 else (m,) if m <= 64 else (64, 128)
        depths = (2, 3, 4) if m <= 8 else (3, 4)
        programs = (2, 3, 4, 6, 8) if m <= 16 else (1, 2, 3, 4) if m <= 64 else (1, 2)
        descriptors = (0, 1) if m <= 32 else (1,)
    for bn, bm, warps, stages, per_processor, described in itertools.product(
        (64, 128, 256), widths, (2, 4, 8), depths, programs, descriptors
    ):
        weight_bytes = bn * BLOCK // 2 if kind == "u4" else bn * BLOCK
        stage_bytes = weight_bytes + bm * BLOCK * (1 if kind == "int8" else 2)
        rows_of_warp = bn // warps
        if not 16 <= rows_of_warp <= 64 or (warps == 2 and m > 8) or bn * bm > 4096 * warps:
            continue
        if stage_bytes * stages * per_processor > SHARED_BYTES * (2 if m <= 16 else 1):
            continue
        yield Tile(bn, bm, warps, stages, per_processor, described)


def random_matrix(kind: str, n: int, k: int, group: int, device: str) -> GpuMatrix:
    """Weights of random codes, with values near 1 / sqrt(K)."""
    blocks = math.ceil(k / BLOCK)
    words = torch.randint(-(1 << 15), 1 << 15, (blocks, n, 32 if kind == "u4" else 64), device=device)
    groups = blocks * BLOCK // group if group else 1
    scales = (torch.rand(groups, n, device=device) + 0.5) / (4 if kind == "u4" else 64) / math.sqrt(k)
    zero = 8 if kind == "u4" else 0
    return GpuMatrix(kind, n, k, group, zero, words.to(torch.int16), None, scales.half(), None, None, None)


def product(kind: str, x: torch.Tensor, tile: Tile) -> Callable[[GpuMatrix], torch.Tensor]:
    """The kernel of a kind with one tile, as a function of the weights."""
    if kind != "int8":
        return lambda w: products.weight_only(x, w, None, None, False, tile)
    q, scale = products.quantize_rows(x, None, 0.0)
    return lambda w: products.int8(q, scale, w, None, None, False, x.dtype, tile)


def _weights(kind: str, n: int, k: int, copies: int | None = None) -> list[GpuMatrix]:
    stored = "i8" if kind == "int8" else kind
    return rotating(lambda: random_matrix(stored, n, k, GROUPS[kind], "cuda"), lambda w: w.nbytes, copies)


def _compile(job: tuple[str, int, int, int, Tile]) -> str:
    """In a process of its own: puts a candidate into Triton's cache. Why it cannot be, or nothing."""
    kind, m, n, k, tile = job
    try:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        product(kind, x, tile)(_weights(kind, n, k, 1)[0])
        torch.cuda.synchronize()
    except Exception as error:  # too large for this GPU: no candidate
        return f"{type(error).__name__}: {str(error)[:80]}"
    return ""


def write_table(path: Path, timed: dict[str, dict[str, list[int]]], measured: str) -> None:
    """A table in the form that `tiles.py` reads, one line for each bound; kinds that were not timed stay."""
    before = path if path.exists() else resources.files("fastllm.kernels") / "tables" / "sm_89.json"
    tiles = json.loads(before.read_text())["tiles"] | timed
    lines = [
        "{",
        f'  "measured": {json.dumps(measured)},',
        f'  "dequantize_from": {DEQUANTIZE_FROM},',
        '  "tiles": {',
    ]
    kinds = []
    for kind, bounds in tiles.items():
        rows = ",\n".join(f'      "{bound}": {json.dumps(tile)}' for bound, tile in bounds.items())
        kinds.append(f'    "{kind}": {{\n{rows}\n    }}')
    path.write_text("\n".join([*lines, ",\n".join(kinds), "  }", "}", ""]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastllm.kernels.tune", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("table", type=Path, help="the file to write")
    parser.add_argument("--raw", type=Path, help="where every timing goes, as JSON")
    parser.add_argument("--shape", default="8192x8192", help="N x K that is timed")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    n, k = map(int, options.shape.split("x"))
    started = time.perf_counter()

    jobs = [(kind, m, n, k, tile) for kind in KINDS for m in BOUNDS[kind] for tile in candidates(kind, m)]
    # Programs per multiprocessor are no part of a kernel.
    compiled = {(kind, tile._replace(programs=1)): (kind, m, n, k, tile) for kind, m, n, k, tile in jobs}
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        failures = dict(zip(compiled, pool.map(_compile, compiled.values(), chunksize=1), strict=True))
    print(
        f"{len(jobs)} candidates, {len(compiled)} kernels: {time.perf_counter() - started:.0f} s", flush=True
    )
    for (kind, tile), failure in failures.items():
        if failure:
            print(f"left out: {kind} {tuple(tile)} {failure}")

    tiles: dict[str, dict[str, list[int]]] = {}
    raw: list[dict[str, Any]] = []
    for kind in KINDS:
        weights = _weights(kind, n, k)
        for m in BOUNDS[kind]:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            timed = []
            for tile in (job[4] for job in jobs if job[:2] == (kind, m)):
                if failures[kind, tile._replace(programs=1)]:
                    continue
                call = product(kind, x, tile)
                seconds = seconds_per_call(call, weights, launches=24 if m <= 512 else 4, replays=3)
                timed.append((seconds, tile))
                raw.append({"kind": kind, "m": m, "n": n, "k": k, "tile": tile, "us": seconds * 1e6})
            timed.sort()
            tiles.setdefault(kind, {})[str(m)] = list(timed[0][1])
            best = "  ".join(
                f"{seconds * 1e6:.1f} us {'/'.join(map(str, tile))}" for seconds, tile in timed[:3]
            )
            print(f"{time.perf_counter() - started:4.0f} s  {kind:5} M {m:5}  {best}", flush=True)
        del weights
    measured = f"{torch.cuda.get_device_name()}, {options.shape}, torch {torch.__version__}"
    write_table(options.table, tiles, measured)
    if options.raw:
        options.raw.write_text(json.dumps({"measured": measured, "raw": raw}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
