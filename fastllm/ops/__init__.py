"""The kernels on NumPy arrays, for people who want only those.

    import numpy as np
    from fastllm import ops

    w = ops.quantize(np.random.randn(4096, 1024).astype(np.float32), bits=4)
    y = ops.matmul(x, w)                       # x: float32 (rows, 1024), y: float32 (rows, 4096)

Every function gives the same bits on every instruction set and with every number of threads, and changes no
argument. Arrays that are not contiguous are copied. A wrong dtype or shape raises `RequestError`, naming
the function, the argument, what it is and what was expected.
"""

from __future__ import annotations

from fastllm import _core
from fastllm._core import KvCache, PackedMatrix
from fastllm.ops.layers import (
    gelu_tanh_mul,
    hadamard,
    layer_norm,
    paged_attention,
    rms_norm,
    rope,
    rope_tables,
    silu_mul,
    softcap,
)
from fastllm.ops.matrices import (
    dequantize,
    dequantize_ggml,
    embedding,
    from_float,
    from_ggml,
    matmul,
    quantize,
    quantize_rows,
)
from fastllm.ops.sampling import Samples, sample

__all__ = [
    "KvCache",
    "PackedMatrix",
    "Samples",
    "dequantize",
    "dequantize_ggml",
    "embedding",
    "from_float",
    "from_ggml",
    "gelu_tanh_mul",
    "hadamard",
    "isa",
    "layer_norm",
    "matmul",
    "paged_attention",
    "quantize",
    "quantize_rows",
    "rms_norm",
    "rope",
    "rope_tables",
    "sample",
    "silu_mul",
    "softcap",
    "supported_isas",
]


def isa() -> str:
    """The instruction set in use: the best that this CPU runs, or the one that FASTLLM_ISA names.

    Raises:
        RequestError: FASTLLM_ISA names an unknown set, or one that this CPU does not run.
    """
    return _core.isa()


def supported_isas() -> list[str]:
    """The instruction sets that are built in and that this CPU runs, best first."""
    return _core.supported_isas()
