"""Products with packed weights: which kernel, which tile, and the launch."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from fastllm.kernels.dequantize import dequantize_kernel
from fastllm.kernels.int8 import int8_kernel
from fastllm.kernels.layout import BLOCK, GpuMatrix
from fastllm.kernels.quantize import quantize_rows_kernel
from fastllm.kernels.tiles import Table, Tile, table
from fastllm.kernels.weight_only import weight_only_kernel

COUNTERS = 1 << 16  # tiles of N x M that a split product may have
PARTS = 64  # of K, at most
DETERMINISTIC = 64  # the M whose tile every product takes, whatever its M, where a row must not depend on it
PINNED_ROWS = 1024  # that such a product takes at once
# Whether Triton interprets the kernels on the CPU (TRITON_INTERPRET=1), decided as they are imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@cache
def architecture(device: torch.device) -> str:
    """sm_80, sm_90, ...; the interpreter takes sm_90's tiles."""
    if device.type != "cuda":
        return "sm_90"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter runs one program after another; a few, so that tests see K split
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def tiles_of(device: torch.device) -> Table:
    return table(architecture(device))


# Zeros, int32 (COUNTERS,), that every kernel leaves as it found them: a tensor for each stream, and one for
# all graphs of a device, which so have to be replayed one after another.
_counters: dict[tuple[torch.device, int | str], torch.Tensor] = {}
_GRAPHS = "graphs"


def _stream(device: torch.device) -> int | str:
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        return _GRAPHS
    return torch.cuda.current_stream(device).cuda_stream


def _zeros(device: torch.device) -> torch.Tensor:
    stream = _stream(device)
    known = _counters.get((device, stream))
    if known is not None:
        return known
    zeros = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    if stream != _GRAPHS:  # memory taken during a capture is the graph's, and filled in every replay
        _counters[device, stream] = zeros
        _counters.setdefault((device, _GRAPHS), torch.zeros_like(zeros))
    return zeros


class Grid:
    """The programs of a product of m rows and n outputs, with K in `blocks`, and its scratch memory."""

    def __init__(
        self, like: torch.Tensor, m: int, n: int, blocks: int, tile: Tile, sums: torch.dtype, pinned: bool
    ) -> None:
        n_tiles = math.ceil(n / tile.bn)
        self.tiles = n_tiles * math.ceil(m / tile.bm)
        # Pinned, the parts of K follow from the matrix alone: a row's sums must not depend on M.
        tiles = n_tiles if pinned else self.tiles
        wanted = multiprocessors(like.device) * tile.programs // tiles
        self.parts = max(1, min(wanted, blocks, PARTS)) if tiles <= COUNTERS else 1
        size = self.parts * self.tiles * tile.bn * tile.bm if self.parts > 1 else 1
        self.partial = like.new_empty(size, dtype=sums)
        self.counters = _zeros(like.device)


