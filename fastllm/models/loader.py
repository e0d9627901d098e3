"""From a checkpoint's tensors to the decoder's slots.

Everything is checked before the first tensor is handed out: each slot of the spec has its tensor, with the
shape that the spec's sizes call for, and each tensor of the checkpoint has its slot. Quantized data stays as
it is on disk; a fused projection is cut into its parts without a copy, since parts are whole rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from fastllm.errors import ModelFileError, UnsupportedModelError
from fastllm.formats.checkpoint import CheckpointTensor
from fastllm.models.slots import FUSED, NORM_WEIGHTS, Slot, decoder_slots, sizes
from fastllm.models.spec import DecoderSpec

if TYPE_CHECKING:
    from fastllm.formats.checkpoint import Checkpoint

_SHOWN = 8  # names listed in a message

_FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_MATRIX_TYPES = frozenset(
    "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split()  # noqa: SIM905
)
_REORDERED = frozenset({"q", "k", "q_bias", "k_bias"})


class SlotTensor(NamedTuple):
    """One weight on its way into the decoder.

    Attributes:
        slot: slot name, see `slots.py`.
        layer: layer number, -1 for a slot outside the layers.
        tensor: name, row-major shape, ggml dtype and bytes. Not necessarily a tensor of the file as it
            stands: it may be a part of one, or made from the spec.
        row_order: the decoder's row i is row `row_order[i]` of `tensor`; None when they are the same.
    """

    slot: str
    layer: int
    tensor: CheckpointTensor
    row_order: npt.NDArray[np.int32] | None


class _Plan(NamedTuple):
    """One tensor of the checkpoint and the slots that it fills, in the order of its rows."""

    name: str
    layer: int
    slots: tuple[Slot, ...]
    transposed: bool


def iter_tensors(checkpoint: Checkpoint, spec: DecoderSpec, *, release: bool = False) -> Iterator[SlotTensor]:
    """All weights of a decoder, slot by slot.

    Slots outside the layers come first, then the layers in ascending order. A tied head is not among them:
    the decoder uses `embed`. `rope_factors`, if the spec has them, come as an F32 vector of rotary_dim / 2
    values.

    Args:
        checkpoint: what `spec` was made from.
        spec: from `registry.spec_from_checkpoint`.
        release: let go of a tensor's pages as soon as the next one is asked for; what was yielded before must
            not be used any more then.

    Raises:
        ModelFileError: a tensor is missing, superfluous, or of the wrong shape.
        UnsupportedModelError: a tensor has a type that is not implemented for it: vectors, and matrices that
            are stored transposed, must be floating-point.
    """
    plans = list(_plan(spec))
    _check(checkpoint, spec, plans)
    return _iterate(checkpoint, spec, plans, release)


def _iterate(
    checkpoint: Checkpoint, spec: DecoderSpec, plans: list[_Plan], release: bool
) -> Iterator[SlotTensor]:
    if spec.rope_factors:
        factors = np.asarray(spec.rope_factors, dtype=np.float32)
        yield SlotTensor("rope_factors", -1, _float_tensor("rope_factors", factors), None)
    order = interleaved_row_order(spec.head_dim, spec.rotary_dim)
    for plan in plans:
        whole = checkpoint.tensors[plan.name]
        if plan.transposed:
            whole = _transposed(whole)
        row = 0
        for slot in plan.slots:
            rows = sizes(spec)[slot.shape[0]]
            tensor = whole if len(plan.slots) == 1 else whole.rows(row, rows)
            row += rows
            if slot.name in NORM_WEIGHTS and spec.tensors.norm_offset:
                weight = to_float32(tensor) + np.float32(spec.tensors.norm_offset)
                tensor = _float_tensor(tensor.name, weight)
            row_order = None
            if spec.qk_row_order == "interleaved" and slot.name in _REORDERED:
                heads = np.arange(rows // spec.head_dim, dtype=np.int32)[:, None] * np.int32(spec.head_dim)
                row_order = np.ascontiguousarray((heads + order).reshape(-1))
            yield SlotTensor(slot.name, plan.layer, tensor, row_order)
        if release:
            checkpoint.release(plan.name)


def interleaved_row_order(head_dim: int, rotary_dim: int) -> npt.NDArray[np.int32]:
    """Where "half" row i of one head lies when its rotating pairs are neighbours.

    half[i] = interleaved[2 i], half[i + rotary_dim / 2] = interleaved[2 i + 1] for i < rotary_dim / 2; the
    rows past rotary_dim stay.

    Returns:
        int32 (head_dim,), a permutation.
    """
    order = np.arange(head_dim, dtype=np.int32)
    order[: rotary_dim // 2] = np.arange(0, rotary_dim, 2)
    order[rotary_dim // 2 : rotary_dim] = np.arange(1, rotary_dim, 2)
    return order


def to_float32(tensor: CheckpointTensor) -> npt.NDArray[np.float32]:
    """The values of an F32, F16 or BF16 tensor, in its shape; exact.

    Raises:
        UnsupportedModelError: another dtype.
    """
    if tensor.dtype == "F32":
        values = tensor.data.view(np.float32)
    elif tensor.dtype == "F16":
        values = tensor.data.view(np.float16).astype(np.float32)
    elif tensor.dtype == "BF16":
        values = (tensor.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        raise UnsupportedModelError(f"tensor {tensor.name}: expected F32, F16 or BF16, got {tensor.dtype}")
    return values.reshape(tensor.shape)


def _plan(spec: DecoderSpec) -> Iterator[_Plan]:
    """Which tensor fills which slots, from the spec alone."""
    slots = {slot.name: slot for slot in decoder_slots(spec)}
    groups: list[tuple[str, tuple[Slot, ...]]] = []
    for fused, parts in FUSED.items():
        if fused in spec.tensors.names and all(part in slots for part in parts):
            groups.append((fused, tuple(slots.pop(part) for part in parts)))
    groups += [(name, (slot,)) for name, slot in slots.items()]
    for layer in range(-1, spec.num_layers):
        for name, members in groups:
            if members[0].per_layer == (layer >= 0):
                yield _Plan(spec.tensors.name(name, layer), layer, members, name in spec.tensors.transposed)


def _check(checkpoint: Checkpoint, spec: DecoderSpec, plans: list[_Plan]) -> None:
    path = str(checkpoint.path)
    missing = [plan.name for plan in plans if plan.name not in checkpoint.tensors]
    if missing:
        raise ModelFileError(path, f"missing tensors: {_listed(missing)}")
    planned = {plan.name for plan in plans}
    if spec.tied_head and "head" in spec.tensors.names:
        planned.add(spec.tensors.name("head", -1))
    ignored = spec.tensors.ignored
    unknown = [
        name
        for name in checkpoint.tensors
        if name not in planned and not any(fnmatchcase(name, pattern) for pattern in ignored)
    ]
    if unknown:
        raise ModelFileError(path, f"tensors that {spec.architecture} has no place for: {_listed(unknown)}")
    for plan in plans:
        _check_shape(path, spec, plan, checkpoint.tensors[plan.name])


def _check_shape(path: str, spec: DecoderSpec, plan: _Plan, tensor: CheckpointTensor) -> None:
    value = sizes(spec)
    rows = sum(value[slot.shape[0]] for slot in plan.slots)
    symbols = [" + ".join(slot.shape[0] for slot in plan.slots), *plan.slots[0].shape[1:]]
    expected = [rows, *(value[symbol] for symbol in plan.slots[0].shape[1:])]
    if plan.transposed:
        symbols.reverse()
        expected.reverse()
    if tuple(tensor.shape) != tuple(expected):
        named = ", ".join(f"{symbol} = {size}" for symbol, size in zip(symbols, expected, strict=True))
        raise ModelFileError(path, f"expected shape ({named}), found {tuple(tensor.shape)}", tensor=plan.name)
    float_only = len(expected) == 1 or plan.transposed
    if tensor.dtype not in (_FLOAT_BYTES if float_only else _MATRIX_TYPES):
        kind = "transposed matrix" if plan.transposed else "vector" if float_only else "matrix"
        raise UnsupportedModelError(
            f"{path}: tensor {plan.name}: {tensor.dtype} is not supported for a {kind}"
        )


def _transposed(tensor: CheckpointTensor) -> CheckpointTensor:
    values = tensor.data.view(f"u{_FLOAT_BYTES[tensor.dtype]}").reshape(tensor.shape)
    data = np.ascontiguousarray(values.T).reshape(-1).view(np.uint8)
    return CheckpointTensor(tensor.name, tensor.shape[::-1], tensor.dtype, data)


def _float_tensor(name: str, values: npt.NDArray[np.float32]) -> CheckpointTensor:
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return CheckpointTensor(name, values.shape, "F32", data)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
