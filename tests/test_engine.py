"""The engine: what requests give back, one by one or together, to the end or not."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from fake_executor import (
    EOS,
    PIECES,
    FakeDetokenizer,
    FakeExecutor,
    FakeTokenizer,
    Row,
    expected_tokens,
    full_text,
    scores,
    steps_ahead,  # noqa: F401
    top,
)
from hypothesis import given
from hypothesis import strategies as st

from fastllm.engine import hooks as events
from fastllm.engine.engine import Engine, EngineConfig
from fastllm.engine.hooks import EngineHook
from fastllm.engine.sequence import prefix_root
from fastllm.errors import CapacityError, EngineDeadError, RequestError
from fastllm.outputs import RequestOutput
from fastllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

VOCAB = len(PIECES)
DELTA, CUMULATIVE, FINAL = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY


def make(executor: FakeExecutor | None = None, hooks: Any = (), **config: Any) -> Engine:
    ticks = itertools.count(1)
    return Engine(
        executor or FakeExecutor(),
        FakeTokenizer(),
        EngineConfig(**{"max_model_len": 60, "max_num_batched_tokens": 16, "max_num_seqs": 8, **config}),
        hooks,
        detokenizer_factory=FakeDetokenizer,
        clock=lambda: float(next(ticks)),
    )


def scripted(answer: list[int], prompt_len: int, **more: Any) -> FakeExecutor:
    """Answers with these tokens, then with 12s."""

    def pick(row: Row) -> int:
        place = row.position + 1 - prompt_len
        return answer[place] if place < len(answer) else 12

    return FakeExecutor(pick=pick, **more)


def run(engine: Engine, limit: int = 2000) -> dict[str, list[RequestOutput]]:
    """Step to the end; all outputs by request."""
    outputs: dict[str, list[RequestOutput]] = {}
    for _ in range(limit):
        if not engine.has_unfinished():
            break
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check()
    assert not engine.has_unfinished()
    assert engine.pool.num_free == engine.pool.num_blocks
    for items in outputs.values():
        assert [item.finished for item in items] == [False] * (len(items) - 1) + [True]
    return outputs


def final(engine: Engine, request_id: str = "a") -> RequestOutput:
    return run(engine)[request_id][-1]


# ---- admission ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"request_id": ""}, "request_id"),
        ({"request_id": 5}, "request_id"),
        ({"request_id": "live"}, "request_id"),
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"prompt_token_ids": [VOCAB]}, "prompt_token_ids"),
        ({"prompt_token_ids": [True]}, "prompt_token_ids"),
        ({"params": None}, "params"),
        ({"params": SamplingParams(stop_token_ids=[VOCAB])}, "stop_token_ids"),
        ({"params": SamplingParams(logit_bias={VOCAB: 1})}, "logit_bias"),
        ({"params": SamplingParams(min_tokens=1, stop_token_ids=range(VOCAB))}, "min_tokens"),
        ({"priority": True}, "priority"),
        ({"priority": 1.5}, "priority"),
        ({"priority": 10**9}, "priority"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": 5}, "cache_salt"),
        ({"cache_salt": "x" * 2000}, "cache_salt"),
    ],
)
def test_a_bad_request_is_refused_alone(arguments: dict[str, Any], field: str) -> None:
    engine = make()
    engine.add_request("live", [2, 3], SamplingParams(temperature=0, max_tokens=5))
    engine.step()
    request = {"request_id": "a", "prompt_token_ids": [2], "params": SamplingParams(), **arguments}
    with pytest.raises(RequestError) as caught:
        engine.add_request(**request)
    assert caught.value.field == field
    engine.check()
    assert engine.request_ids == ["live"]
    params = SamplingParams(temperature=0, max_tokens=5)
    assert final(engine, "live").outputs[0].token_ids == expected_tokens([2, 3], params, 7)[0]


@pytest.mark.parametrize("n", [1, 3])
def test_a_request_that_can_never_fit_is_refused_with_the_arithmetic(n: int) -> None:
    engine = make(FakeExecutor(num_blocks=3), max_model_len=40)
    with pytest.raises(
        CapacityError, match=r"3 blocks x 4 tokens: asked 13 prompt tokens, had 12, would fit 12"
    ):
        engine.add_request("a", [2] * 13, SamplingParams(n=n))
    with pytest.raises(CapacityError, match="asked 40 prompt tokens, had 39, would fit 12"):
        engine.add_request("a", [2] * 40, SamplingParams(n=n))
    assert not engine.has_unfinished()
    engine.check()


def test_max_tokens_beyond_the_model_length_ends_with_length() -> None:
    engine = make(max_model_len=10)
    engine.add_request("a", [2] * 4, SamplingParams(max_tokens=100, ignore_eos=True))
    output = final(engine).outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (6, "length")


def test_a_name_is_free_again_when_its_request_has_ended() -> None:
    engine = make()
    for _ in range(2):
        engine.add_request("a", [2], SamplingParams(max_tokens=1))
        run(engine)
    engine.add_request("a", [2], SamplingParams())
    engine.abort("a")
    engine.add_request("a", [2], SamplingParams(max_tokens=1))
    engine.check()
    assert [item.outputs[0].finish_reason for item in engine.step()] == ["abort", "length"]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_model_len": "60"}, "max_model_len"),
        ({"max_num_seqs": 2.0}, "max_num_seqs"),
        ({"num_speculative_tokens": None}, "num_speculative_tokens"),
        ({"target_itl_ms": "5"}, "target_itl_ms"),
        ({"priority_interval": None}, "priority_interval"),
        ({"kv_offload_bytes": "1 GB"}, "kv_offload_bytes"),
        ({"kv_offload_bytes": 1 << 20, "enable_prefix_caching": False}, "kv_offload_bytes"),
        ({"kv_offload_dir": "/tmp"}, "kv_offload_dir"),
    ],
)
def test_a_config_of_the_wrong_kind_is_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        Engine(FakeExecutor(), FakeTokenizer(), EngineConfig(**{"max_model_len": 60, **options}))
    assert caught.value.field == field


def test_a_config_that_contradicts_the_executor_is_refused() -> None:
    with pytest.raises(RequestError, match="block_size"):
        make(block_size=8)
    make(block_size=4)


# ---- outputs --------------------------------------------------------------------------------------------


def test_text_ids_and_reasons() -> None:
    engine = make(scripted([2, 9, 10, 1, EOS], 2))
    engine.add_request("a", [2, 3], SamplingParams(), prompt="ab")
    items = run(engine)["a"]
    assert [item.outputs[0].text for item in items] == ["a", "a", "aé", "aé", "aé"]
    last = items[-1]
    assert last.outputs[0].token_ids == [2, 9, 10, 1, EOS]
    assert (last.prompt, last.prompt_token_ids) == ("ab", [2, 3])
    assert (last.outputs[0].finish_reason, last.outputs[0].stop_reason) == ("stop", None)
    assert last.outputs[0].finished
    assert last.outputs[0].logprobs is None
    assert last.outputs[0].cumulative_logprob is None
    assert last.prompt_logprobs is None
    assert last.num_cached_tokens == 0


def test_half_a_character_at_the_end_comes_out_as_a_replacement() -> None:
    engine = make(scripted([2, 9], 1))
    engine.add_request("a", [2], SamplingParams(max_tokens=2))
    assert final(engine).outputs[0].text == "a\ufffd"


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({}, "a"),
        ({"skip_special_tokens": False}, "a<end>"),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, "a<end><eos>"),
        ({"stop_token_ids": [1], "skip_special_tokens": False}, "a"),
        ({"stop_token_ids": [2]}, ""),
        ({"stop_token_ids": [2], "include_stop_str_in_output": True}, "a"),
        ({"detokenize": False}, ""),
    ],
)
def test_the_text_of_a_stop_token_is_left_out(params: dict[str, Any], text: str) -> None:
    engine = make(scripted([2, 1, EOS], 1))
    engine.add_request("a", [2], SamplingParams(**params))
    assert final(engine).outputs[0].text == text


@given(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), st.integers(1, 3), st.data())
def test_deltas_join_to_the_final_output(answer: list[int], n: int, data: st.DataObject) -> None:
    stops = data.draw(st.lists(st.text("abc é", min_size=1, max_size=3), max_size=2))
    common = {"max_tokens": len(answer), "stop": stops, "n": n, "logprobs": 1, "prompt_logprobs": 0}
    engine = make(scripted(answer, 3))
    for kind in RequestOutputKind:
        engine.add_request(kind.name, [2, 3, 4], SamplingParams(output_kind=kind, seed=1, **common))
    outputs = run(engine)
    whole = outputs["FINAL_ONLY"]
    assert len(whole) == 1
    last = outputs["CUMULATIVE"][-1]
    assert last.outputs == whole[0].outputs
    assert last.prompt_logprobs == whole[0].prompt_logprobs
    for index in range(n):
        deltas = [o for item in outputs["DELTA"] for o in item.outputs if o.index == index]
        goal = last.outputs[index]
        assert "".join(o.text for o in deltas) == goal.text
        assert [token for o in deltas for token in o.token_ids] == goal.token_ids
        assert [table for o in deltas for table in o.logprobs or []] == goal.logprobs
        assert [o.finish_reason for o in deltas] == [None] * (len(deltas) - 1) + [goal.finish_reason]
        assert deltas[-1].cumulative_logprob == goal.cumulative_logprob
    assert outputs["DELTA"][0].prompt_logprobs == last.prompt_logprobs
    assert all(item.prompt_logprobs is None for item in outputs["DELTA"][1:])
    seen = [item.outputs[0].text for item in outputs["CUMULATIVE"]]
    assert all(b.startswith(a) for a, b in itertools.pairwise(seen))  # nothing is ever taken back


# ---- stop strings ---------------------------------------------------------------------------------------


def stop_oracle(answer: list[int], stops: list[str], min_tokens: int) -> tuple[str, str | None]:
    """The text of all tokens, cut at the stop string that is complete first after min_tokens tokens."""
    decoder = FakeDetokenizer(FakeTokenizer(), [], True)
    free = len("".join(decoder.push([token]) for token in answer[:min_tokens]))
    text = full_text(answer)
    for end in range(free + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=14),
    st.lists(st.text("abc é", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 4),
    st.booleans(),
)
def test_stop_strings_cut_the_full_text_at_the_first_occurrence(
    answer: list[int], stops: list[str], min_tokens: int, include: bool
) -> None:
    min_tokens = min(min_tokens, len(answer))
    engine = make(scripted(answer, 1))
    params = SamplingParams(
        max_tokens=len(answer), stop=stops, min_tokens=min_tokens, include_stop_str_in_output=include
    )
    engine.add_request("a", [2], params)
    output = final(engine).outputs[0]
    text, stop = stop_oracle(answer, stops, min_tokens)
    assert output.text == text + (stop if include and stop is not None else "")
    assert output.stop_reason == stop
    assert output.finish_reason == ("length" if stop is None else "stop")
    assert answer[: len(output.token_ids)] == output.token_ids
    if stop is not None and len(output.token_ids) < len(answer):  # no token beyond the one that completed it
        assert stop_oracle(output.token_ids[:-1], stops, min_tokens)[1] is None


def test_a_stop_string_across_tokens_gives_its_blocks_back_at_once() -> None:
    engine = make(scripted([12, 2, 3, 4, 5], 1))
    engine.add_request("a", [2], SamplingParams(stop="abc", max_tokens=30))
    texts = [item.outputs[0].text for item in run(engine)["a"]]
    assert texts == ["x", "x", "x", "x"]


# ---- logprobs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("detokenize", [True, False])
def test_logprobs_have_the_chosen_token_first_then_the_top(count: int, detokenize: bool) -> None:
    contexts: list[int] = []

    def pick(row: Row) -> int:
        contexts.append(row.context)
        return 3

    engine = make(FakeExecutor(pick=pick))
    params = SamplingParams(logprobs=count, max_tokens=4, detokenize=detokenize)
    engine.add_request("a", [2, 3], params)
    output = final(engine).outputs[0]
    assert output.logprobs is not None
    assert len(output.logprobs) == 4
    total = 0.0
    for context, table in zip(contexts, output.logprobs, strict=True):
        logprob, rank = scores(context, 3, VOCAB)
        ids, logprobs = top(context, count, VOCAB)
        assert list(table) == [3, *(token for token in ids if token != 3)]
        assert (table[3].logprob, table[3].rank) == (logprob, rank)
        assert table[3].decoded_token == ("b" if detokenize else None)
        for place, token in enumerate(ids):
            if token != 3:
                assert (table[token].logprob, table[token].rank) == (logprobs[place], place + 1)
        total += logprob
    assert output.cumulative_logprob == total


@pytest.mark.parametrize("budget", [1, 2, 16])
@pytest.mark.parametrize("count", [0, 2])
def test_prompt_logprobs_begin_with_none_however_chunked(budget: int, count: int) -> None:
    engine = make(max_num_batched_tokens=budget)
    prompt = [2, 9, 4, 2, 12]
    engine.add_request("a", prompt, SamplingParams(prompt_logprobs=count, max_tokens=1, n=2))
    output = final(engine)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 5
    assert output.prompt_logprobs[0] is None
    for token, table in zip(prompt[1:], output.prompt_logprobs[1:], strict=True):
        assert table is not None
        assert next(iter(table)) == token
        assert len(table) in (count + 1, count or 1)
        assert table[token].decoded_token == PIECES[token].decode("utf-8", "replace")


def test_prompt_logprobs_of_a_prompt_of_one_token() -> None:
    engine = make()
    engine.add_request("a", [2], SamplingParams(prompt_logprobs=3, max_tokens=1))
    assert final(engine).prompt_logprobs == [None]


# ---- n and seeds ----------------------------------------------------------------------------------------


def test_n_sequences_have_streams_of_their_own_and_come_as_one_output() -> None:
    engine = make(max_num_seqs=3)
    params = SamplingParams(n=5, seed=9, max_tokens=8)
    engine.add_request("a", [2, 3, 4], params)
    items = run(engine)["a"]
    assert all(len(item.outputs) == 5 for item in items)
    last = items[-1]
    assert [output.index for output in last.outputs] == list(range(5))
    for index, output in enumerate(last.outputs):
        alone = expected_tokens([2, 3, 4], params, 11, index=index, seed=9)
        assert (output.token_ids, output.finish_reason, output.stop_reason) == alone
    assert len({tuple(output.token_ids) for output in last.outputs}) == 5


def test_n_final_only_comes_once_when_all_have_ended() -> None:
    engine = make()
    engine.add_request("a", [2, 3], SamplingParams(n=4, max_tokens=9, output_kind=FINAL))
    (item,) = run(engine)["a"]
    assert all(output.finished for output in item.outputs)


def test_a_request_without_a_seed_draws_one_and_reports_it() -> None:
    params = SamplingParams(max_tokens=8)
    engine = make(seed=4)
    for name in "ab":
        engine.add_request(name, [2, 3], params)
    outputs = run(engine)
    seeds = [outputs[name][-1].seed for name in "ab"]
    assert seeds[0] != seeds[1]
    for name, seed in zip("ab", seeds, strict=True):
        tokens = outputs[name][-1].outputs[0].token_ids
        assert tokens == expected_tokens([2, 3], params, 10, seed=seed)[0]
        again = make(seed=99)
        again.add_request("again", [2, 3], SamplingParams(max_tokens=8, seed=seed))
        assert final(again, "again").outputs[0].token_ids == tokens
    same = make(seed=4)
    same.add_request("x", [2, 3], params)
    assert final(same, "x").seed == seeds[0]


def test_a_negative_seed_is_taken_modulo_2_64() -> None:
    engine = make()
    engine.add_request("a", [2], SamplingParams(seed=-1, max_tokens=1))
    assert final(engine).seed == 2**64 - 1


# ---- abort ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA, FINAL])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_abort_gives_a_last_output_and_all_blocks_back(kind: RequestOutputKind, n: int, steps: int) -> None:
    engine = make(max_num_batched_tokens=4, max_num_seqs=2)
    params = SamplingParams(n=n, max_tokens=20, output_kind=kind, ignore_eos=True, seed=1)
    engine.add_request("a", [2] * 6, params)
    engine.add_request("other", [3], SamplingParams(max_tokens=9, ignore_eos=True))
    outputs = [item for _ in range(steps) for item in engine.step() if item.request_id == "a"]
    engine.abort("a")
    engine.abort("a")
    engine.abort("unknown")
    engine.check()
    assert engine.request_ids == ["other"]
    rest = run(engine)
    assert len(rest["a"]) == 1
    last = rest["a"][0]
    assert last.finished
    assert [output.finish_reason for output in last.outputs] == ["abort"] * n
    assert rest["other"][-1].outputs[0].finish_reason == "length"
    tokens: list[list[int]] = [[], [], []]
    for item in [*outputs, last] if kind is DELTA else [last]:
        for output in item.outputs:
            tokens[output.index] += output.token_ids
    for index in range(n):
        alone = expected_tokens([2] * 6, params, 26, index=index, seed=1)[0]
        assert tokens[index] == alone[: len(tokens[index])]
    # Whatever the kind, the same work was done and is told.
    moved = make(max_num_batched_tokens=4, max_num_seqs=2)
    moved.add_request("a", [2] * 6, SamplingParams(n=n, max_tokens=20, ignore_eos=True, seed=1))
    moved.add_request("other", [3], SamplingParams(max_tokens=9, ignore_eos=True))
    for _ in range(steps):
        moved.step()
    assert sum(map(len, tokens)) == sum(
        item.num_output
        for item in (*moved.scheduler.running, *moved.scheduler.waiting)
        if item.request_id == "a"
    )
    metrics = last.metrics
    assert metrics.num_generated_tokens == sum(map(len, tokens))
    assert (metrics.last_token_time is None) == (metrics.num_generated_tokens == 0)


@pytest.mark.parametrize("n", [1, 2])
def test_outputs_made_at_the_end_are_those_made_on_the_way(n: int) -> None:
    """Text, ids, counts and times; a hook that wants every step's tokens gets them all the same."""
    seen: dict[str, tuple[Any, ...]] = {}
    for kind in (CUMULATIVE, FINAL):
        for hooks in ((), (Recorder(),)):
            engine = make(hooks=hooks)
            params = SamplingParams(n=n, max_tokens=30, output_kind=kind, seed=4, temperature=1.3)
            engine.add_request("a", [2, 3, 4], params)
            last = final(engine)
            texts = [(item.text, item.token_ids, item.finish_reason) for item in last.outputs]
            seen[f"{kind} {len(hooks)}"] = (texts, last.metrics.num_generated_tokens)
            assert last.metrics.num_generated_tokens == sum(len(item.token_ids) for item in last.outputs)
            assert last.metrics.last_token_time == last.metrics.finished_time
    assert len({repr(value) for value in seen.values()}) == 1, seen


