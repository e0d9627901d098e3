"""Outputs of a given form, allowed token ids and bad words: valid, the same in every arrangement, harmless to
others, and refused with a reason where they cannot be had.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tiny
from api_fakes import ApiTokenizer, engine_threads, make_engine
from fake_executor import (
    EOS,
    PIECES,
    FakeDetokenizer,
    FakeExecutor,
    FakeTokenizer,
    expected_tokens,
    full_text,
    unpack_mask,
)
from hypothesis import given
from hypothesis import strategies as st

from fastllm import LLM, AsyncLLM, RequestError, RequestOutput, SamplingParams, StructuredOutputsParams
from fastllm.engine import grammar as grammars
from fastllm.engine.engine import Engine, EngineConfig
from fastllm.engine.grammar import GrammarCompiler, GrammarError, GrammarVocabulary
from fastllm.engine.scheduler import Scheduler
from fastllm.engine.sequence import Sequence
from fastllm.structured_outputs import MAX_BYTES, MAX_DEPTH

VOCAB = len(PIECES)
# Grammars take a process each to compile: the engines of these tests share those that they have.
COMPILER = GrammarCompiler(lambda: GrammarVocabulary(FakeTokenizer(), VOCAB, [EOS]))
MADE: list[Engine] = []
CHOICES = ("a", "ab", "abc", "ba x", "xé", "c" * 9)
FORMS: list[tuple[dict[str, Any], str]] = [  # and the regular expression that Python judges by
    ({"choice": CHOICES}, "|".join(CHOICES)),
    ({"regex": "(ab|x{2,3})*c"}, "(ab|x{2,3})*c"),
    ({"regex": "[a-c x]{3,20}"}, "[a-c x]{3,20}"),
    ({"grammar": 'start: "x" a "x"\na: "b"{2,4} | "c" " "?'}, "x(b{2,4}|c ?)x"),
    ({"grammar": 'root ::= "x" a | "b"\na ::= "c" | "é" "c"'}, "x(c|éc)|b"),
]


def form(**given: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**given)


def make(executor: FakeExecutor | None = None, **config: Any) -> Engine:
    ticks = itertools.count(1)
    engine = Engine(
        executor or FakeExecutor(),
        FakeTokenizer(),
        EngineConfig(**{"max_model_len": 60, "max_num_batched_tokens": 16, "max_num_seqs": 8, **config}),
        detokenizer_factory=FakeDetokenizer,
        clock=lambda: float(next(ticks)),
    )
    engine.constraints.compiler = COMPILER
    MADE.append(engine)
    return engine


def run(engine: Engine, limit: int = 2000) -> dict[str, RequestOutput]:
    """Step to the end; the last output of each request."""
    outputs = {}
    for _ in range(limit):
        if not engine.has_unfinished():
            break
        outputs.update({output.request_id: output for output in engine.step()})
        engine.check()
    assert not engine.has_unfinished()
    assert engine.pool.num_free == engine.pool.num_blocks
    assert len(engine._guides) == 0
    return outputs


@pytest.fixture(autouse=True)
def close_engines() -> Iterator[None]:
    """Threads of one test do not outlive it."""
    yield
    close_all()


def close_all() -> None:
    while MADE:
        MADE.pop().close()


# ---- parameters ------------------------------------------------------------------------------------------


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "choice": ["a"]}, "exactly one"),
        ({"json": 3}, "json"),
        ({"json": "[1]"}, "as text of an object"),
        ({"json": "{"}, "json"),
        ({"json": '{"items":' * 20_000}, "json"),
        ({"json": nested(MAX_DEPTH + 1)}, f"at most {MAX_DEPTH} deep"),
        ({"json": json.dumps(nested(MAX_DEPTH + 1))}, f"at most {MAX_DEPTH} deep"),
        ({"json": {"enum": ["x" * MAX_BYTES]}}, "at most 65536 bytes"),
        ({"json": " " * MAX_BYTES + "{}"}, "at most 65536 bytes"),
        ({"json": {"minimum": float("nan")}}, "finite"),
        ({"json": {"minimum": 10**5000}}, "json"),
        ({"json": {1: "x"}}, "keys are texts"),
        ({"json": {"type": {"object"}}}, "json"),
        ({"json": {"type": "object", "x-guidance": {"lenient": True}}}, "without that key"),
        ({"json_object": False}, "json_object"),
        ({"regex": b"a"}, "regex"),
        ({"regex": "a" * (MAX_BYTES + 1)}, "at most 65536 bytes"),
        ({"regex": "é" * (MAX_BYTES // 2 + 1)}, "at most 65536 bytes"),
        ({"regex": "\ud800"}, "surrogates"),
        ({"choice": []}, "1..4096"),
        ({"choice": ["x"] * 4097}, "1..4096"),
        ({"choice": "abc"}, "list of texts"),
        ({"choice": ["a", ""]}, "1..4096 characters"),
        ({"choice": ["a" * 4097]}, "1..4096 characters"),
        ({"choice": [f"{i:04d}" * 5 for i in range(4000)]}, "at most 65536 bytes"),
        ({"grammar": "x" * (MAX_BYTES + 1)}, "at most 65536 bytes"),
        ({"grammar": 'start: a\na[temperature=0.5]: "x"'}, "without a temperature"),
    ],
)
def test_a_form_beyond_its_limits_is_refused_before_anything_is_compiled(
    given: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        form(**given)
    assert caught.value.field == "structured_outputs"
    assert words in caught.value.limit


def test_a_schema_that_contains_itself_is_refused() -> None:
    schema: dict[str, Any] = {}
    schema["items"] = schema
    with pytest.raises(RequestError, match="deep"):
        form(json=schema)


@pytest.mark.parametrize("kind", ["json", "regex", "grammar"])
def test_ten_megabytes_cost_no_time(kind: str) -> None:
    started = time.process_time()
    with pytest.raises(RequestError):
        form(**{kind: "(" * 10_000_000})
    with pytest.raises(RequestError):
        form(json={"enum": ["x" * 10_000_000]})
    with pytest.raises(RequestError):
        form(choice=["x" * 10_000_000])
    assert time.process_time() - started < 0.5


def test_what_is_given_later_to_a_schema_changes_nothing() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    made = form(json=schema)
    text = made.text
    assert form(json=json.dumps(schema, indent=3)).text == text
    schema["type"] = "array"
    assert made.text == text


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": form(regex="a"), "ignore_eos": True}, "structured_outputs"),
        ({"structured_outputs": form(regex="a"), "allowed_token_ids": [1]}, "structured_outputs"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [1, True]}, "allowed_token_ids"),
        ({"allowed_token_ids": [1, -1]}, "allowed_token_ids"),
        ({"allowed_token_ids": [2**31]}, "allowed_token_ids"),
        ({"allowed_token_ids": 3}, "allowed_token_ids"),
        ({"allowed_token_ids": range(2**20 + 1)}, "allowed_token_ids"),
        ({"bad_words": "abc"}, "bad_words"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": ["a" * 1025]}, "bad_words"),
        ({"bad_words": ["a"] * 257}, "bad_words"),
    ],
)
def test_constraints_that_contradict_or_exceed_are_refused(given: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**given)
    assert caught.value.field == field


def test_numbers_of_numpy_are_ids() -> None:
    params = SamplingParams(allowed_token_ids=np.array([3, 5]))  # type: ignore[arg-type]
    assert params.allowed_token_ids == (3, 5)
    assert params.constrained
    assert not SamplingParams(bad_words=[]).constrained


# ---- the form of outputs ---------------------------------------------------------------------------------


@given(st.data())
def test_every_output_that_stops_has_its_form(data: st.DataObject) -> None:
    close_all()
    engine = make()
    asked: dict[str, str] = {}
    for index in range(data.draw(st.integers(1, 4))):
        given, pattern = data.draw(st.sampled_from(FORMS))
        asked[str(index)] = pattern
        prompt = data.draw(st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=12))
        engine.add_request(
            str(index),
            prompt,
            SamplingParams(
                structured_outputs=form(**given),
                temperature=data.draw(st.sampled_from([0.0, 1.0])),
                seed=data.draw(st.integers(0, 99)),
                n=data.draw(st.integers(1, 3)),
                max_tokens=40,
                min_tokens=data.draw(st.sampled_from([0, 12])),
            ),
        )
    for name, output in run(engine).items():
        for item in output.outputs:
            assert item.finish_reason in ("stop", "length")
            assert not set(item.token_ids[:-1]) & {0, 1}, "control tokens in the text"
            if item.finish_reason == "stop":
                assert item.token_ids[-1] == EOS
                assert re.fullmatch(asked[name], full_text(item.token_ids[:-1])), (asked[name], item.text)


@given(st.data())
def test_the_same_tokens_alone_batched_chunked_preempted_and_with_a_prefix_hit(data: st.DataObject) -> None:
    close_all()
    jobs = []
    for index in range(data.draw(st.integers(2, 5))):
        given = data.draw(st.sampled_from([None, *(given for given, _ in FORMS)]))
        prompt = [2, 3, 4, 2, 3, 4, 5, 6][: data.draw(st.integers(1, 8))]
        prompt += np.random.default_rng(index).integers(2, VOCAB, data.draw(st.integers(0, 8))).tolist()
        jobs.append(
            (
                str(index),
                prompt,
                SamplingParams(
                    structured_outputs=given and form(**given),
                    seed=data.draw(st.integers(0, 50)),
                    n=data.draw(st.integers(1, 2)),
                    max_tokens=12,
                    logprobs=0,
                ),
            )
        )

    def results(outputs: dict[str, RequestOutput]) -> dict[str, Any]:
        return {
            name: [(item.token_ids, item.cumulative_logprob, item.finish_reason) for item in output.outputs]
            for name, output in outputs.items()
        }

    alone: dict[str, Any] = {}
    for job in jobs:
        engine = make(FakeExecutor(256))
        engine.add_request(*job)
        alone |= results(run(engine))
    blocks = data.draw(st.integers(10, 24))  # so few that sequences are preempted
    together = make(
        FakeExecutor(blocks),
        max_num_batched_tokens=data.draw(st.integers(1, 16)),
        max_num_seqs=data.draw(st.integers(1, 6)),
        max_model_len=40,
    )
    gap = data.draw(st.integers(1, 4))  # steps between arrivals
    outputs: dict[str, RequestOutput] = {}
    arrivals = list(jobs)
    for step in itertools.count():
        if arrivals and step % gap == 0:
            together.add_request(*arrivals.pop())
        if not arrivals and not together.has_unfinished():
            break
        outputs.update({output.request_id: output for output in together.step()})
        together.check()
    assert results(outputs) == alone
    again = {name: job for name, *job in jobs}
    for name, (prompt, params) in again.items():
        together.add_request(name, prompt, params)
    assert results(run(together)) == alone


@given(st.data())
def test_bad_words_and_allowed_ids_leave_what_the_oracle_leaves(data: st.DataObject) -> None:
    close_all()
    engine = make(FakeExecutor(24), max_num_batched_tokens=data.draw(st.integers(1, 16)), max_model_len=30)
    words = st.lists(st.text("abcx", min_size=1, max_size=3), max_size=4)
    ids = st.none() | st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=VOCAB)
    jobs = {}
    for index in range(data.draw(st.integers(1, 4))):
        prompt = data.draw(st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=6))
        params = SamplingParams(
            bad_words=data.draw(words),
            allowed_token_ids=data.draw(ids),
            seed=data.draw(st.integers(0, 99)),
            max_tokens=14,
            ignore_eos=data.draw(st.booleans()),
        )
        jobs[str(index)] = (prompt, params)
        engine.add_request(str(index), prompt, params)
    for name, output in run(engine).items():
        prompt, params = jobs[name]
        tokens, reason, _ = expected_tokens(prompt, params, min(len(prompt) + 14, 30), seed=params.seed or 0)
        (item,) = output.outputs
        assert (item.token_ids, item.finish_reason) == (tokens, reason)
        for word in params.bad_words or ():
            written = FakeTokenizer().encode(word)
            assert not any(
                item.token_ids[i : i + len(written)] == written for i in range(len(item.token_ids))
            )


def test_min_tokens_waits_as_long_as_the_form_allows_and_no_longer() -> None:
    for wanted, least in (({"regex": "x*"}, 6), ({"choice": ["ab", "x"]}, 1)):
        for seed in range(10):
            engine = make()
            params = SamplingParams(structured_outputs=form(**wanted), min_tokens=6, max_tokens=30, seed=seed)
            engine.add_request("a", [2], params)
            (item,) = run(engine)["a"].outputs
            assert item.finish_reason in ("stop", "length")
            assert len(item.token_ids) > least


def test_a_form_of_nothing_ends_at_once() -> None:
    engine = make()
    engine.add_request("a", [2], SamplingParams(structured_outputs=form(regex=""), min_tokens=3, seed=0))
    (item,) = run(engine)["a"].outputs
    assert (item.token_ids, item.text, item.finish_reason) == ([EOS], "", "stop")


def test_a_stop_string_ends_a_form_early() -> None:
    engine = make()
    params = SamplingParams(structured_outputs=form(regex="(ab){20}"), stop="aba", max_tokens=50)
    engine.add_request("a", [2], params)
    (item,) = run(engine)["a"].outputs
    assert (item.text, item.finish_reason, item.stop_reason) == ("", "stop", "aba")


def test_what_its_constraints_leave_nothing_for_ends_in_error_alone(caplog: pytest.LogCaptureFixture) -> None:
    engine = make()
    form_of = form(regex="ax*")
    engine.add_request("bad", [2], SamplingParams(structured_outputs=form_of, bad_words=["a"], max_tokens=9))
    plain = SamplingParams(seed=3, max_tokens=9)
    engine.add_request("good", [2], plain)
    outputs = run(engine)
    assert outputs["bad"].outputs[0].finish_reason == "error"
    assert outputs["good"].outputs[0].token_ids == expected_tokens([2], plain, 10, seed=3)[0]
    assert "constraints" in caplog.text


def test_min_tokens_with_nothing_else_allowed_is_refused() -> None:
    engine = make()
    with pytest.raises(RequestError, match="min_tokens"):
        engine.add_request("a", [2], SamplingParams(allowed_token_ids=[EOS], min_tokens=1))
    with pytest.raises(RequestError, match="allowed_token_ids"):
        engine.add_request("a", [2], SamplingParams(allowed_token_ids=[VOCAB]))
    assert not engine.has_unfinished()


def test_the_end_is_sampled_only_if_it_is_listed() -> None:
    for allowed, reason in (([3, 4], "length"), ([EOS], "stop")):
        engine = make()
        engine.add_request("a", [2], SamplingParams(allowed_token_ids=allowed, max_tokens=9))
        (item,) = run(engine)["a"].outputs
        assert item.finish_reason == reason
        assert set(item.token_ids) <= set(allowed)


def test_a_model_without_an_end_takes_no_form() -> None:
    tokenizer = FakeTokenizer()
    tokenizer.eos_token_ids = frozenset()
    engine = Engine(FakeExecutor(), tokenizer, EngineConfig(max_model_len=60))
    with pytest.raises(RequestError, match="end-of-sequence"):
        engine.add_request("a", [2], SamplingParams(structured_outputs=form(regex="a")))
    engine.close()


# ---- masks off the critical path -------------------------------------------------------------------------


class Gate:
    """Holds back the masks of one sequence's matcher: of the first one to ask."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, vocabulary: GrammarVocabulary) -> None:
        self.open = threading.Event()
        self.failure: BaseException | None = None
        self.asked = 0
        inner = vocabulary.next_mask

        def next_mask(matcher: Any) -> Any:
            self.asked += 1
            assert self.open.wait(20)
            if self.failure is not None:
                raise self.failure
            return inner(matcher)

        monkeypatch.setattr(vocabulary, "next_mask", next_mask)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    vocabulary = COMPILER.compile("regex", "(ab){20}").vocabulary
    gate = Gate(monkeypatch, vocabulary)
    yield gate
    gate.open.set()


