"""Token invariance: whatever the engine does with its time and its memory, each request gets the bits that it
gets alone.

Workloads are drawn at random: prompts that begin alike, every way of sampling, logprobs of outputs and
prompts, embeddings, adapters, priorities, salts, arrivals at any step, some that are aborted. Their answers
are compared with those of requests that had an engine to themselves, without cache, chunks or guesses.
Arrangements are drawn at random too, and those with a name are shown to do what they are there for.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from lora_files import save_adapter

from fastllm import EmbeddingOutput, PoolingParams, RequestOutput, SamplingParams, StructuredOutputsParams
from fastllm.engine import grammar
from fastllm.engine.engine import Engine
from fastllm.engine.model_drafter import ModelDrafter
from fastllm.loading import ModelOptions, load_model

MODEL_LEN = 192
ADAPTERS = ("one", "two")
OPENINGS = [tiny.tokens(count, seed=count) for count in (0, 17, 48, 70)]
Answer = tuple[Any, ...]


@dataclass(frozen=True)
class Asked:
    """One request of a workload."""

    prompt: list[int]
    params: SamplingParams | PoolingParams
    arrives: int = 0  # steps after the first
    aborted_after: int | None = None  # steps, from its arrival
    priority: int = 0
    salt: str | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class Arrangement:
    """How a workload is served."""

    options: dict[str, Any] = field(default_factory=dict)
    times: int = 1  # the workload, one time after the other
    resets: bool = False  # the prefix cache, every few steps

    def widened(self, **options: Any) -> Arrangement:
        return replace(self, options={**self.options, **options})


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's file; beside it lie directories with adapters, ADAPTERS."""
    path = tmp_path_factory.mktemp(request.param)
    model = tiny.make_model(request.param)
    for seed, name in enumerate(ADAPTERS):
        save_adapter(path / name, model, rank=2 + seed, seed=seed)
    return tiny.save_gguf(model, path / "model.gguf")


