"""Packed matrices: every disk format and float type, without loss.

The oracle for files is the ``gguf`` package, compared bit for bit (any NaN equals any NaN: which payload
an operation hands on is not defined). `unpack` reads the layout code by code from its description, the
packer writes it word by word, so a mistake in either shows as a difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastllm import _core
from fastllm.errors import RequestError

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Format:
    name: str
    kind: str
    group: int
    layout: str
    halves: tuple[int, ...]  # byte offsets of the fp16 fields in a block

    @property
    def type(self) -> gguf.GGMLQuantizationType:
        return gguf.GGMLQuantizationType[self.name]

    @property
    def block(self) -> tuple[int, int]:
        return gguf.GGML_QUANT_SIZES[self.type]

    def decode(self, data: U8, rows: int, cols: int) -> F32:
        with np.errstate(all="ignore"):  # infinite and NaN scales are part of the test
            return dequantize(data.reshape(rows, -1), self.type).reshape(rows, cols)


SUPER, SUPER_MIN = "fp16 x int8 scale", "fp16 x int8 scale, fp16 x uint8 min"
FORMATS = [
    Format("F32", "f32", 0, "f32", ()),
    Format("F16", "f16", 0, "f16", (0,)),
    Format("BF16", "bf16", 0, "bf16", ()),
    Format("Q4_0", "u4", 32, "u4 g32 fp16 scale, zero 8", (0,)),
    Format("Q4_1", "u4", 32, "u4 g32 fp16 scale, fp16 min", (0, 2)),
    Format("Q5_0", "u5", 32, "u5 g32 fp16 scale, zero 16", (0,)),
    Format("Q5_1", "u5", 32, "u5 g32 fp16 scale, fp16 min", (0, 2)),
    Format("Q8_0", "u8", 32, "u8 g32 fp16 scale, zero 128", (0,)),
    Format("Q2_K", "u4", 16, f"u4 g16 {SUPER_MIN}", (80, 82)),
    Format("Q3_K", "u4", 16, f"u4 g16 {SUPER}, zero 4", (108,)),
    Format("Q4_K", "u4", 32, f"u4 g32 {SUPER_MIN}", (0, 2)),
    Format("Q5_K", "u5", 32, f"u5 g32 {SUPER_MIN}", (0, 2)),
    Format("Q6_K", "u6", 16, f"u6 g16 {SUPER}, zero 32", (208,)),
    Format("IQ4_NL", "u4", 32, "u4 codebook g32 fp16 scale", (0,)),
    Format("IQ4_XS", "u4", 32, f"u4 codebook g32 {SUPER}", (0,)),
]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)

# Zeros of both signs, denormals, the edges of the normals, the largest, infinities, NaNs.
HALVES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x83FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF]
HALVES += [0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFE01]


@dataclass(frozen=True)
class Tensor:
    data: U8
    rows: int
    cols: int
    order: npt.NDArray[np.int32] | None


@st.composite
def tensors(draw: st.DrawFn, fmt: Format) -> Tensor:
    """Random blocks of a format: any bytes, or fields all zeros or ones, with extreme fp16 fields."""
    rows = draw(st.one_of(st.integers(1, 40), st.sampled_from([15, 16, 17, 32, 33])))
    columns, size = fmt.block
    blocks = draw(st.integers(1, 5 if columns > 1 else 70))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    fill = draw(st.sampled_from(["random", "random", "zeros", "ones"]))
    data = rng.integers(0, 256, (rows * blocks, size), dtype=np.uint8)
    if fill != "random":
        data[rng.random(data.shape) < 0.9] = 0 if fill == "zeros" else 255
    extreme = rng.random(rows * blocks) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    for offset in fmt.halves:
        chosen = rng.choice(np.array(HALVES, dtype="<u2"), rows * blocks).view(np.uint8).reshape(-1, 2)
        data[:, offset : offset + 2] = np.where(extreme[:, None], chosen, data[:, offset : offset + 2])
    order = draw(st.sampled_from(["none", "permuted", "any"]))
    picked = {"none": None, "permuted": rng.permutation(rows), "any": rng.integers(0, rows, rows)}[order]
    return Tensor(data.ravel(), rows, blocks * columns, None if picked is None else picked.astype(np.int32))


def assert_same_bits(got: F32, want: F32) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype == np.float32
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), nan)
    different = np.argwhere((got.view(np.int32) != want.view(np.int32)) & ~nan)
    assert different.size == 0, f"{len(different)} values differ, first at {different[0]}"


# ---- files -----------------------------------------------------------------------------------------------


@every_format
@given(data=st.data())
def test_file_formats_decode_and_pack_without_loss(fmt: Format, data: st.DataObject) -> None:
    t = data.draw(tensors(fmt))
    want = fmt.decode(t.data, t.rows, t.cols)
    assert_same_bits(_core.dequantize_ggml(fmt.name, t.data, t.rows, t.cols), want)
    packed = _core.PackedMatrix.from_ggml(fmt.name, t.data, t.rows, t.cols, t.order)
    assert_same_bits(packed.unpack(), want if t.order is None else want[t.order])
    assert (packed.rows, packed.cols) == (t.rows, t.cols)


@every_format
def test_layout_is_the_promised_one(fmt: Format) -> None:
    columns, size = fmt.block
    packed = _core.PackedMatrix.from_ggml(fmt.name, np.zeros(size * 16, np.uint8), 16, columns)
    assert (packed.kind, packed.group, packed.layout) == (fmt.kind, fmt.group, fmt.layout)


@every_format
@pytest.mark.parametrize("shape", [(576, 1536), (64, 2048), (2048, 256)])
def test_packed_size_follows_the_file(fmt: Format, shape: tuple[int, int]) -> None:
    rows, cols = shape
    columns, size = fmt.block
    data = np.zeros(rows * cols // columns * size, np.uint8)
    packed = _core.PackedMatrix.from_ggml(fmt.name, data, rows, cols)
    ratio = packed.nbytes / data.nbytes
    most = {"Q2_K": 164 / 84, "Q3_K": 146 / 110}.get(fmt.name, 1.1)  # 2 and 3 bits become nibbles
    assert 0.99 < ratio <= most


@every_format
def test_unaligned_and_read_only_data(fmt: Format) -> None:
    columns, size = fmt.block
    rows, cols = 5, columns * (3 if columns > 1 else 33)
    data = np.random.default_rng(1).integers(0, 256, rows * cols // columns * size + 1, dtype=np.uint8)[1:]
    data.flags.writeable = False
    packed = _core.PackedMatrix.from_ggml(fmt.name, data, rows, cols)
    assert_same_bits(packed.unpack(), fmt.decode(data.copy(), rows, cols))


def test_columns_need_only_be_whole_blocks() -> None:
    rows, cols = 3, 288  # 9 blocks of 32: no multiple of 64, 128 or 256
    data = np.random.default_rng(2).integers(0, 256, rows * cols // 32 * 18, dtype=np.uint8)
    packed = _core.PackedMatrix.from_ggml("Q4_0", data, rows, cols)
    assert packed.nbytes == 16 * (cols // 2 + cols // 32 * 2)
    assert_same_bits(packed.unpack(), FORMATS[3].decode(data, rows, cols))


def assert_padding_is_inert(packed: _core.PackedMatrix) -> None:
    """Outputs and groups past the matrix have scale and minimum 0: kernels need not look where it ends."""
    for name, plane in packed.planes().items():
        assert not plane.flags.writeable
        if name == "codes" and packed.kind in ("f16", "bf16", "f32"):
            values = plane.reshape((packed.rows + 15) // 16, packed.cols, 16, -1)
        elif name in ("scales", "mins"):
            values = plane.reshape((packed.rows + 15) // 16, -1, 16, 2)
        else:
            continue
        assert values.any()
        assert not values[-1, :, (packed.rows - 1) % 16 + 1 :].any()


@every_format
@pytest.mark.parametrize("rows", [3, 16, 35])
def test_padding_of_files_is_inert(fmt: Format, rows: int) -> None:
    columns, size = fmt.block
    data = np.full(rows * 2 * size, 0x55, np.uint8)
    assert_padding_is_inert(_core.PackedMatrix.from_ggml(fmt.name, data, rows, 2 * columns))


@pytest.mark.model
def test_default_model(default_model_path: Path) -> None:
    wanted = {"token_embd.weight", "blk.0.attn_q.weight", "blk.7.ffn_down.weight", "blk.29.ffn_up.weight"}
    tensors = {t.name: t for t in gguf.GGUFReader(default_model_path).tensors if t.name in wanted}
    assert tensors.keys() == wanted
    for tensor in tensors.values():
        rows, cols = int(tensor.shape[1]), int(tensor.shape[0])
        data = np.asarray(tensor.data).reshape(-1).view(np.uint8)
        packed = _core.PackedMatrix.from_ggml(tensor.tensor_type.name, data, rows, cols)
        assert_same_bits(packed.unpack(), dequantize(tensor.data, tensor.tensor_type).reshape(rows, cols))


# ---- floats ----------------------------------------------------------------------------------------------


def widen(array: npt.NDArray[Any]) -> F32:
    """float32, float16 or bf16 bits to float32."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(all="ignore"):
        return array.astype(np.float32)


