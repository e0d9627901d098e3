"""Embeddings: the same bits in every arrangement and company, and what `transformers` computes."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny
import torch
from api_fakes import WAIT, ApiTokenizer, HeldExecutor, make_engine
from fake_executor import DIM, PIECES, FakeDetokenizer, FakeExecutor, expected_embedding, expected_tokens
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from step_batches import Chunk, step_batch

from fastllm import LLM, AsyncLLM, EmbeddingOutput, PoolingParams, SamplingParams, _core
from fastllm.engine import hooks as events
from fastllm.engine.engine import Engine, EngineConfig
from fastllm.engine.hooks import EngineHook
from fastllm.engine.offload import PAGE
from fastllm.engine.pooling import cosine
from fastllm.errors import CapacityError, EngineDeadError, RequestError
from fastllm.executor.base import ROW_POOL, ROW_SAMPLE
from fastllm.executor.cpu import CpuExecutor
from fastllm.formats.checkpoint import open_checkpoint
from fastllm.models.registry import spec_from_checkpoint

VOCAB = len(PIECES)
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LAST, MEAN = PoolingParams(), PoolingParams(pooling="mean")
KINDS = [
    PoolingParams(pooling=pooling, normalize=normalize)
    for pooling, normalize in itertools.product(("last", "mean"), (True, False))
]


def make(executor: FakeExecutor | None = None, hooks: Any = (), **config: Any) -> Engine:
    ticks = itertools.count(1)
    return Engine(
        executor or FakeExecutor(),
        ApiTokenizer(),
        EngineConfig(**{"max_model_len": 60, "max_num_batched_tokens": 16, "max_num_seqs": 8, **config}),
        hooks,
        detokenizer_factory=FakeDetokenizer,
        clock=lambda: float(next(ticks)),
    )


def run(engine: Engine) -> dict[str, Any]:
    """Step to the end; the last output of each request."""
    outputs = {}
    while engine.has_unfinished():
        outputs.update((output.request_id, output) for output in engine.step())
        engine.check()
    assert engine.pool.num_free == engine.pool.num_blocks
    return outputs


def bits(vector: npt.NDArray[np.float32]) -> bytes:
    assert vector.dtype == np.float32
    return vector.tobytes()


# ---- parameters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"pooling": "max"}, "pooling"),
        ({"pooling": None}, "pooling"),
        ({"pooling": ["last"]}, "pooling"),
        ({"normalize": 1}, "normalize"),
        ({"normalize": None}, "normalize"),
    ],
)
def test_parameters_are_checked_when_they_are_made(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        PoolingParams(**arguments)
    assert caught.value.field == field
    assert caught.value.value == arguments[field]


def test_a_prompt_may_fill_the_model_and_the_cache_and_no_more() -> None:
    engine = make(FakeExecutor(num_blocks=3), max_model_len=12)
    engine.add_request("a", [2] * 12, MEAN)
    assert run(engine)["a"].embedding.shape == (DIM,)
    with pytest.raises(CapacityError, match="asked 13 prompt tokens, had 12, would fit 12"):
        engine.add_request("b", [2] * 13, MEAN)
    engine = make(FakeExecutor(num_blocks=3), max_model_len=40)
    with pytest.raises(CapacityError, match="3 blocks x 4 tokens: asked 13 prompt tokens"):
        engine.add_request("b", [2] * 13, LAST)
    assert not engine.has_unfinished()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"request_id": "live"}, "request_id"),
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"prompt_token_ids": [VOCAB]}, "prompt_token_ids"),
        ({"priority": 1.5}, "priority"),
        ({"cache_salt": ""}, "cache_salt"),
    ],
)
def test_a_bad_request_is_refused_alone(arguments: dict[str, Any], field: str) -> None:
    engine = make()
    engine.add_request("live", [2, 3], MEAN)
    with pytest.raises(RequestError) as caught:
        engine.add_request(**{"request_id": "a", "prompt_token_ids": [2], "params": LAST, **arguments})
    assert caught.value.field == field
    assert bits(run(engine)["live"].embedding) == bits(expected_embedding([2, 3], MEAN))


# ---- the same bits however it is computed ----------------------------------------------------------------

prompt_strategy = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14)
request_strategy = st.tuples(
    prompt_strategy
    | st.integers(1, 14).map(lambda count: [2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5, 6, 7][:count]),
    st.sampled_from(KINDS)
    | st.builds(SamplingParams, n=st.integers(1, 3), max_tokens=st.integers(1, 8), seed=st.integers(0, 99)),
    st.integers(0, 3),
)


@given(
    st.lists(request_strategy, min_size=1, max_size=7),
    st.integers(1, 20),
    st.integers(1, 6),
    st.integers(4, 20),
    st.sampled_from([0, 3]),
)
def test_mixes_of_pooling_and_generating_requests_change_no_answer(
    requests: list[tuple[list[int], Any, int]], budget: int, seqs: int, blocks: int, guesses: int
) -> None:
    engine = make(
        FakeExecutor(num_blocks=blocks),
        max_num_batched_tokens=budget,
        max_num_seqs=seqs,
        num_speculative_tokens=guesses,
        prompt_lookup_min=1,
    )
    outputs = {}
    for i, (prompt, params, delay) in enumerate(requests):
        engine.add_request(str(i), prompt, params)
        for _ in range(delay):
            outputs.update((output.request_id, output) for output in engine.step())
            engine.check()
    outputs |= run(engine)
    for i, (prompt, params, _) in enumerate(requests):
        output = outputs[str(i)]
        if isinstance(params, PoolingParams):
            assert bits(output.embedding) == bits(expected_embedding(prompt, params))
            assert (output.finish_reason, output.prompt_token_ids) == ("stop", prompt)
            continue
        for completion in output.outputs:
            limit = min(60, 4 * blocks + 1, len(prompt) + params.max_tokens)
            alone = expected_tokens(prompt, params, limit, index=completion.index, seed=params.seed)
            assert (completion.token_ids, completion.finish_reason, completion.stop_reason) == alone


class EngineMachine(RuleBasedStateMachine):
    """Requests of both kinds come, run, are aborted at any moment; blocks go to a file and come back; the
    cache is reset; the engine sleeps."""

    @initialize(
        blocks=st.integers(4, 14),
        seqs=st.integers(1, 5),
        budget=st.integers(1, 12),
        file_bytes=st.sampled_from([None, 3 * PAGE, 100 * PAGE]),
        ahead=st.integers(0, 1),
    )
    def start(self, blocks: int, seqs: int, budget: int, file_bytes: int | None, ahead: int) -> None:
        self.recorder = CacheRecorder()
        self.executor = FakeSleeper(num_blocks=blocks)
        self.executor.steps_ahead = ahead
        self.engine = make(
            self.executor,
            [self.recorder],
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            kv_offload_bytes=file_bytes,
        )
        self.blocks = blocks
        self.asked: dict[str, tuple[list[int], Any]] = {}
        self.aborted: set[str] = set()
        self.outputs: dict[str, Any] = {}

    @rule(request=request_strategy, priority=st.sampled_from([0, 0, -1, 1]))
    def submit(self, request: tuple[list[int], Any, int], priority: int) -> None:
        prompt, params, _ = request
        name = str(len(self.asked))
        if self.engine.is_sleeping:
            with pytest.raises(RequestError, match="is_sleeping"):
                self.engine.add_request(name, prompt, params)
            return
        self.engine.add_request(name, prompt, params, priority=priority)
        self.asked[name] = prompt, params

    @rule(times=st.integers(1, 5))
    def steps(self, times: int) -> None:
        for _ in range(times):
            for output in self.engine.step():
                assert output.request_id not in self.outputs or not self.outputs[output.request_id].finished
                self.outputs[output.request_id] = output

    @precondition(lambda self: self.engine.request_ids)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.engine.request_ids))
        self.engine.abort(name)
        self.aborted.add(name)

    @rule()
    def reset(self) -> None:
        self.engine.reset_prefix_cache()
        assert self.engine.pool.num_cached == 0

    @rule(level=st.sampled_from([1, 2]))
    def sleep(self, level: int) -> None:
        if self.engine.has_unfinished():
            with pytest.raises(RequestError, match="sleep"):
                self.engine.sleep(level)
            assert not self.engine.is_sleeping
            return
        self.engine.sleep(level)
        assert self.engine.is_sleeping
        assert self.executor.level >= level

    @rule()
    def wake_up(self) -> None:
        self.engine.wake_up()
        assert not self.engine.is_sleeping
        assert self.executor.level == 0

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.check()
        load = self.engine.load()
        assert load.num_used_blocks + load.num_free_blocks == self.blocks
        assert load.kv_usage == load.num_used_blocks / self.blocks
        assert load.num_prefix_hits <= load.num_prefix_queries
        if not self.engine.pool.events:  # nothing is left to tell since the last step
            assert len(self.recorder.known) == load.num_cached_blocks

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.wake_up()
        while self.engine.has_unfinished():
            self.steps(1)
        assert self.outputs.keys() == self.asked.keys()
        for name, (prompt, params) in self.asked.items():
            output = self.outputs[name]
            assert output.finished
            if not isinstance(params, PoolingParams):
                continue
            if name in self.aborted:
                assert (output.finish_reason, output.embedding.shape) == ("abort", (0,))
            else:
                assert bits(output.embedding) == bits(expected_embedding(prompt, params))
        assert self.engine.load().num_running == self.engine.load().num_waiting == 0
        assert self.engine.load().kv_usage == 0
        self.engine.close()


class CacheRecorder(EngineHook):
    """What a router outside knows of the cache, from events alone: by hash, the tokens of whole prefixes."""

    def __init__(self) -> None:
        self.known: dict[bytes, tuple[int, ...]] = {}
        self.cleared = 0

    def on_blocks_stored(self, event: events.BlocksStored) -> None:
        assert len(event.token_ids) == len(event.hashes) * event.block_size
        before = event.parent_hash
        for i, content in enumerate(event.hashes):
            own = event.token_ids[i * event.block_size : (i + 1) * event.block_size]
            assert content not in self.known
            self.known[content] = self.known.get(before, ()) + own
            before = content

    def on_blocks_removed(self, event: events.BlocksRemoved) -> None:
        for content in event.hashes:
            del self.known[content]

    def on_cache_cleared(self, event: events.CacheCleared) -> None:
        self.known.clear()
        self.cleared += 1


class FakeSleeper(FakeExecutor):
    """Refuses to work while it sleeps, and forgets."""

    level = 0

    def sleep(self, level: int) -> None:
        self.level = max(self.level, level)
        self.values[:] = 0
        self.tokens[:] = -1

    def wake(self) -> None:
        self.level = 0

    def run(self, batch: Any) -> Any:
        assert self.level == 0
        return super().run(batch)


TestEngineMachine = EngineMachine.TestCase


# ---- the engine ------------------------------------------------------------------------------------------


def test_events_and_metrics_of_a_pooling_request() -> None:
    class Recorder(EngineHook):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def take(self, event: Any) -> None:
            self.seen.append(event)

        on_queued = on_scheduled = on_step = on_first_token = on_tokens = on_finished = take

    recorder = Recorder()
    engine = make(hooks=[recorder], max_num_batched_tokens=4)
    engine.add_request("a", [2] * 6, MEAN, prompt="aaaaaa")
    output = run(engine)["a"]
    names = [type(event).__name__ for event in recorder.seen]
    assert names == ["Queued", "Scheduled", "Step", "Finished", "Step"]
    queued, scheduled, _, finished, step = recorder.seen
    assert (queued.num_prompt_tokens, queued.n, finished.finish_reasons) == (6, 1, ("stop",))
    assert (step.num_prefill_tokens, step.num_running, step.num_free_blocks) == (2, 0, 64)
    assert (step.num_cached_blocks, step.num_prefix_queries, step.num_preemptions) == (1, 0, 0)
    assert output.prompt == "aaaaaa"
    metrics = output.metrics
    assert metrics.queue_time == scheduled.time - queued.time
    assert metrics.e2e_latency == finished.time - queued.time
    assert metrics.first_token_time is metrics.prefill_time is metrics.decode_time is None
    assert metrics.mean_inter_token_latency is None
    assert metrics.num_generated_tokens == 0


def test_times_of_a_generating_request() -> None:
    engine = make()
    engine.add_request("a", [2, 3], SamplingParams(max_tokens=4, ignore_eos=True))
    metrics = run(engine)["a"].metrics
    assert metrics.prefill_time == metrics.first_token_time - metrics.first_scheduled_time > 0
    assert metrics.decode_time == metrics.last_token_time - metrics.first_token_time > 0
    assert metrics.mean_inter_token_latency == metrics.decode_time / 3
    assert metrics.e2e_latency == metrics.finished_time - metrics.arrival_time > metrics.decode_time


def test_the_last_token_uses_the_prefix_cache_and_the_mean_does_not() -> None:
    executor = FakeExecutor()
    engine = make(executor)
    prompt = [2, 3, 4, 5, 6, 7, 8, 9, 10]
    engine.add_request("generates", prompt, SamplingParams(max_tokens=1))
    run(engine)
    computed = []
    for name, params in (("mean", MEAN), ("last", LAST)):
        before = executor.num_tokens
        engine.add_request(name, prompt, params)
        output = run(engine)[name]
        computed.append((executor.num_tokens - before, output.num_cached_tokens))
        assert bits(output.embedding) == bits(expected_embedding(prompt, params))
    assert computed == [(9, 0), (1, 8)]
    assert (engine.scheduler.num_prefix_queries, engine.scheduler.num_prefix_hits) == (18, 8)
    engine.add_request("again", [*prompt, 2], SamplingParams(max_tokens=1))
    assert run(engine)["again"].num_cached_tokens == 8


def test_a_preempted_mean_counts_no_token_twice() -> None:
    """One that is more important takes the blocks of a prompt half of which is summed up."""
    engine = make(FakeExecutor(num_blocks=6), max_num_batched_tokens=5)
    prompt = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 2, 3, 4, 5, 6, 7, 8]
    engine.add_request("a", prompt, MEAN)
    engine.step()
    engine.step()
    engine.add_request("b", [3] * 10, GREEDY, priority=-5)
    outputs = run(engine)
    assert outputs["a"].metrics.num_preemptions == 1
    assert bits(outputs["a"].embedding) == bits(expected_embedding(prompt, MEAN))


@pytest.mark.parametrize("steps", [0, 1])
def test_an_aborted_prompt_has_no_embedding(steps: int) -> None:
    engine = make(max_num_batched_tokens=4)
    engine.add_request("a", [2] * 10, MEAN)
    for _ in range(steps):
        engine.step()
    engine.abort("a")
    (output,) = engine.step()
    assert (output.finish_reason, output.embedding.shape, output.finished) == ("abort", (0,), True)
    assert engine.pool.num_free == engine.pool.num_blocks


def test_a_state_that_is_no_number_ends_its_request_alone() -> None:
    class Broken(FakeExecutor):
        def run(self, batch: Any) -> Any:
            result = super().run(batch)
            for row in np.flatnonzero(batch.row_kind == ROW_POOL):
                if batch.token_ids[batch.row_token[row]] == 12:
                    result.tokens[row] = -1
            return result

    engine = make(Broken(), max_num_batched_tokens=4)
    engine.add_request("bad", [2, 12, 3, 4, 5, 6], MEAN)
    engine.add_request("good", [2, 3, 12, 4], LAST)
    outputs = run(engine)
    assert (outputs["bad"].finish_reason, outputs["bad"].embedding.shape) == ("error", (0,))
    assert bits(outputs["good"].embedding) == bits(expected_embedding([2, 3, 12, 4], LAST))


def test_a_result_with_too_few_states_ends_the_engine() -> None:
    class Short(FakeExecutor):
        def run(self, batch: Any) -> Any:
            result = super().run(batch)
            result.hidden = result.hidden[:-1]
            return result

    engine = make(Short())
    engine.add_request("a", [2, 3, 4], MEAN)
    with pytest.raises(EngineDeadError, match="hidden"):
        engine.step()


# ---- the API ---------------------------------------------------------------------------------------------


def make_llm(executor: FakeExecutor | None = None, **config: Any) -> LLM:
    return LLM._from_parts(make_engine(executor or FakeSleeper(num_blocks=128), **config), ApiTokenizer())


def make_async(executor: FakeExecutor | None = None, **config: Any) -> AsyncLLM:
    return AsyncLLM._from_parts(
        make_engine(executor or FakeSleeper(num_blocks=128), **config), ApiTokenizer()
    )


def ids(text: str) -> list[int]:
    return [PIECES.index(letter.encode()) for letter in text]


@pytest.mark.parametrize("params", KINDS)
def test_embed(params: PoolingParams) -> None:
    with make_llm() as llm:
        texts = ["abc", "b", "cab" * 9]
        outputs = llm.embed(texts, pooling=params.pooling, normalize=params.normalize)
        for text, output in zip(texts, outputs, strict=True):
            assert isinstance(output, EmbeddingOutput)
            assert (output.prompt, output.prompt_token_ids) == (text, ids(text))
            assert bits(output.embedding) == bits(expected_embedding(ids(text), params))
        (one,) = llm.embed({"prompt_token_ids": [5, 6]}, use_tqdm=True)
        assert bits(one.embedding) == bits(expected_embedding([5, 6], LAST))
        assert llm.embed([]) == []


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda llm: llm.embed(5), "prompts"),
        (lambda llm: llm.embed(["a", ""]), "prompts[1]"),
        (lambda llm: llm.embed("a", pooling="first"), "pooling"),
        (lambda llm: llm.embed("a", normalize="yes"), "normalize"),
        (lambda llm: llm.embed(["a", "b"], priority=[1]), "priority"),
        (lambda llm: llm.embed("a", priority="high"), "priority"),
        (lambda llm: llm.embed([{"prompt_token_ids": [1]}, {"prompt_token_ids": [99]}]), "prompts[1]: "),
        (lambda llm: llm.score(["a", "b"], ["a", "b", "c"]), "query_or_queries"),
        (lambda llm: llm.score([], ["a"]), "query_or_queries"),
        (lambda llm: llm.score("a", ["b", 7]), "documents[1]"),
        (lambda llm: llm.score("a", ["b", ""]), "documents[1]"),
        (lambda llm: llm.score(7, "a"), "query_or_queries"),
        (lambda llm: llm.score("a", "b", pooling=3), "pooling"),
        (lambda llm: llm.generate("a", LAST), "sampling_params"),
    ],
)
def test_what_cannot_be_embedded_is_refused_before_anything_is_begun(call: Any, field: str) -> None:
    executor = FakeExecutor()
    with make_llm(executor) as llm:
        with pytest.raises(RequestError) as caught:
            call(llm)
        assert caught.value.field.startswith(field)
        assert executor.num_steps == 0
        assert len(llm.embed("abc")) == 1


def test_scores_are_cosines_of_one_to_one_one_to_many_and_many_to_many() -> None:
    def expected(one: str, other: str) -> float:
        a, b = (expected_embedding(ids(text), MEAN).astype(np.float64) for text in (one, other))
        return math.fsum(a * b) / math.sqrt(math.fsum(a * a) * math.fsum(b * b))

    with make_llm() as llm:
        (single,) = llm.score("abc", "cab", pooling="mean")
        assert single.score == expected("abc", "cab")
        assert single.prompt_token_ids == ids("abc") + ids("cab")
        documents = ["a", "bb", "abc"]
        scores = [item.score for item in llm.score("abc", documents, pooling="mean")]
        assert scores == [expected("abc", document) for document in documents]
        assert scores[2] == pytest.approx(1.0, abs=1e-12)
        queries = ["b", "c", "ab"]
        scores = [item.score for item in llm.score(queries, documents, pooling="mean")]
        assert scores == [expected(*pair) for pair in zip(queries, documents, strict=True)]
        assert llm.score("abc", []) == []


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=9),
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=9, max_size=9),
    st.permutations(range(9)),
)
def test_a_cosine_is_symmetric_bounded_and_of_no_order(
    one: list[float], other: list[float], order: list[int]
) -> None:
    a = np.array(one, np.float32)
    b = np.array(other[: len(one)], np.float32)
    assume(float(np.abs(a).max()) > 1e-15 and float(np.abs(b).max()) > 1e-15)
    value = cosine(a, b)
    assert -1.0 <= value <= 1.0
    assert value == cosine(b, a)
    places = [place for place in order if place < len(one)]
    assert value == cosine(a[places], b[places])
    assert cosine(a, a) == pytest.approx(1.0, abs=1e-15)


def test_a_cosine_without_a_direction_is_no_number() -> None:
    assert math.isnan(cosine(np.zeros(3, np.float32), np.ones(3, np.float32)))
    assert math.isnan(cosine(np.zeros(0, np.float32), np.ones(3, np.float32)))


@pytest.mark.asyncio
async def test_encode_gives_one_output() -> None:
    async with make_async() as llm:
        found = [output async for output in llm.encode("abc", MEAN, "a")]
        assert [output.request_id for output in found] == ["a"]
        assert bits(found[0].embedding) == bits(expected_embedding(ids("abc"), MEAN))
        (default,) = [output async for output in llm.encode({"prompt_token_ids": [2, 3]})]
        assert bits(default.embedding) == bits(expected_embedding([2, 3], LAST))
        with pytest.raises(RequestError, match="pooling_params"):
            llm.encode("abc", GREEDY)  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_encode_can_be_aborted() -> None:
    executor = HeldExecutor(held=True)
    async with make_async(executor, max_num_batched_tokens=2) as llm:
        stream = llm.encode("abcabc", MEAN, "a")
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.to_thread(executor.steps, 1)
        await llm.abort("a")
        executor.let_go()
        output = await waiting
        assert (output.finish_reason, output.embedding.shape) == ("abort", (0,))


# ---- the decoder -----------------------------------------------------------------------------------------


def oracle_states(model: Any, tokens: list[int]) -> npt.NDArray[np.float64]:
    """The final norm's output of `transformers` in float64, (T, dim)."""
    with torch.no_grad():
        return model.double().model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0].numpy()


