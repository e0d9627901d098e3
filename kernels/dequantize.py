"""Packed weights as a plain matrix: what large products give to the vendor's library, and a check for people.

    w (N, K) = scale * (code - zero) + min in fp16, bf16 or fp32.  Grid: (tiles of N, blocks of K)

Numbers are made as in `unpack.py`, so a product with this matrix and one by `weight_only.py` multiply the
same weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastllm.kernels.unpack import load_codes, load_groups, spread_groups, unpack_codes


@triton.jit
def dequantize_kernel(
    codes, extra, scales, subscales, mins, submins, w,
    N, K, w_stride,
    KIND: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, SUB: tl.constexpr, MIN: tl.constexpr,
    BN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(n, N - 1)
    b = tl.program_id(1)
    T: tl.constexpr = w.dtype.element_ty
    words, high, shift = load_codes(codes, extra, rows, b, N, KIND)
    value = unpack_codes(words, high, shift, BN, KIND, ZERO, T, NATIVE)
    scale, subscale = load_groups(scales, subscales, rows, b, N, GROUP, SUB)
    value = value * spread_groups(scale, subscale, BN, GROUP, SUB, T)
    if MIN:
        low, sublow = load_groups(mins, submins, rows, b, N, GROUP, SUB)
        value = value + spread_groups(low, sublow, BN, GROUP, SUB, T)
    k = b * 128 + tl.arange(0, 128)
    tl.store(
        w + n[:, None].to(tl.int64) * w_stride + k[None, :], value, mask=(n < N)[:, None] & (k < K)[None, :]
    )