def test_abort_of_a_request_some_of_whose_sequences_have_ended() -> None:
    engine = make()

    def pick(row: Row) -> int:
        return EOS if row.sample_index == 0 else 2

    engine = make(FakeExecutor(pick=pick))
    engine.add_request("a", [2], SamplingParams(n=2, max_tokens=9))
    engine.step()
    engine.step()
    engine.abort("a")
    engine.check()
    (last,) = engine.step()
    assert [output.finish_reason for output in last.outputs] == ["stop", "abort"]
    assert not engine.has_unfinished()
    assert engine.pool.num_free == engine.pool.num_blocks


def test_text_held_back_for_a_stop_string_comes_out_at_abort() -> None:
    engine = make(scripted([2, 3], 1))
    engine.add_request("a", [2], SamplingParams(stop="abc"))
    engine.step()
    (item,) = engine.step()
    assert item.outputs[0].text == ""
    engine.abort("a")
    (last,) = engine.step()
    assert last.outputs[0].text == "ab"


# ---- the same answer however it is computed -------------------------------------------------------------

request_strategy = st.tuples(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=10),
    st.builds(
        SamplingParams,
        n=st.integers(1, 3),
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 2**64 - 1),
        max_tokens=st.integers(1, 10),
        frequency_penalty=st.sampled_from([0.0, 0.5]),
        logprobs=st.none() | st.integers(0, 2),
        prompt_logprobs=st.none() | st.integers(0, 2),
        stop=st.none() | st.text("abc", min_size=1, max_size=2),
    ),
)


