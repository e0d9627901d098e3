"""Norms of rows: y = norm(x) * weight (+ bias) (+ residual), in fp32, rounded once.

    rms:    v = x / sqrt(mean(x^2) + eps)
    layer:  v = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps)

    x (M, K), weight and bias (K,), residual and y (M, K).  Grid: (M,)

A row is read once and stays in registers, of as many warps as that takes: K is at most 65536. What a norm
costs is its launch and one pass over the row, so the residual that a post norm's output joins is added here.
RMSNorm with the rows' quantization behind it is in `quantize.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def norm_kernel(
    x, weight, bias, residual, y, K, x_stride, residual_stride, y_stride, eps,
    LAYER: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS: the power of two from K on."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, COLUMNS)
    inside = k < K
    v = tl.load(x + row * x_stride + k, mask=inside, other=0.0).to(tl.float32)
    if LAYER:
        v = tl.where(inside, v - tl.sum(v) / K, 0.0)
    v = v * (1.0 / tl.sqrt_rn(tl.sum(v * v) / K + eps))
    v = v * tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        v += tl.load(bias + k, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        v += tl.load(residual + row * residual_stride + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * y_stride + k, v.to(y.dtype.element_ty), mask=inside)


def norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None,
    eps: float, *, layer: bool, dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """The norm of each row of x (M, K), whose arguments are checked; y in `dtype`, or that of x."""
    m, k = x.shape
    y = torch.empty(m, k, dtype=dtype or x.dtype, device=x.device)
    columns = triton.next_power_of_2(k)
    norm_kernel[(m,)](
        x, weight, x if bias is None else bias, x if residual is None else residual, y,
        k, x.stride(0), 0 if residual is None else residual.stride(0), y.stride(0), eps,
        LAYER=layer, BIAS=bias is not None, RESIDUAL=residual is not None, COLUMNS=columns,
        num_warps=min(16, max(1, columns // 1024)),
    )  # fmt: skip
    return y