HELD = SamplingParams(structured_outputs=form(regex="(ab){20}"), max_tokens=40, seed=1)
PLAIN = SamplingParams(max_tokens=30, seed=5, ignore_eos=True)


def test_a_sequence_without_its_mask_sits_out_while_others_go_on(gate: Gate) -> None:
    engine = make()
    engine.add_request("held", [2], HELD)
    engine.add_request("plain", [2, 3], PLAIN)
    counts: dict[str, int] = {}
    for _ in range(20):
        for output in engine.step():
            counts[output.request_id] = len(output.outputs[0].token_ids)
        engine.check()
    assert counts == {"held": 1, "plain": 20}
    assert gate.asked == 1
    gate.open.set()
    outputs = run(engine)
    assert outputs["plain"].outputs[0].token_ids == expected_tokens([2, 3], PLAIN, 32, seed=5)[0]
    assert outputs["held"].outputs[0].text == "ab" * 20


def test_an_engine_that_has_nothing_but_a_mask_to_wait_for_does_not_spin(gate: Gate) -> None:
    engine = make()
    engine.add_request("held", [2], HELD)
    engine.step()
    threading.Timer(0.5, gate.open.set).start()
    before, started = time.thread_time(), time.monotonic()
    (output,) = engine.step()
    assert time.monotonic() - started > 0.3
    assert time.thread_time() - before < 0.1
    assert len(output.outputs[0].token_ids) == 2
    run(engine)


