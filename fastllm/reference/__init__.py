"""The oracle: every operation of fastllm in float64, slow and obvious.

Nothing here is used to answer a request. Each function states its formula and computes just that with NumPy,
without a fast path, so that kernels, samplers and decoders can be held against it. Inputs of any
floating-point type are taken to float64 first; results are float64 unless the docstring says otherwise. The
exceptions are exact by nature: `dequantize`, `quantize_activations` and `hadamard` do the float32 arithmetic
that their formats define, bit for bit.

Shapes are checked by nothing but NumPy; this is not an API for users.
"""

from fastllm.reference.attention import attention, paged_attention
from fastllm.reference.decoder import decoder_forward, decoder_weights
from fastllm.reference.dense import (
    gelu,
    gelu_tanh,
    layer_norm,
    log_softmax,
    matmul,
    rms_norm,
    rope,
    rope_angles,
    silu,
    silu_mul,
    softcap,
    softmax,
)
from fastllm.reference.dequantization import BLOCK_SIZES, dequantize
from fastllm.reference.integer import (
    dequantize_activations,
    hadamard,
    integer_matmul,
    quantize_activations,
)
from fastllm.reference.philox import philox4x32_10, sample_uniform
from fastllm.reference.sampling import (
    apply_bias,
    apply_penalties,
    draw,
    rank,
    sampling_probabilities,
    top_logprobs,
)

__all__ = [
    "BLOCK_SIZES",
    "apply_bias",
    "apply_penalties",
    "attention",
    "decoder_forward",
    "decoder_weights",
    "dequantize",
    "dequantize_activations",
    "draw",
    "gelu",
    "gelu_tanh",
    "hadamard",
    "integer_matmul",
    "layer_norm",
    "log_softmax",
    "matmul",
    "paged_attention",
    "philox4x32_10",
    "quantize_activations",
    "rank",
    "rms_norm",
    "rope",
    "rope_angles",
    "sample_uniform",
    "sampling_probabilities",
    "silu",
    "silu_mul",
    "softcap",
    "softmax",
    "top_logprobs",
]
