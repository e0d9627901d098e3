"""The whole decoder in float64, driven by a `DecoderSpec`: what `models/spec.py` describes, line by line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from fastllm.models.loader import iter_tensors
from fastllm.models.spec import DecoderSpec
from fastllm.reference import dense
from fastllm.reference.attention import attention
from fastllm.reference.dense import Float64, matmul
from fastllm.reference.dequantization import dequantize

if TYPE_CHECKING:
    from fastllm.formats.checkpoint import Checkpoint

Weights: TypeAlias = Mapping[tuple[str, int], Float64]
"""(slot, layer) -> values; layer -1 for slots outside the layers."""


def decoder_weights(checkpoint: Checkpoint, spec: DecoderSpec) -> dict[tuple[str, int], Float64]:
    """Every weight of a checkpoint, dequantized, with q and k rows in "half" order.

    Raises:
        ModelFileError, UnsupportedModelError: as `models.loader.iter_tensors`.
    """
    weights: dict[tuple[str, int], Float64] = {}
    for slot, layer, tensor, row_order in iter_tensors(checkpoint, spec):
        values = dequantize(tensor.dtype, tensor.data, tensor.shape).astype(np.float64)
        weights[slot, layer] = values if row_order is None else values[row_order]
    return weights


def decoder_forward(spec: DecoderSpec, weights: Weights, tokens: Sequence[int] | npt.ArrayLike) -> Float64:
    """Logits after every token of one sequence.

    Args:
        spec: the architecture.
        weights: from `decoder_weights`.
        tokens: (T,) token ids, at positions 0 to T - 1.

    Returns:
        float64 (T, vocab_size): row t predicts the token at position t + 1.
    """
    tokens = np.asarray(tokens, dtype=np.int64)
    count = tokens.shape[0]
    x = weights["embed", -1][tokens] * spec.embedding_scale
    if spec.position_embeddings:
        x = x + weights["position_embed", -1][:count]
    for layer in range(spec.num_layers):
        h = _norm(spec, weights, "attn_norm", layer, x) if spec.pre_norms else x
        h = _attention(spec, weights, layer, h)
        x = x + (_norm(spec, weights, "attn_post_norm", layer, h) if spec.post_norms else h)
        h = _norm(spec, weights, "ffn_norm", layer, x) if spec.pre_norms else x
        h = _mlp(spec, weights, layer, h)
        x = x + (_norm(spec, weights, "ffn_post_norm", layer, h) if spec.post_norms else h)
    x = _norm(spec, weights, "final_norm", -1, x)
    head = weights["embed" if spec.tied_head else "head", -1]
    return dense.softcap(matmul(x, head), spec.final_softcap)


def _norm(spec: DecoderSpec, weights: Weights, slot: str, layer: int, x: Float64) -> Float64:
    if spec.norm == "rms":
        return dense.rms_norm(x, weights[slot, layer], spec.norm_eps)
    return dense.layer_norm(x, weights[slot, layer], weights.get((f"{slot}_bias", layer)), spec.norm_eps)


def _project(weights: Weights, slot: str, layer: int, x: Float64) -> Float64:
    return matmul(x, weights[slot, layer], weights.get((f"{slot}_bias", layer)))


def _attention(spec: DecoderSpec, weights: Weights, layer: int, x: Float64) -> Float64:
    count = x.shape[0]
    q = _project(weights, "q", layer, x).reshape(count, spec.num_heads, spec.head_dim)
    k = _project(weights, "k", layer, x).reshape(count, spec.num_kv_heads, spec.head_dim)
    v = _project(weights, "v", layer, x).reshape(count, spec.num_kv_heads, spec.head_dim)
    if spec.qk_norm:
        q = _norm(spec, weights, "q_norm", layer, q)
        k = _norm(spec, weights, "k_norm", layer, k)
    window = spec.layer_window(layer)
    if spec.rope_style == "half":
        if window and spec.rope_base_sliding:
            angles = dense.rope_angles(np.arange(count), spec.rotary_dim, spec.rope_base_sliding)
        else:
            angles = dense.rope_angles(
                np.arange(count),
                spec.rotary_dim,
                spec.rope_base,
                linear_factor=spec.rope_linear_factor,
                factors=spec.rope_factors,
            )
        q, k = dense.rope(q, angles), dense.rope(k, angles)
    out = attention(q, k, v, scale=spec.attention_scale, window=window, cap=spec.attn_softcap)
    return _project(weights, "o", layer, out.reshape(count, -1))


def _mlp(spec: DecoderSpec, weights: Weights, layer: int, x: Float64) -> Float64:
    activation = {"silu": dense.silu, "gelu": dense.gelu, "gelu_tanh": dense.gelu_tanh}[spec.activation]
    up = _project(weights, "up", layer, x)
    hidden = activation(_project(weights, "gate", layer, x)) * up if spec.gated_mlp else activation(up)
    return _project(weights, "down", layer, hidden)
