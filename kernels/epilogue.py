"""What follows a matmul's loop over K: the parts of a split K added up, then bias, SiLU, residual, store."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_parts(acc, partial, counters, BN: tl.constexpr, BM: tl.constexpr):
    """The whole sum of a tile, and whether this program goes on with it.  Grid: (tiles, parts of K)

    Each of a tile's programs writes its (BN, BM) sums to `partial` and counts itself in. The last to arrive
    adds all of them in ascending k, whoever came last, and leaves the counter at 0. (Leaving the last
    program's sums in its registers was slower: then it has to draw its number before the others have
    written.)
    """
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    parts = tl.num_programs(1)
    last = True
    if parts > 1:
        own = partial + tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        tl.store(own + tl.cast(tl.program_id(1) * tiles + tile, tl.int64) * (BN * BM), acc)
        tl.debug_barrier()  # all threads have written before the program arrives
        last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == parts - 1
        if last:
            tl.debug_barrier()
            tl.store(counters + tile, 0)
            acc = tl.zeros_like(acc)
            for i in range(parts):
                # past the first-level cache, which may hold an older tile's sums
                acc += tl.load(own + tl.cast(i * tiles + tile, tl.int64) * (BN * BM), cache_modifier=".cg")
    return acc, last


@triton.jit
def finish(
    acc, bias, residual, y, n0, m, M, N, residual_stride, y_stride,
    BIAS: tl.constexpr, PAIRED: tl.constexpr, RESIDUAL: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """y[m, n] = acc[n, m] + bias[n]; PAIRED: SiLU of output 2i times output 2i + 1; + residual[m, n]."""
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
