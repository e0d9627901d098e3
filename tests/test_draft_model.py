"""Guessing with a draft model: no answer depends on it, its cache is right, and it gives up where it must."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tokenizers
from fake_executor import (
    EOS,
    PIECES,
    FakeDetokenizer,
    FakeExecutor,
    FakeTokenizer,
    SureExecutor,
    expected_tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm import LLM, AsyncLLM, EngineDeadError, RequestError, SamplingParams
from fastllm.engine.engine import Engine, EngineConfig
from fastllm.engine.model_drafter import ModelDrafter
from fastllm.engine.scheduler import Scheduler
from fastllm.engine.sequence import Sequence, prefix_root
from fastllm.loading import ModelOptions, load_model

VOCAB = len(PIECES)
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


def ticks(seconds: float) -> Callable[[], float]:
    """A clock that goes on by so much whenever it is read."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += seconds
        return now

    return clock


def make_cheap(engine: Engine) -> None:
    """Steps take the same time whatever is in them, those of the draft model a hundredth of it: guesses are
    always worth it as long as they are right."""
    drafter = engine.scheduler.drafter
    engine._clock = ticks(1e-4)
    if isinstance(drafter, ModelDrafter):
        drafter.clock = ticks(1e-6)
        for count in range(1, 50):
            engine.scheduler.cost.observe(count, count, 0, 1e-4)
            drafter.cost.observe(count, count, 0, 1e-6)


# ---- real models ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of one vocabulary, and what to draft with."""
    path = tmp_path_factory.mktemp("models")
    other = tiny.make_model("qwen2", seed=5, num_hidden_layers=1, max_position_embeddings=100)
    return {
        "model": tiny.save_gguf(tiny.make_model("llama"), path / "model.gguf"),
        "other": tiny.save_gguf(other, path / "other.gguf"),
    }


DRAFTS: dict[str, dict[str, Any]] = {
    "itself": {"model": "model"},
    "itself in 8 bits": {"model": "model", "quantization": "int8", "num_speculative_tokens": 7},
    "another one": {"model": "other", "kv_cache_dtype": "fp16"},
}


def speculation(models: dict[str, Path], draft: str | None) -> dict[str, Any] | None:
    if draft is None:
        return None
    return {"method": "draft_model", **DRAFTS[draft], "model": models[DRAFTS[draft]["model"]]}


@pytest.fixture(scope="module")
def engines(models: dict[str, Path]) -> Iterator[dict[str | None, Engine]]:
    """Engines of the same model with every kind of draft and none; all but that one are short of memory."""
    made = {}
    for draft in (None, *DRAFTS):
        sizes: dict[str, Any] = {"kv_cache_tokens": 2048, "enable_prefix_caching": False}
        if draft:
            sizes = {"kv_cache_tokens": 224, "max_num_batched_tokens": 24}
        options = ModelOptions(
            model=models["model"], threads=1, speculative_config=speculation(models, draft), max_num_seqs=8,
            max_model_len=128, **sizes,
        )  # fmt: skip
        made[draft] = load_model(options).engine
        make_cheap(made[draft])
    yield made
    for engine in made.values():
        engine.close()


def answers(
    engine: Engine, work: list[tuple[list[int], SamplingParams]], aborts: dict[int, int]
) -> dict[str, Any]:
    """What requests give that come one with each step; some are aborted at a step."""
    found: dict[str, Any] = {}
    at = 0
    while at < len(work) or engine.has_unfinished():
        if at < len(work):
            engine.add_request(str(at), *work[at])
        if at in aborts:
            engine.abort(str(aborts[at]))
        at += 1
        for output in engine.step():
            found[output.request_id] = [
                (item.token_ids, item.logprobs, item.finish_reason) for item in output.outputs
            ]
        engine.check()
    return found


work_strategy = st.lists(
    st.tuples(
        st.tuples(st.integers(0, 2), st.integers(1, 50)).map(lambda it: tiny.tokens(60, seed=it[0])[: it[1]]),
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 0.7, 1.5]),
            top_k=st.sampled_from([0, 20]),
            top_p=st.sampled_from([1.0, 0.9]),
            n=st.sampled_from([1, 1, 3]),
            max_tokens=st.integers(1, 40) | st.none(),
            min_tokens=st.sampled_from([0, 1]),
            repetition_penalty=st.sampled_from([1.0, 1.3]),
            frequency_penalty=st.sampled_from([0.0, 0.5]),
            stop_token_ids=st.sampled_from([None, list(range(100, 120))]),
            logit_bias=st.sampled_from([None, {7: 5.0}]),
            logprobs=st.sampled_from([0, 2]),
            prompt_logprobs=st.sampled_from([None, None, 1]),
            bad_words=st.sampled_from([None, None, ["a"]]),
            seed=st.integers(0, 9),
        ),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=12)
