"""Matmuls with packed weights on a GPU: checked against float64, then timed against what else there is.

    python bench/gpu_matmul.py --out docs/benchmarks/gpu_matmul.json

Times are medians of replays of a CUDA graph of 50 launches over weights that rotate through more memory than
the cache holds. Beside ours run torch's bf16 product (cuBLAS), its int4 product (_weight_int4pack_mm), its
int8 product (_int_mm) and, where it can be imported, gemlite; and the machine's limits: a plain read of the
same bytes, the copy bandwidth, the bf16 rate. --peers DIR is put on the import path (for gemlite); --deadline
ends the run in time, and what was not reached is missing from the record, never estimated.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from fastllm import kernels
from fastllm.kernels.layout import GpuMatrix, unpack_codes
from fastllm.kernels.timing import rotating, seconds_per_call
from fastllm.kernels.tune import random_matrix
from fastllm.reference.integer import quantize_activations

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
# Layers (N, K) of Llama 3.2 1B and 3 8B, of Qwen 2.5 32B and of Llama 3 70B: attention in and out, MLP in and
# out.
MODELS = {
    "70B": ((8192, 8192), (10240, 8192), (57344, 8192), (8192, 28672)),
    "8B": ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)),
    "32B": ((5120, 5120), (7168, 5120), (55296, 5120), (5120, 27648)),
    "1B": ((2048, 2048), (3072, 2048), (16384, 2048), (2048, 8192)),
}
BARS = (  # (product, M, what it is held against, bar, goal), at 8192 x 8192
    ("w4a16", 1, "read", 0.70, 0.90),
    ("w4a16", 16, "bf16", 2.3, 3.2),
    ("w4a16", 64, "bf16", 1.6, 2.4),
    ("w4a16", 256, "bf16", 0.9, 1.2),
    ("w4a16", 4096, "bf16", 0.8, 1.0),
    ("w8a8", 128, "bf16", 1.5, 1.8),
    ("w8a8", 256, "bf16", 1.5, 1.8),
    ("w8a8", 1024, "bf16", 1.5, 1.8),
    ("w8a8", 4096, "bf16", 1.5, 1.8),
)


@triton.jit
def read_kernel(data, out, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Reads BLOCK * STEPS words and keeps what the compiler cannot know to be nothing."""
    at = data + tl.program_id(0).to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    seen = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(STEPS):
        seen ^= tl.load(at + i * BLOCK)
    if tl.reduce(seen, 0, _xor) == 123456789:
        tl.store(out, 1)


@triton.jit
def _xor(a, b):
    return a ^ b


class Clock:
    """How much of the run's time is left."""

    def __init__(self, deadline: float) -> None:
        self.end = time.monotonic() + deadline

    def left(self) -> float:
        return self.end - time.monotonic()


