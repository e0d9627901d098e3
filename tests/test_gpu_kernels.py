"""Triton kernels against a float64 oracle and the CPU core: in Triton's interpreter, or on a GPU where there
is one.

The interpreter computes bfloat16 wrongly, so it is left out there; and a step of a loop takes it
milliseconds, so shapes are a few blocks. What the compiler makes of the kernels is tested in
test_gpu_compilation.py.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read as the kernels are imported

from random_blocks import QUANTIZED, random_blocks  # noqa: E402

from fastllm import RequestError, kernels, ops  # noqa: E402
from fastllm.kernels import GpuMatrix, products  # noqa: E402
from fastllm.kernels.layout import unpack_codes  # noqa: E402
from fastllm.kernels.tiles import ARCHITECTURES, Tile, table  # noqa: E402
from fastllm.kernels.tune import write_table  # noqa: E402
from fastllm.reference.integer import quantize_activations  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

DEVICE = "cuda" if GPU else "cpu"
TABLES = Path(kernels.__file__).parent / "tables"
# Of a product's relative error: what rounding the weights and the result to the type leaves.
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3} | ({torch.bfloat16: 8e-3} if GPU else {})
EXAMPLES = settings(deadline=None, max_examples=40 if GPU else 12)


@dataclass(frozen=True)
class Weights:
    """A matrix as both sides know it."""

    packed: ops.PackedMatrix
    matrix: GpuMatrix

    @property
    def exact(self) -> npt.NDArray[np.float64]:
        return ops.dequantize(self.packed).astype(np.float64)


def from_file(dtype: str, rows: int, cols: int, seed: int = 0) -> Weights:
    blocks = random_blocks(dtype, rows, cols, rng=np.random.default_rng(seed), std=0.05)
    packed = ops.from_ggml(dtype, blocks.reshape(-1), rows, cols)
    return Weights(packed, kernels.from_packed(packed, DEVICE))


def quantized(bits: int, group: int, rows: int, cols: int, seed: int = 0) -> Weights:
    w = np.random.default_rng(seed).normal(size=(rows, cols)).astype(np.float32) / 16
    packed = ops.quantize(w, bits, group)
    return Weights(packed, kernels.from_packed(packed, DEVICE))


@st.composite
def weights(draw: st.DrawFn, eight_bits: bool = False) -> Weights:
    """Any format of a file, or what our quantizer makes; some outputs and blocks, whole or not."""
    rows, seed = draw(st.integers(1, 70)), draw(st.integers(0, 999))
    if not eight_bits and draw(st.booleans()):
        dtype = draw(st.sampled_from(QUANTIZED))
        unit = 256 if dtype.endswith(("K", "XS")) else 32
        return from_file(dtype, rows, unit * draw(st.integers(1, 512 // unit)), seed)
    bits = 8 if eight_bits else draw(st.sampled_from([4, 8]))
    groups = [32, 64, 128] + ([0] if bits == 8 else []) + ([] if eight_bits else [16])
    return quantized(bits, draw(st.sampled_from(groups)), rows, draw(st.integers(1, 600)), seed)


def activations(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=generator).to(dtype).to(DEVICE)


def double(tensor: torch.Tensor) -> npt.NDArray[np.float64]:
    return tensor.double().cpu().numpy()


def check_close(got: torch.Tensor, expected: npt.NDArray[np.float64], dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert tuple(got.shape) == expected.shape
    error = np.linalg.norm(double(got) - expected) / max(np.linalg.norm(expected), 1e-30)
    assert error < BOUNDS[dtype]


def quantized_rows(x: torch.Tensor) -> npt.NDArray[np.float64]:
    """What int8 activations stand for, by the float32 reference."""
    q, scale = quantize_activations(x.float().cpu().numpy(), group=x.shape[1])
    return q.astype(np.float64) * scale.astype(np.float64)


# ---- the layout --------------------------------------------------------------------------------------------


@EXAMPLES
@given(weights())
def test_repacking_is_exact_both_ways(w: Weights) -> None:
    again = kernels.to_packed(w.matrix)
    assert repr(again) == repr(w.packed)
    assert (again.zero, again.codebook) == (w.packed.zero, w.packed.codebook)
    planes, expected = again.planes(), w.packed.planes()
    assert planes.keys() == expected.keys()
    for name in planes:
        np.testing.assert_array_equal(planes[name], expected[name], name)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_dequantized_bit_for_bit(dtype: str) -> None:
    w = from_file(dtype, 37, 512)
    got = kernels.dequantize(w.matrix).cpu().numpy()
    np.testing.assert_array_equal(got.view(np.uint32), ops.dequantize(w.packed).view(np.uint32))


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 128), (8, 32), (8, 0)])
@pytest.mark.parametrize("cols", [576, 704, 300])
def test_our_quantizer_dequantized_bit_for_bit(bits: int, group: int, cols: int) -> None:
    w = quantized(bits, group, 20, cols)
    got = kernels.dequantize(w.matrix).cpu().numpy()
    np.testing.assert_array_equal(got.view(np.uint32), ops.dequantize(w.packed).view(np.uint32))


def test_the_layout_is_as_described() -> None:
    codes = np.arange(256, dtype=np.uint8) % 16
    w = from_file("Q4_0", 1, 256)
    planes = dict(w.packed.planes())
    lines = planes["codes"].copy().reshape(-1, 16, 4)  # row 0 of the panel
    by_line = codes.reshape(-1, 2, 4)
    lines[:, 0] = by_line[:, 0] | by_line[:, 1] << 4
    matrix = kernels.from_packed(
        ops.PackedMatrix.from_planes("u4", 1, 256, 32, 8, planes | {"codes": lines.reshape(-1)})
    )
    for b, p, c in ((0, 0, 0), (0, 3, 31), (1, 2, 7)):
        word = int(matrix.codes[b, 0, c]) & 0xFFFF
        assert word >> 4 * p & 15 == codes[128 * b + 32 * p + c]
    assert (unpack_codes(matrix)[0].cpu().numpy() == codes).all()


def test_bytes_stay_near_the_file() -> None:
    for dtype, bytes_of_block, columns in (
        ("Q4_K", 144, 256),
        ("Q6_K", 210, 256),
        ("Q4_1", 20, 32),
        ("Q8_0", 34, 32),
    ):
        matrix = from_file(dtype, 64, 1024).matrix
        assert matrix.nbytes <= 1.1 * 64 * 1024 / columns * bytes_of_block


# ---- products ----------------------------------------------------------------------------------------------


@EXAMPLES
@given(weights(), st.integers(1, 40), st.sampled_from(list(BOUNDS)), st.booleans())
def test_weight_only(w: Weights, m: int, dtype: torch.dtype, deterministic: bool) -> None:
    x = activations(m, w.packed.cols, dtype)
    y = kernels.matmul(x, w.matrix, deterministic=deterministic)
    check_close(y, double(x) @ w.exact.T, dtype)


@EXAMPLES
@given(weights(eight_bits=True), st.integers(1, 40), st.sampled_from(list(BOUNDS)), st.booleans())
def test_int8_activations(w: Weights, m: int, dtype: torch.dtype, deterministic: bool) -> None:
    x = activations(m, w.packed.cols, dtype)
    y = kernels.matmul(x, w.matrix, activations="int8", deterministic=deterministic)
    check_close(y, quantized_rows(x) @ w.exact.T, dtype)


def all_tiles(kind: str) -> list[Tile]:
    """Every tile of any table, and the other way of reading memory."""
    tiles = dict.fromkeys(tile for name in ARCHITECTURES for _, tile in table(name).tiles[kind])
    return list(
        dict.fromkeys(t for tile in tiles for t in (tile, tile._replace(descriptors=1 - tile.descriptors)))
    )


@pytest.mark.parametrize("tile", all_tiles("u4"), ids=str)
def test_every_tile(tile: Tile) -> None:
    w = quantized(4, 128, 80, 400)
    x = activations(19, 400, torch.float32)
    y = products.weight_only(x, w.matrix, None, None, False, tile)
    check_close(y, double(x) @ w.exact.T, torch.float32)


@pytest.mark.parametrize("tile", all_tiles("int8"), ids=str)
def test_every_int8_tile(tile: Tile) -> None:
    w = quantized(8, 0, 80, 400)
    x = activations(19, 400, torch.float32)
    q, scale = kernels.quantize_rows(x)
    y = products.int8(q, scale, w.matrix, None, None, False, torch.float32, tile)
    check_close(y, quantized_rows(x) @ w.exact.T, torch.float32)


@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_sums_split_between_programs(group: int) -> None:
    """Many parts of K for one tile: their sums are added in one order, and the counters are left at zero."""
    w = quantized(4, group, 16, 128 * 9)
    x = activations(3, 128 * 9, torch.float32)
    tile = Tile(16, 16, 1, 2, 2, 0)
    y = products.weight_only(x, w.matrix, None, None, False, tile)
    check_close(y, double(x) @ w.exact.T, torch.float32)
    assert torch.equal(y, products.weight_only(x, w.matrix, None, None, False, tile))
    for counters in products._counters.values():
        assert not counters.any()


@pytest.mark.parametrize("activations_as", ["float", "int8"])
@pytest.mark.parametrize("paired", [False, True])
def test_fused_epilogues(paired: bool, activations_as: Any) -> None:
    gate, up = quantized(8, 32, 40, 256, 1), quantized(8, 32, 40, 256, 2)
    matrix = kernels.interleave_rows(gate.matrix, up.matrix) if paired else gate.matrix
    x = activations(2 * 3, 256, torch.float16)
    bias = activations(1, matrix.rows, torch.float16, 3)[0]
    residual = activations(6, 40, torch.float16, 4)
    y = kernels.matmul(
        x.view(2, 3, 256), matrix, bias, residual.view(2, 3, 40), paired=paired, activations=activations_as
    )
    seen = quantized_rows(x) if activations_as == "int8" else double(x)
    if paired:
        a = seen @ gate.exact.T + double(bias)[0::2]
        b = seen @ up.exact.T + double(bias)[1::2]
        expected = a / (1 + np.exp(-a)) * b
    else:
        expected = seen @ gate.exact.T + double(bias)
    check_close(y, (expected + double(residual)).reshape(2, 3, 40), torch.float16)


@pytest.mark.parametrize("activations_as", ["float", "int8"])
def test_deterministic_rows_do_not_know_their_neighbours(activations_as: Any) -> None:
    w = quantized(8, 32, 48, 1200)
    x = activations(70, 1200, torch.float32)
    whole = kernels.matmul(x, w.matrix, activations=activations_as, deterministic=True)
    for rows in (slice(0, 1), slice(3, 5), slice(60, 70)):
        part = kernels.matmul(x[rows], w.matrix, activations=activations_as, deterministic=True)
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("activations_as", ["float", "int8"])
def test_deterministic_products_of_more_rows_than_counters(
    activations_as: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = quantized(8, 32, 48, 600)
    x, residual = activations(150, 600, torch.float32), activations(150, 48, torch.float32, 1)
    whole = kernels.matmul(x, w.matrix, residual=residual, activations=activations_as, deterministic=True)
    monkeypatch.setattr(products, "PINNED_ROWS", 64)
    cut = kernels.matmul(x, w.matrix, residual=residual, activations=activations_as, deterministic=True)
    assert torch.equal(cut, whole)


def test_a_graph_does_not_fill_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a capture allocates would be zeroed in every replay, once for each product."""
    device = torch.device(DEVICE)
    monkeypatch.setattr(products, "_counters", {})
    monkeypatch.setattr(products, "_stream", lambda _: products._GRAPHS)
    assert products._zeros(device) is not products._zeros(device)  # nothing ran before the capture
    monkeypatch.setattr(products, "_stream", lambda _: 7)
    eager = products._zeros(device)
    assert products._zeros(device) is eager
    monkeypatch.setattr(products, "_stream", lambda _: products._GRAPHS)
    captured = products._zeros(device)
    assert products._zeros(device) is captured
    assert captured is not eager


