"""Activations to int8, a scale per row (token), with or without the RMSNorm that comes before.

    v = x, or x / sqrt(mean(x^2) + eps) * weight
    scale = max |v| / 127;  q = round half even (v * (127 / max |v|))

    x (M, K) fp16, bf16 or fp32; weight (K,); q int8 (M, 128 B), B = ceil(K / 128), scale fp32 (M,)
    Grid: (M,)

In fp32 throughout, as `fastllm.reference.integer.quantize_activations` has it for CPUs, with a row for a
group; a row of zeros has scale 0. The bytes of q are in the order of i8 in `layout.py`: column 32 j + 16 p +
c is byte 32 j + 2 c + p. Columns from K on are 0. A row is read once and stays in registers: K is at most
65536.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantize_rows_kernel(x, weight, q, scale, K, x_stride, eps, NORM: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS: the power of two from 128 B on. Launched without contraction of products and sums."""
    row = tl.program_id(0).to(tl.int64)
    stored = tl.cdiv(K, 128) * 128
    j = tl.arange(0, COLUMNS // 32)[:, None, None]
    p = tl.arange(0, 2)[None, :, None]
    c = tl.arange(0, 16)[None, None, :]
    k = j * 32 + p * 16 + c
    v = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    if NORM:
        mean = tl.sum(tl.reshape(v * v, (COLUMNS,))) / K
        v = v * (1.0 / tl.sqrt_rn(mean + eps)) * tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)
    most = tl.max(tl.reshape(tl.abs(v), (COLUMNS,)))
    some = most > 127 / 2**128  # a row too small for its inverse counts as zeros
    inverse = tl.where(some, tl.div_rn(127.0, tl.where(some, most, 1.0)), 0.0)
    tl.store(scale + row, tl.where(some, tl.div_rn(most, 127.0), 0.0))
    # 1.5 * 2^23: adding it rounds to an integer, to even where two are as near
    rounded = (v * inverse + 12582912.0) - 12582912.0
    bytes = rounded.to(tl.int8).permute(0, 2, 1).reshape(COLUMNS)
    at = tl.arange(0, COLUMNS)
    tl.store(q + row * stored + at, bytes, mask=at < stored)
