"""Every kernel against the float64 oracle, on every instruction set of the machine, with equal bits.

The attention kernels and the sampler have files of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from fastllm import _core, reference
from fastllm.errors import RequestError

Floats = npt.NDArray[np.float32]
ISAS = _core.supported_isas()


def same_on_all(compute: Callable[[str], Floats]) -> Floats:
    """The result of `compute(isa)`, after checking that every instruction set gives its bits."""
    results = {isa: compute(isa) for isa in ISAS}
    first = results[ISAS[0]]
    for isa, result in results.items():
        np.testing.assert_array_equal(result.view(np.int32), first.view(np.int32), err_msg=isa)
    return first


def matrix(draw: st.DrawFn, rows: int, columns: int, **kwargs: Any) -> Floats:
    return draw(strategies.floats(rows, columns, **kwargs))


@st.composite
def products(draw: st.DrawFn) -> tuple[strategies.QuantizedMatrix, Floats, Floats | None]:
    """Weights of any disk format, activations for them, and perhaps a residual."""
    weights = draw(strategies.quantized_matrices())
    rows = draw(strategies.sizes(1, 30))
    x = matrix(draw, rows, weights.columns)
    residual = draw(st.none() | strategies.floats(rows, weights.rows))
    return weights, x, residual


@given(products())
def test_matmul(product: tuple[strategies.QuantizedMatrix, Floats, Floats | None]) -> None:
    weights, x, residual = product
    packed = _core.PackedMatrix.from_ggml(
        weights.dtype, weights.data.reshape(-1), weights.rows, weights.columns
    )
    got = same_on_all(lambda isa: _core.matmul(x, packed, residual, isa=isa, threads=1))

    inputs = x.astype(np.float64)
    if weights.dtype in strategies.QUANTIZED_TYPES:
        inputs = reference.dequantize_activations(*reference.quantize_activations(x))
    expected = reference.matmul(inputs, weights.values)
    magnitude = np.abs(inputs) @ np.abs(weights.values.astype(np.float64)).T
    if residual is not None:
        expected = expected + residual
        magnitude = magnitude + np.abs(residual)
    # One fp32 accumulator per output: as many roundings as groups, or as columns.
    steps = weights.columns / 16 if weights.dtype in strategies.QUANTIZED_TYPES else weights.columns
    if weights.dtype in ("Q2_K", "Q4_1", "Q4_K", "Q5_1", "Q5_K"):  # codes and minimums cancel
        magnitude = magnitude + 16 * np.abs(inputs).sum(axis=1, keepdims=True) * np.abs(weights.values).max()
    assert np.all(np.abs(got - expected) <= magnitude * (steps + 4) * 2.0**-24 + 1e-30)


@given(products(), st.integers(1, 4))
def test_matmul_rows_are_independent(
    product: tuple[strategies.QuantizedMatrix, Floats, Floats | None], threads: int
) -> None:
    """A row alone, in any batch, on any number of threads: the same bits."""
    weights, x, _ = product
    packed = _core.PackedMatrix.from_ggml(
        weights.dtype, weights.data.reshape(-1), weights.rows, weights.columns
    )
    together = _core.matmul(x, packed, threads=threads)
    for m in range(len(x)):
        alone = _core.matmul(x[m : m + 1].copy(), packed, threads=1)
        np.testing.assert_array_equal(alone[0].view(np.int32), together[m].view(np.int32))


@given(st.data(), st.sampled_from((4, 8)), st.sampled_from((16, 32, 64, 128)))
def test_matmul_of_own_quantization(data: st.DataObject, bits: int, group: int) -> None:
    rows, columns, m = data.draw(strategies.sizes(1, 40)), data.draw(strategies.sizes(1, 300)), 5
    weights = data.draw(
        strategies.floats(rows, columns, patterns=("normal", "uniform", "outliers", "sparse"))
    )
    x = data.draw(strategies.floats(m, columns, patterns=("normal", "outliers")))
    packed = _core.PackedMatrix.quantize(weights, bits, group)
    got = same_on_all(lambda isa: _core.matmul(x, packed, isa=isa, threads=1))
    inputs = reference.dequantize_activations(*reference.quantize_activations(x))
    values = packed.unpack()
    expected = reference.matmul(inputs, values)
    bound = np.abs(inputs).sum(axis=1, keepdims=True) * max(np.abs(values).max(), 1e-30) * 20
    assert np.all(np.abs(got - expected) <= bound * (columns / 16 + 4) * 2.0**-24)


@given(strategies.quantized_matrices(), strategies.seeds())
def test_embedding_is_exact(weights: strategies.QuantizedMatrix, seed: int) -> None:
    packed = _core.PackedMatrix.from_ggml(
        weights.dtype, weights.data.reshape(-1), weights.rows, weights.columns
    )
    ids = np.random.default_rng(seed).integers(0, weights.rows, 7, dtype=np.int32)
    got = same_on_all(lambda isa: _core.embedding(packed, ids, isa=isa))
    np.testing.assert_array_equal(got, weights.values[ids])


@given(st.data())
def test_quantize_rows(data: st.DataObject) -> None:
    x = data.draw(strategies.floats(data.draw(st.integers(1, 4)), data.draw(strategies.sizes(1, 300))))
    q, scale = reference.quantize_activations(x)
    for isa in ISAS:
        got_q, got_scale = _core.quantize_rows(x, isa=isa)
        np.testing.assert_array_equal(got_q[:, : x.shape[1]], q, err_msg=isa)
        assert not got_q[:, x.shape[1] :].any()
        np.testing.assert_array_equal(got_scale[:, : scale.shape[1]], scale, err_msg=isa)
        assert not got_scale[:, scale.shape[1] :].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_quantize_rows_keeps_what_is_not_a_number_visible(isa: str, bad: float) -> None:
    x = np.ones((2, 96), dtype=np.float32)
    x[1, 40] = bad
    _q, scale = _core.quantize_rows(x, isa=isa)
    assert np.flatnonzero(np.isnan(scale[1])).tolist() == [40 // 16]
    assert np.isfinite(scale[0]).all()
    packed = _core.PackedMatrix.quantize(np.ones((16, 96), dtype=np.float32), 8, 32)
    y = _core.matmul(x, packed, isa=isa)
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()


@given(st.data())
def test_norms(data: st.DataObject) -> None:
    rows, dim = data.draw(st.integers(1, 3)), data.draw(strategies.sizes(1, 600))
    x = data.draw(strategies.floats(rows, dim, patterns=("normal", "outliers", "zeros", "alternating")))
    weight, bias = data.draw(strategies.floats(dim)), data.draw(st.none() | strategies.floats(dim))
    got = same_on_all(lambda isa: _core.rms_norm(x, weight, 1e-5, isa=isa))
    np.testing.assert_allclose(got, reference.rms_norm(x, weight, 1e-5), rtol=2e-6, atol=1e-9)
    got = same_on_all(lambda isa: _core.layer_norm(x, weight, bias, 1e-5, isa=isa))
    expected = reference.layer_norm(x, weight, bias, 1e-5)
    scale = np.abs(expected).max() + np.abs(weight).max()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * scale)


@given(st.data())
def test_rope(data: st.DataObject) -> None:
    tokens, heads = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    head_dim = data.draw(st.sampled_from((2, 16, 30, 64, 80, 128)))
    rotary = data.draw(st.integers(1, head_dim // 2)) * 2
    x = data.draw(strategies.floats(tokens * heads, head_dim)).reshape(tokens, heads, head_dim)
    angles = np.random.default_rng(0).uniform(0, 100, (tokens, rotary // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    got = same_on_all(lambda isa: _core.rope(x, cos, sin, isa=isa))
    expected = reference.rope(x, angles)
    np.testing.assert_allclose(got, expected, atol=3e-7 * max(np.abs(x).max(), 1e-30), rtol=1e-6)


@given(st.data())
def test_gates(data: st.DataObject) -> None:
    shape = data.draw(st.integers(1, 3)), data.draw(strategies.sizes(1, 200))
    gate, up = data.draw(strategies.floats(*shape, scale=3.0)), data.draw(strategies.floats(*shape))
    tolerance = 1e-6 * max(np.abs(gate).max() * np.abs(up).max(), 1e-30)
    got = same_on_all(lambda isa: _core.silu_mul(gate, up, isa=isa))
    np.testing.assert_allclose(got, reference.silu_mul(gate, up), rtol=1e-6, atol=tolerance)
    got = same_on_all(lambda isa: _core.gelu_tanh_mul(gate, up, isa=isa))
    expected = reference.gelu_tanh(gate) * up
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=tolerance)


def test_exp() -> None:
    x = np.concatenate([np.linspace(-100, 100, 200_001), [np.nan, np.inf, -np.inf, 0.0, -0.0]])
    x = x.astype(np.float32)
    got = same_on_all(lambda isa: _core.exp(x, isa=isa))
    with np.errstate(over="ignore", under="ignore"):
        expected = np.exp(x.astype(np.float64))
    usual = (x > -87.3) & (x < 88.7)
    assert np.abs(got[usual] / expected[usual] - 1).max() < 1.5 * 2.0**-24
    assert np.all(got[x < -87.4] == 0)
    assert np.all(np.isinf(got[x > 88.8]))
    assert np.isnan(got[np.isnan(x)]).all()


def test_softcap() -> None:
    x = np.linspace(-300, 300, 5001).astype(np.float32)
    got = same_on_all(lambda isa: _core.softcap(x, 30.0, isa=isa))
    np.testing.assert_allclose(got, reference.softcap(x, 30.0), atol=1e-5)


@given(st.sampled_from((16, 32, 48, 64, 80, 96, 112, 128, 512)), st.integers(1, 3), strategies.seeds())
def test_hadamard(columns: int, rows: int, seed: int) -> None:
    """The transform that the definition gives, bit for bit the reference's, and its own inverse."""
    x = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    got = same_on_all(lambda isa: _core.hadamard(x, isa=isa))
    np.testing.assert_array_equal(got, reference.hadamard(x))
    order = columns & -columns
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    blocks = x.reshape(rows, -1, order).astype(np.float64)
    np.testing.assert_allclose(got, (blocks @ matrix / order**0.5).reshape(x.shape), atol=1e-5)
    np.testing.assert_allclose(_core.hadamard(got), x, atol=1e-5)


