"""The profile of an engine: its parts are what they are called and add up; off, nothing of it is there."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from api_fakes import ApiTokenizer, HeldExecutor, make_engine
from fake_executor import (
    FakeDetokenizer,
    FakeExecutor,
    steps_ahead,  # noqa: F401
)

from fastllm import LLM, EngineDeadError, RequestError, SamplingParams
from fastllm.engine.engine import Engine, EngineConfig
from fastllm.engine.hooks import EngineHook, Scheduled
from fastllm.engine.profile import GROUPS, OVERHEAD, Profile, StepTimes
from fastllm.executor.base import StepBatch, StepResult

CALL, QKV, SAMPLE, TEXT, ADMIT = 16.0, 8.0, 2.0, 4.0, 0.5  # seconds; sums of these are exact


class Clock:
    """Stands still but for what is added."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class SlowExecutor(FakeExecutor):
    """A call takes CALL, of which its phases know QKV and SAMPLE. Off at first, as `PhaseTimer` says."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(num_blocks=128)
        self._clock = clock
        self.on = False
        self.phase_seconds: dict[str, float] = {}
        self.before: Callable[[], None] = lambda: None

    def profile(self, on: bool) -> None:
        self.on = on
        self.phase_seconds = {"qkv": 0.0, "sample": 0.0}

    def submit(self, batch: StepBatch) -> int:
        self._clock.now += CALL / 2
        return super().submit(batch)

    def collect(self, ticket: int) -> StepResult:
        self.before()
        self._clock.now += CALL / 2
        if self.on:
            self.phase_seconds["qkv"] += QKV
            self.phase_seconds["sample"] += SAMPLE
        return super().collect(ticket)


class SlowAdmission(EngineHook):
    """Takes its time in the middle of scheduling."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_scheduled(self, event: Scheduled) -> None:
        self._clock.now += ADMIT


