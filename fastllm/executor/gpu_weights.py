"""A decoder's weights on a GPU: matrices packed as on the CPU, side by side where they share their input.

A `Linear` is what one input is multiplied with: q, k and v, or gate and up, are one matrix if their layouts
allow it. With tensor parallelism a rank keeps a stretch of the outputs of every matrix: whole heads of q, k
and v, a share of the rows of the others. So an output's sum is made in one place, in the order in which one
GPU makes it, and what ranks exchange are whole outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from fastllm.errors import UnsupportedModelError
from fastllm.executor.packing import FLOATS, matrix_values, pack_matrix, packed_slots
from fastllm.kernels import dense, products
from fastllm.kernels.layout import GpuMatrix, from_packed, interleave_rows, stack_rows
from fastllm.models.loader import SlotTensor
from fastllm.models.slots import decoder_slots
from fastllm.models.spec import DecoderSpec

if TYPE_CHECKING:
    from fastllm.executor.ranks import Rank
    from fastllm.formats.checkpoint import Checkpoint

Matrix: TypeAlias = "GpuMatrix | torch.Tensor"

# Slots of which a rank keeps a stretch of rows.
_SPLIT = frozenset(
    """
    q k v q_bias k_bias v_bias o o_bias gate up gate_bias up_bias down down_bias head
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Linear:
    """y = x w^T + bias: matrices with the same input, one after the other in the outputs."""

    matrices: tuple[Matrix, ...]
    bias: torch.Tensor | None = None
    interleaved: bool = False  # outputs 2i and 2i + 1 are a gate and its value

    @property
    def rows(self) -> int:
        return sum(rows_of(matrix) for matrix in self.matrices)

    @property
    def nbytes(self) -> int:
        own = sum(matrix.nbytes for matrix in self.matrices)
        return own + (0 if self.bias is None else self.bias.nbytes)


@dataclass
class LayerWeights:
    """Of one layer. Norms are fp32 vectors, None where the decoder has none."""

    qkv: Linear
    o: Linear
    gate_up: Linear  # up alone where the MLP has no gate
    down: Linear
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Weights:
    embed: Matrix
    position_embed: torch.Tensor | None
    head: Linear
    final_norm: torch.Tensor
    final_norm_bias: torch.Tensor | None
    layers: list[LayerWeights]
    nbytes: int


def rows_of(matrix: Matrix) -> int:
    return matrix.rows if isinstance(matrix, GpuMatrix) else matrix.shape[0]


def check_split(spec: DecoderSpec, ranks: int) -> None:
    """Raises UnsupportedModelError unless every width divides by the number of ranks."""
    for name in ("num_heads", "num_kv_heads", "dim", "ffn_dim", "vocab_size"):
        if getattr(spec, name) % ranks:
            raise UnsupportedModelError(
                f"{spec.source}: tensor_parallel_size: {name} = {getattr(spec, name)} does not divide "
                f"by {ranks}"
            )


def load_weights(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    *,
    quantization: str | None,
    dtype: torch.dtype,
    device: torch.device,
    rank: Rank,
    threads: int,
) -> Weights:
    """Reads and packs everything; matrices of floating-point numbers become `dtype`.

    Raises:
        ModelFileError: a tensor is missing or of the wrong shape.
        UnsupportedModelError: a width does not divide by the number of ranks.
    """
    check_split(spec, rank.size)

    def pack(entry: SlotTensor) -> Matrix:
        if entry.slot == "position_embed":
            return torch.from_numpy(pack_matrix(entry, None).unpack()).to(device)
        own = _own_rows(entry, spec, rank)
        if own.tensor.dtype in FLOATS and quantization is None:
            return _to_torch(matrix_values(own)).to(dtype).to(device)
        return from_packed(pack_matrix(own, quantization), device)

    known: dict[tuple[str, int], Matrix] = {}
    for slot, layer, weights in packed_slots(checkpoint, spec, pack, threads):
        if isinstance(weights, np.ndarray):
            start, stop = _stretch(slot, spec, rank, len(weights))
            # The library wants biases in the activations' type; norms are applied in fp32.
            kind = dtype if slot.endswith("_bias") and "norm" not in slot else torch.float32
            known[slot, layer] = torch.tensor(weights[start:stop], dtype=kind, device=device)
        else:
            known[slot, layer] = weights
    return _assemble(known, spec, rank)


def _assemble(known: dict[tuple[str, int], Matrix], spec: DecoderSpec, rank: Rank) -> Weights:
    def vector(slot: str, layer: int) -> torch.Tensor | None:
        found = known.get((slot, layer))
        assert not isinstance(found, GpuMatrix)
        return found

    vectors = [slot.name for slot in decoder_slots(spec) if len(slot.shape) == 1 and slot.per_layer]
    layers = []
    for i in range(spec.num_layers):
        gate = ("gate", "up") if spec.gated_mlp else ("up",)
        own = {name: vector(name, i) for name in vectors}
        layers.append(
            LayerWeights(
                _linear(known, i, ("q", "k", "v")),
                _linear(known, i, ("o",)),
                _linear(known, i, gate, interleaved=spec.gated_mlp),
                _linear(known, i, ("down",)),
                {name: values for name, values in own.items() if values is not None},
            )
        )
    embed = known["embed", -1]
    head: Matrix = embed if spec.tied_head else known["head", -1]
    if spec.tied_head and rank.size > 1:
        share = spec.vocab_size // rank.size
        head = _row_range(embed, rank.index * share, share)
    final = vector("final_norm", -1)
    assert final is not None
    position_embed = vector("position_embed", -1)
    total = embed.nbytes + (0 if spec.tied_head else head.nbytes) + final.nbytes
    for layer in layers:
        total += layer.qkv.nbytes + layer.o.nbytes + layer.gate_up.nbytes + layer.down.nbytes
        total += sum(values.nbytes for values in layer.vectors.values())
    return Weights(
        embed,
        position_embed,
        Linear((head,)),
        final,
        vector("final_norm_bias", -1),
        layers,
        total + (0 if position_embed is None else position_embed.nbytes),
    )


