"""From a checkpoint's tensors to what an executor keeps of them, on a few threads.

Every tensor is packed straight from the mapped file, whose pages are released right after, so loading holds
little more than the packed weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from fastllm import _core
from fastllm.models.loader import SlotTensor, iter_tensors, to_float32
from fastllm.models.spec import DecoderSpec

if TYPE_CHECKING:
    from fastllm.formats.checkpoint import Checkpoint

FLOATS = ("F32", "F16", "BF16")
QUANTIZATION_GROUP = 32  # columns that share a scale where weights are quantized while loading

Packed = TypeVar("Packed")


def packed_slots(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    pack: Callable[[SlotTensor], Packed],
    threads: int,
) -> Iterator[tuple[str, int, Packed | npt.NDArray[np.float32]]]:
    """(slot, layer, weights) of every slot: vectors as float32, matrices as `pack` makes them.

    Args:
        pack: called on `threads` threads, at most two tensors per thread ahead; what it gives must not share
            the tensor's memory.

    Raises:
        FastLLMError: as `iter_tensors`.
    """
    pending: list[tuple[SlotTensor, Future[Packed]]] = []

    def finished() -> tuple[str, int, Packed]:
        entry, future = pending.pop(0)
        matrix = future.result()
        # A fused tensor's other parts may still be being packed from the same memory.
        if all(other.tensor.name != entry.tensor.name for other, _ in pending):
            checkpoint.release(entry.tensor.name)
        return entry.slot, entry.layer, matrix

    with ThreadPoolExecutor(threads, thread_name_prefix="fastllm-pack") as workers:
        for entry in iter_tensors(checkpoint, spec):
            if entry.slot == "rope_factors":  # part of the spec already
                continue
            if len(entry.tensor.shape) == 1:
                values = to_float32(entry.tensor)
                if entry.row_order is not None:
                    values = values[entry.row_order]
                yield entry.slot, entry.layer, np.ascontiguousarray(values)
                continue
            pending.append((entry, workers.submit(pack, entry)))
            if len(pending) > 2 * threads:
                yield finished()
        while pending:
            yield finished()


def pack_matrix(entry: SlotTensor, quantization: str | None) -> _core.PackedMatrix:
    """A matrix in the CPU core's layouts; "int4" or "int8" quantizes one of floating-point numbers first."""
    tensor = entry.tensor
    rows, cols = tensor.shape
    if quantization is not None and tensor.dtype in FLOATS:
        bits = 4 if quantization == "int4" and entry.slot not in ("embed", "head") else 8
        return _core.PackedMatrix.quantize(matrix_values(entry), bits, QUANTIZATION_GROUP)
    return _core.PackedMatrix.from_ggml(tensor.dtype, tensor.data, rows, cols, entry.row_order)


def matrix_values(entry: SlotTensor) -> npt.NDArray[Any]:
    """A floating-point matrix in the decoder's row order: float32, float16, or bf16 as uint16."""
    numpy_type = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[entry.tensor.dtype]
    values: npt.NDArray[Any] = entry.tensor.data.view(numpy_type).reshape(entry.tensor.shape)
    if entry.row_order is not None:
        values = values[entry.row_order]
    return np.ascontiguousarray(values)
