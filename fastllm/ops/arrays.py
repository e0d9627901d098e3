"""Arrays on their way to a kernel: contiguous, and with the number of dimensions that it takes.

Dtypes and shapes are checked by the core; what is no array is handed on for it to refuse.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fastllm.errors import RequestError

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
Int8Array = npt.NDArray[np.int8]
UInt8Array = npt.NDArray[np.uint8]

Scalar = TypeVar("Scalar", bound=np.generic)


def contiguous(value: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """The same values, C-contiguous; copied only if they are not."""
    return np.ascontiguousarray(value) if isinstance(value, np.ndarray) and value.ndim else value


def matrix(value: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """(..., D) as (M, D), contiguous."""
    if not isinstance(value, np.ndarray) or value.ndim == 0:
        return value
    return contiguous(value).reshape(math.prod(value.shape[:-1]), value.shape[-1])


def check_array(argument: str, value: object, wanted: str) -> None:
    """Raises RequestError unless the value is an array; for functions of the core that take nothing else."""
    if not isinstance(value, np.ndarray):
        raise RequestError(argument, describe(value), wanted)


def check_alike(call: str, **arrays: Float32Array) -> None:
    """Raises RequestError unless all arrays are float32, with the shape of the first."""
    first, model = next(iter(arrays.items()))
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.shape != np.shape(model):
            wanted = "float32" if array is model else f"float32 {np.shape(model)}, the shape of {first}"
            raise RequestError(f"{call}: {name}", describe(array), wanted)


def describe(value: object) -> str:
    """What a value is, for an error: "float64 (3, 4)", or its type."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return type(value).__name__
