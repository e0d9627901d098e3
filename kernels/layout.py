"""Weights as the GPU kernels read them, made from the CPU core's packed layouts and turned back without loss.

K is cut into blocks of 128 columns, and a block's codes of all rows stand together, so that a tile of rows is
one stretch of memory. B blocks, n a row, k a column of block b:

    u4   codes (B, N, 32) int16; k = 128 b + 32 p + c (p < 4, c < 32):
         bits 4p .. 4p+3 of word (b, n, c) are the code
    u5   codes as u4; extra (ceil(B/4), N, 32) int16:
         bit 4 (b % 4) + p of word (b // 4, n, c) is bit 4 of the code
    u6   codes as u4; extra (ceil(B/2), N, 32) int16:
         bits 8 (b % 2) + 2p and the next of word (b // 2, n, c) are bits 4 and 5 of the code
    i8   codes (B, N, 64) int16; k = 128 b + 32 j + 16 p + c (j < 4, p < 2, c < 16):
         byte p of word (b, n, 16 j + c) is the code, signed

A thread that holds two neighbouring words in a register gets the codes of two neighbouring columns from it
with one shift and one logical operation, in the order in which tensor cores take an operand from registers.
Activations for int8 products have their bytes in the order of i8 (`quantize.py`).

    scales, mins   fp16 (groups, N), or (ceil(K / 256), N) where there are sub-scales
    subscales      int8 (groups, N) or None: a group's scale is scales * subscales
    submins        uint8 (groups, N) or None: likewise

groups are those of B whole blocks, or 1 where a row has one scale (group == 0). A code stands for
scale * (code - zero) + min. What stands in columns from K on meets activations that are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fastllm.errors import RequestError

if TYPE_CHECKING:
    from fastllm._core import PackedMatrix

BLOCK = 128  # columns of a block
SUPER = 256  # columns that share a super-scale
PANEL = 16  # rows that the CPU core keeps side by side
GROUPS = (16, 32, 64, 128)
PLANES = ("codes", "extra", "scales", "subscales", "mins", "submins")
EXTRA_BITS = {"u4": 0, "u5": 1, "u6": 2, "i8": 0}


@dataclass(frozen=True)
class GpuMatrix:
    """A weight matrix (rows = outputs, cols = inputs) in the layout above; all tensors on one device.

    They must not be written to: kernels read scales before they wait for the kernels before them.
    """

    kind: str  # u4, u5, u6 or i8
    rows: int
    cols: int
    group: int  # columns per scale: 16, 32, 64, 128, or 0: one scale per row
    zero: int
    codes: torch.Tensor
    extra: torch.Tensor | None
    scales: torch.Tensor
    subscales: torch.Tensor | None
    mins: torch.Tensor | None
    submins: torch.Tensor | None
    codebook: tuple[int, ...] | None = None  # what 4-bit codes stood for, where i8 holds their values

    @property
    def blocks(self) -> int:
        return self.codes.shape[0]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def plain(self) -> bool:
        """Whether one scale and no minimum stand for a whole block, and so can wait for its sums."""
        return self.group == BLOCK and self.subscales is None and self.mins is None

    @property
    def tile_kind(self) -> str:
        """Which tiles of `tiles.py` the matrix takes."""
        if self.extra is not None:
            return "u6"
        return "u4 groups" if self.kind == "u4" and not self.plain else self.kind

    def same_layout(self, other: GpuMatrix) -> bool:
        """Whether the two differ in their rows alone, and so can be one."""
        return _layout(replace(other, rows=self.rows)) == _layout(self)

    def row_range(self, start: int, count: int) -> GpuMatrix:
        """Rows from `start` on, copied."""
        planes: dict[str, Any] = {
            name: None if plane is None else plane[:, start : start + count].contiguous()
            for name, plane in ((name, getattr(self, name)) for name in PLANES)
        }
        return _settled(replace(self, rows=count, **planes))

    @property
    def nbytes(self) -> int:
        """Bytes of all planes, padding included."""
        planes = (getattr(self, name) for name in PLANES)
        return sum(plane.nbytes for plane in planes if plane is not None)


def from_packed(packed: PackedMatrix, device: torch.device | str = "cpu") -> GpuMatrix:
    """The same weights for a GPU.

    Args:
        packed: a quantized matrix of the CPU core.
        device: where the tensors go; the work is done there.

    Raises:
        RequestError: a matrix of floating-point numbers.
    """
    if packed.group == 0:
        raise RequestError("packed", packed.kind, "a quantized matrix; floating point needs no repacking")
    planes = {name: torch.tensor(plane, device=device) for name, plane in packed.planes().items()}
    rows, cols = packed.rows, packed.cols
    kp = -(-cols // 32) * 32
    group = packed.group if packed.group in GROUPS else 0
    codes = _read_codes(packed.kind, planes["codes"], planes.get("extra"), kp)[:rows]
    codebook = packed.codebook
    if codebook is not None:
        codes = torch.tensor(codebook, dtype=torch.int8, device=device)[codes.int()]
        kind, zero = "i8", 0
    elif packed.kind == "u8":
        codes = (codes ^ 0x80).view(torch.int8)
        kind, zero = "i8", 0
    else:
        kind, zero = packed.kind, packed.zero
    blocks = -(-kp // BLOCK)
    codes = torch.nn.functional.pad(codes, (0, blocks * BLOCK - kp))
    groups = blocks * BLOCK // group if group else 1
    supers = planes.get("subscales") is not None

    def per_group(name: str, dtype: torch.dtype, count: int) -> torch.Tensor | None:
        plane = planes.get(name)
        if plane is None:
            return None
        by_row = plane.view(dtype).view(-(-rows // PANEL), -1, PANEL).transpose(0, 1).flatten(1)[:, :rows]
        return torch.nn.functional.pad(by_row, (0, 0, 0, count - by_row.shape[0])).contiguous()

    coarse = -(-cols // SUPER) if supers else groups
    scales = per_group("scales", torch.float16, coarse)
    assert scales is not None
    words, extra = _pack_words(kind, codes)
    matrix = GpuMatrix(
        kind,
        rows,
        cols,
        group,
        zero,
        words,
        extra,
        scales,
        per_group("subscales", torch.int8, groups),
        per_group("mins", torch.float16, coarse),
        per_group("submins", torch.uint8, groups),
        codebook,
    )
    return _settled(matrix)


def _settled(matrix: GpuMatrix) -> GpuMatrix:
    """The matrix, once it is in memory: see GpuMatrix."""
    if matrix.codes.is_cuda:
        torch.cuda.synchronize(matrix.device)
    return matrix


def interleave_rows(gate: GpuMatrix, up: GpuMatrix) -> GpuMatrix:
    """Rows in turn, gate's first: for a product with paired outputs.

    Raises:
        RequestError: matrices of different shapes or layouts.
    """
    if _layout(gate) != _layout(up):
        raise RequestError("up", _layout(up), f"the layout of gate, {_layout(gate)}")

    def merged(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
        if a is None or b is None:
            return None
        return torch.stack([a, b], dim=2).flatten(1, 2)

    planes: dict[str, Any] = {name: merged(getattr(gate, name), getattr(up, name)) for name in PLANES}
    return _settled(replace(gate, rows=2 * gate.rows, **planes))


def stack_rows(matrices: Sequence[GpuMatrix]) -> GpuMatrix:
    """The rows of several matrices, one after the other: products with the same input as one.

    Raises:
        RequestError: matrices of different columns or layouts.
    """
    first = matrices[0]
    for matrix in matrices[1:]:
        if not first.same_layout(matrix):
            raise RequestError("matrices", _layout(matrix), f"the layout of the first, {_layout(first)}")

    def stacked(name: str) -> torch.Tensor | None:
        parts = [plane for plane in (getattr(matrix, name) for matrix in matrices) if plane is not None]
        return torch.cat(parts, dim=1) if parts else None

    planes: dict[str, Any] = {name: stacked(name) for name in PLANES}
    return _settled(replace(first, rows=sum(matrix.rows for matrix in matrices), **planes))


def _layout(matrix: GpuMatrix) -> tuple[object, ...]:
    present = tuple(name for name in PLANES if getattr(matrix, name) is not None)
    return (matrix.kind, matrix.rows, matrix.cols, matrix.group, matrix.zero, present, matrix.codebook)


def to_packed(matrix: GpuMatrix) -> PackedMatrix:
    """The inverse of `from_packed`, byte for byte."""
    from fastllm._core import PackedMatrix

    rows, cols = matrix.rows, matrix.cols
    kp = -(-cols // 32) * 32
    group = matrix.group or kp
    groups = -(-kp // group)
    codes = unpack_codes(matrix)[:, :kp]
    if matrix.codebook is not None:
        kind = "u4"
        by_value = torch.zeros(256, dtype=torch.uint8, device=matrix.device)
        values = torch.tensor(matrix.codebook, device=matrix.device)
        by_value[values + 128] = torch.arange(16, dtype=torch.uint8, device=matrix.device)
        codes = by_value[codes.int() + 128]
    elif matrix.kind == "i8":
        kind = "u8"
        codes = codes.view(torch.uint8) ^ 0x80
    else:
        kind = matrix.kind
    panels = -(-rows // PANEL)
    padding = panels * PANEL - rows
    codes = torch.nn.functional.pad(codes, (0, 0, 0, padding))
    code_plane, extra_plane = _write_codes(kind, codes)
    planes = {"codes": code_plane}
    if extra_plane is not None:
        planes["extra"] = extra_plane

    for name in ("scales", "subscales", "mins", "submins"):
        plane = getattr(matrix, name)
        if plane is None:
            continue
        fine = matrix.subscales is None or name.startswith("sub")
        plane = plane[: groups if fine else -(-cols // SUPER)]
        plane = torch.nn.functional.pad(plane, (0, padding)).view(-1, panels, PANEL)
        planes[name] = plane.transpose(0, 1).contiguous().view(-1).view(torch.uint8)
    return PackedMatrix.from_planes(
        kind,
        rows,
        cols,
        group,
        128 if kind == "u8" else matrix.zero,
        {name: plane.cpu().numpy() for name, plane in planes.items()},
        matrix.codebook,
    )


def unpack_codes(matrix: GpuMatrix) -> torch.Tensor:
    """The codes, (N, 128 B): int8 of i8, uint8 of the others."""
    blocks, rows = matrix.codes.shape[:2]
    if matrix.kind == "i8":
        by_pair = matrix.codes.view(torch.int8).view(blocks, rows, 4, 16, 2)
        return by_pair.permute(1, 0, 2, 4, 3).reshape(rows, blocks * BLOCK)
    words = matrix.codes.int()
    codes = torch.stack([words >> 4 * p & 15 for p in range(4)], dim=2)  # (B, N, 4, 32)
    width = EXTRA_BITS[matrix.kind]
    if matrix.extra is not None:
        fields = torch.arange(16 // width, device=matrix.device) * width
        high = (
            matrix.extra.int()[:, None, :, None] >> fields.view(-1, 4)[None, :, None, :, None]
            & (1 << width) - 1
        )
        codes |= high.flatten(0, 1)[:blocks] << 4
    return codes.to(torch.uint8).permute(1, 0, 2, 3).reshape(rows, blocks * BLOCK)


def _pack_words(kind: str, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes (N, 128 B) as words, and the extra plane."""
    rows, blocks = codes.shape[0], codes.shape[1] // BLOCK
    if kind == "i8":
        by_pair = codes.view(rows, blocks, 4, 2, 16).permute(1, 0, 2, 4, 3).contiguous()
        return by_pair.view(torch.int16).view(blocks, rows, 64), None
    by_plane = codes.view(rows, blocks, 4, 32).permute(1, 0, 2, 3).contiguous().to(torch.int16)
    words = by_plane[:, :, 0] & 15
    for p in range(1, 4):
        words |= (by_plane[:, :, p] & 15) << 4 * p
    width = EXTRA_BITS[kind]
    if not width:
        return words, None
    together = 4 // width  # blocks that share a word
    high = torch.nn.functional.pad(by_plane >> 4, (0, 0, 0, 0, 0, 0, 0, -blocks % together))
    high = high.view(-1, together, rows, 4, 32)
    extra = torch.zeros_like(high[:, 0, :, 0])
    for i in range(together):
        for p in range(4):
            extra |= high[:, i, :, p] << width * (4 * i + p)
    return words, extra


