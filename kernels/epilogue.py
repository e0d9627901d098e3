"""What follows the loop over K of a matmul: the parts of a split K added up, then bias, SiLU, residual, store."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_parts(acc, partial, counters, BN: tl.constexpr, BM: tl.constexpr):
    """The whole sum of a tile, and whether it is this program that goes on with it.  Grid: (tiles, parts of K)

    A program first draws a number from the tile's counter. All but the last to come write their (BN, BM) sums to
    `partial` and leave, having counted themselves done in the upper half of the counter. The last waits until all are
    done (they run already and wait for nothing), and adds the parts in ascending k, its own from registers: one order,
    whoever came last. It leaves the counter at 0.
    """
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    last = True
    if parts > 1:
        own = partial + tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        last = (tl.atomic_add(counters + tile, 1, sem="relaxed") & 0xFFFF) == parts - 1
        if last:
            while tl.atomic_add(counters + tile, 0, sem="acquire") >> 16 < parts - 1:
                pass
            tl.debug_barrier()
            # loads go past the first-level cache, which may hold an older tile's sums
            if BN * BM >= 16384:  # of two parts, for whose sum no order is needed, nor registers for a third tile
                acc += tl.load(own + tl.cast((1 - part) * tiles + tile, tl.int64) * (BN * BM), cache_modifier=".cg")
            else:
                total = tl.zeros_like(acc)
                for i in tl.range(parts, loop_unroll_factor=4 if BN * BM <= 4096 else 1):
                    at = own + tl.cast(i * tiles + tile, tl.int64) * (BN * BM)
                    other = tl.load(at, mask=i != part, other=0, cache_modifier=".cg")
                    total += tl.where(i == part, acc, other)
                acc = total
            tl.store(counters + tile, 0)
        else:
            tl.store(own + tl.cast(part * tiles + tile, tl.int64) * (BN * BM), acc)
            tl.debug_barrier()  # all threads have written before the program is done
            tl.atomic_add(counters + tile, 1 << 16, sem="release")
    return acc, last


@triton.jit
def finish(
    acc, bias, residual, y, n0, m, M, N, residual_stride, y_stride,
    BIAS: tl.constexpr, PAIRED: tl.constexpr, RESIDUAL: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """y[m, n] = acc[n, m] + bias[n]; PAIRED: SiLU of output 2i times output 2i + 1; + residual[m, n]; rounded to y's type."""
    n = n0 + tl.arange(0, BN)
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if PAIRED:
        gate, up = acc.reshape(BN // 2, 2, BM).permute(0, 2, 1).split()
        acc = gate / (1.0 + tl.exp(-gate)) * up
        n = n0 // 2 + tl.arange(0, BN // 2)
        N = N // 2
    mask = (m < M)[None, :] & (n < N)[:, None]
    if RESIDUAL:
        at = m[None, :].to(tl.int64) * residual_stride + n[:, None]
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + m[None, :].to(tl.int64) * y_stride + n[:, None], acc.to(y.dtype.element_ty), mask=mask)
