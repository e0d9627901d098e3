"""What the processes of one tensor-parallel model exchange: whole outputs, side by side in order of rank.

No sums travel: every output is computed by one rank, in the order in which a single GPU would add, so the
result does not depend on how many ranks there are (beyond what a library does with another width).
"""

from __future__ import annotations

import torch
from torch import distributed


class Rank:
    """One process of `size`, of which `index` counts from 0. A single one exchanges nothing."""

    def __init__(self, index: int = 0, size: int = 1) -> None:
        self.index = index
        self.size = size

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The columns of all ranks: (T, N / size) of each to (T, N)."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=1)
