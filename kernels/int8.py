"""y = epilogue(x w^T): both in int8, products and sums exact in int32 until a scale applies.

    x int8 (M, 128 B) with x_scale fp32 (M,), both from `quantize.py`; w i8 of `layout.py`, seen as int8 (B N,
    128); y (M, N).  Grid: (tiles of N x tiles of M, parts of K)

A program computes a BN x BM tile of y^T, so that one kernel serves every M: weights are the left operand of
the tensor cores' integer multiplication. On sm_90 both operands reach shared memory by tensor descriptors
(the copy engine). Where a row of weights has one scale the tile stays in int32 to the end; with a scale per
32, 64 or 128 columns the int32 products of a group are multiplied by it and added in fp32, in ascending k.

Tiles run in bands of 8 tiles of N, so that programs that run together share what they read. Split-K and the
epilogue are those of `weight_only.py`; the scale of a row of x comes first of all.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastllm.kernels.epilogue import finish, gather_parts


@triton.jit(do_not_specialize=["M"])
def int8_kernel(
    x, x_tiles, x_scale, w, w_tiles, scales, subscales, bias, residual, y, partial, counters,
    M, N, K, residual_stride, y_stride,
    GROUP: tl.constexpr, SUB: tl.constexpr,
    BIAS: tl.constexpr, PAIRED: tl.constexpr, RESIDUAL: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """x_tiles, w_tiles: x and w as descriptors, for DESCRIPTORS. OVERLAP: see weight_only.py."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    m_tiles = tl.cdiv(M, BM)
    n_tiles = tl.cdiv(N, BN)
    band = tile // (8 * m_tiles)
    width = tl.minimum(n_tiles - band * 8, 8)
    within = tile - band * 8 * m_tiles
    n0 = (band * 8 + within % width) * BN
    m0 = within // width * BM
    rows = tl.minimum(n0 + tl.arange(0, BN), N - 1)
    m = m0 + tl.arange(0, BM)

    BK: tl.constexpr = GROUP if GROUP else 128
    STEPS: tl.constexpr = 128 // BK  # of a block
    k = tl.arange(0, BK)
    blocks = tl.cdiv(K, 128)
    begin = blocks * part // parts * STEPS
    end = blocks * (part + 1) // parts * STEPS
    tl.assume(begin < end)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    acc = tl.zeros((BN, BM), tl.float32 if GROUP else tl.int32)
    for step in tl.range(begin, end, num_stages=STAGES):
        b = step // STEPS
        at = step % STEPS * BK
        if DESCRIPTORS:
            wt = w_tiles.load([b * N + n0, at])
            xt = x_tiles.load([m0, b * 128 + at]).T
        else:
            wt = tl.load(w + (tl.cast(b, tl.int64) * N + rows)[:, None] * 128 + (at + k)[None, :])
            x_at = x + m[None, :].to(tl.int64) * (blocks * 128) + (b * 128 + at + k)[:, None]
            xt = tl.load(x_at, mask=(m < M)[None, :], other=0)
        if GROUP:
            scale = tl.load(scales + rows + (b // 2 if SUB else step) * N).to(tl.float32)
            if SUB:
                scale *= tl.load(subscales + rows + step * N).to(tl.float32)
            acc += tl.dot(wt, xt, out_dtype=tl.int32).to(tl.float32) * scale[:, None]
        else:
            acc = tl.dot(wt, xt, acc, out_dtype=tl.int32)

    acc, last = gather_parts(acc, partial, counters, BN, BM)
    if last:
        out = acc.to(tl.float32) * tl.load(x_scale + m, mask=m < M, other=0.0)[None, :]
        if not GROUP:
            out *= tl.load(scales + rows).to(tl.float32)[:, None]
        finish(out, bias, residual, y, n0, m, M, N, residual_stride, y_stride, BIAS, PAIRED, RESIDUAL, BN, BM)