def row_slices(m: int, n: int, tile: Tile) -> list[slice]:
    """All rows, in runs for which there are counters enough, and of which the sums take little memory."""
    most = max(1, min(COUNTERS // math.ceil(n / tile.bn), PINNED_ROWS // tile.bm)) * tile.bm
    return [slice(first, first + most) for first in range(0, m, most)]


def _overlaps(device: torch.device) -> bool:
    """Whether a kernel may start while the one before still runs (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _describable(x: torch.Tensor) -> bool:
    """Whether the copy engine can read the matrix: rows and base at multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A pointer for an argument that the kernel does not read."""
    return other if tensor is None else tensor


def planes(w: GpuMatrix) -> tuple[torch.Tensor, ...]:
    """The tensors of a matrix, as its kernels take them."""
    return (
        w.codes, _or(w.extra, w.codes), w.scales, _or(w.subscales, w.scales), _or(w.mins, w.scales),
        _or(w.submins, w.scales),
    )  # fmt: skip


def layout(w: GpuMatrix) -> dict[str, Any]:
    """What its kernels are compiled for."""
    return {
        "KIND": w.kind,
        "ZERO": w.zero,
        "GROUP": w.group,
        "SUB": w.subscales is not None,
        "MIN": w.mins is not None,
    }


def weight_only(
    x: torch.Tensor, w: GpuMatrix, bias: torch.Tensor | None, residual: torch.Tensor | None, paired: bool,
    tile: Tile, pinned: bool = False, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The product by weight_only.py, whose arguments are checked; in `out`, of any dtype, if given."""
    m = x.shape[0]
    y = x.new_empty(m, w.rows // 2 if paired else w.rows) if out is None else out
    grid = Grid(x, m, w.rows, w.blocks, tile, torch.float32, pinned)
    x_tiles, code_tiles = x, w.codes
    descriptors = bool(tile.descriptors) and w.extra is None and _describable(x)
    if descriptors:
        words = w.codes.shape[2]
        x_tiles = TensorDescriptor.from_tensor(x, [tile.bm, BLOCK])
        code_tiles = TensorDescriptor.from_tensor(w.codes.view(-1, words), [tile.bn, words])
    overlap = _overlaps(x.device)
    weight_only_kernel[(grid.tiles, grid.parts)](
        x, x_tiles, w.codes, code_tiles, *planes(w)[1:], _or(bias, y), _or(residual, y), y,
        grid.partial, grid.counters, m, w.rows, w.cols,
        x.stride(0), 0 if residual is None else residual.stride(0), y.stride(0),
        **layout(w), BIAS=bias is not None, PAIRED=paired, RESIDUAL=residual is not None,
        BN=tile.bn, BM=tile.bm, STAGES=tile.stages, AFTER=w.plain and tile.scales_sums,
        EVEN_K=w.cols % BLOCK == 0, DESCRIPTORS=descriptors, OVERLAP=overlap, NATIVE=not INTERPRETED,
        num_warps=tile.warps, launch_pdl=overlap, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def int8(
    q: torch.Tensor, scale: torch.Tensor, w: GpuMatrix,
    bias: torch.Tensor | None, residual: torch.Tensor | None,
    paired: bool, dtype: torch.dtype, tile: Tile, pinned: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The product by int8.py, whose arguments are checked."""
    m = q.shape[0]
    y = q.new_empty(m, w.rows // 2 if paired else w.rows, dtype=dtype)
    grid = Grid(q, m, w.rows, w.blocks, tile, torch.float32 if w.group else torch.int32, pinned)
    weights = w.codes.view(torch.int8).view(w.blocks * w.rows, BLOCK)
    x_tiles, w_tiles = q, weights
    descriptors = bool(tile.descriptors) and _describable(q)
    if descriptors:
        columns = w.group or BLOCK
        x_tiles = TensorDescriptor.from_tensor(q, [tile.bm, columns])
        w_tiles = TensorDescriptor.from_tensor(weights, [tile.bn, columns])
    overlap = _overlaps(q.device)
    int8_kernel[(grid.tiles, grid.parts)](
        q, x_tiles, scale, weights, w_tiles, w.scales, _or(w.subscales, w.scales),
        _or(bias, y), _or(residual, y), y, grid.partial, grid.counters, m, w.rows, w.cols,
        0 if residual is None else residual.stride(0), y.stride(0),
        GROUP=w.group, SUB=w.subscales is not None,
        BIAS=bias is not None, PAIRED=paired, RESIDUAL=residual is not None,
        BN=tile.bn, BM=tile.bm, STAGES=tile.stages, DESCRIPTORS=descriptors, OVERLAP=overlap,
        num_warps=tile.warps, launch_pdl=overlap, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def quantize_rows(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel of quantize.py, whose arguments are checked."""
    m, k = x.shape
    stored = math.ceil(k / BLOCK) * BLOCK
    q = x.new_empty(m, stored, dtype=torch.int8)
    scale = x.new_empty(m, dtype=torch.float32)
    columns = triton.next_power_of_2(stored)
    quantize_rows_kernel[(m,)](
        x, _or(weight, x), q, scale, k, x.stride(0), eps,
        NORM=weight is not None, COLUMNS=columns, num_warps=min(16, max(1, columns // 1024)),
        enable_fp_fusion=False,
    )  # fmt: skip
    return q, scale


def dequantize(w: GpuMatrix, dtype: torch.dtype) -> torch.Tensor:
    """The kernel of dequantize.py."""
    out = torch.empty(w.rows, w.cols, dtype=dtype, device=w.device)
    rows = 64
    dequantize_kernel[(math.ceil(w.rows / rows), w.blocks)](
        *planes(w), out, w.rows, w.cols, out.stride(0),
        **layout(w), BN=rows, NATIVE=not INTERPRETED, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def dequantized_product(
    x: torch.Tensor, w: GpuMatrix, bias: torch.Tensor | None, residual: torch.Tensor | None, paired: bool
) -> torch.Tensor:
    """By the vendor's library: with many rows the weights' conversion is a small part of the work."""
    y = torch.nn.functional.linear(x, dequantize(w, x.dtype), bias)
    if paired:
        y = torch.nn.functional.silu(y[:, 0::2]) * y[:, 1::2]
    return y if residual is None else y + residual


def choose_weight_only(
    x: torch.Tensor, w: GpuMatrix, bias: torch.Tensor | None, residual: torch.Tensor | None, paired: bool,
    deterministic: bool, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The product by the path that the table names for M; by one path for all M if deterministic.

    With an `out` of its own, whose dtype may be another than x's, a product never goes to the vendor's
    library.
    """
    m = x.shape[0]
    choices = tiles_of(x.device)
    if not deterministic:
        if m >= choices.dequantize_from and out is None:
            return dequantized_product(x, w, bias, residual, paired)
        return weight_only(x, w, bias, residual, paired, choices.tile(w.tile_kind, m), out=out)
    tile = choices.tile(w.tile_kind, DETERMINISTIC)
    y = x.new_empty(m, w.rows // 2 if paired else w.rows) if out is None else out
    for rows in row_slices(m, w.rows, tile):
        added = None if residual is None else residual[rows]
        weight_only(x[rows], w, bias, added, paired, tile, True, y[rows])
    return y


def choose_int8(
    q: torch.Tensor, scale: torch.Tensor, w: GpuMatrix,
    bias: torch.Tensor | None, residual: torch.Tensor | None,
    paired: bool, dtype: torch.dtype, deterministic: bool,
) -> torch.Tensor:  # fmt: skip
    """The product with the table's tile for M; with one tile for all M if deterministic."""
    choices = tiles_of(q.device)
    if not deterministic:
        return int8(q, scale, w, bias, residual, paired, dtype, choices.tile("int8", q.shape[0]))
    tile = choices.tile("int8", DETERMINISTIC)
    parts = []
    for rows in row_slices(q.shape[0], w.rows, tile):
        added = None if residual is None else residual[rows]
        parts.append(int8(q[rows], scale[rows], w, bias, added, paired, dtype, tile, pinned=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