@given(
    st.lists(request_strategy, min_size=1, max_size=5),
    st.integers(1, 20),
    st.integers(1, 6),
    st.integers(5, 20),
)
def test_alone_equals_batched_equals_chunked_equals_preempted(
    requests: list[tuple[list[int], SamplingParams]], budget: int, seqs: int, blocks: int
) -> None:
    alone = []
    for prompt, params in requests:
        engine = make(max_num_batched_tokens=64, max_num_seqs=1)
        engine.add_request("a", prompt, params)
        alone.append(final(engine))
    engine = make(FakeExecutor(num_blocks=blocks), max_num_batched_tokens=budget, max_num_seqs=seqs)
    for i, (prompt, params) in enumerate(requests):
        engine.add_request(str(i), prompt, params)
    together = run(engine)
    for i, reference in enumerate(alone):
        assert together[str(i)][-1].outputs == reference.outputs
        assert together[str(i)][-1].prompt_logprobs == reference.prompt_logprobs


# ---- failures and interrupts ----------------------------------------------------------------------------


def test_an_executor_failure_ends_the_engine_and_names_all_requests() -> None:
    seen: list[str] = []

    class Watch(EngineHook):
        def on_aborted(self, event: events.Aborted) -> None:
            seen.append(event.request_id)

    failure = ValueError("the device is gone")
    engine = make(FakeExecutor(fail_at=(2, failure)), [Watch()], max_num_seqs=1)
    for name in "abc":
        engine.add_request(name, [2, 3], SamplingParams(max_tokens=9, ignore_eos=True))
    engine.step()
    engine.step()
    with pytest.raises(
        EngineDeadError, match=r"the device is gone.*3 unfinished requests were aborted: a, b, c"
    ) as dead:
        engine.step()
    assert dead.value.__cause__ is failure
    assert engine.lost_request_ids == ("a", "b", "c")
    assert seen == ["a", "b", "c"]
    for call in (engine.step, engine.check_health, lambda: engine.add_request("d", [2], SamplingParams())):
        with pytest.raises(EngineDeadError) as again:
            call()
        assert again.value.__cause__ is failure
    engine.abort("a")
    assert not engine.has_unfinished()
    engine.check()
    assert engine.pool.num_free == engine.pool.num_blocks


