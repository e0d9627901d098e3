"""Scrapes as tests read them: what `render` gives, parsed by Prometheus' own parser."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.samples import Sample

from fastllm.serve.metrics import render

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class Scrape:
    """The samples of one scrape."""

    def __init__(self, registry: CollectorRegistry, accept: str | None = None) -> None:
        """With `accept` as a client gets it; without, what it is made of."""
        self.text = self.content_type = ""
        families: Any = registry.collect()
        if accept is not None:
            body, self.content_type = render(registry, accept)
            self.text = body.decode()
            parse: Any = parse_openmetrics if "openmetrics" in self.content_type else parse_text
            families = parse(self.text)
        self._by_name: dict[str, list[Sample]] = {}
        for family in families:
            for sample in family.samples:
                self._by_name.setdefault(sample.name, []).append(sample)

    def __iter__(self) -> Iterator[Sample]:
        for samples in self._by_name.values():
            yield from samples

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of a name, with or without prefix, that have these labels; an error without
        any."""
        found = [
            sample.value
            for sample in self._named(name)
            if all(sample.labels.get(label) == value for label, value in labels.items())
        ]
        assert found, f"{name} {labels}"
        return math.fsum(found)

    def _named(self, name: str) -> list[Sample]:
        return self._by_name.get(name) or self._by_name.get("fastllm:" + name, [])

    def has(self, name: str) -> bool:
        return bool(self._named(name))

    def check(self, *, died: int = 0) -> None:
        """What holds in every scrape, at whichever moment; of requests, so many died with their engine."""
        by_series: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
        counts: dict[tuple[str, str, str], float] = {}
        for sample in self:
            if not sample.name.startswith("fastllm:"):
                continue
            assert sample.value >= 0, sample
            series = (sample.labels["model_name"], sample.labels["engine"])
            if sample.name.endswith("_bucket"):
                key = (sample.name.removesuffix("_bucket"), *series)
                by_series.setdefault(key, []).append((float(sample.labels["le"]), sample.value))
            elif sample.name.endswith("_count"):
                counts[(sample.name.removesuffix("_count"), *series)] = sample.value
        assert counts.keys() == by_series.keys()
        for key, buckets in by_series.items():
            bounds = [bound for bound, _ in buckets]
            values = [value for _, value in buckets]
            assert bounds == sorted(bounds)
            assert values == sorted(values)
            assert bounds[-1] == math.inf
            assert values[-1] == counts[key]
        for name, engine in {key[1:] for key in counts}:
            at = {"model_name": name, "engine": engine}
            ended = sum(
                self.value("request_success_total", finished_reason=reason, **at)
                for reason in ("stop", "length", "error")
            )
            assert ended - died == self.value("e2e_request_latency_seconds_count", **at)
            assert self.value("prefix_cache_hits_total", **at) <= self.value(
                "prefix_cache_queries_total", **at
            )
            assert self.value("prompt_tokens_cached_total", **at) <= self.value("prompt_tokens_total", **at)
            assert self.value("prompt_tokens_by_source_total", **at) == self.value(
                "prompt_tokens_total", **at
            )
            assert self.value("request_generation_tokens_sum", **at) <= self.value(
                "generation_tokens_total", **at
            )
            assert 0 <= self.value("kv_cache_usage_perc", **at) <= 1
