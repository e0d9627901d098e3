"""`LLM`: answers in order and alone, errors before anything begins, and nothing left behind."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from api_fakes import (
    GREEDY,
    MAX_MODEL_LEN,
    WAIT,
    ApiTokenizer,
    HeldExecutor,
    assert_alone,
    engine_threads,
    make_engine,
)
from fake_executor import PIECES, FakeExecutor, Row, choose
from hypothesis import given
from hypothesis import strategies as st

import fastllm
from fastllm import LLM, CapacityError, EngineDeadError, RequestError, SamplingParams
from fastllm.engine.engine import Engine
from fastllm.engine.hooks import EngineHook, Queued
from fastllm.engine_thread import EngineThread, Mailbox, join_deltas
from fastllm.llm import _Call
from fastllm.outputs import CompletionOutput, RequestOutput
from fastllm.sampling_params import RequestOutputKind

VOCAB = len(PIECES)


def make(executor: FakeExecutor | None = None, hooks: Any = (), **config: Any) -> LLM:
    engine = make_engine(executor or HeldExecutor(), hooks, **config)
    return LLM._from_parts(engine, ApiTokenizer())  # type: ignore[arg-type]


def test_logits_that_are_not_numbers_end_one_sequence_alone() -> None:
    """The engine goes on: with the others of the batch, and with what comes after."""

    def pick(row: Row) -> int:
        return -1 if row.seed == 13 and row.position == 4 else choose(row, VOCAB)

    prompt = {"prompt_token_ids": [2, 3]}
    healthy = SamplingParams(max_tokens=6, ignore_eos=True, seed=1)
    broken = SamplingParams(max_tokens=6, ignore_eos=True, seed=13)
    with make(HeldExecutor(pick=pick)) as llm:
        first, ended, other = llm.generate([prompt] * 3, [healthy, broken, healthy])
        (again,) = llm.generate(prompt, healthy)
        llm._thread.call(Engine.check).result(WAIT)
    assert ended.outputs[0].finish_reason == "error"
    assert ended.finished
    assert len(ended.outputs[0].token_ids) == 3  # sampled at positions 1, 2 and 3
    assert first.outputs == other.outputs == again.outputs
    assert first.outputs[0].finish_reason == "length"


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = engine_threads()
    yield
    gc.collect()
    deadline = time.monotonic() + WAIT
    while set(engine_threads()) - set(before) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert set(engine_threads()) <= set(before)


def check_empty(llm: LLM) -> None:
    """The engine is sound and holds nothing."""

    def check(engine: Any) -> None:
        engine.check()
        assert engine.request_ids == []
        assert engine.pool.num_free == engine.pool.num_blocks

    llm._thread.call(check).result(WAIT)
    assert llm._thread._mail == {}


# ---- generate ------------------------------------------------------------------------------------------


def test_each_form_of_a_prompt_gives_its_answer_in_order() -> None:
    prompts: list[Any] = [
        "abc",
        {"prompt": "a b"},
        {"prompt_token_ids": [4, 3, 2]},
        {"prompt_token_ids": (2,)},
    ]
    prompts.append({"prompt_token_ids": [5, 6], "prompt": "abba"})
    expected = [[2, 3, 4], [2, 7, 3], [4, 3, 2], [2], [5, 6]]
    singles: list[Any] = ["abc", {"prompt": "abc"}]
    with make() as llm:
        outputs = llm.generate(prompts, GREEDY)
        for output, ids in zip(outputs, expected, strict=True):
            assert_alone(output, ids, GREEDY)
        assert [output.prompt for output in outputs] == ["abc", "a b", None, None, "abba"]
        assert llm.generate([], GREEDY) == []
        assert [len(llm.generate(single, GREEDY)) for single in singles] == [1, 1]
        check_empty(llm)


requests = st.tuples(
    st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=20),
    st.builds(
        SamplingParams,
        n=st.integers(1, 3),
        temperature=st.sampled_from((0.0, 1.0)),
        seed=st.none() | st.integers(0, 9),
        max_tokens=st.none() | st.integers(1, 12),
        output_kind=st.sampled_from(RequestOutputKind),
    ),
)


@given(st.lists(requests, min_size=1, max_size=12), st.integers(20, 40))
def test_a_batch_gives_each_prompt_what_it_gets_alone(batch: list[Any], blocks: int) -> None:
    with make(FakeExecutor(num_blocks=blocks)) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids, _ in batch], [params for _, params in batch]
        )
        for output, (ids, params) in zip(outputs, batch, strict=True):
            assert_alone(output, ids, params)
        check_empty(llm)


def test_the_same_calls_give_the_same_answers() -> None:
    params = SamplingParams(max_tokens=8)
    answers = []
    for seed in (5, 5, 6):
        with make(seed=seed) as llm:
            answers.append([item.outputs[0].token_ids for item in llm.generate(["abc", "abc"], params)])
    assert answers[0] == answers[1] != answers[2]
    assert answers[0][0] != answers[0][1]


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (["a", 5], None, r"^prompts\[1\]: expected a text"),
        ([2, 3], None, r'^prompts: expected \{"prompt_token_ids": \[ids\]\} for token ids'),
        ([["a"], "a"], None, r"^prompts\[0\]"),
        (["a", [2, 3]], None, r'^prompts\[1\]: expected \{"prompt_token_ids"'),
        (None, None, "^prompts"),
        (b"a", None, "^prompts"),
        (["a", {"text": "a"}], None, r"^prompts\[1\]: text: expected no such entry"),
        (["a", {}], None, r"^prompts\[1\]"),
        (["a", {"prompt": 5}], None, r"^prompts\[1\]: prompt: expected a text"),
        (["a", {"prompt_token_ids": "abc"}], None, r"^prompts\[1\]: prompt_token_ids"),
        (["a", {"prompt_token_ids": []}], None, r"^prompts\[1\]: prompt_token_ids: expected at least one"),
        (["a", {"prompt_token_ids": [VOCAB]}], None, r"^prompts\[1\]: prompt_token_ids"),
        (["a", {"prompt_token_ids": [2.0]}], None, r"^prompts\[1\]: prompt_token_ids"),
        (["a", "\n"], None, r"^prompts\[1\]: expected text that can be printed"),
        ("\n", None, "^prompt: expected text that can be printed"),
        ("", None, "^prompt: expected a text of at least one token, got ''"),
        (["a", ""], None, r"^prompts\[1\]: expected a text of at least one token, got ''"),
        (["a", "b" * MAX_MODEL_LEN], None, rf"^prompts\[1\]: prompt within .* asked {MAX_MODEL_LEN}"),
        ("b" * MAX_MODEL_LEN, None, "^prompt within"),
        (["a", "b"], [GREEDY], "^sampling_params: expected one for all or 2"),
        (["a", "b"], [GREEDY, None], r"^sampling_params\[1\]: expected SamplingParams"),
        (["a"], {"temperature": 0}, "^sampling_params: expected SamplingParams"),
        (["a", "b"], [GREEDY, SamplingParams(logit_bias={VOCAB: 1})], r"^prompts\[1\]: logit_bias"),
        # Refused by the engine itself, when the first one is in it already.
        (
            ["a", "b"],
            [GREEDY, SamplingParams(min_tokens=1, stop_token_ids=range(VOCAB))],
            r"^prompts\[1\]: min_tokens",
        ),
    ],
)
def test_a_bad_prompt_is_named_and_none_is_begun(prompts: Any, params: Any, message: str) -> None:
    executor = HeldExecutor()
    with make(executor) as llm:
        kind = CapacityError if "within" in message else RequestError
        with pytest.raises(kind, match=message):
            llm.generate(prompts, params)
        check_empty(llm)
        assert executor.num_steps == 0
        assert_alone(llm.generate("ab", GREEDY)[0], [2, 3], GREEDY)


def test_no_event_tells_of_a_batch_that_was_refused_at_sight() -> None:
    class Hook(EngineHook):
        def __init__(self) -> None:
            self.queued: list[str] = []

        def on_queued(self, event: Queued) -> None:
            self.queued.append(event.request_id)

    hook = Hook()
    with make(hooks=[hook]) as llm:
        with pytest.raises(CapacityError):
            llm.generate(["a", "b" * 100])
        assert hook.queued == []
        llm.generate(["a", "b"], GREEDY)
        assert len(hook.queued) == 2


@pytest.mark.parametrize("wanted", [True, False, None])
def test_the_bar_is_on_stderr_when_wanted(wanted: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    with make() as llm:
        llm.generate(["a", "b", "c"], GREEDY, use_tqdm=wanted)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("3/3" in shown.err) == ("tokens/s" in shown.err) == bool(wanted)
    assert threading.active_count() == before  # no watcher of the bar


def test_a_bar_that_nobody_asked_for_shows_up_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = []
    for delay in (0.0, 100.0):
        monkeypatch.setattr("fastllm.llm._BAR_DELAY", delay)
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        with make() as llm:
            llm.generate(["a", "b"], GREEDY)
        shown.append(terminal.getvalue())
    assert "2/2" in shown[0]
    assert "%" not in shown[1]


# ---- several threads -----------------------------------------------------------------------------------


def test_threads_share_the_batches() -> None:
    executor = HeldExecutor(held=True)
    answers: dict[int, list[RequestOutput]] = {}
    with make(executor) as llm:

        def work(number: int) -> None:
            answers[number] = llm.generate(["abc"[number % 3] * (number + 1), "ab"], GREEDY)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        executor.wait_for_step()
        while len(llm._thread._mail) + 2 * llm._thread._commands.qsize() < 12:
            time.sleep(0.001)
        executor.let_go()
        for thread in threads:
            thread.join(WAIT)
        for number in range(6):
            first, second = answers[number]
            assert_alone(first, [2 + number % 3] * (number + 1), GREEDY)
            assert_alone(second, [2, 3], GREEDY)
        # One after the other would have taken 12 steps for each thread.
        assert executor.num_steps < 2 * 12
        assert executor.thread_names == {"fastllm-engine"}
        check_empty(llm)


# ---- Ctrl-C --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_interrupt() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("step", [0, 3, 11])
def test_an_interrupt_ends_this_call_and_frees_its_blocks(step: int) -> None:
    executor = HeldExecutor()
    executor.before_step = lambda number: os.kill(os.getpid(), signal.SIGINT) if number == step else None
    with make(executor) as llm, default_interrupt():
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["abc"] * 20, SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
        check_empty(llm)
        executor.before_step = lambda number: None
        assert_alone(llm.generate("ab", GREEDY)[0], [2, 3], GREEDY)
        check_empty(llm)


def test_an_interrupt_leaves_the_calls_of_other_threads_alone() -> None:
    executor = HeldExecutor(held=True)
    answers: list[RequestOutput] = []
    with make(executor) as llm, default_interrupt():
        other = threading.Thread(target=lambda: answers.extend(llm.generate(["ab", "ba"], GREEDY)))
        other.start()
        executor.steps(2)
        executor.before_step = lambda number: os.kill(os.getpid(), signal.SIGINT) if number == 4 else None
        executor.let_go()
        with pytest.raises(KeyboardInterrupt):
            llm.generate("abc", SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
        other.join(WAIT)
        assert_alone(answers[0], [2, 3], GREEDY)
        assert_alone(answers[1], [3, 2], GREEDY)
        check_empty(llm)


def test_a_second_interrupt_does_not_keep_the_first_from_cleaning_up() -> None:
    executor = HeldExecutor(held=True)
    with make(executor) as llm, default_interrupt():

        def interrupt_twice() -> None:
            executor.wait_for_step()
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
            executor.let_go()

        helper = threading.Thread(target=interrupt_twice)
        helper.start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate("abc", SamplingParams(max_tokens=50, ignore_eos=True))
        helper.join(WAIT)
        check_empty(llm)


# ---- stream --------------------------------------------------------------------------------------------


def joined(outputs: list[RequestOutput]) -> RequestOutput:
    first = outputs[0]
    for output in outputs[1:]:
        first = join_deltas(first, output)
    return first


@pytest.mark.parametrize("n", [1, 2])
def test_the_pieces_of_a_stream_are_the_whole(n: int) -> None:
    params = SamplingParams(n=n, max_tokens=20, seed=3, logprobs=2, prompt_logprobs=1)
    with make() as llm:
        (whole,) = llm.generate("abc", params)
        pieces = list(llm.stream("abc", params))
        assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        together = joined(pieces)
        assert together.outputs == whole.outputs
        assert together.prompt_logprobs == whole.prompt_logprobs
        assert_alone(together, [2, 3, 4], params)
        check_empty(llm)


def test_a_slow_reader_gets_pieces_joined_and_holds_nothing_up() -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=1)
    executor = HeldExecutor(held=True)
    with make(executor) as llm:
        stream = llm.stream("abc", params)
        reader: list[RequestOutput] = []
        thread = threading.Thread(target=lambda: reader.append(next(stream)))
        thread.start()
        executor.steps(1)
        thread.join(WAIT)
        executor.let_go()
        while llm._thread.call(lambda engine: engine.has_unfinished()).result(WAIT):
            time.sleep(0.001)
        rest = list(stream)
        assert len(reader[0].outputs[0].token_ids) == 1
        assert [len(piece.outputs[0].token_ids) for piece in rest] == [19]
        (whole,) = llm.generate("abc", params)
        assert joined([*reader, *rest]).outputs == whole.outputs


@pytest.mark.parametrize("how", ["close", "collect", "raise"])
def test_a_stream_that_is_left_ends_its_request(how: str) -> None:
    executor = HeldExecutor()
    executor.before_step = lambda number: time.sleep(0.005)
    with make(executor) as llm:
        stream = llm.stream("abc", SamplingParams(max_tokens=None, ignore_eos=True))
        next(stream)
        if how == "close":
            stream.close()  # type: ignore[attr-defined]
        elif how == "raise":
            with pytest.raises(ZeroDivisionError):
                stream.throw(ZeroDivisionError())  # type: ignore[attr-defined]
        del stream
        gc.collect()
        check_empty(llm)
        steps = executor.num_steps
        assert steps < 20
        time.sleep(0.02)
        assert executor.num_steps == steps


def test_a_stream_that_was_never_read_never_begins() -> None:
    executor = HeldExecutor()
    with make(executor) as llm:
        stream = llm.stream("abc", GREEDY)
        check_empty(llm)
        assert executor.num_steps == 0
        assert_alone(joined(list(stream)), [2, 3, 4], GREEDY)


def test_two_streams_and_a_batch_take_turns_in_one_thread() -> None:
    with make() as llm:
        first, second = llm.stream("abc", GREEDY), llm.stream("ba", GREEDY)
        pieces: tuple[list[RequestOutput], list[RequestOutput]] = ([next(first)], [next(second)])
        assert_alone(llm.generate("ab", GREEDY)[0], [2, 3], GREEDY)
        pieces[0].extend(first)
        pieces[1].extend(second)
        assert_alone(joined(pieces[0]), [2, 3, 4], GREEDY)
        assert_alone(joined(pieces[1]), [3, 2], GREEDY)


def test_a_stream_has_a_priority_and_the_load_shows_it_running() -> None:
    executor = HeldExecutor()
    executor.before_step = lambda number: time.sleep(0.002)
    with make(executor, max_num_seqs=1) as llm:
        long = llm.stream("abc", SamplingParams(max_tokens=None, ignore_eos=True))
        next(long)
        assert (llm.load().num_running, llm.load().num_waiting) == (1, 0)
        assert_alone(joined(list(llm.stream("ba", GREEDY, priority=-1))), [3, 2], GREEDY)
        assert llm.load().num_preemptions == 1
        long.close()  # type: ignore[attr-defined]
        check_empty(llm)
        assert llm.load().num_used_blocks == 0


def test_the_errors_of_a_stream() -> None:
    with make() as llm:
        with pytest.raises(RequestError, match=r"^priority"):
            list(llm.stream("a", GREEDY, priority=1.5))  # type: ignore[arg-type]
        with pytest.raises(RequestError, match=r"^prompt: expected"):
            llm.stream([2, 3])  # type: ignore[arg-type]
        with pytest.raises(RequestError, match=r"^sampling_params"):
            llm.stream("a", {})  # type: ignore[arg-type]
        stream = llm.stream({"prompt_token_ids": [VOCAB]})
        with pytest.raises(RequestError, match=r"^prompt_token_ids"):
            next(stream)
        check_empty(llm)


texts = st.text("ab", max_size=3)


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 2), texts), max_size=3, unique_by=lambda item: item[0]), min_size=1
    ),
    st.data(),
)
def test_deltas_may_be_joined_in_any_grouping(
    steps: list[list[tuple[int, str]]], data: st.DataObject
) -> None:
    def outputs() -> list[RequestOutput]:
        made = []
        for number, step in enumerate(steps):
            items = [
                CompletionOutput(
                    index,
                    text,
                    list(text.encode()),
                    cumulative_logprob=float(number),
                    logprobs=[{ord(character): None} for character in text],  # type: ignore[dict-item]
                    finish_reason="stop" if number == len(steps) - 1 else None,
                )
                for index, text in sorted(step)
            ]
            made.append(RequestOutput("a", "p", [1], [None] if number == 0 else None, items))
        made[-1].finished = True
        return made

    one_by_one = joined(outputs())
    groups: list[RequestOutput] = []
    for number, output in enumerate(outputs()):
        if number and data.draw(st.booleans()):
            groups[-1] = join_deltas(groups[-1], output)
        else:
            groups.append(output)
    assert joined(groups) == one_by_one
    for item in one_by_one.outputs:
        assert item.text == "".join(text for step in steps for index, text in step if index == item.index)
        assert bytes(item.token_ids).decode() == item.text
        assert len(item.logprobs or ()) == len(item.text)
    assert one_by_one.finished
    assert one_by_one.prompt_logprobs == [None]


# ---- chat ----------------------------------------------------------------------------------------------


def test_conversations_are_answered_in_order() -> None:
    def say(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    with make() as llm:
        outputs = llm.chat([say("ab"), say("c")], [GREEDY, SamplingParams(temperature=0, max_tokens=2)])
        assert_alone(outputs[0], [2, 2, 3], GREEDY)
        assert_alone(outputs[1], [2, 4], SamplingParams(temperature=0, max_tokens=2))
        assert_alone(llm.chat(say("b"), GREEDY)[0], [2, 3], GREEDY)
        assert llm.chat([], GREEDY) == []


def test_what_a_template_may_be_told() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    with make() as llm:
        tokenizer: Any = llm.get_tokenizer()
        message = [{"role": "user", "content": "a"}]
        llm.chat(
            message,
            GREEDY,
            add_generation_prompt=False,
            chat_template="{{ x }}",
            chat_template_kwargs={"x": 1},
            tools=tools,
        )
        assert tokenizer.chats[-1] == {
            "add_generation_prompt": False,
            "chat_template": "{{ x }}",
            "x": 1,
            "tools": tools,
        }
        llm.chat(message, GREEDY, chat_template_kwargs={"shout": True})
        assert tokenizer.chats[-1]["shout"] is True
        for key in (
            "y",
            "messages",
            "tools",
            "bos_token",
            "chat_template",
            "add_generation_prompt",
            "parse_special",
        ):
            with pytest.raises(RequestError, match=r"chat template reads \(shout\), got '" + key):
                llm.chat(message, GREEDY, chat_template_kwargs={key: "<|im_end|>"})
        with pytest.raises(RequestError, match=r"^chat_template_kwargs"):
            llm.chat(message, GREEDY, chat_template_kwargs=["shout"])  # type: ignore[arg-type]
        check_empty(llm)


@pytest.mark.parametrize("messages", ["ab", None, [1], [{"role": "user"}, []], [["a"], "b"]])
def test_what_is_no_conversation_is_refused(messages: Any) -> None:
    with make() as llm, pytest.raises(RequestError, match=r"^messages: expected a list"):
        llm.chat(messages, GREEDY)


def test_an_error_names_the_conversation() -> None:
    good, bad = [{"role": "user", "content": "a"}], [{"role": "user", "content": "\n"}]
    long = [{"role": "user", "content": "a" * 100}]
    with make() as llm:
        with pytest.raises(RequestError, match=r"^messages\[1\]: text"):
            llm.chat([good, bad], GREEDY)
        with pytest.raises(CapacityError, match=r"^messages\[2\]: prompt within"):
            llm.chat([good, good, long], GREEDY)
        with pytest.raises(RequestError, match=r"^text"):
            llm.chat(bad, GREEDY)
        check_empty(llm)


# ---- the end -------------------------------------------------------------------------------------------


def test_a_closed_llm_says_so() -> None:
    executor = HeldExecutor()
    executor.before_step = lambda number: time.sleep(0.005)
    llm = make(executor)
    stream = llm.stream("abc", SamplingParams(max_tokens=None, ignore_eos=True))
    next(stream)
    llm.close()
    llm.close()
    assert executor.num_closed == 1
    for call in (
        lambda: llm.generate("a"),
        lambda: llm.generate([]),
        lambda: llm.chat([{"role": "user", "content": "a"}]),
        lambda: llm.stream("a"),
        lambda: list(stream),
    ):
        with pytest.raises(EngineDeadError, match="the engine is closed"):
            call()


def test_closing_ends_the_calls_of_other_threads() -> None:
    executor = HeldExecutor(held=True)
    llm = make(executor)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            llm.generate(["abc"] * 3, GREEDY)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    executor.steps(2)
    closer = threading.Thread(target=llm.close)
    closer.start()
    while llm._thread.is_running:
        time.sleep(0.001)
    executor.let_go()
    for thread in (closer, *threads):
        thread.join(WAIT)
    assert [str(error) for error in errors] == ["the engine is closed"] * 3
    assert executor.num_closed == 1


def test_no_command_is_lost_when_the_engine_closes() -> None:
    for _ in range(20):
        llm = make()
        futures: list[Future[Any]] = []

        def work(thread: EngineThread = llm._thread, futures: list[Future[Any]] = futures) -> None:
            box = Mailbox("never", RequestOutputKind.DELTA, _Call())
            with contextlib.suppress(EngineDeadError):
                while True:
                    futures.append(thread.call(lambda engine: engine.check()))
                    futures.append(thread.discard([box]))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.002)
        llm.close()
        for thread in threads:
            thread.join(WAIT)
        for future in futures:
            with contextlib.suppress(EngineDeadError):
                future.result(WAIT)


def test_an_llm_that_is_thrown_away_gives_its_memory_back() -> None:
    executor = HeldExecutor()
    llm = make(executor)
    llm.generate("abc", GREEDY)
    watched, thread = weakref.ref(llm), llm._thread._thread
    del llm
    gc.collect()
    assert watched() is None
    thread.join(WAIT)
    assert executor.num_closed == 1


def test_an_llm_that_was_never_made_can_be_thrown_away() -> None:
    with pytest.raises(RequestError, match=r"^max_num_seqs"):
        LLM("nowhere.gguf", max_num_seqs=0)
    gc.collect()


def test_a_failure_of_the_engine_reaches_every_call() -> None:
    cause = RuntimeError("the executor broke")
    executor = HeldExecutor(fail_at=(5, cause))
    llm = make(executor)
    stream = llm.stream("ab", GREEDY)
    next(stream)
    calls: list[Callable[[], object]] = [
        lambda: llm.generate(["abc", "ba"], GREEDY),
        lambda: list(stream),
        lambda: llm.generate("a"),
    ]
    for call in calls:
        with pytest.raises(EngineDeadError, match="the executor broke") as caught:
            call()
        assert caught.value.__cause__ is cause
    assert executor.num_closed == 1
    llm.close()
    assert executor.num_closed == 1


def test_a_forked_process_is_told_to_make_its_own() -> None:
    with make() as llm:
        llm.generate("a", GREEDY)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads
            child = os.fork()
        if child == 0:
            status = 1
            try:
                llm.generate("a", GREEDY)
            except EngineDeadError as error:
                status = 0 if "process" in str(error) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert_alone(llm.generate("ab", GREEDY)[0], [2, 3], GREEDY)


def test_an_idle_llm_takes_no_processor_time() -> None:
    with make() as llm:
        llm.generate("abc", GREEDY)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.005


def test_a_program_that_ends_without_closing_ends() -> None:
    code = """