def _linear(
    known: dict[tuple[str, int], Matrix],
    layer: int,
    slots: tuple[str, ...],
    interleaved: bool = False,
) -> Linear:
    matrices = tuple(known.pop((slot, layer)) for slot in slots)
    biases = [known.get((f"{slot}_bias", layer)) for slot in slots]
    bias = None
    if biases[0] is not None:
        parts = [part for part in biases if isinstance(part, torch.Tensor)]
        bias = torch.stack(parts, dim=1).flatten() if interleaved else torch.cat(parts)
    if interleaved:
        return _interleaved(matrices, bias)
    return Linear(_side_by_side(matrices), bias)


def _side_by_side(matrices: tuple[Matrix, ...]) -> tuple[Matrix, ...]:
    """As few as possible: neighbours of one layout become one matrix."""
    out: list[list[Matrix]] = []
    for matrix in matrices:
        if out and _alike(out[-1][0], matrix):
            out[-1].append(matrix)
        else:
            out.append([matrix])
    return tuple(group[0] if len(group) == 1 else _stack(group) for group in out)


def _alike(a: Matrix, b: Matrix) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return a.same_layout(b)


def _stack(matrices: list[Matrix]) -> Matrix:
    packed = [matrix for matrix in matrices if isinstance(matrix, GpuMatrix)]
    if packed:
        return stack_rows(packed)
    return torch.cat([matrix for matrix in matrices if isinstance(matrix, torch.Tensor)])


def _interleaved(matrices: tuple[Matrix, ...], bias: torch.Tensor | None) -> Linear:
    gate, up = matrices
    if isinstance(gate, torch.Tensor) and isinstance(up, torch.Tensor):
        return Linear((torch.stack([gate, up], dim=1).flatten(0, 1),), bias, True)
    if isinstance(gate, GpuMatrix) and isinstance(up, GpuMatrix) and gate.same_layout(up):
        return Linear((interleave_rows(gate, up),), bias, True)
    return Linear(matrices, bias, True)


def _own_rows(entry: SlotTensor, spec: DecoderSpec, rank: Rank) -> SlotTensor:
    """The rows of a matrix that a rank keeps; whole heads, so that the order within one stays."""
    rows = entry.tensor.shape[0]
    start, stop = _stretch(entry.slot, spec, rank, rows)
    if (start, stop) == (0, rows):
        return entry
    order = None if entry.row_order is None else entry.row_order[start:stop] - np.int32(start)
    return entry._replace(tensor=entry.tensor.rows(start, stop - start), row_order=order)


def _stretch(slot: str, spec: DecoderSpec, rank: Rank, rows: int) -> tuple[int, int]:
    if slot not in _SPLIT or rank.size == 1:
        return 0, rows
    share = rows // rank.size
    return rank.index * share, (rank.index + 1) * share


def _row_range(matrix: Matrix, start: int, count: int) -> Matrix:
    if isinstance(matrix, torch.Tensor):
        return matrix[start : start + count]
    return matrix.row_range(start, count)


def _to_torch(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> torch.Tensor:
    """A copy: what is read from a file is mapped, and read-only."""
    values = np.array(values)
    if values.dtype == np.uint16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def multiply(
    x: torch.Tensor,
    linear: Linear,
    residual: torch.Tensor | None = None,
    *,
    paired: bool = False,
    deterministic: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product, with SiLU(gate) * value if paired, then + residual; rounded once where a kernel of ours
    computes it. In `out`, of any dtype, if given.
    """
    if len(linear.matrices) == 1:
        return _multiply(x, linear.matrices[0], linear.bias, residual, paired, deterministic, out)
    assert residual is None
    assert not paired
    m = x.shape[0]
    y = x.new_empty(m, linear.rows) if out is None else out
    done = 0
    for i, matrix in enumerate(linear.matrices):
        n = rows_of(matrix)
        if linear.interleaved:
            part = x.new_empty(m, n)
            bias = None if linear.bias is None else linear.bias[i::2].contiguous()
            _multiply(x, matrix, bias, None, False, deterministic, part)
            y[:, i::2] = part
        else:
            bias = None if linear.bias is None else linear.bias[done : done + n]
            _multiply(x, matrix, bias, None, False, deterministic, y[:, done : done + n])
        done += n
    return y


def _multiply(
    x: torch.Tensor,
    matrix: Matrix,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    paired: bool,
    deterministic: bool,
    out: torch.Tensor | None,
) -> torch.Tensor:
    if isinstance(matrix, GpuMatrix):
        return products.choose_weight_only(x, matrix, bias, residual, paired, deterministic, out)
    if deterministic or paired or out is not None:
        return dense.dense(x, matrix, bias, residual, paired=paired, deterministic=deterministic, out=out)
    if residual is not None and bias is None:
        return torch.addmm(residual, x, matrix.t())
    y = torch.nn.functional.linear(x, matrix, bias)
    return y if residual is None else y.add_(residual)