def to_bf16(array: F32) -> npt.NDArray[np.uint16]:
    bits = gguf.quants.quantize(array, gguf.GGMLQuantizationType.BF16)
    return bits.view(np.uint16).reshape(array.shape)


def test_all_65536_halves_are_exact() -> None:
    bits = np.arange(65536, dtype=np.uint16).reshape(64, 1024)
    for array in (bits, bits.view(np.float16)):
        unpacked = _core.PackedMatrix.from_float(array, "f32").unpack()
        assert_same_bits(unpacked, widen(array))
        same_kind = _core.PackedMatrix.from_float(array, "bf16" if array.dtype == np.uint16 else "f16")
        assert_same_bits(same_kind.unpack(), widen(array))


@st.composite
def float_bits(draw: st.DrawFn) -> F32:
    """float32 matrices of any bit pattern, and of patterns next to the rounding ties of fp16 and bf16."""
    shape = (draw(st.integers(1, 35)), draw(st.integers(1, 40)))
    if draw(st.booleans()):
        bits = draw(hnp.arrays(np.uint32, shape, elements=st.integers(0, 2**32 - 1)))
    else:
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        exponent = rng.integers(100, 146, shape)  # fp16's zero, denormals, normals and overflow
        mantissa = rng.integers(0, 1024, shape) << 13 | rng.choice([0, 0xFFF, 0x1000, 0x1001, 0x8000], shape)
        bits = (rng.integers(0, 2, shape) << 31 | exponent << 23 | mantissa).astype(np.uint32)
    return bits.view(np.float32)


