"""The decoder's slots: every weight that a spec calls for, with its shape.

A slot has the same name for every architecture, both checkpoint kinds and both backends. Matrices are
(outputs, inputs), row-major. Shapes are symbolic, so that a message can say which size is wrong.
"""

from __future__ import annotations

from typing import NamedTuple

from fastllm.models.spec import DecoderSpec

FUSED: dict[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "gate_up": ("gate", "up"),
    "gate_up_bias": ("gate_bias", "up_bias"),
}
"""Slots that a checkpoint may keep as one tensor: the parts' rows one after the other, in this order."""

NORM_WEIGHTS = frozenset(
    {"attn_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm", "q_norm", "k_norm", "final_norm"}
)
"""The slots that `TensorMap.norm_offset` concerns."""


class Slot(NamedTuple):
    """One weight: `shape` names its sizes (keys of `sizes`), a vector has one."""

    name: str
    shape: tuple[str, ...]
    per_layer: bool


def sizes(spec: DecoderSpec) -> dict[str, int]:
    """The sizes that shapes are made of."""
    return {
        "vocab_size": spec.vocab_size,
        "dim": spec.dim,
        "num_heads*head_dim": spec.num_heads * spec.head_dim,
        "num_kv_heads*head_dim": spec.num_kv_heads * spec.head_dim,
        "head_dim": spec.head_dim,
        "ffn_dim": spec.ffn_dim,
        "context_length": spec.context_length,
    }


def decoder_slots(spec: DecoderSpec) -> list[Slot]:
    """Every slot that a decoder of this spec needs, `rope_factors` apart: those are part of the spec."""
    q_dim, kv_dim = "num_heads*head_dim", "num_kv_heads*head_dim"
    slots = [Slot("embed", ("vocab_size", "dim"), False)]

    def layer(present: bool, **shapes: tuple[str, ...]) -> None:
        if present:
            slots.extend(Slot(name, shape, True) for name, shape in shapes.items())

    if spec.position_embeddings:
        slots.append(Slot("position_embed", ("context_length", "dim"), False))
    layer(spec.pre_norms, attn_norm=("dim",))
    layer(spec.pre_norms and spec.norm_bias, attn_norm_bias=("dim",))
    layer(True, q=(q_dim, "dim"), k=(kv_dim, "dim"), v=(kv_dim, "dim"))
    layer(spec.qkv_bias, q_bias=(q_dim,), k_bias=(kv_dim,), v_bias=(kv_dim,))
    layer(spec.qk_norm, q_norm=("head_dim",), k_norm=("head_dim",))
    layer(True, o=("dim", q_dim))
    layer(spec.o_bias, o_bias=("dim",))
    layer(spec.post_norms, attn_post_norm=("dim",))
    layer(spec.post_norms and spec.norm_bias, attn_post_norm_bias=("dim",))
    layer(spec.pre_norms, ffn_norm=("dim",))
    layer(spec.pre_norms and spec.norm_bias, ffn_norm_bias=("dim",))
    layer(spec.gated_mlp, gate=("ffn_dim", "dim"))
    layer(True, up=("ffn_dim", "dim"), down=("dim", "ffn_dim"))
    layer(spec.gated_mlp and spec.mlp_bias, gate_bias=("ffn_dim",))
    layer(spec.mlp_bias, up_bias=("ffn_dim",), down_bias=("dim",))
    layer(spec.post_norms, ffn_post_norm=("dim",))
    layer(spec.post_norms and spec.norm_bias, ffn_post_norm_bias=("dim",))
    slots.append(Slot("final_norm", ("dim",), False))
    if spec.norm_bias:
        slots.append(Slot("final_norm_bias", ("dim",), False))
    if not spec.tied_head:
        slots.append(Slot("head", ("vocab_size", "dim"), False))
    return slots