def test_a_result_of_the_wrong_size_ends_the_engine() -> None:
    executor = FakeExecutor()
    original = executor.run

    def run_short(batch: Any) -> Any:
        result = original(batch)
        result.tokens = result.tokens[:-1]
        return result

    executor.run = run_short  # type: ignore[method-assign]
    engine = make(executor)
    engine.add_request("a", [2], SamplingParams())
    with pytest.raises(EngineDeadError):
        engine.step()


def test_an_interrupt_in_the_executor_leaves_everything_to_go_on() -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for at in range(6):
        engine = make(FakeExecutor(fail_at=(at, KeyboardInterrupt())))
        engine.add_request("a", [2, 3], params)
        with pytest.raises(KeyboardInterrupt):
            run(engine)
        engine.check()
        assert final(engine).outputs[0].token_ids == expected_tokens([2, 3], params, 8)[0]


@pytest.fixture
def default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_handler")
@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA])
def test_ctrl_c_during_a_step_comes_after_it_and_loses_nothing(kind: RequestOutputKind) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, output_kind=kind)
    goal = expected_tokens([2, 3], params, 8)[0]

    class Interrupting(FakeDetokenizer):
        def push(self, ids: Any) -> str:
            if next(pushes) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return super().push(ids)

    pushes = itertools.count()
    engine = make()
    engine._make_detokenizer = Interrupting
    engine.add_request("a", [2, 3], params)
    tokens: list[int] = []
    interrupts = 0
    while engine.has_unfinished():
        try:
            items = engine.step()
        except KeyboardInterrupt:
            interrupts += 1
            engine.check()
            continue
        for item in items:
            tokens = tokens + item.outputs[0].token_ids if kind is DELTA else item.outputs[0].token_ids
    assert interrupts == 1
    assert tokens == goal
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("default_handler")
def test_a_second_ctrl_c_is_raised_at_once() -> None:
    class Stuck(FakeExecutor):
        def collect(self, ticket: int) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("not reached")

    engine = make(Stuck())
    engine.add_request("a", [2], SamplingParams())
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.check()
    engine.abort("a")
    engine.check()
    assert engine.pool.num_free == engine.pool.num_blocks
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_program_and_other_threads_are_left_alone() -> None:
    engine = make()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        engine.add_request("a", [2], SamplingParams(max_tokens=1))
        engine.step()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    engine.add_request("b", [2], SamplingParams(max_tokens=1))
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(engine.step()))
    thread.start()
    thread.join()
    assert results[0][0].request_id == "b"


