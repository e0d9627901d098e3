"""From tensors to a kernel's launch: shapes of work, scratch memory, and how much of K a program takes.

Which tile a product takes is a look into a table (`tiles.py`), never a trial at run time.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from fastllm.kernels.dequantize import dequantize_kernel
from fastllm.kernels.gemv import gemv_kernel
from fastllm.kernels.int8 import int8_kernel
from fastllm.kernels.layout import BLOCK, GpuMatrix
from fastllm.kernels.quantize import quantize_rows_kernel
from fastllm.kernels.tiles import Tile
from fastllm.kernels.weight_only import weight_only_kernel

COUNTERS = 1 << 16  # tiles of N x M that a split product may have


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1) instead of compiling them."""
    return bool(triton.knobs.runtime.interpret)


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter runs one program after another; a few keep splits in the tests
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def splits(tiles: int, blocks: int, tile: Tile, device: torch.device) -> int:
    """Into how many parts K goes, so that the machine has `tile.programs` programs per multiprocessor."""
    wanted = multiprocessors(device) * tile.programs // tiles
    most = 2 if tile.bn * tile.bm >= 128 * 128 else 64  # see epilogue.gather_parts
    return max(1, min(wanted, blocks, most)) if tiles <= COUNTERS else 1


_counters: dict[tuple[torch.device, int], torch.Tensor] = {}


