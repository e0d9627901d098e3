"""y = epilogue(x w^T) for a few rows of x: reading the weights once, at the speed of memory, is all that counts.

    x (M, K) with M <= BM (8 or 16), w (N, K) as in `layout.py`, y (M, N).  Grid: (tiles of N, parts of K)

A program computes BN outputs of all rows, and its P warps share K: at each step every warp takes a block of its own,
and at the end their sums are added through shared memory, in one order. So a few outputs per program keep the machine
busy without a detour through memory for parts of sums, which costs more than 4 us; only where N is small too is K cut
between programs (`epilogue.gather_parts`).

To Triton this is a batch of P products: the batch is what it spreads over warps. Tensor cores multiply
(mma m16n8k16), since unpacking leaves the other units no time for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastllm.kernels.epilogue import finish, gather_parts
from fastllm.kernels.unpack import load_codes, load_groups, spread_groups, unpack_codes


@triton.jit(do_not_specialize=["M"])
def gemv_kernel(
    x, codes, extra, scales, subscales, mins, submins, bias, residual, y, partial, counters,
    M, N, K, x_stride, residual_stride, y_stride,
    KIND: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, SUB: tl.constexpr, MIN: tl.constexpr,
    BIAS: tl.constexpr, PAIRED: tl.constexpr, RESIDUAL: tl.constexpr,
    P: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr, EVEN_K: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    n0 = tile * BN
    lines = tl.arange(0, P * BN)  # a block of a row each
    rows = tl.minimum(n0 + lines % BN, N - 1)
    m = tl.arange(0, BM)
    k = tl.arange(0, 128)
    p = tl.arange(0, P)
    T: tl.constexpr = x.dtype.element_ty
    IN_LOOP: tl.constexpr = GROUP != 0 or MIN
    AFTER: tl.constexpr = GROUP == 128 and not SUB and not MIN

    blocks = tl.cdiv(K, 128)
    steps = tl.cdiv(blocks, P)
    begin = steps * part // parts
    end = steps * (part + 1) // parts
    tl.assume(begin < end)
    x_at = x + m[None, None, :].to(tl.int64) * x_stride + k[None, :, None]
    acc = tl.zeros((P, BN, BM), tl.float32)
    if IN_LOOP:
        b = tl.minimum(begin * P + lines // BN, blocks - 1)
        scale, subscale = load_groups(scales, subscales, rows, b, N, GROUP, SUB)
        if MIN:
            low, sublow = load_groups(mins, submins, rows, b, N, GROUP, SUB)
    for step in tl.range(begin, end, num_stages=STAGES):
        words, high = load_codes(codes, extra, rows, tl.minimum(step * P + lines // BN, blocks - 1), N, KIND)
        first = ((step * P + p) * 128)[:, None, None]
        mask = (m < M)[None, None, :] & (first + k[None, :, None] < (K if not EVEN_K else blocks * 128))
        xt = tl.load(x_at + first, mask=mask, other=0.0)
        w = unpack_codes(words, high, P * BN, KIND, ZERO, T, NATIVE)
        # the next scales as soon as these are used, into the same registers: see weight_only.py
        ahead = tl.minimum(tl.minimum(step + 1, end - 1) * P + lines // BN, blocks - 1)
        if IN_LOOP and not AFTER:
            w = w * spread_groups(scale, subscale, P * BN, GROUP, SUB, T)
            scale, subscale = load_groups(scales, subscales, rows, ahead, N, GROUP, SUB)
            if MIN:
                w = w + spread_groups(low, sublow, P * BN, GROUP, SUB, T)
                low, sublow = load_groups(mins, submins, rows, ahead, N, GROUP, SUB)
        w = w.reshape(P, BN, 128)
        if AFTER:
            acc += tl.dot(w, xt, input_precision="ieee") * scale.to(tl.float32).reshape(P, BN, 1)
            scale, subscale = load_groups(scales, subscales, rows, ahead, N, GROUP, SUB)
        else:
            acc = tl.dot(w, xt, acc, input_precision="ieee")

    total, last = gather_parts(tl.sum(acc, 0), partial, counters, BN, BM)
    if last:
        if not IN_LOOP:
            total *= tl.load(scales + tl.minimum(n0 + tl.arange(0, BN), N - 1)).to(tl.float32)[:, None]
        finish(total, bias, residual, y, n0, m, M, N, residual_stride, y_stride, BIAS, PAIRED, RESIDUAL, BN, BM)