@given(array=float_bits())
def test_narrowing_rounds_to_nearest_even(array: F32) -> None:
    assert_same_bits(_core.PackedMatrix.from_float(array, "f32").unpack(), array)
    assert_same_bits(_core.PackedMatrix.from_float(array, "bf16").unpack(), widen(to_bf16(array)))
    with np.errstate(all="ignore"):
        half = array.astype(np.float16)
    lost = np.argwhere(np.isinf(half) & np.isfinite(array))
    if lost.size:
        with pytest.raises(RequestError) as caught:
            _core.PackedMatrix.from_float(array, "f16")
        assert caught.value.field in {f"array[{r}, {c}]" for r, c in lost}
    else:
        assert_same_bits(_core.PackedMatrix.from_float(array, "f16").unpack(), widen(half))


def test_every_rounding_boundary_of_fp16() -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (halves[:-1] + halves[1:]) / 2  # exact in fp32
    values = np.concatenate(
        [np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(1e9))]
    )
    values = np.stack([values, -values])
    got = _core.PackedMatrix.from_float(values, "f16").unpack()
    assert_same_bits(got, widen(values.astype(np.float16)))


@given(
    rows=st.integers(1, 35),
    cols=st.integers(1, 40),
    source=st.sampled_from(["float32", "float16", "uint16"]),
    target=st.sampled_from(["f32", "f16", "bf16"]),
)
def test_every_pair_of_float_types(rows: int, cols: int, source: str, target: str) -> None:
    values = np.random.default_rng(rows * 64 + cols).standard_normal((rows, cols)).astype(np.float32)
    array = to_bf16(values) if source == "uint16" else values.astype(source)
    packed = _core.PackedMatrix.from_float(array, target)
    exact = widen(array)
    want = {"f32": exact, "f16": widen(exact.astype(np.float16)), "bf16": widen(to_bf16(exact))}[target]
    assert_same_bits(packed.unpack(), want)
    panels = (rows + 15) // 16
    assert packed.nbytes == panels * 16 * cols * (4 if target == "f32" else 2)
    assert (packed.kind, packed.group, packed.layout) == (target, 0, target)