def counters(device: torch.device) -> torch.Tensor:
    """Zeros, int32 (COUNTERS,), that every kernel leaves as it found them; a tensor per stream."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    known = _counters.get((device, stream))
    if known is None:
        known = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _counters[device, stream] = known  # a graph's memory is the graph's
    return known


def weight_only(
    x: torch.Tensor, w: GpuMatrix, bias: torch.Tensor | None, residual: torch.Tensor | None, paired: bool, tile: Tile
) -> torch.Tensor:
    m = x.shape[0]
    y = x.new_empty(m, w.rows // 2 if paired else w.rows)
    tiles = math.ceil(w.rows / tile.bn) * math.ceil(m / tile.bm)
    split = splits(tiles, w.blocks, tile, x.device)
    partial = x.new_empty(split * tiles * tile.bn * tile.bm if split > 1 else 1, dtype=torch.float32)
    matrix, codes = x, w.codes
    if tile.descriptors:
        words = w.codes.shape[2]
        matrix = TensorDescriptor.from_tensor(x, [tile.bm, BLOCK])
        codes = TensorDescriptor.from_tensor(w.codes.view(-1, words), [tile.bn, words])
    weight_only_kernel[(tiles, split)](
        matrix, codes, _or(w.extra, w.codes), w.scales, _or(w.subscales, w.scales), _or(w.mins, w.scales),
        _or(w.submins, w.scales), _or(bias, y), _or(residual, y), y, partial, counters(x.device),
        m, w.rows, w.cols, x.stride(0), 0 if residual is None else residual.stride(0), y.stride(0),
        KIND=w.kind, ZERO=w.zero, GROUP=w.group, SUB=w.subscales is not None, MIN=w.mins is not None,
        BIAS=bias is not None, PAIRED=paired, RESIDUAL=residual is not None,
        BN=tile.bn, BM=tile.bm, STAGES=tile.stages, CHAIN=bool(tile.chain), EVEN_K=w.cols % BLOCK == 0,
        DESCRIPTORS=bool(tile.descriptors), NATIVE=not interpreted(), num_warps=tile.warps,
    )  # fmt: skip
    return y


def gemv(
    x: torch.Tensor, w: GpuMatrix, bias: torch.Tensor | None, residual: torch.Tensor | None, paired: bool, tile: Tile
) -> torch.Tensor:
    m = x.shape[0]
    y = x.new_empty(m, w.rows // 2 if paired else w.rows)
    tiles = math.ceil(w.rows / tile.bn)
    split = splits(tiles, math.ceil(w.blocks / tile.warps), tile, x.device)
    partial = x.new_empty(split * tiles * tile.bn * tile.bm if split > 1 else 1, dtype=torch.float32)
    gemv_kernel[(tiles, split)](
        x, w.codes, _or(w.extra, w.codes), w.scales, _or(w.subscales, w.scales), _or(w.mins, w.scales),
        _or(w.submins, w.scales), _or(bias, x), _or(residual, x), y, partial, counters(x.device),
        m, w.rows, w.cols, x.stride(0), 0 if residual is None else residual.stride(0), y.stride(0),
        KIND=w.kind, ZERO=w.zero, GROUP=w.group, SUB=w.subscales is not None, MIN=w.mins is not None,
        BIAS=bias is not None, PAIRED=paired, RESIDUAL=residual is not None,
        P=tile.warps, BN=tile.bn, BM=tile.bm, STAGES=tile.stages, EVEN_K=w.cols % BLOCK == 0,
        NATIVE=not interpreted(), num_warps=tile.warps,
    )  # fmt: skip
    return y


def int8(
    q: torch.Tensor, scale: torch.Tensor, w: GpuMatrix, bias: torch.Tensor | None, residual: torch.Tensor | None,
    paired: bool, dtype: torch.dtype, tile: Tile,
) -> torch.Tensor:  # fmt: skip
    m = q.shape[0]
    y = q.new_empty(m, w.rows // 2 if paired else w.rows, dtype=dtype)
    tiles = math.ceil(w.rows / tile.bn) * math.ceil(m / tile.bm)
    split = splits(tiles, w.blocks, tile, q.device)
    sums = torch.float32 if w.group else torch.int32
    partial = q.new_empty(split * tiles * tile.bn * tile.bm if split > 1 else 1, dtype=sums)
    bk = w.group or BLOCK
    weights = w.codes.view(torch.int8).view(w.blocks * w.rows, BLOCK)
    int8_kernel[(tiles, split)](
        TensorDescriptor.from_tensor(q, [tile.bm, bk]), scale, TensorDescriptor.from_tensor(weights, [tile.bn, bk]),
        w.scales, _or(w.subscales, w.scales), _or(bias, y), _or(residual, y), y, partial, counters(q.device),
        m, w.rows, w.cols, 0 if residual is None else residual.stride(0), y.stride(0),
        GROUP=w.group, SUB=w.subscales is not None,
        BIAS=bias is not None, PAIRED=paired, RESIDUAL=residual is not None,
        BN=tile.bn, BM=tile.bm, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return y


def quantize_rows(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    m, k = x.shape
    stored = math.ceil(k / BLOCK) * BLOCK
    q = x.new_empty(m, stored, dtype=torch.int8)
    scale = x.new_empty(m, dtype=torch.float32)
    columns = triton.next_power_of_2(stored)
    quantize_rows_kernel[(m,)](
        x, _or(weight, x), q, scale, k, x.stride(0), eps,
        NORM=weight is not None, COLUMNS=columns, num_warps=min(16, max(1, columns // 1024)), enable_fp_fusion=False,
    )  # fmt: skip
    return q, scale


def dequantize(w: GpuMatrix, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(w.rows, w.cols, dtype=dtype, device=w.device)
    rows = 64
    dequantize_kernel[(math.ceil(w.rows / rows), w.blocks)](
        w.codes, _or(w.extra, w.codes), w.scales, _or(w.subscales, w.scales), _or(w.mins, w.scales),
        _or(w.submins, w.scales), out, w.rows, w.cols, out.stride(0),
        KIND=w.kind, ZERO=w.zero, GROUP=w.group, SUB=w.subscales is not None, MIN=w.mins is not None,
        BN=rows, NATIVE=not interpreted(), num_warps=4,
    )  # fmt: skip
    return out


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A pointer for an argument that the kernel does not read."""
    return other if tensor is None else tensor
