"""The scheduler: every edge of its states, every bound, and machines that search for a lost token."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from fake_executor import (
    EOS,
    PIECES,
    FakeExecutor,
    MemoryFile,
    SureExecutor,
    expected_states,
    expected_tokens,
    expected_values,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastllm.engine.drafter import Drafter, NgramDrafter
from fastllm.engine.model_drafter import ModelDrafter
from fastllm.engine.offload import Offload
from fastllm.engine.scheduler import Scheduler
from fastllm.engine.sequence import Sequence, pack_token_ids, prefix_root
from fastllm.engine.step_batch import StepBatch
from fastllm.errors import CapacityError, RequestError
from fastllm.executor.base import ROW_SAMPLE, StepResult
from fastllm.pooling_params import PoolingParams
from fastllm.sampling_params import SamplingParams

VOCAB = len(PIECES)


def make(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    seqs: int = 8,
    budget: int = 16,
    length: int = 200,
    **more: Any,
) -> Scheduler:
    return Scheduler(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=length,
        vocab_size=VOCAB,
        **more,
    )


ROOT = prefix_root("a model")


def sequence(name: str, prompt: list[int], params: SamplingParams, **more: Any) -> Sequence:
    return Sequence(name, np.array(prompt, dtype=np.int32), params, eos_token_ids=[EOS], **more)


def executor_of(scheduler: Scheduler, **more: Any) -> FakeExecutor:
    return FakeExecutor(scheduler.pool.num_blocks, scheduler.pool.block_size, **more)


def step(scheduler: Scheduler, executor: FakeExecutor) -> list[Sequence]:
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.check()
    moved = scheduler.update(executor.run(batch))
    scheduler.check()
    return moved


def drain(scheduler: Scheduler, executor: FakeExecutor, limit: int = 5000) -> None:
    for _ in range(limit):
        if not scheduler.has_unfinished():
            break
        step(scheduler, executor)
    assert not scheduler.has_unfinished(), "the scheduler makes no progress"
    assert scheduler.schedule() is None
    assert scheduler.pool.num_free == scheduler.pool.num_blocks


LONG = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


# ---- admission ------------------------------------------------------------------------------------------


def test_a_prompt_as_long_as_the_model_is_refused_with_the_arithmetic() -> None:
    scheduler = make(length=10)
    with pytest.raises(CapacityError) as caught:
        scheduler.add(sequence("a", [2] * 10, LONG))
    assert (caught.value.asked, caught.value.had, caught.value.would_fit) == (10, 9, 9)
    assert not scheduler.has_unfinished()
    scheduler.check()


def test_a_prompt_one_token_shorter_than_the_model_yields_one_token() -> None:
    scheduler = make(length=10)
    item = sequence("a", [2] * 9, LONG)
    scheduler.add(item)
    drain(scheduler, executor_of(scheduler))
    assert (item.num_output, item.finish_reason) == (1, "length")


def test_a_prompt_longer_than_the_pool_is_refused_with_the_arithmetic() -> None:
    scheduler = make(num_blocks=3)
    with pytest.raises(CapacityError) as caught:
        scheduler.add(sequence("a", [2] * 13, LONG))
    assert (caught.value.asked, caught.value.had, caught.value.would_fit) == (13, 12, 12)
    scheduler.check()


def test_a_prompt_that_fills_the_pool_exactly_yields_the_one_token_that_needs_no_slot() -> None:
    scheduler = make(num_blocks=3)
    item = sequence("a", [2] * 12, LONG)
    scheduler.add(item)
    assert item.length_limit == 13
    drain(scheduler, executor_of(scheduler))
    assert (item.num_output, item.finish_reason) == (1, "length")


@given(
    prompt=st.integers(1, 12), blocks=st.integers(1, 4), length=st.integers(2, 20), most=st.integers(1, 20)
)
def test_a_lone_sequence_ends_at_the_bound_known_at_admission(
    prompt: int, blocks: int, length: int, most: int
) -> None:
    scheduler = make(num_blocks=blocks, length=length, budget=3)
    item = sequence("a", [2] * prompt, SamplingParams(max_tokens=most, ignore_eos=True))
    fits = prompt < length and prompt <= 4 * blocks
    if not fits:
        with pytest.raises(CapacityError):
            scheduler.add(item)
        return
    scheduler.add(item)
    drain(scheduler, executor_of(scheduler))
    assert item.num_tokens == min(prompt + most, length, 4 * blocks + 1)
    assert item.num_preemptions == 0


def test_max_tokens_none_goes_to_the_model_length() -> None:
    scheduler = make(length=30)
    item = sequence("a", [2, 3], SamplingParams(max_tokens=None, ignore_eos=True))
    scheduler.add(item)
    drain(scheduler, executor_of(scheduler))
    assert (item.num_tokens, item.finish_reason) == (30, "length")


def test_a_sequence_is_added_once() -> None:
    scheduler = make()
    item = sequence("a", [2], LONG)
    scheduler.add(item)
    with pytest.raises(RequestError):
        scheduler.add(item)
    scheduler.check()


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "vocab_size"])
def test_limits_out_of_range_are_refused(name: str) -> None:
    good = {"num_blocks": 4, "block_size": 4, "max_num_seqs": 1, "max_num_batched_tokens": 1}
    good |= {"max_model_len": 9, "vocab_size": 2}
    for value in (0, -1, 2**31):
        with pytest.raises(RequestError, match=name):
            Scheduler(**{**good, name: value})


# ---- order, budget, preemption --------------------------------------------------------------------------


def test_decodes_and_prompt_chunks_share_one_budget() -> None:
    scheduler = make(budget=6)
    executor = executor_of(scheduler)
    first = sequence("first", [2] * 3, LONG)
    second = sequence("second", [3] * 12, LONG)
    scheduler.add(first)
    scheduler.add(second)
    batch = scheduler.schedule()
    assert batch is not None
    assert (first.num_scheduled, second.num_scheduled) == (3, 3)
    assert batch.num_prefill_tokens == 6
    assert scheduler.update(executor.run(batch)) == [first]
    batch = scheduler.schedule()
    assert batch is not None
    assert (first.num_scheduled, second.num_scheduled) == (1, 5)
    assert (batch.num_tokens, batch.num_prefill_tokens) == (6, 5)
    scheduler.update(executor.run(batch))
    drain(scheduler, executor)


def test_admission_is_strictly_first_come() -> None:
    scheduler = make(num_blocks=6, seqs=3)
    executor = executor_of(scheduler)
    names = []
    for name, size in (("a", 8), ("b", 16), ("c", 1)):  # c would fit beside a, but b is before it
        scheduler.add(sequence(name, [2] * size, LONG))
    while scheduler.has_unfinished():
        batch = scheduler.schedule()
        assert batch is not None
        names += [item.request_id for item in scheduler.admitted if item.num_preemptions == 0]
        scheduler.update(executor.run(batch))
    assert names == ["a", "b", "c"]


def test_the_latest_arrival_is_preempted_and_keeps_its_tokens() -> None:
    scheduler = make(num_blocks=6, budget=32)
    executor = executor_of(scheduler)
    items = [sequence(name, [2 + i] * 6, LONG) for i, name in enumerate("ab")]
    for item in items:
        scheduler.add(item)
    while not scheduler.preempted:
        step(scheduler, executor)
    assert [item.request_id for item in scheduler.preempted] == ["b"]
    assert items[1].state == "preempted"
    assert items[1].num_output > 0
    before = items[1].token_ids
    assert items[1].block_ids == []
    drain(scheduler, executor)
    assert items[1].token_ids[: len(before)] == before
    assert items[1].num_preemptions >= 1
    assert items[0].num_preemptions == 0
    for item in items:
        assert item.output_token_ids == expected_tokens(item.token_ids[:6], LONG, item.length_limit)[0]


def test_one_token_over_a_limit_never_deadlocks() -> None:
    for blocks in range(2, 7):
        for budget in range(1, 5):
            for seqs in (1, 2, 5):
                scheduler = make(num_blocks=blocks, block_size=2, seqs=seqs, budget=budget)
                for prompt in (1, 2, 3, 2 * blocks - 1, 2 * blocks):
                    scheduler.add(sequence(f"{prompt}", [3] * prompt, LONG))
                drain(scheduler, executor_of(scheduler))


def test_a_step_is_at_most_the_budget_and_runs_at_most_max_num_seqs() -> None:
    scheduler = make(budget=5, seqs=3)
    executor = executor_of(scheduler)
    for i in range(7):
        scheduler.add(sequence(str(i), [2] * (i + 1), LONG))
    most = 0
    while scheduler.has_unfinished():
        step(scheduler, executor)
        most = max(most, scheduler.num_running)
    assert executor.max_tokens_seen == 5
    assert most == 3


# ---- priorities ------------------------------------------------------------------------------------------


def admitted_in(scheduler: Scheduler, executor: FakeExecutor) -> list[str]:
    """The names in the order of their first admission, until all are done."""
    names = []
    while scheduler.has_unfinished():
        batch = scheduler.schedule()
        assert batch is not None
        scheduler.check()
        names += [item.request_id for item in scheduler.admitted if item.num_preemptions == 0]
        scheduler.update(executor.run(batch))
    return names


def test_what_is_more_important_is_served_first() -> None:
    scheduler = make(seqs=1)
    for name, priority in (("low", 5), ("first", 0), ("second", 0), ("high", -1)):
        scheduler.add(sequence(name, [2], LONG, priority=priority))
    assert admitted_in(scheduler, executor_of(scheduler)) == ["high", "first", "second", "low"]


@pytest.mark.parametrize("short_of", ["seats", "blocks"])
def test_what_is_more_important_takes_the_place_of_what_is_less(short_of: str) -> None:
    scheduler = make(seqs=2) if short_of == "seats" else make(num_blocks=7, budget=32)
    executor = executor_of(scheduler)
    low = [sequence(f"low {i}", [3 + i] * 6, LONG, priority=1) for i in range(2)]
    for item in low:
        scheduler.add(item)
    step(scheduler, executor)
    high = sequence("high", [2] * 9, LONG)
    scheduler.add(high, 5.0)
    scheduler.schedule()
    scheduler.check()
    assert scheduler.preempted == [low[1]]
    assert [item.state for item in (*low, high)] == ["running", "preempted", "running"]
    scheduler.rollback()
    drain(scheduler, executor)
    for item in (*low, high):
        prompt = item.token_ids[: item.num_prompt]
        assert item.output_token_ids == expected_tokens(prompt, LONG, item.length_limit)[0]
    assert high.num_preemptions == 0


def test_equals_are_not_preempted_for_a_newcomer() -> None:
    scheduler = make(seqs=1)
    executor = executor_of(scheduler)
    scheduler.add(sequence("first", [2], LONG))
    step(scheduler, executor)
    scheduler.add(sequence("second", [2], LONG))
    step(scheduler, executor)
    assert not scheduler.preempted


def test_nothing_is_preempted_in_vain() -> None:
    """What is more important does not fit even if all that is less goes: nobody makes room for it."""
    scheduler = make(num_blocks=6, budget=32)
    executor = executor_of(scheduler)
    equal = sequence("equal", [2] * 12, LONG)
    low = sequence("low", [3] * 4, LONG, priority=1)
    scheduler.add(equal)
    scheduler.add(low)
    step(scheduler, executor)
    scheduler.add(sequence("high", [4] * 16, LONG), 1.0)
    step(scheduler, executor)
    assert not scheduler.preempted


def test_the_lowest_priority_is_served_under_endless_higher_load() -> None:
    scheduler = make(seqs=2, priority_interval=10.0)
    executor = executor_of(scheduler)
    low = sequence("low", [2, 3], LONG, priority=3)
    scheduler.add(low)
    now = 0.0
    while low.finish_reason is None and now < 100:
        now += 0.5
        scheduler.add(sequence(f"high at {now}", [3], SamplingParams(max_tokens=5, ignore_eos=True)), now)
        step(scheduler, executor)
    assert low.finish_reason == "length"
    assert now > 30  # three levels of ten seconds


# ---- endings --------------------------------------------------------------------------------------------


def scripted(answer: list[int], prompt_len: int, scheduler: Scheduler) -> FakeExecutor:
    return executor_of(scheduler, pick=lambda row: answer[row.position + 1 - prompt_len])


@pytest.mark.parametrize(
    ("params", "made", "reason", "stop_reason"),
    [
        ({}, 3, "stop", None),
        ({"ignore_eos": True}, 5, "length", None),
        ({"stop_token_ids": [7]}, 2, "stop", 7),
        ({"stop_token_ids": [7, EOS], "ignore_eos": True, "min_tokens": 2}, 3, "stop", EOS),
        ({"min_tokens": 3}, 5, "length", None),
        ({"max_tokens": 3}, 3, "stop", None),  # the eos is also the last token allowed
        ({"max_tokens": 2}, 2, "length", None),
    ],
)
def test_endings(params: dict[str, Any], made: int, reason: str, stop_reason: int | None) -> None:
    scheduler = make()
    item = sequence("a", [2, 3], SamplingParams(**{"temperature": 0, "max_tokens": 5, **params}))
    scheduler.add(item)
    drain(scheduler, scripted([3, 7, EOS, 4, 5], 2, scheduler))
    assert (item.num_output, item.finish_reason, item.stop_reason) == (made, reason, stop_reason)
    assert item.state == "finished"


def test_stop_tokens_are_banned_until_min_tokens_are_made() -> None:
    scheduler = make()
    params = SamplingParams(min_tokens=2, stop_token_ids=[9, 4, 9], max_tokens=4)
    scheduler.add(sequence("a", [2], params))
    seen: list[list[int]] = []
    executor = executor_of(scheduler, pick=lambda row: (seen.append(row.banned), 3)[1])
    drain(scheduler, executor)
    assert seen == [[0, 4, 9], [0, 4, 9], [], []]


def test_ignored_eos_is_not_banned() -> None:
    scheduler = make()
    scheduler.add(sequence("a", [2], SamplingParams(min_tokens=1, max_tokens=1, ignore_eos=True)))
    batch = scheduler.schedule()
    assert batch is not None
    assert len(batch.banned_ids) == 0


def test_finish_from_outside() -> None:
    scheduler = make()
    executor = executor_of(scheduler)
    item = sequence("a", [2], LONG)
    scheduler.add(item)
    with pytest.raises(RequestError):
        scheduler.finish(item, "x")
    step(scheduler, executor)
    scheduler.finish(item, "x")
    assert (item.finish_reason, item.stop_reason) == ("stop", "x")
    scheduler.check()
    assert scheduler.pool.num_free == scheduler.pool.num_blocks


def test_finish_while_a_step_writes_to_its_blocks() -> None:
    scheduler = make()
    executor = executor_of(scheduler)
    item = sequence("a", [2], LONG)
    scheduler.add(item)
    step(scheduler, executor)
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.finish(item, "x")
    assert (item.state, item.finish_reason, item.stop_reason) == ("finished", "stop", "x")
    assert scheduler.moot
    scheduler.check()
    assert scheduler.pool.num_free == scheduler.pool.num_blocks - 1
    assert scheduler.update(executor.run(batch)) == []
    assert item.num_output == 1
    assert scheduler.pool.num_free == scheduler.pool.num_blocks


# ---- a step ahead -----------------------------------------------------------------------------------------


def go_ahead(scheduler: Scheduler) -> StepBatch:
    assert scheduler.assume()
    scheduler.check()
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.check()
    return batch


def test_a_step_ahead_names_tokens_by_their_row() -> None:
    scheduler = make()
    executor = executor_of(scheduler)
    items = [sequence(str(i), [2, 3 + i], LONG) for i in range(3)]
    for item in items:
        scheduler.add(item)
    first = scheduler.schedule()
    assert first is not None
    result = executor.run(first)
    with pytest.raises(RuntimeError):
        scheduler.schedule()
    batch = go_ahead(scheduler)
    assert batch.token_ids.tolist() == [-1, -2, -3]
    assert batch.positions.tolist() == [2, 2, 2]
    assert [item.pending for item in items] == [True] * 3
    with pytest.raises(RuntimeError):
        scheduler.assume()
    with pytest.raises(RuntimeError):
        scheduler.finish(items[0])
    after = executor.run(batch)
    assert scheduler.update(result) == items
    scheduler.check()
    assert [item.num_output for item in items] == [1, 1, 1]
    assert [item.first_row for item in items] == [0, 1, 2]
    assert scheduler.update(after) == items
    drain(scheduler, executor)
    for item in items:
        assert item.output_token_ids == expected_tokens(item.token_ids[:2], LONG, item.length_limit)[0]


def test_an_end_that_is_found_late_wastes_a_token_and_no_more() -> None:
    scheduler = make()
    executor = executor_of(scheduler)
    short = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    items = [sequence("ends", [2], short), sequence("stops", [2, 3], LONG), sequence("goes on", [2, 4], LONG)]
    for item in items:
        scheduler.add(item)
    first = scheduler.schedule()
    assert first is not None
    result = executor.run(first)
    batch = go_ahead(scheduler)
    assert len(batch.seq_lens) == 2  # that the first one ends is known beforehand
    after = executor.run(batch)
    scheduler.update(result)
    assert [item.finish_reason for item in items] == ["length", None, None]
    scheduler.finish(items[1], "x")
    scheduler.check()
    assert not scheduler.moot
    assert scheduler.update(after) == [items[2]]
    assert [item.num_output for item in items] == [1, 1, 2]
    scheduler.abort(items[2])
    drain(scheduler, executor)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, repetition_penalty=1.5),
        SamplingParams(temperature=0, presence_penalty=0.5),
        SamplingParams(temperature=0, frequency_penalty=0.5),
    ],
)
def test_what_has_to_be_seen_first_is_not_assumed(params: SamplingParams) -> None:
    scheduler = make()
    executor = executor_of(scheduler)
    scheduler.add(sequence("a", [2], LONG))
    scheduler.add(sequence("b", [2], params))
    batch = scheduler.schedule()
    assert batch is not None
    assert not scheduler.assume()
    assert scheduler.in_flight is batch
    scheduler.update(executor.run(batch))
    drain(scheduler, executor)


def test_several_samples_of_a_prompt_are_not_assumed() -> None:
    scheduler = make()
    executor = executor_of(scheduler)
    one, two = (sequence("a", [2], LONG, index=index) for index in range(2))
    scheduler.add(one, 0.0, [two])
    batch = scheduler.schedule()
    assert batch is not None
    assert not scheduler.assume()  # they take the prompt's blocks over
    scheduler.update(executor.run(batch))
    drain(scheduler, executor)


def test_nobody_is_preempted_for_a_step_ahead() -> None:
    """The end of what is computed may bring the block that is missing."""
    scheduler = make(num_blocks=8, block_size=2)
    executor = executor_of(scheduler)
    some = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    few = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    for item in (sequence("a", [2] * 3, some), sequence("b", [3] * 3, some), sequence("c", [4], few)):
        scheduler.add(item)
    for _ in range(3):
        step(scheduler, executor)
    assert scheduler.pool.num_free == 0
    batch = scheduler.schedule()
    assert batch is not None
    result = executor.run(batch)
    assert scheduler.assume()
    assert scheduler.schedule() is None
    scheduler.check()
    scheduler.update(result)
    scheduler.check()
    drain(scheduler, executor)
    assert scheduler.num_preemptions == 0


def test_a_more_important_request_gets_its_place_although_steps_go_ahead() -> None:
    scheduler = make(seqs=1)
    executor = executor_of(scheduler)
    scheduler.add(sequence("a", [2], LONG))
    step(scheduler, executor)
    urgent = sequence("b", [3], LONG, priority=-5)
    scheduler.add(urgent)
    scheduler.schedule()  # it takes the place; once more for one that came while a step was in flight
    assert urgent.state == "running"
    more = sequence("c", [3], LONG, priority=-9)
    scheduler.add(more)
    assert not scheduler.assume()
    scheduler.update(executor.run(scheduler.in_flight))  # type: ignore[arg-type]
    scheduler.schedule()
    assert more.state == "running"
    scheduler.rollback()
    drain(scheduler, executor)


def test_rollback_of_two_steps_gives_the_same_again() -> None:
    scheduler = make()
    executor = executor_of(scheduler)
    items = [sequence(str(i), [2, 3 + i] * 5, LONG) for i in range(3)]
    for item in items:
        scheduler.add(item)
    step(scheduler, executor)
    batch = scheduler.schedule()
    assert batch is not None
    before = batch.token_ids.tolist(), batch.positions.tolist(), batch.slot_mapping.tolist()
    executor.run(batch)
    go_ahead(scheduler)
    scheduler.rollback()
    scheduler.check()
    assert not any(item.pending for item in items)
    again = scheduler.schedule()
    assert again is not None
    assert before == (again.token_ids.tolist(), again.positions.tolist(), again.slot_mapping.tolist())
    scheduler.update(executor.run(again))
    drain(scheduler, executor)
    for item in items:
        assert item.output_token_ids == expected_tokens(item.token_ids[:10], LONG, item.length_limit)[0]


# ---- abort ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "when", ["waiting", "mid-prefill", "decoding", "preempted", "in flight", "last step"]
)
def test_abort_in_every_state_gives_all_blocks_back(when: str) -> None:
    scheduler = make(num_blocks=6, budget=4)
    executor = executor_of(scheduler)
    other = sequence("other", [2] * 6, LONG)
    item = sequence("a", [3] * 6, LONG)
    scheduler.add(other)
    if when == "waiting":
        for _ in range(2):
            step(scheduler, executor)
    scheduler.add(item)
    ready = {
        "waiting": lambda: True,
        "mid-prefill": lambda: 0 < item.num_computed < 6,
        "decoding": lambda: item.num_output > 1,
        "preempted": lambda: item.state == "preempted",
        "in flight": lambda: item.num_output > 1,
        "last step": lambda: (
            item.num_tokens == item.length_limit - 1 and item.num_computed == item.num_tokens - 1
        ),
    }[when]
    if when == "last step":
        scheduler.abort(other)
    while not ready():
        step(scheduler, executor)
    batch = scheduler.schedule() if when in ("in flight", "last step") else None
    scheduler.abort(item)
    scheduler.check()
    assert (item.state, item.finish_reason) == ("aborted", "abort")
    if batch is not None:
        assert item.block_ids  # the executor may still write there
        made = item.num_output
        assert item not in scheduler.update(executor.run(batch))
        assert item.num_output == made
    assert item.block_ids == []
    scheduler.check()
    scheduler.abort(item)  # again: nothing
    drain(scheduler, executor)
    if when != "last step":
        assert other.output_token_ids == expected_tokens([2] * 6, LONG, other.length_limit)[0]


def test_abort_of_all_in_flight_leaves_an_empty_scheduler() -> None:
    scheduler = make()
    executor = executor_of(scheduler)
    items = [sequence(str(i), [2, 3], LONG) for i in range(3)]
    for item in items:
        scheduler.add(item)
    batch = scheduler.schedule()
    assert batch is not None
    for item in items:
        scheduler.abort(item)
    scheduler.check()
    assert not scheduler.has_unfinished()
    assert scheduler.update(executor.run(batch)) == []
    drain(scheduler, executor)


def test_abort_before_add() -> None:
    scheduler = make()
    item = sequence("a", [2], LONG)
    scheduler.abort(item)
    with pytest.raises(RequestError):
        scheduler.add(item)


# ---- schedule and update take turns ---------------------------------------------------------------------


def test_schedule_and_update_take_turns() -> None:
    scheduler = make()
    executor = executor_of(scheduler)
    with pytest.raises(RuntimeError):
        scheduler.update(StepResult(*[np.zeros(0, np.int32)] * 5))
    scheduler.add(sequence("a", [2], LONG))
    batch = scheduler.schedule()
    assert batch is not None
    assert scheduler.in_flight is batch
    with pytest.raises(RuntimeError):
        scheduler.schedule()
    scheduler.update(executor.run(batch))
    assert scheduler.in_flight is None


def test_two_batches_alternate() -> None:
    scheduler = make()
    executor = executor_of(scheduler)
    scheduler.add(sequence("a", [2], LONG))
    batches = []
    for _ in range(4):
        batch = scheduler.schedule()
        assert batch is not None
        batches.append(batch)
        before = batch.token_ids.copy()
        scheduler.update(executor.run(batch))
        assert (batch.token_ids == before).all()
    assert batches[0] is batches[2]
    assert batches[1] is batches[3]
    assert batches[0] is not batches[1]


@pytest.mark.parametrize("tokens", [[3, 3], [], [-2], [VOCAB]])
def test_a_result_that_does_not_fit_changes_nothing(tokens: list[int]) -> None:
    scheduler = make()
    item = sequence("a", [2], LONG)
    scheduler.add(item)
    scheduler.schedule()
    result = StepResult(np.array(tokens, np.int32), *[np.zeros(0, np.float32)] * 4)
    with pytest.raises(ValueError, match="row"):
        scheduler.update(result)
    scheduler.check()
    scheduler.rollback()
    scheduler.check()
    assert item.num_output == 0
    drain(scheduler, executor_of(scheduler))


def test_a_rolled_back_step_comes_again() -> None:
    scheduler = make(budget=3)
    executor = executor_of(scheduler)
    item = sequence("a", [2] * 7, LONG)
    scheduler.add(item)
    for _ in range(30):
        first = scheduler.schedule()
        assert first is not None
        tokens = first.token_ids.tolist()
        executor.run(first)
        scheduler.rollback()
        scheduler.check()
        again = scheduler.schedule()
        assert again is not None
        assert again.token_ids.tolist() == tokens
        scheduler.update(executor.run(again))
        if not scheduler.has_unfinished():
            break
    assert item.output_token_ids == expected_tokens([2] * 7, LONG, item.length_limit)[0]


# ---- rows -----------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 7), st.integers(0, 3), st.booleans())
def test_prompt_logprobs_come_once_for_each_position_however_chunked(
    size: int, budget: int, count: int, disturbed: bool
) -> None:
    scheduler = make(num_blocks=5, budget=budget)
    executor = executor_of(scheduler)
    prompt = [2 + i % 5 for i in range(size)]
    if disturbed:  # an earlier arrival that will preempt it
        scheduler.add(sequence("other", [2] * 7, SamplingParams(max_tokens=12, ignore_eos=True)))
    params = SamplingParams(prompt_logprobs=count, max_tokens=3, ignore_eos=True)
    item = sequence("a", prompt, params)
    scheduler.add(item)
    targets: list[int] = []
    while scheduler.has_unfinished():
        batch = scheduler.schedule()
        assert batch is not None
        scheduler.check()
        kinds = batch.row_kind.tolist()
        wanted = [batch.num_logprobs[r] for r in range(len(kinds)) if kinds[r] == 1]
        assert wanted == [count] * len(wanted)
        copy = batch.row_target.copy()
        for moved in scheduler.update(executor.run(batch)):
            if moved is item:
                rows = range(moved.first_row, moved.first_row + moved.num_prompt_rows)
                targets += copy[rows.start : rows.stop].tolist()
    assert targets == prompt[1:]


def test_prompt_logprobs_are_not_reported_again_after_a_preemption() -> None:
    scheduler = make(num_blocks=5, budget=3)
    executor = executor_of(scheduler)
    scheduler.add(sequence("other", [2] * 7, LONG))
    item = sequence("a", [3, 4, 5, 6, 7], SamplingParams(prompt_logprobs=0, max_tokens=9, ignore_eos=True))
    scheduler.add(item)
    rows = 0
    while scheduler.has_unfinished():
        rows += sum(moved.num_prompt_rows for moved in step(scheduler, executor))
    assert item.num_preemptions > 0
    assert rows == 4


def test_only_one_sequence_of_a_request_reports_the_prompt() -> None:
    scheduler = make()
    params = SamplingParams(prompt_logprobs=1, max_tokens=1, n=2)
    first = sequence("a", [2, 3, 4], params, index=0)
    second = sequence("a", [2, 3, 4], params, index=1, report_prompt=False)
    scheduler.add(first, 0.0, [second])
    batch = scheduler.schedule()
    assert batch is not None
    assert batch.token_ids.tolist() == [2, 3, 4]
    assert batch.row_kind.tolist() == [1, 1, 0, 0]
    assert batch.row_target.tolist() == [3, 4, -1, -1]
    assert batch.row_seq.tolist() == [0, 0, 0, 0]
    assert batch.row_token.tolist() == [0, 1, 2, 2]
    assert batch.sample_index.tolist() == [0, 0, 0, 1]


def test_the_sampling_arrays_hold_the_parameters() -> None:
    scheduler = make()
    params = SamplingParams(
        temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, presence_penalty=1.5, frequency_penalty=-0.5,
        repetition_penalty=2.0, logit_bias={4: 1.5, 2: -3}, logprobs=3, min_tokens=1,
    )  # fmt: skip
    scheduler.add(sequence("a", [2, 3], params, seed=2**64 - 1, index=5))
    scheduler.add(sequence("b", [2], SamplingParams(temperature=1e-6, top_k=3, top_p=0.5, min_p=0.5)))
    scheduler.add(sequence("c", [2], SamplingParams(top_k=-1)))
    batch = scheduler.schedule()
    assert batch is not None
    assert batch.temperature.tolist() == [0.5, 0, 1]
    assert batch.top_k.tolist() == [7, 0, 0]
    assert batch.top_p.tolist() == [0.25, 1, 1]
    assert batch.min_p.tolist() == [0.125, 0, 0]
    assert batch.presence.tolist() == [1.5, 0, 0]
    assert batch.frequency.tolist() == [-0.5, 0, 0]
    assert batch.repetition.tolist() == [2, 1, 1]
    assert batch.seed.tolist() == [2**64 - 1, 0, 0]
    assert batch.sample_index.tolist() == [5, 0, 0]
    assert batch.num_logprobs.tolist() == [3, -1, -1]
    assert batch.bias_start.tolist() == [0, 2, 2, 2]
    assert batch.bias_ids.tolist() == [4, 2]
    assert batch.bias_values.tolist() == [1.5, -3]
    assert batch.banned_start.tolist() == [0, 1, 1, 1]
    assert batch.history_start.tolist() == [0, 2, 2, 2]
    assert batch.history.tolist() == [2, 3]
    assert batch.history_prompt_len.tolist() == [2, 0, 0]


def test_unused_block_table_entries_are_zero() -> None:
    scheduler = make(budget=64)
    executor = executor_of(scheduler)
    long = sequence("long", [2] * 30, LONG)
    scheduler.add(long)
    for _ in range(4):
        step(scheduler, executor)
    scheduler.abort(long)
    scheduler.add(sequence("a", [3], LONG))
    scheduler.add(sequence("b", [3] * 9, LONG))
    for _ in range(2):  # both batches
        batch = scheduler.schedule()
        assert batch is not None
        for table, item in zip(batch.block_tables.tolist(), scheduler.running, strict=True):
            assert table == item.block_ids + [0] * (batch.block_tables.shape[1] - len(item.block_ids))
        scheduler.update(executor.run(batch))


# ---- token ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "good", [[1, 2], (1, 2), np.array([1, 2]), np.array([1, 2], np.uint8), iter([1, 2]), [np.int64(1), 2]]
)
def test_pack_token_ids(good: Any) -> None:
    packed = pack_token_ids(good, 3)
    assert packed.dtype == np.int32
    assert packed.tolist() == [1, 2]


@pytest.mark.parametrize(
    "bad",
    [[], [3], [-1], [True], [1.0], ["1"], [None], [2**70], "12", b"12", None, 5, np.array([1.0]),
     np.array([[1]]), np.array([True]), [np.bool_(True)], {"a": 1}],
)  # fmt: skip
def test_pack_token_ids_refuses(bad: Any) -> None:
    with pytest.raises(RequestError, match="prompt_token_ids"):
        pack_token_ids(bad, 3)


# ---- the same tokens however they are batched -----------------------------------------------------------

params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_k=st.sampled_from([-1, 0, 3]),
    top_p=st.sampled_from([0.5, 1.0]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.5]),
    max_tokens=st.integers(1, 14) | st.none(),
    min_tokens=st.sampled_from([0, 0, 1]),
    stop_token_ids=st.lists(st.integers(1, VOCAB - 1), max_size=2),
    ignore_eos=st.booleans(),
    logit_bias=st.none() | st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5, width=32), max_size=2),
    logprobs=st.none() | st.integers(0, 3),
    prompt_logprobs=st.none() | st.integers(0, 2),
)
prompt_strategy = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14)


@given(
    st.lists(st.tuples(prompt_strategy, params_strategy, st.integers(0, 3)), min_size=1, max_size=6),
    st.integers(1, 24),
    st.integers(1, 8),
    st.integers(4, 24),
    st.integers(1, 5),
)
def test_tokens_do_not_depend_on_batch_chunks_or_preemption(
    requests: list[tuple[list[int], SamplingParams, int]], budget: int, seqs: int, blocks: int, size: int
) -> None:
    scheduler = make(num_blocks=blocks, block_size=size, seqs=seqs, budget=budget, length=40)
    executor = executor_of(scheduler)
    items = []
    for i, (prompt, params, delay) in enumerate(requests):
        item = sequence(str(i), prompt, params, index=i % 3, seed=i * 2**60)
        if len(prompt) > blocks * size:
            with pytest.raises(CapacityError):
                scheduler.add(item)
            continue
        scheduler.add(item)
        items.append((item, prompt, params))
        for _ in range(delay):
            if scheduler.has_unfinished():
                step(scheduler, executor)
    drain(scheduler, executor)
    for item, prompt, params in items:
        alone = expected_tokens(prompt, params, item.length_limit, index=item.index, seed=item.seed)
        assert (item.output_token_ids, item.finish_reason, item.stop_reason) == alone


@dataclass
class Live:
    item: Sequence
    prompt: list[int]
    params: SamplingParams | PoolingParams
    stopped_at: int | None = field(default=None)
    states: list[Any] = field(default_factory=list)


shared_prompts = st.tuples(
    st.sampled_from([[2, 3, 4, 5, 6, 7, 8, 2, 3, 4], [3] * 12]), st.integers(1, 12), prompt_strategy
).map(lambda parts: (parts[0][: parts[1]] + parts[2])[:14])
"""Prompts of which many begin alike."""


class SchedulerMachine(RuleBasedStateMachine):
    """Requests of one or several sequences come, run, are stopped and aborted at any moment, also while a
    step is in flight; blocks are shared, copied, forgotten, and perhaps brought back."""

    @initialize(
        blocks=st.integers(2, 14),
        size=st.integers(1, 4),
        seqs=st.integers(1, 5),
        budget=st.integers(1, 12),
        length=st.integers(8, 40),
        guesses=st.sampled_from([0, 1, 4]),
        file=st.sampled_from([None, (2, 0), (8, 3), (100, 0), (100, 5)]),
        source=st.sampled_from(["the text", "the same model", "another model"]),
        model_length=st.sampled_from([10, 40]),
    )
    def start(
        self,
        blocks: int,
        size: int,
        seqs: int,
        budget: int,
        length: int,
        guesses: int,
        file: tuple[int, int] | None,
        source: str,
        model_length: int,
    ) -> None:
        drafter: Drafter | None = None
        self.draft_executor: FakeExecutor | None = None
        if guesses and source == "the text":
            drafter = NgramDrafter(guesses, 1)
        elif guesses:
            pick = None if source == "the same model" else lambda row: (row.context >> 5) % (VOCAB + 1) - 1
            self.draft_executor = SureExecutor(blocks, size, pick=pick)
            drafter = ModelDrafter(self.draft_executor, guesses, max_model_len=model_length)
        self.scheduler = make(
            num_blocks=blocks, block_size=size, seqs=seqs, budget=budget, length=length, drafter=drafter
        )
        self.scheduler.pool.events = []
        self.executor = executor_of(self.scheduler)
        if file is not None:
            memory: Any = MemoryFile(*file)
            self.scheduler.offload = Offload(self.executor, self.scheduler.pool, memory)
        self.live: list[Live] = []
        self.ended: list[Live] = []
        self.count = 0
        self.now = 0.0
        self.known: set[bytes] = set()
        self.assumed_result: Any = None  # of the step that is assumed

    @rule(
        prompt=prompt_strategy | shared_prompts,
        params=params_strategy,
        n=st.sampled_from([1, 1, 2, 4]),
        priority=st.sampled_from([0, 0, 0, -1, 2]),
        salt=st.sampled_from([None, "", "", "salt"]),
        later=st.sampled_from([0.0, 1.0, 30.0]),
    )
    def submit(
        self, prompt: list[int], params: SamplingParams, n: int, priority: int, salt: str | None, later: float
    ) -> None:
        self.now += later
        root = None if salt is None else prefix_root(ROOT, salt)
        items = []
        for index in range(n):
            more = {"index": index, "seed": self.count, "report_prompt": index == 0}
            items.append(sequence(str(self.count), prompt, params, priority=priority, root=root, **more))
        self.count += 1
        pool = self.scheduler.pool
        if len(prompt) >= self.scheduler.max_model_len or len(prompt) > pool.num_blocks * pool.block_size:
            with pytest.raises(CapacityError):
                self.scheduler.add(items[0], self.now, items[1:])
        else:
            self.scheduler.add(items[0], self.now, items[1:])
            self.live += [Live(item, prompt, params) for item in items]

    @rule(
        prompt=prompt_strategy | shared_prompts,
        pooling=st.sampled_from(["last", "mean"]),
        priority=st.sampled_from([0, 0, -1, 2]),
        salt=st.sampled_from([None, "", "", "salt"]),
    )
    def submit_pooling(self, prompt: list[int], pooling: str, priority: int, salt: str | None) -> None:
        params = PoolingParams(pooling=pooling)
        root = None if salt is None else prefix_root(ROOT, salt)
        item = sequence(str(self.count), prompt, params, priority=priority, root=root)
        self.count += 1
        pool = self.scheduler.pool
        if len(prompt) > min(self.scheduler.max_model_len, pool.num_blocks * pool.block_size):
            with pytest.raises(CapacityError):
                self.scheduler.add(item, self.now)
        else:
            self.scheduler.add(item, self.now)
            self.live.append(Live(item, prompt, params))

    def _run(self) -> StepResult:
        """The result of the step in flight; what it overwrites is saved before."""
        batch = self.scheduler.in_flight
        assert batch is not None
        if self.scheduler.offload is not None:
            self.scheduler.offload.save()
        return self.executor.run(batch)

    def _execute(self) -> None:
        self._take(self._run() if self.scheduler.assumed is None else self.assumed_result)

    def _take(self, result: StepResult) -> None:
        moved = self.scheduler.update(result)
        for one in self.live:
            if one.item.pools and one.item in moved:
                first = one.item.first_hidden
                one.states += list(result.hidden[first : first + one.item.num_prompt_rows])
        for one in [one for one in self.live if one.item.finish_reason is not None]:
            self.live.remove(one)
            self.ended.append(one)

    @precondition(lambda self: self.scheduler.in_flight is None and self.scheduler.assumed is None)
    @rule(times=st.integers(1, 6))
    def steps(self, times: int) -> None:
        for _ in range(times):
            if self.scheduler.schedule() is not None:
                self.scheduler.check()
                self._execute()
                self.scheduler.check()

    @precondition(lambda self: self.scheduler.in_flight is None)
    @rule()
    def schedule(self) -> None:
        assumed = self.scheduler.assumed is not None
        batch = self.scheduler.schedule()
        assert (batch is None) == (not self.live) or (assumed and batch is None)

    @precondition(lambda self: self.scheduler.in_flight is not None and self.scheduler.assumed is None)
    @rule()
    def go_ahead(self) -> None:
        """What is submitted is computed; what comes of it is not looked at yet."""
        result = self._run()
        if self.scheduler.assume():
            self.assumed_result = result
        else:
            self._take(result)

    @precondition(lambda self: self.scheduler.in_flight is not None or self.scheduler.assumed is not None)
    @rule()
    def update(self) -> None:
        self._execute()

    @precondition(lambda self: self.scheduler.in_flight is not None or self.scheduler.assumed is not None)
    @rule(data=st.data())
    def update_without_a_number(self, data: st.DataObject) -> None:
        """One sequence's logits are not numbers: it ends there, and the others do not notice."""
        batch = self.scheduler.in_flight if self.scheduler.assumed is None else self.scheduler.assumed
        assert batch is not None
        rows = {}
        for place, one in enumerate(self.live):
            own = (batch.seed == one.item.seed) & (batch.sample_index == one.item.index)
            sampled = np.flatnonzero(own & (batch.row_kind == ROW_SAMPLE))
            if len(sampled):
                rows[place] = sampled[0]
        assume(rows)
        place = data.draw(st.sampled_from(sorted(rows)))
        one = self.live[place]
        result = self._run() if self.scheduler.assumed is None else self.assumed_result
        result.tokens[rows[place]] = -1
        one.stopped_at = one.item.num_output - one.item.pending
        self._take(result)
        assert (one.item.state, one.item.finish_reason) == ("finished", "error")

    @rule(seconds=st.sampled_from([0.0, 1e-4, 1e-3, 1.0]))
    def observe(self, seconds: float) -> None:
        self.scheduler.observe(seconds)

    @precondition(lambda self: self.scheduler.in_flight is not None or self.scheduler.assumed is not None)
    @rule(computed=st.booleans())
    def rollback(self, computed: bool) -> None:
        if computed and self.scheduler.in_flight is not None:
            self._run()
        self.scheduler.rollback()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        one = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        one.stopped_at = one.item.num_output - one.item.pending
        self.scheduler.abort(one.item)
        self.ended.append(one)

    @rule()
    def reset_prefix_cache(self) -> None:
        self.scheduler.pool.reset_prefix_cache()
        if self.scheduler.offload is not None:
            self.scheduler.offload.reset()
        assert self.scheduler.pool.num_cached == 0

    @precondition(lambda self: self.live and self.scheduler.assumed is None)
    @rule(data=st.data())
    def stop_string(self, data: st.DataObject) -> None:
        running = [one for one in self.live if one.item.state == "running" and not one.item.pools]
        assume(running)
        one = data.draw(st.sampled_from(running))
        self.live.remove(one)
        one.stopped_at = one.item.num_output
        self.scheduler.finish(one.item, "!")
        self.ended.append(one)

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        if self.draft_executor is not None:
            self._check_draft_cache(self.draft_executor)
        self._follow_events()
        alive = {one.item for one in self.live}
        assert alive == {*self.scheduler.running, *self.scheduler.waiting}
        if not alive and self.scheduler.in_flight is None:
            assert self.scheduler.pool.num_free == self.scheduler.pool.num_blocks

    def _check_draft_cache(self, executor: FakeExecutor) -> None:
        """What a sequence believes to be in the draft model's cache is there."""
        for item in self.scheduler.running:
            count = min(item.num_drafted, item.num_tokens)
            positions = np.arange(count)
            slots = np.array(item.block_ids, dtype=np.int64)[positions // executor.block_size]
            slots = slots * executor.block_size + positions % executor.block_size
            assert executor.tokens[slots].tolist() == item.token_ids[:count]
            assert executor.values[slots].tolist() == expected_values(item.token_ids[:count])

    def _follow_events(self) -> None:
        """What a router outside would believe of the cache, from the events alone."""
        events, self.scheduler.pool.events = self.scheduler.pool.events, []
        assert events is not None
        for event in events:
            if event is None:
                self.known.clear()
            elif isinstance(event, bytes):
                self.known.remove(event)
            else:
                content, before, tokens = event
                assert content == sha256(before + np.array(tokens, "<i4").tobytes()).digest()
                assert content not in self.known
                self.known.add(content)
        assert len(self.known) == self.scheduler.pool.num_cached
        assert all(self.scheduler.pool.find_blocks([content]) for content in self.known)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2):
            if self.scheduler.in_flight is not None or self.scheduler.assumed is not None:
                self._execute()
        for _ in range(2000):
            if self.scheduler.schedule() is None:
                break
            self._execute()
        assert not self.scheduler.has_unfinished()
        for one in self.live + self.ended:
            item = one.item
            assert item.block_ids == []
            if isinstance(one.params, PoolingParams):
                self._check_states(one)
                continue
            tokens, reason, stop_reason = expected_tokens(
                one.prompt, one.params, item.length_limit, index=item.index, seed=item.seed
            )
            if one.stopped_at is None:
                assert (item.output_token_ids, item.finish_reason, item.stop_reason) == (
                    tokens, reason, stop_reason,
                )  # fmt: skip
            else:
                assert item.output_token_ids == tokens[: one.stopped_at]

    def _check_states(self, one: Live) -> None:
        """Each position's state once, in order, or the last one's; the first ones of what was aborted."""
        assert one.item.output_token_ids == []
        states = expected_states(one.prompt)
        if one.params.pooling == "last":
            states = states[-1:]
        if one.stopped_at is None:
            assert one.item.finish_reason == "stop"
            assert len(one.states) == len(states)
        assert np.array_equal(one.states, states[: len(one.states)])


TestSchedulerMachine = SchedulerMachine.TestCase