@pytest.mark.parametrize("variant", ["llama", "qwen2-tied", "qwen3", "mistral"])
def test_embeddings_agree_with_transformers_in_float64(variant: str, tmp_path: Path) -> None:
    """Float32 weights and cache: what is left are float32 roundings, 6e-8 each, of two layers of sums of at
    most 96 products; 1e-5 of a vector's length leaves room for their growth and none for a wrong token."""
    model = tiny.make_model(variant)
    path = tiny.save_hf(model, tmp_path)
    prompts = [tiny.tokens(count, seed=count) for count in (1, 5, 70)]
    with LLM(path, kv_cache_dtype="fp32", threads=2, max_num_batched_tokens=32) as llm:
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        last = llm.embed(given, normalize=False)
        mean = llm.embed(given, pooling="mean", normalize=False)
        unit = llm.embed(given, pooling="mean")
        scores = llm.score(given[1], given, pooling="mean")
    goals = []
    for i, prompt in enumerate(prompts):
        states = oracle_states(model, prompt)
        goals.append(states.mean(axis=0))
        for got, goal in (
            (last[i], states[-1]),
            (mean[i], goals[i]),
            (unit[i], goals[i] / np.linalg.norm(goals[i])),
        ):
            assert np.linalg.norm(got.embedding - goal) <= 1e-5 * np.linalg.norm(goal)
    for score, goal in zip(scores, goals, strict=True):
        exact = goal @ goals[1] / np.linalg.norm(goal) / np.linalg.norm(goals[1])
        assert abs(score.score - exact) <= 2e-5


