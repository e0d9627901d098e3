"""y = epilogue(x w^T): activations in fp16 or bf16, weights in 4 to 8 bits, sums in fp32.

    x (M, K), w (N, K) as in `layout.py`, y (M, N).  Grid: (tiles of N x tiles of M, parts of K)

A program computes a BN x BM tile of y^T: the weights are the left operand. They go from memory to shared
memory as they are stored, from there to registers in the order that the tensor core wants (ldmatrix), become
numbers in place (`unpack.py`) and are multiplied from registers: dequantized weights never pass through
shared memory, and a small M does not waste the 64 rows that wgmma has on its left (below 16 it is mma.sync,
with 8 columns).

Where a scale stands for a whole block of 128 columns, and the sums leave registers for it, the block's
products are added up first and multiplied by it in fp32: exact weights, and one multiplication for each
output instead of each weight. Other scales are applied to the weights. Where N x M has too few tiles for the
machine, K is split (`epilogue.gather_parts`). The epilogue, in this order: the scale of a row (where a row
has one, and no minimum), then `epilogue.finish`.

Cost on sm_90 of a block for a warp of the 128 x 16 tile (4 warps: 128 weights a thread), as compiled: 4
ldmatrix, 66 LOP3, 48 shifts, 64 HADD2, 16 wgmma, 16 FFMA, 6 asynchronous copies; about 310 instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastllm.kernels.epilogue import finish, gather_parts
from fastllm.kernels.unpack import load_codes, load_groups, spread_groups, unpack_codes


@triton.jit(do_not_specialize=["M"])
def weight_only_kernel(
    x, x_tiles, codes, code_tiles, extra, scales, subscales, mins, submins, bias, residual, y, partial,
    counters, M, N, K, x_stride, residual_stride, y_stride,
    KIND: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, SUB: tl.constexpr, MIN: tl.constexpr,
    BIAS: tl.constexpr, PAIRED: tl.constexpr, RESIDUAL: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr, AFTER: tl.constexpr, EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr, OVERLAP: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """x_tiles, code_tiles: x and codes as tensor descriptors, read in their place with DESCRIPTORS.

    AFTER: the scale of a block is applied to its sums. OVERLAP: start while the kernel before still runs
    (sm_90).
    """
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

    blocks = tl.cdiv(K, 128)
    begin = blocks * part // parts
    end = blocks * (part + 1) // parts
    tl.assume(begin < end)  # without the case of no iteration ptxas keeps several wgmma in flight
    if IN_LOOP:
        scale, subscale = load_groups(scales, subscales, rows, begin, N, GROUP, SUB)
        if MIN:
            low, sublow = load_groups(mins, submins, rows, begin, N, GROUP, SUB)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()  # what follows reads and writes what other kernels wrote and read; weights do not change
    acc = tl.zeros((BN, BM), tl.float32)
    for b in tl.range(begin, end, num_stages=STAGES):
        if DESCRIPTORS:
            words = code_tiles.load([b * N + n0, 0])
            high = words
            shift = tl.full((1, 1), 0, tl.int16)
            xt = x_tiles.load([m0, b * 128]).T
        else:
            words, high, shift = load_codes(codes, extra, rows, b, N, KIND)
            mask = (m < M)[None, :]
            if not EVEN_K:
                mask = mask & (b * 128 + k < K)[:, None]
            x_at = x + m[None, :].to(tl.int64) * x_stride + (b * 128 + k)[:, None]
            xt = tl.load(x_at, mask=mask, other=0.0)
        w = unpack_codes(words, high, shift, BN, KIND, ZERO, T, NATIVE)
        # The next block's scales are asked for as soon as this one's are used: into the same registers, since
        # a copy would wait for them.
        ahead = tl.minimum(b + 1, end - 1)
        if IN_LOOP and not AFTER:
            w = w * spread_groups(scale, subscale, BN, GROUP, SUB, T)
            scale, subscale = load_groups(scales, subscales, rows, ahead, N, GROUP, SUB)
            if MIN:
                w = w + spread_groups(low, sublow, BN, GROUP, SUB, T)
                low, sublow = load_groups(mins, submins, rows, ahead, N, GROUP, SUB)
        if AFTER:
            acc += tl.dot(w, xt, input_precision="ieee") * scale.to(tl.float32)
            scale, subscale = load_groups(scales, subscales, rows, ahead, N, GROUP, SUB)
        else:
            acc = tl.dot(w, xt, acc, input_precision="ieee")

    acc, last = gather_parts(acc, partial, counters, BN, BM)
    if last:
        if not IN_LOOP:
            acc *= tl.load(scales + rows).to(tl.float32)[:, None]
        finish(acc, bias, residual, y, n0, m, M, N, residual_stride, y_stride, BIAS, PAIRED, RESIDUAL, BN, BM)