def test_a_failing_matcher_ends_its_own_sequence_and_no_other(
    gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    gate.failure = GrammarError("too many items")
    gate.open.set()
    engine = make()
    with caplog.at_level(logging.ERROR):
        engine.add_request("bad", [2], HELD)
        engine.add_request("plain", [2, 3], PLAIN)
        outputs = run(engine)
    assert [item.finish_reason for item in outputs["bad"].outputs] == ["error"]
    assert len(outputs["bad"].outputs[0].token_ids) == 1
    assert outputs["plain"].outputs[0].token_ids == expected_tokens([2, 3], PLAIN, 32, seed=5)[0]
    assert "request bad" in caplog.text
    assert "too many items" in caplog.text


def test_abort_and_close_while_a_mask_is_being_made(gate: Gate) -> None:
    engine = make()
    engine.add_request("a", [2], HELD)
    engine.add_request("b", [3], HELD)
    engine.step()
    engine.abort("a")
    engine.check()
    assert len(engine._guides) == 1
    gate.open.set()
    before = set(engine_threads())
    outputs = run(engine)
    assert outputs["a"].outputs[0].finish_reason == "abort"
    assert outputs["b"].outputs[0].text == "ab" * 20
    engine.add_request("c", [3], HELD)
    engine.step()
    engine.close()
    assert len(set(engine_threads())) < len(before)


def test_a_preempted_sequence_that_is_held_computes_all_but_its_newest_token() -> None:
    scheduler = Scheduler(
        num_blocks=8,
        block_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        max_model_len=32,
        vocab_size=VOCAB,
    )
    sequence = Sequence("a", np.array([2, 3, 4], np.int32), SamplingParams())
    sequence.set_mask(np.array([0b100], np.uint32))
    scheduler.add(sequence)
    executor = FakeExecutor(8)
    batch = scheduler.schedule()
    assert batch is not None
    assert batch.mask_row.tolist() == [0]
    assert batch.mask_words.tolist() == [[0b100]]
    scheduler.update(executor.run(batch))
    assert sequence.output_token_ids == [2]
    sequence.hold()
    assert scheduler.schedule() is None
    scheduler.check()
    rival = Sequence("b", np.arange(2, 12, dtype=np.int32), SamplingParams(), priority=-5)
    scheduler.add(rival)
    batch = scheduler.schedule()
    assert batch is not None
    assert batch.num_seqs == 1
    assert batch.mask_row.tolist() == [-1]
    scheduler.check()
    scheduler.rollback()
    sequence.set_mask(np.array([0b1000], np.uint32))
    batch = scheduler.schedule()
    assert batch is not None
    assert batch.num_seqs == 2
    scheduler.update(executor.run(batch))
    assert sequence.output_token_ids == [2, 3]
    scheduler.check()


@pytest.mark.parametrize("vocab_size", [VOCAB, 31, 32, 33, 64, 1000])
def test_a_model_with_more_ids_than_its_tokenizer_never_samples_them(vocab_size: int) -> None:
    vocabulary = GrammarVocabulary(FakeTokenizer(), vocab_size, [EOS])
    made = GrammarCompiler(lambda: vocabulary).compile("regex", "[a-c ]*")
    assert made.mask.shape == ((vocab_size + 31) // 32,)
    readable = {i for i, piece in enumerate(PIECES) if re.fullmatch(b"[a-c ]+", piece)}
    assert unpack_mask(made.mask, vocab_size) == readable | {EOS}


# ---- compiling -------------------------------------------------------------------------------------------


def chain(count: int) -> str:
    return "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(count)) + f'\nr{count}: "a"'


HOSTILE: dict[str, dict[str, Any]] = {
    "unclosed groups": {"regex": "((((("},
    "a deep regex": {"regex": "(" * 30_000 + ")" * 30_000},
    "lookaround": {"regex": "(?=a)b"},
    "a regex of nothing": {"regex": "[^\\s\\S]"},
    "repeated repetitions": {"regex": "[a-z]*[a-z]*" * 2000},
    "a deep grammar": {"grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000},
    "rules without an end": {"grammar": "start: start"},
    "rules that exhaust the stack": {"grammar": chain(4500)},
    "terminals that double": {
        "grammar": "start: R0\n" + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(60)) + '\nR60: "a"'
    },
    "intersections without an end": {
        "grammar": "start: A\nA: " + " & ".join(f"/(.*[a-z].{{{i}}}[0-9].*)/" for i in range(1, 60))
    },
    "a control token by name": {"grammar": 'start: <|eos|> "a"'},
    "a control token by number": {"grammar": 'start: <[0]> "a"'},
    "no grammar": {"grammar": "a" * 60_000},
    "half a GBNF": {"grammar": "root ::= ((((("},
    "a schema of itself": {"json": {"$ref": "#"}},
    "a schema from elsewhere": {"json": {"$ref": "https://example.com/schema"}},
    "an unknown keyword": {"json": {"type": "object", "not": {"required": ["a"]}}},
    "an unknown format": {"json": {"type": "string", "format": "nonsense"}},
    "a product of choices": {
        "json": {
            "allOf": [
                {"anyOf": [{"properties": {f"a{j}_{i}": {"type": "string"}}} for i in range(8)]}
                for j in range(40)
            ]
        }
    },
    "thousands of properties": {"json": {"properties": {f"k{i}": {"type": "string"} for i in range(2000)}}},
}


def processor_seconds() -> float:
    """That this process has taken, and those that it has started and that have ended."""
    return sum(os.times()[:4])


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_form_is_refused_and_the_engine_goes_on(name: str) -> None:
    """None is ignored, none ends or stops the process (serving anchors: a bad regex kills the server, deep
    nesting overflows the stack, a grammar fails open)."""
    engine = make()
    before = processor_seconds()
    with pytest.raises(RequestError) as caught:
        engine.add_request("a", [2], SamplingParams(structured_outputs=form(**HOSTILE[name])))
    assert caught.value.field == "structured_outputs"
    assert processor_seconds() - before < grammars.COMPILE_SECONDS + 5
    assert len(str(caught.value)) < 1000
    assert not engine.has_unfinished()
    engine.add_request("b", [2], PLAIN)
    assert run(engine)["b"].outputs[0].token_ids == expected_tokens([2], PLAIN, 31, seed=5)[0]


@pytest.mark.parametrize(
    "given",
    [
        {"regex": "(a+)+b"},
        {"regex": "(a|b)*c(a|b){200}"},
        {"regex": "(.*a.*){30}"},
        {"json": {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"const": 1}]}}, "$ref": "#/$defs/a"}},
        {"json": {"type": "array", "items": {"$ref": "#"}}},
        {"choice": [f"{i:x}" for i in range(4096)]},
    ],
)
def test_what_is_catastrophic_elsewhere_is_compiled(given: dict[str, Any]) -> None:
    made = form(**given)
    before = processor_seconds()
    assert grammars.try_grammar(made.kind, made.text)
    assert processor_seconds() - before < grammars.COMPILE_SECONDS