def test_rows_that_pool_and_rows_that_sample_share_a_step(tmp_path: Path) -> None:
    """In any order, in more rows than the head takes at a time, and cut between threads."""
    path = tiny.save_hf(tiny.make_model("llama"), tmp_path)
    tokens = [tiny.tokens(40, seed=seed) for seed in range(4)]
    with open_checkpoint(path) as checkpoint:
        spec = spec_from_checkpoint(checkpoint)
        made = CpuExecutor(checkpoint, spec, max_model_len=256, max_num_seqs=8, threads=2)
    try:
        chunks = [Chunk(tokens[s], 0, range(3 * s, 3 * s + 3), range(40)) for s in range(4)]
        whole = step_batch(chunks, made.block_size)
        sampled, logits = made.run(whole, logits=True)
        whole.row_kind = np.full(160, ROW_POOL, np.int32)
        pooled, _ = made.run(whole)
        assert sampled.hidden.shape == (0, spec.dim)
        assert pooled.hidden.shape == (160, spec.dim)
        assert (pooled.tokens == 0).all()
        whole.row_kind = np.where(np.arange(160) % 3 == 1, ROW_POOL, ROW_SAMPLE).astype(np.int32)
        mixed, mixed_logits = made.run(whole, logits=True)
        pools = whole.row_kind == ROW_POOL
        assert mixed.hidden.tobytes() == pooled.hidden[pools].tobytes()
        assert logits is not None
        assert mixed_logits is not None
        assert mixed_logits[~pools].tobytes() == logits[~pools].tobytes()
        assert (mixed_logits[pools] == 0).all()
        assert (mixed.tokens[~pools] == sampled.tokens[~pools]).all()
        whole.row_kind[3] = 3
        with pytest.raises(RequestError, match="row_kind"):
            made.run(whole)
    finally:
        made.close()


