"""Causal attention with grouped queries, sliding windows and soft-caps, plain and over a paged cache."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastllm.reference.dense import Float64, softcap, softmax


def attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    scale: float,
    first_position: int = 0,
    window: int = 0,
    cap: float = 0.0,
) -> Float64:
    """Attention of T queries at positions first_position, first_position + 1, ... over a context.

    out[t, h] = sum_j softmax_j(softcap(scale * q[t, h] . k[j, g])) v[j, g] with g = h // (H / Hkv), where j
    runs over the positions p - window < j <= p that query t at position p sees (all j <= p when window is 0).

    Args:
        q: (T, H, D).
        k, v: (C, Hkv, D), the context in order of position; C >= first_position + T.

    Returns:
        (T, H, D).
    """
    q = np.asarray(q, dtype=np.float64)
    k = np.asarray(k, dtype=np.float64)
    v = np.asarray(v, dtype=np.float64)
    group = q.shape[1] // k.shape[1]
    out = np.empty_like(q)
    for t in range(q.shape[0]):
        position = first_position + t
        first = max(0, position - window + 1) if window else 0
        for h in range(q.shape[1]):
            scores = scale * (k[first : position + 1, h // group] @ q[t, h])
            out[t, h] = softmax(softcap(scores, cap)) @ v[first : position + 1, h // group]
    return out


def paged_attention(
    q: npt.ArrayLike,
    k_cache: npt.ArrayLike,
    v_cache: npt.ArrayLike,
    block_tables: npt.ArrayLike,
    query_start: npt.ArrayLike,
    seq_lens: npt.ArrayLike,
    *,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
) -> Float64:
    """Attention for a flat batch of prefill chunks and decodes over a cache in blocks.

    Position p of sequence s lies in block block_tables[s, p // block_size] at offset p % block_size. The
    queries query_start[s] to query_start[s + 1] of sequence s are its last ones: they stand at the positions
    that end with seq_lens[s] - 1.

    Args:
        q: (T, H, D).
        k_cache, v_cache: (blocks, block_size, Hkv, D), this step's tokens included.
        block_tables: (S, max_blocks) integers.
        query_start: (S + 1,) integers.
        seq_lens: (S,) integers, lengths after this step.

    Returns:
        (T, H, D).
    """
    q = np.asarray(q, dtype=np.float64)
    k_cache, v_cache = np.asarray(k_cache), np.asarray(v_cache)
    block_tables, query_start = np.asarray(block_tables), np.asarray(query_start)
    lengths = [int(length) for length in np.asarray(seq_lens)]
    block_size = k_cache.shape[1]
    out = np.empty_like(q)
    for s, length in enumerate(lengths):
        positions = np.arange(length)
        blocks, offsets = block_tables[s, positions // block_size], positions % block_size
        chunk = slice(int(query_start[s]), int(query_start[s + 1]))
        out[chunk] = attention(
            q[chunk],
            k_cache[blocks, offsets],
            v_cache[blocks, offsets],
            scale=scale,
            first_position=length - (chunk.stop - chunk.start),
            window=window,
            cap=cap,
        )
    return out