def test_a_new_table_has_all_kinds(tmp_path: Path) -> None:
    timed = {"u4": {"8": [64, 8, 2, 2, 8, 0]}}
    for file in (tmp_path / "sm_120.json", tmp_path / "sm_90.json"):
        if file.name == "sm_90.json":
            file.write_text(TABLES.joinpath(file.name).read_text())
        write_table(file, timed, "a GPU")
        written = json.loads(file.read_text())
        assert (
            written["tiles"].keys() == json.loads(TABLES.joinpath("sm_90.json").read_text())["tiles"].keys()
        )
        assert written["tiles"]["u4"] == timed["u4"]
        assert written["measured"] == "a GPU"


def test_many_rows_go_through_a_dequantized_matrix() -> None:
    w = quantized(4, 32, 24, 96)
    m = products.tiles_of(w.matrix.device).dequantize_from
    x = activations(m, 96, torch.float16)
    y = kernels.matmul(
        x, w.matrix, activations(1, 24, torch.float16)[0], activations(m, 24, torch.float16, 1)
    )
    expected = double(x) @ w.exact.T + double(activations(1, 24, torch.float16)[0])
    check_close(y, expected + double(activations(m, 24, torch.float16, 1)), torch.float16)


def test_the_same_weights_as_the_cpu_core() -> None:
    """Both sides against the same numbers; they differ by how activations are rounded."""
    w = from_file("Q4_1", 64, 256)
    x = activations(5, 256, torch.float32)
    here = kernels.matmul(x, w.matrix)
    there = ops.matmul(x.cpu().numpy(), w.packed)
    assert np.linalg.norm(double(here) - there) / np.linalg.norm(there) < 0.01


