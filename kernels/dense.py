"""y = epilogue(x w^T) with plain weights, sums in fp32: where the vendor's library does not do.

    x (M, K), w (N, K) fp16, bf16 or fp32; y (M, N) likewise, or fp32.
    Grid: (tiles of N x tiles of M, parts of K)

For the head, whose logits must not be rounded to the activations' type, and for products whose rows must not
depend on their number (`deterministic`): the library chooses another algorithm for another M. A program
computes a BN x BM tile of y^T as in `weight_only.py`, and split-K and epilogue are its own; K goes by 64.

Cost: with few rows it reads the weights once, which is all of its time; with many it is behind the library,
which other products go to.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastllm.kernels.epilogue import finish, gather_parts
from fastllm.kernels.products import DETERMINISTIC, Grid, row_slices
from fastllm.kernels.tiles import Tile

STEP = 64  # of K
_FEW = Tile(bn=64, bm=16, warps=4, stages=4, programs=2, descriptors=0)
_SOME = Tile(bn=128, bm=64, warps=4, stages=3, programs=1, descriptors=0)
_MANY = Tile(bn=128, bm=128, warps=8, stages=3, programs=1, descriptors=0)
# Four bytes for a number: half the tile.
_FEW_FP32 = Tile(bn=64, bm=16, warps=4, stages=3, programs=2, descriptors=0)
_MANY_FP32 = Tile(bn=64, bm=32, warps=4, stages=2, programs=1, descriptors=0)


def tile_for(m: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return _FEW_FP32 if m <= 16 else _MANY_FP32
    return _FEW if m <= 16 else _SOME if m <= 64 else _MANY


@triton.jit(do_not_specialize=["M"])
def dense_kernel(
    x, w, bias, residual, y, partial, counters, M, N, K, x_stride, w_stride, residual_stride, y_stride,
    BIAS: tl.constexpr, PAIRED: tl.constexpr, RESIDUAL: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    m_tiles = tl.cdiv(M, BM)
    n0 = tile // m_tiles * BN  # tiles that share weights run side by side
    m0 = tile % m_tiles * BM
    m = m0 + tl.arange(0, BM)
    rows = tl.minimum(n0 + tl.arange(0, BN), N - 1).to(tl.int64)
    tokens = tl.minimum(m, M - 1).to(tl.int64)
    k = tl.arange(0, STEP)
    steps = tl.cdiv(K, STEP)
    begin = steps * part // parts
    end = steps * (part + 1) // parts
    tl.assume(begin < end)
    w_at = w + rows[:, None] * w_stride + k[None, :]
    x_at = x + tokens[None, :] * x_stride + k[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        if EVEN_K:
            wt = tl.load(w_at + step * STEP)
            xt = tl.load(x_at + step * STEP)
        else:
            inside = step * STEP + k < K
            wt = tl.load(w_at + step * STEP, mask=inside[None, :], other=0.0)
            xt = tl.load(x_at + step * STEP, mask=inside[:, None], other=0.0)
        acc = tl.dot(wt, xt, acc, input_precision="ieee")
    acc, last = gather_parts(acc, partial, counters, BN, BM)
    if last:
        finish(acc, bias, residual, y, n0, m, M, N, residual_stride, y_stride, BIAS, PAIRED, RESIDUAL, BN, BM)


def _launch(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None,
    y: torch.Tensor, paired: bool, tile: Tile, pinned: bool,
) -> None:  # fmt: skip
    m, k = x.shape
    n = w.shape[0]
    grid = Grid(x, m, n, math.ceil(k / STEP), tile, torch.float32, pinned)
    dense_kernel[(grid.tiles, grid.parts)](
        x, w, y if bias is None else bias, y if residual is None else residual, y,
        grid.partial, grid.counters, m, n, k,
        x.stride(0), w.stride(0), 0 if residual is None else residual.stride(0), y.stride(0),
        BIAS=bias is not None, PAIRED=paired, RESIDUAL=residual is not None,
        BN=tile.bn, BM=tile.bm, STEP=STEP, STAGES=tile.stages, EVEN_K=k % STEP == 0,
        num_warps=tile.warps, enable_fp_fusion=True,
    )  # fmt: skip


def dense(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
    *, paired: bool = False, deterministic: bool = False, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The product, whose arguments are checked; in `out`, of any dtype, if given."""
    m, n = x.shape[0], w.shape[0]
    y = x.new_empty(m, n // 2 if paired else n) if out is None else out
    if not deterministic:
        _launch(x, w, bias, residual, y, paired, tile_for(m, x.dtype), False)
        return y
    tile = tile_for(DETERMINISTIC, x.dtype)
    for rows in row_slices(m, n, tile):
        added = None if residual is None else residual[rows]
        _launch(x[rows], w, bias, added, y[rows], paired, tile, True)
    return y
