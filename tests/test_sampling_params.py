"""SamplingParams: what is accepted, what is refused and how the refusal reads."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm.errors import RequestError
from fastllm.sampling_params import RequestOutputKind, SamplingParams

INTEGERS = {
    "n": (1, 64), "top_k": (-1, 2**31 - 1), "seed": (-(2**63), 2**64 - 1), "max_tokens": (1, 2**31 - 1),
    "min_tokens": (0, 16), "logprobs": (0, 20), "prompt_logprobs": (0, 20),
}  # fmt: skip
REALS = {
    "temperature": (0, 1e4), "top_p": (1e-6, 1), "min_p": (0, 1), "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2), "repetition_penalty": (0.01, 100),
}  # fmt: skip


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    low, high = INTEGERS[name]
    for value in (low, high, np.int64(low)):
        assert getattr(SamplingParams(**{name: value}), name) == value
        assert type(getattr(SamplingParams(**{name: value}), name)) is int
    for bad in (low - 1, high + 1, True, False, 1.0, "1", math.nan, [1], 2**80, np.float64(1)):
        with pytest.raises(RequestError) as caught:
            SamplingParams(**{name: bad})
        assert caught.value.field == name
        assert caught.value.value is bad


@pytest.mark.parametrize("name", REALS)
def test_reals(name: str) -> None:
    low, high = REALS[name]
    for value in (low, high, np.float32(high), Fraction(high)):
        assert getattr(SamplingParams(**{name: value}), name) == value
        assert type(getattr(SamplingParams(**{name: value}), name)) is float
    above = math.nextafter(high, math.inf)
    below = math.nextafter(low, -math.inf) if name != "top_p" else 0.0
    for bad in (
        above,
        below,
        math.nan,
        math.inf,
        -math.inf,
        True,
        "1",
        None,
        1j,
        10**400,
        [1.0],
        np.float32("nan"),
    ):
        with pytest.raises(RequestError) as caught:
            SamplingParams(**{name: bad})
        assert caught.value.field == name


def test_top_p_that_a_float32_cannot_tell_from_zero_is_refused() -> None:
    with pytest.raises(RequestError, match="top_p"):
        SamplingParams(top_p=1e-60)


@pytest.mark.parametrize(
    "name", ["ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "detokenize"]
)
def test_flags(name: str) -> None:
    for bad in (0, 1, None, "true"):
        with pytest.raises(RequestError, match=name):
            SamplingParams(**{name: bad})


def test_the_message_names_field_value_and_limit() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(logprobs=21)
    assert str(caught.value) == "logprobs: expected an integer in 0..20, got 21"


def test_stop_strings() -> None:
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop="ab").stop == "ab"
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams(stop=[]).stop_strings == ()
    assert len(SamplingParams(stop=["a" * 1024] * 16).stop_strings) == 16
    for bad in ("", [""], ["a"] * 17, ["a" * 1025], [b"a"], b"a", 5, [None], {"a": 1}):
        with pytest.raises(RequestError, match="stop"):
            SamplingParams(stop=bad)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="detokenize"):
        SamplingParams(stop="a", detokenize=False)


def test_stop_token_ids() -> None:
    assert SamplingParams().stop_ids == ()
    assert SamplingParams(stop_token_ids=[3, np.int32(1)]).stop_ids == (3, 1)
    for bad in ([-1], [True], ["1"], [1.0], "12", 5, [0] * 1025, [2**31]):
        with pytest.raises(RequestError, match="stop_token_ids"):
            SamplingParams(stop_token_ids=bad)  # type: ignore[arg-type]


def test_logit_bias() -> None:
    given_bias = {3: 1, 4: -2.5}
    params = SamplingParams(logit_bias=given_bias)
    given_bias[5] = 0
    assert params.logit_bias == {3: 1.0, 4: -2.5}
    bad: Any
    for bad in ({-1: 0}, {True: 0}, {"1": 0}, {1: math.nan}, {1: math.inf}, {1: True}, {1: 10001}, [1], 5,
                dict.fromkeys(range(1025), 0.0)):  # fmt: skip
        with pytest.raises(RequestError, match="logit_bias"):
            SamplingParams(logit_bias=bad)


def test_min_tokens_is_at_most_max_tokens() -> None:
    SamplingParams(min_tokens=5, max_tokens=5)
    SamplingParams(min_tokens=500, max_tokens=None)
    with pytest.raises(RequestError, match="min_tokens"):
        SamplingParams(min_tokens=6, max_tokens=5)


def test_output_kind() -> None:
    assert SamplingParams().output_kind is RequestOutputKind.CUMULATIVE
    with pytest.raises(RequestError, match="output_kind"):
        SamplingParams(output_kind="delta")  # type: ignore[arg-type]


def test_it_cannot_change_under_a_running_request() -> None:
    params = SamplingParams()
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 0.5  # type: ignore[misc]
    assert dataclasses.replace(params, temperature=0.5).temperature == 0.5
    with pytest.raises(RequestError):
        dataclasses.replace(params, temperature=-1)
    again = dataclasses.replace(SamplingParams(stop=["a"], stop_token_ids=[4]), n=2)
    assert (again.stop_strings, again.stop_ids) == (("a",), (4,))


def test_vocabulary() -> None:
    params = SamplingParams(stop_token_ids=[9], logit_bias={8: 1})
    params.check_vocabulary(10)
    with pytest.raises(RequestError, match="stop_token_ids"):
        params.check_vocabulary(9)
    with pytest.raises(RequestError, match="logit_bias"):
        SamplingParams(logit_bias={8: 1}).check_vocabulary(8)


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (9e-6, True), (1e-5, False), (1, False)])
def test_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy == greedy


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text("a1é", max_size=3), st.binary(max_size=3),
    st.lists(st.integers() | st.text("a1é", max_size=2), max_size=3),
    st.dictionaries(st.integers() | st.text("a1é", max_size=2), st.floats() | st.integers(), max_size=3),
)  # fmt: skip
names = [item.name for item in dataclasses.fields(SamplingParams) if item.init]


@given(st.dictionaries(st.sampled_from(names), anything, max_size=4))
def test_anything_is_accepted_whole_or_refused_with_a_request_error(values: dict[str, Any]) -> None:
    field = None
    try:
        params = SamplingParams(**values)
    except RequestError as error:
        field = error.field
    if field is not None:
        assert field in names
        return
    assert 1 <= params.n <= 64
    assert math.isfinite(params.temperature)
    assert all(math.isfinite(bias) for bias in (params.logit_bias or {}).values())
