"""From the products for q, k and v to what attention reads: q and k norms, RoPE, K and V into the cache.

    qkv (T, (H + 2 KH) D): a token's query heads, then its K heads, then its V heads. Queries stay there,
    rotated; K and V go to keys and values (blocks, KH, block_size, D), at slots[t] = block * block_size +
    offset.  Grid: (tiles of all tokens' query heads, then K heads, then V heads,)

    norm (q and k, if the model has them): v / sqrt(mean(v^2) + eps) * weight, per head
    rope: element i < rotary / 2 turns with i + rotary / 2 by the angle of cos, sin (P, rotary / 2) fp32, a
    row for a position

In fp32, rounded once. An int8 cache has a scale per token and head (blocks, KH, block_size) fp32: scale =
max |v| / 127, code = round half even (v * (127 / max |v|)); a head that is not finite has scale NaN and codes
0, so that it stays visible, and one whose inverse would not be finite has scale 0. A negative slot writes
nothing: those of padding.

Cost: a program reads and writes 16 heads once; the partner of an element is a second read from the
first-level cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

ROWS = 16  # of a program: heads of tokens


@dataclass(frozen=True)
class LayerCache:
    """K and V of one layer: (blocks, KH, block_size, D), and for int8 the scales (blocks, KH, block_size)."""

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None
    value_scales: torch.Tensor | None


@triton.jit
def _normalized(at, partner_at, weight, d, partner, inside, D, eps, mask, NORM: tl.constexpr):
    """The heads' elements and those that they turn with, fp32 (ROWS, COLUMNS)."""
    v = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(partner_at, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        factor = 1.0 / tl.sqrt_rn(tl.sum(v * v, axis=1) / D + eps)
        v = v * factor[:, None] * tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        w = w * factor[:, None] * tl.load(weight + partner, mask=inside, other=0.0).to(tl.float32)[None, :]
    return v, w


@triton.jit
def _store(cache, scales, v, at, scale_at, mask, rows, INT8: tl.constexpr):
    if INT8:
        most = tl.max(tl.abs(v), axis=1)
        broken = tl.max(tl.where(tl.abs(v) < float("inf"), 0, 1), axis=1) > 0
        some = (most > 127 / 2**128) & (broken == 0)
        inverse = tl.where(some, tl.div_rn(127.0, tl.where(some, most, 1.0)), 0.0)
        scale = tl.where(some, tl.div_rn(most, 127.0), 0.0)
        tl.store(scales + scale_at, tl.where(broken, float("nan"), scale), mask=rows)
        v = tl.where(broken[:, None], 0.0, v)
        # 1.5 * 2^23: adding it rounds to an integer, to even where two are as near
        v = (v * inverse[:, None] + 12582912.0) - 12582912.0
    tl.store(cache + at, v.to(cache.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def prepare_heads_kernel(
    qkv, q_norm, k_norm, cos, sin, positions, slots, keys, values, key_scales, value_scales,
    T, H, KH, D, rotary, block_size, qkv_stride, eps,
    NORM: tl.constexpr, INT8: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS: the power of two from D on. Launched without contraction of products and sums."""
    tile = tl.program_id(0)
    q_tiles = tl.cdiv(T * H, ROWS)
    k_tiles = tl.cdiv(T * KH, ROWS)
    kind = tl.where(tile < q_tiles, 0, tl.where(tile < q_tiles + k_tiles, 1, 2))
    before = tl.where(kind == 0, 0, tl.where(kind == 1, q_tiles, q_tiles + k_tiles))
    heads = tl.where(kind == 0, H, KH)
    row = (tile - before) * ROWS + tl.arange(0, ROWS)
    head = row % heads
    rows = row < T * heads
    t = tl.where(rows, row // heads, 0)
    slot = tl.load(slots + t).to(tl.int64)
    rows = rows & (slot >= 0)

    d = tl.arange(0, COLUMNS)
    inside = d < D
    mask = rows[:, None] & inside[None, :]
    half = rotary // 2
    turns = d < rotary
    partner = tl.where(turns, tl.where(d < half, d + half, d - half), d)
    start = tl.where(kind == 0, 0, tl.where(kind == 1, H, H + KH))
    at = qkv + (t.to(tl.int64) * qkv_stride + (start + head) * D)[:, None]
    cache_row = (slot // block_size * KH + head) * block_size + slot % block_size
    cache_at = cache_row[:, None] * D + d[None, :]
    if kind == 2:
        v = tl.load(at + d[None, :], mask=mask, other=0.0).to(tl.float32)
        _store(values, value_scales, v, cache_at, cache_row, mask, rows, INT8)
    else:
        weight = q_norm
        if kind == 1:
            weight = k_norm
        v, w = _normalized(
            at + d[None, :], at + partner[None, :], weight, d, partner, inside, D, eps, mask, NORM
        )
        position = tl.load(positions + t).to(tl.int64)
        angle = position[:, None] * half + tl.where(d < half, d, d - half)[None, :]
        turned = rows[:, None] & turns[None, :]
        c = tl.load(cos + angle, mask=turned, other=1.0)
        s = tl.load(sin + angle, mask=turned, other=0.0)
        v = v * c + w * tl.where(d < half, -1.0, 1.0)[None, :] * s
        if kind == 0:
            tl.debug_barrier()  # all partners are read before the first is overwritten
            tl.store(at + d[None, :], v.to(qkv.dtype.element_ty), mask=mask)
        else:
            _store(keys, key_scales, v, cache_at, cache_row, mask, rows, INT8)


def prepare_heads(
    qkv: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None,
    cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, cache: LayerCache,
    eps: float, heads: int,
) -> None:  # fmt: skip
    """Rotates the queries in qkv (T, (heads + 2 KH) D) in place and writes K and V; arguments are checked."""
    _, kv_heads, block_size, d = cache.keys.shape
    tokens = qkv.shape[0]
    tiles = triton.cdiv(tokens * heads, ROWS) + 2 * triton.cdiv(tokens * kv_heads, ROWS)
    prepare_heads_kernel[(tiles,)](
        qkv, qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, cos, sin,
        positions, slots, cache.keys, cache.values,
        cos if cache.key_scales is None else cache.key_scales,
        cos if cache.value_scales is None else cache.value_scales,
        tokens, heads, kv_heads, d, 2 * cos.shape[1], block_size, qkv.stride(0), eps,
        NORM=q_norm is not None, INT8=cache.key_scales is not None,
        ROWS=ROWS, COLUMNS=triton.next_power_of_2(d), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
