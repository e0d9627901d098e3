"""Qwen 2 and 2.5: Llama's shape with biases on q, k and v."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastllm.models.architecture import Architecture
from fastllm.models.common import gguf_decoder, hf_decoder, hf_qwen_windows
from fastllm.models.hyperparameters import HyperParameters
from fastllm.models.spec import DecoderSpec

if TYPE_CHECKING:
    from fastllm.formats.checkpoint import Checkpoint


def from_gguf(params: HyperParameters, checkpoint: Checkpoint) -> DecoderSpec:
    """From a GGUF file of architecture "qwen2"."""
    return DecoderSpec(architecture="qwen2", **gguf_decoder(params, checkpoint), qkv_bias=True)


def from_hf(params: HyperParameters, checkpoint: Checkpoint) -> DecoderSpec:
    """From a directory with `Qwen2ForCausalLM` in its `config.json`."""
    values = hf_decoder(params)
    values.update(hf_qwen_windows(params, values["num_layers"]))
    return DecoderSpec(architecture="qwen2", **values, qkv_bias=True)


ARCHITECTURE = Architecture(
    name="qwen2", gguf=("qwen2",), hf=("Qwen2ForCausalLM",), from_gguf=from_gguf, from_hf=from_hf
)
