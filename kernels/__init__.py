"""Matmuls with packed weights on GPUs, in Triton (extra `[gpu]`: torch, triton).

    import torch
    from fastllm import kernels, ops

    w = kernels.from_packed(ops.quantize(weights, bits=4, group=128), "cuda")  # or ops.from_ggml("Q4_K", ...)
    y = kernels.matmul(x, w)                        # x: bfloat16 or float16 (..., K), y: (..., N)
    y = kernels.matmul(x, w8, activations="int8")   # 8-bit weights: quantizes each row of x, integer products

Importing this needs torch and triton, no GPU; with TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly.
Same inputs give the same bits from run to run. A wrong argument raises `RequestError`.
"""

from __future__ import annotations

from typing import Literal

try:
    import torch
    import triton  # noqa: F401  here to say what is missing
except ImportError as error:
    message = f"fastllm.kernels: needs the package {error.name} (pip install 'fastllm[gpu]')"
    raise ImportError(message, name=error.name) from error

from fastllm.errors import RequestError
from fastllm.kernels import library, products
from fastllm.kernels.layout import BLOCK, GpuMatrix, from_packed, interleave_rows, stack_rows, to_packed

__all__ = [
    "GpuMatrix",
    "dequantize",
    "from_packed",
    "interleave_rows",
    "matmul",
    "matmul_int8",
    "quantize_rows",
    "rms_norm_quantize",
    "stack_rows",
    "to_packed",
]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_COLUMNS_MAX = 65536  # of a row that quantize.py holds in registers


def matmul(
    x: torch.Tensor,
    w: GpuMatrix,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    paired: bool = False,
    activations: Literal["float", "int8"] = "float",
    deterministic: bool = False,
) -> torch.Tensor:
    """y = x w^T + bias, then SiLU(y[2i]) * y[2i + 1] if paired, then + residual; sums in fp32, rounded once.

    Args:
        x: float16, bfloat16 or float32 (..., K).
        w: (N, K), on the device of x.
        bias: (N,), dtype of x.
        residual: shaped as the result, dtype of x.
        paired: outputs 2i and 2i + 1 are a gate and its value (`interleave_rows`); the result
            has N / 2 columns.
        activations: "float": as they are, weights in x's dtype. "int8": each row of x is quantized first
            (`quantize_rows`) and products are integers; w must have 8-bit codes, with groups of 32 or more
            columns or a scale per row, and no minimums.
        deterministic: one path for every number of rows, so that a row of y depends on its row of x alone.

    Returns:
        (..., N), dtype of x.

    Raises:
        RequestError: a wrong dtype, shape or device, or weights that int8 activations do not go with.
    """
    _check_weights("matmul", w)
    rows = _rows("matmul: x", x, w.cols, w.device)
    if activations == "int8":
        q, scale = library.quantize_rows(rows, None, 0.0)
        y = _int8(q, scale, w, bias, residual, paired, x.dtype, deterministic, x.shape[:-1])
    elif activations == "float":
        bias, residual = _epilogue("matmul", w, bias, residual, paired, x.dtype, x.shape[:-1])
        y = library.weight_only_matmul(
            rows, w.codes, w.extra, w.scales, w.subscales, w.mins, w.submins, w.kind, w.cols, w.group, w.zero,
            bias, residual, paired, deterministic,
        )  # fmt: skip
    else:
        raise RequestError("matmul: activations", activations, '"float" or "int8"')
    return y.reshape(*x.shape[:-1], y.shape[1])


def matmul_int8(
    q: torch.Tensor,
    scale: torch.Tensor,
    w: GpuMatrix,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    paired: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    deterministic: bool = False,
) -> torch.Tensor:
    """`matmul` with rows that `quantize_rows` or `rms_norm_quantize` made.

    Args:
        q: int8 (M, K rounded up to 128).
        scale: float32 (M,).
        dtype: of the result, and of bias and residual.
    """
    _check_weights("matmul_int8", w)
    shape = (-1, w.blocks * BLOCK)
    if q.dtype != torch.int8 or q.ndim != 2 or q.shape[1] != shape[1] or not q.is_contiguous():
        raise RequestError("matmul_int8: q", _describe(q), f"contiguous int8 (M, {shape[1]})")
    if scale.dtype != torch.float32 or scale.shape != q.shape[:1] or not scale.is_contiguous():
        raise RequestError("matmul_int8: scale", _describe(scale), f"contiguous float32 ({q.shape[0]},)")
    if not q.device == scale.device == w.device:
        raise RequestError(
            "matmul_int8: q", f"{_describe(q)}, scale on {scale.device}", f"both on {w.device}"
        )
    return _int8(q, scale, w, bias, residual, paired, dtype, deterministic, q.shape[:1])


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as int8 with a scale each: scale = max |x| / 127, q = round half even (x / scale).

    Args:
        x: float16, bfloat16 or float32 (..., K), K at most 65536.

    Returns:
        q: int8 (M, K rounded up to 128), M all rows; its bytes are in the order of `layout.py`.
        scale: float32 (M,).
    """
    q, scale = library.quantize_rows(_rows("quantize_rows: x", x, None, None), None, 0.0)
    return q, scale


def rms_norm_quantize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` of x / sqrt(mean(x^2) + eps) * weight, in fp32 and in one pass.

    Args:
        x: float16, bfloat16 or float32 (..., K), K at most 65536.
        weight: (K,), of a floating-point dtype.
    """
    rows = _rows("rms_norm_quantize: x", x, None, None)
    if weight.dtype not in _FLOATS or weight.shape != x.shape[-1:] or weight.device != x.device:
        wanted = f"float16, bfloat16 or float32 ({x.shape[-1]},) on {x.device}"
        raise RequestError("rms_norm_quantize: weight", _describe(weight), wanted)
    q, scale = library.quantize_rows(rows, weight.contiguous(), eps)
    return q, scale


