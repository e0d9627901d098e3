"""Our quantizer: 8 bits exactly as defined, 4 bits never worse than plain rounding, on the whole better."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm import _core
from fastllm.errors import RequestError

F32 = npt.NDArray[np.float32]


groups = st.sampled_from([16, 32, 64, 128])


@st.composite
def weights(draw: st.DrawFn, limit: float = 60000.0) -> F32:
    """Weights with outliers, constant stretches, offsets and magnitudes down to denormals."""
    shape = (draw(st.integers(1, 35)), draw(st.one_of(st.integers(1, 300), st.sampled_from([32, 128, 256]))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    w = rng.standard_normal(shape) * draw(st.sampled_from([1e-42, 1e-7, 1e-6, 1e-5, 1e-4, 0.02, 1.0, 1000.0]))
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
    np.testing.assert_array_equal(alone.view(np.int32), whole[row : row + 1].view(np.int32))


@given(w=weights(limit=100.0), bits=st.sampled_from([4, 8]), half=st.booleans())
def test_narrow_weights_are_quantized_as_their_values(w: F32, bits: int, half: bool) -> None:
    if half:
        narrow: npt.NDArray[Any] = w.astype(np.float16)
        wide = narrow.astype(np.float32)
    else:
        narrow = (w.view(np.uint32) >> 16).astype(np.uint16)  # cut to bf16
        wide = (narrow.astype(np.uint32) << 16).view(np.float32)
    got = _core.PackedMatrix.quantize(narrow, bits, 32).unpack()
    want = _core.PackedMatrix.quantize(wide, bits, 32).unpack()
    np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))


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


@pytest.mark.parametrize("rows", [3, 16, 35])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 64])
def test_padding_is_inert(rows: int, bits: int, group: int) -> None:
    cols = 67  # kp is 96: 5 groups of 16 hold columns and one none, 2 groups of 64 do
    w = np.random.default_rng(rows).standard_normal((rows, cols)).astype(np.float32)
    packed = _core.PackedMatrix.quantize(w, bits, group)
    planes = packed.planes()
    for name in planes.keys() & {"scales", "mins"}:
        values = planes[name].view(np.uint16).reshape((rows + 15) // 16, -1, 16)
        assert values.shape[1] == -(-96 // group)
        assert not values[:, -(-cols // group) :].any()
        assert not values[-1, :, (rows - 1) % 16 + 1 :].any()
        assert values[-1, : -(-cols // group), : (rows - 1) % 16 + 1].all()


SQUARE = np.zeros((4, 4), np.float32)


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("rows", (SQUARE[:0], 4, 32)),
        ("cols", (np.zeros((4, 0), np.float32), 4, 32)),
        ("array", (SQUARE.astype(np.int16), 4, 32)),
        ("array", (SQUARE[0], 4, 32)),
        ("array", (SQUARE[:, ::2], 4, 32)),
        ("bits", (SQUARE, 3, 32)),
        ("group", (SQUARE, 4, 48)),
    ],
)
def test_bad_arguments_are_refused(field: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(RequestError) as caught:
        _core.PackedMatrix.quantize(*arguments)
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