def test_a_step_that_only_pools_computes_no_head(tmp_path: Path) -> None:
    path = tiny.save_hf(tiny.make_model("llama"), tmp_path)
    with LLM(path, threads=2) as llm, llm.profile() as profile:
        llm.embed([{"prompt_token_ids": tiny.tokens(60)}] * 3, pooling="mean")
    assert profile.prefill.steps > 0
    assert profile.prefill.parts["head"] == 0
    assert profile.prefill.parts["sample"] == 0


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_weights_that_are_not_numbers_give_no_embedding(pooling: str, tmp_path: Path) -> None:
    model = tiny.make_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = float("nan")
    path = tiny.save_hf(model, tmp_path)
    with LLM(path, threads=1) as llm:
        bad, good = llm.embed([{"prompt_token_ids": [5, 77]}, {"prompt_token_ids": [5, 6]}], pooling=pooling)
        assert (bad.finish_reason, good.finish_reason) == ("error", "stop")
        assert math.isnan(
            llm.score({"prompt_token_ids": [77]}, {"prompt_token_ids": [5]}, pooling=pooling)[0].score
        )


# ---- the default model -----------------------------------------------------------------------------------

PARAPHRASES = (
    ("The cat is sleeping on the sofa.", "A cat sleeps on the couch."),
    ("He bought a new car last week.", "Last week he purchased a new automobile."),
    ("The stock market fell sharply today.", "Today share prices dropped a lot."),
    ("It is raining heavily outside.", "There is a downpour outdoors."),
)


