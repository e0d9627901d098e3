"""Adapters (LoRA): y += scale * (x A^T) B^T for the tokens of a step that have one.

    shrink   low[t] = scale * x[t] A^T                Grid: (tiles of T, tiles of R)
    expand   y[t] += low[t] B^T                       Grid: (tiles of T, tiles of N)

    adapter (T,) int32: the token's adapter, -1 for none. a (adapters, R, K), b (adapters, N, R), in x's
    dtype, R a power of two from 16 on that holds all ranks: the rest of a smaller one is 0. scales
    (adapters,) fp32; low (T, R) fp32, rounded to x's dtype for the second product; y (T, N), rows of any
    stride.

An index past a's last is that of an adapter without this projection.

A tile of tokens takes the adapters that it has in turn, ascending, with the others' rows as zeros: sequences
stand in runs, so that is one adapter in most tiles, and a decode of many adapters reads each once. Tokens
without one are not touched. What a token gets depends on itself and its adapter alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TOKENS = 16  # of a program
RANKS = 64  # of R, at a time
COLUMNS = 128  # of K or N, at a time


@triton.jit(do_not_specialize=["T"])
def shrink_kernel(
    x, adapter, a, scales, low, T, K, adapters, x_stride,
    R: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = t < T
    own = tl.load(adapter + t, mask=inside, other=-1)
    own = tl.where(own < adapters, own, -1)
    r = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    k = tl.arange(0, COLUMNS)
    rows = t.to(tl.int64)
    none: tl.constexpr = 1 << 30
    now = tl.min(tl.where(own >= 0, own, none))
    while now < none:
        has = own == now
        acc = tl.zeros((TOKENS, RANKS), tl.float32)
        a_row = a + (now.to(tl.int64) * R + r)[None, :] * K
        for first in range(0, K, COLUMNS):
            columns = first + k
            xs = tl.load(
                x + rows[:, None] * x_stride + columns[None, :],
                mask=has[:, None] & (columns < K)[None, :], other=0.0,
            )  # fmt: skip
            weights = tl.load(a_row + columns[:, None], mask=(columns < K)[:, None], other=0.0)
            acc = tl.dot(xs, weights, acc, input_precision="ieee")
        acc *= tl.load(scales + now)
        tl.store(low + rows[:, None] * R + r[None, :], acc, mask=has[:, None])
        now = tl.min(tl.where(own > now, own, none))


@triton.jit(do_not_specialize=["T"])
def expand_kernel(
    low, adapter, b, y, T, N, adapters, y_stride, R: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = t < T
    own = tl.load(adapter + t, mask=inside, other=-1)
    own = tl.where(own < adapters, own, -1)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANKS)
    rows = t.to(tl.int64)
    none: tl.constexpr = 1 << 30
    now = tl.min(tl.where(own >= 0, own, none))
    while now < none:
        has = own == now
        added = tl.zeros((TOKENS, COLUMNS), tl.float32)
        b_row = b + (now.to(tl.int64) * N + n)[None, :] * R
        for first in range(0, R, RANKS):
            xs = tl.load(low + rows[:, None] * R + (first + r)[None, :], mask=has[:, None], other=0.0)
            weights = tl.load(b_row + (first + r)[:, None], mask=(n < N)[None, :], other=0.0)
            added = tl.dot(xs.to(weights.dtype), weights, added, input_precision="ieee")
        at = y + rows[:, None] * y_stride + n[None, :]
        mask = has[:, None] & (n < N)[None, :]
        total = tl.load(at, mask=mask, other=0.0).to(tl.float32) + added
        tl.store(at, total.to(y.dtype.element_ty), mask=mask)
        now = tl.min(tl.where(own > now, own, none))


def add_low_rank(
    x: torch.Tensor, adapter: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scales: torch.Tensor,
    y: torch.Tensor,
) -> None:  # fmt: skip
    """Adds to y (T, N), in place; arguments are checked."""
    tokens, k = x.shape
    count, n, r = b.shape
    tiles = triton.cdiv(tokens, TOKENS)
    low = torch.empty(tokens, r, dtype=torch.float32, device=x.device)
    ranks = min(r, RANKS)
    shrink_kernel[(tiles, r // ranks)](
        x, adapter, a, scales, low, tokens, k, count, x.stride(0),
        R=r, RANKS=ranks, TOKENS=TOKENS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    expand_kernel[(tiles, triton.cdiv(n, COLUMNS))](
        low, adapter, b, y, tokens, n, count, y.stride(0),
        R=r, RANKS=ranks, TOKENS=TOKENS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
