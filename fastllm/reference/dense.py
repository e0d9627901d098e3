"""Norms, activations, rotary embedding, softmax, matmul in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Float64: TypeAlias = npt.NDArray[np.float64]

_erf = np.frompyfunc(math.erf, 1, 1)


def rms_norm(x: npt.ArrayLike, weight: npt.ArrayLike, eps: float) -> Float64:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019).

    Args:
        x: (..., n).
        weight: (n,).
    """
    x = np.asarray(x, dtype=np.float64)
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return np.asarray(x / np.sqrt(mean_square + eps) * np.asarray(weight, dtype=np.float64))


def layer_norm(x: npt.ArrayLike, weight: npt.ArrayLike, bias: npt.ArrayLike | None, eps: float) -> Float64:
    """y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias over the last axis (Ba et al. 2016).

    Args:
        x: (..., n).
        weight, bias: (n,); no bias when None.
    """
    x = np.asarray(x, dtype=np.float64)
    centred = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    y = centred / np.sqrt(variance + eps) * np.asarray(weight, dtype=np.float64)
    return np.asarray(y if bias is None else y + np.asarray(bias, dtype=np.float64))


def silu(x: npt.ArrayLike) -> Float64:
    """x / (1 + exp(-x)), written so that exp never overflows."""
    x = np.asarray(x, dtype=np.float64)
    small = np.exp(-np.abs(x))  # exp(-x) for x >= 0, exp(x) below
    return np.asarray(np.where(x >= 0.0, x / (1.0 + small), x * small / (1.0 + small)))


def silu_mul(gate: npt.ArrayLike, up: npt.ArrayLike) -> Float64:
    """silu(gate) * up, the SwiGLU gate (Shazeer 2020)."""
    return np.asarray(silu(gate) * np.asarray(up, dtype=np.float64))


def gelu(x: npt.ArrayLike) -> Float64:
    """x / 2 * (1 + erf(x / sqrt 2)) (Hendrycks and Gimpel 2016)."""
    x = np.asarray(x, dtype=np.float64)
    return np.asarray(0.5 * x * (1.0 + np.asarray(_erf(x / math.sqrt(2.0)), dtype=np.float64)))


def gelu_tanh(x: npt.ArrayLike) -> Float64:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), the approximation of the same paper."""
    x = np.asarray(x, dtype=np.float64)
    return np.asarray(0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))))


def softcap(x: npt.ArrayLike, cap: float) -> Float64:
    """cap * tanh(x / cap); x itself when cap is 0."""
    x = np.asarray(x, dtype=np.float64)
    return np.asarray(cap * np.tanh(x / cap)) if cap else x


def softmax(x: npt.ArrayLike) -> Float64:
    """exp(x - max) / sum(exp(x - max)) over the last axis; minus infinity gives 0."""
    x = np.asarray(x, dtype=np.float64)
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return np.asarray(e / np.sum(e, axis=-1, keepdims=True))


def log_softmax(x: npt.ArrayLike) -> Float64:
    """x - max - log(sum(exp(x - max))) over the last axis."""
    x = np.asarray(x, dtype=np.float64)
    shifted = x - np.max(x, axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True)))


def matmul(x: npt.ArrayLike, weight: npt.ArrayLike, bias: npt.ArrayLike | None = None) -> Float64:
    """y[m, n] = sum_k x[m, k] * weight[n, k] + bias[n].

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,) or None.

    Returns:
        (..., N).
    """
    y = np.asarray(x, dtype=np.float64) @ np.asarray(weight, dtype=np.float64).T
    return np.asarray(y if bias is None else y + np.asarray(bias, dtype=np.float64))


def rope_angles(
    positions: npt.ArrayLike,
    rotary_dim: int,
    base: float,
    *,
    linear_factor: float = 1.0,
    factors: Sequence[float] = (),
) -> Float64:
    """angle[p, i] = position[p] * base^(-2 i / rotary_dim) / (linear_factor * factors[i]).

    Args:
        positions: (T,) integers.
        factors: (rotary_dim / 2,), or empty for all one.

    Returns:
        (T, rotary_dim / 2), in radians.
    """
    frequency = base ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim) / linear_factor
    if len(factors):
        frequency = frequency / np.asarray(factors, dtype=np.float64)
    return np.asarray(np.asarray(positions, dtype=np.float64)[:, None] * frequency)


def rope(x: npt.ArrayLike, angles: npt.ArrayLike) -> Float64:
    """Rotary embedding, "half" style (Su et al. 2021, pairs as in GPT-NeoX).

    With r = rotary_dim / 2, for i < r: y[i] = x[i] cos - x[i + r] sin, y[i + r] = x[i + r] cos + x[i] sin;
    the rest of a head stays.

    Args:
        x: (T, heads, head_dim).
        angles: (T, r).
    """
    y = np.array(x, dtype=np.float64)
    angles = np.asarray(angles, dtype=np.float64)
    r = angles.shape[1]
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
    first, second = y[..., :r].copy(), y[..., r : 2 * r].copy()
    y[..., :r] = first * cos - second * sin
    y[..., r : 2 * r] = second * cos + first * sin
    return y
