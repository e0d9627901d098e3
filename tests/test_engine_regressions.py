"""What has gone wrong in engines of this kind: one test for each sort of failure.

Those that other files of tests cover already:

    failure                                                covered by
    -----------------------------------------------------  -------------------------------------------------
    an aborted request goes on: queued, in its prompt,     test_engine: test_abort_gives_a_last_output_...,
    decoding, n > 1, some of the n ended                   test_abort_of_a_request_some_of_whose_...
    ... preempted, in a step in flight, in its last step   test_scheduler: test_abort_in_every_state_...
    ... while its text is tokenized, its adapter read,     test_async_llm: test_abort_while_the_text_...;
    its mask made                                          test_lora: test_aborted_while_its_adapter_...;
                                                           test_structured: test_abort_and_close_while_...
    a reader that goes ends the engine, or its request     test_async_llm: test_a_reader_that_goes_...,
    goes on                                                test_requests_that_end_at_random_...,
                                                           test_the_requests_of_a_loop_that_is_gone_...
    other tokens alone, batched, in chunks, preempted,     test_engine: test_alone_equals_batched_...;
    with a prefix from the cache                           test_one_answer;
                                                           test_prefix_cache: test_no_answer_depends_on_...
    stop strings missed across tokens, or too much text    test_stop; test_engine: test_stop_strings_cut_...
    held back
    characters across tokens; text of the prompt in the    test_detokenizer: test_joined_pieces_...,
    output                                                 test_text_of_the_prompt_never_comes_out
    two first tokens of one request, or no end             test_engine: test_each_request_has_one_first_...
    what is computed again counts as found in the cache    test_prefix_cache: test_a_preempted_sequence_...
    blocks found across salts, models, adapters            test_prefix_cache: test_nothing_is_shared_...,
                                                           test_the_output_says_what_was_cached;
                                                           test_lora_engine: test_blocks_are_shared_...
    blocks found by a hash of other tokens                 test_prefix_cache: test_the_hash_is_a_chain_...,
                                                           test_the_root_keeps_its_parts_apart
    one token over a limit waits for ever                  test_scheduler: test_one_token_over_a_limit_...
    starvation by priorities, or by a target               test_scheduler: test_the_lowest_priority_...;
                                                           test_pacing: test_every_target_serves_everybody
    n, logprobs, stops, biases without a bound             test_sampling_params: test_integers,
                                                           test_stop_strings, test_logit_bias
    a grammar ends or stops the engine, or is ignored      test_structured: test_a_hostile_form_...,
                                                           test_a_panic_or_a_crash_..., test_ten_megabytes_...
    a template runs code, or stops the event loop          test_chat_template; test_async_llm:
                                                           test_a_chat_is_rendered_off_the_event_loop
    a step's failure is not told, or not to everybody      test_engine: test_an_executor_failure_...;
                                                           test_async_llm: test_a_failure_of_the_engine_...
    a detokenizer that fails gives wrong text              test_engine: test_a_detokenizer_that_fails_...
    a hook that raises                                     test_engine: test_a_hook_that_fails_...
    logits that are not numbers                            test_llm: test_logits_that_are_not_numbers_...
    after a refusal nothing is served any more             test_engine: test_a_bad_request_is_refused_alone;
                                                           test_lora: test_bad_adapters_and_the_engine_goes_on
    processor time without work                            test_llm, test_async_llm: test_an_idle_...; for
                                                           real models here
    memory that stays after close()                        test_loading: test_closing_gives_the_memory_back;
                                                           again and again here
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from fake_executor import FakeExecutor, FakeTokenizer, Row
from hypothesis import given
from hypothesis import strategies as st
from test_detokenizer import TOKENIZERS
from test_engine import make, request_strategy, run

from fastllm import (
    LLM,
    AsyncLLM,
    CapacityError,
    PoolingParams,
    RequestError,
    RequestOutputKind,
    SamplingParams,
)
from fastllm.engine.engine import Engine, EngineConfig, EngineLoad

SMALL: dict[str, Any] = {"kv_cache_tokens": 1024, "max_num_seqs": 8, "threads": 2, "progress": False}


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def gauges(load: EngineLoad) -> tuple[int, int, int, float]:
    return load.num_running, load.num_waiting, load.num_used_blocks, load.kv_usage


# ---- aborts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("in_flight", "ahead"), [(False, 0), (True, 0), (False, 1)])
def test_an_abort_at_any_moment_leaves_no_gauge_behind(n: int, in_flight: bool, ahead: int) -> None:
    """Failure: n > 1 goes on, an abort in the last step is lost, gauges never come back to zero. Where steps
    go ahead there is one in flight at every moment."""
    params = SamplingParams(n=n, max_tokens=6, ignore_eos=True, seed=1)
    moments, moment = 0, 0
    while moment <= moments:

        class Aborting(FakeExecutor):
            steps_ahead = ahead

            def run(self, batch: Any) -> Any:
                if in_flight and self.num_steps == moment:  # noqa: B023
                    engine.abort("a")  # noqa: B023
                return super().run(batch)

        engine = make(Aborting(num_blocks=7), max_num_batched_tokens=4, max_num_seqs=2)
        engine.add_request("a", [2] * 6, params)
        assert engine.load().num_waiting == n
        for _ in range(moment):
            engine.step()
        if not in_flight:
            engine.abort("a")
            assert gauges(engine.load()) == (0, 0, 0, 0.0)
        (last,) = engine.step()
        if moments == 0:  # how many there are
            whole = make(FakeExecutor(num_blocks=7), max_num_batched_tokens=4, max_num_seqs=2)
            whole.add_request("a", [2] * 6, params)
            while whole.has_unfinished():
                whole.step()
                moments += 1
            assert moments >= 7
            moments -= 1
        assert last.finished
        assert "abort" in {item.finish_reason for item in last.outputs}
        assert gauges(engine.load()) == (0, 0, 0, 0.0)
        engine.check()
        assert not engine.has_unfinished()
        assert engine.step() == []
        engine.reset_prefix_cache()
        assert engine.load().num_free_blocks == 7
        assert engine.load().num_cached_blocks == 0
        moment += 1


# ---- counts ----------------------------------------------------------------------------------------------


@given(st.lists(request_strategy, min_size=1, max_size=6), st.integers(5, 14), st.integers(1, 4))
def test_each_prompt_is_looked_up_once_and_a_hit_is_reported_as_one(
    requests: list[tuple[list[int], SamplingParams]], blocks: int, seqs: int
) -> None:
    """Failure: what is computed again after a preemption counts as a hit, and with n sequences n times."""
    engine = make(FakeExecutor(num_blocks=blocks), max_num_batched_tokens=6, max_num_seqs=seqs)
    for i, (prompt, params) in enumerate(requests):
        engine.add_request(str(i), prompt, params)
    outputs = [found[-1] for found in run(engine).values()]
    load = engine.load()
    assert load.num_prefix_queries == sum(len(prompt) for prompt, _ in requests)
    assert load.num_prefix_hits == sum(output.num_cached_tokens for output in outputs)
    assert load.num_preemptions == sum(output.metrics.num_preemptions for output in outputs)


# ---- text ------------------------------------------------------------------------------------------------

LETTERS = "aé€😀 日"


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(
    text=st.text(LETTERS, min_size=1, max_size=12),
    broken=st.binary(max_size=3),
    stops=st.lists(st.text(LETTERS, min_size=1, max_size=3), max_size=3),
    prompt=st.binary(min_size=1, max_size=3),
    n=st.integers(1, 2),
)
def test_streamed_text_is_the_whole_text_up_to_the_stop(
    kind: str, text: str, broken: bytes, stops: list[str], prompt: bytes, n: int
) -> None:
    """Failure: text of the prompt in the stream, characters cut in two, stop strings that are missed. Here
    every byte is a token; prompts end within characters, and so may answers."""
    tokenizer: Any = TOKENIZERS[kind]
    offset = 0 if kind == "byte-level" else 3
    answer = [byte + offset for byte in text.encode() + broken]
    given_ids = [97 + offset, *(byte + offset for byte in prompt)]

    def pick(row: Row) -> int:
        return answer[row.position + 1 - len(given_ids)]

    engine = Engine(
        FakeExecutor(num_blocks=128, vocab_size=290, pick=pick),
        tokenizer,
        EngineConfig(max_model_len=200, vocab_size=290, max_num_batched_tokens=5),
    )
    common: dict[str, Any] = {"max_tokens": len(answer), "stop": stops, "n": n, "ignore_eos": True}
    for output_kind in RequestOutputKind:
        engine.add_request(output_kind.name, given_ids, SamplingParams(output_kind=output_kind, **common))
    outputs = run(engine)

    whole = (text.encode() + broken).decode("utf-8", "replace")
    ends = [end for end in range(len(whole) + 1) if any(whole[:end].endswith(stop) for stop in stops)]
    expected = whole
    if ends:
        expected = whole[: ends[0] - max(len(stop) for stop in stops if whole[: ends[0]].endswith(stop))]
    for index in range(n):
        pieces = [item for output in outputs["DELTA"] for item in output.outputs if item.index == index]
        assert "".join(piece.text for piece in pieces) == expected
        assert all("\ufffd" not in piece.text for piece in pieces) or "\ufffd" in whole
        for name in ("CUMULATIVE", "FINAL_ONLY"):
            assert outputs[name][-1].outputs[index].text == expected


# ---- limits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pools", [False, True])
def test_one_token_more_or_less_than_each_limit_is_served_or_refused(pools: bool) -> None:
    """Failure: what is one token over a limit, of the model, the cache or a step, waits for ever. What a
    refusal says would fit, fits."""
    served = refused = 0
    for max_model_len in (7, 8, 9):
        for blocks in (1, 2, 3):
            for budget in (1, 3, 7, 8):
                engine = make(
                    FakeExecutor(num_blocks=blocks), max_model_len=max_model_len,
                    max_num_batched_tokens=budget, max_num_seqs=2,
                )  # fmt: skip
                limits = {max_model_len, 4 * blocks, budget}
                for length in sorted({limit + more for limit in limits for more in (-1, 0, 1)} - {0}):
                    for n, max_tokens in ((1, 1), (1, None), (2, 2)):
                        params: Any = PoolingParams() if pools else SamplingParams(n=n, max_tokens=max_tokens)
                        try:
                            engine.add_request("a", [2] * length, params)
                        except CapacityError as error:
                            would_fit = error.would_fit
                        else:
                            would_fit = length
                        refused += would_fit != length
                        served += would_fit == length
                        if would_fit != length:
                            assert 0 < would_fit < length
                            engine.add_request("a", [2] * would_fit, params)
                        engine.add_request("b", [3], SamplingParams(max_tokens=1))
                        for _ in range(100):
                            engine.step()
                            engine.check()
                            if not engine.has_unfinished():
                                break
                        assert gauges(engine.load()) == (0, 0, 0, 0.0)
    assert min(served, refused) > 50


def test_what_is_said_to_fit_into_memory_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Failure: a cache that does not fit, and no word on what would."""
    path = tiny.write("hf", tmp_path)
    free = 1_000_003
    monkeypatch.setattr("fastllm.executor.cpu.available_memory", lambda: free)

    def refusal(**options: Any) -> CapacityError:
        with pytest.raises(CapacityError) as caught:
            LLM(path, threads=1, **options)
        error = caught.value
        assert f"asked {error.asked} {error.unit}, had {error.had}, would fit {error.would_fit}" in str(error)
        return error

    def served(**options: Any) -> int:
        with caplog.at_level("INFO", "fastllm"), LLM(path, threads=1, **options) as llm:
            (output,) = llm.generate("ab", SamplingParams(max_tokens=3, ignore_eos=True))
            assert len(output.outputs[0].token_ids) == 3
            return int(llm._thread._engine._executor.kv_cache_bytes)

    for options in ({"kv_cache_memory_bytes": 1 << 40}, {"kv_cache_tokens": 1 << 20}):
        error = refusal(**options)
        assert error.had == free
        assert served(kv_cache_memory_bytes=error.would_fit) == error.would_fit
        per_block = refusal(kv_cache_memory_bytes=1).asked  # of one block
        sums = f"KV cache of {error.asked // per_block} blocks x 16 tokens x {per_block // 16} bytes/token"
        assert sums in str(error)
        assert error.would_fit + per_block > free
    assert served(kv_cache_memory_bytes=per_block) == per_block
    error = refusal(kv_cache_tokens=32, max_model_len=200)
    assert (error.asked, error.had, error.unit) == (200, 32, "tokens")
    served(kv_cache_tokens=32, max_model_len=error.would_fit)
    # The arithmetic is in the log of every start.
    assert f"2 blocks x 16 tokens x {per_block // 16} bytes/token in int16" in caplog.text


