"""Guessing at tokens: what is guessed, when it is worth it, and that no token depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from fake_executor import EOS, PIECES, FakeDetokenizer, FakeExecutor, FakeTokenizer, expected_tokens
from hypothesis import given
from hypothesis import strategies as st

from fastllm import LLM, RequestError, SamplingParams
from fastllm.engine.drafter import NgramDrafter
from fastllm.engine.engine import Engine, EngineConfig
from fastllm.engine.scheduler import Scheduler
from fastllm.engine.sequence import Sequence

VOCAB = len(PIECES)


def make(guesses: int = 4, **more: Any) -> Scheduler:
    options: dict[str, Any] = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 8, **more}
    options = {"max_num_batched_tokens": 32, "max_model_len": 200, "vocab_size": VOCAB, **options}
    return Scheduler(drafter=NgramDrafter(guesses, 2) if guesses else None, **options)


def sequence(prompt: list[int], params: SamplingParams) -> Sequence:
    return Sequence("a", np.array(prompt, dtype=np.int32), params, eos_token_ids=[EOS])


def scripted(scheduler: Scheduler, text: list[int]) -> FakeExecutor:
    """Says `text`, whatever is asked."""
    pool = scheduler.pool
    return FakeExecutor(pool.num_blocks, pool.block_size, pick=lambda row: text[row.position + 1])


def run(scheduler: Scheduler, executor: FakeExecutor) -> list[int]:
    """Steps until all is done, each of a millisecond; how many tokens each of them yielded."""
    made = []
    while (batch := scheduler.schedule()) is not None:
        scheduler.check()
        scheduler.observe(1e-3)
        made.append(sum(item.num_new for item in scheduler.update(executor.run(batch))))
        scheduler.check()
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    return made


PHRASE = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


def test_text_that_repeats_takes_fewer_steps() -> None:
    scheduler = make(guesses=8)
    text = PHRASE * 5
    item = sequence([*PHRASE, 2, 3], GREEDY)
    scheduler.add(item)
    made = run(scheduler, scripted(scheduler, PHRASE * 8))
    assert item.output_token_ids == (PHRASE * 8)[12:52]
    assert len(made) < 15
    assert max(made) > 6
    assert scheduler.num_accepted_tokens == 40 - len(made)
    assert text[12:] == item.output_token_ids[: len(text) - 12]


def test_one_token_over_and_over_is_guessed_from_the_guess_itself() -> None:
    scheduler = make(guesses=8)
    scheduler.add(sequence([5, 5, 5], GREEDY))
    assert max(run(scheduler, scripted(scheduler, [5] * 99))) == 9


def test_text_that_does_not_repeat_costs_nothing() -> None:
    scheduler = make()
    text = np.random.default_rng(0).permutation(np.arange(VOCAB).repeat(4)).tolist()
    scheduler.add(sequence(text[:4], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)))
    run(scheduler, scripted(scheduler, text))
    assert scheduler.num_draft_tokens <= 6


def test_wrong_guesses_come_to_an_end() -> None:
    """The same pair over and over, each time followed by something else."""
    scheduler = make(guesses=8)
    others = np.random.default_rng(1).integers(4, VOCAB, 40).tolist()
    text = [token for other in others for token in (2, 3, other)]
    scheduler.add(sequence(text[:6], SamplingParams(temperature=0, max_tokens=90, ignore_eos=True)))
    executor = scripted(scheduler, text)
    seconds = 0.0
    while (batch := scheduler.schedule()) is not None:
        took = 1e-3 * (0.8 + 0.2 * batch.num_tokens)
        seconds += took
        scheduler.observe(took)
        scheduler.update(executor.run(batch))
    assert scheduler.num_draft_tokens > scheduler.num_accepted_tokens > 0
    assert seconds < 1.03 * 90e-3


def test_nothing_is_guessed_where_a_token_costs_what_it_yields() -> None:
    scheduler = make(guesses=8)
    scheduler.add(sequence([*PHRASE, 2, 3], GREEDY))
    executor = scripted(scheduler, PHRASE * 8)
    for tokens in (1, 2, 3, 4):
        for _ in range(20):
            scheduler.cost.observe(tokens, tokens, 0, tokens * 1e-3)
    while (batch := scheduler.schedule()) is not None:
        scheduler.observe(batch.num_tokens * 1e-3)
        scheduler.update(executor.run(batch))
    assert scheduler.num_draft_tokens == 0


def test_a_draft_takes_no_block_that_somebody_needs() -> None:
    scheduler = make(guesses=8, num_blocks=6)
    first = sequence(PHRASE, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    second = sequence([5] * 6, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    scheduler.add(first)
    scheduler.add(second)
    executor = FakeExecutor(6, 4, pick=lambda row: 5)
    run(scheduler, executor)
    assert (first.num_preemptions, second.num_preemptions) == (0, 0)


def test_guesses_end_at_the_length_limit_and_at_a_stop() -> None:
    for params, count in (
        (SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), 5),
        (SamplingParams(temperature=0, max_tokens=50, stop_token_ids=[9], ignore_eos=True), 6),
    ):
        scheduler = make(guesses=8)
        item = sequence([*PHRASE, 2, 3], params)
        scheduler.add(item)
        run(scheduler, scripted(scheduler, PHRASE * 8))
        assert item.output_token_ids == (PHRASE * 2)[12 : 12 + count]


def test_the_budget_is_not_exceeded_and_nobody_starves() -> None:
    scheduler = make(guesses=8, max_num_batched_tokens=5)
    items = [sequence([5, 5, 5], GREEDY) for _ in range(4)]
    for item in items:
        scheduler.add(item)
    executor = scripted(scheduler, [5] * 99)
    run(scheduler, executor)
    assert executor.max_tokens_seen <= 5
    assert [item.num_output for item in items] == [40] * 4


@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from([2, 3, 3, 4]), min_size=1, max_size=12),
            st.builds(
                SamplingParams,
                temperature=st.sampled_from([0.0, 1.0]),
                max_tokens=st.integers(1, 25),
                n=st.sampled_from([1, 3]),
                min_tokens=st.sampled_from([0, 1]),
                stop=st.sampled_from([None, "ab", "aa"]),
                stop_token_ids=st.sampled_from([None, [4]]),
                logprobs=st.sampled_from([None, 2]),
                frequency_penalty=st.sampled_from([0.0, 0.5]),
                seed=st.integers(0, 5),
            ),
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(2, 20),
    st.integers(6, 30),
)
def test_no_answer_depends_on_guesses(
    work: list[tuple[list[int], SamplingParams]], budget: int, blocks: int
) -> None:
    """The fake model here likes to repeat itself: what it says depends on the newest two tokens alone."""
    answers = []
    for guesses in (0, 6):
        config = EngineConfig(
            max_model_len=60,
            max_num_batched_tokens=budget,
            num_speculative_tokens=guesses,
            prompt_lookup_min=1,
        )
        executor = FakeExecutor(blocks, pick=lambda row: 2 + (row.context >> 3) % 2 + row.position % 3)
        engine = Engine(executor, FakeTokenizer(), config, detokenizer_factory=FakeDetokenizer, clock=ticks())
        for i, (prompt, params) in enumerate(work):
            engine.add_request(str(i), prompt, params)
        found = {}
        while engine.has_unfinished():
            for output in engine.step():
                found[output.request_id] = [
                    (item.token_ids, item.text, item.finish_reason, item.stop_reason, item.logprobs)
                    for item in output.outputs
                ]
            engine.check()
        answers.append(found)
    assert answers[0] == answers[1]


def ticks() -> Any:
    """A clock by which every step takes the same time, so that guesses are worth it."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1e-4
        return now

    return clock