@given(st.data())
def test_half_precision_weights_are_read_exactly(data: st.DataObject) -> None:
    """fp16 and bf16 through matmul with one-hot activations, every bit pattern's class included."""
    raw = data.draw(st.lists(st.integers(0, 2**16 - 1), min_size=16, max_size=48))
    bits = np.array(raw, dtype=np.uint16)
    values = bits.view(np.float16).reshape(-1, 1)
    packed = _core.PackedMatrix.from_float(np.ascontiguousarray(values), "f16")
    one = np.ones((1, 1), dtype=np.float32)
    got = same_on_all(lambda isa: _core.matmul(one, packed, isa=isa))
    np.testing.assert_array_equal(got[0], values[:, 0].astype(np.float32))


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda x, w: _core.matmul(x.astype(np.float64), w), "x"),
        (lambda x, w: _core.matmul(x[:, :-1].copy(), w), "x"),
        (lambda x, w: _core.matmul(x.T, w), "x"),
        (lambda x, w: _core.matmul([1.0], w), "x"),
        (lambda x, w: _core.matmul(x, w, residual=x), "residual"),
        (lambda x, w: _core.matmul(x, w, threads=-1), "threads"),
        (lambda x, w: _core.matmul(x, w, isa="sse9"), "FASTLLM_ISA"),
        (lambda x, w: _core.rms_norm(x, x[0, :-1].copy(), 1e-5), "weight"),
        (lambda x, w: _core.hadamard(x[:, :-1].copy()), "x"),
        (lambda x, w: _core.embedding(w, np.array([16], dtype=np.int32)), "ids"),
        (lambda x, w: _core.embedding(w, np.array([0], dtype=np.int64)), "ids"),
    ],
)
def test_wrong_arguments_name_the_argument(call: Callable[..., Any], field: str) -> None:
    x = np.ones((3, 64), dtype=np.float32)
    w = _core.PackedMatrix.quantize(np.ones((16, 64), dtype=np.float32), 4, 32)
    with pytest.raises(RequestError, match=field):
        call(x, w)


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "SKBUILD_EDITABLE_VERBOSE": "0", **env}  # a build on import is not to say anything
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_override_takes_effect(isa: str) -> None:
    done = run_python("from fastllm import _core; print(_core.isa())", FASTLLM_ISA=isa)
    assert done.stdout.strip() == isa


def test_unknown_override_is_an_error() -> None:
    done = run_python("from fastllm import _core; print(_core.isa())", FASTLLM_ISA="sse9")
    assert done.returncode != 0
    assert "RequestError: FASTLLM_ISA: expected one of " in done.stderr
    assert "baseline, got 'sse9'" in done.stderr


LACKING = [isa for isa in ("avxvnni", "avx512vnni") if isa not in ISAS]


@pytest.mark.skipif(not LACKING, reason="this machine runs every instruction set")
def test_an_override_that_the_machine_lacks_is_an_error() -> None:
    x = np.ones((1, 16), dtype=np.float32)
    with pytest.raises(RequestError) as caught:
        _core.rms_norm(x, x[0], 1e-5, isa=LACKING[0])
    assert (caught.value.field, caught.value.value) == ("FASTLLM_ISA", LACKING[0])