def test_a_detokenizer_that_fails_ends_the_engine_rather_than_giving_wrong_text() -> None:
    class Broken(FakeDetokenizer):
        def push(self, ids: Any) -> str:
            raise ValueError("broken")

    engine = make()
    engine._make_detokenizer = Broken
    engine.add_request("a", [2], SamplingParams())
    with pytest.raises(EngineDeadError, match="broken"):
        engine.step()
    engine.check()


def test_a_detokenizer_that_fails_for_outputs_made_at_the_end_ends_the_engine_too() -> None:
    """Others' tokens have not been taken in by then: ending them must not fail in its turn."""

    class Broken(FakeDetokenizer):
        pushed = 0

        def push(self, ids: Any) -> str:
            self.pushed += 1
            if self.pushed > 1:
                raise ValueError("broken")
            return super().push(ids)

    engine = make()
    engine._make_detokenizer = Broken
    for name, tokens in (("a", 4), ("b", 9), ("c", 9)):
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, output_kind=FINAL)
        engine.add_request(name, [2], params)
    with pytest.raises(EngineDeadError, match="broken"):
        run(engine)
    assert engine.lost_request_ids == ("a", "b", "c")
    engine.check()
    assert engine.pool.num_free == engine.pool.num_blocks


def test_close() -> None:
    executor = FakeExecutor()
    with make(executor) as engine:
        engine.add_request("a", [2], SamplingParams())
        engine.step()
    assert executor.num_closed == 1
    engine.close()
    assert executor.num_closed == 1
    assert not engine.has_unfinished()
    assert engine.pool.num_free == engine.pool.num_blocks
    with pytest.raises(EngineDeadError, match="closed"):
        engine.step()


