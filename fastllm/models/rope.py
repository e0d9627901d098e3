"""Rotary position embedding: from a checkpoint's parameters to the numbers of a `DecoderSpec`.

Each function gives `rope_base`, `rope_linear_factor` and `rope_factors`. Plain rope, linear scaling, Llama
3's scaling by wavelength and explicit factors are all expressed by these three; anything else (yarn,
longrope, dynamic) is refused by name.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from fastllm.errors import ModelFileError
from fastllm.models.hyperparameters import HyperParameters
from fastllm.models.loader import to_float32

if TYPE_CHECKING:
    from fastllm.formats.checkpoint import Checkpoint


class Rope(TypedDict):
    """The rope params of a `DecoderSpec`."""

    rope_base: float
    rope_linear_factor: float
    rope_factors: tuple[float, ...]


def gguf_rope(params: HyperParameters, checkpoint: Checkpoint, rotary_dim: int) -> Rope:
    """From `rope.*` metadata and the tensor `rope_freqs.weight`.

    Raises:
        ModelFileError: a field has a wrong type or range, or the tensor a wrong shape.
        UnsupportedModelError: a scaling other than none and linear.
    """
    params.expect("rope.scaling.type", "none", "linear")
    params.expect("rope.scaling.attn_factor", 1.0, 1, 0.0)
    params.expect("rope.scaling.alpha", 0.0, 0)
    kind = params.string("rope.scaling.type", "linear")  # a factor without a type is linear
    legacy = params.number("rope.scale_linear", 1.0)
    factor = params.number("rope.scaling.factor", legacy)
    factors: tuple[float, ...] = ()
    if (tensor := checkpoint.tensors.get("rope_freqs.weight")) is not None:
        if tuple(tensor.shape) != (rotary_dim // 2,) or tensor.dtype != "F32":
            raise ModelFileError(
                params.source,
                f"expected F32 (rope.dimension_count/2 = {rotary_dim // 2}), "
                f"found {tensor.dtype} {tuple(tensor.shape)}",
                tensor=tensor.name,
            )
        factors = tuple(float(f) for f in to_float32(tensor))
    return Rope(
        rope_base=params.number("rope.freq_base", 10000.0),
        rope_linear_factor=1.0 if kind == "none" else factor,
        rope_factors=factors,
    )


def hf_rope(params: HyperParameters, rotary_dim: int, context_length: int) -> Rope:
    """From `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (before).

    Raises:
        ModelFileError: a field has a wrong type or range.
        UnsupportedModelError: a scaling other than default, linear and llama3, or a partial rotation.
    """
    scaling = params.section("rope_scaling" if params.has("rope_scaling") else "rope_parameters")
    kind = scaling.string("rope_type", scaling.string("type", "default"))
    scaling.expect("rope_type", "default", "linear", "llama3")
    scaling.expect("type", "default", "linear", "llama3")
    scaling.expect("partial_rotary_factor", 1.0, 1)
    params.expect("partial_rotary_factor", 1.0, 1)
    base = scaling.number("rope_theta", params.number("rope_theta", 10000.0))
    linear = 1.0
    factors: tuple[float, ...] = ()
    if kind == "linear":
        linear = scaling.number("factor")
    elif kind == "llama3":
        original = scaling.integer("original_max_position_embeddings", context_length)
        factors = llama3_factors(
            base,
            rotary_dim,
            factor=scaling.number("factor"),
            low_freq_factor=scaling.number("low_freq_factor"),
            high_freq_factor=scaling.number("high_freq_factor"),
            original_context=params.integer("original_max_position_embeddings", original),
        )
    scaling.finish()
    return Rope(rope_base=base, rope_linear_factor=linear, rope_factors=factors)


def llama3_factors(
    base: float,
    rotary_dim: int,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_context: int,
) -> tuple[float, ...]:
    """The divisors of the rotation frequencies that Llama 3.1 introduced.

    With wavelength w = 2 pi base^(2 i / rotary_dim): 1 where w < original_context / high_freq_factor,
    `factor` where w > original_context / low_freq_factor, and in between 1 / ((1 - s) / factor + s) with
    s = (original_context / w - low_freq_factor) / (high_freq_factor - low_freq_factor).

    Returns:
        rotary_dim / 2 values, rounded to float32.
    """
    factors = []
    for i in range(rotary_dim // 2):
        wavelength = 2.0 * math.pi * base ** (2 * i / rotary_dim)
        if wavelength < original_context / high_freq_factor:
            divisor = 1.0
        elif wavelength > original_context / low_freq_factor:
            divisor = factor
        else:
            span = high_freq_factor - low_freq_factor
            smooth = (original_context / wavelength - low_freq_factor) / span if span else 0.0
            divisor = 1.0 / ((1.0 - smooth) / factor + smooth)
        factors.append(float(np.float32(divisor)))
    return tuple(factors)
