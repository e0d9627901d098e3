"""Evicted blocks that come back from a file: no answer depends on it, whatever fails or interrupts."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from fake_executor import (
    FakeExecutor,
    FakeTokenizer,
    expected_tokens,
    steps_ahead,  # noqa: F401
)
from hypothesis import given
from hypothesis import strategies as st

from fastllm import LLM, AsyncLLM
from fastllm.engine import hooks as events
from fastllm.engine import offload
from fastllm.engine.engine import Engine, EngineConfig
from fastllm.engine.hooks import EngineHook
from fastllm.errors import CapacityError, EngineDeadError, RequestError
from fastllm.executor.cpu import KV_CACHE_DTYPES
from fastllm.loading import ModelOptions, load_model
from fastllm.outputs import EmbeddingOutput, RequestOutput
from fastllm.pooling_params import PoolingParams
from fastllm.sampling_params import SamplingParams

ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
SHORT = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
FIRST = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]  # two blocks and a half
OTHERS = [[letter] * 13 for letter in (12, 2, 3)]  # each takes all four blocks of a small cache
ROOM = 1 << 20


def make(executor: Any = None, hooks: Any = (), **config: Any) -> Engine:
    defaults: dict[str, Any] = {"max_model_len": 60, "kv_offload_bytes": ROOM}
    return Engine(
        executor or FakeExecutor(num_blocks=4), FakeTokenizer(), EngineConfig(**{**defaults, **config}), hooks
    )


def answer(engine: Engine, prompt: list[int], params: Any = ONE, **more: Any) -> Any:
    engine.add_request("a", prompt, params, **more)
    while engine.has_unfinished():
        (output, *_) = engine.step() or [None]
        engine.check()
    return output


def settle(engine: Engine) -> None:
    engine.scheduler.offload.file.wait()  # type: ignore[union-attr]


# ---- what comes back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settled", [True, False], ids=["from the file", "from the queue perhaps"])
@pytest.mark.parametrize("encrypted", [False, True])
def test_what_was_evicted_is_not_computed_again(settled: bool, encrypted: bool) -> None:
    executor = FakeExecutor(num_blocks=4)
    engine = make(executor, kv_offload_encrypted=encrypted)
    expected = answer(engine, FIRST, SHORT).outputs[0].token_ids
    answer(engine, OTHERS[0])
    assert engine.pool.find_blocks([]) == []
    if settled:
        settle(engine)
    before = executor.num_tokens
    output = answer(engine, FIRST, SHORT)
    assert output.outputs[0].token_ids == expected == expected_tokens(FIRST, SHORT, 60)[0][:6]
    assert executor.num_tokens - before == len(FIRST) - 8 + 5
    assert output.num_cached_tokens == 8
    load = engine.load()
    assert (load.num_prefix_hits, load.num_restored_tokens) == (8, 8)
    assert load.num_offloaded_blocks >= 3
    engine.close()


def test_memory_comes_first_and_the_file_goes_on_from_there() -> None:
    executor = FakeExecutor(num_blocks=6)
    engine = make(executor)
    answer(engine, [*FIRST, 2, 3, 4])  # three full blocks
    answer(engine, [12] * 13)  # takes the last of them, or two
    left = engine.pool.num_cached
    output = answer(engine, [*FIRST, 2, 3, 4])
    assert output.num_cached_tokens == 12
    assert 0 < engine.load().num_restored_tokens < 12
    assert left > 3
    engine.close()


def test_nothing_comes_back_to_other_salts_or_after_a_reset() -> None:
    engine = make()
    answer(engine, FIRST, cache_salt="salt")
    answer(engine, OTHERS[0])
    assert answer(engine, FIRST).num_cached_tokens == 0
    answer(engine, OTHERS[1])
    assert answer(engine, FIRST, cache_salt="salt").num_cached_tokens == 8
    answer(engine, OTHERS[2])
    engine.reset_prefix_cache()
    load = engine.load()
    assert (load.num_offloaded_blocks, load.offloaded_bytes, load.num_cached_blocks) == (0, 0, 0)
    assert answer(engine, FIRST, cache_salt="salt").num_cached_tokens == 0
    engine.close()


def test_what_reports_every_token_of_a_prompt_reads_no_file() -> None:
    engine = make()
    answer(engine, FIRST)
    answer(engine, OTHERS[0])
    logprobs = replace(ONE, prompt_logprobs=0)
    assert answer(engine, FIRST, logprobs).num_cached_tokens == 0
    answer(engine, OTHERS[1])
    assert isinstance(answer(engine, FIRST, PoolingParams(pooling="mean")), EmbeddingOutput)
    assert engine.load().num_restored_tokens == 0
    answer(engine, OTHERS[2])
    answer(engine, FIRST, PoolingParams(pooling="last"))
    assert engine.load().num_restored_tokens == 8
    engine.close()


def test_a_preempted_sequence_gets_its_blocks_back() -> None:
    executor = FakeExecutor(num_blocks=10)
    engine = make(executor, max_num_batched_tokens=64)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    found: dict[str, Any] = {}
    for i in range(3):
        engine.add_request(str(i), [2 + i] * 14, params)
    while engine.has_unfinished():
        found.update({output.request_id: output.outputs[0].token_ids for output in engine.step()})
        engine.check()
    assert engine.load().num_preemptions > 0
    assert engine.load().num_restored_tokens > 0
    assert engine.load().num_prefix_hits == 0  # what it finds again is no hit
    assert found == {str(i): expected_tokens([2 + i] * 14, params, 34)[0] for i in range(3)}
    assert executor.num_tokens < 3 * 34 + 14  # it was not computed anew from the start
    engine.close()


def test_events_speak_of_memory_and_steps_of_the_file() -> None:
    class Recorder(EngineHook):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_blocks_stored(self, event: Any) -> None:
            self.seen.append(event)

        on_blocks_removed = on_step = on_blocks_stored

        def take(self, kind: type) -> list[Any]:
            taken = [event for event in self.seen if type(event) is kind]
            self.seen = [event for event in self.seen if type(event) is not kind]
            return taken

    recorder = Recorder()
    engine = make(hooks=[recorder])
    answer(engine, FIRST)
    (stored,) = recorder.take(events.BlocksStored)
    answer(engine, OTHERS[0])
    (removed,) = recorder.take(events.BlocksRemoved)
    assert set(removed.hashes) == set(stored.hashes)
    recorder.take(events.BlocksStored)
    answer(engine, FIRST)
    (again,) = recorder.take(events.BlocksStored)
    assert (again.hashes, again.token_ids) == (stored.hashes, stored.token_ids)
    step, load = recorder.take(events.Step)[-1], engine.load()
    assert (step.num_offloaded_blocks, step.offloaded_bytes, step.num_restored_tokens) == (
        load.num_offloaded_blocks,
        load.offloaded_bytes,
        load.num_restored_tokens,
    )
    assert load.num_restored_tokens == 8
    engine.close()


@given(
    st.lists(
        st.tuples(st.integers(0, 10), st.lists(st.integers(0, 12), max_size=6), st.integers(1, 3)),
        min_size=2,
        max_size=8,
    ),
    st.integers(4, 12),
    st.sampled_from([1, 3, 1000]),
    st.booleans(),
)
def test_no_answer_depends_on_the_file(
    work: list[tuple[int, list[int], int]], blocks: int, room: int, slow: bool
) -> None:
    answers = []
    for file in (None, room * offload.PAGE):
        it = make(FakeExecutor(blocks), max_num_batched_tokens=7, kv_offload_bytes=file)
        found: dict[str, list[list[int]]] = {}

        def step(of: Engine = it, outputs: dict[str, list[list[int]]] = found) -> None:
            for output in of.step():
                outputs[output.request_id] = [item.token_ids for item in output.outputs]
            of.check()
            if slow and of.scheduler.offload is not None:
                of.scheduler.offload.file.wait()

        for i, (shared, own, n) in enumerate(work):
            prompt = [*FIRST[:shared], *own, 2][: 4 * blocks]
            it.add_request(str(i), prompt, SamplingParams(seed=i, n=n, max_tokens=8, detokenize=False))
            if i % 2:
                step()
        while it.has_unfinished():
            step()
        answers.append(found)
        it.close()
    assert answers[0] == answers[1]


# ---- what fails, and what interrupts --------------------------------------------------------------------


class Interrupted(FakeExecutor):
    """Raises KeyboardInterrupt at some of its calls: before or after it did something, or in the middle."""

    def __init__(self, blocks: int, moments: set[int]) -> None:
        super().__init__(blocks)
        self.moments = moments
        self.calls = 0

    def _pass(self) -> None:
        self.calls += 1
        if self.calls in self.moments:
            raise KeyboardInterrupt

    def read_blocks(self, blocks: Any, out: Any) -> None:
        self._pass()
        super().read_blocks(blocks, out)
        self._pass()

    def write_blocks(self, blocks: Any, data: Any) -> None:
        self._pass()
        half = data.copy()
        half[:, : data.shape[1] // 2] = 0
        super().write_blocks(blocks, half)
        self._pass()
        super().write_blocks(blocks, data)
        self._pass()

    def collect(self, ticket: int) -> Any:
        self._pass()
        result = super().collect(ticket)
        self._pass()
        return result


@given(
    st.lists(st.tuples(st.integers(0, 10), st.lists(st.integers(0, 12), max_size=5)), min_size=3, max_size=8),
    st.integers(4, 8),
    st.sets(st.integers(1, 80), max_size=30),
    st.sets(st.integers(0, 7), max_size=3),
)
def test_an_interrupt_at_any_moment_loses_nothing(
    work: list[tuple[int, list[int]]], blocks: int, moments: set[int], aborted: set[int]
) -> None:
    engine = make(Interrupted(blocks, moments), max_num_batched_tokens=9)
    prompts = [[*FIRST[:shared], *own, 2] for shared, own in work]
    found: dict[str, list[int]] = {}
    interrupts = 0

    def step() -> None:
        nonlocal interrupts
        try:
            for output in engine.step():
                if output.finished and isinstance(output, RequestOutput):
                    found[output.request_id] = output.outputs[0].token_ids
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts in aborted and engine.request_ids:
                engine.abort(engine.request_ids[0])
        engine.check()

    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, SHORT)
        step()
        settle(engine)
    while engine.has_unfinished():
        step()
    assert interrupts <= len(moments)
    assert engine.pool.num_free == blocks
    for i, prompt in enumerate(prompts):
        whole = expected_tokens(prompt, SHORT, min(60, 4 * blocks + 1, len(prompt) + 6))[0]
        got = found[str(i)]
        assert got == whole or (aborted and got == whole[: len(got)])
    engine.close()


def test_broken_writes_and_reads_change_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> int:
        raise OSError(errno.EIO, "broken")

    for name in ("write_at", "read_at"):
        with monkeypatch.context() as patch:
            patch.setattr(offload, name, fail)
            engine = make()
            for prompt in (FIRST, OTHERS[0], FIRST, OTHERS[1], FIRST):
                assert answer(engine, prompt).outputs[0].token_ids == expected_tokens(prompt, ONE, 60)[0][:1]
                settle(engine)
            assert engine.load().num_restored_tokens == 0
            engine.close()


def test_an_executor_that_fails_kills_the_engine_and_closes_the_file() -> None:
    class Broken(FakeExecutor):
        def read_blocks(self, blocks: Any, out: Any) -> None:
            raise ValueError("broken")

    engine = make(Broken(num_blocks=4))
    answer(engine, FIRST)
    engine.add_request("a", OTHERS[0], ONE)
    with pytest.raises(EngineDeadError, match="broken"):
        engine.step()
    file = engine.scheduler.offload.file._file  # type: ignore[union-attr]
    os.fstat(file)
    engine.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


# ---- options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"kv_offload_bytes": 0}, "kv_offload_bytes"),
        ({"kv_offload_bytes": True}, "kv_offload_bytes"),
        ({"kv_offload_bytes": 1.5}, "kv_offload_bytes"),
        ({"kv_offload_bytes": 2**63}, "kv_offload_bytes"),
        ({"kv_offload_bytes": ROOM, "enable_prefix_caching": False}, "kv_offload_bytes"),
        ({"kv_offload_dir": "/tmp"}, "kv_offload_dir"),
        ({"kv_offload_bytes": ROOM, "kv_offload_dir": 5}, "kv_offload_dir"),
        ({"kv_offload_bytes": ROOM, "kv_offload_dir": "/nowhere"}, "kv_offload_dir"),
        ({"kv_offload_encrypted": True}, "kv_offload_encrypted"),
        ({"kv_offload_bytes": ROOM, "kv_offload_encrypted": 1}, "kv_offload_encrypted"),
    ],
)
def test_options_that_cannot_be_had_are_refused(options: dict[str, Any], field: str) -> None:
    for kind in (LLM, AsyncLLM):
        with pytest.raises(RequestError) as caught:
            kind("/nowhere/model.gguf", **options)
        assert caught.value.field == field


def test_an_executor_without_blocks_to_read_is_refused() -> None:
    class Plain:
        block_size = 4

        def kv_capacity(self) -> int:
            return 4

    with pytest.raises(RequestError, match=r"kv_offload_bytes.*Plain"):
        make(Plain())
    with pytest.raises(CapacityError, match="kv_offload_bytes"):
        make(kv_offload_bytes=100)


# ---- the CPU's cache ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write("hf", tmp_path_factory.mktemp("hf"))


PROMPTS = [tiny.tokens(70, seed=i) for i in range(4)]
REPORT = SamplingParams(temperature=0.8, seed=3, max_tokens=9, ignore_eos=True, logprobs=3, detokenize=False)


def engine_of(path: Path, **options: Any) -> Engine:
    defaults: dict[str, Any] = {"kv_cache_tokens": 128, "max_model_len": 128, "threads": 2}
    return load_model(ModelOptions(model=path, **{**defaults, **options})).engine


def bits(output: Any) -> Any:
    """The tokens and the bits of their logprobs."""
    completion = output.outputs[0]
    return completion.token_ids, [
        sorted((token, np.float32(entry.logprob).tobytes()) for token, entry in entries.items())
        for entries in completion.logprobs
    ]


@pytest.mark.parametrize("dtype", KV_CACHE_DTYPES)
@pytest.mark.parametrize(("block_size", "encrypted"), [(16, True), (32, False), (64, True)])
def test_evicted_and_restored_has_the_bits_of_never_evicted(
    dtype: str, block_size: int, encrypted: bool, directory: Path, tmp_path: Path
) -> None:
    plain = engine_of(directory, kv_cache_dtype=dtype, block_size=block_size, enable_prefix_caching=False)
    expected = [bits(answer(plain, prompt, REPORT)) for prompt in PROMPTS]
    plain.close()
    options = {"kv_offload_bytes": 32 << 20, "kv_offload_dir": tmp_path, "kv_offload_encrypted": encrypted}
    engine = engine_of(directory, kv_cache_dtype=dtype, block_size=block_size, **options)
    for time in range(3):
        for prompt, known in zip(PROMPTS, expected, strict=True):
            output = answer(engine, prompt, REPORT)
            assert bits(output) == known
            assert output.num_cached_tokens == (69 // block_size * block_size if time else 0)
            settle(engine)
    assert engine.load().num_restored_tokens > 6 * 60
    assert list(tmp_path.iterdir()) == []
    engine.close()


def test_a_flipped_bit_changes_nothing_but_the_hits(directory: Path) -> None:
    engine = engine_of(directory, kv_offload_bytes=32 << 20)
    expected = [bits(answer(engine, prompt, REPORT)) for prompt in PROMPTS]
    settle(engine)
    file = engine.scheduler.offload.file  # type: ignore[union-attr]
    assert (first := answer(engine, PROMPTS[0], REPORT).num_cached_tokens) == 64
    answer(engine, PROMPTS[1], REPORT)
    answer(engine, PROMPTS[2], REPORT)
    settle(engine)
    for slot in range(file.num_bytes // file.slot_bytes):
        if slot % 2:
            place = slot * file.slot_bytes + 37 * slot
            (byte,) = os.pread(file._file, 1, place)
            os.pwrite(file._file, bytes([byte ^ 4]), place)
    hits = []
    for prompt, known in zip(PROMPTS, expected, strict=True):
        output = answer(engine, prompt, REPORT)
        assert bits(output) == known
        hits.append(output.num_cached_tokens)
    assert min(hits) < first
    assert file.num_failed > 0
    engine.close()


def test_preempted_sequences_have_their_own_bits(directory: Path) -> None:
    plain = engine_of(directory, enable_prefix_caching=False)
    params = replace(REPORT, max_tokens=30)
    expected = {str(i): bits(answer(plain, prompt[:32], params)) for i, prompt in enumerate(PROMPTS)}
    plain.close()
    engine = engine_of(directory, kv_offload_bytes=32 << 20)
    found = {}
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt[:32], params)
    while engine.has_unfinished():
        found.update({output.request_id: bits(output) for output in engine.step() if output.finished})
    assert engine.load().num_preemptions > 0
    assert found == expected
    engine.close()


def test_sleep_forgets_the_file(directory: Path) -> None:
    engine = engine_of(directory, kv_offload_bytes=32 << 20)
    expected = [bits(answer(engine, prompt, REPORT)) for prompt in PROMPTS]
    settle(engine)
    assert engine.load().num_offloaded_blocks > 0
    engine.sleep(1)
    assert engine.load().num_offloaded_blocks == engine.load().offloaded_bytes == 0
    engine.wake_up()
    for time in range(2):
        for prompt, known in zip(PROMPTS, expected, strict=True):
            output = answer(engine, prompt, REPORT)
            assert (bits(output), output.num_cached_tokens) == (known, 64 * time)
    engine.close()


def test_with_a_profile_and_through_the_api(directory: Path) -> None:
    with LLM(directory, kv_cache_tokens=128, max_model_len=128, kv_offload_bytes=32 << 20) as llm:
        with llm.profile():
            prompts: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
            first = [bits(output) for prompt in prompts for output in llm.generate(prompt, REPORT)]
            again = [output for prompt in prompts for output in llm.generate(prompt, REPORT)]
        assert [bits(output) for output in again] == first
        assert [output.num_cached_tokens for output in again] == [64] * 4