@given(work=work_strategy, aborts=st.dictionaries(st.integers(3, 12), st.integers(0, 4), max_size=1))
def test_no_bit_depends_on_the_draft_model(
    work: list[tuple[list[int], SamplingParams]], aborts: dict[int, int], engines: dict[str | None, Engine]
) -> None:
    expected = answers(engines[None], work, {})
    for draft in DRAFTS:
        found = answers(engines[draft], work, aborts)
        for name, outputs in expected.items():
            for one, other in zip(found[name], outputs, strict=True):
                if one[2] == "abort":
                    count = len(one[0])
                    assert (one[0], one[1]) == (other[0][:count], other[1][:count])
                else:
                    assert one == other


def test_a_model_that_drafts_for_itself_is_right(engines: dict[str | None, Engine]) -> None:
    """At any temperature, with penalties and several sequences: both draw the same numbers."""
    engine = engines["itself"]
    scheduler = engine.scheduler
    before = scheduler.num_draft_tokens, scheduler.num_accepted_tokens
    preempted = scheduler.num_preemptions
    steps = scheduler.cost.num_steps
    work = [
        (tiny.tokens(30 + i, seed=i), SamplingParams(temperature=0.4 * i, seed=i, max_tokens=60, n=1 + i % 2,
                                                     repetition_penalty=1.0 + 0.1 * i, ignore_eos=True))
        for i in range(5)
    ]  # fmt: skip
    answers(engine, work, {})
    drafted, accepted = (
        now - then
        for now, then in zip((scheduler.num_draft_tokens, scheduler.num_accepted_tokens), before, strict=True)
    )
    assert scheduler.num_preemptions > preempted
    assert accepted > 200
    assert accepted > 0.95 * drafted
    assert scheduler.cost.num_steps - steps < 250  # of 420 tokens, though they often wait for blocks


def test_quantized_it_is_mostly_right_and_another_one_is_not(engines: dict[str | None, Engine]) -> None:
    rates = {}
    for draft in DRAFTS:
        scheduler = engines[draft].scheduler
        before = scheduler.num_accepted_tokens
        answers(engines[draft], [(tiny.tokens(20, seed=i), GREEDY) for i in range(4)], {})
        rates[draft] = scheduler.num_accepted_tokens - before
    assert rates["itself"] > rates["itself in 8 bits"] > 5 * rates["another one"]


