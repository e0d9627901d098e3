"""Where spans and metrics go: OpenTelemetry providers that export by OTLP over HTTP.

The SDK reads its own environment variables (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_HEADERS,
OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, ...); what is given here goes first. The process's global
providers stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from fastllm.errors import RequestError
from fastllm.serve.extra import missing

try:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
except ImportError as error:
    raise missing("otlp", "opentelemetry-exporter-otlp-proto-http", "otel") from error


@dataclass(frozen=True, slots=True)
class OtlpProviders:
    """What `TracingHook` takes."""

    traces: TracerProvider
    metrics: MeterProvider

    def close(self) -> None:
        """Export what is left and stop the threads."""
        self.traces.shutdown()
        self.metrics.shutdown()


def open_otlp(endpoint: str | None = None, *, service_name: str | None = None) -> OtlpProviders:
    """Providers that export to a collector, from threads of their own.

    Args:
        endpoint: its base URL, http:// or https://, to which /v1/traces and /v1/metrics are added; None:
            OTEL_EXPORTER_OTLP_ENDPOINT, or http://localhost:4318.
        service_name: service.name; None: OTEL_SERVICE_NAME, or "fastllm".

    Raises:
        RequestError: an endpoint that is no such URL.
    """
    traces = metrics = None
    if endpoint is not None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise RequestError("endpoint", endpoint, "a URL that begins with http:// or https://")
        base = endpoint.rstrip("/")
        traces, metrics = f"{base}/v1/traces", f"{base}/v1/metrics"
    resource = service_resource(service_name)
    spans = TracerProvider(resource=resource, shutdown_on_exit=False)
    spans.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(traces)))
    reader = PeriodicExportingMetricReader(OTLPMetricExporter(metrics))
    return OtlpProviders(spans, MeterProvider([reader], resource, shutdown_on_exit=False))


def service_resource(service_name: str | None) -> Resource:
    """Who exports: the SDK's resource, with that name; None: OTEL_SERVICE_NAME, or "fastllm"."""
    resource = Resource.create(None if service_name is None else {SERVICE_NAME: service_name})
    if service_name is None and str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "fastllm"}))
    return resource
