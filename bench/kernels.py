"""How near the kernels come to the machine: shares of the int8 peak and of reading memory.

    python bench/kernels.py [--only matmul] [--kinds Q4_0,Q6_K] [--rows-at-once 1,8,480] [--json FILE]

matmul: y = x w^T with w (N, K) = (8192, 2048), for every packed layout and numbers of rows of x from decoding
one sequence to a prompt chunk. Weights come from a set of matrices larger than the last cache, one after the
other. The time is that of a whole `_core.matmul` call: quantizing x, the pool's barriers and the allocation
of y are in it. On all threads.

attention: `_core.paged_attention` on one layer's cache: sequences that decode one token each at 8,192
positions of context, and a chunk of 512 queries that ends at 4,096. It runs on one thread, and so do the
limits that it is compared with; 16 queries at once, as the decoder does.

A share of the int8 peak counts two operations per multiply-add; of memory, the packed weights' bytes, or the
keys' and values'. Limits are measured before and after; the greater counts.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import machine
import numpy as np
import numpy.typing as npt
import peaks

from fastllm import _core

ROWS, COLS = 8192, 2048
ROWS_AT_ONCE = (1, 2, 4, 8, 12, 16, 32, 64, 480)
DECODE_CONTEXT, CHUNK, CHUNK_END, QUERIES = 8192, 512, 4096, 16
HEADS = ((9, 3, 64), (32, 8, 64))  # query heads, KV heads, width: the two models of the comparison
BLOCK = 16

# Type -> columns and bytes of a block, and where its fp16 scales are; everything else may be any bytes.
BLOCKS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "Q4_0": (32, 18, (0,)),
    "Q4_1": (32, 20, (0, 2)),
    "Q4_K": (256, 144, (0, 2)),
    "Q5_0": (32, 22, (0,)),
    "Q5_K": (256, 176, (0, 2)),
    "Q6_K": (256, 210, (208,)),
    "Q8_0": (32, 34, (0,)),
}
Figures = dict[str, Any]


def cache_bytes() -> int:
    """The largest cache."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes) or 32 << 20


def time_passes(work: list[Callable[[], object]], seconds: float) -> float:
    """Seconds of one call: the median over passes through all of `work`, after one that warms up."""
    passes: list[float] = []
    begin = 0.0
    while len(passes) < 4 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        for call in work:
            call()
        passes.append((time.perf_counter() - start) / len(work))
        if len(passes) == 1:
            begin = time.perf_counter()
    return median(passes[1:])


# -- matmul --------------------------------------------------------------------------------------------------