def test_equal_grammars_are_compiled_once_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "try_grammar", lambda kind, text: f"start: /{text}/")
    compiler = GrammarCompiler(lambda: GrammarVocabulary(FakeTokenizer(), VOCAB, [EOS]))
    threads = [threading.Thread(target=compiler.compile, args=("regex", "ab*")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = compiler.compile("regex", "ab*")
    assert compiler.num_compiled == 1
    for count in range(1, grammars.CACHED_GRAMMARS + 1):
        compiler.compile("regex", "b" * count)
    assert compiler.num_compiled == grammars.CACHED_GRAMMARS + 1
    assert compiler.compile("regex", "ab*") is not first
    assert len(compiler._known) == grammars.CACHED_GRAMMARS


def test_a_grammar_that_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(lambda: GrammarVocabulary(FakeTokenizer(), VOCAB, [EOS]))
    for _ in range(2):
        with pytest.raises(RequestError, match="structured_outputs"):
            compiler.compile("regex", "(")
    assert not compiler._turns


def test_a_panic_or_a_crash_of_the_trial_is_a_refusal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    crash = tmp_path / "crash.py"
    crash.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr(grammars, "TRIAL", str(crash))
    with pytest.raises(RequestError, match="structured_outputs"):
        grammars.try_grammar("regex", "a")
    crash.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(grammars, "COMPILE_SECONDS", 0.03)
    with pytest.raises(RequestError, match="within"):
        grammars.try_grammar("regex", "a")


def test_a_trial_may_take_a_processor_for_so_long_and_no_longer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The clock does not count: a machine with other work refuses nothing that it accepts else."""
    trial = Path(grammars.TRIAL).read_text()
    for work, seconds in (("while True: pass", 1), ("import time; time.sleep(1.5)", 1)):
        slow = tmp_path / "slow.py"
        slow.write_text(trial.replace("    sys.path.append(", f"    {work}\n    sys.path.append(", 1))
        assert work in slow.read_text()
        monkeypatch.setattr(grammars, "TRIAL", str(slow))
        monkeypatch.setattr(grammars, "COMPILE_SECONDS", seconds)
        if "while" in work:
            with pytest.raises(RequestError, match="within 1 seconds"):
                grammars.try_grammar("regex", "a")
        else:
            assert grammars.try_grammar("regex", "a")


def test_llguidance_is_not_loaded_without_a_grammar() -> None:
    code = (
        "import sys, fastllm.llm, fastllm.async_llm, fastllm.engine.engine as e; "
        "fastllm.SamplingParams(structured_outputs=fastllm.StructuredOutputsParams(regex='a')); "
        "print('llguidance' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


# ---- LLM and AsyncLLM ------------------------------------------------------------------------------------


def test_grammars_and_words_are_prepared_off_the_engine_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(engine_threads())
    seen: list[str] = []
    inner = grammars.try_grammar

    def note(kind: str, text: str) -> str:
        seen.append(threading.current_thread().name)
        return inner(kind, text)

    monkeypatch.setattr(grammars, "try_grammar", note)
    engine = make_engine(FakeExecutor(num_blocks=128))
    tokenizer = engine._tokenizer
    assert isinstance(tokenizer, ApiTokenizer)
    with LLM._from_parts(engine, tokenizer) as llm:  # type: ignore[arg-type]
        params = SamplingParams(structured_outputs=form(choice=CHOICES), bad_words=["xx"], max_tokens=20)
        outputs = llm.generate(["a", "b"], params)
        assert all(output.outputs[0].text in CHOICES for output in outputs)
        assert list(llm.stream("a", params))[-1].finished
        with pytest.raises(RequestError, match=r"prompts\[1\]: structured_outputs"):
            llm.generate(["a", "b"], [params, SamplingParams(structured_outputs=form(regex="("))])
        with pytest.raises(RequestError, match="bad_words"):
            llm.generate("a", SamplingParams(bad_words=["\n"]))
        assert len(seen) == 2
        assert {name.rpartition("_")[0] for name in seen} == {"fastllm-grammar"}
        assert not any(name.startswith("fastllm-engine") for name in tokenizer.threads)
        assert sum(name.startswith("fastllm-grammar") for name in tokenizer.threads) >= 2
    assert set(engine_threads()) <= before


async def test_asyncio_gets_the_same_and_its_refusals() -> None:
    engine = make_engine(FakeExecutor(num_blocks=128))
    async with AsyncLLM._from_parts(engine, ApiTokenizer()) as llm:  # type: ignore[arg-type]
        params = SamplingParams(structured_outputs=form(choice=CHOICES), seed=2, max_tokens=20)
        last = [output async for output in llm.generate("ab", params)][-1]
        assert last.outputs[0].text in CHOICES
        with pytest.raises(RequestError, match="structured_outputs"):
            async for _ in llm.generate("ab", SamplingParams(structured_outputs=form(regex="("))):
                pass
        names = llm.generate("ab", SamplingParams(structured_outputs=form(regex="a{3}b")), "name")
        assert [output async for output in names][-1].outputs[0].text == "aaab"


# ---- models ----------------------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/next"}]},
    },
    "$defs": {"next": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """Random weights: anything that a form allows, it writes."""
    path = tiny.write("hf", tmp_path_factory.mktemp("tiny"))
    with LLM(path, max_model_len=250, kv_cache_tokens=4000, threads=1, progress=False) as llm:
        yield llm


def texts(llm: LLM, count: int, **given: Any) -> list[str]:
    """Those outputs that ended by themselves, of random prompts at temperature 1."""
    prompts = [{"prompt_token_ids": tiny.tokens(5 + i, seed=i)} for i in range(count)]
    params = [SamplingParams(structured_outputs=form(**given), max_tokens=200, seed=i) for i in range(count)]
    found = [output.outputs[0] for output in llm.generate(prompts, params)]
    assert {item.finish_reason for item in found} <= {"stop", "length"}
    for item in found:
        assert not set(item.token_ids[:-1]) & {0, 1, 2}, "control tokens in the text"
    ended = [item.text for item in found if item.finish_reason == "stop"]
    assert len(ended) >= count // 4
    return ended


def test_random_weights_write_valid_json(llm: LLM) -> None:
    for text in texts(llm, 24, json=PERSON):
        jsonschema.validate(json.loads(text), PERSON)
    for text in texts(llm, 8, json_object=True):
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "pattern",
    ["[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]", "(a|the|in)+( [a-z]{1,5}){2,4}\\.", "[αβγ]{1,9}<\\|eos\\|>"],
)
def test_random_weights_match_the_regex(llm: LLM, pattern: str) -> None:
    for text in texts(llm, 12, regex=pattern):
        assert re.fullmatch(pattern, text)


def test_random_weights_choose(llm: LLM) -> None:
    choices = ["the", "the thing", "<|eos|>", "日本", '"\\\n', "a"]
    assert set(texts(llm, 40, choice=choices)) == set(choices)


def test_random_weights_follow_a_grammar(llm: LLM) -> None:
    rules = 'start: sum\nsum: term ("+" term){0,5}\nterm: /[0-9]{1,3}/ | "(" sum ")"'
    for text in texts(llm, 16, grammar=rules):
        assert re.fullmatch(r"[0-9+()]+", text)
        assert isinstance(eval(re.sub(r"\b0+(?=[0-9])", "", text), {"__builtins__": {}}), int)


def test_a_step_beyond_llguidance_s_limits_ends_in_error_and_the_engine_goes_on(llm: LLM) -> None:
    params = SamplingParams(
        structured_outputs=form(regex="(((\\w{0,100}){0,100}){0,100}){0,100}x"), max_tokens=40, seed=1
    )
    output = llm.generate({"prompt_token_ids": [5, 6, 7]}, params)[0]
    assert output.outputs[0].finish_reason == "error"
    assert texts(llm, 4, choice=["a", "the"])


def test_logprobs_of_a_form_are_those_of_the_raw_logits(llm: LLM) -> None:
    prompt = {"prompt_token_ids": tiny.tokens(9)}
    bound = SamplingParams(structured_outputs=form(regex="[0-9]{12}"), logprobs=20, max_tokens=6, seed=4)
    output = llm.generate(prompt, bound)[0].outputs[0]
    assert output.logprobs is not None
    free = SamplingParams(prompt_logprobs=20, max_tokens=1)
    given = {"prompt_token_ids": [*prompt["prompt_token_ids"], *output.token_ids]}
    scored = llm.generate(given, free)[0].prompt_logprobs
    assert scored is not None
    assert [item for item in scored[9:] if item] == output.logprobs


@pytest.mark.model
def test_the_default_model_writes_the_json_that_is_asked_for(default_model_path: Path) -> None:
    """Valid, with the same tokens and logprob bits alone, batched, chunked, preempted, after a prefix hit."""
    prompts = [
        f"Question: describe the person {who} as a JSON object with name, age and tags.\nAnswer: "
        for who in ("Ada", "Grace Hopper", "Alan Turing")
    ]
    params = [
        SamplingParams(
            structured_outputs=form(json=PERSON), temperature=0.7, seed=i, n=3, max_tokens=80, logprobs=1
        )
        for i in range(len(prompts))
    ]

    def bits(outputs: list[RequestOutput]) -> list[Any]:
        return [
            (item.token_ids, np.float64(item.cumulative_logprob).tobytes(), item.finish_reason)
            for output in outputs
            for item in output.outputs
        ]

    with LLM(default_model_path, max_model_len=128, kv_cache_tokens=1024) as llm:
        alone = [llm.generate(prompt, item)[0] for prompt, item in zip(prompts, params, strict=True)]
        again = llm.generate(prompts, params)
        assert any(output.num_cached_tokens for output in again)
        assert bits(again) == bits(alone)
    ended = [item for output in alone for item in output.outputs if item.finish_reason == "stop"]
    assert len(ended) >= 5
    for item in ended:
        jsonschema.validate(json.loads(item.text), PERSON)
    # Room for one sequence at full length, in chunks of seven tokens.
    with LLM(
        default_model_path,
        max_model_len=112,
        kv_cache_tokens=112,
        max_num_batched_tokens=7,
        enable_prefix_caching=False,
    ) as llm:
        crowded = llm.generate(prompts, params)
        assert sum(output.metrics.num_preemptions for output in crowded) > 0
        assert bits(crowded) == bits(alone)