def test_strided_rows_and_views() -> None:
    w = quantized(4, 32, 20, 96)
    wide = activations(9, 200, torch.float32)
    x = wide[::2, 3:99]  # neither aligned nor contiguous
    check_close(kernels.matmul(x, w.matrix), double(x) @ w.exact.T, torch.float32)
    check_close(kernels.matmul(x.t().contiguous().t(), w.matrix), double(x) @ w.exact.T, torch.float32)


# ---- activations to int8 -----------------------------------------------------------------------------------


@EXAMPLES
@given(st.integers(1, 5), st.integers(1, 700), st.integers(0, 999), st.sampled_from(list(BOUNDS)))
def test_rows_are_quantized_as_the_reference_does(m: int, k: int, seed: int, dtype: torch.dtype) -> None:
    x = activations(m, k, dtype, seed)
    if seed % 3 == 0:
        x[0] = 0
    if seed % 5 == 0 and dtype == torch.float32:
        x[-1] *= 1e-37  # about the least for which there is a scale
    q, scale = kernels.quantize_rows(x)
    expected, scales = quantize_activations(x.float().cpu().numpy(), group=k)
    natural = q.cpu().view(m, -1, 16, 2).permute(0, 1, 3, 2).reshape(m, -1).numpy()
    np.testing.assert_array_equal(natural[:, :k], expected)
    np.testing.assert_array_equal(natural[:, k:], 0)
    np.testing.assert_array_equal(scale.cpu().numpy(), scales[:, 0])


