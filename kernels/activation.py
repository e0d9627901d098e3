"""The MLP's activation: y = act(gate) * up, or act(x) without a gate, in fp32, rounded once.

    silu(v) = v / (1 + exp(-v))
    gelu(v) = v / 2 (1 + erf(v / sqrt 2))
    gelu_tanh(v) = v / 2 (1 + tanh(sqrt(2 / pi) (v + 0.044715 v^3)))

    gated: x (M, 2 F), columns 2i and 2i + 1 are a gate and its value (`interleave_rows`); y (M, F)
    else:  x (M, F); y (M, F).  Grid: (M, tiles of F)

Where weights are quantized and the activation is SiLU, the product before does this itself (`epilogue.py`,
PAIRED); this is for the others, and for products whose outputs an adapter adds to first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

COLUMNS = 1024  # of a program


@triton.jit
def _logistic(v):
    """1 / (1 + exp(-v)), without an infinity on the way."""
    e = tl.exp(-tl.abs(v))
    return tl.where(v < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def activate(v, KIND: tl.constexpr):
    if KIND == "silu":
        v = v * _logistic(v)
    elif KIND == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    else:
        # 1 + tanh(u) = 2 logistic(2 u); from 20 on that is 0 or 2, and the cube stays finite
        w = tl.minimum(tl.maximum(v, -20.0), 20.0)
        v = v * _logistic(1.5957691216057308 * (w + 0.044715 * w * w * w))
    return v


@triton.jit
def activation_kernel(
    x, y, F, x_stride, y_stride, KIND: tl.constexpr, GATED: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * COLUMNS
    f = first + tl.arange(0, COLUMNS)
    if GATED:
        pairs = 2 * first + tl.arange(0, 2 * COLUMNS)
        both = tl.load(x + row * x_stride + pairs, mask=pairs < 2 * F, other=0.0).to(tl.float32)
        gate, up = both.reshape(COLUMNS, 2).split()
        v = activate(gate, KIND) * up
    else:
        v = activate(tl.load(x + row * x_stride + f, mask=f < F, other=0.0).to(tl.float32), KIND)
    tl.store(y + row * y_stride + f, v.to(y.dtype.element_ty), mask=f < F)


def activation(x: torch.Tensor, kind: str, *, gated: bool) -> torch.Tensor:
    """act(x), whose arguments are checked. kind: "silu", "gelu" or "gelu_tanh"."""
    m = x.shape[0]
    f = x.shape[1] // 2 if gated else x.shape[1]
    y = x.new_empty(m, f)
    columns = min(COLUMNS, triton.next_power_of_2(f))
    activation_kernel[(m, triton.cdiv(f, columns))](
        x, y, f, x.stride(0), y.stride(0), KIND=kind, GATED=gated, COLUMNS=columns, num_warps=4
    )
    return y
