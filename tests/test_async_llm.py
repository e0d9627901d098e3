"""`AsyncLLM`: many tasks, loops and threads on one engine, and requests that end whenever they like."""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from api_fakes import GREEDY, WAIT, ApiTokenizer, HeldExecutor, assert_alone, engine_threads, make_engine
from fake_executor import PIECES, FakeExecutor

from fastllm import LLM, AsyncLLM, CapacityError, EngineDeadError, RequestError, SamplingParams
from fastllm.engine_thread import join_deltas
from fastllm.outputs import RequestOutput
from fastllm.sampling_params import RequestOutputKind

VOCAB = len(PIECES)
ENDLESS = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
DELTA = SamplingParams(
    temperature=0, max_tokens=12, ignore_eos=True, logprobs=1, output_kind=RequestOutputKind.DELTA
)


def make(executor: FakeExecutor | None = None, **config: Any) -> AsyncLLM:
    tokenizer: Any = ApiTokenizer()
    return AsyncLLM._from_parts(make_engine(executor or HeldExecutor(), **config), tokenizer)


def slow(seconds: float = 0.002) -> HeldExecutor:
    """An executor whose requests last long enough to be ended."""
    executor = HeldExecutor()
    executor.before_step = lambda number: time.sleep(seconds)
    return executor


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(engine_threads())
    yield
    gc.collect()
    deadline = time.monotonic() + WAIT
    while set(engine_threads()) - before and time.monotonic() < deadline:
        time.sleep(0.005)
    assert set(engine_threads()) <= before


async def collect(outputs: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in outputs]