@pytest.mark.parametrize("k", [100, 576, 2112])
def test_the_norm_before_quantizing(k: int) -> None:
    x, weight = activations(4, k, torch.float16), activations(1, k, torch.float32, 1)[0]
    q, scale = kernels.rms_norm_quantize(x, weight, 1e-5)
    exact = double(x) / np.sqrt((double(x) ** 2).mean(1, keepdims=True) + 1e-5) * double(weight)
    natural = q.cpu().view(4, -1, 16, 2).permute(0, 1, 3, 2).reshape(4, -1).numpy()[:, :k]
    np.testing.assert_allclose(scale.cpu().numpy(), np.abs(exact).max(1) / 127, rtol=1e-5)
    assert np.abs(natural - exact / (np.abs(exact).max(1, keepdims=True) / 127)).max() < 0.502
    w = quantized(8, 0, 16, k)
    y = kernels.matmul_int8(q, scale, w.matrix, dtype=torch.float32)
    check_close(y, natural * double(scale)[:, None] @ w.exact.T, torch.float32)


# ---- as operators of torch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("activations_as", ["float", "int8"])
def test_torch_compile_sees_through(activations_as: Any) -> None:
    w = quantized(8, 32, 24, 96)

    def block(x: torch.Tensor) -> torch.Tensor:
        return kernels.matmul(torch.relu(x), w.matrix, residual=x[:, :24], activations=activations_as) * 2

    x = activations(3, 96, torch.float32)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), block(x))


def test_operators_are_registered_properly() -> None:
    w = quantized(8, 32, 24, 96).matrix
    x = activations(3, 96, torch.float32)
    planes = (w.codes, w.extra, w.scales, w.subscales, w.mins, w.submins)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.fastllm.weight_only_matmul.default,
        (x, *planes, w.kind, w.cols, w.group, w.zero, None, None, False, False),
        test_utils=checks,
    )
    torch.library.opcheck(torch.ops.fastllm.quantize_rows.default, (x, None, 0.0), test_utils=checks)
    torch.library.opcheck(
        torch.ops.fastllm.dequantize.default,
        (*planes, w.kind, w.cols, w.group, w.zero, torch.float16),
        test_utils=checks,
    )
    q, scale = kernels.quantize_rows(x)
    torch.library.opcheck(
        torch.ops.fastllm.int8_matmul.default,
        (q, scale, w.codes, w.scales, None, w.cols, w.group, None, None, False, torch.float32, False),
        test_utils=checks,
    )


