"""The kernels as operators of torch, so that torch.compile sees through them: namespace `fastllm`.

Arguments arrive checked (`fastllm.kernels`); the fake implementations give shapes and dtypes alone.
"""

# No postponed annotations here: torch reads an operator's schema from them.

import torch
from torch import Tensor

from fastllm.kernels import products
from fastllm.kernels.layout import BLOCK, GpuMatrix


@torch.library.custom_op("fastllm::weight_only_matmul", mutates_args=())
def weight_only_matmul(
    x: Tensor, codes: Tensor, extra: Tensor | None, scales: Tensor, subscales: Tensor | None,
    mins: Tensor | None, submins: Tensor | None, kind: str, cols: int, group: int, zero: int,
    bias: Tensor | None, residual: Tensor | None, paired: bool, deterministic: bool,
) -> Tensor:  # fmt: skip
    w = GpuMatrix(kind, codes.shape[1], cols, group, zero, codes, extra, scales, subscales, mins, submins)
    return products.choose_weight_only(x, w, bias, residual, paired, deterministic)


@weight_only_matmul.register_fake
def _(x, codes, *rest):  # type: ignore[no-untyped-def]
    rows, paired = codes.shape[1], rest[-2]
    return x.new_empty(x.shape[0], rows // 2 if paired else rows)


@torch.library.custom_op("fastllm::int8_matmul", mutates_args=())
def int8_matmul(
    q: Tensor, scale: Tensor, codes: Tensor, scales: Tensor, subscales: Tensor | None, cols: int, group: int,
    bias: Tensor | None, residual: Tensor | None, paired: bool, dtype: torch.dtype, deterministic: bool,
) -> Tensor:  # fmt: skip
    w = GpuMatrix("i8", codes.shape[1], cols, group, 0, codes, None, scales, subscales, None, None)
    return products.choose_int8(q, scale, w, bias, residual, paired, dtype, deterministic)


@int8_matmul.register_fake
def _(q, scale, codes, scales, subscales, cols, group, bias, residual, paired, dtype, deterministic):  # type: ignore[no-untyped-def]  # fmt: skip
    rows = codes.shape[1]
    return q.new_empty(q.shape[0], rows // 2 if paired else rows, dtype=dtype)


@torch.library.custom_op("fastllm::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return products.quantize_rows(x, weight, eps)


@quantize_rows.register_fake
def _(x, weight, eps):  # type: ignore[no-untyped-def]
    stored = (x.shape[1] + BLOCK - 1) // BLOCK * BLOCK
    return x.new_empty(x.shape[0], stored, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("fastllm::dequantize", mutates_args=())
def dequantize(
    codes: Tensor, extra: Tensor | None, scales: Tensor, subscales: Tensor | None, mins: Tensor | None,
    submins: Tensor | None, kind: str, cols: int, group: int, zero: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    w = GpuMatrix(kind, codes.shape[1], cols, group, zero, codes, extra, scales, subscales, mins, submins)
    return products.dequantize(w, dtype)


@dequantize.register_fake
def _(codes, extra, scales, subscales, mins, submins, kind, cols, group, zero, dtype):  # type: ignore[no-untyped-def]
    return codes.new_empty(codes.shape[1], cols, dtype=dtype)