async def final(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    return (await collect(outputs))[-1]


async def check_empty(llm: AsyncLLM) -> None:
    """The engine is sound and holds nothing, after the step under way at the latest."""

    def check(engine: Any) -> None:
        engine.check()
        assert engine.request_ids == []
        assert engine.pool.num_free == engine.pool.num_blocks

    await asyncio.wrap_future(llm._thread.call(check))
    assert llm._thread._mail == {}
    assert llm._preparing == {}


# ---- generate ----------------------------------------------------------------------------------------


async def test_cumulative_outputs_grow_to_the_whole() -> None:
    async with make(slow()) as llm:
        outputs = await collect(llm.generate("abc", GREEDY, "mine"))
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert {output.request_id for output in outputs} == {"mine"}
        assert len(outputs) > 6
        for older, newer in itertools.pairwise(outputs):
            assert newer.outputs[0].text.startswith(older.outputs[0].text)
            assert len(newer.outputs[0].token_ids) > len(older.outputs[0].token_ids)
        assert_alone(outputs[-1], [2, 3, 4], GREEDY)
        await check_empty(llm)


async def test_many_tasks_share_the_batches() -> None:
    executor = slow()
    async with make(executor) as llm:
        prompts = [[2 + i % 5] * (1 + i % 7) for i in range(40)]
        params = [SamplingParams(n=1 + i % 3, max_tokens=5 + i % 9, seed=i) for i in range(40)]
        tasks = [
            final(llm.generate({"prompt_token_ids": ids}, given, f"r{i}"))
            for i, (ids, given) in enumerate(zip(prompts, params, strict=True))
        ]
        for output, ids, given in zip(await asyncio.gather(*tasks), prompts, params, strict=True):
            assert_alone(output, ids, given)
        assert executor.num_steps < 200
        assert executor.thread_names == {"fastllm-engine"}
        await check_empty(llm)


async def test_a_slow_reader_gets_deltas_joined_and_the_newest_cumulative_output() -> None:
    executor = HeldExecutor()
    async with make(executor) as llm:
        pieces, states = [], []
        deltas, cumulative = llm.generate("abc", DELTA), llm.generate("abc", GREEDY)
        async for piece in deltas:
            pieces.append(piece)
            await asyncio.sleep(0.01)  # the engine makes all tokens meanwhile
        async for state in cumulative:
            states.append(state)
            await asyncio.sleep(0.01)
        assert len(pieces) <= 3
        assert len(states) <= 3
        together = pieces[0]
        for piece in pieces[1:]:
            together = join_deltas(together, piece)
        assert_alone(together, [2, 3, 4], DELTA)
        assert len(together.outputs[0].logprobs or ()) == 12
        assert_alone(states[-1], [2, 3, 4], GREEDY)


async def test_only_the_last_output_with_final_only() -> None:
    params = SamplingParams(temperature=0, max_tokens=5, output_kind=RequestOutputKind.FINAL_ONLY)
    async with make() as llm:
        (output,) = await collect(llm.generate("abc", params))
        assert_alone(output, [2, 3, 4], params)


async def test_the_errors_of_a_request() -> None:
    executor = HeldExecutor()
    async with make(executor) as llm:
        with pytest.raises(RequestError, match=r"^prompt: expected"):
            llm.generate([2, 3])  # type: ignore[arg-type]
        with pytest.raises(RequestError, match=r"^sampling_params"):
            llm.generate("a", {})  # type: ignore[arg-type]
        for prompt, params, options, message in (
            ({"prompt_token_ids": [VOCAB]}, GREEDY, {}, "prompt_token_ids"),
            ("b" * 100, GREEDY, {}, "prompt within"),
            ("\n", GREEDY, {}, "prompt: expected text"),
            ("", GREEDY, {}, "prompt: expected a text of at least one token"),
            ("a", GREEDY, {"priority": 1.5}, "priority"),
            ("a", GREEDY, {"request_id": ""}, "request_id"),
            ("a", SamplingParams(stop_token_ids=[VOCAB]), {}, "stop_token_ids"),
        ):
            outputs = llm.generate(prompt, params, **options)  # type: ignore[arg-type]
            with pytest.raises((RequestError, CapacityError), match="^" + message):
                await anext(outputs)
        assert executor.num_steps == 0
        await check_empty(llm)


async def test_a_name_in_use_is_refused_and_its_bearer_not_harmed() -> None:
    executor = slow()
    async with make(executor) as llm:
        first = llm.generate("abc", GREEDY, "same")
        outputs = [await anext(first)]
        with pytest.raises(RequestError, match="request_id"):
            await anext(llm.generate("ba", GREEDY, "same"))
        outputs += await collect(first)
        assert_alone(outputs[-1], [2, 3, 4], GREEDY)
        assert_alone(await final(llm.generate("ba", GREEDY, "same")), [3, 2], GREEDY)


@pytest.mark.parametrize("how", ["abort", "leave"])
async def test_a_name_is_free_as_soon_as_its_request_is_ended(how: str) -> None:
    async with make(slow()) as llm:
        for _ in range(5):
            first = llm.generate("abc", ENDLESS, "same")
            await anext(first)
            if how == "abort":
                await llm.abort("same")
            else:
                await first.aclose()
            # The last output of the former bearer must not come out here.
            assert_alone(await final(llm.generate("ba", GREEDY, "same")), [3, 2], GREEDY)
            if how == "abort":
                assert (await final(first)).outputs[0].finish_reason == "abort"
        await check_empty(llm)


async def test_a_chat_is_rendered_off_the_event_loop() -> None:
    async with make() as llm:
        messages = [{"role": "user", "content": "ab"}]
        output = await final(llm.chat(messages, GREEDY, "c", chat_template_kwargs={"shout": True}))
        assert_alone(output, [2, 2, 3], GREEDY)
        tokenizer: Any = await llm.get_tokenizer()
        assert tokenizer.chats[0]["shout"] is True
        assert all(name.startswith("fastllm-tokenize") for name in tokenizer.threads)
        with pytest.raises(RequestError, match=r"^chat_template_kwargs"):
            await anext(llm.chat(messages, GREEDY, chat_template_kwargs={"messages": []}))
        await check_empty(llm)


async def test_only_long_texts_are_tokenized_off_the_event_loop() -> None:
    async with make(max_model_len=10_000) as llm:
        tokenizer: Any = await llm.get_tokenizer()
        await final(llm.generate("ab", GREEDY))
        assert tokenizer.threads == [threading.current_thread().name]
        with pytest.raises(CapacityError):
            await final(llm.generate("ab" * 5_000, GREEDY))
        assert tokenizer.threads[-1].startswith("fastllm-tokenize")


# ---- ending requests ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancel", "close", "forget"])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_reader_that_goes_ends_its_request_within_a_step(how: str, n: int) -> None:
    executor = slow()
    params = SamplingParams(n=n, temperature=0, max_tokens=None, ignore_eos=True)
    async with make(executor) as llm:
        other = asyncio.ensure_future(final(llm.generate("ba", GREEDY)))
        outputs = llm.generate("abc", params)
        if how == "cancel":
            task = asyncio.ensure_future(final(outputs))
            while executor.num_steps < 3:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            async for _ in outputs:
                break
            if how == "close":
                await outputs.aclose()
            else:
                del outputs, _
                gc.collect()
                await asyncio.sleep(0.005)  # asyncio closes the generator in a task of its own
        ids = await asyncio.wrap_future(llm._thread.call(lambda engine: engine.request_ids))
        assert len(ids) <= 1
        assert_alone(await other, [3, 2], GREEDY)
        await check_empty(llm)


async def test_abort_in_every_state() -> None:
    executor = HeldExecutor(held=True)
    async with make(executor, max_num_seqs=2, max_num_batched_tokens=4) as llm:
        tasks = {
            name: asyncio.ensure_future(collect(llm.generate(prompt, ENDLESS, name)))
            for name, prompt in (("decoding", "a"), ("prefill", "b" * 20), ("waiting", "c"), ("kept", "ab"))
        }
        await asyncio.sleep(0.01)
        await asyncio.to_thread(executor.steps, 3)
        await asyncio.to_thread(executor.wait_for_step)
        await llm.abort("decoding")
        await llm.abort(["prefill", "waiting", "nobody"])
        executor.let_go()
        for name in ("decoding", "prefill", "waiting"):
            last = (await tasks[name])[-1]
            assert last.finished
            assert [item.finish_reason for item in last.outputs] == ["abort"]
            assert (len(last.outputs[0].token_ids) > 0) == (name == "decoding")
        assert_alone((await tasks["kept"])[-1], [2, 3], ENDLESS)
        await llm.abort("kept")  # it has ended; nothing happens
        await check_empty(llm)


async def test_abort_while_the_text_is_tokenized() -> None:
    executor = HeldExecutor()
    async with make(executor) as llm:
        tokenizer: Any = await llm.get_tokenizer()
        tokenizer.hold = threading.Event()
        task = asyncio.ensure_future(collect(llm.generate("ab" * 3000, SamplingParams(n=2), "long")))
        cancelled = asyncio.ensure_future(collect(llm.generate("ab" * 3000, GREEDY, "cancelled")))
        await asyncio.sleep(0.01)
        with pytest.raises(RequestError, match="request_id"):
            await anext(llm.generate("ab" * 3000, GREEDY, "long"))
        await llm.abort("long")
        cancelled.cancel()
        tokenizer.hold.set()
        (output,) = await task
        assert output.finished
        assert [item.finish_reason for item in output.outputs] == ["abort", "abort"]
        assert executor.num_steps == 0
        await asyncio.gather(cancelled, return_exceptions=True)
        await check_empty(llm)


async def test_requests_that_end_at_random_leave_nothing_behind() -> None:
    chance = random.Random(1)
    executor = HeldExecutor(num_blocks=40)  # not enough for all that run: some are preempted
    executor.before_step = lambda number: time.sleep(0.0002)
    async with make(executor, max_num_seqs=6) as llm:

        async def one(number: int) -> None:
            ids = [chance.randrange(2, VOCAB) for _ in range(chance.randrange(1, 30))]
            params = SamplingParams(
                n=chance.randrange(1, 4), seed=number, max_tokens=chance.randrange(1, 20), ignore_eos=True
            )
            fate = chance.choice(("finish", "finish", "abort", "close", "cancel"))
            life = chance.random() * 0.03
            outputs = llm.generate({"prompt_token_ids": ids}, params, f"r{number}")
            if fate == "finish":
                assert_alone(await final(outputs), ids, params)
            elif fate == "abort":
                task = asyncio.ensure_future(final(outputs))
                await asyncio.sleep(life)
                await llm.abort(f"r{number}")
                last = await task
                assert last.finished
            elif fate == "close":
                async for _ in outputs:
                    if chance.random() < 0.3:
                        break
                await outputs.aclose()
            else:
                task = asyncio.ensure_future(final(outputs))
                await asyncio.sleep(life)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        await asyncio.gather(*(one(number) for number in range(120)))
        await check_empty(llm)
        assert len(asyncio.all_tasks()) == 1


# ---- several loops, loops that are blocked or gone -----------------------------------------------------


async def test_several_event_loops_share_the_batches() -> None:
    executor = slow()
    answers: dict[int, tuple[RequestOutput, ...]] = {}
    async with make(executor) as llm:

        def work(number: int) -> None:
            async def both() -> tuple[RequestOutput, ...]:
                return await asyncio.gather(
                    final(llm.generate("abc", GREEDY)), final(llm.generate("a" * (number + 1), GREEDY))
                )

            answers[number] = asyncio.run(both())

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join, WAIT)
        for number in range(4):
            assert_alone(answers[number][0], [2, 3, 4], GREEDY)
            assert_alone(answers[number][1], [2] * (number + 1), GREEDY)
        await check_empty(llm)


