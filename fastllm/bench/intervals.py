"""Intervals for medians, which make no assumption about a distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEVEL = 0.95


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The closest two order statistics that enclose the true median with 95 %, and with how much they do.

    Of n independent values, the k-th smallest and the k-th largest do with probability
    1 - 2 P(Binomial(n, 1/2) < k). Fewer than 6 values cannot; then it is the least and the greatest.
    """
    n, ordered = len(values), sorted(values)
    outside = [2 * sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(n // 2 + 1)]
    k = max([k for k in range(1, n // 2 + 1) if outside[k] <= 1 - LEVEL], default=1)
    return ordered[k - 1], ordered[n - k], (1 - outside[k]) if k < len(outside) else 0.0