@pytest.fixture(scope="module", autouse=True)
def _grammars_are_tried_once() -> Iterator[None]:
    """Each engine would try each grammar in a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar, "try_grammar", functools.cache(grammar.try_grammar))
        yield


@dataclass
class Counts:
    """What an engine has done."""

    preemptions: int
    hits: int
    accepted: int
    restored: int


def engine_of(model: Path, **options: Any) -> Engine:
    given = {"max_model_len": MODEL_LEN, "threads": 1, "progress": False, **options}
    if options.get("speculative_config") is DRAFTING:
        given["speculative_config"] = {**DRAFTING, "model": model}
    engine = load_model(ModelOptions(model=model, **given)).engine
    if options.get("speculative_config") is not None:
        ticks = itertools.count()
        engine._clock = lambda: (
            1e-4 * next(ticks)
        )  # all steps take the same: guesses pay, as on a model of size
        if isinstance(engine.scheduler.drafter, ModelDrafter):
            few = itertools.count()
            engine.scheduler.drafter.clock = lambda: 1e-5 * next(few)  # and the draft model is a smaller one
    for name in ADAPTERS:
        engine.add_adapter(name, engine.adapters.read(model.parent / name))
    return engine


def add(engine: Engine, name: str, asked: Asked) -> None:
    engine.add_request(
        name,
        asked.prompt,
        asked.params,
        priority=asked.priority,
        cache_salt=asked.salt,
        adapter=asked.adapter,
    )


def answer_of(output: RequestOutput | EmbeddingOutput) -> Answer:
    """All that a caller sees of an answer, floats by their bits."""
    if isinstance(output, EmbeddingOutput):
        return output.finish_reason, output.embedding.tobytes()
    return (
        bits_of(output.prompt_logprobs),
        *(
            (item.text, item.token_ids, item.finish_reason, item.stop_reason, bits_of(item.logprobs))
            for item in output.outputs
        ),
    )


def bits_of(logprobs: Sequence[Any] | None) -> list[Any] | None:
    if logprobs is None:
        return None
    return [
        entries
        and [(token, np.float32(item.logprob).tobytes(), item.rank) for token, item in entries.items()]
        for entries in logprobs
    ]


def answers_alone(model: Path, workload: Sequence[Asked]) -> list[Answer]:
    """Each request after the other, each in steps that hold all of its prompt."""
    answers = []
    with engine_of(model, max_num_seqs=1, enable_prefix_caching=False) as engine:
        for index, asked in enumerate(workload):
            add(engine, str(index), replace(asked, salt=None))
            last = None
            while engine.has_unfinished():
                for output in engine.step():
                    last = output
            assert last is not None
            answers.append(answer_of(last))
    return answers


def serve(engine: Engine, workload: Sequence[Asked], resets: bool) -> list[Answer | None]:
    """The answers of a workload, None of those that were aborted."""
    answers: list[Answer | None] = [None] * len(workload)
    waiting = sorted(range(len(workload)), key=lambda index: workload[index].arrives)
    aborts: dict[int, list[int]] = {}
    step = 0
    while waiting or engine.has_unfinished():
        while waiting and (workload[waiting[0]].arrives <= step or not engine.has_unfinished()):
            index = waiting.pop(0)
            asked = workload[index]
            add(engine, str(index), asked)
            if asked.aborted_after is not None:
                aborts.setdefault(step + asked.aborted_after, []).append(index)
        for index in aborts.pop(step, ()):
            engine.abort(str(index))
        if resets and step % 5 == 4:
            engine.reset_prefix_cache()
        for output in engine.step():
            index = int(output.request_id)
            if output.finished and workload[index].aborted_after is None:
                answers[index] = answer_of(output)
        engine.check()
        step += 1
    assert engine.load().num_used_blocks == 0
    return answers


def compare(
    model: Path, workload: Sequence[Asked], arrangement: Arrangement, alone: Sequence[Answer] | None = None
) -> Counts:
    """Serves a workload in an arrangement; each answer is the one that it gets alone."""
    alone = alone or answers_alone(model, workload)
    with engine_of(model, **arrangement.options) as engine:
        for _ in range(arrangement.times):
            answers = serve(engine, workload, arrangement.resets)
            for asked, found, expected in zip(workload, answers, alone, strict=True):
                if asked.aborted_after is None:
                    assert found == expected, (asked, arrangement)
        scheduler = engine.scheduler
        return Counts(
            scheduler.num_preemptions,
            scheduler.num_prefix_hits,
            scheduler.num_accepted_tokens,
            scheduler.num_restored_tokens,
        )


# ---- random workloads ------------------------------------------------------------------------------------


@st.composite
def sampled(draw: st.DrawFn) -> SamplingParams:
    options: dict[str, Any] = draw(
        st.sampled_from(
            [
                {"temperature": 0.0},
                {"temperature": 0.3},
                {"temperature": 1.0},
                {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
                {"temperature": 1.2, "min_p": 0.02},
                {"temperature": 0.0, "repetition_penalty": 1.3},
                {"temperature": 0.7, "presence_penalty": 0.6, "frequency_penalty": 0.4},
                {"temperature": 0.0, "logit_bias": {7: 4.0, 9: -100.0}},
                {"temperature": 0.9, "allowed_token_ids": list(range(3, 60))},
                {"temperature": 0.5, "bad_words": ["e", "th"]},
                {"temperature": 1.0, "structured_outputs": StructuredOutputsParams(regex="[a-f]{4,12}")},
            ]
        )
    )
    return SamplingParams(
        **options,
        seed=draw(st.integers(0, 99)),
        n=draw(st.sampled_from([1, 1, 1, 2, 3])),
        max_tokens=draw(st.integers(1, 40)),
        min_tokens=draw(st.sampled_from([0, 0, 1])),
        ignore_eos="structured_outputs" not in options and draw(st.booleans()),
        stop=draw(st.sampled_from([None, None, ["e"], ["th", "q"]])),
        stop_token_ids=draw(st.sampled_from([None, [20]])),
        logprobs=draw(st.sampled_from([0, 2])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 1])),
    )


@st.composite
def requests(draw: st.DrawFn) -> Asked:
    own = draw(st.lists(st.sampled_from([5, 6, 7, 40]), min_size=1, max_size=20))
    pooled = st.builds(PoolingParams, pooling=st.sampled_from(["last", "mean"]))
    return Asked(
        prompt=draw(st.sampled_from(OPENINGS)) + own,
        params=draw(st.one_of(sampled(), sampled(), sampled(), pooled)),
        arrives=draw(st.integers(0, 12)),
        aborted_after=draw(st.sampled_from([None, None, None, None, 0, 1, 3, 9])),
        priority=draw(st.sampled_from([0, 0, -1, 2])),
        salt=draw(st.sampled_from([None, None, "a"])),
        adapter=draw(st.sampled_from([None, None, *ADAPTERS])),
    )


@st.composite
def arrangements(draw: st.DrawFn) -> Arrangement:
    block_size = draw(st.sampled_from([16, 16, 32, 64]))
    caching = draw(st.sampled_from([True, True, False]))
    offload = draw(st.sampled_from([None, OFFLOAD, {**OFFLOAD, "kv_offload_encrypted": True}]))
    return Arrangement(
        {
            "block_size": block_size,
            "kv_cache_tokens": draw(st.sampled_from([MODEL_LEN, 4 * MODEL_LEN])),
            "max_num_seqs": draw(st.integers(1, 8)),
            "max_num_batched_tokens": draw(st.sampled_from([1, 3, 8, 64, 512])),
            "enable_prefix_caching": caching,
            **(offload if caching and offload else {}),
            "speculative_config": draw(st.sampled_from([None, GUESSING, DRAFTING])),
            "target_itl_ms": draw(st.sampled_from([None, 0.5])),
            "threads": draw(st.integers(1, 3)),
        },
        times=draw(st.integers(1, 2)),
        resets=draw(st.sampled_from([False, False, True])),
    )


OFFLOAD = {"kv_offload_bytes": 1 << 20}
DRAFTING = {"method": "draft_model", "num_speculative_tokens": 3, "quantization": "int4"}  # for itself
GUESSING = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 1}


@given(st.lists(requests(), min_size=1, max_size=8), arrangements())
def test_random_workloads_in_random_arrangements(
    model: Path, workload: list[Asked], arrangement: Arrangement
) -> None:
    compare(model, workload, arrangement)


# ---- the arrangements by name ----------------------------------------------------------------------------


SAYS_LITTLE = dict.fromkeys((5, 6), 9.0)  # so that what it says can be guessed


def a_workload() -> list[Asked]:
    """Twelve requests for which every arrangement has something to do."""
    return [
        Asked(
            OPENINGS[1 + i % 3] + [5, 6, 7, 5, 6] * 3 + [3 + i],
            SamplingParams(
                temperature=(0.0, 0.4, 1.0)[i % 3], seed=i, n=1 + i % 2, max_tokens=30, ignore_eos=True,
                logprobs=1, prompt_logprobs=1 if i == 5 else None, logit_bias=SAYS_LITTLE if i % 2 else None,
            ),
            arrives=i // 3,
            adapter=(None, None, None, *ADAPTERS)[i % 5],
        )
        for i in range(11)
    ] + [Asked(OPENINGS[3], PoolingParams(pooling="mean"), arrives=2)]  # fmt: skip


NAMED = {
    "batched": Arrangement(),
    "chunked": Arrangement({"max_num_batched_tokens": 5}),
    "preempted": Arrangement({"kv_cache_tokens": MODEL_LEN}),
    "prefix-hit": Arrangement(times=2),
    "offloaded": Arrangement({**OFFLOAD, "kv_cache_tokens": MODEL_LEN}, times=2),
    "drafted": Arrangement({"speculative_config": DRAFTING, "max_num_seqs": 2}),
    "speculative": Arrangement({"speculative_config": GUESSING, "max_num_seqs": 2}),
}


@pytest.fixture(scope="module")
def alone(model: Path) -> list[Answer]:
    return answers_alone(model, a_workload())


@pytest.mark.parametrize("name", NAMED)
def test_named_arrangements_do_what_they_are_there_for(name: str, model: Path, alone: list[Answer]) -> None:
    counts = compare(model, a_workload(), NAMED[name], alone)
    assert (counts.preemptions > 0) == (name in ("preempted", "offloaded"))
    assert (counts.restored > 0) == (name == "offloaded")
    if name == "prefix-hit":
        assert counts.hits > 500
    if name in ("drafted", "speculative"):
        assert counts.accepted > 0
