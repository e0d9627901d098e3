"""Attention of a step's queries over a paged KV cache, in one pass over the keys.

    out[t, h] = sum_p w_p V[p, g] / sum_p w_p,  w_p = exp(cap(scale * q[t, h] . K[p, g])),  g = h // group
    p: positions that query t sees, its own and those before, the last `window` of them if there is one
    cap(s) = softcap * tanh(s / softcap), if there is one

    q, out (T, H, D); K, V (blocks, KH, block_size, D) in q's dtype, or int8 with a scale for each token and
    head (blocks, KH, block_size).  Grid: (items, KH), an item and what makes the lists: attention_plan.py

A program multiplies a tile of rows (the queries of an item with all heads that share K and V) with tiles of
keys. Scores, weights and sums are fp32; the largest score so far is subtracted, and what was summed before is
scaled as it grows. K and V go by asynchronous copies, stages deep, into shared memory. Which blocks they are
in is asked for a tile ahead, into registers: a copy that had to wait for its block would not run ahead. Head
dims that are no power of two are padded in registers and shared memory; nothing is read for that.

"few": 16 rows on mma.sync, all tiles of keys masked (a second loop would begin with its own latency). With
operands swapped it is wgmma, which reads K and V as they lie, but frees a stage only when it is done: then
three stages take 104 kB instead of 72, one program less on a multiprocessor. "many": 128 rows on wgmma
(sm_90), the weights as its left operand from registers; tiles of keys that all rows see have a loop without
masks.

int8: codes become fp16 under an exponent (see unpack.py), K's in registers, V's by way of shared memory, and
are multiplied in fp16 whatever q is. K's scale is applied to scores, V's to weights; so that fp16 holds them,
q is divided by a power of two for each row, and weights are multiplied by 64.

Parts of a tile that was cut meet in `Scratch`; the last program adds them up (see epilogue.py). The same
batch gives the same bits from run to run.

Deterministic plans: the bits of a query's result depend on its q and on the K and V that it sees, neither on
the batch nor on how its prompt was cut, nor on whether its parts met in one program or in several. One kernel
visits all keys, in tiles that begin at multiples of their size, in parts that begin at multiples of
DETERMINISTIC_KEYS; rows do not meet within a multiplication; a key that a row does not see adds 0 and leaves
the largest score as it is, and so does a whole part of them; only what is written as one operation is fused.

Cost as compiled for sm_90, D = 128, of a tile of keys for a warp (nothing spills):

    few   16 x 64   bf16  423 instructions (32 HMMA, 28 LDSM, 16 asynchronous copies), 80 registers, 72 kB
    few   16 x 64   int8  585 (32 HMMA, 24 LDSM, 10 copies; 64 HADD2 and 70 LOP3 for codes), 96, 56 kB
    many 128 x 128  bf16  649 (16 HGMMA, 16 copies), 246, 229 kB
    many 128 x 64   int8  569 (12 HGMMA, 6 copies), 242, 83 kB
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastllm.errors import RequestError
from fastllm.kernels import products
from fastllm.kernels.attention_plan import (
    DETERMINISTIC_KEYS,
    FIELDS,
    AttentionPlan,
    Capacity,
    Tile,
    Tiles,
    capacity,
    needs,
    plan_attention,
)

__all__ = [
    "HEAD_DIM_MAX",
    "DeviceItems",
    "Scratch",
    "capacity",
    "launch_attention",
    "paged_attention",
    "plan_attention",
    "tiles",
    "to_device",
]

HEAD_DIM_MAX = 256
BLOCK_SIZES = (16, 32, 64)
_LOG2_E = math.log2(math.e)

_LOWEST = tl.constexpr(-1.0e30)  # below every score, and finite: a row that sees no key stays a number
_VALUE_FACTOR = tl.constexpr(64.0)  # lifts probability * scale of V out of fp16's subnormal numbers
_CODES_FP16 = tl.constexpr(  # two words of two signed bytes: the low bytes and the high ones as pairs of fp16
    "{ .reg .b32 a, z; mov.b32 z, 0x64806480;"
    " lop3.b32 $0, $2, 0x00FF00FF, z, 0x6A; sub.f16x2 $0, $0, z;"
    " shr.b32 a, $2, 8; lop3.b32 $1, a, 0x00FF00FF, z, 0x6A; sub.f16x2 $1, $1, z; }"
)


@triton.jit
def _numbers(
    x, T: tl.constexpr, INT8: tl.constexpr, HALVES: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """K or V (R, C) of type T. INT8: x has words of two codes (R, C / 2); with HALVES the even columns come
    first, then the odd ones, which spares the registers of the first product a permutation."""
    if INT8:
        if NATIVE and tl.float16 == T:
            even, odd = tl.inline_asm_elementwise(
                _CODES_FP16, "=&r,=&r,r", [x], (tl.float16, tl.float16), True, 2
            )
        else:
            even = x.to(tl.int8).to(T)
            odd = (x >> 8).to(T)
        pairs = tl.join(even, odd)
        if HALVES:
            pairs = pairs.permute(0, 2, 1)
        y = pairs.reshape(R, C)
    else:
        y = x
    return y


@triton.jit
def _reciprocal(x, NATIVE: tl.constexpr):
    if NATIVE:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        y = 1.0 / x
    return y


@triton.jit
def _fold(top, total, acc, top2, total2, acc2):
    """The (largest score, sum, output) of two sets of keys as that of both; an empty one changes no bit."""
    new = tl.maximum(top, top2)
    a = tl.exp2(top - new)
    b = tl.exp2(top2 - new)
    total = tl.fma(total, a, total2 * b)
    acc = tl.fma(acc, tl.broadcast_to(a[:, None], acc.shape), acc2 * b[:, None])
    return new, total, acc


@triton.jit
def _blocks(table, key0, end, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """The block of each of a tile's keys, (KEYS,)."""
    if KEYS >= BLOCK:
        at = key0 // BLOCK + tl.arange(0, KEYS) // BLOCK
    else:
        at = key0 // BLOCK + tl.zeros((KEYS,), tl.int32)
    return tl.load(table + at, mask=at * BLOCK < end, other=0)


