"""Tensor names as the two kinds of checkpoint spell them, for architectures that follow the common pattern.

An architecture that differs takes one of these and changes what differs (`dataclasses.replace`, `{**names,
...}`).
"""

from __future__ import annotations

from types import MappingProxyType

from fastllm.models.spec import TensorMap


def _with_biases(names: dict[str, str], slots: tuple[str, ...]) -> dict[str, str]:
    """Adds, for each named slot, the slot of its bias."""
    return names | {f"{slot}_bias": names[slot].removesuffix(".weight") + ".bias" for slot in slots}


_PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
_NORMS = ("attn_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm", "final_norm")

GGUF_NAMES = MappingProxyType(
    _with_biases(
        {
            "embed": "token_embd.weight",
            "position_embed": "position_embd.weight",
            "final_norm": "output_norm.weight",
            "head": "output.weight",
            "attn_norm": "blk.{i}.attn_norm.weight",
            "q": "blk.{i}.attn_q.weight",
            "k": "blk.{i}.attn_k.weight",
            "v": "blk.{i}.attn_v.weight",
            "q_norm": "blk.{i}.attn_q_norm.weight",
            "k_norm": "blk.{i}.attn_k_norm.weight",
            "o": "blk.{i}.attn_output.weight",
            "attn_post_norm": "blk.{i}.post_attention_norm.weight",
            "ffn_norm": "blk.{i}.ffn_norm.weight",
            "gate": "blk.{i}.ffn_gate.weight",
            "up": "blk.{i}.ffn_up.weight",
            "down": "blk.{i}.ffn_down.weight",
            "ffn_post_norm": "blk.{i}.post_ffw_norm.weight",
        },
        _PROJECTIONS + _NORMS,
    )
)

GGUF_TENSORS = TensorMap(
    names=GGUF_NAMES,
    # rope_freqs.weight is read into DecoderSpec.rope_factors, attn_rot_embd is a buffer of old converters.
    ignored=("rope_freqs.weight", "blk.*.attn_rot_embd.weight"),
)

HF_NAMES = MappingProxyType(
    _with_biases(
        {
            "embed": "model.embed_tokens.weight",
            "final_norm": "model.norm.weight",
            "head": "lm_head.weight",
            "attn_norm": "model.layers.{i}.input_layernorm.weight",
            "q": "model.layers.{i}.self_attn.q_proj.weight",
            "k": "model.layers.{i}.self_attn.k_proj.weight",
            "v": "model.layers.{i}.self_attn.v_proj.weight",
            "q_norm": "model.layers.{i}.self_attn.q_norm.weight",
            "k_norm": "model.layers.{i}.self_attn.k_norm.weight",
            "o": "model.layers.{i}.self_attn.o_proj.weight",
            "ffn_norm": "model.layers.{i}.post_attention_layernorm.weight",
            "gate": "model.layers.{i}.mlp.gate_proj.weight",
            "up": "model.layers.{i}.mlp.up_proj.weight",
            "down": "model.layers.{i}.mlp.down_proj.weight",
        },
        (*_PROJECTIONS, "attn_norm", "ffn_norm", "final_norm"),
    )
)

HF_TENSORS = TensorMap(names=HF_NAMES, ignored=("*.rotary_emb.inv_freq",))
