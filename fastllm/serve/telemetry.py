"""What a server tells of its engines: Prometheus metrics always, traces where somebody takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastllm.engine.hooks import EngineHook
from fastllm.serve.metrics import EngineMetrics, PrometheusHook, open_registry

if TYPE_CHECKING:
    from fastllm.serve.otlp import OtlpProviders
    from fastllm.serve.tracing import TracingHook


class EngineTelemetry:
    """The hooks of one engine.

    Attributes:
        hooks: for the engine.
        tracing: the one that requests are announced to; None: no traces are taken.
    """

    def __init__(self, metrics: PrometheusHook, tracing: TracingHook | None) -> None:
        self._metrics = metrics
        self.tracing = tracing
        self.hooks: list[EngineHook] = [metrics] if tracing is None else [metrics, tracing]

    def close(self) -> None:
        """The engine is gone, and its series with it."""
        self._metrics.close()


class Telemetry:
    """Of all engines of a server.

    Args:
        endpoint: where traces go, a URL; None: nowhere.

    Attributes:
        registry: of the metrics.

    Raises:
        RequestError: the endpoint is no URL, or what traces need is not installed.
    """

    def __init__(self, endpoint: str | None = None) -> None:
        self.registry = open_registry()
        self._metrics = EngineMetrics(self.registry)
        self._otlp: OtlpProviders | None = None
        if endpoint is not None:
            from fastllm.serve.otlp import open_otlp

            self._otlp = open_otlp(endpoint)

    def of_engine(self, model_name: str, version: str) -> EngineTelemetry:
        """For a new engine; the label `engine` is its version."""
        tracing = None
        if self._otlp is not None:
            from fastllm.serve.tracing import TracingHook

            tracing = TracingHook(model_name, self._otlp.traces, self._otlp.metrics)
        return EngineTelemetry(PrometheusHook(self._metrics, model_name, version), tracing)

    def close(self) -> None:
        """Hand over what is left."""
        if self._otlp is not None:
            self._otlp.close()
