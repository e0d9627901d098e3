"""Sleep and wake: memory goes back to the system and comes again, and no bit changes. Pausing, too."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from api_fakes import GREEDY, WAIT, ApiTokenizer, HeldExecutor, assert_alone, make_engine
from fake_executor import PIECES, FakeExecutor, expected_embedding

from fastllm import (
    LLM,
    AsyncLLM,
    EngineDeadError,
    ModelFileError,
    PoolingParams,
    RequestError,
    SamplingParams,
)
from fastllm.engine.profile import Profile

SMALL: dict[str, Any] = {"kv_cache_tokens": 1024, "max_num_seqs": 8, "threads": 2}
LONG = SamplingParams(temperature=0.8, seed=3, max_tokens=20, ignore_eos=True, logprobs=3)


class HeldSleeper(HeldExecutor):
    """Can be held between steps, and forgets its cache while it sleeps."""

    level = 0

    def sleep(self, level: int) -> None:
        self.level = level
        self.values[:] = 0
        self.tokens[:] = -1

    def wake(self) -> None:
        self.level = 0

    def run(self, batch: Any) -> Any:
        assert self.level == 0
        return super().run(batch)


def make_llm(executor: FakeExecutor, **config: Any) -> LLM:
    return LLM._from_parts(make_engine(executor, **config), ApiTokenizer())


def make_async(executor: FakeExecutor, **config: Any) -> AsyncLLM:
    return AsyncLLM._from_parts(make_engine(executor, **config), ApiTokenizer())


def ids(text: str) -> list[int]:
    return [PIECES.index(letter.encode()) for letter in text]


def answers(llm: LLM) -> list[Any]:
    """Bits of tokens, log-probabilities and embeddings."""
    prompts: Any = [{"prompt_token_ids": tiny.tokens(1 + 17 * i, seed=i)} for i in range(5)]
    found: list[Any] = [
        (item.token_ids, item.logprobs) for o in llm.generate(prompts, LONG) for item in o.outputs
    ]
    return found + [output.embedding.tobytes() for output in llm.embed(prompts, pooling="mean")]


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_answers_have_the_same_bits_after_waking(kind: str, tmp_path: Path) -> None:
    with LLM(tiny.write(kind, tmp_path), **SMALL) as llm:
        expected = answers(llm)
        length = llm.max_model_len
        for levels in ((1,), (2,), (1, 2), (2, 1), (1, 1)):
            for level in levels:
                llm.sleep(level)
                assert llm.is_sleeping
            with pytest.raises(RequestError) as caught:
                llm.generate("abc", LONG)
            assert caught.value.field == "is_sleeping"
            with pytest.raises(RequestError):
                llm.embed("abc")
            llm.wake_up()
            assert not llm.is_sleeping
            assert llm.max_model_len == length
            assert answers(llm) == expected
        llm.wake_up()  # awake already
        assert answers(llm) == expected


def test_closing_while_it_sleeps(tmp_path: Path) -> None:
    for level in (1, 2):
        llm = LLM(tiny.write("hf", tmp_path), **SMALL)
        llm.sleep(level)
        llm.close()
        for call in (llm.wake_up, llm.sleep, lambda of=llm: of.is_sleeping):
            with pytest.raises(EngineDeadError):
                call()


def test_files_that_are_gone_or_changed_leave_it_asleep(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tiny.save_gguf(tiny.make_model("llama"), path)
    original = path.read_bytes()
    with LLM(path, **SMALL) as llm:
        expected = answers(llm)
        llm.sleep(2)
        path.unlink()
        with pytest.raises(RequestError, match="model"):
            llm.wake_up()
        assert llm.is_sleeping
        tiny.save_gguf(tiny.make_model("llama", seed=1), path)
        with pytest.raises(ModelFileError, match="not the model any more"):
            llm.wake_up()
        path.write_bytes(original[: len(original) // 2])
        with pytest.raises(ModelFileError):
            llm.wake_up()
        with pytest.raises(RequestError, match="is_sleeping"):
            llm.generate("abc", LONG)
        path.write_bytes(original)
        llm.wake_up()
        assert answers(llm) == expected


MEASURE = """
import sys
from pathlib import Path
from fastllm import LLM, SamplingParams

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

