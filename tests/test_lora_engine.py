"""LoRA adapters in the engine: who may name which, when one is gone, and that blocks are never mixed up.

Over the executor of fake_executor.py, in whose tokens the adapter has a part: a request that got another's,
or a block of another's, answers differently.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api_fakes import ApiTokenizer, make_engine
from fake_executor import FakeDetokenizer, FakeExecutor, FakeTokenizer, expected_tokens
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastllm.engine.engine import Engine, EngineConfig
from fastllm.engine.hooks import EngineHook, Scheduled
from fastllm.errors import CapacityError, EngineDeadError, RequestError, UnsupportedModelError
from fastllm.executor.base import StepBatch
from fastllm.outputs import RequestOutput
from fastllm.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPT = [2, 3, 4, 5, 6, 7, 8, 2, 3, 12]


def write(place: Path, name: str, content: str | None = None) -> Path:
    """An adapter for the fake executor."""
    path = place / name
    path.write_text(name if content is None else content)
    return path


def load(engine: Engine, place: Path, *names: str) -> None:
    for name in names:
        engine.add_adapter(name, engine.adapters.read(write(place, name)))


def digest(content: str | None) -> bytes | None:
    return None if content is None else hashlib.sha256(content.encode()).digest()


def alone(prompt: list[int], adapter: str | None, params: SamplingParams = GREEDY) -> list[int]:
    return expected_tokens(prompt, params, min(60, len(prompt) + 12), adapter=digest(adapter))[0]


def finish(engine: Engine) -> dict[str, RequestOutput]:
    outputs = {}
    while engine.has_unfinished():
        outputs.update({output.request_id: output for output in engine.step()})
        engine.check()
    assert engine.pool.num_free == engine.pool.num_blocks
    return outputs


@pytest.mark.parametrize("config", [{}, {"max_num_batched_tokens": 5}, {"enable_prefix_caching": False}])
def test_each_request_gets_its_own(tmp_path: Path, config: dict[str, Any]) -> None:
    executor = FakeExecutor()
    engine = make_engine(executor, **config)
    load(engine, tmp_path, "x", "y", "z")
    names = [None, "x", "y", None, "z", "x", "y"]
    for i, name in enumerate(names):
        engine.add_request(str(i), PROMPT[: 4 + i], GREEDY, adapter=name)
    outputs = finish(engine)
    for i, name in enumerate(names):
        assert outputs[str(i)].outputs[0].token_ids == alone(PROMPT[: 4 + i], name)
    assert executor.adapters_seen == {0, 1, 2}
    engine.close()


def test_preempted_sequences_keep_theirs(tmp_path: Path) -> None:
    engine = make_engine(FakeExecutor(num_blocks=8))
    load(engine, tmp_path, "x", "y")
    for i, name in enumerate(("x", None, "y", "x")):
        engine.add_request(str(i), PROMPT[:9], GREEDY, adapter=name)
    outputs = finish(engine)
    assert sum(output.metrics.num_preemptions for output in outputs.values()) > 0
    for i, name in enumerate(("x", None, "y", "x")):
        assert outputs[str(i)].outputs[0].token_ids == alone(PROMPT[:9], name)


def test_several_sequences_of_one_request(tmp_path: Path) -> None:
    engine = make_engine(FakeExecutor())
    load(engine, tmp_path, "x")
    params = SamplingParams(n=4, temperature=0.8, seed=5, max_tokens=9, ignore_eos=True)
    engine.add_request("a", PROMPT, params, adapter="x")
    output = finish(engine)["a"]
    for item in output.outputs:
        expected = expected_tokens(PROMPT, params, 19, index=item.index, seed=5, adapter=digest("x"))[0]
        assert item.token_ids == expected


def test_blocks_are_shared_within_an_adapter_alone(tmp_path: Path) -> None:
    engine = make_engine(FakeExecutor())
    load(engine, tmp_path, "x", "y")
    engine.add_adapter("same as x", engine.adapters.read(write(tmp_path, "copy", "x")))

    def cached(name: str | None, salt: str | None = None) -> int:
        engine.add_request("a", PROMPT, GREEDY, adapter=name, cache_salt=salt)
        output = finish(engine)["a"]
        content = {"same as x": "x"}.get(name or "", name)
        assert output.outputs[0].token_ids == alone(PROMPT, content)
        return output.num_cached_tokens

    assert [cached(name) for name in (None, "x", "y")] == [0, 0, 0]
    assert [cached(name) for name in (None, "x", "y")] == [8, 8, 8]
    assert cached("same as x") == 8  # the contents count, not the name
    assert [cached("x", "salt"), cached("y", "salt"), cached(None, "salt")] == [0, 0, 0]
    assert [cached("x", "salt"), cached("y", "salt"), cached(None, "salt")] == [8, 8, 8]
    assert engine.remove_adapter("x")
    load(engine, tmp_path, "x")
    assert cached("x") == 8
    assert engine.remove_adapter("x")
    engine.add_adapter("x", engine.adapters.read(write(tmp_path, "x", "something else")))
    engine.add_request("a", PROMPT, GREEDY, adapter="x")
    output = finish(engine)["a"]
    assert output.num_cached_tokens == 0
    assert output.outputs[0].token_ids == alone(PROMPT, "something else")


def test_an_adapter_leaves_with_the_last_that_has_it(tmp_path: Path) -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    load(engine, tmp_path, "x")
    engine.add_request("a", PROMPT, GREEDY, adapter="x")
    engine.add_request(
        "b", PROMPT[:3], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), adapter="x"
    )
    engine.step()
    assert engine.remove_adapter("x")
    assert not engine.remove_adapter("x")
    assert dict(engine.adapters.paths) == {}
    with pytest.raises(
        RequestError, match=r"adapter: expected the name of a loaded adapter \(now: none\), got 'x'"
    ):
        engine.add_request("c", PROMPT, GREEDY, adapter="x")
    # Its name is free at once, its place is not.
    engine.add_adapter("x", engine.adapters.read(write(tmp_path, "x", "new")))
    assert sorted(executor.adapters) == [0, 1]
    engine.add_request("d", PROMPT, GREEDY, adapter="x")
    outputs = {}
    while "a" not in outputs:
        outputs.update({output.request_id: output for output in engine.step() if output.finished})
        engine.check()
    assert sorted(executor.adapters) == [0, 1]
    outputs.update(finish(engine))
    assert sorted(executor.adapters) == [1]
    assert outputs["a"].outputs[0].token_ids == alone(PROMPT, "x")
    assert outputs["d"].outputs[0].token_ids == alone(PROMPT, "new")
    assert engine.remove_adapter("x")
    assert executor.adapters == {}


def test_aborting_the_last_that_has_it(tmp_path: Path) -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    load(engine, tmp_path, "x")
    engine.add_request("running", PROMPT, GREEDY, adapter="x")
    engine.step()
    engine.add_request("waiting", PROMPT, GREEDY, adapter="x")
    engine.remove_adapter("x")
    engine.abort("running")
    assert sorted(executor.adapters) == [0]
    engine.abort("waiting")
    assert executor.adapters == {}
    engine.check()
    finish(engine)


def test_aborted_while_its_step_is_being_made(tmp_path: Path) -> None:
    """A hook ends the only request of a leaving adapter when the batch that names it is ready: the adapter
    goes after that step."""

    class Ends(EngineHook):
        def on_scheduled(self, event: Scheduled) -> None:
            if event.request_id == "a":
                engine.remove_adapter("x")
                engine.abort("a")
                assert sorted(executor.adapters) == [0]

    executor = FakeExecutor()
    engine = make_engine(executor, [Ends()])
    load(engine, tmp_path, "x")
    engine.add_request("a", PROMPT, GREEDY, adapter="x")
    engine.add_request("b", PROMPT, GREEDY)
    engine.step()
    engine.check()
    assert executor.adapters_seen == {0}
    assert executor.adapters == {}
    assert finish(engine)["b"].outputs[0].token_ids == alone(PROMPT, None)


def test_interrupted_while_its_step_is_being_made(tmp_path: Path) -> None:
    executor = FakeExecutor(fail_at=(1, KeyboardInterrupt()))
    engine = make_engine(executor)
    load(engine, tmp_path, "x")
    engine.add_request("a", PROMPT, GREEDY, adapter="x")
    engine.step()
    engine.remove_adapter("x")
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.check()
    assert sorted(executor.adapters) == [0]
    assert finish(engine)["a"].outputs[0].token_ids == alone(PROMPT, "x")
    assert executor.adapters == {}


def test_room(tmp_path: Path) -> None:
    executor = FakeExecutor()
    engine = make_engine(executor, max_loras=2)
    load(engine, tmp_path, "x", "y")
    with pytest.raises(CapacityError, match=r"max_loras.* beside 2: asked 3 adapters, had 2, would fit 2"):
        load(engine, tmp_path, "z")
    engine.add_request("a", PROMPT, GREEDY, adapter="x")
    engine.remove_adapter("x")
    with pytest.raises(CapacityError, match=r"beside 2, 1 of them leaving"):
        load(engine, tmp_path, "z")
    engine.abort("a")
    load(engine, tmp_path, "z")
    assert list(engine.adapters.paths) == ["y", "z"]
    assert sorted(executor.adapters) == [0, 1]
    engine.check()


def test_bad_arguments(tmp_path: Path) -> None:
    engine = make_engine(FakeExecutor())
    load(engine, tmp_path, "x")
    prepared = engine.adapters.read(tmp_path / "x")
    for name in ("", 5, None, "x" * 2000):
        with pytest.raises(RequestError, match="lora_name"):
            engine.add_adapter(name, prepared)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="a name that no loaded adapter has"):
        engine.add_adapter("x", prepared)
    for name in ("y", 5, ["x"]):
        with pytest.raises(RequestError, match=r"adapter: expected the name of a loaded adapter \(now: x\)"):
            engine.add_request("a", PROMPT, GREEDY, adapter=name)  # type: ignore[arg-type]
    with pytest.raises(CapacityError):  # another reason to refuse: nobody uses the adapter then
        engine.add_request("a", PROMPT * 10, GREEDY, adapter="x")
    engine.check()
    assert not engine.remove_adapter("y")
    for value in (-1, 257, True, 2.0):
        with pytest.raises(RequestError, match="max_loras"):
            make_engine(FakeExecutor(), max_loras=value)


def test_an_executor_without_adapters() -> None:
    class Plain:
        block_size = 4

        def kv_capacity(self) -> int:
            return 8

        def submit(self, batch: StepBatch) -> int:
            raise AssertionError

        def collect(self, ticket: int) -> Any:
            raise AssertionError

        def close(self) -> None:
            pass

    with Engine(Plain(), FakeTokenizer(), EngineConfig(max_model_len=20)) as engine:
        with pytest.raises(UnsupportedModelError, match="LoRA"):
            engine.adapters.read(Path("x"))
        with pytest.raises(RequestError, match="now: none"):
            engine.add_request("a", PROMPT, GREEDY, adapter="x")


def test_a_dead_engine(tmp_path: Path) -> None:
    engine = make_engine(FakeExecutor(fail_at=(0, OSError("broken"))))
    load(engine, tmp_path, "x")
    engine.add_request("a", PROMPT, GREEDY, adapter="x")
    with pytest.raises(EngineDeadError):
        engine.step()
    with pytest.raises(EngineDeadError):
        load(engine, tmp_path, "y")
    engine.remove_adapter("x")
    engine.close()


class AdapterMachine(RuleBasedStateMachine):
    """Adapters come and go, under names used again and again, while requests come, end and are aborted."""

    names = ("x", "y", "z")

    @initialize(
        blocks=st.integers(16, 40),
        tokens=st.sampled_from((3, 8, 32)),
        loras=st.integers(1, 4),
        caching=st.booleans(),
        ahead=st.integers(0, 1),
    )
    def begin(self, blocks: int, tokens: int, loras: int, caching: bool, ahead: int) -> None:
        self.executor = FakeExecutor(num_blocks=blocks)
        self.executor.steps_ahead = ahead
        self.engine = Engine(
            self.executor,
            ApiTokenizer(),
            EngineConfig(
                max_model_len=60,
                max_num_seqs=5,
                max_num_batched_tokens=tokens,
                max_loras=loras,
                enable_prefix_caching=caching,
            ),
            detokenizer_factory=FakeDetokenizer,
        )
        self.loaded: dict[str, str] = {}
        self.asked: dict[str, tuple[list[int], str | None]] = {}
        self.count = 0

    @rule(name=st.sampled_from(names), content=st.sampled_from(("1", "2", "3")))
    def add(self, name: str, content: str) -> None:
        prepared = _Content(content)
        if name in self.loaded:
            with pytest.raises(RequestError):
                self.engine.add_adapter(name, prepared)
        elif len(self.executor.adapters) == self.engine.config.max_loras:
            with pytest.raises(CapacityError):
                self.engine.add_adapter(name, prepared)
        else:
            self.engine.add_adapter(name, prepared)
            self.loaded[name] = content

    @rule(name=st.sampled_from(names))
    def remove(self, name: str) -> None:
        assert self.engine.remove_adapter(name) == (name in self.loaded)
        self.loaded.pop(name, None)

    @rule(name=st.sampled_from((None, *names)), length=st.integers(1, 12), first=st.integers(2, 4))
    def ask(self, name: str | None, length: int, first: int) -> None:
        prompt = [first, *([3] * length)]
        try:
            self.engine.add_request(str(self.count), prompt, GREEDY, adapter=name)
        except RequestError:
            assert name not in (None, *self.loaded)
        else:
            content = None if name is None else self.loaded[name]
            self.asked[str(self.count)] = prompt, content
            self.count += 1

    @precondition(lambda self: self.asked)
    @rule(which=st.integers(0, 100))
    def abort(self, which: int) -> None:
        name = list(self.asked)[which % len(self.asked)]
        self.engine.abort(name)
        del self.asked[name]

    @rule()
    def step(self) -> None:
        for output in self.engine.step():
            if output.finished and output.outputs[0].finish_reason != "abort":
                prompt, content = self.asked.pop(output.request_id)
                assert output.outputs[0].token_ids == alone(prompt, content)

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()
            assert set(self.engine.adapters.paths) == set(self.loaded)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while self.engine.has_unfinished():
            self.step()
        assert not self.asked
        assert len(self.executor.adapters) == len(self.loaded)
        for name in list(self.loaded):
            self.remove(name)
        assert self.executor.adapters == {}
        assert self.engine.pool.num_free == self.engine.pool.num_blocks
        self.engine.check()


class _Content:
    """An adapter without a file."""

    def __init__(self, content: str) -> None:
        self.path = Path(content)
        self.digest = hashlib.sha256(content.encode()).digest()
        self.rank = 1
        self.nbytes = 1

    def parts(self) -> tuple[int, ...]:
        return (int(np.frombuffer(self.digest[:8], "<u8")[0]),)


TestAdapters = AdapterMachine.TestCase