def _read_codes(kind: str, plane: torch.Tensor, extra: torch.Tensor | None, kp: int) -> torch.Tensor:
    """Codes (rows of whole panels, kp) from the CPU core's planes; see csrc/kernels/kernels.h."""
    if kind == "u8":
        return plane.view(-1, kp // 4, PANEL, 4).permute(0, 2, 1, 3).reshape(-1, kp)
    lines = plane.view(-1, kp // 8, PANEL, 4)
    codes = torch.stack([lines & 15, lines >> 4], dim=3).permute(0, 2, 1, 3, 4).reshape(-1, kp)
    if extra is not None:
        width = EXTRA_BITS[kind]
        lines = extra.view(-1, kp * width // 32, PANEL, 4)
        high = torch.stack([lines >> width * q & (1 << width) - 1 for q in range(8 // width)], dim=3)
        codes |= high.permute(0, 2, 1, 3, 4).reshape(-1, kp) << 4
    return codes


def _write_codes(kind: str, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The inverse of `_read_codes`: flat planes."""
    kp = codes.shape[1]
    if kind == "u8":
        return codes.view(-1, PANEL, kp // 4, 4).permute(0, 2, 1, 3).reshape(-1), None
    low = (codes & 15).view(-1, PANEL, kp // 8, 2, 4)
    plane = (low[:, :, :, 0] | low[:, :, :, 1] << 4).permute(0, 2, 1, 3).reshape(-1)
    width = EXTRA_BITS[kind]
    if not width:
        return plane, None
    high = (codes >> 4).view(-1, PANEL, kp * width // 32, 8 // width, 4)
    extra = high[:, :, :, 0].clone()
    for q in range(1, 8 // width):
        extra |= high[:, :, :, q] << width * q
    return plane, extra.permute(0, 2, 1, 3).reshape(-1)
