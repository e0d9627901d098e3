"""Prometheus metrics: exact counts, in every state of a request, of several engines, while they run."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from api_fakes import WAIT, ApiTokenizer, HeldExecutor, make_engine
from fake_executor import (
    FakeExecutor,
    steps_ahead,  # noqa: F401
)
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from scrapes import OPENMETRICS, Scrape

from fastllm import LLM, AsyncLLM, PoolingParams, RequestError, SamplingParams
from fastllm.engine.engine import Engine, EngineConfig
from fastllm.engine.hooks import EngineHook, Generated, HookTable, Step, Tokens
from fastllm.errors import EngineDeadError
from fastllm.outputs import RequestMetrics, RequestOutput
from fastllm.sampling_params import RequestOutputKind
from fastllm.serve.metric_families import FAMILIES, token_bounds
from fastllm.serve.metrics import EngineMetrics, PrometheusHook
from fastllm.serve.prometheus_hook import Histogram, worst

ENDLESS = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)


def answer(tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **more)


class Clock:
    """A second passes with each look at it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class Watched:
    """An engine and its metrics."""

    def __init__(self, executor: FakeExecutor | None = None, **config: Any) -> None:
        self.metrics = EngineMetrics(CollectorRegistry())
        self.hook = PrometheusHook(self.metrics, "m")
        self.engine = make_engine(executor or FakeExecutor(), [self.hook], **config)
        self.outputs: dict[str, RequestOutput] = {}

    def scrape(self) -> Scrape:
        scrape = Scrape(self.metrics.registry)
        scrape.check()
        return scrape

    def value(self, name: str, **labels: str) -> float:
        return self.scrape().value(name, **labels)

    def add(self, name: str, prompt: list[int], params: SamplingParams | PoolingParams) -> None:
        self.engine.add_request(name, prompt, params)

    def step(self) -> None:
        for output in self.engine.step():
            assert isinstance(output, RequestOutput)
            self.outputs[output.request_id] = output

    def run(self) -> None:
        while self.engine.has_unfinished():
            self.step()
            self.check_gauges()

    def check_gauges(self) -> None:
        """They are what the engine says."""
        scrape, load = self.scrape(), self.engine.load()
        assert scrape.value("num_requests_running") == load.num_running
        assert scrape.value("num_requests_waiting") == load.num_waiting
        assert scrape.value("kv_cache_usage_perc") == load.kv_usage

    def check_idle(self) -> None:
        self.check_gauges()
        scrape = self.scrape()
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert scrape.value(name) == 0
        assert self.hook._live == {}


# ---- counts ----------------------------------------------------------------------------------------------


