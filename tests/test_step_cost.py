"""The step cost: it finds what steps take, follows it, and never predicts nonsense."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm.engine.step_cost import StepCost


def steps(seed: int, count: int) -> list[tuple[int, int, int]]:
    """Tokens, rows and context of random steps."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        rows = int(random.integers(1, 33))
        tokens = rows + int(random.choice([0, 0, 64, 200]))
        found.append((tokens, rows, int(tokens * random.integers(10, 2000))))
    return found


@given(
    st.integers(0, 100),
    st.floats(1e-4, 1e-1),
    st.floats(1e-5, 1e-2),
    st.floats(0, 1e-2),
    st.floats(0, 1e-6),
)
def test_a_cost_that_is_linear_is_found(
    seed: int, base: float, token: float, row: float, read: float
) -> None:
    cost = StepCost()
    for tokens, rows, context in steps(seed, 500):
        cost.observe(tokens, rows, context, base + token * tokens + row * rows + read * context)
    for tokens, rows, context in steps(seed + 1, 20):
        seconds = base + token * tokens + row * rows + read * context
        assert cost.predict(tokens, rows, context) == pytest.approx(seconds, rel=0.08)


def test_it_follows_a_machine_that_becomes_slower() -> None:
    cost = StepCost()
    for factor in (1.0, 2.0):
        for tokens, rows, context in steps(3, 400):
            cost.observe(tokens, rows, context, factor * (2e-3 + 5e-4 * tokens))
        assert cost.predict(8, 8, 1000) == pytest.approx(factor * 6e-3, rel=0.1)


def test_one_step_that_takes_ages_changes_little() -> None:
    cost = StepCost()
    for _ in range(100):
        cost.observe(4, 4, 100, 3e-3)
    cost.observe(4, 4, 100, 5.0)
    assert cost.predict(4, 4, 100) < 4e-3


def test_before_the_first_step_nothing_is_predicted() -> None:
    assert StepCost().predict(1, 1, 1) == 0.0


@given(
    st.lists(
        st.tuples(st.integers(1, 600), st.integers(0, 64), st.integers(0, 10**6), st.floats(0, 10)),
        min_size=1,
        max_size=60,
    )
)
def test_whatever_it_sees_its_predictions_are_times(seen: list[tuple[int, int, int, float]]) -> None:
    cost = StepCost()
    for tokens, rows, context, seconds in seen:
        cost.observe(tokens, min(rows, tokens), context, seconds)
        for what in ((1, 1, 1), (512, 0, 10**5), (32, 32, 3000)):
            assert 0.0 <= cost.predict(*what) < 1e6
        assert 0.0 <= cost.per_token(1000) <= cost.per_sampled_token(1000) < 1e6
