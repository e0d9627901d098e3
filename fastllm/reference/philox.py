"""The counter-based random generator behind sampling."""

from __future__ import annotations

from collections.abc import Sequence

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
_MASK = 0xFFFFFFFF


def philox4x32_10(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32 with ten rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        counter: four 32-bit words, least significant first.
        key: two 32-bit words.

    Returns:
        Four 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(_MULTIPLIERS[0] * c0, 1 << 32)
        high1, low1 = divmod(_MULTIPLIERS[1] * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def sample_uniform(seed: int, sample_index: int, position: int) -> float:
    """The one uniform number that a sample uses: in [0, 1), a multiple of 2^-53.

    Key: the low and high word of the 64-bit seed. Counter: (position, sample_index, 0, 0). Of the four words,
    the top 27 bits of the first and the top 26 bits of the second make the number.

    Args:
        seed: unsigned 64-bit.
        sample_index: which of a request's `n` samples, unsigned 32-bit.
        position: of the token that the logits follow, one before the sampled one, unsigned 32-bit.
    """
    first, second, _, _ = philox4x32_10(
        (position & _MASK, sample_index & _MASK, 0, 0), (seed & _MASK, (seed >> 32) & _MASK)
    )
    return ((first >> 5) * 67108864.0 + (second >> 6)) / 9007199254740992.0  # 2^26, 2^53