def dequantize(w: GpuMatrix, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weights as numbers, (N, K); in float32 bit for bit those of the format they were packed from."""
    _check_weights("dequantize", w)
    if dtype not in _FLOATS:
        raise RequestError("dequantize: dtype", str(dtype), "float16, bfloat16 or float32")
    values: torch.Tensor = library.dequantize(
        w.codes, w.extra, w.scales, w.subscales, w.mins, w.submins, w.kind, w.cols, w.group, w.zero, dtype
    )
    return values


def _int8(
    q: torch.Tensor,
    scale: torch.Tensor,
    w: GpuMatrix,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    paired: bool,
    dtype: torch.dtype,
    deterministic: bool,
    leading: torch.Size,
) -> torch.Tensor:
    if w.kind != "i8" or w.group == 16 or w.mins is not None:
        given = f"{w.kind} in groups of {w.group}" + (" with minimums" if w.mins is not None else "")
        wanted = (
            "8-bit codes, a scale per 32, 64 or 128 columns or per row, and no minimums, for int8 activations"
        )
        raise RequestError("matmul: w", given, wanted)
    bias, residual = _epilogue("matmul", w, bias, residual, paired, dtype, leading)
    y: torch.Tensor = library.int8_matmul(
        q,
        scale,
        w.codes,
        w.scales,
        w.subscales,
        w.cols,
        w.group,
        bias,
        residual,
        paired,
        dtype,
        deterministic,
    )
    return y


def _check_weights(call: str, w: object) -> None:
    if not isinstance(w, GpuMatrix):
        raise RequestError(f"{call}: w", type(w).__name__, "a GpuMatrix, as from_packed makes it")
    _check_runs(f"{call}: w", w.device)


def _check_runs(argument: str, device: torch.device) -> None:
    """Raises RequestError where no kernel runs."""
    if device.type != "cuda" and not products.INTERPRETED:
        raise RequestError(argument, f"on {device}", "on a CUDA device (or TRITON_INTERPRET=1, set before)")


def _rows(argument: str, x: torch.Tensor, cols: int | None, device: torch.device | None) -> torch.Tensor:
    """(..., K) as (M, K) with neighbouring columns."""
    if not isinstance(x, torch.Tensor):
        raise RequestError(argument, type(x).__name__, "a torch tensor")
    fits = x.dtype in _FLOATS and x.ndim >= 1 and x.shape[-1] == (cols or x.shape[-1]) and x.numel() > 0
    if (
        not fits
        or (device is not None and x.device != device)
        or (cols is None and x.shape[-1] > _COLUMNS_MAX)
    ):
        wanted = f"float16, bfloat16 or float32 (..., {cols or f'up to {_COLUMNS_MAX}'})"
        raise RequestError(argument, _describe(x), wanted + (f" on {device}" if device is not None else ""))
    _check_runs(argument, x.device)
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _epilogue(
    call: str,
    w: GpuMatrix,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    paired: bool,
    dtype: torch.dtype,
    leading: torch.Size,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Bias and residual, checked, the residual as (M, columns)."""
    if paired and w.rows % 2:
        raise RequestError(f"{call}: paired", f"{w.rows} outputs", "an even number of outputs")
    columns = w.rows // 2 if paired else w.rows
    for name, tensor, shape in (("bias", bias, (w.rows,)), ("residual", residual, (*leading, columns))):
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.shape != shape or tensor.device != w.device:
            raise RequestError(f"{call}: {name}", _describe(tensor), f"{dtype} {tuple(shape)} on {w.device}")
    if bias is not None:
        bias = bias.contiguous()
    if residual is not None:
        residual = residual.reshape(-1, columns)
        residual = residual if residual.stride(1) == 1 else residual.contiguous()
    return bias, residual


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