def test_ops_take_tensors() -> None:
    w = quantized(8, 32, 24, 96)
    x = activations(3, 96, torch.float32)
    assert torch.equal(ops.matmul(x, w.matrix), kernels.matmul(x, w.matrix))
    assert torch.equal(ops.dequantize(w.matrix), kernels.dequantize(w.matrix))
    residual = activations(3, 24, torch.float32, 1)
    assert torch.equal(ops.matmul(x, w.matrix, residual), kernels.matmul(x, w.matrix, residual=residual))
    with pytest.raises(RequestError, match=r"matmul: w: .*from_packed.*PackedMatrix"):
        ops.matmul(x, w.packed)
    with pytest.raises(RequestError, match=r"matmul: x: .*tensor.*GpuMatrix"):
        ops.matmul(x.cpu().numpy(), w.matrix)


# ---- errors ------------------------------------------------------------------------------------------------


def test_errors_name_the_argument() -> None:
    w = quantized(4, 32, 24, 96).matrix
    x = activations(3, 96, torch.float32)

    def refused(match: str, *arguments: Any, **named: Any) -> None:
        with pytest.raises(RequestError, match=match):
            kernels.matmul(*arguments, **named)

    refused("matmul: x: .*float64", x.double(), w)
    refused(r"matmul: x: .*96.*\(3, 95\)", x[:, :95], w)
    refused("matmul: x", x[:0], w)
    refused("matmul: x: .*ndarray", x.cpu().numpy(), w)
    refused("matmul: w: .*PackedMatrix", x, kernels.to_packed(w))
    refused("matmul: bias", x, w, activations(1, 23, torch.float32)[0])
    refused("matmul: residual", x, w, None, activations(3, 24, torch.float16))
    refused("matmul: paired", x, quantized(4, 32, 23, 96).matrix, paired=True)
    refused("matmul: activations", x, w, activations="fp8")
    refused("matmul: w: .*8-bit.*u4", x, w, activations="int8")
    refused("groups of 16", x, quantized(8, 16, 24, 96).matrix, activations="int8")
    with pytest.raises(RequestError, match=r"packed.*f16"):
        kernels.from_packed(ops.from_float(np.zeros((4, 4), np.float32)))
    with pytest.raises(RequestError, match=r"up.*layout of gate"):
        kernels.interleave_rows(w, quantized(4, 64, 24, 96).matrix)
    with pytest.raises(RequestError, match="dequantize: dtype"):
        kernels.dequantize(w, torch.int32)
    with pytest.raises(RequestError, match="rms_norm_quantize: weight"):
        kernels.rms_norm_quantize(x, activations(1, 95, torch.float32)[0], 1e-5)
    with pytest.raises(RequestError, match=r"quantize_rows: x.*65536"):
        kernels.quantize_rows(torch.zeros(1, 65537, device=DEVICE))
    q, scale = kernels.quantize_rows(x)
    with pytest.raises(RequestError, match="matmul_int8: scale"):
        kernels.matmul_int8(q, scale[:2], quantized(8, 32, 24, 96).matrix)


def test_without_a_gpu_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    w = quantized(4, 32, 24, 96).packed
    monkeypatch.setattr(products, "INTERPRETED", False)
    on_cpu = kernels.from_packed(w)
    for call in (
        lambda: kernels.matmul(torch.zeros(1, 96), on_cpu),
        lambda: kernels.dequantize(on_cpu),
        lambda: kernels.quantize_rows(torch.zeros(1, 96)),
    ):
        with pytest.raises(RequestError, match="CUDA device"):
            call()


def test_planes_are_checked() -> None:
    packed = quantized(4, 32, 24, 96).packed
    planes = packed.planes()
    make = ops.PackedMatrix.from_planes
    assert (make("u4", 24, 96, 32, 0, planes).unpack() == packed.unpack()).all()
    for arguments, match in (
        (("u3", 24, 96, 32, 0, planes), "kind.*u3"),
        (("u4", 24, 96, 33, 0, planes), "group.*33"),
        (("u4", 24, 96, 32, 8, planes), "zero.*8"),
        (("u4", 40, 96, 32, 0, planes), "codes.*bytes"),
        (("u5", 24, 96, 32, 0, planes), "planes.*extra"),
        (("u4", 24, 96, 32, 0, planes | {"more": planes["codes"]}), "planes"),
        (("u4", 24, 96, 32, 0, planes | {"codes": planes["codes"].view(np.int8)}), "codes.*int8"),
        (("u4", 24, 96, 32, 0, planes | {"codes": [0]}), "codes.*list"),
        (("u4", 24, 96, 32, 0, planes, [0] * 15), "codebook"),
    ):
        with pytest.raises(RequestError, match=match):
            make(*arguments)
