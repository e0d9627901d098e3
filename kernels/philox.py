"""The uniform number of a row, from Philox4x32-10 as in csrc/model/philox.h: the same bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sample_uniform(seed, sample_index, position):
    """float64 in [0, 1), a multiple of 2^-53, from scalars: int64 (the bits of a uint64), int32, int32."""
    first, second, _, _ = tl.philox(seed, position, sample_index, 0, 0)
    return ((first >> 5).to(tl.float64) * 67108864.0 + (second >> 6).to(tl.float64)) / 9007199254740992.0