import sys
sys.path.insert(0, "tests")
from test_llm import GREEDY, make
from fastllm import SamplingParams
llm = make()
stream = llm.stream("abc", SamplingParams(max_tokens=None, ignore_eos=True))
next(stream)
print(len(llm.generate(["abc"] * 3, GREEDY)))
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


# ---- options, imports ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"model": 5}, "model"),
        ({"model": "no/such/file.gguf"}, "model"),
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:x"}, "device"),
        ({"dtype": "bf16"}, "dtype"),
        ({"dtype": "int8", "device": "cuda"}, "dtype"),
        ({"deterministic": 1}, "deterministic"),
        ({"kv_cache_dtype": "int16", "device": "cuda"}, "kv_cache_dtype"),
        ({"quantization": "int3"}, "quantization"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"block_size": 17}, "block_size"),
        ({"block_size": True}, "block_size"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_batched_tokens": 1.5}, "max_num_batched_tokens"),
        ({"max_model_len": 1}, "max_model_len"),
        ({"threads": -1}, "threads"),
        ({"seed": "x"}, "seed"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes"),
        ({"kv_cache_tokens": True}, "kv_cache_tokens"),
        ({"kv_cache_tokens": 64, "kv_cache_memory_bytes": 1 << 20}, "kv_cache_tokens"),
        ({"kv_cache_memory_share": 0}, "kv_cache_memory_share"),
        ({"kv_cache_memory_share": 1.01}, "kv_cache_memory_share"),
        ({"kv_cache_memory_share": float("nan")}, "kv_cache_memory_share"),
        ({"kv_cache_memory_share": 10**400}, "kv_cache_memory_share"),
        ({"kv_cache_memory_share": True}, "kv_cache_memory_share"),
        ({"kv_cache_memory_share": "half"}, "kv_cache_memory_share"),
        ({"kv_cache_memory_share": 0.5, "kv_cache_tokens": 64}, "kv_cache_memory_share"),
        ({"kv_cache_memory_share": 0.5, "kv_cache_memory_bytes": 1 << 20}, "kv_cache_memory_share"),
    ],
)
def test_a_bad_option_is_named_before_anything_is_fetched(options: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        LLM(**{"model": "nowhere.gguf", **options})
    assert caught.value.field == field


def test_a_missing_gpu_is_named_before_anything_is_fetched() -> None:
    code = (
        "import sys, torch; from fastllm import LLM, UnsupportedModelError\n"
        "torch.cuda.is_available = lambda: False\n"
        "for device in 'cuda', 'cuda:1', 'interpret':\n"
        "    try: LLM('nowhere.gguf', device=device)\n"
        "    except UnsupportedModelError as error: assert 'GPU' in str(error), error\n"
        "    else: sys.exit(1)"
    )
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=plain)


