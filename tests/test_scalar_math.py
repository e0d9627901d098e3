"""The core's own double-precision functions, and the rotary tables made with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm import _core, reference
from fastllm.errors import RequestError

Float64 = npt.NDArray[np.float64]

wide = np.finfo(np.longdouble).nmant > 60
needs_long_double = pytest.mark.skipif(not wide, reason="long double is no wider than double here")


def errors_in_units(ours: Float64, exact: npt.NDArray[np.longdouble]) -> float:
    """The largest distance to the exact value, in units in the last place of double."""
    units = np.spacing(np.abs(exact.astype(np.float64)))
    return float(np.max(np.abs(ours.astype(np.longdouble) - exact) / units))


def sample_points(seed: int, low: float, high: float) -> Float64:
    return np.random.default_rng(seed).uniform(low, high, 500)


@needs_long_double
@pytest.mark.parametrize(
    ("name", "exact", "ranges"),
    [
        ("exp", np.exp, [(-708.0, 709.7), (-1.0, 1.0), (-1e-3, 1e-3)]),
        ("log", np.log, [(0.5, 2.0), (1 - 1e-8, 1 + 1e-8), (0.0, 1e300), (0.0, 1e-300)]),
        ("sin", np.sin, [(-1.0, 1.0), (-100.0, 100.0), (-(2.0**21), 2.0**21)]),
        ("cos", np.cos, [(-1.0, 1.0), (-100.0, 100.0), (-(2.0**21), 2.0**21)]),
    ],
)
@given(seed=st.integers(0, 2**32))
def test_accuracy(
    name: str,
    exact: Callable[[npt.NDArray[np.longdouble]], npt.NDArray[np.longdouble]],
    ranges: list[tuple[float, float]],
    seed: int,
) -> None:
    for low, high in ranges:
        x = sample_points(seed, low, high)
        assert errors_in_units(_core.scalar_math(name, x), exact(x.astype(np.longdouble))) < 1.0


@needs_long_double
@given(st.integers(0, 2**32), st.sampled_from([-1.0, -0.5, -0.03125, 0.0, 1.0, 3.7, 40.0, -40.0]))
def test_pow(seed: int, exponent: float) -> None:
    x = np.exp(sample_points(seed, -5.0, 15.0))
    exact = np.power(x.astype(np.longdouble), np.longdouble(exponent))
    assert errors_in_units(_core.scalar_math("pow", x, exponent), exact) < 1.0


@needs_long_double
def test_near_multiples_of_half_pi() -> None:
    """Where the reduced argument is smallest, and a reduction with too few bits of pi would show."""
    x = np.arange(1, 1_300_000, 97) * (np.pi / 2)
    assert errors_in_units(_core.scalar_math("sin", x), np.sin(x.astype(np.longdouble))) < 1.0
    assert errors_in_units(_core.scalar_math("cos", x), np.cos(x.astype(np.longdouble))) < 1.0


def test_special_values() -> None:
    inf, nan = np.inf, np.nan

    def values(name: str, *x: float) -> list[float]:
        return list(_core.scalar_math(name, np.array(x)))

    assert values("exp", 0.0, -inf, -800.0, inf, 710.0) == [1.0, 0.0, 0.0, inf, inf]
    assert values("exp", -745.0) == [5e-324]
    assert values("log", 1.0, 0.0, inf) == [0.0, -inf, inf]
    assert values("log", 5e-324) == [np.log(5e-324)]
    assert values("cos", 0.0) == [1.0]
    assert np.all(
        np.isnan(values("log", -1.0, nan) + values("exp", nan) + values("sin", nan, inf, 2.0**21 + 1))
    )
    assert list(_core.scalar_math("pow", np.array([10.0, 2.0, 1.0]), 400.0)) == [inf, 2.0**400, 1.0]
    with pytest.raises(RequestError, match="tan"):
        _core.scalar_math("tan", np.zeros(1))


@pytest.mark.parametrize(("base", "rotary"), [(10000.0, 64), (500000.0, 128), (1e6, 80)])
def test_rope_tables(base: float, rotary: int) -> None:
    factors = 1.0 + np.arange(rotary // 2) / 7
    frequency = _core.rope_inverse_frequencies(base, rotary, 2.0, factors)
    angles = reference.rope_angles([1], rotary, base, linear_factor=2.0, factors=list(factors))[0]
    assert np.allclose(frequency, angles, rtol=4e-16, atol=0)
    for first in (0, 1000, 1_000_000):
        cos, sin = _core.rope_tables(frequency, first, 40)
        angle = np.arange(first, first + 40, dtype=np.float64)[:, None] * frequency
        assert cos.dtype == sin.dtype == np.float32
        for ours, exact in ((cos, np.cos(angle)), (sin, np.sin(angle))):
            # The rounding of a value known to a unit of double: off only next to a tie.
            assert np.max(np.abs(ours - exact) / np.spacing(np.abs(exact).astype(np.float32))) <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: _core.rope_tables(np.ones(4), 2**21, 2), "2\\^21"),
        (lambda: _core.rope_tables(np.array([np.nan]), 0, 2), "inverse_frequency"),
        (lambda: _core.rope_tables(np.ones(4), -1, 2), "positions"),
        (lambda: _core.rope_inverse_frequencies(1e4, 63), "rotary"),
        (lambda: _core.rope_inverse_frequencies(1e4, 64, 1.0, np.ones(3)), "factors"),
    ],
)
def test_refusals(call: Callable[[], object], field: str) -> None:
    with pytest.raises(RequestError, match=field):
        call()