with LLM(sys.argv[1], kv_cache_tokens=4096, kv_cache_dtype="fp32", max_num_seqs=8) as llm:
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True)
    def answer():
        return [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in llm.generate(prompts, params)]
    prompts = [{"prompt_token_ids": [i + 5] * 400} for i in range(8)]
    before = answer()
    sizes = [resident()]
    executor = llm._thread._engine._executor
    sizes += [executor.kv_cache_bytes, executor.weight_bytes]
    llm.sleep(1)
    sizes.append(resident())
    llm.sleep(2)
    sizes.append(resident())
    llm.wake_up()
    assert answer() == before
    sizes.append(resident())
print(*sizes)
"""


@pytest.mark.model
def test_memory_goes_back_to_the_system_and_comes_again(default_model_path: Path) -> None:
    """Resident bytes of a process of its own: 8 prompts of 400 tokens fill at least 3/4 of the cache."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(default_model_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    awake, cache, weights, level1, level2, again = map(int, done.stdout.split())
    assert awake - level1 > 0.75 * cache
    assert level1 - level2 > 0.95 * weights
    assert abs(again - awake) < 0.1 * (cache + weights)


# ---- unfinished requests ---------------------------------------------------------------------------------


def start(llm: LLM, texts: list[str]) -> Future[Any]:
    """`generate` in a thread of its own."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(llm.generate(texts, GREEDY))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call).start()
    return future


def test_it_does_not_sleep_over_unfinished_requests() -> None:
    executor = HeldSleeper(held=True)
    with make_llm(executor) as llm:
        work = start(llm, ["abc", "b"])
        executor.wait_for_step()
        asleep = llm._thread.sleep(1, "refuse")
        executor.let_go()
        with pytest.raises(RequestError, match="2 unfinished requests"):
            asleep.result(WAIT)
        for text, output in zip(["abc", "b"], work.result(WAIT), strict=True):
            assert_alone(output, ids(text), GREEDY)
        assert not llm.is_sleeping
        llm.sleep()
        assert llm.is_sleeping


def test_abort_ends_them_and_sleeps() -> None:
    executor = HeldSleeper(held=True)
    with make_llm(executor) as llm:
        work = start(llm, ["abc", "b"])
        executor.wait_for_step()
        asleep = llm._thread.sleep(2, "abort")
        executor.let_go()
        asleep.result(WAIT)
        assert executor.level == 2
        assert [item.outputs[0].finish_reason for item in work.result(WAIT)] == ["abort", "abort"]
        llm.wake_up()
        assert_alone(llm.generate("abc", GREEDY)[0], ids("abc"), GREEDY)


def test_wait_lets_them_end_and_takes_no_more() -> None:
    executor = HeldSleeper(held=True)
    with make_llm(executor) as llm:
        work = start(llm, ["abc", "b"])
        executor.wait_for_step()
        asleep = llm._thread.sleep(1, "wait")
        late = start(llm, ["a"])
        executor.let_go()
        with pytest.raises(RequestError, match="is_sleeping"):
            late.result(WAIT)
        asleep.result(WAIT)
        for text, output in zip(["abc", "b"], work.result(WAIT), strict=True):
            assert_alone(output, ids(text), GREEDY)
        assert llm.is_sleeping
        llm.wake_up()
        assert_alone(llm.generate("a", GREEDY)[0], ids("a"), GREEDY)


def test_closing_ends_the_wait_for_sleep() -> None:
    executor = HeldSleeper(held=True)
    llm = make_llm(executor)
    work = start(llm, ["abc"])
    executor.wait_for_step()
    asleep = llm._thread.sleep(1, "wait")
    llm._thread.stop()
    executor.let_go()
    with pytest.raises(EngineDeadError):
        asleep.result(WAIT)
    with pytest.raises(EngineDeadError):
        work.result(WAIT)
    llm.close()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"level": 0}, "level"),
        ({"level": True}, "level"),
        ({"level": "1"}, "level"),
        ({"mode": "now"}, "mode"),
        ({"mode": None}, "mode"),
    ],
)
def test_arguments_of_sleep(arguments: dict[str, Any], field: str) -> None:
    with make_llm(HeldSleeper()) as llm:
        with pytest.raises(RequestError) as caught:
            llm.sleep(**arguments)
        assert caught.value.field == field
        assert not llm.is_sleeping


def test_an_executor_that_cannot_sleep_says_so() -> None:
    with make_llm(FakeExecutor(num_blocks=128)) as llm:
        with pytest.raises(RequestError, match="an executor that can sleep"):
            llm.sleep()
        assert_alone(llm.generate("abc", GREEDY)[0], ids("abc"), GREEDY)


def test_the_prefix_cache_does_not_outlive_sleep() -> None:
    with make_llm(HeldSleeper()) as llm:
        llm.generate("abcabcabc", GREEDY)
        assert llm.generate("abcabcabc", GREEDY)[0].num_cached_tokens == 8
        llm.sleep()
        llm.wake_up()
        (output,) = llm.generate("abcabcabc", GREEDY)
        assert output.num_cached_tokens == 0
        assert_alone(output, ids("abcabcabc"), GREEDY)
        llm.reset_prefix_cache()
        assert llm.generate("abcabcabc", GREEDY)[0].num_cached_tokens == 0


# ---- AsyncLLM --------------------------------------------------------------------------------------------


async def final(stream: Any) -> Any:
    return [output async for output in stream][-1]


@pytest.mark.asyncio
async def test_the_async_names() -> None:
    async with make_async(HeldSleeper()) as llm:
        assert_alone(await final(llm.generate("abcabcabc", GREEDY)), ids("abcabcabc"), GREEDY)
        await llm.reset_prefix_cache()
        assert (await final(llm.generate("abcabcabc", GREEDY))).num_cached_tokens == 0
        assert (await llm.load()).num_used_blocks == 0
        await llm.sleep(level=2)
        assert await llm.is_sleeping()
        with pytest.raises(RequestError, match="is_sleeping"):
            await final(llm.generate("a", GREEDY))
        await llm.wake_up()
        assert not await llm.is_sleeping()
        profile = await llm.start_profile()
        assert isinstance(profile, Profile)
        with pytest.raises(RequestError, match="profile"):
            await llm.start_profile()
        await final(llm.generate("abc", GREEDY))
        await llm.stop_profile()
        await llm.stop_profile()
        steps = sum(times.steps for times in profile.kinds().values())
        assert steps == 12
        await llm.sleep()  # a profile has come and gone
        await llm.wake_up()
        assert_alone(await final(llm.generate("abc", GREEDY)), ids("abc"), GREEDY)
        assert sum(times.steps for times in profile.kinds().values()) == steps


async def settled(llm: AsyncLLM) -> None:
    """Return when the engine thread has served what it was given until now."""
    for _ in range(3):
        await asyncio.sleep(0)
    await asyncio.wrap_future(llm._thread.call(lambda engine: None))


@pytest.mark.asyncio
@pytest.mark.parametrize("wait", [False, True])
async def test_pausing_aborts_or_waits_and_holds_what_comes(wait: bool) -> None:
    executor = HeldSleeper(held=True)
    async with make_async(executor) as llm:
        running = asyncio.ensure_future(final(llm.generate("abcabcabc", GREEDY, "running")))
        await asyncio.to_thread(executor.wait_for_step)
        pausing = asyncio.ensure_future(llm.pause_generation(wait_for_inflight_requests=wait))
        await asyncio.sleep(0)
        held = [asyncio.ensure_future(final(llm.generate(text, GREEDY))) for text in ("abcabcabc", "b")]
        embedding = asyncio.ensure_future(final(llm.encode("abc", PoolingParams())))
        executor.let_go()
        await pausing
        assert await llm.is_paused()
        output = await running
        if wait:
            assert_alone(output, ids("abcabcabc"), GREEDY)
        else:
            assert output.outputs[0].finish_reason == "abort"
        await settled(llm)
        steps = executor.num_steps
        await llm.pause_generation()  # again
        await asyncio.sleep(0.05)
        assert executor.num_steps == steps
        assert not any(task.done() for task in (*held, embedding))
        await llm.resume_generation()
        assert not await llm.is_paused()
        for text, task in zip(("abcabcabc", "b"), held, strict=True):
            assert_alone(await task, ids(text), GREEDY)
        assert (await held[0]).num_cached_tokens == 0  # the cache was cleared
        goal = expected_embedding(ids("abc"), PoolingParams())
        assert np.array_equal((await embedding).embedding, goal)
        await llm.resume_generation()  # runs already


@pytest.mark.asyncio
async def test_what_is_held_back_can_be_aborted_left_and_closed() -> None:
    llm = make_async(HeldSleeper())
    await llm.pause_generation()
    streams = {name: llm.generate("abc", GREEDY, name) for name in ("aborted", "left", "stays")}
    tasks = {name: asyncio.ensure_future(anext(stream)) for name, stream in streams.items()}
    embedding = asyncio.ensure_future(anext(llm.encode("abc", None, "embedding")))
    await settled(llm)
    await llm.abort(["aborted", "embedding", "unknown"])
    output = await tasks["aborted"]
    assert (output.finished, output.outputs[0].finish_reason) == (True, "abort")
    assert (await embedding).finish_reason == "abort"
    tasks["left"].cancel()
    await settled(llm)
    assert [item.mailbox.request_id for item in llm._thread._held] == ["stays"]
    await llm.aclose()
    with pytest.raises(EngineDeadError):
        await tasks["stays"]
    with pytest.raises(EngineDeadError):
        await llm.resume_generation()


@pytest.mark.asyncio
async def test_a_held_request_that_cannot_be_served_is_refused_at_last() -> None:
    async with make_async(HeldSleeper()) as llm:
        await llm.pause_generation(clear_cache=False)
        bad = asyncio.ensure_future(final(llm.generate({"prompt_token_ids": [99]}, GREEDY)))
        good = asyncio.ensure_future(final(llm.generate("abc", GREEDY)))
        await settled(llm)
        await llm.sleep()
        await llm.wake_up()
        await llm.resume_generation()
        with pytest.raises(RequestError, match="prompt_token_ids"):
            await bad
        assert_alone(await good, ids("abc"), GREEDY)


@pytest.mark.asyncio
async def test_a_call_that_is_cancelled_harms_nobody() -> None:
    executor = HeldSleeper(held=True)
    async with make_async(executor) as llm:
        running = asyncio.ensure_future(final(llm.generate("abc", GREEDY)))
        await asyncio.to_thread(executor.wait_for_step)
        calls = (
            llm.sleep(mode="abort"),
            llm.pause_generation(),
            llm.reset_prefix_cache(),
            llm.is_sleeping(),
            llm.wake_up(),
            llm.start_profile(),
            llm.resume_generation(),
        )
        for call in calls:  # before the engine has heard of them
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(call, 0.01)
        executor.let_go()
        assert_alone(await running, ids("abc"), GREEDY)
        executor.before_step = lambda number: time.sleep(0.02)
        running = asyncio.ensure_future(final(llm.generate("abc", GREEDY)))
        with pytest.raises(asyncio.TimeoutError):  # while it waits
            await asyncio.wait_for(llm.pause_generation(wait_for_inflight_requests=True), 0.05)
        assert_alone(await running, ids("abc"), GREEDY)
        await llm.resume_generation()
        assert_alone(await final(llm.generate("abc", GREEDY)), ids("abc"), GREEDY)
        await llm.check_health()


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["wait_for_inflight_requests", "clear_cache"])
async def test_arguments_of_pause(name: str) -> None:
    async with make_async(HeldSleeper()) as llm:
        with pytest.raises(RequestError) as caught:
            await llm.pause_generation(**{name: 1})
        assert caught.value.field == name
        assert not await llm.is_paused()
