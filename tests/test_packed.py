"""Packed matrices: every disk format without loss, and our own quantizer.

The oracle for files is the ``gguf`` package, compared bit for bit (any NaN equals any NaN: which payload
an operation hands on is not defined). `unpack` reads the layout code by code from its description, the
packer writes it word by word, so a mistake in either shows as a difference.
"""

from __future__ import annotations

import threading
import time
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


# ---- the quantizer ---------------------------------------------------------------------------------------

groups = st.sampled_from([16, 32, 64, 128])


@st.composite
def weights(draw: st.DrawFn, limit: float = 60000.0) -> F32:
    """Weights with outliers, constant stretches, offsets and magnitudes down to denormals."""
    shape = (draw(st.integers(1, 35)), draw(st.one_of(st.integers(1, 300), st.sampled_from([32, 128, 256]))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    w = rng.standard_normal(shape) * draw(st.sampled_from([1e-42, 1e-7, 1e-4, 0.02, 1.0, 1000.0]))
    w += draw(st.sampled_from([0.0, 0.0, 0.02, -3.0, 1000.0]))
    w[rng.random(shape) < draw(st.sampled_from([0.0, 0.01]))] *= 8
    w[:, : draw(st.integers(0, 40))] = draw(st.sampled_from([0.0, -0.0, 0.1, -7.0]))
    return np.clip(w, -limit, limit).astype(np.float32)


def padded_groups(w: F32, group: int) -> list[F32]:
    return [w[:, k : k + group] for k in range(0, w.shape[1], group)]


@given(w=weights(), group=groups)
def test_8_bits_are_amax_over_127(w: F32, group: int) -> None:
    packed = _core.PackedMatrix.quantize(w, 8, group)
    assert packed.layout == f"u8 g{group} fp16 scale, zero 128"
    got = packed.unpack()
    for k, x in enumerate(padded_groups(w, group)):
        amax = np.abs(x).max(axis=1, keepdims=True)
        scale = (amax / np.float32(127)).astype(np.float16)
        low = amax > np.float32(127.5) * scale.astype(np.float32)  # a denormal scale rounded down too far
        scale = np.where(low, np.nextafter(scale, np.float16(np.inf)), scale).astype(np.float32)
        with np.errstate(all="ignore"):
            codes = np.where(scale > 0, np.clip(np.rint(x / scale), -127, 127), 0).astype(np.float32)
        # +0 and -0 are one code
        np.testing.assert_array_equal(got[:, k * group : k * group + x.shape[1]], scale * codes)


def rounded_to_range(x: F32) -> F32:
    """Plain 4-bit rounding: the group's range in fp16, as a quantizer without a search would do it."""
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    scale = ((high - low) / np.float32(15)).astype(np.float16).astype(np.float32)
    low = low.astype(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        codes = np.where(scale > 0, np.clip(np.rint((x - low) / scale), 0, 15), 0).astype(np.float32)
    return scale * codes + low


def squared_error(got: F32, x: F32) -> npt.NDArray[np.float64]:
    return ((got.astype(np.float64) - x) ** 2).sum(axis=1)


@given(w=weights(), group=groups)
def test_4_bits_are_never_worse_than_plain_rounding(w: F32, group: int) -> None:
    packed = _core.PackedMatrix.quantize(w, 4, group)
    assert packed.layout == f"u4 g{group} fp16 scale, fp16 min"
    got = packed.unpack()
    assert np.isfinite(got).all()
    for k, x in enumerate(padded_groups(w, group)):
        mine = got[:, k * group : k * group + x.shape[1]]
        assert len(np.unique(mine[0])) <= 16
        # The quantizer sums squares in fp32: equal candidates may swap by that much.
        assert (squared_error(mine, x) <= squared_error(rounded_to_range(x), x) * (1 + 1e-4) + 1e-30).all()


@pytest.mark.parametrize(("group", "most"), [(16, 0.79), (32, 0.83), (64, 0.86), (128, 0.86)])
def test_4_bits_gain_a_sixth_over_plain_rounding(group: int, most: float) -> None:
    w = (np.random.default_rng(3).standard_normal((256, 512)) * 0.02).astype(np.float32)
    got = _core.PackedMatrix.quantize(w, 4, group).unpack().reshape(-1, group)
    x = w.reshape(-1, group)
    assert squared_error(got, x).sum() / squared_error(rounded_to_range(x), x).sum() < most


@given(w=weights(), bits=st.sampled_from([4, 8]), group=groups, row=st.integers(0, 34))
def test_a_row_does_not_depend_on_its_neighbours(w: F32, bits: int, group: int, row: int) -> None:
    row %= w.shape[0]
    whole = _core.PackedMatrix.quantize(w, bits, group).unpack()
    alone = _core.PackedMatrix.quantize(w[row : row + 1], bits, group).unpack()
    assert_same_bits(alone, whole[row : row + 1])


@given(w=weights(limit=100.0), bits=st.sampled_from([4, 8]), half=st.booleans())
def test_narrow_weights_are_quantized_as_their_values(w: F32, bits: int, half: bool) -> None:
    narrow = w.astype(np.float16) if half else to_bf16(w)
    got = _core.PackedMatrix.quantize(narrow, bits, 32).unpack()
    assert_same_bits(got, _core.PackedMatrix.quantize(widen(narrow), bits, 32).unpack())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_weights_that_cannot_be_held_are_named(bits: int, bad: float) -> None:
    w = np.zeros((40, 70), np.float32)
    w[17, 33] = bad
    with pytest.raises(RequestError, match=r"row 17, column 33") as caught:
        _core.PackedMatrix.quantize(w, bits, 32)
    assert "finite" in caught.value.limit


@pytest.mark.parametrize(("bits", "largest"), [(4, 65504.0), (8, 127 * 65504.0)])
def test_the_largest_weights(bits: int, largest: float) -> None:
    w = np.array([[largest, -largest] * 16], np.float32)
    np.testing.assert_allclose(_core.PackedMatrix.quantize(w, bits, 32).unpack(), w, rtol=1e-3)
    with pytest.raises(RequestError):
        _core.PackedMatrix.quantize(w * np.float32(1.001), bits, 32)


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
        ("cols", lambda: _core.PackedMatrix.quantize(np.zeros((4, 0), np.float32), 4, 32)),
        ("array", lambda: _core.PackedMatrix.quantize(SQUARE.astype(np.int16), 4, 32)),
        ("bits", lambda: _core.PackedMatrix.quantize(SQUARE, 3, 32)),
        ("group", lambda: _core.PackedMatrix.quantize(SQUARE, 4, 48)),
    ],
)
def test_bad_arrays_are_refused(field: str, call: Any) -> None:
    with pytest.raises(RequestError) as caught:
        call()
    assert caught.value.field == field


def test_other_threads_run_meanwhile() -> None:
    w = np.zeros((4096, 4096), np.float32)
    stop = threading.Event()
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        while not stop.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        before, started = ticks, time.monotonic()
        _core.PackedMatrix.quantize(w, 4, 32)
        took, seen = time.monotonic() - started, ticks - before
    finally:
        stop.set()
        thread.join()
    assert took > 0.03, "too fast to tell"
    assert seen > 3  # with the GIL held it would be one tick at most, at either end
