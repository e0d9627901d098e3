"""Llama and what shares its shape: Llama 1 to 3 with its rope scaling, Mistral, SmolLM2.

RMS norms before attention and MLP, rope, grouped queries, SwiGLU; optional biases. llama.cpp's converter
permutes the rows of q and k of these models so that rotating pairs are neighbours, hence the row order of
GGUF files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastllm.models.architecture import Architecture
from fastllm.models.common import gguf_decoder, hf_decoder
from fastllm.models.hyperparameters import HyperParameters
from fastllm.models.spec import DecoderSpec

if TYPE_CHECKING:
    from fastllm.formats.checkpoint import Checkpoint


def from_gguf(params: HyperParameters, checkpoint: Checkpoint) -> DecoderSpec:
    """From a GGUF file of architecture "llama"; biases are there when the first layer has them."""

    def has(part: str) -> bool:
        return f"blk.0.{part}.bias" in checkpoint.tensors

    return DecoderSpec(
        architecture="llama",
        **gguf_decoder(params, checkpoint),
        qk_row_order="interleaved",
        qkv_bias=has("attn_q"),
        o_bias=has("attn_output"),
        mlp_bias=has("ffn_up"),
    )


def from_hf(params: HyperParameters, checkpoint: Checkpoint) -> DecoderSpec:
    """From a directory with `LlamaForCausalLM` or `MistralForCausalLM` in its `config.json`."""
    values = hf_decoder(params)
    attention_bias = params.boolean("attention_bias", False)
    if params.strings("architectures") == ["MistralForCausalLM"]:
        # Null switches the window off; a configuration without the field means Mistral's own default.
        window = params.integer("sliding_window", 0 if params.given("sliding_window") else 4096, least=0)
        values.update(sliding_window=window, sliding_layers=(True,) * values["num_layers"] if window else ())
    return DecoderSpec(
        architecture="llama",
        **values,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=params.boolean("mlp_bias", False),
    )


ARCHITECTURE = Architecture(
    name="llama",
    gguf=("llama",),
    hf=("LlamaForCausalLM", "MistralForCausalLM"),
    from_gguf=from_gguf,
    from_hf=from_hf,
)
