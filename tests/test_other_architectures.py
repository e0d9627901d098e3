"""What a `DecoderSpec` can say beyond the registry: Gemma 2, Phi 3 and GPT-2 as data.

Each is an architecture as `docs/add-a-model.md` describes one, and agrees with `transformers` through the
loader and the oracle. That keeps every field of the spec honest: soft-caps, post norms, layer norms with
biases, learned positions, fused and transposed projections, norms stored as an offset.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import transformers

from fastllm import reference
from fastllm.formats.checkpoint import Checkpoint, open_checkpoint
from fastllm.models.common import HF_HARMLESS, hf_decoder
from fastllm.models.hyperparameters import HyperParameters
from fastllm.models.loader import iter_tensors
from fastllm.models.spec import DecoderSpec, TensorMap
from fastllm.models.tensors import HF_NAMES, HF_TENSORS


def gemma2(params: HyperParameters, checkpoint: Checkpoint) -> DecoderSpec:
    params.expect("hidden_activation", "gelu_pytorch_tanh")
    params.expect("attention_bias", False)
    values = hf_decoder(params)
    layer = "model.layers.{i}."
    names = {
        **HF_NAMES,
        "attn_post_norm": layer + "post_attention_layernorm.weight",
        "ffn_norm": layer + "pre_feedforward_layernorm.weight",
        "ffn_post_norm": layer + "post_feedforward_layernorm.weight",
    }
    values["tensors"] = TensorMap(names, norm_offset=1.0)
    return DecoderSpec(
        architecture="gemma2",
        **values,
        post_norms=True,
        activation="gelu_tanh",
        embedding_scale=values["dim"] ** 0.5,
        attention_scale=params.integer("query_pre_attn_scalar") ** -0.5,
        attn_softcap=params.number("attn_logit_softcapping"),
        final_softcap=params.number("final_logit_softcapping"),
        sliding_window=params.integer("sliding_window"),
        sliding_layers=tuple(kind == "sliding_attention" for kind in params.strings("layer_types")),
    )


def phi3(params: HyperParameters, checkpoint: Checkpoint) -> DecoderSpec:
    values = hf_decoder(params)
    params.expect("original_max_position_embeddings", values["context_length"])
    params.expect("sliding_window")
    layer = "model.layers.{i}."
    names = {
        **HF_NAMES,
        "qkv": layer + "self_attn.qkv_proj.weight",
        "gate_up": layer + "mlp.gate_up_proj.weight",
    }
    return DecoderSpec(
        architecture="phi3", **values | {"tensors": dataclasses.replace(HF_TENSORS, names=names)}
    )


GPT2_HARMLESS = {  # pooling heads and training
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "attn_pdrop",
}


def gpt2(params: HyperParameters, checkpoint: Checkpoint) -> DecoderSpec:
    params.expect("activation_function", "gelu_new")
    params.expect("scale_attn_weights", True)
    params.expect("scale_attn_by_inverse_layer_idx", False)
    params.expect("reorder_and_upcast_attn", False)
    params.expect("add_cross_attention", False)
    params.expect("n_inner")
    dim, heads = params.integer("n_embd"), params.integer("n_head")
    layer = "transformer.h.{i}."
    modules = {
        "attn_norm": layer + "ln_1",
        "qkv": layer + "attn.c_attn",
        "o": layer + "attn.c_proj",
        "ffn_norm": layer + "ln_2",
        "up": layer + "mlp.c_fc",
        "down": layer + "mlp.c_proj",
        "final_norm": "transformer.ln_f",
    }
    names = {"embed": "transformer.wte.weight", "position_embed": "transformer.wpe.weight"}
    names |= {slot: module + ".weight" for slot, module in modules.items()}
    names |= {slot + "_bias": module + ".bias" for slot, module in modules.items()}
    return DecoderSpec(
        architecture="gpt2",
        source=params.source,
        vocab_size=params.integer("vocab_size"),
        dim=dim,
        num_layers=params.integer("n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim // heads,
        ffn_dim=4 * dim,
        context_length=params.integer("n_positions"),
        norm="layer",
        norm_eps=params.number("layer_norm_epsilon"),
        norm_bias=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        rope_style="none",
        rotary_dim=0,
        position_embeddings=True,
        activation="gelu_tanh",
        gated_mlp=False,
        tied_head=params.boolean("tie_word_embeddings"),
        tensors=TensorMap(names, transposed=frozenset({"qkv", "o", "up", "down"})),
    )


def make(kind: str) -> Any:
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64, **ids
        )
    elif kind == "phi3":
        config = transformers.Phi3Config(
            **tiny.SIZES, original_max_position_embeddings=256, sliding_window=None
        )
    else:
        config = transformers.Gemma2Config(
            **{**tiny.SIZES, "tie_word_embeddings": True},
            head_dim=32,
            query_pre_attn_scalar=24,
            sliding_window=5,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
        )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return tiny.randomize(model)


@pytest.mark.parametrize("build", [gemma2, phi3, gpt2], ids=lambda build: build.__name__)
def test_the_spec_says_enough(build: Any, tmp_path: Path) -> None:
    model, tokens = make(build.__name__), tiny.tokens(30)
    with open_checkpoint(tiny.save_hf(model, tmp_path)) as checkpoint:
        params = HyperParameters(checkpoint.config)
        spec = build(params, checkpoint)
        params.finish(HF_HARMLESS | GPT2_HARMLESS)
        ours = reference.decoder_forward(spec, reference.decoder_weights(checkpoint, spec), tokens)
    theirs = tiny.logits(model, tokens)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_parts_of_a_fused_projection_are_views(tmp_path: Path) -> None:
    with open_checkpoint(tiny.save_hf(make("phi3"), tmp_path)) as checkpoint:
        spec = phi3(HyperParameters(checkpoint.config), checkpoint)
        names = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
        seen = set()
        for slot, layer, tensor, _ in iter_tensors(checkpoint, spec):
            if slot in names:
                whole = checkpoint.tensors[spec.tensors.name(names[slot], layer)]
                assert np.shares_memory(tensor.data, whole.data)
                assert tensor.data.size == whole.data.size * tensor.shape[0] // whole.shape[0]
                seen.add(slot)
        assert seen == set(names)