@pytest.mark.model
def test_paraphrases_are_closer_than_unrelated_sentences(default_model_path: Path) -> None:
    first, second = zip(*PARAPHRASES, strict=True)
    with LLM(default_model_path, max_model_len=128) as llm:
        one = np.array([output.embedding for output in llm.embed(list(first), pooling="mean")])
        two = np.array([output.embedding for output in llm.embed(list(second), pooling="mean")])
        pairs = np.array([item.score for item in llm.score(list(first), list(second), pooling="mean")])
    table = one @ two.T
    assert np.allclose(np.diag(table), pairs, atol=1e-6)
    assert (table.argmax(axis=1) == np.arange(len(PARAPHRASES))).all(), table
    assert np.diag(table).min() > table[~np.eye(len(PARAPHRASES), dtype=bool)].mean()


TEXTS = [
    f"{'In the beginning there was a list of things to do. ' * (i % 4)}Sentence {i} is about {word}."
    for i, word in enumerate(("rivers", "trains", "bread", "music", "chess", "planets", "law", "rain") * 2)
]


def embed_all(llm: LLM) -> list[bytes]:
    """The bits of every text's embeddings of both kinds, computed in company of texts that go on."""
    company = SamplingParams(temperature=0.7, seed=1, max_tokens=24, ignore_eos=True)
    talk = threading.Thread(target=llm.generate, args=(TEXTS[:4], company))
    talk.start()
    found = [output.embedding for kind in ("last", "mean") for output in llm.embed(TEXTS, pooling=kind)]
    talk.join(WAIT)
    return [bits(vector) for vector in found]


