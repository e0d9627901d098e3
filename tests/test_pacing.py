"""A target for the gap between tokens: steps follow it, and nobody is forgotten.

The executor computes nothing and moves a clock of its own on, by a cost that the scheduler does not know and
that is not of the form that it learns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fake_executor import FakeTokenizer
from hypothesis import given
from hypothesis import strategies as st

from fastllm import LLM, RequestError, SamplingParams
from fastllm.engine.engine import Engine, EngineConfig
from fastllm.engine.hooks import EngineHook, Tokens
from fastllm.executor.base import StepResult

TARGET_MS = 10.0


class Machine:
    """An executor on a clock of its own: 3 ms a step, 0.1 to 0.6 ms a token, 0.4 us a position read."""

    block_size = 16

    def __init__(self, num_blocks: int = 4096) -> None:
        self.now = 0.0
        self._blocks = num_blocks
        self._result: StepResult | None = None

    def clock(self) -> float:
        return self.now

    def kv_capacity(self) -> int:
        return self._blocks

    def submit(self, batch: Any) -> int:
        tokens, rows = batch.num_tokens, batch.num_rows
        self.now += 3e-3 + 1e-4 * tokens + 5e-4 * max(tokens - 4, 0) + 1.5e-4 * rows + 4e-7 * batch.context
        floats = np.zeros(rows, np.float32)
        ids = np.full(rows, 5, np.int32)
        self._result = StepResult(ids, floats, ids, ids.reshape(-1, 1), floats.reshape(-1, 1))
        return 0

    def collect(self, ticket: int) -> StepResult:
        assert self._result is not None
        return self._result

    def close(self) -> None:
        pass


class Gaps(EngineHook):
    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self.gaps: list[float] = []

    def on_tokens(self, event: Tokens) -> None:
        if event.request_id in self.last:
            self.gaps.append(event.time - self.last[event.request_id])
        self.last[event.request_id] = event.time


def drive(rate: float, seed: int, target: float | None) -> tuple[list[float], int]:
    """5 seconds of arrivals, 8.5 times as many in the fourth. The gaps from then on, and how many ended."""
    machine, gaps = Machine(), Gaps()
    config = EngineConfig(max_model_len=2048, target_itl_ms=target)
    engine = Engine(machine, FakeTokenizer(), config, [gaps], clock=machine.clock)
    random = np.random.default_rng(seed)
    usual = random.uniform(0.0, 5.0, int(5 * rate))
    times = sorted([*usual.tolist(), *random.uniform(3.0, 4.0, int(7.5 * rate)).tolist()])
    ended, begin = 0, 0
    pending = list(times)
    while pending or engine.has_unfinished():
        while pending and machine.now >= pending[0]:
            at = pending.pop(0)
            params = SamplingParams(
                max_tokens=int(random.integers(20, 100)), ignore_eos=True, detokenize=False
            )
            engine.add_request(
                str(at), random.integers(2, 12, int(random.integers(20, 600))).tolist(), params
            )
        if engine.has_unfinished():
            ended += sum(output.finished for output in engine.step())
            engine.check()
        else:
            machine.now = max(machine.now, pending[0])
        if machine.now < 3.0:
            begin = len(gaps.gaps)
    assert ended == len(times)
    return gaps.gaps[begin:], ended


@pytest.mark.parametrize("seed", range(3))
def test_gaps_keep_the_target_when_arrivals_rise(seed: int) -> None:
    free, _ = drive(4.0, seed, None)
    held, _ = drive(4.0, seed, TARGET_MS)
    assert np.quantile(free, 0.99) > 10 * TARGET_MS * 1e-3
    assert np.quantile(held, 0.99) < (TARGET_MS + 3.2) * 1e-3
    assert np.quantile(held, 0.75) > 0.8 * TARGET_MS * 1e-3, "the target is not made use of"


def test_prompts_alone_are_computed_in_whole_steps() -> None:
    machine = Machine()
    engine = Engine(
        machine, FakeTokenizer(), EngineConfig(max_model_len=2048, target_itl_ms=4.0), clock=machine.clock
    )
    engine.add_request("a", [2] * 1000, SamplingParams(max_tokens=1, detokenize=False))
    engine.step()
    assert engine.scheduler.running[0].num_computed == 512


@given(st.floats(0.5, 40), st.integers(0, 50))
def test_every_target_serves_everybody(target: float, seed: int) -> None:
    """Also one that decoding alone exceeds."""
    machine = Machine()
    config = EngineConfig(max_model_len=400, max_num_seqs=6, target_itl_ms=target)
    engine = Engine(machine, FakeTokenizer(), config, clock=machine.clock)
    random = np.random.default_rng(seed)
    for i in range(8):
        params = SamplingParams(max_tokens=int(random.integers(1, 60)), ignore_eos=True, detokenize=False)
        engine.add_request(str(i), [2] * int(random.integers(1, 300)), params)
    ended = 0
    for _ in range(4000):
        if not engine.has_unfinished():
            break
        ended += sum(output.finished for output in engine.step())
        engine.check()
    assert ended == 8


def test_a_long_answer_does_not_shut_the_others_out() -> None:
    machine = Machine()
    config = EngineConfig(max_model_len=3000, target_itl_ms=0.5)  # not to be kept
    engine = Engine(machine, FakeTokenizer(), config, clock=machine.clock)
    long = SamplingParams(max_tokens=2500, ignore_eos=True, detokenize=False)
    engine.add_request("long", [2] * 10, long)
    for _ in range(3):
        engine.step()
    engine.add_request("short", [2] * 40, SamplingParams(max_tokens=5, ignore_eos=True, detokenize=False))
    for _ in range(2000):
        if any(output.request_id == "short" and output.finished for output in engine.step()):
            break
    else:
        pytest.fail("the short one is not served while the long one runs")


def test_what_is_there_before_the_first_step_does_not_all_begin_at_once() -> None:
    """Nothing is known of steps then; later on nobody would be sent back."""
    machine, gaps = Machine(), Gaps()
    config = EngineConfig(max_model_len=3000, target_itl_ms=TARGET_MS)
    engine = Engine(machine, FakeTokenizer(), config, [gaps], clock=machine.clock)
    for i in range(40):
        engine.add_request(
            str(i), [2] * 30, SamplingParams(max_tokens=200, ignore_eos=True, detokenize=False)
        )
    for _ in range(100):
        engine.step()
    assert engine.scheduler.num_waiting > 0
    assert np.quantile(gaps.gaps, 0.9) < (TARGET_MS + 3.2) * 1e-3


def test_what_matters_more_does_not_wait_for_what_fills_the_target() -> None:
    machine = Machine()
    config = EngineConfig(max_model_len=3000, target_itl_ms=TARGET_MS)
    engine = Engine(machine, FakeTokenizer(), config, clock=machine.clock)
    for index in range(40):
        params = SamplingParams(max_tokens=400, ignore_eos=True, detokenize=False)
        engine.add_request(f"long {index}", [2] * 10, params, priority=1)
        for _ in range(5):
            engine.step()
    filled = engine.load().num_running
    assert engine.load().num_waiting > 0, "the target admits all of them"
    assert engine.load().num_preemptions == 0
    for index in range(3):
        params = SamplingParams(max_tokens=5, ignore_eos=True, detokenize=False)
        engine.add_request(f"short {index}", [2] * 40, params, priority=-1)
    ended: list[str] = []
    for _ in range(20):
        ended += [output.request_id for output in engine.step() if output.finished]
        engine.check()
    assert sorted(ended) == ["short 0", "short 1", "short 2"]
    assert 3 <= engine.load().num_preemptions <= 6, "those whose share they need, and few more"
    assert engine.load().num_running >= filled - 3
    while engine.has_unfinished():
        ended += [output.request_id for output in engine.step() if output.finished]
    assert len(ended) == 43


@pytest.mark.parametrize("target", [0, -1.0, float("nan"), True, "5", 1e9])
def test_a_bad_target_is_refused(target: Any) -> None:
    with pytest.raises(RequestError, match="target_itl_ms"):
        LLM("nowhere", target_itl_ms=target)