def test_the_fake_model_is_asked_the_same() -> None:
    """With guesses a row sees what it would see without, penalties' history included."""
    params = SamplingParams(temperature=1, max_tokens=30, ignore_eos=True, repetition_penalty=1.5, seed=3)
    scheduler = make(guesses=6)
    item = Sequence("a", np.array([2, 3] * 5, dtype=np.int32), params, eos_token_ids=[EOS], seed=3)
    scheduler.add(item)
    run(scheduler, FakeExecutor(64, 4))
    assert item.output_token_ids == expected_tokens([2, 3] * 5, params, 40, seed=3)[0]


def test_a_real_model_says_the_same(tmp_path: Path) -> None:
    model = tiny.write("gguf", tmp_path)
    prompts: list[Any] = [{"prompt_token_ids": tiny.tokens(8, seed=seed) * 3} for seed in range(4)]
    params = [
        SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=1),
        SamplingParams(temperature=0.2, seed=1, max_tokens=60, ignore_eos=True, logprobs=1),
        SamplingParams(temperature=0.7, seed=2, n=2, max_tokens=60, ignore_eos=True, logprobs=1),
        SamplingParams(temperature=0, repetition_penalty=1.1, max_tokens=60, ignore_eos=True, logprobs=1),
    ]
    answers, counts = [], []
    for config in (None, {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 1}):
        with LLM(model, threads=2, speculative_config=config) as llm:
            llm._thread.call(lambda engine: setattr(engine, "_clock", ticks())).result()
            outputs = [llm.generate(prompt, given)[0] for prompt, given in zip(prompts, params, strict=True)]
            answers.append([list(output.outputs) for output in outputs])
            counts.append(llm._thread.call(lambda engine: engine.scheduler.num_accepted_tokens).result())
    assert answers[0] == answers[1]
    assert counts[0] == 0
    assert counts[1] > 0