async def test_a_blocked_loop_holds_nobody_up_and_is_called_once() -> None:
    executor = slow()
    calls = []
    async with make(executor) as llm:
        loop: Any = asyncio.get_running_loop()
        genuine = loop.call_soon_threadsafe

        def counted(*arguments: Any, **more: Any) -> Any:
            calls.append(arguments)
            return genuine(*arguments, **more)

        outputs = llm.generate("abc", DELTA)
        first = await anext(outputs)
        loop.call_soon_threadsafe = counted
        answers: list[RequestOutput] = []
        other = threading.Thread(
            target=lambda: answers.append(asyncio.run(final(llm.generate("ba", GREEDY))))
        )
        other.start()
        other.join(WAIT)  # blocks this loop
        assert_alone(answers[0], [3, 2], GREEDY)
        assert len(calls) == 1
        rest = await collect(outputs)
        loop.call_soon_threadsafe = genuine
        assert len(rest) <= 2
        for piece in rest:
            first = join_deltas(first, piece)
        assert_alone(first, [2, 3, 4], DELTA)


def test_the_requests_of_a_loop_that_is_gone_are_ended() -> None:
    llm = make(slow())
    loop = asyncio.new_event_loop()
    outputs = llm.generate("abc", ENDLESS)
    loop.run_until_complete(anext(outputs))
    loop.close()  # without shutdown_asyncgens: nobody will ever ask again
    deadline = time.monotonic() + WAIT
    while llm._thread._mail and time.monotonic() < deadline:
        time.sleep(0.005)
    assert llm._thread.call(lambda engine: engine.pool.num_free == engine.pool.num_blocks).result(WAIT)
    assert_alone(asyncio.run(final(llm.generate("ba", GREEDY))), [3, 2], GREEDY)
    llm.close()
    del outputs


