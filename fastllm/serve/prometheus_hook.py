"""The hook that counts what one engine does, in plain numbers; `metrics.py` says how it is used.

Engines speak on their own threads, scrapes come on others. A hook keeps its numbers under one lock, which
every event takes once; a scrape takes it once and copies. So a scrape sees what a prefix of the events says:
no request has ended that was not queued, and no histogram's buckets contradict its count.

Processor time on the engine's thread, on one core of a shared 2-core x86 server: a step of 32 sequences 7 us
(two events made and counted 6.1, the intervals between tokens 0.7), however many tokens it brings, since
`Generated` stands for all of them; a request 13 us, its four events made included. The budget is 30 us a
step, to which `tests/test_metrics.py::test_the_cost_of_a_step` holds it.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fastllm.engine.hooks import (
    Aborted,
    EngineHook,
    Finished,
    FirstToken,
    Generated,
    Queued,
    Scheduled,
    Started,
    Step,
)
from fastllm.serve.metric_families import FAMILIES, token_bounds

if TYPE_CHECKING:
    from fastllm.serve.metrics import EngineMetrics

REASONS = ("stop", "length", "abort", "error")
SOURCES = ("local_compute", "local_cache_hit")


class Histogram:
    """Counts of values by bucket, not cumulated, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value. One that is a bound belongs to the bucket below."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def cumulated(self) -> tuple[list[tuple[str, float]], float]:
        """(bound, values up to it) with infinity last, and the sum."""
        total, buckets = 0, []
        for bound, count in zip((*map(float, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            buckets.append((str(bound), float(total)))
        return buckets, self.sum


Value = float | tuple[list[tuple[str, float]], float]
Samples = Mapping[str, Sequence[tuple[tuple[str, ...], Value]]]


class _Live:
    """What is remembered of an unfinished request."""

    __slots__ = ("adapter", "begun", "max_tokens", "n", "num_prompt_tokens")

    def __init__(self, event: Queued) -> None:
        self.num_prompt_tokens = event.num_prompt_tokens
        self.n = event.n
        self.max_tokens = event.params.max_tokens  # None: not said; 0: it pools
        self.adapter = event.adapter
        self.begun = False


class PrometheusHook(EngineHook):
    """Counts what one engine does. It appears in scrapes from the engine's start until `close`.

    Args:
        metrics: what it is a part of.
        model_name: as clients call the model.
        engine: tells engines of one model apart.

    Raises:
        RequestError: there is an open hook of that name and engine.
    """

    def __init__(self, metrics: EngineMetrics, model_name: str, engine: str | int = 0) -> None:
        self.labels = (model_name, str(engine))
        self._lock = threading.Lock()
        self._started: Started | None = None
        self._reset(1)
        self._metrics = metrics
        metrics.add(self)

    def close(self) -> None:
        """Its series vanish, names and all. May be called again."""
        self._metrics.remove(self)

    def _reset(self, max_model_len: int) -> None:
        self._step: Step | None = None  # the newest; it says how much there was so far
        self._live: dict[str, _Live] = {}
        self._running = self._waiting = self._used = 0
        self._prompt_tokens = self._cached_tokens = self._generated = 0
        self._ended = dict.fromkeys(REASONS, 0)
        self._adapters_seen = False
        self._of = {
            family.name: Histogram(family.bounds or token_bounds(max_model_len))
            for family in FAMILIES
            if family.kind == "histogram"
        }
        self._step_tokens = self._of["iteration_tokens_total"]
        self._intervals = self._of["inter_token_latency_seconds"]

    # ---- each step ---------------------------------------------------------------------------------------

    def on_generated(self, event: Generated) -> None:
        with self._lock:
            self._generated += event.num_tokens
            for seconds, count in event.intervals.items():
                self._intervals.observe(seconds, count)

    def on_step(self, event: Step) -> None:
        with self._lock:
            self._step = event
            self._running = event.num_running
            self._waiting = event.num_waiting
            self._used = event.num_blocks - event.num_free_blocks
            self._step_tokens.observe(event.num_prefill_tokens + event.num_decode_tokens)

    # ---- each request ------------------------------------------------------------------------------------

    def on_started(self, event: Started) -> None:
        with self._lock:
            self._reset(event.config.max_model_len)  # where the hook had another engine before
            self._started = event

    def on_queued(self, event: Queued) -> None:
        with self._lock:
            self._live[event.request_id] = _Live(event)
            self._waiting += event.n
            self._adapters_seen |= event.adapter is not None

    def on_scheduled(self, event: Scheduled) -> None:
        with self._lock:
            self._live[event.request_id].begun = True

    def on_first_token(self, event: FirstToken) -> None:
        with self._lock:
            self._of["time_to_first_token_seconds"].observe(event.since_arrival)
            self._prompt_tokens += self._live[event.request_id].num_prompt_tokens
            self._cached_tokens += event.num_cached_tokens

    def on_finished(self, event: Finished) -> None:
        with self._lock:
            self._leave(event)
            live = self._live.pop(event.request_id)
            self._ended[worst(event.finish_reasons)] += 1
            metrics, of = event.metrics, self._of
            if metrics.first_token_time is None:  # it pools, or ended in error at once
                self._prompt_tokens += live.num_prompt_tokens
                self._cached_tokens += metrics.num_cached_tokens
            end = metrics.finished_time if metrics.last_token_time is None else metrics.last_token_time
            longest = max(event.num_tokens)
            for name, value in (
                ("e2e_request_latency_seconds", metrics.e2e_latency),
                ("request_queue_time_seconds", metrics.queue_time),
                ("request_decode_time_seconds", metrics.decode_time),
                ("request_prompt_tokens", live.num_prompt_tokens),
                ("request_prefill_kv_computed_tokens", live.num_prompt_tokens - metrics.num_cached_tokens),
                ("request_generation_tokens", sum(event.num_tokens)),
                ("request_max_num_generation_tokens", longest),
                ("request_params_n", live.n),
                ("request_params_max_tokens", live.max_tokens or None),
            ):
                if value is not None:
                    of[name].observe(value)
            start = metrics.first_scheduled_time
            if start is not None and end is not None:
                first = end if metrics.first_token_time is None else metrics.first_token_time
                of["request_prefill_time_seconds"].observe(first - start)
                of["request_inference_time_seconds"].observe(end - start)
            if metrics.decode_time is not None and longest > 1:
                of["request_time_per_output_token_seconds"].observe(metrics.decode_time / (longest - 1))

    def on_aborted(self, event: Aborted) -> None:
        with self._lock:
            self._leave(event)
            del self._live[event.request_id]
            self._ended["abort" if event.failure is None else "error"] += 1

    def _leave(self, event: Finished | Aborted) -> None:
        """No step need follow the end of a request, so it says itself what is left."""
        self._running = event.num_running
        self._waiting = event.num_waiting
        if self._started is not None:
            self._used = self._started.num_blocks - event.num_free_blocks

    # ---- scrapes -----------------------------------------------------------------------------------------

    def samples(self) -> Samples:
        """Everything at one moment: by family, label values besides LABELS and the value. Empty before the
        engine is there."""
        with self._lock:
            if self._started is None:
                return {}
            return dict(self._samples(self._started))

    def _samples(self, started: Started) -> Iterator[tuple[str, list[tuple[tuple[str, ...], Value]]]]:
        step, config = self._step, started.config
        for name, number in (
            ("num_requests_running", self._running),
            ("num_requests_waiting", self._waiting),
            ("kv_cache_usage_perc", self._used / started.num_blocks),
            ("kv_offload_blocks", 0 if step is None else step.num_offloaded_blocks),
            ("kv_offload_size_bytes", 0 if step is None else step.offloaded_bytes),
            ("prompt_tokens", self._prompt_tokens),
            ("prompt_tokens_cached", self._cached_tokens),
            ("generation_tokens", self._generated),
            ("prefix_cache_queries", 0 if step is None else step.num_prefix_queries),
            ("prefix_cache_hits", 0 if step is None else step.num_prefix_hits),
            ("kv_offload_restored_tokens", 0 if step is None else step.num_restored_tokens),
            ("num_preemptions", 0 if step is None else step.num_preemptions),
        ):
            yield name, [((), number)]
        cache = (
            str(started.block_size),
            str(started.num_blocks),
            str(config.enable_prefix_caching),
            str(config.kv_offload_bytes),
        )
        yield "cache_config_info", [(cache, 1.0)]
        sources = (self._prompt_tokens - self._cached_tokens, self._cached_tokens)
        yield (
            "prompt_tokens_by_source",
            [((source,), count) for source, count in zip(SOURCES, sources, strict=True)],
        )
        yield "request_success", [((reason,), count) for reason, count in self._ended.items()]
        if self._adapters_seen:
            running = {live.adapter for live in self._live.values() if live.adapter and live.begun}
            waiting = {live.adapter for live in self._live.values() if live.adapter and not live.begun}
            names = (str(config.max_loras), ",".join(sorted(running)), ",".join(sorted(waiting)))
            yield "lora_requests_info", [(names, time.time())]
        if config.num_speculative_tokens:
            yield from self._guesses(config.num_speculative_tokens)
        for name, histogram in self._of.items():
            yield name, [((), histogram.cumulated())]

    def _guesses(self, most: int) -> Iterator[tuple[str, list[tuple[tuple[str, ...], Value]]]]:
        step = self._step
        right = () if step is None else step.num_accepted_at
        yield "spec_decode_num_drafts", [((), 0 if step is None else step.num_drafts)]
        yield "spec_decode_num_draft_tokens", [((), 0 if step is None else step.num_draft_tokens)]
        yield "spec_decode_num_accepted_tokens", [((), 0 if step is None else step.num_accepted_tokens)]
        padded = [*right, *[0] * (most - len(right))]
        yield (
            "spec_decode_num_accepted_tokens_per_pos",
            [((str(position),), count) for position, count in enumerate(padded)],
        )


def worst(finish_reasons: Sequence[str]) -> str:
    """What is said of a request whose sequences ended for these reasons."""
    return next(reason for reason in ("error", "length", "stop") if reason in finish_reasons)