class Bench:
    """An engine whose every part takes a known time."""

    def __init__(self) -> None:
        self.clock = clock = Clock()
        self.executor = SlowExecutor(clock)

        class SlowDetokenizer(FakeDetokenizer):
            def push(self, ids: Any) -> str:
                clock.now += TEXT
                return super().push(ids)

        self.engine = Engine(
            self.executor,
            ApiTokenizer(),
            EngineConfig(max_model_len=60, max_num_batched_tokens=32),
            (SlowAdmission(clock),),
            detokenizer_factory=SlowDetokenizer,
            clock=clock,
        )

    def add(self, name: str, prompt: int, tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        self.engine.add_request(name, [2] * prompt, params)

    def run(self, pause: float = 0.0) -> None:
        """To the end, with a pause after each step."""
        while self.engine.has_unfinished():
            self.engine.step()
            self.clock.now += pause


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.engine.close()


def whole(profile: Profile) -> float:
    return sum(times.seconds for times in profile.kinds().values())


def test_every_part_is_what_it_is_called(bench: Bench) -> None:
    profile = bench.engine.start_profile()
    begin = bench.clock.now
    bench.add("a", prompt=5, tokens=4)
    bench.run(pause=0.25)
    end = bench.clock.now - 0.25  # the last step has no other after it
    assert profile.prefill.parts == {
        "qkv": QKV,
        "sample": SAMPLE,
        "scheduling": ADMIT,
        "python": TEXT,
        "between": 0.0,
        "unaccounted": CALL - QKV - SAMPLE,
    }
    assert profile.decode.parts == {
        "qkv": 3 * QKV,
        "sample": 3 * SAMPLE,
        "scheduling": 0.0,
        "python": 3 * TEXT,
        "between": 3 * 0.25,
        "unaccounted": 3 * (CALL - QKV - SAMPLE),
    }
    assert whole(profile) == end - begin
    decode = profile.decode
    assert decode.seconds == sum(decode.parts.values())
    assert decode.tokens_per_second == 3 / decode.seconds
    assert decode.overhead == pytest.approx(1 - 3 * (QKV + SAMPLE) / decode.seconds)


def test_prefill_mixed_and_decode_steps_are_told_apart(bench: Bench) -> None:
    profile = bench.engine.start_profile()
    bench.add("a", prompt=40, tokens=4)  # 32 tokens fit into a step: two for the prompt
    for _ in range(3):
        bench.engine.step()
    bench.add("b", prompt=3, tokens=3)
    bench.run()
    kinds = {name: (times.steps, times.tokens) for name, times in profile.kinds().items()}
    # a: 32, 8, 1, then 1 beside b's 3, then 1 + 1, and b's last alone
    assert kinds == {"prefill": (2, 40), "mixed": (1, 4), "decode": (3, 4)}


def test_a_profile_knows_only_the_steps_while_it_runs(bench: Bench) -> None:
    bench.add("a", prompt=3, tokens=8)
    bench.engine.step()
    profile = bench.engine.start_profile()
    bench.clock.now += 1000.0  # before its first step nothing is measured
    bench.engine.step()
    bench.engine.step()
    bench.engine.stop_profile()
    bench.run()
    assert {name: times.steps for name, times in profile.kinds().items()} == {"decode": 2}
    assert profile.decode.parts["between"] == 0.0


def test_the_wait_for_work_is_no_part_of_a_step(bench: Bench) -> None:
    profile = bench.engine.start_profile()
    bench.add("a", prompt=3, tokens=2)
    bench.run()
    bench.clock.now += 1000.0
    bench.add("b", prompt=3, tokens=9)
    bench.engine.step()
    bench.engine.abort("b")
    bench.engine.step()  # returns the aborted output, computes nothing
    bench.clock.now += 1000.0
    bench.add("c", prompt=3, tokens=2)
    bench.run()
    assert (profile.prefill.steps, profile.decode.steps) == (3, 2)
    assert profile.prefill.parts["between"] == 0.0
    assert whole(profile) == 5 * (CALL + TEXT) + 3 * ADMIT


def test_an_interrupted_step_counts_once(bench: Bench) -> None:
    profile = bench.engine.start_profile()
    bench.add("a", prompt=3, tokens=3)
    bench.engine.step()

    def interrupt() -> None:
        bench.executor.before = lambda: None
        bench.executor.phase_seconds["qkv"] += 1.0
        raise KeyboardInterrupt

    bench.executor.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        bench.engine.step()
    bench.run()
    assert (profile.decode.steps, profile.decode.parts["qkv"]) == (2, 2 * QKV)


def test_without_a_profile_nothing_of_it_is_there(bench: Bench) -> None:
    engine = bench.engine
    assert not engine._hooks.step
    profile = engine.start_profile()
    bench.add("a", prompt=3, tokens=2)
    bench.run()
    assert bench.executor.on
    engine.stop_profile()
    engine.stop_profile()
    assert not bench.executor.on
    assert engine._executor is bench.executor
    assert not engine._hooks.step
    assert engine._hooks.scheduled  # the engine's own hooks are
    bench.add("b", prompt=3, tokens=2)
    bench.run()
    assert profile.prefill.steps == 1


def test_one_profile_at_a_time(bench: Bench) -> None:
    bench.engine.start_profile()
    with pytest.raises(RequestError, match="profile: expected one at a time"):
        bench.engine.start_profile()
    bench.engine.stop_profile()
    bench.engine.start_profile()


# ---- the table ---------------------------------------------------------------------------------------------


def numbers(line: str) -> list[float]:
    """Those after the label."""
    return [float(found.replace(",", "")) for found in re.findall(r"[\d,]+\.?\d*(?=%|\s|$)", line[24:])]


def check_table(lines: list[str], columns: int) -> None:
    """The groups add up to the step, their parts to the group, and the shares to the whole."""
    start = next(index for index, line in enumerate(lines) if line.strip().startswith("ms/step")) + 1
    totals: dict[str, list[float]] = {}
    parts: dict[str, list[list[float]]] = {}
    group = ""
    for line in lines[start:]:
        label, found = line[:24], numbers(line)
        if label.startswith("  "):
            parts.setdefault(group, []).append(found)
        else:
            group = label.strip()
            totals[group] = found
    step = totals.pop("step")
    assert len(totals.pop("tokens/s")) == columns
    assert step[1::2] == [100.0] * columns
    rounding = 0.06 * len(totals)
    for column in range(2 * columns):
        assert sum(found[column] for found in totals.values()) == pytest.approx(step[column], abs=rounding)
        for name, lists in parts.items():
            assert sum(found[column] for found in lists) == pytest.approx(totals[name][column], abs=rounding)


def test_the_table_adds_up_and_names_what_it_does_not_know() -> None:
    profile = Profile(FakeExecutor(), time.monotonic, 0)
    assert str(profile) == "no steps"
    profile.decode.add(
        4, {"qkv": 0.5, "head": 0.25, "attention": 1.0, "quantum": 0.125, "unaccounted": 0.125}
    )
    profile.decode.add(
        4, {"qkv": 0.5, "head": 0.25, "attention": 1.0, "quantum": 0.125, "unaccounted": 0.125}
    )
    lines = str(profile).splitlines()
    check_table(lines, columns=1)
    shown = {line[:24].strip(): numbers(line) for line in lines}
    assert shown["matmul"] == [750.0, 37.5]
    assert shown["qkv"] == [500.0, 25.0]
    assert shown["quantum"] == [125.0, 6.2]
    assert shown["tokens/s"] == [2.0]
    assert lines[1:3] == ["2 steps".rjust(46), "8 tokens".rjust(46)]


def test_no_steps_divide_by_nothing() -> None:
    assert (StepTimes().tokens_per_second, StepTimes().overhead, StepTimes().groups()) == (0.0, 0.0, {})


# ---- through LLM -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write("gguf", tmp_path_factory.mktemp("profile"))


def test_a_real_model_from_prompt_to_text(model: Path) -> None:
    prompts: list[Any] = [{"prompt_token_ids": tiny.tokens(20, seed=seed)} for seed in range(3)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(model, threads=2, enable_prefix_caching=False) as llm:
        plain = llm.generate(prompts, params)
        with llm.profile() as profile:
            begin = time.monotonic()
            outputs = llm.generate(prompts, params)
            wall = time.monotonic() - begin
        off = llm._thread.call(lambda engine: engine._executor.phase_seconds).result()
        llm.generate(prompts, params)
        still = llm._thread.call(lambda engine: engine._executor.phase_seconds).result()
    assert [output.outputs[0].token_ids for output in outputs] == [
        output.outputs[0].token_ids for output in plain
    ]
    assert set(off.values()) == set(still.values()) == {0.0}  # nobody measures any more
    assert profile.prefill.tokens + profile.mixed.tokens + profile.decode.tokens == 3 * (20 + 11)
    assert profile.prefill.steps
    assert profile.decode.steps
    known = {part for parts in GROUPS.values() for part in parts}
    for times in profile.kinds().values():
        assert times.seconds == pytest.approx(sum(times.parts.values()))
        # The decoder's phases all have their group.
        assert set(times.parts) == known - {"executor", "drafting"}
        for part in ("qkv", "attention", "head", "sample", "scheduling", "python", "unaccounted"):
            assert times.parts[part] > 0, part
    assert 0 < whole(profile) <= wall
    assert set(OVERHEAD) < set(profile.decode.parts)
    check_table(str(profile).splitlines(), columns=len(profile.kinds()))


def test_an_executor_without_phases_is_one_part() -> None:
    with LLM._from_parts(make_engine(HeldExecutor()), ApiTokenizer()) as llm:  # type: ignore[arg-type]
        with llm.profile() as profile:
            llm.generate("abc", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        decode = profile.decode
        assert decode.steps == 3
        assert decode.parts["executor"] > 0
        assert decode.parts["unaccounted"] == 0
        with llm.profile(), pytest.raises(RequestError, match="one at a time"), llm.profile():
            pass
        with llm.profile() as empty:
            pass
    assert str(empty) == "no steps"


def test_a_failure_within_a_profile_is_the_one_that_is_raised() -> None:
    executor = HeldExecutor(fail_at=(2, ValueError("broken")))
    with LLM._from_parts(make_engine(executor), ApiTokenizer()) as llm:  # type: ignore[arg-type]
        with pytest.raises(EngineDeadError, match="broken"), llm.profile() as profile:
            llm.generate("abc", SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
        assert profile.decode.steps == 1
        with pytest.raises(EngineDeadError, match="broken"), llm.profile():
            pass
