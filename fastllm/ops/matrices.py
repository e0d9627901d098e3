"""Packed weight matrices, and what is computed with them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard, cast, overload

import numpy.typing as npt

from fastllm import _core
from fastllm._core import PackedMatrix
from fastllm.errors import RequestError
from fastllm.ops.arrays import (
    Float32Array,
    Int8Array,
    Int32Array,
    UInt8Array,
    check_array,
    contiguous,
    describe,
)

if TYPE_CHECKING:
    import torch

    from fastllm.kernels import GpuMatrix

FloatArray = npt.NDArray[Any]  # float32, float16, or uint16 holding bf16 bits
_WEIGHTS = "a 2-D array of float32, float16 or uint16 (bf16 bits)"


def quantize(w: FloatArray, bits: int = 4, group: int = 32) -> PackedMatrix:
    """Quantize a weight matrix.

    With 4 bits a weight becomes scale * code + min, code in 0..15, scale and min (fp16, one each per group)
    fitted for least squared error. With 8 bits it becomes scale * code, code in -127..127, scale (fp16) =
    largest magnitude of the group / 127.

    Args:
        w: (N, K) = (outputs, inputs): float32, float16, or uint16 holding bf16 bits.
        bits: 4 or 8.
        group: columns that share a scale: 16, 32, 64 or 128, the last group of a row may be shorter;
            with 8 bits also 0, a scale per row.

    Returns:
        (N, K); about bits + 32 / group (4 bits) or bits + 16 / group (8 bits) bits per weight.

    Raises:
        RequestError: a wrong dtype, shape, bits or group; a weight that is not finite, or too large for an
            fp16 scale, with its row and column.
    """
    check_array("quantize: array", w, _WEIGHTS)
    return PackedMatrix.quantize(contiguous(w), bits, group)


def from_float(w: FloatArray, dtype: str = "f16") -> PackedMatrix:
    """Pack a weight matrix as floating-point numbers.

    Args:
        w: (N, K): float32, float16, or uint16 holding bf16 bits.
        dtype: "f32", "f16" or "bf16"; rounded to the nearest, ties to even, where it is narrower.

    Raises:
        RequestError: a wrong dtype or shape; a finite value beyond fp16's range with dtype "f16".
    """
    check_array("from_float: array", w, _WEIGHTS)
    return PackedMatrix.from_float(contiguous(w), dtype)


def from_ggml(
    dtype: str, data: UInt8Array, rows: int, cols: int, row_order: Int32Array | None = None
) -> PackedMatrix:
    """Pack a matrix as a GGUF file stores it, without loss.

    Args:
        dtype: the tensor type as GGUF spells it: "Q4_0", "Q4_1", "Q6_K", "IQ4_XS", "BF16", ...
        data: uint8 (nbytes,): the tensor's bytes; may be a read-only view of a mapped file.
        rows, cols: N and K; cols a multiple of the type's block.
        row_order: int32 (rows,): row i of the result is row row_order[i] of the data. None: as they are.

    Raises:
        RequestError: an unknown type, a byte count that does not fit, a row out of range.
    """
    check_array("from_ggml: data", data, "a 1-D array of uint8")
    if row_order is not None:
        check_array("from_ggml: row_order", row_order, "a 1-D array of int32, or None")
    return PackedMatrix.from_ggml(
        dtype, contiguous(data), rows, cols, None if row_order is None else contiguous(row_order)
    )


@overload
def dequantize(w: PackedMatrix) -> Float32Array: ...
@overload
def dequantize(w: GpuMatrix) -> torch.Tensor: ...
def dequantize(w: PackedMatrix | GpuMatrix) -> Float32Array | torch.Tensor:
    """The values of a packed matrix, float32 (N, K): bit for bit those of the format it was packed from.

    Of a `fastllm.kernels.GpuMatrix` as a tensor on its device.
    """
    if _is_tensor_matrix(w):
        from fastllm import kernels

        return kernels.dequantize(w)
    _check_packed("dequantize", w)
    return cast(PackedMatrix, w).unpack()


def dequantize_ggml(dtype: str, data: UInt8Array, rows: int, cols: int) -> Float32Array:
    """The values of a matrix as a GGUF file stores it, float32 (rows, cols). Arguments: see `from_ggml`."""
    check_array("dequantize_ggml: data", data, "a 1-D array of uint8")
    return _core.dequantize_ggml(dtype, contiguous(data), rows, cols)


def quantize_rows(x: Float32Array) -> tuple[Int8Array, Float32Array]:
    """Quantize activations as `matmul` does before it multiplies with a quantized matrix.

    In each row, each group of 16 columns has a scale of its own: scale = max |x| / 127, q = round(x / scale);
    a group of zeros has scale 0. So x is about q * scale, to within scale / 2.

    Args:
        x: float32 (M, K).

    Returns:
        q: int8 (M, kp), kp = K rounded up to a multiple of 32, zero past K.
        scale: float32 (M, kp / 16).
    """
    return _core.quantize_rows(contiguous(x))


@overload
def matmul(
    x: Float32Array, w: PackedMatrix, residual: Float32Array | None = None, *, threads: int = 0
) -> Float32Array: ...
@overload
def matmul(x: torch.Tensor, w: GpuMatrix, residual: torch.Tensor | None = None) -> torch.Tensor: ...
def matmul(x: Any, w: Any, residual: Any = None, *, threads: int = 0) -> Any:
    """y = x w^T + residual.

    With a torch tensor x and a `fastllm.kernels.GpuMatrix` w it is `fastllm.kernels.matmul`, which has more
    options; what follows is the CPU's.

    With a quantized w the activations are quantized first, see `quantize_rows`; products and sums within a
    group are exact integers, and groups are added in ascending order by fp32 fused multiply-adds. A row of y
    depends on its own row of x alone.

    Args:
        x: float32 (M, K).
        w: (N, K).
        residual: float32 (M, N), added to the product; None: nothing.
        threads: 0 takes all processors that the process may use.

    Returns:
        float32 (M, N).
    """
    if _is_tensor(x) or _is_tensor_matrix(w):
        from fastllm import kernels

        if not _is_tensor(x):
            raise RequestError("matmul: x", f"{describe(x)} with a GpuMatrix", "a tensor on the device of w")
        if not _is_tensor_matrix(w):
            raise RequestError(
                "matmul: w", describe(w), "a GpuMatrix beside a tensor, as kernels.from_packed makes it"
            )
        return kernels.matmul(x, w, residual=residual)
    _check_packed("matmul", w)
    return _core.matmul(contiguous(x), w, None if residual is None else contiguous(residual), threads=threads)


def embedding(w: PackedMatrix, ids: Int32Array) -> Float32Array:
    """Rows of a packed matrix, exactly as its format decodes them.

    Args:
        w: (N, K).
        ids: int32 (T,), each in 0..N-1.

    Returns:
        float32 (T, K).
    """
    _check_packed("embedding", w)
    return _core.embedding(w, contiguous(ids))


def _is_tensor(x: object) -> bool:
    """Without importing torch: who has a tensor has imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _is_tensor_matrix(w: object) -> TypeGuard[GpuMatrix]:
    kernels = sys.modules.get("fastllm.kernels")
    return kernels is not None and isinstance(w, kernels.GpuMatrix)


def _check_packed(call: str, w: object) -> None:
    if not isinstance(w, PackedMatrix):
        raise RequestError(f"{call}: w", describe(w), "a PackedMatrix, as quantize and from_float make it")
