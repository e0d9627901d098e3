"""Quantized activations and the integer matmul, exact up to one rounding per float64 operation."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fastllm.reference.dense import Float64

Int8: TypeAlias = npt.NDArray[np.int8]
Float32: TypeAlias = npt.NDArray[np.float32]


def quantize_activations(x: npt.ArrayLike, group: int = 16) -> tuple[Int8, Float32]:
    """Rounds every group of a row to signed bytes, in float32 arithmetic as written here, bit for bit.

    amax = max |x|; scale = amax / 127; q = round_half_even(x * (127 / amax)), where the quotient is rounded
    to float32 first. A group whose 127 / amax is not finite (amax zero, or below 127 / 3.4e38) has scale 0
    and all q 0.

    Args:
        x: (..., K), finite; a last group that K does not fill counts as padded with zeros.

    Returns:
        q: int8 (..., K), in [-127, 127].
        scale: float32 (..., ceil(K / group)).
    """
    x = np.asarray(x, dtype=np.float32)
    columns = x.shape[-1]
    groups = -(-columns // group)
    q = np.zeros(x.shape, dtype=np.int8)
    scale = np.zeros((*x.shape[:-1], groups), dtype=np.float32)
    for g in range(groups):
        part = x[..., g * group : (g + 1) * group]
        amax = np.max(np.abs(part), axis=-1)
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.float32(127.0) / amax
        finite = np.isfinite(inverse)
        scale[..., g] = np.where(finite, amax / np.float32(127.0), np.float32(0.0))
        inverse = np.where(finite, inverse, np.float32(0.0)).astype(np.float32)
        q[..., g * group : (g + 1) * group] = np.rint(part * inverse[..., None]).astype(np.int8)
    return q, scale


def hadamard(x: npt.ArrayLike) -> Float32:
    """The orthonormal Hadamard transform, block by block, in float32 arithmetic as written here, bit for bit.

    The order S is the greatest power of two that divides the last axis. x / sqrt(S), then butterflies
    (a, b) -> (a + b, a - b) of distance 8, 4, 2, 1 and 16, 32, ... up to S / 2.

    Args:
        x: (..., N), N a multiple of 16.
    """
    x = np.asarray(x, dtype=np.float32)
    order = x.shape[-1] & -x.shape[-1]
    y: Float32 = x * (np.float32(1.0) / np.sqrt(np.float32(order)))
    for distance in (8, 4, 2, 1, *(16 << i for i in range(order.bit_length() - 5))):
        pairs = y.reshape(*x.shape[:-1], x.shape[-1] // (2 * distance), 2, distance)
        y = np.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), axis=-2)
    result: Float32 = y.reshape(x.shape)
    return result


def dequantize_activations(q: npt.ArrayLike, scale: npt.ArrayLike, group: int = 16) -> Float64:
    """scale * q, exact.

    Args:
        q: int8 (..., K).
        scale: float32 (..., ceil(K / group)).

    Returns:
        float64 (..., K).
    """
    q = np.asarray(q)
    repeated = np.repeat(np.asarray(scale, dtype=np.float64), group, axis=-1)
    return np.asarray(q * repeated[..., : q.shape[-1]])


def integer_matmul(
    q: npt.ArrayLike,
    q_scale: npt.ArrayLike,
    codes: npt.ArrayLike,
    scale: npt.ArrayLike,
    minimum: npt.ArrayLike | None = None,
    *,
    q_group: int = 16,
    group: int = 32,
) -> Float64:
    """y[m, n] = sum over groups of q_scale * scale * (q . codes) + q_scale * minimum * sum(q).

    The dot products and the sums are integers and exact; only the products with the scales and the sum over
    groups are rounded, in float64. The result is `dequantize_activations(q) @ (scale * codes + minimum).T`.

    Args:
        q: int8 (M, K) with `q_scale` float32 (M, ceil(K / q_group)).
        codes: integers (N, K), zero points already subtracted or looked up.
        scale: (N, ceil(K / group)), one per group of columns.
        minimum: shaped as `scale`, or None.

    Returns:
        (M, N).
    """
    q = np.asarray(q, dtype=np.int64)
    codes = np.asarray(codes, dtype=np.int64)
    q_scale = np.asarray(q_scale, dtype=np.float64)
    scale = np.asarray(scale, dtype=np.float64)
    step = math.gcd(q_group, group)  # the longest run of columns that shares both scales
    y = np.zeros((q.shape[0], codes.shape[0]), dtype=np.float64)
    for first in range(0, q.shape[1], step):
        columns = slice(first, min(first + step, q.shape[1]))
        of_q = q_scale[:, first // q_group, None]
        y += of_q * scale[None, :, first // group] * (q[:, columns] @ codes[:, columns].T)
        if minimum is not None:
            sums = q[:, columns].sum(axis=1, keepdims=True)
            y += of_q * np.asarray(minimum, dtype=np.float64)[None, :, first // group] * sums
    return y