# ---- bad arguments ---------------------------------------------------------------------------------------

OK = np.zeros(18 * 4, np.uint8)


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("dtype", ("Q9_9", OK, 4, 32)),
        ("dtype", ("q4_0", OK, 4, 32)),
        ("rows", ("Q4_0", OK, 0, 32)),
        ("rows", ("Q4_0", OK, -4, 32)),
        ("rows", ("Q4_0", OK, 2**62, 32)),
        ("cols", ("Q4_0", OK, 4, 0)),
        ("cols", ("Q4_0", OK, 4, 2**62)),
        ("cols", ("Q4_0", OK, 4, 31)),
        ("cols", ("Q4_K", OK, 4, 32)),
        ("data", ("Q4_0", OK[:-1], 4, 32)),
        ("data", ("Q4_0", OK, 3, 32)),
        ("data", ("Q4_0", OK, 2**30, 2**30)),
        ("rows * cols", ("Q4_0", OK, 2**31 - 32, 2**31 - 32)),
        ("data", ("Q4_0", OK[::2], 2, 32)),
        ("data", ("Q4_0", OK.reshape(4, 18), 4, 32)),
        ("data", ("Q4_0", OK.view(np.int8), 4, 32)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_files_are_refused(field: str, arguments: tuple[Any, ...]) -> None:
    for call in (_core.PackedMatrix.from_ggml, _core.dequantize_ggml):
        with pytest.raises(RequestError) as caught:
            call(*arguments)
        assert caught.value.field == field


@pytest.mark.parametrize(
    "order",
    [
        np.zeros(3, np.int32),
        np.array([0, 1, 2, 4], np.int32),
        np.array([0, 1, 2, -1], np.int32),
        np.zeros(4, np.int64),
        np.zeros((4, 1), np.int32),
    ],
)
def test_bad_row_orders_are_refused(order: npt.NDArray[Any]) -> None:
    with pytest.raises(RequestError) as caught:
        _core.PackedMatrix.from_ggml("Q4_0", OK, 4, 32, order)
    assert caught.value.field.startswith("row_order")


SQUARE = np.zeros((4, 4), np.float32)


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("dtype", lambda: _core.PackedMatrix.from_float(SQUARE, "f64")),
        ("array", lambda: _core.PackedMatrix.from_float(SQUARE.astype(np.float64), "f32")),
        ("array", lambda: _core.PackedMatrix.from_float(SQUARE.astype(">f4"), "f32")),
        ("array", lambda: _core.PackedMatrix.from_float(SQUARE.T[::2], "f32")),
        ("array", lambda: _core.PackedMatrix.from_float(SQUARE.ravel(), "f32")),
        ("rows", lambda: _core.PackedMatrix.from_float(SQUARE[:0], "f32")),
    ],
)
def test_bad_arrays_are_refused(field: str, call: Any) -> None:
    with pytest.raises(RequestError) as caught:
        call()
    assert caught.value.field == field
