"""Qwen 3: Llama's shape with normalised queries and keys, and heads whose width is independent of `dim`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastllm.models.architecture import Architecture
from fastllm.models.common import gguf_decoder, hf_decoder, hf_qwen_windows
from fastllm.models.hyperparameters import HyperParameters
from fastllm.models.spec import DecoderSpec

if TYPE_CHECKING:
    from fastllm.formats.checkpoint import Checkpoint


def from_gguf(params: HyperParameters, checkpoint: Checkpoint) -> DecoderSpec:
    """From a GGUF file of architecture "qwen3"."""
    return DecoderSpec(
        architecture="qwen3",
        **gguf_decoder(params, checkpoint),
        qk_norm=True,
        qkv_bias="blk.0.attn_q.bias" in checkpoint.tensors,
        o_bias="blk.0.attn_output.bias" in checkpoint.tensors,
    )


def from_hf(params: HyperParameters, checkpoint: Checkpoint) -> DecoderSpec:
    """From a directory with `Qwen3ForCausalLM` in its `config.json`."""
    values = hf_decoder(params)
    values.update(hf_qwen_windows(params, values["num_layers"]))
    attention_bias = params.boolean("attention_bias", False)
    return DecoderSpec(
        architecture="qwen3", **values, qk_norm=True, qkv_bias=attention_bias, o_bias=attention_bias
    )


ARCHITECTURE = Architecture(
    name="qwen3", gguf=("qwen3",), hf=("Qwen3ForCausalLM",), from_gguf=from_gguf, from_hf=from_hf
)