# ---- hooks and metrics ----------------------------------------------------------------------------------


class Recorder(EngineHook):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def _take(self, event: Any) -> None:
        self.seen.append(event)

    on_queued = on_scheduled = on_step = on_first_token = _take
    on_tokens = on_finished = on_preempted = on_aborted = _take

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.seen if type(event) is kind]


def test_the_events_of_a_request_in_order() -> None:
    recorder = Recorder()
    engine = make(scripted([2, 3, EOS], 2), [recorder])
    engine.add_request("a", [2, 3], SamplingParams())
    output = final(engine)
    names = [type(event).__name__ for event in recorder.seen]
    assert names == [
        "Queued", "Scheduled", "FirstToken", "Tokens", "Step", "Tokens", "Step", "Tokens", "Finished", "Step",
    ]  # fmt: skip
    times = [event.time for event in recorder.seen]
    assert times == sorted(times)
    metrics = output.metrics
    assert metrics is not None
    assert metrics.arrival_time == recorder.seen[0].time
    assert metrics.first_scheduled_time == recorder.seen[1].time
    assert metrics.first_token_time == recorder.seen[2].time
    assert metrics.last_token_time == metrics.finished_time == recorder.seen[8].time
    assert metrics.queue_time == recorder.seen[1].time - recorder.seen[0].time
    assert metrics.time_to_first_token == recorder.seen[2].since_arrival
    assert metrics.num_generated_tokens == 3
    assert recorder.seen[8].finish_reasons == ("stop",)
    first, second = recorder.of(events.Step)[:2]
    assert (first.num_prefill_tokens, first.num_decode_tokens, first.num_seqs) == (2, 0, 1)
    assert (second.num_prefill_tokens, second.num_decode_tokens, second.num_running) == (0, 1, 1)
    assert second.num_free_blocks == second.num_blocks - 1
    assert recorder.of(events.Step)[-1].num_free_blocks == 64


class CacheRecorder(EngineHook):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def _take(self, event: Any) -> None:
        self.seen.append(event)

    on_blocks_stored = on_blocks_removed = on_cache_cleared = _take


@given(st.lists(request_strategy, min_size=1, max_size=5), st.integers(5, 12), st.data())
def test_each_request_has_one_first_token_and_one_end(
    requests: list[tuple[list[int], SamplingParams]], blocks: int, data: st.DataObject
) -> None:
    recorder = Recorder()
    engine = make(FakeExecutor(num_blocks=blocks), [recorder], max_num_batched_tokens=6)
    aborted = set()
    tokens: dict[str, int] = {}
    for i, (prompt, params) in enumerate(requests):
        engine.add_request(str(i), prompt, params)
    while engine.has_unfinished():
        if engine.request_ids and data.draw(st.integers(0, 9)) == 0:
            aborted.add(engine.request_ids[0])
            engine.abort(engine.request_ids[0])
        for item in engine.step():
            tokens[item.request_id] = sum(len(output.token_ids) for output in item.outputs)
    ended = {event.request_id for event in recorder.of(events.Finished)}
    names = {str(i) for i in range(len(requests))}
    assert {event.request_id for event in recorder.of(events.Queued)} == names
    assert ended | aborted == names
    assert not ended & aborted
    assert len(recorder.of(events.Finished)) + len(recorder.of(events.Aborted)) == len(names)
    firsts = [event.request_id for event in recorder.of(events.FirstToken)]
    assert len(firsts) == len(set(firsts))
    assert ended <= set(firsts)
    for name in names:
        counted = sum(event.count for event in recorder.of(events.Tokens) if event.request_id == name)
        assert counted == tokens.get(name, 0)
    resumed = sum(event.resumed for event in recorder.of(events.Scheduled))
    assert resumed <= len(recorder.of(events.Preempted))
    if not aborted:
        assert resumed == len(recorder.of(events.Preempted))


def test_no_event_is_made_that_nobody_listens_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("an event was made")

    for name in (
        *("Queued", "Scheduled", "Step", "FirstToken", "Tokens", "Finished", "Preempted", "Aborted"),
        *("BlocksStored", "BlocksRemoved", "CacheCleared", "Started", "Generated"),
    ):
        monkeypatch.setattr(events, name, refuse)

    class Silent(EngineHook):
        """Listens to nothing."""

    engine = make(FakeExecutor(num_blocks=6), [Silent()])
    for name in "abc":
        engine.add_request(name, [2] * 5, SamplingParams(max_tokens=9, ignore_eos=True))
    engine.abort("c")
    run(engine)
    engine.reset_prefix_cache()
    assert engine.pool.events is None