@pytest.mark.parametrize(
    "config",
    [{}, {"method": "magic"}, {"method": "ngram", "depth": 3}, {"method": "ngram", "prompt_lookup_min": 0},
     {"method": "ngram", "num_speculative_tokens": 65}, "ngram", 5],
)  # fmt: skip
def test_a_bad_configuration_is_refused(config: Any) -> None:
    with pytest.raises(RequestError, match="speculative_config"):
        LLM("nowhere", speculative_config=config)


@pytest.mark.parametrize("restriction", [{"allowed_token_ids": [2, 3]}, {"bad_words": ["c"]}])
def test_nothing_is_guessed_where_what_is_allowed_depends_on_the_guess(restriction: dict[str, Any]) -> None:
    config = EngineConfig(max_model_len=60, num_speculative_tokens=6, prompt_lookup_min=1)
    engine = Engine(
        FakeExecutor(), FakeTokenizer(), config, detokenizer_factory=FakeDetokenizer, clock=ticks()
    )
    params = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0, **restriction)
    engine.add_request("a", [2, 3] * 4, params)
    while engine.has_unfinished():
        engine.step()
        engine.check()
    assert engine.scheduler.num_draft_tokens == 0


def test_guesses_rest_where_steps_with_them_lose() -> None:
    """Four tokens cost as much as one, a fifth as much as all four: no even cost foretells that."""
    others = np.random.default_rng(4).integers(4, 7, 100).tolist()
    text = [token for other in others for token in (2, 3, other)]
    scheduler = make(guesses=4, num_blocks=512, max_model_len=400)
    for _ in range(4):
        scheduler.add(sequence(text[:9], SamplingParams(temperature=0, max_tokens=280, ignore_eos=True)))
    drafter = scheduler.drafter
    assert isinstance(drafter, NgramDrafter)
    executor = scripted(scheduler, text)
    seconds, longest = 0.0, 0
    while (batch := scheduler.schedule()) is not None:
        took = 1e-3 if batch.num_tokens <= 4 or batch.num_prefill_tokens else 2e-3
        scheduler.observe(took)
        scheduler.update(executor.run(batch))
        seconds += took
        longest = max(longest, drafter.pause)
    assert scheduler.num_accepted_tokens > 0
    assert longest >= 64
    assert seconds < 1.04 * 281e-3
