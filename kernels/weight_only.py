"""y = epilogue(x w^T): activations in fp16 or bf16, weights in 4 to 8 bits, sums in fp32.

    x (M, K), w (N, K) as in `layout.py`, y (M, N).  Grid: (tiles of N x tiles of M, parts of K).

A program computes a BN x BM tile of y^T: the weights are the left operand. They go from memory to shared memory as
they are stored, from there to registers in the order that the tensor core wants (ldmatrix), become numbers in place
(`unpack.py`) and are multiplied from registers: dequantized weights never pass through shared memory, and a small M
does not waste the 64 rows that wgmma has on its left. The multiplication of one block runs while the next block's
weights are unpacked (Triton keeps the wgmma of an iteration in flight).

Where N x M has too few tiles for the machine, K is split (`epilogue.gather_parts`). The epilogue, in this order: the
scale of a row (where a row has one and no minimum), then `epilogue.finish`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastllm.kernels.epilogue import finish, gather_parts
from fastllm.kernels.unpack import load_codes, load_groups, spread_groups, unpack_codes


@triton.jit(do_not_specialize=["M"])
def weight_only_kernel(
    x, codes, extra, scales, subscales, mins, submins, bias, residual, y, partial, counters,
    M, N, K, x_stride, residual_stride, y_stride,
    KIND: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, SUB: tl.constexpr, MIN: tl.constexpr,
    BIAS: tl.constexpr, PAIRED: tl.constexpr, RESIDUAL: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr, CHAIN: tl.constexpr, EVEN_K: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    m_tiles = tl.cdiv(M, BM)
    n0 = tile // m_tiles * BN  # tiles that share weights run side by side
    m0 = tile % m_tiles * BM
    rows = tl.minimum(n0 + tl.arange(0, BN), N - 1)
    m = m0 + tl.arange(0, BM)
    k = tl.arange(0, 128)
    T: tl.constexpr = x.dtype.element_ty
    IN_LOOP: tl.constexpr = GROUP != 0 or MIN
    AFTER: tl.constexpr = GROUP == 128 and not SUB and not MIN and not CHAIN

    blocks = tl.cdiv(K, 128)
    begin = blocks * part // parts
    end = blocks * (part + 1) // parts
    tl.assume(begin < end)
    x_at = x + m[None, :].to(tl.int64) * x_stride + k[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    if IN_LOOP:  # scales are asked for one block ahead, for they do not go through shared memory
        scale, subscale = load_groups(scales, subscales, rows, begin, N, GROUP, SUB)
        if MIN:
            low, sublow = load_groups(mins, submins, rows, begin, N, GROUP, SUB)
    for b in tl.range(begin, end, num_stages=STAGES):
        words, high = load_codes(codes, extra, rows, b, N, KIND)
        mask = (m < M)[None, :]
        if not EVEN_K:
            mask = mask & (b * 128 + k < K)[:, None]
        xt = tl.load(x_at + b * 128, mask=mask, other=0.0)
        w = unpack_codes(words, high, BN, KIND, ZERO, T, NATIVE)
        if IN_LOOP:
            ahead = tl.minimum(b + 1, end - 1)
            next_scale, next_subscale = load_groups(scales, subscales, rows, ahead, N, GROUP, SUB)
            if not AFTER:
                w = w * spread_groups(scale, subscale, BN, GROUP, SUB, T)
            if MIN:
                next_low, next_sublow = load_groups(mins, submins, rows, ahead, N, GROUP, SUB)
                w = w + spread_groups(low, sublow, BN, GROUP, SUB, T)
                low = next_low
                sublow = next_sublow
        if CHAIN:
            acc = tl.dot(w, xt, acc, input_precision="ieee")
        elif AFTER:
            acc += tl.dot(w, xt, input_precision="ieee") * scale.to(tl.float32)
        else:
            acc += tl.dot(w, xt, input_precision="ieee")
        if IN_LOOP:
            scale = next_scale
            subscale = next_subscale

    acc, last = gather_parts(acc, partial, counters, BN, BM)
    if last:
        if not IN_LOOP:
            acc *= tl.load(scales + rows).to(tl.float32)[:, None]
        finish(acc, bias, residual, y, n0, m, M, N, residual_stride, y_stride, BIAS, PAIRED, RESIDUAL, BN, BM)