def test_what_happens_to_cached_blocks_once_per_step() -> None:
    recorder = CacheRecorder()
    engine = make(FakeExecutor(num_blocks=4), [recorder], max_num_batched_tokens=32)
    root = prefix_root(prefix_root("fastllm", "", 4), "salt")
    params = SamplingParams(max_tokens=1)
    engine.add_request("a", [2, 3, 4, 5, 6, 7, 8, 9, 10], params, cache_salt="salt")
    run(engine)
    (stored,) = recorder.seen
    first = sha256(root + np.array([2, 3, 4, 5], "<i4").tobytes()).digest()
    second = sha256(first + np.array([6, 7, 8, 9], "<i4").tobytes()).digest()
    assert stored == events.BlocksStored(stored.time, (first, second), root, (2, 3, 4, 5, 6, 7, 8, 9), 4)
    recorder.seen.clear()
    engine.add_request("b", [3] * 13, params)
    run(engine)
    removed, added = recorder.seen
    assert removed == events.BlocksRemoved(removed.time, (second, first))
    assert (added.parent_hash, added.token_ids) == (prefix_root("fastllm", "", 4), (3,) * 12)
    recorder.seen.clear()
    engine.reset_prefix_cache()
    assert [type(event) for event in recorder.seen] == [events.CacheCleared]


@given(
    st.lists(
        st.sampled_from([None, b"x", b"y", (b"b", b"a", [1, 2]), (b"c", b"b", [3, 4]), (b"b", b"c", [5, 6])])
    )
)
def test_cache_events_say_the_same_joined(noted: list[Any]) -> None:
    """Taken apart again they are what was noted; and no two neighbours could have been one."""
    apart: list[Any] = []
    joined = list(events.cache_events(noted, 1.0, 2))
    for event in joined:
        if isinstance(event, events.CacheCleared):
            apart.append(None)
        elif isinstance(event, events.BlocksRemoved):
            apart += event.hashes
        else:
            parents = (event.parent_hash, *event.hashes)
            for i, content in enumerate(event.hashes):
                apart.append((content, parents[i], list(event.token_ids[2 * i : 2 * i + 2])))
    assert apart == noted
    for one, other in itertools.pairwise(joined):
        assert not isinstance(one, events.BlocksRemoved) or not isinstance(other, events.BlocksRemoved)
        if isinstance(one, events.BlocksStored) and isinstance(other, events.BlocksStored):
            assert other.parent_hash != one.hashes[-1]


def test_a_step_says_how_busy_the_engine_is() -> None:
    recorder = Recorder()
    engine = make(FakeExecutor(num_blocks=8), [recorder], max_num_batched_tokens=32)
    for name in "ab":
        engine.add_request(name, [2, 3, 4, 5, 6], SamplingParams(max_tokens=20, ignore_eos=True))
    while engine.has_unfinished():
        engine.step()
        step, load = recorder.of(events.Step)[-1], engine.load()
        assert (step.num_running, step.num_waiting) == (load.num_running, load.num_waiting)
        assert (step.num_free_blocks, step.num_cached_blocks) == (
            load.num_free_blocks,
            load.num_cached_blocks,
        )
        assert (step.num_prefix_queries, step.num_prefix_hits) == (
            load.num_prefix_queries,
            load.num_prefix_hits,
        )
        assert step.num_preemptions == load.num_preemptions == len(recorder.of(events.Preempted))
        assert load.num_used_blocks == 8 - load.num_free_blocks
        assert load.kv_usage == load.num_used_blocks / 8
    assert load.num_preemptions > 0
    assert load.num_prefix_queries == 10
    assert load.kv_usage == 0


def test_an_engine_says_that_it_is_there_before_anything_else() -> None:
    class First(EngineHook):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def _take(self, event: Any) -> None:
            self.seen.append(event)

        on_started = on_queued = _take

    hook = First()
    engine = make(FakeExecutor(num_blocks=7), [hook])
    params = SamplingParams(max_tokens=3)
    engine.add_request("a", [2, 3], params)
    started, queued = hook.seen
    assert (started.num_blocks, started.block_size, started.config) == (7, 4, engine.config)
    assert queued.params is params
    assert queued.adapter is None


@given(st.lists(request_strategy, min_size=1, max_size=5), st.integers(5, 12), st.sampled_from([0, 4]))
def test_what_a_step_has_brought_is_what_its_sequences_have(
    requests: list[tuple[list[int], SamplingParams]], blocks: int, guesses: int
) -> None:
    """Generated against Tokens, of which it is the sum."""

    class Both(EngineHook):
        def __init__(self) -> None:
            self.last: dict[tuple[str, int], float] = {}
            self.count = self.steps = 0
            self.intervals: list[float] = []

        def on_tokens(self, event: events.Tokens) -> None:
            key = (event.request_id, event.index)
            if key in self.last:
                self.intervals.append(event.time - self.last[key])
            self.last[key] = event.time
            self.count += event.count

        def on_generated(self, event: events.Generated) -> None:
            self.steps += 1
            assert event.num_tokens == self.count
            found = [seconds for seconds, count in event.intervals.items() for _ in range(count)]
            assert sorted(found) == sorted(self.intervals)
            self.count = 0
            self.intervals = []

    hook = Both()
    executor = FakeExecutor(num_blocks=blocks)
    engine = make(executor, [hook], max_num_batched_tokens=6, num_speculative_tokens=guesses)
    for i, (prompt, params) in enumerate(requests):
        engine.add_request(str(i), prompt, params)
    run(engine)
    assert hook.count == 0
    assert 0 < hook.steps <= executor.num_steps