def limits(read_bytes: int) -> dict[str, float]:
    """Seconds to read these bytes, copy bandwidth in bytes/s (read and written), bf16 rate in FLOP/s."""
    words, block, steps = read_bytes // 4, 1024, 8
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    data = rotating(
        lambda: torch.randint(-(1 << 31), (1 << 31) - 1, (words,), dtype=torch.int32, device="cuda"),
        lambda t: t.nbytes,
    )
    grid = (words // (block * steps),)
    read = min(
        seconds_per_call(lambda t, w=w: read_kernel[grid](t, out, block, steps, num_warps=w), data)  # type: ignore[misc]
        for w in (4, 8)
    )
    source = torch.randint(0, 100, (1 << 30,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds_per_call(target.copy_, [source], 4, 3)
    del source, target
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    rate = 2 * 8192**3 / seconds_per_call(lambda t: torch.mm(t, b), [a], 10, 3)
    return {"read_seconds": read, "read_bytes": read_bytes, "copy_bytes_per_s": copy, "bf16_flop_per_s": rate}


# ---- correctness -------------------------------------------------------------------------------------------


def oracle(w: GpuMatrix) -> torch.Tensor:
    """The weights in float64."""
    codes = unpack_codes(w).double() - w.zero
    scales = w.scales.double().repeat_interleave(codes.shape[1] // w.scales.shape[0], 0).t()
    return (codes * scales)[:, : w.cols]


CHECKED = [
    (kind, group, n, k, dtype)
    for kind, group in (("u4", 128), ("u4", 32), ("i8", 0), ("i8", 32))
    for n, k in ((1024, 1024), (560, 576), (704, 2112), (1536, 704))
    for dtype in ("bfloat16", "float16")
]
# Of the relative error: rounding of the result, of scales, of weights.
BOUNDS = {"bfloat16": 8e-3, "float16": 1e-3}


def check_one(job: tuple[str, int, int, int, str]) -> list[dict[str, Any]]:
    """The error of every path against float64, and whether a second run gives the same bits."""
    kind, group, n, k, dtype = job
    torch.manual_seed(0)
    w = random_matrix(kind, n, k, group, "cuda")
    exact = oracle(w)
    results = []
    for m in (1, 5, 16, 33, 64, 200, 1030):
        x = torch.randn(m, k, device="cuda", dtype=getattr(torch, dtype))
        for activations in ("float", "int8") if kind == "i8" else ("float",):
            for deterministic in (False, True):
                call: dict[str, Any] = {"activations": activations, "deterministic": deterministic}
                y = kernels.matmul(x, w, **call)
                same = torch.equal(y, kernels.matmul(x, w, **call))
                seen = x.double()
                if activations == "int8":
                    q, scale = quantize_activations(x.float().cpu().numpy(), group=k)
                    seen = torch.from_numpy(q * scale.astype(np.float64)).cuda()
                expected = seen @ exact.t()
                error = float((y.double() - expected).norm() / expected.norm())
                right = same and error < BOUNDS[dtype]
                results.append({"kind": kind, "group": group, "n": n, "k": k, "m": m, "dtype": dtype, **call,
                                "error": error, "same_bits": same, "right": right})  # fmt: skip
    return results


def check() -> list[dict[str, Any]]:
    """All of CHECKED, in processes of their own, since what takes time is compiling."""
    with multiprocessing.get_context("spawn").Pool(min(16, os.cpu_count() or 1)) as pool:
        return [result for part in pool.map(check_one, CHECKED, chunksize=1) for result in part]


# ---- timing ------------------------------------------------------------------------------------------------


def ours(
    kind: str, group: int, activations: str
) -> Callable[[int, int], tuple[list[GpuMatrix], Callable[..., Any]]]:
    def make(n: int, k: int) -> tuple[list[GpuMatrix], Callable[..., Any]]:
        weights = rotating(lambda: random_matrix(kind, n, k, group, "cuda"), lambda w: w.nbytes)
        if activations == "int8":
            return weights, lambda q, w: kernels.matmul_int8(q[0], q[1], w)
        return weights, lambda x, w: kernels.matmul(x, w)

    return make


def cublas(n: int, k: int) -> tuple[list[torch.Tensor], Callable[..., Any]]:
    weights = rotating(lambda: torch.randn(n, k, device="cuda", dtype=torch.bfloat16), lambda w: w.nbytes)
    return weights, torch.nn.functional.linear


def int4pack(n: int, k: int) -> tuple[list[Any], Callable[..., Any]]:
    def make() -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        scales = torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)
        return torch._convert_weight_to_int4pack(codes, 8), scales

    weights = rotating(make, lambda w: n * k // 2)
    return weights, lambda x, w: torch._weight_int4pack_mm(x, w[0], 128, w[1])


def int_mm(n: int, k: int) -> tuple[list[torch.Tensor], Callable[..., Any]]:
    weights = rotating(
        lambda: torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda"), lambda w: w.nbytes
    )
    return weights, lambda q, w: torch._int_mm(q[0], w.t())


PRODUCTS: dict[str, Any] = {
    "bf16": cublas,
    "w4a16": ours("u4", 128, "float"),
    "w8a16": ours("i8", 0, "float"),
    "w8a8": ours("i8", 0, "int8"),
    "torch int4pack": int4pack,
    "torch int_mm": int_mm,
}
SLOW = {"torch int4pack": 256}  # where it is many times behind, and minutes would go by


def time_products(clock: Clock, models: list[str], rows: list[int], record: dict[str, Any]) -> None:
    for model in models:
        for n, k in MODELS[model]:
            for name, make in PRODUCTS.items():
                if clock.left() < 0:
                    return
                weights, call = make(n, k)
                for m in rows:
                    if m > SLOW.get(name, m) or (name == "torch int_mm" and m <= 16):
                        continue
                    x: Any = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
                    if name == "w8a8":
                        x = kernels.quantize_rows(x)
                    elif name == "torch int_mm":
                        x = (torch.randint(-127, 128, (m, k), dtype=torch.int8, device="cuda"),)
                    long = 2 * m * n * k > 1e12  # over a millisecond: two replays tell
                    entry = {"model": model, "n": n, "k": k, "m": m, "product": name}
                    try:
                        seconds = seconds_per_call(
                            lambda w, x=x, call=call: call(x, w), weights, 50, 2 if long else 5
                        )
                    except RuntimeError as error:  # a peer that does not take the shape
                        record["failed"].append(entry | {"why": str(error)[:200]})
                        continue
                    record["times"].append(entry | {"us": seconds * 1e6})
                del weights
            print(f"{n} x {k}: {clock.left():.0f} s left", flush=True)


def time_gemlite(directory: str, rows: list[int]) -> None:
    """In a process of its own, which may run out of its time: a line of JSON for each M, at 8192 x 8192."""
    sys.path.insert(0, directory)
    import gemlite

    gemlite.GemLiteLinear.load_config(
        str(Path(gemlite.__file__).parent / "configs" / "h100.json"), False, True
    )

    def make() -> Any:
        layer = gemlite.GemLiteLinear(
            4, group_size=128, in_features=8192, out_features=8192,
            input_dtype=gemlite.DType.BF16, output_dtype=gemlite.DType.BF16,
        )  # fmt: skip
        codes = torch.randint(0, 16, (8192, 8192), dtype=torch.uint8, device="cuda")
        scales = torch.rand(8192, 64, device="cuda", dtype=torch.bfloat16) / 1000
        layer.pack(codes, scales.reshape(-1, 1), torch.full_like(scales, 8.0).reshape(-1, 1), None)
        return layer

    layers = rotating(make, lambda _: 8192 * 4096)
    for m in rows:
        x = torch.randn(m, 8192, device="cuda", dtype=torch.bfloat16)
        seconds = seconds_per_call(lambda layer, x=x: layer(x), layers, 50, 3)
        print(
            json.dumps(
                {"model": "70B", "n": 8192, "k": 8192, "m": m, "product": "gemlite", "us": seconds * 1e6}
            ),
            flush=True,
        )


def run_gemlite(arguments: list[str], seconds: float) -> tuple[list[dict[str, Any]], str]:
    """What the process printed before it ended or its time did, and why there is no more."""
    command = [sys.executable, __file__, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 1))
        printed, why = done.stdout, done.stderr[-300:] if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        printed, why = (error.stdout or b"").decode(), "out of time"
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")], why


# ---- results -----------------------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> list[str]:
    """Lines of Markdown: bars, then times at 8192 x 8192, then the ratio over all shapes for each M."""
    times = {(t["n"], t["k"], t["m"], t["product"]): t["us"] for t in record["times"]}
    limit = record["limits"]

    def held(product: str, m: int, against: str) -> float | None:
        mine = times.get((8192, 8192, m, product))
        other = limit["read_seconds"] * 1e6 if against == "read" else times.get((8192, 8192, m, against))
        return other / mine if mine and other else None

    lines = ["| product, 8192 x 8192 | M | held against | ratio | bar | goal |", "|---|---|---|---|---|---|"]
    for product, m, against, bar, goal in BARS:
        ratio = held(product, m, against)
        shown = "not measured" if ratio is None else f"{ratio:.2f}{'' if ratio >= bar else ' **below**'}"
        lines.append(f"| {product} | {m} | {against} | {shown} | {bar} | {goal} |")
    names = [name for name in (*PRODUCTS, "gemlite") if any(key[3] == name for key in times)]
    lines += ["", "| us, 8192 x 8192 | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for m in ROWS:
        cells = [
            f"{times[8192, 8192, m, name]:.1f}" if (8192, 8192, m, name) in times else "" for name in names
        ]
        lines.append(f"| M = {m} | " + " | ".join(cells) + " |")
    mine = [name for name in ("w4a16", "w8a16", "w8a8") if name in names]
    lines += [
        "",
        "| times bf16, geometric mean over shapes | " + " | ".join(mine) + " |",
        "|---" * (len(mine) + 1) + "|",
    ]
    for m in ROWS:
        cells = []
        for name in mine:
            ratios = [times[n, k, m, "bf16"] / us for (n, k, rows, product), us in times.items()
                      if rows == m and product == name and (n, k, m, "bf16") in times]  # fmt: skip
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
            cells.append(
                f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)})" if mean else ""
            )
        lines.append(f"| M = {m} | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="the record, JSON; its table goes beside it as .md")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="values of M")
    parser.add_argument("--deadline", type=float, default=450, help="seconds")
    parser.add_argument("--peers", help="a directory for the import path, where gemlite is")
    parser.add_argument("--gemlite", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows = [int(m) for m in options.rows.split(",")]
    if options.gemlite:
        time_gemlite(options.peers, rows)
        return 0
    clock = Clock(options.deadline)
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "limits": limits(8192 * 8192 // 2 + 8192 * 64 * 2),  # 4-bit codes and scales in groups of 128
        "times": [],
        "failed": [],
    }
    print(record["device"], record["limits"], flush=True)
    record["checks"] = check()
    wrong = [c for c in record["checks"] if not c["right"]]
    print(
        f"{len(record['checks'])} products checked against float64, {len(wrong)} wrong {wrong[:5]}; "
        f"{clock.left():.0f} s left",
        flush=True,
    )
    models = options.models.split(",")
    time_products(Clock(clock.left() - (60 if options.peers else 0)), models, rows, record)
    if options.peers:
        arguments = ["--gemlite", "--peers", options.peers, "--rows", options.rows]
        found, record["gemlite_ended"] = run_gemlite(arguments, clock.left())
        record["times"] += found
    lines = table(record)
    print("\n".join(lines))
    if options.out:
        options.out.write_text(json.dumps(record))
        versions = f"{record['device']}, torch {record['torch']}, triton {record['triton']}, {record['date']}"
        page = [
            "# Matmuls with packed weights on a GPU",
            "",
            f"{versions}. Record: [{options.out.name}]({options.out.name}).",
            "",
        ]
        options.out.with_suffix(".md").write_text("\n".join([*page, *lines, ""]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