@triton.jit
def _visit(
    key0, ahead, block, q, row_scale, top, total, acc, positions, first, end, table, keys, values,
    key_scales, value_scales, block_stride, scale_stride, softcap, window,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, INT8: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Adds the keys of one tile, from key0 on, which lie in `block`; returns the blocks of the tile `ahead`.

    They are asked for one tile early, so that the copies of K and V that need them can be issued before this
    tile is done. MASKED: some row does not see some key; else all do.
    """
    T: tl.constexpr = q.dtype
    WIDTH: tl.constexpr = COLUMNS // 2 if INT8 else COLUMNS
    STORED: tl.constexpr = D // 2 if INT8 else D
    column = tl.arange(0, WIDTH)
    key = key0 + tl.arange(0, KEYS)
    there = key < end
    if WINDOW:
        there = there & (key >= first)
    if KEYS >= BLOCK:
        offset = tl.arange(0, KEYS) % BLOCK
    else:
        offset = key0 % BLOCK + tl.arange(0, KEYS)
    at = (block.to(tl.int64) * block_stride + offset * STORED)[:, None] + column[None, :]
    if MASKED:
        mask = there[:, None]
        if STORED != WIDTH:
            mask = mask & (column < STORED)[None, :]
        k = tl.load(keys + at, mask=mask, other=0)
        v = tl.load(values + at, mask=mask, other=0)
    elif STORED == WIDTH:
        k = tl.load(keys + at)
        v = tl.load(values + at)
    else:
        mask = (column < STORED)[None, :]
        k = tl.load(keys + at, mask=mask, other=0)
        v = tl.load(values + at, mask=mask, other=0)
    if INT8:
        scale_at = block.to(tl.int64) * scale_stride + offset
        if MASKED:
            key_scale = tl.load(key_scales + scale_at, mask=there, other=0.0)
            value_scale = tl.load(value_scales + scale_at, mask=there, other=0.0)
        else:
            key_scale = tl.load(key_scales + scale_at)
            value_scale = tl.load(value_scales + scale_at)
    next_block = _blocks(table, ahead, end, KEYS, BLOCK)

    kt = tl.trans(_numbers(k, T, INT8, True, KEYS, COLUMNS, NATIVE))
    s = tl.dot(q, kt, input_precision="ieee")
    if INT8:
        s *= key_scale[None, :]
    if SOFTCAP:  # cap * tanh(x) = cap - 2 cap / (1 + exp(2 x))
        s = softcap - 2 * softcap * _reciprocal(1.0 + tl.exp2(s * row_scale[:, None]), NATIVE)
    if MASKED:
        seen = key[None, :] <= positions[:, None]
        if WINDOW:
            seen = seen & (key[None, :] > (positions - window)[:, None])
        s = tl.where(seen, s, float("-inf"))
    # Multiplications and additions are fused by name: both ways that a part is computed round alike.
    if SOFTCAP:
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
    else:
        new = tl.maximum(top, tl.max(s, 1) * row_scale)
        p = tl.exp2(
            tl.fma(s, tl.broadcast_to(row_scale[:, None], s.shape), tl.broadcast_to(-new[:, None], s.shape))
        )
    shrink = tl.exp2(top - new)
    total = tl.fma(total, shrink, tl.sum(p, 1))
    acc *= shrink[:, None]
    if INT8:
        p *= (value_scale * _VALUE_FACTOR)[None, :]
    acc = tl.dot(p.to(T), _numbers(v, T, INT8, False, KEYS, COLUMNS, NATIVE), acc, input_precision="ieee")
    return next_block, new, total, acc


@triton.jit
def _finish(
    out, total, acc, out_at, column, rows, D: tl.constexpr, ROWS: tl.constexpr, INT8: tl.constexpr
):  # fmt: skip
    """Writes some columns of the rows of a tile; what a row that saw no key has is 0."""
    if INT8:
        total *= _VALUE_FACTOR
    y = acc * (1.0 / tl.where(total > 0, total, 1.0))[:, None]
    mask = (tl.arange(0, ROWS) < rows)[:, None] & (column < D)[None, :]
    tl.store(out + out_at[:, None] + column[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gather_parts(
    out, top, total, acc, out_at, rows, partials, counters, slot, part, parts, D: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INT8: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """A part of a tile: it writes what it has and counts itself in, and the last one adds all of them, in
    ascending order whoever came last, writes the result, and leaves the counter at 0.

    A slot holds ROWS x D outputs, ROWS largest scores and ROWS sums, of which `rows` are in use. UNROLL parts
    are on their way at a time.
    """
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    SIZE: tl.constexpr = ROWS * (D + 2)
    row = tl.arange(0, ROWS)
    valid = row < rows
    column = tl.arange(0, COLUMNS)
    own = partials + (tl.cast(slot + part, tl.int64) * heads + head) * SIZE
    own_mask = valid[:, None] & (column < D)[None, :]
    tl.store(own + row[:, None] * D + column[None, :], acc, mask=own_mask)
    tl.store(own + ROWS * D + row, top, mask=valid)
    tl.store(own + ROWS * D + ROWS + row, total, mask=valid)
    tl.debug_barrier()  # all threads have written before the program arrives
    counter = counters + slot * heads + head
    if tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1:
        tl.debug_barrier()
        tl.store(counter, 0)
        SOME: tl.constexpr = min(COLUMNS, 64)
        for column0 in range(0, D, SOME):
            some = column0 + tl.arange(0, SOME)
            top = tl.full((ROWS,), _LOWEST, tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            sum_ = tl.zeros((ROWS, SOME), tl.float32)
            for i in range(0, parts, UNROLL):
                for u in tl.static_range(UNROLL):
                    there = row < tl.where(i + u < parts, rows, 0)
                    other = partials + (tl.cast(slot + i + u, tl.int64) * heads + head) * SIZE
                    mask = there[:, None] & (some < D)[None, :]
                    # past the first-level cache, which may hold an older tile's
                    top2 = tl.load(other + ROWS * D + row, mask=there, other=_LOWEST, cache_modifier=".cg")
                    total2 = tl.load(
                        other + ROWS * D + ROWS + row, mask=there, other=0.0, cache_modifier=".cg"
                    )
                    at = other + row[:, None] * D + some[None, :]
                    acc2 = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
                    top, total, sum_ = _fold(top, total, sum_, top2, total2, acc2)
            _finish(out, total, sum_, out_at, some, rows, D, ROWS, INT8)


@triton.jit(do_not_specialize=["window"])
def attention_kernel(
    q, keys, values, key_scales, value_scales, tables, items, counts, partials, counters, out,
    scale, softcap, window, q_stride, q_head_stride, block_stride, head_stride, scale_block_stride,
    scale_head_stride,
    LIST: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, UNMASKED: tl.constexpr, PART: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, INT8: tl.constexpr, UNROLL: tl.constexpr,
    OVERLAP: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Grid: (room for items of the list, KV heads). A program of no item ends at once.

    scale: to units of log 2; with SOFTCAP of 2 / softcap, and softcap itself in units of log 2. LIST: 0 is
    "few", 1 "many". UNMASKED: tiles that all rows see in full have a loop of their own. PART: the keys of a
    part, if the plan is deterministic; else 0. OVERLAP: start while the kernel before still runs (sm_90).
    """
    if OVERLAP:
        gdc_launch_dependents()
    # No kernel writes items, they are copied before the first one starts. Beyond the last one there is room.
    count = tl.load(counts + LIST)
    item = items + tl.program_id(0) * 8
    table = tables + tl.load(item)
    row0 = tl.load(item + 1)
    queries = tl.load(item + 2)
    position = tl.load(item + 3)
    begin = tl.load(item + 4)
    end = tl.load(item + 5)
    if OVERLAP:
        gdc_wait()  # every program, or the kernel after this one would not wait for the one before
    if tl.program_id(0) >= count:
        return
    head = tl.program_id(1)
    heads = tl.num_programs(1)

    row = tl.arange(0, ROWS)
    query = row // GROUP
    q_head = head * GROUP + row % GROUP
    valid = query < queries
    positions = position + query
    column = tl.arange(0, COLUMNS)
    q_column = column
    if INT8:  # in the order of K's
        q_column = column % (COLUMNS // 2) * 2 + column // (COLUMNS // 2)
    q_at = ((row0 + query).to(tl.int64) * q_stride + q_head * q_head_stride)[:, None] + q_column[None, :]
    x = tl.load(q + q_at, mask=valid[:, None] & (q_column < D)[None, :], other=0.0)
    row_scale = tl.zeros((ROWS,), tl.float32) + scale
    if INT8:
        # Codes are exact in fp16; q fits in as well, divided by the power of two of a row's largest.
        largest = tl.max(tl.abs(x.to(tl.float32)), 1).to(tl.int32, bitcast=True)
        exponent = tl.minimum(tl.maximum(largest >> 23, 64), 253)
        x = x.to(tl.float32) * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
        row_scale *= (exponent << 23).to(tl.float32, bitcast=True)
        if q.dtype.element_ty != tl.float32:
            x = x.to(tl.float16)
        keys = keys.to(tl.pointer_type(tl.int16), bitcast=True)
        values = values.to(tl.pointer_type(tl.int16), bitcast=True)
        key_scales += tl.cast(head, tl.int64) * scale_head_stride
        value_scales += tl.cast(head, tl.int64) * scale_head_stride
        block_stride = block_stride // 2
        head_stride = head_stride // 2
    keys += tl.cast(head, tl.int64) * head_stride
    values += tl.cast(head, tl.int64) * head_stride
    if WINDOW:
        first = tl.maximum(position - window + 1, 0)
    else:
        first = 0

    top = tl.full((ROWS,), _LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    tl.assume(begin < end)  # without the case of no iteration ptxas keeps several wgmma in flight
    if PART:
        for part_begin in range(begin // PART * PART, end, PART):
            lo = tl.maximum(begin, part_begin)
            hi = tl.minimum(end, part_begin + PART)
            tl.assume(lo < hi)
            top2 = tl.full((ROWS,), _LOWEST, tl.float32)
            total2 = tl.zeros((ROWS,), tl.float32)
            acc2 = tl.zeros((ROWS, COLUMNS), tl.float32)
            block = _blocks(table, lo, end, KEYS, BLOCK)
            for key0 in tl.range(lo, hi, KEYS, num_stages=STAGES):
                block, top2, total2, acc2 = _visit(
                    key0, key0 + KEYS, block, x, row_scale, top2, total2, acc2, positions, first, end, table,
                    keys, values, key_scales, value_scales, block_stride, scale_block_stride, softcap, window,
                    D, COLUMNS, BLOCK, KEYS, True, WINDOW, SOFTCAP, INT8, NATIVE,
                )  # fmt: skip
            top, total, acc = _fold(top, total, acc, top2, total2, acc2)
    else:
        # Tiles lo to hi need no mask; the last one is always masked, so that neither loop is ever empty.
        last_tile = (end - 1) // KEYS * KEYS
        lo = begin
        if WINDOW:
            lo = tl.maximum(begin, tl.cdiv(position + queries - window, KEYS) * KEYS)
            lo = tl.minimum(lo, last_tile)
        hi = lo
        if UNMASKED:
            hi = tl.maximum(lo, tl.minimum((position + 1) // KEYS * KEYS, last_tile))
        # Masks take registers, and the keys that they hide time.
        NARROW: tl.constexpr = min(KEYS, 64) if UNMASKED else KEYS
        if WINDOW:
            block = _blocks(table, tl.where(begin < lo, begin, hi), end, NARROW, BLOCK)
        else:
            block = _blocks(table, hi, end, NARROW, BLOCK)
        skipped = hi - lo
        tl.assume(begin < end - skipped)
        for i in tl.range(begin, end - skipped, NARROW, num_stages=STAGES):
            if WINDOW and UNMASKED:
                key0 = tl.where(i < lo, i, i + skipped)
                ahead = tl.where(i + NARROW < lo, i, i + skipped) + NARROW
            else:
                key0 = i + skipped
                ahead = key0 + NARROW
            block, top, total, acc = _visit(
                key0, ahead, block, x, row_scale, top, total, acc, positions, first, end, table,
                keys, values, key_scales, value_scales, block_stride, scale_block_stride, softcap, window,
                D, COLUMNS, BLOCK, NARROW, True, WINDOW, SOFTCAP, INT8, NATIVE,
            )  # fmt: skip
        if UNMASKED:  # noqa: SIM102  decided as it is compiled
            if lo < hi:
                tl.assume(lo < hi)
                blocks = _blocks(table, lo, end, KEYS, BLOCK)
                for key0 in tl.range(lo, hi, KEYS, num_stages=STAGES):
                    blocks, top, total, acc = _visit(
                        key0, key0 + KEYS, blocks, x, row_scale, top, total, acc, positions, first, end,
                        table, keys, values, key_scales, value_scales, block_stride, scale_block_stride,
                        softcap, window, D, COLUMNS, BLOCK, KEYS, False, WINDOW, SOFTCAP, INT8, NATIVE,
                    )  # fmt: skip

    # Asked for again, so that they need no registers in the loops.
    rows = tl.load(item + 2) * GROUP
    parts = tl.load(item + 7)
    out_at = ((tl.load(item + 1) + query).to(tl.int64) * heads * GROUP + q_head) * D
    if parts == 1:
        _finish(out, total, acc, out_at, column, rows, D, ROWS, INT8)
    else:
        slot = tl.load(item + 6)
        _gather_parts(
            out, top, total, acc, out_at, rows, partials, counters, slot, parts >> 16, parts & 65535,
            D, ROWS, COLUMNS, INT8, UNROLL,
        )  # fmt: skip


# ---- which tile --------------------------------------------------------------------------------------------

# Rows, keys, warps, stages, programs and loops of few, some, many and fixed; by the bytes of an element of K
# and V (4: of q as well) and by the head dim up to which. All by what the compiler reports: none was timed.
_TILES: dict[str, dict[tuple[int, int], tuple[tuple[int, ...], ...]]] = {
    "sm_80": {
        (1, 64): ((16, 128, 4, 3, 4, 1), (64, 64, 4, 3, 2, 1), (128, 64, 8, 3, 2, 2), (64, 32, 4, 3, 2, 1)),
        (1, 128): ((16, 64, 4, 3, 4, 1), (64, 32, 4, 3, 2, 1), (128, 32, 8, 3, 2, 2), (64, 32, 8, 3, 2, 1)),
        (1, 256): ((16, 32, 4, 3, 4, 1), (64, 32, 8, 3, 2, 1), (64, 32, 8, 2, 2, 2), (32, 32, 8, 3, 2, 1)),
        (2, 64): ((16, 128, 4, 3, 4, 1), (64, 64, 4, 3, 2, 1), (128, 64, 8, 3, 2, 2), (64, 64, 4, 3, 2, 1)),
        (2, 128): ((16, 64, 4, 3, 4, 1), (64, 32, 4, 3, 2, 1), (128, 64, 8, 3, 2, 2), (64, 64, 8, 3, 2, 1)),
        (2, 256): ((16, 32, 4, 3, 4, 1), (64, 32, 8, 3, 2, 1), (64, 32, 8, 2, 2, 2), (32, 32, 8, 3, 2, 1)),
        (4, 256): ((16, 16, 8, 2, 2, 1), (32, 16, 8, 2, 2, 1), (32, 16, 8, 2, 2, 1), (32, 16, 8, 2, 2, 1)),
    },
    "sm_89": {
        (1, 64): ((16, 128, 4, 3, 2, 1), (64, 64, 4, 3, 2, 1), (128, 64, 8, 3, 2, 2), (64, 32, 4, 3, 2, 1)),
        (1, 128): ((16, 64, 4, 3, 2, 1), (64, 32, 4, 3, 2, 1), (128, 32, 8, 3, 2, 2), (64, 32, 8, 3, 2, 1)),
        (1, 256): ((16, 32, 4, 3, 2, 1), (64, 32, 8, 3, 2, 1), (64, 32, 8, 2, 2, 2), (32, 32, 8, 3, 2, 1)),
        (2, 64): ((16, 64, 4, 3, 2, 1), (64, 64, 4, 3, 2, 1), (128, 64, 8, 3, 2, 2), (64, 64, 4, 3, 2, 1)),
        (2, 128): ((16, 32, 4, 3, 2, 1), (64, 32, 4, 3, 2, 1), (128, 32, 8, 3, 2, 2), (64, 32, 8, 3, 2, 1)),
        (2, 256): ((16, 32, 4, 3, 2, 1), (64, 32, 8, 2, 2, 1), (64, 32, 8, 2, 2, 2), (64, 32, 8, 2, 2, 1)),
        (4, 256): ((16, 16, 8, 2, 2, 1), (32, 16, 8, 2, 2, 1), (32, 16, 8, 2, 2, 1), (32, 16, 8, 2, 2, 1)),
    },
    "sm_90": {
        (1, 64): ((16, 128, 4, 3, 4, 1), (64, 64, 4, 3, 2, 1), (128, 128, 8, 3, 2, 2), (64, 64, 4, 3, 2, 1)),
        (1, 96): ((16, 32, 4, 4, 4, 1), (64, 64, 4, 3, 2, 1), (128, 64, 8, 3, 2, 2), (64, 32, 4, 4, 2, 1)),
        (1, 128): ((16, 64, 4, 3, 4, 1), (64, 64, 4, 3, 2, 1), (128, 64, 8, 3, 2, 2), (64, 32, 4, 4, 2, 1)),
        (1, 256): ((16, 64, 4, 3, 4, 1), (64, 64, 8, 3, 2, 1), (128, 32, 8, 3, 2, 1), (32, 64, 8, 3, 2, 1)),
        (2, 64): ((16, 128, 4, 3, 4, 1), (64, 64, 4, 3, 2, 1), (128, 128, 8, 3, 2, 2), (64, 64, 4, 3, 2, 1)),
        (2, 128): ((16, 64, 4, 3, 4, 1), (64, 64, 4, 3, 2, 1), (128, 128, 8, 3, 2, 2), (64, 32, 4, 4, 2, 1)),
        (2, 256): ((16, 32, 4, 3, 4, 1), (64, 64, 8, 3, 2, 1), (128, 32, 8, 3, 2, 1), (64, 32, 8, 3, 2, 1)),
        (4, 256): ((16, 16, 8, 2, 2, 1), (32, 16, 8, 2, 2, 1), (32, 16, 8, 2, 2, 1), (32, 16, 8, 2, 2, 1)),
    },
}
_PARTS = (128, 256, 512, DETERMINISTIC_KEYS)


def tiles(
    device: torch.device, head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype | None = None
) -> Tiles:
    """The tiles of a model's attention, which a plan is made with.

    Args:
        dtype: of q.
        kv_dtype: of K and V: as q, or int8.
    """
    return tiles_of(products.architecture(device), head_dim, dtype, kv_dtype or dtype)


def tiles_of(architecture: str, head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype) -> Tiles:
    """Those of an architecture; any without its own takes sm_89's, which ask for the least memory."""
    nbytes = 4 if dtype == torch.float32 else kv_dtype.itemsize
    table = _TILES.get(architecture, _TILES["sm_89"])
    numbers = next(row for (size, columns), row in table.items() if size == nbytes and head_dim <= columns)
    return Tiles(*(Tile._make((*own, part)) for own, part in zip(numbers, _PARTS, strict=True)))


# ---- a plan on the device ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scratch:
    """Where the parts of tiles meet. Launches that share it run one after another."""

    partials: torch.Tensor  # float32
    counters: torch.Tensor  # int32, zeros between launches

    @classmethod
    def allocate(cls, room: Capacity, kv_heads: int, head_dim: int, device: torch.device) -> Scratch:
        partials = torch.empty(
            max(1, room.rows * kv_heads * (head_dim + 2)), dtype=torch.float32, device=device
        )
        slots = max(1, room.few_slots, room.many_slots)
        return cls(partials, torch.zeros(slots * kv_heads, dtype=torch.int32, device=device))


@dataclass(frozen=True)
class DeviceItems:
    """A plan as kernels read it: tensors whose contents may change, and what they have to be a plan for."""

    few: torch.Tensor  # int32 (room, 8)
    many: torch.Tensor  # int32 (room, 8)
    counts: torch.Tensor  # int32 (2,): items of few and many
    scratch: Scratch
    few_tile: Tile
    many_tile: Tile
    group: int
    kv_heads: int
    window: int
    deterministic: bool

    @classmethod
    def allocate(
        cls, plan: AttentionPlan, room: Capacity, scratch: Scratch, device: torch.device
    ) -> DeviceItems:
        """Without items yet, for plans like this one that `room` holds (`Capacity.holds`)."""
        few, many = (torch.zeros(n, FIELDS, dtype=torch.int32, device=device) for n in (room.few, room.many))
        return cls.over(plan, few, many, torch.zeros(2, dtype=torch.int32, device=device), scratch)

    @classmethod
    def over(
        cls,
        plan: AttentionPlan,
        few: torch.Tensor,
        many: torch.Tensor,
        counts: torch.Tensor,
        scratch: Scratch,
    ) -> DeviceItems:
        """In given tensors, which hold a plan like this one whenever a kernel reads them."""
        return cls(few, many, counts, scratch, *plan[4:])

    def fill(self, plan: AttentionPlan) -> None:
        """Copies a plan like the first one, outside of a graph."""
        for own, items in ((self.few, plan.few), (self.many, plan.many)):
            if len(items):
                own[: len(items)].copy_(torch.from_numpy(items))
        self.counts.copy_(torch.tensor((len(plan.few), len(plan.many)), dtype=torch.int32))


def to_device(
    plan: AttentionPlan, device: torch.device, *, head_dim: int, scratch: Scratch | None = None
) -> DeviceItems:
    """A plan for one step."""
    room = needs(plan)
    scratch = scratch or Scratch.allocate(room, plan.kv_heads, head_dim, device)
    items = DeviceItems.allocate(plan, room, scratch, device)
    items.fill(plan)
    return items


# ---- the launch --------------------------------------------------------------------------------------------


def launch_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, block_tables: torch.Tensor, items: DeviceItems,
    out: torch.Tensor, scale: float, softcap: float = 0.0,
    key_scales: torch.Tensor | None = None, value_scales: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """`paged_attention` into `out`, with arguments that are known to be right."""
    kv_heads, block, d = keys.shape[1:]
    int8 = key_scales is not None
    key_scales, value_scales = (out, out) if key_scales is None else (key_scales, value_scales)
    scale *= _LOG2_E  # 2^x is cheaper than e^x
    if softcap:
        scale *= 2 / softcap
        softcap *= _LOG2_E
    overlap = products._overlaps(q.device)
    for index, (list_, tile) in enumerate(((items.few, items.few_tile), (items.many, items.many_tile))):
        if not list_.shape[0]:
            continue
        attention_kernel[(list_.shape[0], kv_heads)](
            q, keys, values, key_scales, value_scales, block_tables, list_, items.counts,
            items.scratch.partials, items.scratch.counters, out, scale, softcap, items.window,
            q.stride(0), q.stride(1), keys.stride(0), keys.stride(1),
            key_scales.stride(0) if int8 else 0, key_scales.stride(1) if int8 else 0,
            LIST=index, GROUP=items.group, D=d, COLUMNS=max(16, triton.next_power_of_2(d)), BLOCK=block,
            ROWS=tile.rows, KEYS=tile.keys, STAGES=tile.stages, UNMASKED=tile.loops > 1,
            PART=tile.part if items.deterministic else 0, WINDOW=items.window > 0, SOFTCAP=softcap > 0,
            INT8=int8, UNROLL=4 if tile.rows <= 16 else 2, OVERLAP=overlap, NATIVE=not products.INTERPRETED,
            num_warps=tile.warps, launch_pdl=overlap, enable_fp_fusion=not items.deterministic,
        )  # fmt: skip


def paged_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    items: DeviceItems,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a step's queries over what its sequences have in the cache, their own K and V included.

    Args:
        q: float16, bfloat16 or float32 (T, H, D), D even, at most 256; a row's heads may be part of a larger
            row, as of q, k and v in one.
        keys, values: (blocks, KH, block_size, D) of q's dtype or int8, with the same strides; positions and
            elements of a block's head are contiguous. block_size is 16, 32 or 64.
        block_tables: int32, contiguous: position p of sequence s lies in block number s * table_width +
            p // block_size of it, at offset p % block_size; the plan knows table_width.
        items: a plan for these queries (`to_device`, or `DeviceItems` that were filled).
        scale: of q . K, positive.
        softcap: scores become softcap * tanh(score / softcap); 0: they stay.
        window: of the plan.
        key_scales, value_scales: float32 (blocks, KH, block_size) of int8 K and V, contiguous in a block's
            head: value = code * scale.
        out: where the result goes.

    Returns:
        (T, H, D), contiguous, dtype of q. Rows of no query in the plan are not written.

    Raises:
        RequestError: a wrong dtype, shape, stride or device, or a plan for something else.
    """
    _check(q, keys, values, block_tables, items, scale, softcap, window, key_scales, value_scales, out)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch_attention(q, keys, values, block_tables, items, out, scale, softcap, key_scales, value_scales)
    return out


def _check(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, block_tables: torch.Tensor, items: DeviceItems,
    scale: float, softcap: float, window: int, key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None, out: torch.Tensor | None,
) -> None:  # fmt: skip
    def wrong(name: str, value: object, wanted: str) -> RequestError:
        if isinstance(value, torch.Tensor):
            value = f"{value.dtype} {tuple(value.shape)} with strides {value.stride()} on {value.device}"
        return RequestError(f"paged_attention: {name}", value, wanted)

    heads, (kv_heads, block, d) = (
        items.group * items.kv_heads,
        keys.shape[1:] if keys.ndim == 4 else (0, 0, 0),
    )
    if q.device.type != "cuda" and not products.INTERPRETED:
        raise wrong("q", f"on {q.device}", "on a CUDA device (or TRITON_INTERPRET=1, set before)")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32) or q.ndim != 3 or q.stride(2) != 1:
        raise wrong("q", q, "float16, bfloat16 or float32 (T, H, D), contiguous in D")
    if d % 2 or not 0 < d <= HEAD_DIM_MAX or q.shape[1:] != (heads, d):
        wanted = f"(T, {heads}, D) as the plan has it, D as in keys, even and at most {HEAD_DIM_MAX}"
        raise wrong("q", q, wanted)
    int8 = keys.dtype == torch.int8
    if not (int8 or keys.dtype == q.dtype) or kv_heads != items.kv_heads or block not in BLOCK_SIZES:
        wanted = f"int8 or {q.dtype} (blocks, {items.kv_heads}, 16, 32 or 64, D)"
        raise wrong("keys", keys, wanted)
    if keys.stride()[2:] != (d, 1) or (int8 and (keys.stride(0) % 2 or keys.stride(1) % 2)):
        raise wrong("keys", keys, f"strides of {d} and 1, of int8 even ones before")
    if not _alike(values, keys):
        raise wrong("values", values, "dtype, shape and strides of keys")
    if not _alike(value_scales, key_scales):
        raise wrong("value_scales", value_scales, "dtype, shape and strides of key_scales")
    if int8 != (key_scales is not None):
        raise wrong("key_scales", key_scales, "scales of int8 K, and of no other")
    if key_scales is not None and (
        key_scales.dtype != torch.float32 or key_scales.shape != keys.shape[:3] or key_scales.stride(2) != 1
    ):
        raise wrong("key_scales", key_scales, f"float32 {tuple(keys.shape[:3])}, contiguous in a block")
    if block_tables.dtype != torch.int32 or not block_tables.is_contiguous():
        raise wrong("block_tables", block_tables, "contiguous int32")
    if not q.device == keys.device == values.device == block_tables.device == items.counts.device:
        raise wrong("q", q, f"on the device of keys and of all else, {keys.device}")
    if not (math.isfinite(scale) and scale > 0):
        raise wrong("scale", scale, "a positive number")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise wrong("softcap", softcap, "a number of 0 or more")
    if window != items.window:
        raise wrong("window", window, f"that of the plan, {items.window}")
    if out is not None and ((out.dtype, out.shape) != (q.dtype, q.shape) or not out.is_contiguous()):
        raise wrong("out", out, f"contiguous {q.dtype} {tuple(q.shape)}")


def _alike(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return (a.dtype, a.shape, a.stride(), a.device) == (b.dtype, b.shape, b.stride(), b.device)
