"""Prometheus metrics of engines: a hook for each, one collector, one registry.

    metrics = EngineMetrics()
    hook = PrometheusHook(metrics, "my-model")
    llm = AsyncLLM(path, hooks=[hook])
    body, content_type = render(metrics.registry, request.headers.get("accept"))
    ...
    llm.close()
    hook.close()  # the model's series vanish

What there is, and what is left out and why: `metric_families.py`; docs/metrics.md for operators. All times
are of the engine's one monotonic clock. A request's time begins when the engine takes it: tokenizing and HTTP
come before, and are in `http_metrics.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

from fastllm.errors import RequestError
from fastllm.serve.extra import missing
from fastllm.serve.http_metrics import HttpMetrics, MetricsMiddleware
from fastllm.serve.metric_families import FAMILIES, LABELS, Family
from fastllm.serve.prometheus_hook import PrometheusHook, Samples

try:
    from prometheus_client import GCCollector, PlatformCollector, ProcessCollector, exposition
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.openmetrics import exposition as openmetrics
    from prometheus_client.registry import Collector, CollectorRegistry
except ImportError as error:
    raise missing("metrics", "prometheus-client", "serve") from error

__all__ = [
    "EngineMetrics",
    "HttpMetrics",
    "MetricsMiddleware",
    "PrometheusHook",
    "open_registry",
    "render",
]

CONTENT_TYPE_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_KINDS: dict[str, type[Any]] = {
    "gauge": GaugeMetricFamily,
    "counter": CounterMetricFamily,
    "histogram": HistogramMetricFamily,
}


def open_registry() -> CollectorRegistry:
    """A registry with what Prometheus' client says of process and interpreter (process_*, python_*)."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


def render(registry: CollectorRegistry, accept_header: str | None) -> tuple[bytes, str]:
    """What a scrape is answered with.

    Args:
        accept_header: the request's Accept; None or one that names neither gets Prometheus' text.

    Returns:
        The body, and its content type: OpenMetrics or Prometheus text.
    """
    # The client's choice of format is taken, but not its encoder: asked for OpenMetrics with the escaping
    # "underscores" (Prometheus 2) that turns the colon of a name into one, too. Our names need no escaping.
    _, content_type = choose_encoder(accept_header or "")
    if content_type.startswith("application/openmetrics-text"):
        encode: Any = openmetrics.generate_latest
        return encode(registry, openmetrics.ALLOWUTF8), openmetrics.CONTENT_TYPE_LATEST
    return exposition.generate_latest(registry), CONTENT_TYPE_TEXT


class EngineMetrics(Collector):
    """The engines of a process, as one collector of a registry.

    Args:
        registry: where it is registered; None: a new one (`open_registry`).

    Attributes:
        registry: what to `render`.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = open_registry() if registry is None else registry
        self._lock = threading.Lock()
        self._hooks: dict[tuple[str, str], PrometheusHook] = {}
        self.registry.register(self)

    def add(self, hook: PrometheusHook) -> None:
        """Take an engine in. The hook does that itself.

        Raises:
            RequestError: there is one of that name and engine.
        """
        with self._lock:
            if hook.labels in self._hooks:
                raise RequestError(
                    "model_name", hook.labels[0], "a name that no open hook of this engine has"
                )
            self._hooks[hook.labels] = hook

    def remove(self, hook: PrometheusHook) -> None:
        """Forget an engine; one that is not there is ignored."""
        with self._lock:
            if self._hooks.get(hook.labels) is hook:
                del self._hooks[hook.labels]

    def collect(self) -> Iterator[Metric]:
        """All families, each with the samples of all engines, which are of one moment per engine."""
        with self._lock:
            hooks = list(self._hooks.values())
        taken = [(hook.labels, hook.samples()) for hook in hooks]
        for family in FAMILIES:
            yield _metric(family, taken)

    def describe(self) -> Iterator[Metric]:
        """The families without samples."""
        for family in FAMILIES:
            yield _metric(family, ())


def _metric(family: Family, taken: Sequence[tuple[tuple[str, str], Samples]]) -> Metric:
    names = (*LABELS, *family.labels)
    metric: Metric = _KINDS[family.kind](family.full_name, family.meaning, labels=names)
    add: Any = metric.add_metric  # type: ignore[attr-defined]
    for labels, samples in taken:
        for own, value in samples.get(family.name, ()):
            if isinstance(value, tuple):  # a histogram's buckets and sum
                add((*labels, *own), *value)
            else:
                add((*labels, *own), value)
    return metric