def test_memory_of_both_is_counted(models: dict[str, Path]) -> None:
    sizes = {}
    for draft in (None, "itself", "another one"):
        config = speculation(models, draft)
        for name, size in (("kv_cache_tokens", 200), ("kv_cache_memory_bytes", 1 << 20)):
            given: dict[str, Any] = {name: size}
            options = ModelOptions(model=models["model"], threads=1, speculative_config=config, **given)
            loaded = load_model(options)
            pool = loaded.engine.pool
            sizes[draft, name] = (
                loaded.kv_cache_bytes / pool.num_blocks,
                pool.num_blocks,
                loaded.weight_bytes,
            )
            loaded.engine.close()
    per_block = sizes[None, "kv_cache_tokens"][0]
    assert sizes["itself", "kv_cache_tokens"][0] == 2 * per_block
    assert sizes["itself", "kv_cache_tokens"][2] == 2 * sizes[None, "kv_cache_tokens"][2]
    for draft in (None, "itself", "another one"):
        each, blocks, _ = sizes[draft, "kv_cache_memory_bytes"]
        assert blocks == int((1 << 20) // each)
        assert sizes[draft, "kv_cache_tokens"][1] == 13


def test_sleep_and_close_include_it(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    prompt: Any = {"prompt_token_ids": tiny.tokens(40)}
    params = SamplingParams(temperature=0.5, seed=1, max_tokens=30, logprobs=1, ignore_eos=True)
    llm = LLM(
        models["model"], threads=1, kv_cache_tokens=512, speculative_config=speculation(models, "itself")
    )
    llm._thread.call(make_cheap).result()
    executors = llm._thread.call(lambda engine: (engine._executor, engine._draft_executor)).result()
    expected = llm.generate(prompt, params)[0].outputs[0]
    for level in (1, 2):
        llm.sleep(level)
        assert [executor._level for executor in executors] == [level, level]
        assert [executor.weight_bytes > 0 for executor in executors] == [level == 1] * 2
        llm.wake_up()
        before = llm._thread.call(lambda engine: engine.scheduler.num_accepted_tokens).result()
        assert llm.generate(prompt, params)[0].outputs[0] == expected
        assert llm._thread.call(lambda engine: engine.scheduler.num_accepted_tokens).result() > before + 10
    llm.sleep(2)
    with monkeypatch.context() as patch:  # the main model's weights cannot be read again at first
        wake, calls = executors[0].wake, []
        patch.setattr(executors[0], "wake", lambda: calls.append(1) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.wake_up()
        assert llm.is_sleeping
        patch.setattr(executors[0], "wake", wake)
        llm.wake_up()
    assert llm.generate(prompt, params)[0].outputs[0] == expected
    llm.close()
    assert [executor.weight_bytes for executor in executors] == [0, 0]


def test_the_asynchronous_one_has_it_too(models: dict[str, Path]) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)

    async def run(draft: str | None) -> list[int]:
        async with AsyncLLM(
            models["model"], threads=1, kv_cache_tokens=512, speculative_config=speculation(models, draft)
        ) as llm:
            async for output in llm.generate({"prompt_token_ids": tiny.tokens(9)}, params, "a"):
                last = output
            return list(last.outputs[0].token_ids)

    assert asyncio.run(run("itself")) == asyncio.run(run(None))


# ---- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries",
    [{"model": None}, {"model": 5}, {"num_speculative_tokens": 0}, {"num_speculative_tokens": 65},
     {"quantization": "int3"}, {"kv_cache_dtype": "fp8"}, {"max_model_len": 1}, {"prompt_lookup_min": 2},
     {"depth": 3}],
)  # fmt: skip
def test_a_bad_configuration_is_refused(entries: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="speculative_config"):
        LLM("nowhere", speculative_config={"method": "draft_model", "model": "nowhere", **entries})


def test_what_does_not_fit_the_draft_model_is_refused(models: dict[str, Path]) -> None:
    for entries, why in (
        ({"model": models["other"], "max_model_len": 101}, "at most the draft model's context of 100 tokens"),
        ({"model": "/nowhere/at.all"}, "speculative_config: model"),
    ):
        with pytest.raises(RequestError, match=why):
            LLM(models["model"], speculative_config={"method": "draft_model", **entries})


def respell(path: Path, change: Callable[[dict[str, int]], None]) -> Path:
    """Another vocabulary for the model in a directory."""
    ids = {token: i for i, token in enumerate(tiny.vocabulary())}
    change(ids)
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([token for token in tiny.SPECIAL_TOKENS if token in ids])
    made.save(str(path / "tokenizer.json"))
    return path


def swap(ids: dict[str, int]) -> None:
    ids["a"], ids["b"] = ids["b"], ids["a"]


def rename(ids: dict[str, int]) -> None:
    ids["<|other|>"] = ids.pop("<|pad|>")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (swap, r"token \d+: b'b' there, b'a' here"),
        (rename, r"token 2: b'<\|other\|>' there, b'<\|pad\|>' here"),
    ],
)
def test_another_vocabulary_is_refused(
    change: Callable[[dict[str, int]], None], why: str, models: dict[str, Path], tmp_path: Path
) -> None:
    main = tiny.save_hf(tiny.make_model("llama"), tmp_path)
    draft = tmp_path / "draft"
    respell(tiny.save_hf(tiny.make_model("llama"), draft), change)
    with pytest.raises(RequestError, match=why):
        LLM(main, kv_cache_tokens=64, speculative_config={"method": "draft_model", "model": draft})


def test_a_vocabulary_of_another_size_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    draft = tiny.save_gguf(tiny.make_model("llama", vocab_size=310), tmp_path / "draft.gguf")
    with pytest.raises(RequestError, match="vocab_size: 310 there, 300 here"):
        LLM(models["model"], speculative_config={"method": "draft_model", "model": draft})


def test_a_cache_of_another_size_is_refused() -> None:
    for size in ((9, 4), (8, 8)):
        with pytest.raises(RequestError, match="draft model"):
            make(draft=FakeExecutor(*size), num_blocks=8)


# ---- the drafter and the scheduler ----------------------------------------------------------------------