# ---- state and end -----------------------------------------------------------------------------------


async def test_a_failure_of_the_engine_reaches_every_reader() -> None:
    cause = RuntimeError("the executor broke")
    executor = HeldExecutor(held=True, fail_at=(3, cause))
    llm = make(executor)
    await llm.check_health()
    assert (llm.is_running, llm.errored, llm.dead_error) == (True, False, None)
    tasks = [asyncio.ensure_future(collect(llm.generate("abc", GREEDY))) for _ in range(5)]
    await asyncio.sleep(0.01)
    executor.let_go()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        assert isinstance(result, EngineDeadError)
        assert result.__cause__ is cause
    assert len({id(result) for result in results}) == 5
    while not executor.num_closed:
        await asyncio.sleep(0.001)
    assert (llm.is_running, llm.errored) == (False, True)
    assert isinstance(llm.dead_error, EngineDeadError)
    with pytest.raises(EngineDeadError, match="the executor broke"):
        await llm.check_health()
    with pytest.raises(EngineDeadError, match="the executor broke"):
        await anext(llm.generate("a", GREEDY))
    await llm.abort("nobody")
    await llm.aclose()
    assert executor.num_closed == 1
    assert llm.errored


async def test_closing_ends_the_readers() -> None:
    executor = HeldExecutor(held=True)
    llm = make(executor)
    tokenizer: Any = await llm.get_tokenizer()
    tasks = [asyncio.ensure_future(collect(llm.generate("abc", GREEDY))) for _ in range(3)]
    await asyncio.sleep(0.01)
    tokenizer.hold = threading.Event()
    tasks.append(asyncio.ensure_future(collect(llm.generate("abc" * 3000, GREEDY))))
    await asyncio.sleep(0.01)
    closing = asyncio.ensure_future(llm.aclose())
    await asyncio.sleep(0.01)
    assert not closing.done()  # a step is under way, and the loop runs on
    assert not llm.is_running
    executor.let_go()
    tokenizer.hold.set()
    await closing
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, EngineDeadError)
        assert str(result) == "the engine is closed"
    assert executor.num_closed == 1
    assert not llm.errored
    assert engine_threads() == []
    llm.close()
    llm.shutdown()
    with pytest.raises(EngineDeadError, match="closed"):
        await anext(llm.generate("a", GREEDY))
    with pytest.raises(EngineDeadError, match="closed"):
        await llm.check_health()
    await llm.abort("nobody")


