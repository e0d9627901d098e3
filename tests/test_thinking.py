"""Budgets for what a model thinks: the end comes where the budget is used up, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
from fake_executor import (
    EOS,
    PIECES,
    FakeDetokenizer,
    FakeExecutor,
    FakeTokenizer,
    expected_tokens,
    steps_ahead,  # noqa: F401
)
from hypothesis import given
from hypothesis import strategies as st

from fastllm import RequestError, SamplingParams, StructuredOutputsParams, ThinkingBudget
from fastllm.engine.engine import Engine, EngineConfig
from fastllm.engine.thinking import Thought, ThoughtLimit

OPENING, CLOSING = "ab", "x"  # PIECES has "a", "b", "ab", "x"
A, B, X, SPACE = (PIECES.index(piece) for piece in (b"a", b"b", b"x", b" "))
AB = PIECES.index(b"ab")


def budget(tokens: int, *, opened: bool = False, end: str | None = None) -> ThinkingBudget:
    return ThinkingBudget(tokens=tokens, opening=OPENING, closing=CLOSING, opened=opened, end=end)


def make(**config: Any) -> Engine:
    return Engine(
        FakeExecutor(num_blocks=config.pop("blocks", 64)),
        FakeTokenizer(),
        EngineConfig(**{"max_model_len": 60, "max_num_batched_tokens": 16, "max_num_seqs": 8, **config}),
        detokenizer_factory=FakeDetokenizer,
    )


def run(engine: Engine) -> dict[str, list[list[int]]]:
    found = {}
    while engine.has_unfinished():
        for output in engine.step():
            if output.finished:
                found[output.request_id] = [list(item.token_ids) for item in output.outputs]
        engine.check()
    assert engine.pool.num_free == engine.pool.num_blocks
    return found


def oracle(prompt: list[int], count: int, wanted: ThinkingBudget) -> list[int]:
    """Greedy tokens, with the end put in: over the text, as the words of `ThinkingBudget` say."""
    tokens: list[int] = []
    forced: list[int] | None = None
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    while len(tokens) < count:
        text = b"".join(PIECES[token] for token in tokens)
        begun = text if wanted.opened else text.lstrip()
        reasons = wanted.opened or begun.startswith(OPENING.encode())
        inside = begun if wanted.opened else begun[len(OPENING) :]
        if forced is None and reasons and len(tokens) >= wanted.tokens and CLOSING.encode() not in inside:
            forced = FakeTokenizer().encode(wanted.text)
        if forced:
            tokens.append(forced.pop(0))
        else:
            known = [*prompt, *tokens]
            tokens.append(expected_tokens(known, one, len(known) + 1)[0][0])
    return tokens


@given(
    prompts=st.lists(st.lists(st.integers(2, 12), min_size=1, max_size=9), min_size=1, max_size=5),
    data=st.data(),
    blocks=st.integers(10, 30),
    chunk=st.integers(3, 16),
)
def test_the_end_is_put_in_where_the_budget_is_used_up(
    prompts: list[list[int]], data: st.DataObject, blocks: int, chunk: int
) -> None:
    """Alone, beside others, in chunks, preempted."""
    engine = make(blocks=blocks, max_num_batched_tokens=chunk)
    wanted = {}
    for i, prompt in enumerate(prompts):
        opened = data.draw(st.booleans())
        limit = budget(
            data.draw(st.integers(1, 12)), opened=opened, end=data.draw(st.sampled_from([None, " x "]))
        )
        count = data.draw(st.integers(1, 16))
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, thinking_budget=limit)
        engine.add_request(str(i), prompt, params)
        wanted[str(i)] = oracle(prompt, count, limit)
    assert {name: tokens for name, (tokens,) in run(engine).items()} == wanted


def read(limit: ThoughtLimit, tokens: list[int]) -> Thought:
    thought = Thought(limit)
    thought.take(tokens)
    return thought


@pytest.mark.parametrize(
    ("tokens", "over", "forced"),
    [
        ([], False, None),
        ([A], False, None),  # may still become the opening
        ([A, B], False, None),
        ([SPACE, AB, A], False, None),
        ([SPACE, AB, A, A], False, X),
        ([AB, A, A, A], False, X),
        ([AB, A, A, A, X], True, None),
        ([AB, X], True, None),  # it ends by itself
        ([A, A], True, None),  # it does not reason
        ([X, A, A, A, A], True, None),
        ([SPACE] * 6, False, None),  # nothing but spaces is no reasoning
    ],
)
def test_states(tokens: list[int], over: bool, forced: int | None) -> None:
    thought = read(ThoughtLimit(budget(4), FakeTokenizer(), len(PIECES)), tokens)
    assert (thought.over, thought.forced) == (over, forced)


def test_several_answers_have_a_budget_each() -> None:
    engine = make()
    params = SamplingParams(
        n=3, temperature=1.5, seed=4, max_tokens=12, ignore_eos=True, thinking_budget=budget(5, opened=True)
    )
    engine.add_request("a", [2, 3], params)
    for tokens in run(engine)["a"]:
        assert X in tokens[:6]
        assert len(tokens) == 12


def test_beside_guesses() -> None:
    """Drafts go no further than a budget lets them: the same tokens as without."""
    limit = budget(7, opened=True)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, thinking_budget=limit)
    found = []
    for guesses in (0, 4):
        engine = make(num_speculative_tokens=guesses, prompt_lookup_min=1)
        engine.add_request("a", [2, 3] * 6, params)
        found.append(run(engine)["a"])
    assert found[0] == found[1] == [oracle([2, 3] * 6, 30, limit)]


def test_only_allowed_tokens_before_and_after() -> None:
    engine = make()
    params = SamplingParams(
        temperature=0, max_tokens=12, ignore_eos=True, allowed_token_ids=[A, B],
        thinking_budget=budget(3, opened=True),
    )  # fmt: skip
    engine.add_request("a", [5], params)
    ((tokens,),) = run(engine).values()
    assert tokens[3] == X
    assert set(tokens[:3] + tokens[4:]) <= {A, B}


@pytest.mark.parametrize(("grammar", "forced"), [("[abc]{2,40}x[ab]{4}", True), ("[abc]{9}", False)])
def test_a_grammar_with_and_without_a_place_for_the_end(grammar: str, forced: bool) -> None:
    engine = make()
    params = SamplingParams(
        temperature=0, max_tokens=40, structured_outputs=StructuredOutputsParams(regex=grammar),
        thinking_budget=budget(3, opened=True),
    )  # fmt: skip
    engine.add_request("a", [5], params)
    ((tokens,),) = run(engine).values()
    assert tokens[-1] == EOS
    text = b"".join(PIECES[token] for token in tokens[:-1]).decode()
    if forced:
        assert tokens[3] == X
        assert len(text.split("x")[1]) == 4
    else:
        assert len(text) == 9


@pytest.mark.parametrize("tokens", [1, 5, None])
@pytest.mark.parametrize("guesses", [0, 4])
def test_a_form_of_what_follows_the_thought(tokens: int | None, guesses: int) -> None:
    """Anything but an end up to the marker, then the form, to its end."""
    engine = make(num_speculative_tokens=guesses, prompt_lookup_min=1)
    thought = ThinkingBudget(tokens=tokens, opening=OPENING, closing=CLOSING, opened=True, before_form=True)
    params = SamplingParams(
        temperature=1.0, seed=3, max_tokens=57, structured_outputs=StructuredOutputsParams(regex="[ab]{4}"),
        thinking_budget=thought,
    )  # fmt: skip
    engine.add_request("a", [5], params)
    ((found,),) = run(engine).values()
    text = b"".join(PIECES[token] for token in found[:-1]).decode("utf-8", "replace")
    _, marker, form = text.partition(CLOSING)
    assert EOS not in found[:-1]
    assert marker
    assert found[-1] == EOS
    assert len(form) == 4
    assert set(form) <= {"a", "b"}
    if tokens is not None:
        assert found.index(X) <= tokens


def test_what_a_token_has_behind_the_marker_belongs_to_the_form() -> None:
    """Spaces do not."""
    limit = ThoughtLimit(
        ThinkingBudget(opening="c", closing="a", opened=True, before_form=True), FakeTokenizer(), len(PIECES)
    )
    assert read(limit, [AB]).rest == b"b"
    assert limit.tokens_of(b"b") == [B]
    assert read(limit, [A]).rest == b""
    assert limit.tokens_of(b"") == []


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 1, "before_form": True},
        {"tokens": 1, "opened": True, "before_form": 1},
        {"tokens": 0},
        {"tokens": 2.0},
        {"tokens": 1, "opening": ""},
        {"tokens": 1, "closing": "x" * 65},
        {"tokens": 1, "closing": 5},
        {"tokens": 1, "opened": 1},
        {"tokens": 1, "end": "no marker"},
    ],
)
def test_bad_budgets_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="thinking_budget"):
        ThinkingBudget(**options)


def test_a_budget_of_another_kind_is_refused() -> None:
    with pytest.raises(RequestError, match="thinking_budget"):
        SamplingParams(thinking_budget=5)  # type: ignore[arg-type]