# ---- the process -----------------------------------------------------------------------------------------


def large(path: Path) -> Path:
    """A model of 40 MiB, which takes some milliseconds for a step of one prompt."""
    model = tiny.make_model("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=2)
    return tiny.save_hf(model, path)


def test_closing_frees_the_memory_and_another_model_can_be_made(tmp_path: Path) -> None:
    """Failure: memory of a model that was closed stays, or there cannot be another one."""
    path = large(tmp_path)
    prompt = {"prompt_token_ids": tiny.tokens(200)}
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    answers, kept = [], []
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(4):
        llm = LLM(path, **SMALL)
        answers.append(llm.generate(prompt, params)[0].outputs[0].token_ids)
        weights = llm._thread._engine._executor.weight_bytes
        during = resident_bytes()
        llm.close()
        kept.append(resident_bytes())
        assert weights > 30 << 20
        assert during - kept[-1] > 0.9 * weights
        assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, files)
    assert kept[-1] - kept[0] < 0.1 * weights
    assert answers == [answers[0]] * 4


def test_a_start_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    """Failure: memory and threads stay where the start fails after the weights were loaded."""
    path = large(tmp_path)
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    kept, errors = [], []
    for _ in range(3):
        with pytest.raises(RequestError, match="hooks") as caught:
            LLM(path, hooks=[object()], **SMALL)  # type: ignore[list-item]
        errors.append(caught)  # and with it the frames that the error has passed
        kept.append(resident_bytes())
    assert kept[-1] - kept[0] < 8 << 20
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