def test_a_real_engine_counts_exactly(tmp_path: Path) -> None:
    """Acceptance: first tokens = ends = successes, and the tokens are those that came out."""
    metrics = EngineMetrics()
    hook = PrometheusHook(metrics, "tiny")
    shared = tiny.tokens(32, seed=9)
    prompts = [[*shared, *tiny.tokens(3 + i, seed=i)] for i in range(6)]
    counts = [1, 2, 5, 9, 3, 4]
    params = [answer(count, n=2 if i == 3 else 1) for i, count in enumerate(counts)]
    with LLM(
        tiny.write("hf", tmp_path), kv_cache_tokens=1024, threads=1, progress=False, hooks=[hook]
    ) as llm:
        first = llm.generate([{"prompt_token_ids": prompts[0]}], params[0])
        rest = llm.generate([{"prompt_token_ids": item} for item in prompts[1:]], params[1:])
        scrape = Scrape(metrics.registry)
    scrape.check()
    outputs = [*first, *rest]
    made = [sum(len(item.token_ids) for item in output.outputs) for output in outputs]
    assert made == [1, 2, 5, 18, 3, 4]
    for name in (
        *("time_to_first_token_seconds_count", "e2e_request_latency_seconds_count"),
        *("request_prompt_tokens_count", "request_generation_tokens_count", "request_params_n_count"),
        *("request_queue_time_seconds_count", "request_prefill_time_seconds_count"),
        *("request_decode_time_seconds_count", "request_inference_time_seconds_count"),
        *("request_params_max_tokens_count", "request_max_num_generation_tokens_count"),
        "request_prefill_kv_computed_tokens_count",
    ):
        assert scrape.value(name) == 6, name
    assert scrape.value("request_success_total") == 6
    assert scrape.value("request_success_total", finished_reason="length") == 6
    assert scrape.value("prompt_tokens_total") == sum(map(len, prompts))
    cached = sum(output.num_cached_tokens for output in outputs)
    assert cached == 5 * 32
    assert scrape.value("prompt_tokens_cached_total") == scrape.value("prefix_cache_hits_total") == cached
    assert scrape.value("prefix_cache_queries_total") == sum(map(len, prompts))
    assert scrape.value("prompt_tokens_by_source_total", source="local_cache_hit") == cached
    assert scrape.value("request_prompt_tokens_sum") == sum(map(len, prompts))
    assert scrape.value("request_prefill_kv_computed_tokens_sum") == sum(map(len, prompts)) - cached
    assert scrape.value("generation_tokens_total") == scrape.value("request_generation_tokens_sum") == 33 + 0
    assert scrape.value("request_max_num_generation_tokens_sum") == sum(counts)
    assert scrape.value("request_params_max_tokens_sum") == sum(counts)
    assert scrape.value("request_params_n_sum") == 7
    # One interval for each token of a sequence after its first.
    assert scrape.value("inter_token_latency_seconds_count") == sum(made) - 7
    assert scrape.value("request_time_per_output_token_seconds_count") == 5
    # All that was computed: the prompts' uncached tokens, and every token but a sequence's last, whose
    # successor nobody wanted.
    computed = sum(map(len, prompts)) - cached + sum(made) - 7
    assert scrape.value("iteration_tokens_total_sum") == computed
    assert scrape.value("cache_config_info", block_size="16", num_gpu_blocks="64") == 1
    assert scrape.value("num_requests_running") == scrape.value("kv_cache_usage_perc") == 0
    assert scrape.value("process_resident_memory_bytes") > 0


def test_times_are_those_of_the_requests() -> None:
    clock = Clock()
    metrics = EngineMetrics(CollectorRegistry())
    engine = Engine(
        FakeExecutor(),
        ApiTokenizer(),
        EngineConfig(max_model_len=60, max_num_batched_tokens=8),
        [PrometheusHook(metrics, "m")],
        clock=clock,
    )
    outputs = []
    for name, length, tokens in (("a", 20, 5), ("b", 3, 4), ("c", 2, 1)):
        engine.add_request(name, [2] * length, answer(tokens, detokenize=False))
    while engine.has_unfinished():
        outputs += engine.step()
    times = {output.request_id: output.metrics for output in outputs if output.finished}
    scrape = Scrape(metrics.registry)

    def total(of: Callable[[RequestMetrics], float | None]) -> float:
        return sum(of(item) or 0.0 for item in times.values() if item is not None)

    assert len(times) == 3
    assert scrape.value("time_to_first_token_seconds_sum") == total(lambda item: item.time_to_first_token)
    assert scrape.value("e2e_request_latency_seconds_sum") == total(lambda item: item.e2e_latency)
    assert scrape.value("request_queue_time_seconds_sum") == total(lambda item: item.queue_time)
    assert scrape.value("request_prefill_time_seconds_sum") == total(lambda item: item.prefill_time)
    assert scrape.value("request_decode_time_seconds_sum") == total(lambda item: item.decode_time)
    assert scrape.value("inter_token_latency_seconds_sum") == total(lambda item: item.decode_time)
    assert scrape.value("request_inference_time_seconds_sum") == total(
        lambda item: (item.prefill_time or 0.0) + (item.decode_time or 0.0)
    )
    assert scrape.value("request_time_per_output_token_seconds_sum") == pytest.approx(
        sum((times[name].decode_time or 0.0) / (tokens - 1) for name, tokens in (("a", 5), ("b", 4)))
    )