def make(draft: FakeExecutor | None = None, guesses: int = 4, known: bool = True, **more: Any) -> Scheduler:
    """A scheduler that guesses; `known`: that steps take the same time, whatever is in them."""
    options: dict[str, Any] = {"num_blocks": 256, "block_size": 4, "max_num_seqs": 8, **more}
    options = {"max_num_batched_tokens": 32, "max_model_len": 2000, "vocab_size": VOCAB, **options}
    draft = draft or SureExecutor(options["num_blocks"], options["block_size"])
    drafter = ModelDrafter(draft, guesses, max_model_len=2000, clock=ticks(1e-5))
    scheduler = Scheduler(drafter=drafter, **options)
    for count in range(1, 50 if known else 0):
        scheduler.cost.observe(count, count, 0, 1e-3)
        drafter.cost.observe(count, count, 0, 1e-5)
    return scheduler


def sequence(prompt: list[int], params: SamplingParams, **more: Any) -> Sequence:
    return Sequence("a", np.array(prompt, dtype=np.int32), params, eos_token_ids=[EOS], **more)


def run(
    scheduler: Scheduler,
    seconds: Callable[[int], float] = lambda tokens: 1e-3,
    executor: FakeExecutor | None = None,
) -> float:
    """Steps until all is done; the seconds that they took, those of the draft model included."""
    executor = executor or FakeExecutor(scheduler.pool.num_blocks, scheduler.pool.block_size)
    drafter = scheduler.drafter
    assert isinstance(drafter, ModelDrafter)
    total = 0.0
    while (batch := scheduler.schedule()) is not None:
        scheduler.check()
        total += seconds(batch.num_tokens) + drafter.seconds
        scheduler.observe(seconds(batch.num_tokens))
        scheduler.update(executor.run(batch))
        scheduler.check()
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    return total


def test_a_perfect_draft_saves_steps() -> None:
    scheduler = make()
    params = SamplingParams(temperature=1, max_tokens=50, ignore_eos=True, repetition_penalty=1.5, seed=3)
    item = sequence([2, 3, 4], params, seed=3)
    scheduler.add(item)
    steps = scheduler.cost.num_steps
    run(scheduler)
    assert item.output_token_ids == expected_tokens([2, 3, 4], params, 53, seed=3)[0]
    assert scheduler.num_accepted_tokens == scheduler.num_draft_tokens > 35
    assert scheduler.cost.num_steps - steps < 16


class TimedExecutor(SureExecutor):
    """Takes `step` seconds for a step and `token` for each token in it; `wrong`: what it is sure of is always
    wrong."""

    def __init__(self, *size: int, step: float, token: float, wrong: bool = False) -> None:
        super().__init__(*size)
        self.now = 0.0
        self.step, self.token = step, token
        self.wrong = wrong

    def run(self, batch: Any) -> Any:
        self.now += self.step + self.token * len(batch.token_ids)
        result = super().run(batch)
        result.tokens[:] = (result.tokens + self.wrong) % VOCAB
        return result


@pytest.mark.parametrize("step", [1e-5, 1e-4, 3e-4, 1e-3])
@pytest.mark.parametrize("prompt", [3, 100])
def test_a_useless_draft_model_costs_next_to_nothing(step: float, prompt: int) -> None:
    """Steps of a millisecond and one of 0.05 for each more token; the draft model's are up to as long."""
    draft = TimedExecutor(256, 4, step=step, token=0.05 * step, wrong=True)
    scheduler = make(draft, known=False, max_num_batched_tokens=128)
    drafter = scheduler.drafter
    assert isinstance(drafter, ModelDrafter)
    drafter.clock = lambda: draft.now
    for count in range(1, 50):
        scheduler.cost.observe(count, count, 0, 1e-3 * (0.95 + 0.05 * count))
        drafter.cost.observe(count, count, 0, step * (1 + 0.05 * count))
    took = plain = 0.0
    for seed in range(3):
        tokens = np.random.default_rng(seed).integers(2, VOCAB, prompt).tolist()
        scheduler.add(sequence(tokens, SamplingParams(temperature=0, max_tokens=256, ignore_eos=True)))
        took += run(scheduler, lambda tokens: 1e-3 * (0.95 + 0.05 * tokens))
        plain += 1e-3 * (256 + 0.05 * prompt)
    assert scheduler.num_accepted_tokens <= 2
    assert (0 if step < 1e-3 else -1) < drafter.num_judged < 60
    assert plain / took > 0.97