def test_a_hook_that_fails_is_logged_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(EngineHook):
        def on_tokens(self, event: events.Tokens) -> None:
            raise ValueError("broken hook")

    recorder = Recorder()
    engine = make(hooks=[Broken(), recorder])
    engine.add_request("a", [2], SamplingParams(max_tokens=2, ignore_eos=True))
    assert len(final(engine).outputs[0].token_ids) == 2
    assert len(recorder.of(events.Tokens)) == 2
    assert "broken hook" in caplog.text


@pytest.mark.parametrize(
    "event", ["on_queued", "on_scheduled", "on_first_token", "on_tokens", "on_step", "on_preempted"]
)
def test_a_hook_may_abort_and_add(event: str) -> None:
    class Meddler(EngineHook):
        done = False

        def meddle(self, event: Any) -> None:
            if not self.done:
                self.done = True
                engine.abort(getattr(event, "request_id", "a"))
                engine.add_request("new", [4], SamplingParams(max_tokens=2, ignore_eos=True, n=2))

    setattr(Meddler, event, Meddler.meddle)
    engine = make(FakeExecutor(num_blocks=6), [Meddler()])
    for name in "ab":
        engine.add_request(name, [2] * 4, SamplingParams(max_tokens=9, ignore_eos=True, n=2))
        engine.check()
    ends = {"stop": 0, "length": 0, "abort": 0}
    for _ in range(200):
        if not engine.has_unfinished():
            break
        for item in engine.step():
            if item.finished:
                for output in item.outputs:
                    ends[output.finish_reason or ""] += 1
        engine.check()
    assert not engine.has_unfinished()
    assert ends == {"stop": 0, "length": 4, "abort": 2}
    assert engine.pool.num_free == engine.pool.num_blocks


def test_something_that_is_no_hook_is_refused() -> None:
    with pytest.raises(RequestError, match="hooks"):
        make(hooks=[object()])


# ---- a step ahead ----------------------------------------------------------------------------------------


class Logbook(FakeExecutor):
    """Notes what it is asked for, in order."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.calls: list[str] = []

    def submit(self, batch: Any) -> int:
        self.calls.append(f"submit {self.num_steps}")
        return super().submit(batch)

    def collect(self, ticket: int) -> Any:
        self.calls.append(f"collect {ticket}")
        return super().collect(ticket)


def turns(count: int) -> list[str]:
    return [f"{what} {number}" for number in range(count) for what in ("submit", "collect")]


def test_a_step_is_submitted_before_the_one_before_is_collected(steps_ahead: int) -> None:  # noqa: F811
    executor = Logbook()
    engine = make(executor)
    engine.add_request("a", [2, 3], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    run(engine)
    ahead = [
        "submit 0",
        "submit 1",
        "collect 0",
        "submit 2",
        "collect 1",
        "submit 3",
        "collect 2",
        "collect 3",
    ]
    assert executor.calls == (ahead if steps_ahead else turns(4))


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.5},
        {"allowed_token_ids": [2, 3, 4]},
        {"bad_words": ["ab"]},
        {"structured_outputs": StructuredOutputsParams(regex="(ab)+c")},
    ],
)
def test_tokens_that_have_to_be_looked_at_first_are_waited_for(params: dict[str, Any]) -> None:
    """Neither the request itself nor those beside it get another answer."""
    executor = Logbook()
    engine = make(executor)
    engine.add_request("a", [2, 3], SamplingParams(temperature=0, max_tokens=6, **params))
    plain = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    engine.add_request("b", [3, 4], plain)
    outputs = {}
    while "a" in engine.request_ids:
        outputs.update({output.request_id: [output] for output in engine.step()})
        assert executor.calls == turns(executor.num_steps)
    outputs.update(run(engine))
    assert outputs["b"][-1].outputs[0].token_ids == expected_tokens([3, 4], plain, 7)[0]


def test_steps_go_ahead_only_where_that_is_wanted() -> None:
    executor = Logbook()
    engine = make(executor, async_scheduling=False)
    engine.add_request("a", [2, 3], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    run(engine)
    assert executor.calls == turns(4)


def test_requests_that_come_while_a_step_is_computed_join_the_next_but_one() -> None:
    executor = Logbook()
    engine = make(executor)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    engine.add_request("a", [2, 3], params)
    engine.step()
    engine.add_request("b", [3, 4], params)
    outputs = run(engine)
    for name, prompt in (("a", [2, 3]), ("b", [3, 4])):
        assert outputs[name][-1].outputs[0].token_ids == expected_tokens(prompt, params, 10)[0]
    assert executor.num_steps <= 11


def test_a_profile_shows_steps_one_after_the_other(steps_ahead: int) -> None:  # noqa: F811
    executor = Logbook()
    engine = make(executor)
    engine.add_request("a", [2, 3], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    engine.step()
    engine.step()
    profile = engine.start_profile()
    begun = executor.num_steps
    executor.calls.clear()
    engine.step()
    engine.step()
    engine.step()
    engine.stop_profile()
    own = executor.num_steps - begun
    assert own == 3 - steps_ahead  # one was on its way
    assert executor.calls == turns(begun + own)[2 * begun :]
    assert sum(times.steps for times in profile.kinds().values()) == 3
    run(engine)