async def test_an_async_llm_that_is_thrown_away_gives_its_memory_back() -> None:
    executor = HeldExecutor()
    llm = make(executor)
    await final(llm.generate("abc", GREEDY))
    thread = llm._thread._thread
    del llm
    gc.collect()
    await asyncio.to_thread(thread.join, WAIT)
    assert executor.num_closed == 1


async def test_an_idle_async_llm_takes_no_processor_time() -> None:
    async with make() as llm:
        await final(llm.generate("abc", GREEDY))
        before = time.process_time()
        await asyncio.sleep(0.5)
        assert time.process_time() - before < 0.005


def test_a_bad_option_is_named() -> None:
    with pytest.raises(RequestError, match=r"^kv_cache_dtype"):
        AsyncLLM("nowhere.gguf", kv_cache_dtype="fp8")


@pytest.mark.model
async def test_the_default_model_answers_alike_alone_and_in_company(default_model_path: Path) -> None:
    prompts = ["The capital of France is", "Once upon a time", "def fibonacci(n):", "1, 2, 3, 4,"]
    params = SamplingParams(temperature=0, max_tokens=12)
    options: dict[str, Any] = {"kv_cache_tokens": 2048, "max_num_seqs": 8}
    with LLM(default_model_path, **options) as llm:
        alone = [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]
    async with AsyncLLM(default_model_path, **options) as llm:
        outputs = await asyncio.gather(*(final(llm.generate(prompt, params)) for prompt in prompts))
        assert [output.outputs[0].token_ids for output in outputs] == alone
        assert outputs[0].outputs[0].text.startswith(" Paris.")
        await check_empty(llm)