def test_importing_fastllm_imports_next_to_nothing() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import fastllm; took = time.perf_counter() - start;"
        "heavy = {'numpy', 'tokenizers', 'jinja2', 'tqdm', 'fastllm._core'} & set(sys.modules);"
        "assert not heavy, heavy; assert took < 0.4, took;"
        "from fastllm import LLM, SamplingParams;"
        "heavy = {'tokenizers', 'jinja2'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_name_is_there() -> None:
    for name in fastllm.__all__:
        assert getattr(fastllm, name) is not None
        assert name in dir(fastllm)
    with pytest.raises(AttributeError, match="nonsense"):
        fastllm.nonsense  # type: ignore[attr-defined]  # noqa: B018
    assert "a" in fastllm.__version__ or fastllm.__version__[0].isdigit()


# ---- a real model --------------------------------------------------------------------------------------


@pytest.mark.model
def test_the_default_model_knows_the_capital_of_france(default_model_path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    with LLM(default_model_path, max_model_len=256, kv_cache_tokens=1000, max_num_seqs=4) as llm:
        assert llm.max_model_len == 256
        (output,) = llm.generate(["The capital of France is"], params)
        assert output.outputs[0].text.startswith(" Paris.")
        assert "".join(item.outputs[0].text for item in llm.stream("The capital of France is", params)) == (
            output.outputs[0].text
        )
        (answer,) = llm.chat([{"role": "user", "content": "Say <|im_end|> twice."}], params)
        end = llm.get_tokenizer().encode("<|im_end|>")
        assert len(end) == 1
        # The end of the system message, and that of the user's: the one in the text is text.
        assert answer.prompt_token_ids.count(end[0]) == 2


@pytest.mark.model
def test_lengths_and_memory_of_a_real_model(
    default_model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="fastllm"), LLM(default_model_path, kv_cache_tokens=100) as llm:
        assert llm.max_model_len == 112  # whole blocks
    assert "112 tokens" in caplog.text
    with pytest.raises(RequestError, match=r"max_model_len: expected at most the model's context of 8192"):
        LLM(default_model_path, max_model_len=8193)
    with pytest.raises(CapacityError, match="asked 500 tokens, had 112"):
        LLM(default_model_path, max_model_len=500, kv_cache_tokens=100)
    with pytest.raises(CapacityError):
        LLM(default_model_path, kv_cache_memory_bytes=1000)
    with LLM(default_model_path, kv_cache_memory_bytes=1 << 24, kv_cache_dtype="int8", block_size=32) as llm:
        assert llm.max_model_len > 700