def random_matrix(kind: str, rows: int, cols: int, seed: int) -> _core.PackedMatrix:
    """A matrix of random codes with scales of 0.01."""
    columns, size, scales = BLOCKS[kind]
    data = np.random.default_rng(seed).integers(0, 256, (rows * cols // columns, size), np.uint8)
    for at in scales:
        data[:, at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    return _core.PackedMatrix.from_ggml(kind, data.reshape(-1), rows, cols)


def measure_matmul(kind: str, counts: list[int], options: argparse.Namespace) -> Iterator[Figures]:
    first = random_matrix(kind, options.rows, options.cols, 0)
    copies = max(2, -(-options.set_factor * cache_bytes() // first.nbytes))
    matrices = [first, *(random_matrix(kind, options.rows, options.cols, i) for i in range(1, copies))]
    for count in counts:
        x = np.random.default_rng(1).standard_normal((count, options.cols), np.float32)

        def call(w: _core.PackedMatrix, x: npt.NDArray[np.float32] = x) -> Callable[[], object]:
            return lambda: _core.matmul(x, w, threads=options.threads)

        seconds = time_passes([call(w) for w in matrices], options.seconds)
        yield {
            "work": "matmul",
            "kind": f"{kind} ({first.layout})",
            "size": f"M={count}",
            "seconds": seconds,
            "operations": 2.0 * count * options.rows * options.cols,
            "bytes": first.nbytes,
            "threads": options.threads,
        }


# -- attention -----------------------------------------------------------------------------------------------


def measure_attention(
    dtype: str, heads: tuple[int, int, int], options: argparse.Namespace
) -> Iterator[Figures]:
    query_heads, kv_heads, width = heads
    element = {"f16": 2.0, "i16": 2.0 + 4 / width, "i8": 1.0 + 4 / width}[dtype]
    per_position = 2 * kv_heads * width * element
    shape = f"{query_heads}/{kv_heads} heads of {width}"
    sequences = max(1, -(-options.set_factor * cache_bytes() // int(DECODE_CONTEXT * per_position)))
    for name, count, context, queries in (
        (f"{sequences} decodes at {DECODE_CONTEXT}", sequences, DECODE_CONTEXT, 1),
        (f"{CHUNK} queries to {CHUNK_END}", 1, CHUNK_END, CHUNK),
    ):
        cache, tables = filled_cache(dtype, count, context, kv_heads, width)
        stream = np.random.default_rng(2)
        q = stream.standard_normal((count * queries, query_heads, width), np.float32)
        starts = np.arange(count + 1, dtype=np.int32) * queries
        lengths = np.full(count, context, np.int32)

        def call(
            cache: _core.KvCache = cache,
            q: npt.NDArray[np.float32] = q,
            starts: npt.NDArray[np.int32] = starts,
            lengths: npt.NDArray[np.int32] = lengths,
            tables: npt.NDArray[np.int32] = tables,
        ) -> object:
            return _core.paged_attention(cache, q, starts, lengths, tables, queries_at_once=QUERIES)

        pairs = count * sum(range(context - queries + 1, context + 1))
        yield {
            "work": "attention",
            "kind": f"{dtype}, {shape}",
            "size": name,
            "seconds": time_passes([call], options.seconds),
            "operations": 4.0 * pairs * query_heads * width,
            "bytes": count * context * per_position,
            "threads": 1,
        }


def filled_cache(
    dtype: str, sequences: int, context: int, kv_heads: int, width: int
) -> tuple[_core.KvCache, npt.NDArray[np.int32]]:
    """A cache of so many sequences, their blocks in random order, and their block tables."""
    each = context // BLOCK
    cache = _core.KvCache(sequences * each, kv_heads, width, BLOCK, dtype)
    stream = np.random.default_rng(3)
    tables = stream.permutation(sequences * each).astype(np.int32).reshape(sequences, each)
    for table in tables:
        k, v = stream.standard_normal((2, context, kv_heads, width), np.float32)
        cache.write(k, v, (table[:, None] * BLOCK + np.arange(BLOCK, dtype=np.int32)).reshape(-1))
    return cache, tables


# -- all -----------------------------------------------------------------------------------------------------


def table(figures: list[Figures], found: dict[int, dict[str, float]]) -> Iterator[str]:
    yield "| kernel | size | µs | Gop/s | of int8 peak | GB/s | of memory |"
    yield "|---|---|---|---|---|---|---|"
    for item in figures:
        limit = found[item["threads"]]
        operations, read = item["operations"] / item["seconds"], item["bytes"] / item["seconds"]
        yield (
            f"| {item['work']} {item['kind']} | {item['size']} | {item['seconds'] * 1e6:,.0f} "
            f"| {operations / 1e9:.1f} | {operations / limit['int8']:.1%} "
            f"| {read / 1e9:.2f} | {read / limit['read']:.1%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=("matmul", "attention"))
    parser.add_argument("--kinds", default=",".join(BLOCKS), help="matmul's, with commas between")
    parser.add_argument("--rows-at-once", default=",".join(map(str, ROWS_AT_ONCE)), help="values of M")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"N ({ROWS})")
    parser.add_argument("--cols", type=int, default=COLS, help=f"K ({COLS})")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="matmul's")
    parser.add_argument("--seconds", type=float, default=0.3, help="of measuring, each case (0.3)")
    parser.add_argument("--set-factor", type=int, default=4, help="size of the set, in largest caches (4)")
    parser.add_argument("--json", type=Path, help="write the record there")
    options = parser.parse_args()

    isa = _core.isa()
    counts = sorted({1, options.threads})
    before = {threads: peaks.measure(threads, isa, seconds=0.1) for threads in counts}
    figures: list[Figures] = []
    if options.only != "attention":
        for kind in options.kinds.split(","):
            figures += measure_matmul(kind, [int(m) for m in options.rows_at_once.split(",")], options)
    if options.only != "matmul":
        for heads in HEADS:
            for dtype in ("i16", "i8", "f16"):
                figures += measure_attention(dtype, heads, options)
    after = {threads: peaks.measure(threads, isa, seconds=0.1) for threads in counts}
    found = {threads: peaks.greater(before[threads], after[threads]) for threads in counts}
    for threads, limit in found.items():
        shown = f"int8 {limit['int8'] / 1e9:.0f}, fp32 {limit['fp32'] / 1e9:.0f} Gop/s"
        print(f"{threads} threads, {isa}: {shown}, reading {limit['read'] / 1e9:.1f} GB/s")
    print("\n".join(table(figures, found)))
    if options.json:
        record = {
            "machine": machine.describe(["fastllm", "numpy"]),
            "limits": {"before": before, "after": after, "used": found},
            "shape": {
                "rows": options.rows,
                "cols": options.cols,
                "set_bytes": options.set_factor * cache_bytes(),
            },
            "figures": figures,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