def test_a_useless_draft_model_is_tried_ever_more_rarely_and_a_good_one_again() -> None:
    draft = TimedExecutor(512, 4, step=1e-4, token=1e-6, wrong=True)
    scheduler = make(draft, num_blocks=512, known=False)
    drafter = scheduler.drafter
    assert isinstance(drafter, ModelDrafter)
    drafter.clock = lambda: draft.now
    item = sequence([2, 3], SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True))
    scheduler.add(item)
    executor = FakeExecutor(512, 4)
    tried: list[int] = []
    while (batch := scheduler.schedule()) is not None:
        scheduler.observe(1e-3)
        if drafter.seconds and (not tried or item.num_output - tried[-1] > 20):
            tried.append(item.num_output)
        if item.num_output > 700:
            draft.wrong = False
        scheduler.update(executor.run(batch))
    gaps = np.diff([place for place in tried if place < 700])
    assert (gaps[:3] > [60, 120, 240]).all()
    assert scheduler.num_accepted_tokens > 300  # of the last 900 tokens


def test_nothing_is_drafted_where_the_batch_makes_it_dear() -> None:
    """Four times as many tokens take four times as long: what is verified costs what it yields."""
    scheduler = make(known=False)
    for count in range(1, 200):
        scheduler.cost.observe(count % 30 + 1, count % 30 + 1, 0, 1e-3 * (count % 30 + 1))
    for i in range(8):
        scheduler.add(sequence([2 + i, 3], GREEDY))
    run(scheduler, lambda tokens: 1e-3 * tokens)
    assert scheduler.num_draft_tokens <= 8 * 4  # what it takes to find out


def test_what_guesses_cost_is_found_out_again() -> None:
    """Tokens cost what they yield at first; later a step takes the same time whatever is in it."""
    scheduler = make(known=False, num_blocks=600)
    for seconds in (lambda tokens: 1e-3 * tokens, lambda tokens: 1e-3):
        scheduler.add(sequence([2, 3], SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True)))
        run(scheduler, seconds)
        if seconds(2) > 1e-3:
            assert scheduler.num_accepted_tokens < 100
    assert scheduler.num_accepted_tokens > 300


def test_sequences_of_one_prompt_share_what_is_computed_of_it() -> None:
    draft = SureExecutor(256, 4)
    scheduler = make(draft, max_num_batched_tokens=64)
    params = SamplingParams(temperature=1, max_tokens=60, ignore_eos=True, n=4)
    items = [sequence([2, 3, 4, 5, 6] * 10, params, index=i, seed=1) for i in range(4)]
    scheduler.add(items[0], 0.0, items[1:])
    run(scheduler)
    assert scheduler.num_accepted_tokens > 100
    assert draft.num_tokens < 50 + 4 * (60 + 4)
    assert {tuple(item.output_token_ids) for item in items} == {
        tuple(expected_tokens([2, 3, 4, 5, 6] * 10, params, 110, index=i, seed=1)[0]) for i in range(4)
    }


def test_what_the_prefix_index_has_is_not_computed_again() -> None:
    draft = SureExecutor(256, 4)
    scheduler = make(draft, max_num_batched_tokens=64)
    root = prefix_root("a model")
    executor = FakeExecutor(256, 4)
    counts = []
    for time in range(3):
        before = draft.num_tokens
        scheduler.add(sequence([2, 3, 4, 5, 6] * 10, GREEDY, root=root))
        run(scheduler, executor=executor)
        counts.append(draft.num_tokens - before)
        if time == 1:
            scheduler.pool.reset_prefix_cache()
    assert counts[0] == counts[2] == counts[1] + 48
    assert scheduler.num_accepted_tokens == scheduler.num_draft_tokens


def test_a_target_leaves_little_of_a_step_to_catching_up() -> None:
    """A millisecond that decoding leaves: a hundred tokens of the draft model."""
    draft = TimedExecutor(256, 4, step=0.0, token=1e-5)
    scheduler = make(draft, known=False, max_num_batched_tokens=400, target_itl=2e-3)
    drafter = scheduler.drafter
    assert isinstance(drafter, ModelDrafter)
    drafter.clock = lambda: draft.now
    for count in range(1, 100):
        scheduler.cost.observe(count, count, 0, 1e-3)
        drafter.cost.observe(count, 1, 0, 1e-5 * count)
    scheduler.add(sequence([2, 3, 4] * 100, GREEDY))
    run(scheduler)
    assert 16 <= draft.max_tokens_seen <= 110
    assert scheduler.num_accepted_tokens > 20


