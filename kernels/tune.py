"""Regenerates a table of tiles: times every candidate on the GPU at hand and keeps the fastest for each M.

    python -m fastllm.kernels.tune --out tables/sm_90.json

Candidates compile side by side in processes of their own, then they are timed one after another.
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
from pathlib import Path
from typing import Any

import torch

from fastllm.kernels import launch
from fastllm.kernels.layout import BLOCK, GpuMatrix
from fastllm.kernels.tiles import Tile
from fastllm.kernels.timing import seconds_per_call

KINDS = ("u4", "i8", "int8")
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
CACHE_BYTES = 256 << 20  # buffers that together are larger than any cache


def candidates(kind: str, m: int) -> Iterator[Tile]:
    """Tiles worth a trial for M = m."""
    if kind.startswith("gemv"):
        for bn, warps, stages, programs in itertools.product((16, 32, 64), (2, 4, 8, 16), (2, 3, 4, 5, 6), (4, 8)):
            bm = 8 if m <= 8 else 16
            per_stage = warps * (bn * 64 + bm * 256)
            if per_stage * stages > 110_000 or bn * warps > 512:
                continue
            yield Tile(bn, bm, warps, stages, programs, 0, 0)
        return
    if kind == "int8":
        widths = [bm for bm in (8, 16, 32, 64, 128, 256) if m / 4 <= bm <= max(2 * m, 8) or (bm >= 128 and m > 512)]
        for bn, bm, warps, stages, programs in itertools.product(
            (64, 128, 256), widths, (4, 8), (3, 4, 5, 6, 7, 8), (1, 2, 3, 4)
        ):
            bytes_stage = (bn + bm) * BLOCK
            if bn * bm / warps > 4096 or bytes_stage * stages * programs > 226_000:
                continue
            if programs > 1 and m > 512 or (m <= 64 and bytes_stage * stages * programs < 60_000):
                continue
            yield Tile(bn, bm, warps, stages, programs)
        return
    widths = [bm for bm in (16, 32, 64, 128, 256) if m / 4 <= bm <= max(m, 16) or (bm >= 128 and m > 512)]
    for bn, bm, warps, stages, programs, chain, descriptors in itertools.product(
        (32, 64, 128, 256), widths, (2, 4, 8), (2, 3, 4, 5, 6), (1, 2, 3, 4, 6, 8), (0, 1), (0, 1)
    ):
        bytes_stage = bn * BLOCK // (2 if kind == "u4" else 1) + bm * BLOCK * 2
        if bn // warps < 16 or bn // warps > 64 or (m > 64 and warps < 4) or bn * bm / warps > 4096:
            continue
        if bytes_stage * stages * min(programs, 4) > 226_000 or (not chain and bn * bm / warps > 2048):
            continue
        if (m <= 16 and (programs * warps < 6 or stages < 3)) or programs * warps > 24:
            continue
        if chain and m <= 64 or (m == 64 and stages > 4):
            continue
        if programs > 1 and m > 256:
            continue
        yield Tile(bn, bm, warps, stages, programs, chain, descriptors)


def random_matrix(kind: str, n: int, k: int, group: int, device: str) -> GpuMatrix:
    """Weights of random codes and scales near 1 / sqrt(K)."""
    blocks = math.ceil(k / BLOCK)
    words = torch.randint(-(1 << 15), 1 << 15, (blocks, n, 32 if kind == "u4" else 64), device=device)
    groups = blocks * BLOCK // group if group else 1
    scales = (torch.rand(groups, n, device=device) + 0.5) / (8 if kind == "u4" else 127) / math.sqrt(k)
    return GpuMatrix(
        kind, n, k, group, 8 if kind == "u4" else 0, words.to(torch.int16), None, scales.half(), None, None, None, None
    )


def calls(kind: str, m: int, n: int, k: int, group: int) -> Callable[[Tile], list[Callable[[], torch.Tensor]]]:
    """The product of a kind on enough sets of weights, as a function of the tile."""
    stored = "i8" if kind == "int8" else kind.split("-")[-1]
    bytes_one = n * k // (2 if stored == "u4" else 1)
    matrices = [random_matrix(stored, n, k, group, "cuda") for _ in range(max(1, CACHE_BYTES // bytes_one))]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    if kind == "int8":
        q, scale = launch.quantize_rows(x)
        return lambda tile: [
            lambda w=w: launch.int8(q, scale, w, None, None, False, torch.bfloat16, tile) for w in matrices  # type: ignore[misc]
        ]
    if kind.startswith("gemv"):
        return lambda tile: [lambda w=w: launch.gemv(x, w, None, None, False, tile) for w in matrices]  # type: ignore[misc]
    return lambda tile: [lambda w=w: launch.weight_only(x, w, None, None, False, tile) for w in matrices]  # type: ignore[misc]


def reference(kind: str, m: int, n: int, k: int, group: int, build: Any) -> torch.Tensor:
    raise NotImplementedError


def _compile(job: tuple[str, int, int, int, int, Tile]) -> str:
    """In a process of its own: compiles what a candidate needs into Triton's cache."""
    kind, m, n, k, group, tile = job
    global CACHE_BYTES
    CACHE_BYTES = 1
    try:
        calls(kind, m, n, k, group)(tile)[0]()
        torch.cuda.synchronize()
    except Exception as error:  # too large for this GPU: not a candidate
        return f"{type(error).__name__}: {str(error)[:80]}"
    return ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastllm.kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="values of M")
    parser.add_argument("--shape", default="8192x8192", help="N x K")
    parser.add_argument("--group", type=int, default=128, help="of u4; the others have a scale per row")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=int, default=0, help="at most so many candidates for each M")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    n, k = map(int, options.shape.split("x"))
    started = time.perf_counter()

    jobs = []
    for kind, m in itertools.product(options.kinds.split(","), map(int, options.rows.split(","))):
        tiles = list(candidates(kind, m))
        if options.limit:
            tiles = tiles[:: -(-len(tiles) // options.limit)]
        jobs += [(kind, m, n, k, options.group if kind.endswith("u4") else 0, tile) for tile in tiles]
    compiled: dict[Any, Any] = {}  # programs per multiprocessor are no part of a kernel
    for job in jobs:
        compiled.setdefault((job[0], job[5]._replace(programs=1), job[1] if job[0] == "int8" else 0), job)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        failures = dict(zip(compiled, pool.map(_compile, compiled.values(), chunksize=2), strict=True))
    print(f"{len(jobs)} candidates, {len(compiled)} kernels compiled in {time.perf_counter() - started:.0f} s", flush=True)

    table: dict[str, dict[str, Any]] = {}
    raw = []
    for kind, m in dict.fromkeys((job[0], job[1]) for job in jobs):
        group = options.group if kind.endswith("u4") else 0
        build = calls(kind, m, n, k, group)
        timed = []
        for job in jobs:
            if job[:2] != (kind, m) or failures[kind, job[5]._replace(programs=1), m if kind == "int8" else 0]:
                continue
            seconds = seconds_per_call(build(job[5]), 16 if m <= 256 else 4, 3)
            timed.append((seconds, job[5]))
            raw.append({"kind": kind, "m": m, "n": n, "k": k, "group": group, "tile": job[5], "us": seconds * 1e6})
        del build
        torch.cuda.empty_cache()
        timed.sort()
        table.setdefault(kind, {})[str(m)] = list(timed[0][1])
        shown = "  ".join(f"{seconds * 1e6:.1f} {'/'.join(map(str, tile))}" for seconds, tile in timed[:4])
        print(f"{time.perf_counter() - started:4.0f} s  {kind:5} M {m:5}  {shown}", flush=True)
    for key, failure in failures.items():
        if failure:
            print(key[0], key[1], failure)
    if options.out:
        options.out.write_text(json.dumps({"tiles": table, "raw": raw}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