async def test_the_event_loop_turns_while_a_step_computes(tmp_path: Path) -> None:
    """Failure: a step holds up the event loop, and with it whatever else a server does."""
    turns = 0
    during: list[int] = []

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with AsyncLLM(large(tmp_path), max_num_batched_tokens=256, **SMALL) as llm:
        executor = llm._thread._engine._executor
        step = executor._decoder.step

        class Decoder:
            """The decoder, with a count of the loop's turns within a step."""

            def __getattr__(self, name: str) -> Any:
                return getattr(executor_decoder, name)

            def step(self, *arguments: Any) -> Any:
                before = turns
                result = step(*arguments)
                during.append(turns - before)
                return result

        executor_decoder = executor._decoder
        executor._decoder = Decoder()
        turning = asyncio.ensure_future(turn())
        prompt: Any = {"prompt_token_ids": tiny.tokens(200)}
        async for _ in llm.generate(prompt, SamplingParams(max_tokens=2, ignore_eos=True)):
            pass
        turning.cancel()
        executor._decoder = executor_decoder
    assert during[0] > 10, during  # the step of the prompt, far longer than a turn


async def test_an_engine_that_has_worked_takes_no_processor_time(tmp_path: Path) -> None:
    """Failure: a busy processor without a request. Here with the threads of decoder, masks and tokenizer."""
    async with AsyncLLM(tiny.write("hf", tmp_path), speculative_config={"method": "ngram"}, **SMALL) as llm:
        wanted = [SamplingParams(max_tokens=20, n=2), SamplingParams(max_tokens=8, bad_words=["q"])]
        for params in wanted:
            async for _ in llm.generate("the river " * 8, params):
                pass
        left = llm.generate("a", SamplingParams(max_tokens=None))
        await anext(left)
        await left.aclose()
        await asyncio.sleep(0.05)
        begin, used = time.monotonic(), time.process_time()
        await asyncio.sleep(2.0)
        share = (time.process_time() - used) / (time.monotonic() - begin)
    assert share < 0.01, f"{share:.2%}"


def test_a_listener_that_ends_the_process_is_not_swallowed() -> None:
    """Failure: a hook that wants to end the process is ignored, or leaves the engine half way in a step."""
    from fastllm import EngineDeadError
    from fastllm.engine.hooks import EngineHook, Tokens

    class Leaving(EngineHook):
        def on_tokens(self, event: Tokens) -> None:
            raise SystemExit(3)

    engine = Engine(FakeExecutor(), FakeTokenizer(), EngineConfig(max_model_len=60), [Leaving()])
    engine.add_request("a", [2], SamplingParams(max_tokens=2, detokenize=False))
    with pytest.raises(EngineDeadError) as caught:
        engine.step()
    assert isinstance(caught.value.__cause__, SystemExit)
    assert gauges(engine.load()) == (0, 0, 0, 0.0)