@pytest.fixture(scope="module")
def alone(default_model_path: Path) -> list[bytes]:
    """From requests that had the engine to themselves, on one thread."""
    with LLM(default_model_path, max_model_len=256, threads=1, enable_prefix_caching=False) as llm:
        return [
            bits(llm.embed(text, pooling=kind)[0].embedding) for kind in ("last", "mean") for text in TEXTS
        ]


@pytest.mark.model
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"kv_cache_tokens": 128, "max_model_len": 128},
        {"threads": 1},
        {"threads": 3, "block_size": 64},
    ],
    ids=["batched", "chunked", "preempted", "one-thread", "three-threads"],
)
def test_an_embedding_has_the_same_bits_in_every_arrangement(
    options: dict[str, Any], alone: list[bytes], default_model_path: Path
) -> None:
    with LLM(default_model_path, **{"max_model_len": 256, **options}) as llm:
        for _ in range(2):  # the second time last tokens are found in the prefix cache
            assert embed_all(llm) == alone


RUN = """
import sys
import test_pooling as suite
from fastllm import LLM, _core
with LLM(sys.argv[1], max_model_len=256) as llm:
    outputs = [output for kind in ("last", "mean") for output in llm.embed(suite.TEXTS[:4], pooling=kind)]
print(_core.isa(), *(suite.bits(output.embedding).hex() for output in outputs))
"""


@pytest.mark.model
def test_an_embedding_has_the_same_bits_with_every_instruction_set(default_model_path: Path) -> None:
    answers = set()
    for isa in _core.supported_isas():
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(default_model_path)],
            env={**os.environ, "FASTLLM_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        )
        used, *vectors = done.stdout.split()
        assert used == isa
        answers.add(tuple(vectors))
    assert len(answers) == 1
