"""What stands between the matrix products of a decoder: norms, gates, positions, attention."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fastllm import _core
from fastllm._core import KvCache
from fastllm.errors import RequestError
from fastllm.ops.arrays import Float32Array, Int32Array, check_alike, contiguous, describe, matrix


def rms_norm(x: Float32Array, weight: Float32Array, eps: float = 1e-5) -> Float32Array:
    """y = x / sqrt(mean(x^2) + eps) * weight, along the last axis (Zhang and Sennrich 2019).

    Args:
        x: float32 (..., D).
        weight: float32 (D,).

    Returns:
        float32 (..., D).
    """
    return _core.rms_norm(matrix(x), contiguous(weight), eps).reshape(x.shape)


def layer_norm(
    x: Float32Array, weight: Float32Array, bias: Float32Array | None = None, eps: float = 1e-5
) -> Float32Array:
    """y = (x - mean) / sqrt(variance + eps) * weight + bias, along the last axis (Ba, Kiros and Hinton 2016).

    Args:
        x: float32 (..., D).
        weight: float32 (D,).
        bias: float32 (D,), or None.

    Returns:
        float32 (..., D).
    """
    bias = None if bias is None else contiguous(bias)
    return _core.layer_norm(matrix(x), contiguous(weight), bias, eps).reshape(x.shape)


def silu_mul(gate: Float32Array, up: Float32Array) -> Float32Array:
    """silu(gate) * up, silu(z) = z / (1 + exp(-z)); the gate of SwiGLU (Shazeer 2020).

    Args:
        gate, up: float32 of the same shape.
    """
    check_alike("silu_mul", gate=gate, up=up)
    return _core.silu_mul(matrix(gate), matrix(up)).reshape(gate.shape)


def gelu_tanh_mul(gate: Float32Array, up: Float32Array) -> Float32Array:
    """gelu(gate) * up, gelu(z) = z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) (Hendrycks, Gimpel 2016).

    Args:
        gate, up: float32 of the same shape.
    """
    check_alike("gelu_tanh_mul", gate=gate, up=up)
    return _core.gelu_tanh_mul(matrix(gate), matrix(up)).reshape(gate.shape)


def softcap(x: Float32Array, cap: float) -> Float32Array:
    """cap * tanh(x / cap): x, bounded smoothly by +-cap.

    Args:
        x: float32 of any shape.
        cap: above 0.
    """
    flat = contiguous(x).reshape(-1) if isinstance(x, np.ndarray) else x
    return _core.softcap(flat, cap).reshape(x.shape)


def hadamard(x: Float32Array) -> Float32Array:
    """H x along the last axis, H the orthonormal Hadamard matrix of order S (Sylvester 1867), block by block.

    S is the greatest power of two that divides the last axis. H is symmetric and its own inverse, so products
    of two rotated vectors are those of the vectors. An int8 cache stores its heads rotated (`KvCache`).

    Args:
        x: float32 (..., N), N a multiple of 16.

    Raises:
        RequestError: another dtype or width.
    """
    rows = contiguous(x).reshape(-1, x.shape[-1]) if isinstance(x, np.ndarray) and x.ndim else x
    return _core.hadamard(rows).reshape(x.shape)


def rope_tables(
    positions: Int32Array,
    rotary_dim: int,
    *,
    base: float = 10000.0,
    linear_factor: float = 1.0,
    factors: Sequence[float] | npt.NDArray[np.float64] = (),
) -> tuple[Float32Array, Float32Array]:
    """cos and sin of the angles of rotary position embedding (Su et al. 2021).

    Pair i turns by position * base^(-2 i / rotary_dim) / (linear_factor * factors[i]) radians, computed in
    float64 and rounded once.

    Args:
        positions: int32 (T,), >= 0.
        rotary_dim: even; how many leading elements of a head turn.
        factors: one divisor per pair (rotary_dim / 2), such as those of Llama 3; empty: all one.

    Returns:
        cos, sin: float32 (T, rotary_dim / 2).

    Raises:
        RequestError: see above, or an angle beyond 2^21 radians.
    """
    if not isinstance(positions, np.ndarray) or positions.dtype != np.int32 or positions.ndim != 1:
        raise RequestError("rope_tables: positions", describe(positions), "int32 (T,)")
    divisors = np.asarray(factors, dtype=np.float64)
    frequencies = _core.rope_inverse_frequencies(base, rotary_dim, linear_factor, divisors)
    cos = np.empty((len(positions), len(frequencies)), np.float32)
    sin = np.empty_like(cos)
    # The core makes tables of consecutive positions: one call per run.
    starts = np.flatnonzero(np.diff(positions, prepend=positions[:1] - 2) != 1)
    for start, stop in pairwise([*starts.tolist(), len(positions)]):
        cos[start:stop], sin[start:stop] = _core.rope_tables(frequencies, int(positions[start]), stop - start)
    return cos, sin


def rope(
    x: Float32Array,
    positions: Int32Array | None = None,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    linear_factor: float = 1.0,
    factors: Sequence[float] | npt.NDArray[np.float64] = (),
    tables: tuple[Float32Array, Float32Array] | None = None,
) -> Float32Array:
    """Rotary position embedding of each head, with the pairs (i, i + R / 2) that Hugging Face models use.

    y[i] = x[i] cos[i] - x[i + R/2] sin[i] and y[i + R/2] = x[i + R/2] cos[i] + x[i] sin[i] for i < R/2;
    elements past R stay as they are.

    Args:
        x: float32 (T, H, D).
        positions: int32 (T,), >= 0.
        base, linear_factor, factors: see `rope_tables`.
        rotary_dim: R, even, at most D; None: D.
        tables: cos and sin, float32 (T, R/2) each, as `rope_tables` makes them, instead of positions.

    Returns:
        float32 (T, H, D).

    Raises:
        RequestError: a wrong dtype or shape, or both positions and tables, or neither.
    """
    if (positions is None) == (tables is None):
        raise RequestError("rope: positions", positions, "either positions or tables")
    if tables is None:
        assert positions is not None
        if rotary_dim is None:
            if not isinstance(x, np.ndarray) or x.ndim != 3:
                raise RequestError("rope: x", describe(x), "float32 (T, H, D)")
            rotary_dim = x.shape[2]
        tables = rope_tables(positions, rotary_dim, base=base, linear_factor=linear_factor, factors=factors)
    cos, sin = tables
    return _core.rope(contiguous(x), contiguous(cos), contiguous(sin))


def paged_attention(
    cache: KvCache,
    q: Float32Array,
    query_start: Int32Array,
    seq_lens: Int32Array,
    block_tables: Int32Array,
    *,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> Float32Array:
    """Causal attention of a flat batch of sequences over a paged cache, on one thread.

    softmax(scale * q k^T) v for each query and head, as a fold over tiles of 64 positions (online softmax:
    Milakov and Gimelshein 2018; pages: Kwon et al. 2023). The queries of a sequence are its last positions:
    query i of the n of sequence s stands at position seq_lens[s] - n + i and sees those up to its own.
    Query head h reads KV head h // (H / kv_heads).

    Args:
        cache: holds K and V, those of this batch included (`KvCache.write`). Position p of sequence s is in
            slot block_tables[s, p // block_size] * block_size + p % block_size.
        q: float32 (T, H, head_dim).
        query_start: int32 (S + 1,): the queries of sequence s are query_start[s] .. query_start[s + 1].
        seq_lens: int32 (S,): positions of each sequence, this batch included.
        block_tables: int32 (S, max_blocks).
        scale: of the scores; None: 1 / sqrt(head_dim).
        window: how many positions a query sees, its own included; 0: all.
        softcap: scores s become softcap * tanh(s / softcap); 0: they stay.

    Returns:
        float32 (T, H, head_dim).
    """
    return _core.paged_attention(
        cache,
        contiguous(q),
        contiguous(query_start),
        contiguous(seq_lens),
        contiguous(block_tables),
        scale,
        window,
        softcap,
    )