def test_a_preemption_counts_no_prompt_and_no_first_token_twice() -> None:
    watched = Watched(FakeExecutor(num_blocks=8))
    prompts = {name: [2 + i] * 9 for i, name in enumerate("abc")}
    for name, prompt in prompts.items():
        watched.add(name, prompt, answer(15))
    watched.run()
    scrape = watched.scrape()
    assert scrape.value("num_preemptions_total") > 0
    assert scrape.value("prompt_tokens_total") == scrape.value("prefix_cache_queries_total") == 27
    assert scrape.value("generation_tokens_total") == 45
    assert scrape.value("time_to_first_token_seconds_count") == scrape.value("request_success_total") == 3
    assert scrape.value("inter_token_latency_seconds_count") == 42
    assert scrape.value("iteration_tokens_total_sum") > 27 + 45 - 3  # what was computed again is work
    watched.check_idle()


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_tokens_after_a_stop_string_are_not_counted(kind: RequestOutputKind) -> None:
    """Guesses bring several tokens at once; those after the stop string were never answered."""
    text = [2, 3, 4, 12] * 12
    executor = FakeExecutor(pick=lambda row: text[row.position + 1])
    watched = Watched(executor, num_speculative_tokens=8)
    watched.add("stop", text[:8], answer(30, stop="xabcxabcx", output_kind=kind))
    watched.add("none", text[:8], answer(30, output_kind=kind))
    seen = {"stop": 0, "none": 0}
    while watched.engine.has_unfinished():
        for output in watched.engine.step():
            assert isinstance(output, RequestOutput)
            count = len(output.outputs[0].token_ids)
            name = output.request_id
            seen[name] = seen[name] + count if kind is RequestOutputKind.DELTA else count
    scrape = watched.scrape()
    assert scrape.value("generation_tokens_total") == sum(seen.values())
    assert scrape.value("request_generation_tokens_sum") == sum(seen.values())
    assert seen["none"] == 30
    assert 0 < seen["stop"] < 30
    accepted = scrape.value("spec_decode_num_accepted_tokens_total")
    assert 0 < accepted <= scrape.value("spec_decode_num_draft_tokens_total")
    assert scrape.value("spec_decode_num_accepted_tokens_per_pos_total") == accepted
    drafts = scrape.value("spec_decode_num_drafts_total")
    places = [
        scrape.value("spec_decode_num_accepted_tokens_per_pos_total", position=str(place))
        for place in range(8)
    ]
    assert places == sorted(places, reverse=True)
    assert places[0] <= drafts
    assert watched.engine.scheduler.num_accepted_tokens == accepted


def test_without_guesses_there_are_no_series_of_them() -> None:
    watched = Watched()
    watched.add("a", [2, 3], answer(3))
    watched.run()
    assert not watched.scrape().has("spec_decode_num_drafts_total")
    assert not watched.scrape().has("lora_requests_info")


def test_embeddings_have_no_tokens() -> None:
    watched = Watched()
    watched.add("a", [2] * 9, PoolingParams())
    while watched.engine.has_unfinished():
        watched.engine.step()
    scrape = watched.scrape()
    assert scrape.value("request_success_total", finished_reason="stop") == 1
    assert scrape.value("e2e_request_latency_seconds_count") == 1
    assert scrape.value("request_prefill_time_seconds_count") == 1
    assert scrape.value("time_to_first_token_seconds_count") == 0
    assert scrape.value("request_params_max_tokens_count") == 0
    assert scrape.value("generation_tokens_total") == 0
    assert scrape.value("prompt_tokens_total") == 9
    watched.check_idle()


def test_an_error_is_counted_as_one() -> None:
    picks = itertools.chain([2, -1], itertools.repeat(3))
    watched = Watched(FakeExecutor(pick=lambda row: next(picks)))
    watched.add("a", [2, 3], answer(9))
    watched.run()
    assert watched.value("request_success_total", finished_reason="error") == 1
    assert watched.value("generation_tokens_total") == 1
    watched.check_idle()


