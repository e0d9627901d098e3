"""The prefix cache: what is shared, what is forgotten first, and that no token depends on it."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from fake_executor import (
    EOS,
    PIECES,
    FakeExecutor,
    FakeTokenizer,
    expected_tokens,
    steps_ahead,  # noqa: F401
)
from hypothesis import given
from hypothesis import strategies as st

from fastllm.engine.block_pool import BlockPool
from fastllm.engine.engine import Engine, EngineConfig
from fastllm.engine.scheduler import Scheduler
from fastllm.engine.sequence import Sequence, prefix_root
from fastllm.errors import RequestError
from fastllm.sampling_params import SamplingParams

VOCAB = len(PIECES)
ROOT = prefix_root("a model")
ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
PROMPT = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]  # two blocks and a half


def make(*, num_blocks: int = 64, seqs: int = 8, budget: int = 16, **more: Any) -> Scheduler:
    return Scheduler(
        num_blocks=num_blocks,
        block_size=4,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=200,
        vocab_size=VOCAB,
        **more,
    )


def sequence(
    name: str, prompt: list[int], params: SamplingParams = ONE, root: bytes | None = ROOT, **more: Any
) -> Sequence:
    return Sequence(name, np.array(prompt, dtype=np.int32), params, eos_token_ids=[EOS], root=root, **more)


def step(scheduler: Scheduler, executor: FakeExecutor) -> None:
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.check()
    scheduler.update(executor.run(batch))
    scheduler.check()


def run(scheduler: Scheduler, executor: FakeExecutor, *items: Sequence) -> int:
    """Adds and finishes them. Returns how many tokens were computed."""
    before = executor.num_tokens
    for item in items:
        scheduler.add(item)
    while scheduler.has_unfinished():
        step(scheduler, executor)
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    return executor.num_tokens - before


def parts(**more: Any) -> tuple[Scheduler, FakeExecutor]:
    scheduler = make(**more)
    return scheduler, FakeExecutor(scheduler.pool.num_blocks, scheduler.pool.block_size)


def known(scheduler: Scheduler, tokens: list[int]) -> int:
    """How many of the tokens the index has blocks of."""
    hashes, before = [], ROOT
    for start in range(0, len(tokens) - 3, 4):
        before = sha256(before + np.array(tokens[start : start + 4], "<i4").tobytes()).digest()
        hashes.append(before)
    return 4 * len(scheduler.pool.find_blocks(hashes))


# ---- what is found ---------------------------------------------------------------------------------------


def test_a_second_request_computes_only_what_the_first_did_not() -> None:
    scheduler, executor = parts()
    assert run(scheduler, executor, sequence("a", PROMPT)) == 10
    again = sequence("b", [*PROMPT, 2])
    assert run(scheduler, executor, again) == 3
    assert again.num_cached == 8
    assert again.output_token_ids == expected_tokens([*PROMPT, 2], ONE, 12)[0]
    assert (scheduler.num_prefix_queries, scheduler.num_prefix_hits) == (21, 8)


def test_a_known_prompt_still_computes_its_last_token() -> None:
    scheduler, executor = parts()
    run(scheduler, executor, sequence("a", PROMPT[:8]))
    again = sequence("b", PROMPT[:8])
    assert run(scheduler, executor, again) == 4  # the last block anew, since its last token is needed
    assert again.num_cached == 4
    assert again.output_token_ids == expected_tokens(PROMPT[:8], ONE, 9)[0]


def test_generated_tokens_are_found_as_well() -> None:
    scheduler, executor = parts()
    first = sequence("a", PROMPT, LONG)
    run(scheduler, executor, first)
    turn = sequence("b", [*first.token_ids, 2, 3], ONE)
    assert run(scheduler, executor, turn) == 32 - 28  # all 7 full blocks of 29 computed tokens


def test_running_requests_share() -> None:
    scheduler, executor = parts()
    first = sequence("a", PROMPT, LONG)
    scheduler.add(first)
    step(scheduler, executor)
    second = sequence("b", PROMPT, LONG)
    scheduler.add(second)
    step(scheduler, executor)
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.block_ids[2] != first.block_ids[2]
    assert [scheduler.pool.reference_count(block) for block in second.block_ids] == [2, 2, 1]
    scheduler.abort(first)
    scheduler.check()
    run(scheduler, executor)
    assert second.output_token_ids == expected_tokens(PROMPT, LONG, second.length_limit)[0]


@pytest.mark.parametrize("root", [None, prefix_root("another model"), prefix_root(ROOT, "salt")])
def test_nothing_is_shared_across_roots(root: bytes | None) -> None:
    scheduler, executor = parts()
    run(scheduler, executor, sequence("a", PROMPT))
    assert run(scheduler, executor, sequence("b", PROMPT, root=root)) == 10


def test_nothing_is_remembered_without_a_root() -> None:
    scheduler, executor = parts()
    run(scheduler, executor, sequence("a", PROMPT, root=None))
    assert scheduler.pool.num_cached == 0
    assert (scheduler.num_prefix_queries, scheduler.num_prefix_hits) == (0, 0)


def test_the_hash_is_a_chain_over_all_tokens_before() -> None:
    scheduler, executor = parts()
    scheduler.pool.events = []
    run(scheduler, executor, sequence("a", PROMPT))
    first = sha256(ROOT + np.array(PROMPT[:4], "<i4").tobytes()).digest()
    second = sha256(first + np.array(PROMPT[4:8], "<i4").tobytes()).digest()
    assert scheduler.pool.events == [(first, ROOT, PROMPT[:4]), (second, first, PROMPT[4:8])]
    assert (
        run(scheduler, executor, sequence("b", [12, *PROMPT[1:]])) == 10
    )  # the same second block, elsewhere


def test_the_root_keeps_its_parts_apart() -> None:
    assert len({prefix_root("ab", "c"), prefix_root("a", "bc"), prefix_root("abc"), prefix_root()}) == 4
    assert prefix_root("a", 5) == prefix_root(b"a", "5")


def test_prompt_logprobs_are_computed_even_where_the_prompt_is_known() -> None:
    scheduler, executor = parts()
    run(scheduler, executor, sequence("a", PROMPT))
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    assert run(scheduler, executor, sequence("b", PROMPT, params)) == 10


# ---- what is forgotten -----------------------------------------------------------------------------------


def test_the_longest_unused_is_forgotten_first_and_of_that_its_end() -> None:
    scheduler, executor = parts(num_blocks=6)
    run(scheduler, executor, sequence("a", PROMPT[:9]))
    run(scheduler, executor, sequence("b", PROMPT[::-1][:9]))
    assert scheduler.pool.num_cached == 4
    run(scheduler, executor, sequence("c", [12] * 9))  # takes the two blocks without content, and one more
    assert known(scheduler, PROMPT[:9]) == 4
    assert known(scheduler, PROMPT[::-1][:9]) == 8
    assert known(scheduler, [12] * 9) == 8


def test_what_is_found_counts_as_used() -> None:
    scheduler, executor = parts(num_blocks=6)
    run(scheduler, executor, sequence("a", PROMPT[:9]))
    run(scheduler, executor, sequence("b", PROMPT[::-1][:9]))
    run(scheduler, executor, sequence("a again", PROMPT[:9]))
    run(scheduler, executor, sequence("c", [12] * 9))
    assert known(scheduler, PROMPT[:9]) == 8
    assert known(scheduler, PROMPT[::-1][:9]) == 4


def test_reset_forgets_all_and_disturbs_nobody() -> None:
    scheduler, executor = parts()
    scheduler.pool.events = []
    run(scheduler, executor, sequence("a", PROMPT))
    running = sequence("b", PROMPT, LONG)
    scheduler.add(running)
    step(scheduler, executor)
    assert running.num_cached == 8
    scheduler.pool.reset_prefix_cache()
    scheduler.check()
    assert scheduler.pool.num_cached == 0
    assert [event for event in scheduler.pool.events if not isinstance(event, tuple)] == [None]
    run(scheduler, executor)
    assert running.output_token_ids == expected_tokens(PROMPT, LONG, running.length_limit)[0]
    assert run(scheduler, executor, sequence("c", PROMPT)) == 10


def test_a_preempted_sequence_computes_only_what_was_taken_from_it() -> None:
    scheduler, executor = parts(num_blocks=10, budget=64)
    first, second = sequence("a", [2] * 14, LONG), sequence("b", [3] * 14, LONG)
    scheduler.add(first)
    scheduler.add(second)
    while not scheduler.preempted:
        step(scheduler, executor)
    before = executor.num_tokens
    known = second.num_tokens
    run(scheduler, executor)
    again = executor.num_tokens - before - (first.num_tokens - first.num_prompt) - (second.num_tokens - known)
    assert second.num_preemptions == 1
    assert again < known / 2, "it was computed anew from the start"
    assert scheduler.num_prefix_hits == 0  # what it found again is no hit
    for item in (first, second):
        alone = expected_tokens(item.token_ids[:14], LONG, item.length_limit)[0]
        assert item.output_token_ids == alone


# ---- several sequences of one prompt ---------------------------------------------------------------------


def family(
    n: int, params: SamplingParams, prompt: list[int] = PROMPT, root: bytes | None = ROOT
) -> list[Sequence]:
    return [sequence("a", prompt, params, root, index=i, seed=5, report_prompt=i == 0) for i in range(n)]


@pytest.mark.parametrize("root", [ROOT, None])
@pytest.mark.parametrize("size", [8, 10])
def test_the_prompt_of_several_sequences_is_computed_once(size: int, root: bytes | None) -> None:
    scheduler, executor = parts()
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    leader, *followers = items = family(4, params, PROMPT[:size], root)
    scheduler.add(leader, 0.0, followers)
    assert (scheduler.num_waiting, [item.state for item in followers]) == (4, ["following"] * 3)
    step(scheduler, executor)
    assert [item.num_output for item in items] == [1] * 4
    assert [item.state for item in items] == ["running"] * 4
    assert all(item.block_ids == leader.block_ids for item in followers)
    step(scheduler, executor)
    assert executor.num_copies == (3 if size == 10 else 0)  # the last one to write needs no copy
    assert all(item.block_ids[:2] == leader.block_ids[:2] for item in followers)
    run(scheduler, executor)
    assert executor.num_tokens == size + 4 * 5
    for i, item in enumerate(items):
        alone = expected_tokens(PROMPT[:size], params, item.length_limit, index=i, seed=5)[0]
        assert item.output_token_ids == alone
    assert len({tuple(item.output_token_ids) for item in items}) > 1


def test_a_copy_that_was_rolled_back_is_made_again() -> None:
    scheduler, executor = parts()
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    leader, *followers = family(3, params)
    scheduler.add(leader, 0.0, followers)
    step(scheduler, executor)
    tables = [item.block_ids for item in (leader, *followers)]
    for computed in (False, True):
        batch = scheduler.schedule()
        assert batch is not None
        assert len(batch.copy_blocks) == 2
        if computed:
            executor.run(batch)
        scheduler.rollback()
        scheduler.check()
        assert [item.block_ids for item in (leader, *followers)] == tables
    run(scheduler, executor)
    for i, item in enumerate((leader, *followers)):
        assert item.output_token_ids == expected_tokens(PROMPT, params, 16, index=i, seed=5)[0]


@pytest.mark.parametrize("root", [ROOT, None])
def test_followers_without_a_seat_wait_for_one(root: bytes | None) -> None:
    scheduler, executor = parts(seqs=2)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    leader, *followers = items = family(5, params, root=root)
    scheduler.add(leader, 0.0, followers)
    step(scheduler, executor)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 3)
    run(scheduler, executor)
    for i, item in enumerate(items):
        assert item.output_token_ids == expected_tokens(PROMPT, params, 16, index=i, seed=5)[0]


@pytest.mark.parametrize("when", ["waiting", "mid-prefill", "in flight"])
def test_the_first_follower_succeeds_a_leader_that_goes(when: str) -> None:
    scheduler, executor = parts(budget=4)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    leader, heir, last = family(3, params)
    scheduler.add(leader, 0.0, [heir, last])
    if when != "waiting":
        step(scheduler, executor)
    if when == "in flight":
        batch = scheduler.schedule()
        assert batch is not None
    scheduler.abort(leader)
    scheduler.check()
    assert (heir.state, last.state, heir.followers) == ("waiting", "following", [last])
    if when == "in flight":
        assert scheduler.update(executor.run(batch)) == []
    run(scheduler, executor)
    for i, item in ((1, heir), (2, last)):
        assert item.output_token_ids == expected_tokens(PROMPT, params, 16, index=i, seed=5)[0]


def test_followers_are_of_the_same_prompt_and_priority() -> None:
    scheduler, _ = parts()
    for other in (sequence("a", PROMPT[:5]), sequence("a", PROMPT, priority=1)):
        with pytest.raises(RequestError, match="followers"):
            scheduler.add(sequence("a", PROMPT), 0.0, [other])
    assert not scheduler.has_unfinished()


# ---- the pool --------------------------------------------------------------------------------------------


def test_a_content_is_remembered_once() -> None:
    pool = BlockPool(4, 4)
    table = pool.allocate(3)
    pool.remember_blocks(table, [b"x", b"x", b"y"])
    pool.check([table])
    assert pool.find_blocks([b"x", b"y", b"z", b"x"]) == [0, 2]
    shared = pool.take_blocks([b"x", b"y"])
    pool.free(table)
    pool.check([shared])
    assert pool.num_free == 2
    pool.free(shared)
    assert (pool.num_free, pool.num_cached) == (4, 2)
    assert pool.allocate(4) == [1, 3, 2, 0]  # without content first, then y, which was given up first
    assert pool.num_cached == 0


@pytest.mark.parametrize(("blocks", "hashes"), [([3], [b"x"]), ([0], []), ([-1], [b"x"]), ([9], [b"x"])])
def test_what_cannot_be_remembered_changes_nothing(blocks: list[int], hashes: list[bytes]) -> None:
    pool = BlockPool(4, 4)
    held = pool.allocate(2)
    with pytest.raises(RequestError):
        pool.remember_blocks(blocks, hashes)
    assert pool.num_cached == 0
    pool.check([held])


# ---- the engine ------------------------------------------------------------------------------------------


def engine(**more: Any) -> Engine:
    config = EngineConfig(max_model_len=100, **more)
    return Engine(FakeExecutor(32), FakeTokenizer(), config, detokenizer_factory=None)


def answer(of: Engine, name: str, prompt: list[int], salt: str | None = None, **params: Any) -> Any:
    settings = {"temperature": 0, "max_tokens": 2, "ignore_eos": True, "detokenize": False, **params}
    of.add_request(name, prompt, SamplingParams(**settings), cache_salt=salt)
    while of.has_unfinished():
        (output,) = of.step()
        of.check()
    return output


def test_the_output_says_what_was_cached() -> None:
    it = engine()
    assert answer(it, "a", PROMPT).num_cached_tokens == 0
    output = answer(it, "b", PROMPT)
    assert output.num_cached_tokens == output.metrics.num_cached_tokens == 8
    assert answer(it, "c", PROMPT, "salt").num_cached_tokens == 0
    assert answer(it, "d", PROMPT, "salt").num_cached_tokens == 8
    assert answer(it, "e", PROMPT, "other").num_cached_tokens == 0
    it.reset_prefix_cache()
    assert answer(it, "f", PROMPT).num_cached_tokens == 0


def test_prefix_caching_can_be_off() -> None:
    it = engine(enable_prefix_caching=False)
    answer(it, "a", PROMPT)
    assert answer(it, "b", PROMPT).num_cached_tokens == 0
    assert it.pool.num_cached == 0


@given(
    st.lists(
        st.tuples(st.integers(0, 10), st.lists(st.integers(0, VOCAB - 1), max_size=6), st.integers(1, 3)),
        min_size=2,
        max_size=8,
    ),
    st.integers(4, 12),
)
def test_no_answer_depends_on_the_cache(work: list[tuple[int, list[int], int]], blocks: int) -> None:
    answers = []
    for cached in (True, False):
        config = EngineConfig(max_model_len=60, max_num_batched_tokens=7, enable_prefix_caching=cached)
        it = Engine(FakeExecutor(blocks), FakeTokenizer(), config)
        found: dict[str, list[list[int]]] = {}

        def step(of: Engine = it, outputs: dict[str, list[list[int]]] = found) -> None:
            for output in of.step():
                outputs[output.request_id] = [item.token_ids for item in output.outputs]
            of.check()

        for i, (shared, own, n) in enumerate(work):
            prompt = [*PROMPT[:shared], *own, 2][: 4 * blocks]
            params = SamplingParams(seed=i, n=n, max_tokens=8, detokenize=False)
            it.add_request(str(i), prompt, params)
            if i % 2:
                step()
        while it.has_unfinished():
            step()
        answers.append(found)
    assert answers[0] == answers[1]