def test_what_is_no_number_is_no_guess() -> None:
    draft = SureExecutor(256, 4, pick=lambda row: -1)
    scheduler = make(draft)
    item = sequence([2, 3], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
    scheduler.add(item)
    run(scheduler)
    assert item.finish_reason == "length"
    assert scheduler.num_draft_tokens == 0
    assert draft.num_steps < 40


def test_with_an_adapter_only_the_guesses_suffer(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    path.write_bytes(b"one")
    engine = make_engine(SureExecutor())
    adapter = engine.adapters.read(path)
    engine.add_adapter("one", adapter)
    engine.add_request("plain", [2, 3], GREEDY)
    engine.add_request("adapted", [2, 3], GREEDY, adapter="one")
    found = {}
    while engine.has_unfinished():
        for output in engine.step():
            found[output.request_id] = output.outputs[0].token_ids
        engine.check()
    assert found["plain"] == expected_tokens([2, 3], GREEDY, 42)[0]
    assert found["adapted"] == expected_tokens([2, 3], GREEDY, 42, adapter=adapter.digest)[0]
    assert engine.scheduler.num_accepted_tokens > 20


def test_a_profile_says_what_drafting_takes() -> None:
    draft = SureExecutor()
    engine = make_engine(draft)
    drafter = engine.scheduler.drafter
    assert isinstance(drafter, ModelDrafter)
    drafter.clock = engine._clock
    profile = engine.start_profile()
    engine.add_request("a", [2, 3], GREEDY)
    spent = 0.0
    while engine.has_unfinished():
        engine.step()
        spent += drafter.seconds
    engine.stop_profile()
    parts = {name: profile.decode.parts.get(name, 0.0) + profile.prefill.parts.get(name, 0.0)
             for name in ("drafting", "scheduling")}  # fmt: skip
    assert parts["drafting"] == pytest.approx(spent)
    assert parts["scheduling"] > 0
    assert spent > 5e-4
    assert "drafting" in str(profile)


# ---- failures -------------------------------------------------------------------------------------------


def make_engine(draft: FakeExecutor, **more: Any) -> Engine:
    config = EngineConfig(max_model_len=60, num_speculative_tokens=4, **more)
    engine = Engine(
        FakeExecutor(), FakeTokenizer(), config, draft_executor=draft, detokenizer_factory=FakeDetokenizer
    )
    make_cheap(engine)
    return engine


def test_its_failure_is_the_engines() -> None:
    draft = SureExecutor(fail_at=(3, MemoryError("no room")))
    engine = make_engine(draft)
    engine.add_request("a", [2, 3], GREEDY)
    engine.add_request("b", [2, 3, 4], GREEDY)
    engine.step()
    engine.step()
    with pytest.raises(EngineDeadError, match="no room") as caught:
        list(iter(engine.step, None))
    assert isinstance(caught.value.__cause__, MemoryError)
    assert engine.lost_request_ids == ("a", "b")
    assert engine.pool.num_free == engine.pool.num_blocks
    engine.close()
    assert draft.num_closed == 1


@pytest.mark.parametrize("at", [0, 1, 2, 5])
@pytest.mark.parametrize("drafting", [True, False])
def test_an_interrupt_loses_nothing(at: int, drafting: bool) -> None:
    draft = SureExecutor(fail_at=(at, KeyboardInterrupt()) if drafting else None)
    engine = make_engine(draft)
    if not drafting:
        engine._executor._fail_at = (at, KeyboardInterrupt())  # type: ignore[attr-defined]
    prompts = {"a": [2, 3], "b": [2, 3, 4]}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, GREEDY)
    found, interrupts = {}, 0
    while engine.has_unfinished():
        try:
            for output in engine.step():
                found[output.request_id] = output.outputs[0].token_ids
        except KeyboardInterrupt:
            interrupts += 1
        engine.check()
    assert interrupts == 1
    assert found == {name: expected_tokens(prompt, GREEDY, 60)[0][:40] for name, prompt in prompts.items()}
    assert engine.scheduler.num_accepted_tokens > 40


def test_an_engine_without_guesses_has_no_use_for_it() -> None:
    config = EngineConfig(max_model_len=60)
    with pytest.raises(RequestError, match="num_speculative_tokens"):
        Engine(FakeExecutor(), FakeTokenizer(), config, draft_executor=FakeExecutor())