def test_adapters_are_named_while_their_requests_are_there(tmp_path: Path) -> None:
    watched = Watched(max_num_seqs=1)
    for name in ("one", "two"):
        path = tmp_path / name
        path.write_text(name)
        watched.engine.add_adapter(name, watched.engine.adapters.read(path))
    for name in ("one", "two"):
        watched.engine.add_request(name, [2, 3], answer(4), adapter=name)
    watched.step()
    labels = {"running_lora_adapters": "one", "waiting_lora_adapters": "two", "max_lora": "8"}
    assert abs(watched.value("lora_requests_info", **labels) - time.time()) < 60
    watched.run()
    assert watched.scrape().value("lora_requests_info", running_lora_adapters="", waiting_lora_adapters="")


# ---- ends in every state ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("steps", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("others", [0, 2])
def test_an_abort_takes_gauges_back_in_every_state(n: int, steps: int, others: int) -> None:
    """Queued, within the prompt (20 tokens, 8 a step), decoding, before the last token."""
    watched = Watched(max_num_batched_tokens=8, max_num_seqs=4)
    for i in range(others):
        watched.add(f"other {i}", [3 + i] * 5, answer(40))
    watched.add("a", [2] * 20, answer(8, n=n))
    for _ in range(steps):
        watched.step()
    assert watched.engine.has_unfinished()
    names = watched.engine.request_ids
    for name in names:
        watched.engine.abort(name)
        watched.check_gauges()
    watched.check_idle()
    watched.run()
    watched.check_idle()
    scrape = watched.scrape()
    assert scrape.value("request_success_total", finished_reason="abort") == len(names)
    assert scrape.value("request_success_total") == others + 1
    ended = others + 1 - len(names)
    assert scrape.value("e2e_request_latency_seconds_count") == ended
    assert scrape.value("request_generation_tokens_count") == ended


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("event", ["on_queued", "on_scheduled", "on_first_token", "on_generated", "on_step"])
def test_an_abort_from_another_hook(event: str, first: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It hears of the request before, or after; with a step in flight, or not."""

    class Ender(EngineHook):
        pass

    def end(self: EngineHook, event: Any) -> None:
        for name in engine.request_ids:
            engine.abort(name)

    setattr(Ender, event, end)
    metrics = EngineMetrics(CollectorRegistry())
    hooks = [Ender(), PrometheusHook(metrics, "m")]
    engine = make_engine(FakeExecutor(), hooks if first else hooks[::-1])
    for name in "ab":
        engine.add_request(name, [2] * 6, answer(9))
    while engine.has_unfinished():
        engine.step()
    scrape = Scrape(metrics.registry)
    scrape.check()
    assert scrape.value("request_success_total", finished_reason="abort") == 2
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert scrape.value(name) == 0
    assert caplog.records == []
    assert metrics._hooks[("m", "0")]._live == {}


def test_what_dies_with_the_engine_has_failed() -> None:
    watched = Watched(FakeExecutor(fail_at=(2, RuntimeError("broken"))))
    for name in "ab":
        watched.add(name, [2, 3], answer(9))
    with pytest.raises(EngineDeadError):
        watched.run()
    scrape = Scrape(watched.metrics.registry)
    scrape.check(died=2)
    assert scrape.value("request_success_total", finished_reason="error") == 2
    assert scrape.value("num_requests_running") == scrape.value("kv_cache_usage_perc") == 0
    assert watched.hook._live == {}


params = st.builds(
    answer,
    st.integers(1, 12),
    n=st.integers(1, 3),
    stop=st.sampled_from([None, "ab", "b"]),
    output_kind=st.sampled_from(list(RequestOutputKind)),
)


@given(
    st.lists(st.tuples(st.lists(st.integers(2, 5), min_size=1, max_size=9), params), min_size=1, max_size=5),
    st.integers(5, 12),
    st.sampled_from([0, 4]),
    st.data(),
)
def test_every_history_adds_up(
    requests: list[tuple[list[int], SamplingParams]], blocks: int, guesses: int, data: st.DataObject
) -> None:
    """Whatever is preempted, stopped, guessed and aborted."""
    watched = Watched(
        FakeExecutor(num_blocks=blocks), max_num_batched_tokens=6, num_speculative_tokens=guesses
    )
    ended: dict[str, tuple[int, str]] = {}
    counts: dict[str, int] = {}
    for i, (prompt, asked) in enumerate(requests):
        watched.add(str(i), prompt, asked)
    before = watched.scrape()
    while watched.engine.has_unfinished():
        if watched.engine.request_ids and data.draw(st.integers(0, 9)) == 0:
            watched.engine.abort(watched.engine.request_ids[0])
        for output in watched.engine.step():
            assert isinstance(output, RequestOutput)
            name, delta = output.request_id, requests[int(output.request_id)][1].output_kind
            count = sum(len(item.token_ids) for item in output.outputs)
            counts[name] = counts.get(name, 0) + count if delta is RequestOutputKind.DELTA else count
            if output.finished:
                reasons = [item.finish_reason for item in output.outputs]
                aborted = output.metrics is not None and "abort" in reasons
                ended[name] = (counts[name], "abort" if aborted else "")
        watched.check_gauges()
        now = watched.scrape()
        for old, new in zip(before, now, strict=True):
            assert (old.name, old.labels) == (new.name, new.labels)
            if old.name.endswith(("_total", "_count", "_bucket", "_sum")):
                assert new.value >= old.value
        before = now
    watched.check_idle()
    assert len(ended) == len(requests)
    aborts = sum(reason == "abort" for _, reason in ended.values())
    assert before.value("request_success_total", finished_reason="abort") == aborts
    assert before.value("request_success_total") == len(requests)
    assert before.value("generation_tokens_total") == sum(count for count, _ in ended.values())
    if not aborts:
        assert before.value("time_to_first_token_seconds_count") == len(requests)
        assert before.value("prompt_tokens_total") == sum(len(prompt) for prompt, _ in requests)
        assert before.value("prefix_cache_queries_total") == sum(len(prompt) for prompt, _ in requests)


# ---- several engines, and scrapes while they run -----------------------------------------------------------


async def test_two_models_that_come_and_go_under_scrapes() -> None:
    metrics = EngineMetrics(CollectorRegistry())
    stop = threading.Event()
    failures: list[BaseException] = []
    scrapes = 0

    def scrape() -> None:
        nonlocal scrapes
        try:
            while not stop.is_set():
                Scrape(metrics.registry, OPENMETRICS if scrapes % 2 else "").check()
                scrapes += 1
        except BaseException as error:
            failures.append(error)

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        hooks = {name: PrometheusHook(metrics, name) for name in ("one", "two")}
        models = {}
        for name, hook in hooks.items():
            executor = HeldExecutor()
            executor.before_step = lambda number: time.sleep(0.001)
            tokenizer: Any = ApiTokenizer()
            models[name] = AsyncLLM._from_parts(make_engine(executor, [hook]), tokenizer)

        async def ask(model: AsyncLLM, count: int) -> None:
            async for _ in model.generate("abc", answer(count)):
                pass

        await asyncio.gather(
            *(ask(models["one"], 5 + i) for i in range(8)), *(ask(models["two"], 9) for _ in range(4))
        )
        now = Scrape(metrics.registry)
        assert now.value("request_success_total", model_name="one") == 8
        assert now.value("request_success_total", model_name="two") == 4
        assert now.value("generation_tokens_total", model_name="one") == sum(range(5, 13))
        assert now.value("generation_tokens_total", model_name="two") == 36

        async def leave() -> None:
            async for _ in models["one"].generate("abc", ENDLESS, "left"):
                break

        await leave()
        await models["one"].aclose()
        gone = Scrape(metrics.registry)
        assert gone.value("num_requests_running", model_name="one") == 0
        assert gone.value("request_success_total", model_name="one", finished_reason="abort") == 1
        hooks["one"].close()
        hooks["one"].close()
        left = Scrape(metrics.registry, "")
        assert not [sample for sample in left if sample.labels.get("model_name") == "one"]
        assert 'model_name="one"' not in left.text
        assert left.value("request_success_total", model_name="two") == 4
        PrometheusHook(metrics, "one").close()  # the name is free again
        await models["two"].aclose()
    finally:
        stop.set()
        await asyncio.to_thread(scraper.join, WAIT)
    assert not failures
    assert scrapes > 3


def test_a_name_belongs_to_one_open_hook() -> None:
    metrics = EngineMetrics(CollectorRegistry())
    hook = PrometheusHook(metrics, "m")
    with pytest.raises(RequestError, match="model_name"):
        PrometheusHook(metrics, "m", 0)
    other = PrometheusHook(metrics, "m", 1)
    hook.close()
    again = PrometheusHook(metrics, "m")
    hook.close()  # no longer its own
    assert set(metrics._hooks.values()) == {other, again}


def test_nothing_is_said_of_an_engine_that_is_not_there() -> None:
    metrics = EngineMetrics(CollectorRegistry())
    PrometheusHook(metrics, "m")
    assert list(Scrape(metrics.registry)) == []


def test_a_hook_may_go_from_one_engine_to_the_next() -> None:
    watched = Watched()
    watched.add("a", [2, 3], answer(3))
    watched.run()
    watched.engine.close()
    watched.engine = make_engine(FakeExecutor(num_blocks=16), [watched.hook], max_model_len=40)
    assert watched.value("generation_tokens_total") == 0
    assert watched.value("cache_config_info", num_gpu_blocks="16") == 1
    watched.add("a", [2, 3], answer(4))
    watched.run()
    assert watched.value("generation_tokens_total") == 4


# ---- the format ------------------------------------------------------------------------------------------


def test_both_formats_say_the_same() -> None:
    watched = Watched(num_speculative_tokens=4)
    watched.add("a", [2, 3, 2, 3], answer(9))
    watched.run()
    text = Scrape(watched.metrics.registry, "")
    assert text.content_type.startswith("text/plain")
    openmetrics = Scrape(watched.metrics.registry, OPENMETRICS)
    assert openmetrics.content_type.startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")
    for scrape in (text, openmetrics):
        scrape.check()
    assert {(item.name, tuple(sorted(item.labels.items())), item.value) for item in text} == {
        (item.name, tuple(sorted(item.labels.items())), item.value) for item in openmetrics
    }
    for name in ("# TYPE fastllm:generation_tokens_total counter", "fastllm:iteration_tokens_total_bucket{"):
        assert name in text.text


PROMETHEUS_2 = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75"
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)


def test_names_have_their_colon_whatever_is_asked_for() -> None:
    watched = Watched()
    asked = [
        f"{kind};version={version}{escaping}"
        for kind in ("text/plain", "application/openmetrics-text")
        for version in ("0.0.4", "1.0.0")
        for escaping in ("", ";escaping=underscores", ";escaping=values", ";escaping=dots")
    ]
    for accept in (*asked, PROMETHEUS_2, PROMETHEUS_3, "", "*/*"):
        scrape = Scrape(watched.metrics.registry, accept)
        assert scrape.has("fastllm:num_requests_running"), accept
        assert all(sample.name.startswith("fastllm:") for sample in scrape)


def test_names_are_vllms() -> None:
    """Those of the research notes, word by word, that are not said to be left out."""
    names = {family.name for family in FAMILIES}
    assert names >= {
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"),
        *("lora_requests_info", "prompt_tokens", "generation_tokens", "prefix_cache_queries"),
        *("prefix_cache_hits", "num_preemptions", "request_success", "spec_decode_num_drafts"),
        *("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"),
        *("spec_decode_num_accepted_tokens_per_pos", "time_to_first_token_seconds"),
        *("inter_token_latency_seconds", "request_time_per_output_token_seconds"),
        *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"),
        *("request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens"),
        *("request_generation_tokens", "request_params_n", "request_params_max_tokens"),
        *("request_max_num_generation_tokens", "iteration_tokens_total"),
        "request_prefill_kv_computed_tokens",
    }
    assert len(names) == len(FAMILIES)


@given(st.lists(st.integers(0, 60).map(lambda value: value / 4)), st.lists(st.integers(1, 9), max_size=4))
def test_a_histogram_counts_as_a_sorted_list_would(values: list[float], times: list[int]) -> None:
    bounds = (0.5, 1.0, 2.5, 10.0)
    histogram = Histogram(bounds)
    repeated = []
    for i, value in enumerate(values):
        count = times[i % len(times)] if times else 1
        histogram.observe(value, count)
        repeated += [value] * count
    buckets, total = histogram.cumulated()
    assert total == sum(repeated)
    assert buckets == [
        *((str(bound), sum(value <= bound for value in repeated)) for bound in bounds),
        ("+Inf", len(repeated)),
    ]


@pytest.mark.parametrize(
    ("length", "bounds"), [(1, (1,)), (100, (1, 2, 5, 10, 20, 50, 100)), (4, (1, 2)), (9, (1, 2, 5))]
)
def test_bounds_of_token_counts(length: int, bounds: tuple[float, ...]) -> None:
    assert token_bounds(length) == bounds


def test_the_worst_end_is_said_of_a_request() -> None:
    assert worst(("stop", "stop")) == "stop"
    assert worst(("stop", "length")) == "length"
    assert worst(("length", "error", "stop")) == "error"


# ---- what it costs ---------------------------------------------------------------------------------------


def steps(count: int, hooks: list[EngineHook]) -> Iterator[tuple[Callable[[], None], int]]:
    table = HookTable(hooks)
    for number in range(count):

        def step(now: float = float(number)) -> None:
            if table.generated:
                table.emit(table.generated, Generated(now, 32, {0.02 + now * 1e-6: 31, 0.05: 1}))
            if table.tokens:
                for index in range(32):
                    table.emit(table.tokens, Tokens(now, "request", index, 1))
            numbers = (0, 32, 32, 32, 4, 100, 256, 0.001, 20, 1000, 100, 0, 0, 0, 0, 0, 0, 0, ())
            table.emit(table.step, Step(now, 0.01, *numbers))

        yield step, number


def test_the_cost_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Microseconds on the engine's thread for a step of 32 sequences. The bound leaves room for a busy
    machine: the best of many is taken, in processor time."""
    hook = PrometheusHook(EngineMetrics(CollectorRegistry()), "m")
    taken = []
    for step, _ in steps(3000, [hook]):
        before = time.thread_time_ns()
        step()
        taken.append(time.thread_time_ns() - before)
    best, middle = np.percentile(taken, (5, 50)) / 1e3
    with capsys.disabled():
        print(f" {best:.1f} us (p5), {middle:.1f} us (p50) ", end="")
    assert best < 30
    assert hook._intervals.counts[3] + hook._intervals.counts[1] > 0


def test_deferred_requests_stay_deferred() -> None:
    """The hook does not make the engine look at tokens that nobody reads."""
    watched = Watched()
    watched.add("a", [2, 3], answer(9, output_kind=RequestOutputKind.FINAL_ONLY))
    for _ in range(4):
        watched.step()
    (completion,) = watched.engine._requests["a"].completions
    assert completion.num_tokens == 1
    assert watched.value("generation_tokens_total") == 4
    watched.run()
    assert watched.value("generation_tokens_total") == 9


def test_values_are_finite() -> None:
    watched = Watched()
    watched.add("a", [2], answer(1))
    watched.run()
    assert all(math.isfinite(sample.value) for sample in watched.scrape())
