"""Rows of an embedding, packed or not: the first kernel of a step.

x[t] = embed[id] * scale (+ position_embed[position]), in fp32, rounded once.  Grid: (T, blocks of 128)

token_ids (T,) int32: an id, or -1 - r: the token that row r of the step before has sampled, which lies
in `sampled` (R,) on the GPU. A row that sampled nothing (-1) counts as token 0.
embed: a matrix of `layout.py`, (V, K), or plain (V, K); position_embed (P, K); x (T, K)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastllm.kernels import products
from fastllm.kernels.layout import BLOCK, GpuMatrix
from fastllm.kernels.unpack import load_codes, load_groups, spread_groups, unpack_codes


@triton.jit
def token_of(token_ids, sampled, t):
    """The id of token t of the step."""
    token = tl.load(token_ids + t)
    if token < 0:
        token = tl.maximum(tl.load(sampled - 1 - token), 0)
    return token


@triton.jit
def embedding_kernel(
    token_ids, sampled, positions, codes, extra, scales, subscales, mins, submins, position_embed, x,
    N, K, x_stride, scale,
    KIND: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, SUB: tl.constexpr, MIN: tl.constexpr,
    POSITIONS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """KIND "": codes is the plain matrix."""
    t = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1)
    token = token_of(token_ids, sampled, t)
    k = b * 128 + tl.arange(0, 128)
    if KIND == "":
        v = tl.load(codes + token.to(tl.int64) * K + k, mask=k < K, other=0.0).to(tl.float32)
    else:
        # Unpacking works on tiles of rows: one row, twice.
        rows = token + tl.zeros((2,), tl.int32)
        T: tl.constexpr = tl.float32
        words, high, shift = load_codes(codes, extra, rows, b, N, KIND)
        value = unpack_codes(words, high, shift, 2, KIND, ZERO, T, NATIVE)
        group_scale, subscale = load_groups(scales, subscales, rows, b, N, GROUP, SUB)
        value = value * spread_groups(group_scale, subscale, 2, GROUP, SUB, T)
        if MIN:
            low, sublow = load_groups(mins, submins, rows, b, N, GROUP, SUB)
            value = value + spread_groups(low, sublow, 2, GROUP, SUB, T)
        v = tl.max(value, axis=0)
    v = v * scale
    if POSITIONS:
        place = tl.load(positions + t).to(tl.int64)
        v += tl.load(position_embed + place * K + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(x + t * x_stride + k, v.to(x.dtype.element_ty), mask=k < K)


def embedding(
    token_ids: torch.Tensor, sampled: torch.Tensor, positions: torch.Tensor,
    embed: GpuMatrix | torch.Tensor, position_embed: torch.Tensor | None, scale: float, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """x (T, K) in `dtype`; arguments are checked."""
    rows = token_ids.shape[0]
    if isinstance(embed, torch.Tensor):
        n, k = embed.shape
        planes: tuple[torch.Tensor, ...] = (embed,) * 6
        layout = {"KIND": "", "ZERO": 0, "GROUP": 0, "SUB": False, "MIN": False}
    else:
        n, k = embed.rows, embed.cols
        planes = products.planes(embed)
        layout = products.layout(embed)
    x = torch.empty(rows, k, dtype=dtype, device=token_ids.device)
    embedding_kernel[(rows, triton.cdiv(k, BLOCK))](
        token_ids, sampled, positions, *planes, x if position_embed is None else position_embed, x,
        n, k, x.stride(0), scale,
        **layout, POSITIONS=position_embed is not None, NATIVE=not products.INTERPRETED, num_warps=1,
    )  # fmt: skip
    return x
