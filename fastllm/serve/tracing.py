"""OpenTelemetry: a span per request with what happened in it, and the GenAI metrics of a model server.

    providers = open_otlp("http://collector:4318")         # or providers of your own
    tracing = TracingHook("my-model", providers.traces, providers.metrics)
    llm = AsyncLLM(path, hooks=[tracing])

    tracing.begin(request_id, request.headers, operation="chat", stream=True)   # in the HTTP handler
    try:
        async for output in llm.generate(prompt, params, request_id): ...
    except BaseException as error:
        tracing.fail(request_id, error)    # refused before the engine had it; else does nothing
        raise

A request's span is a child of the span that is current where `begin` is called, if there is one (an
instrumentation of the HTTP server), else of the caller's, which the W3C headers traceparent and tracestate
name. Beneath it lie `queue`, `prefill` and `decode`, one after the other; a preemption is an event. Names of
attributes and metrics are those of OpenTelemetry's semantic conventions for generative AI
(semantic-conventions-genai, status "development"), provider name "fastllm". No text of a request goes into a
span: neither prompts nor answers nor stop strings.

Only starts and ends of requests are listened to, nothing of a step. A request costs the engine's thread
0.16 ms with its four spans and three metrics, 0.05 to 0.07 where it is not sampled (one core of a shared
2-core x86 server). Spans are exported by the SDK's own threads. Without the hook nothing of this is imported.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastllm.engine.hooks import Aborted, EngineHook, Finished, Preempted, Queued
from fastllm.errors import RequestError
from fastllm.outputs import RequestMetrics
from fastllm.pooling_params import PoolingParams
from fastllm.sampling_params import SamplingParams
from fastllm.serve.extra import missing

try:
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Span, SpanKind, StatusCode, TracerProvider
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise missing("tracing", "opentelemetry-sdk", "otel") from error

SCOPE = "fastllm"
LEFT = (asyncio.CancelledError, GeneratorExit)  # what a handler is ended with when its client is gone
OPERATIONS = ("chat", "text_completion", "embeddings", "generate_content")
REQUEST_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0),
)
TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)

_propagator = TraceContextTextMapPropagator()


@dataclass(slots=True)
class _Request:
    """An open span.

    Attributes:
        began: when it began, nanoseconds since 1970.
        arrived: when the engine took it, on the same scale; None before.
        arrival: the same in seconds of the engine's clock.
    """

    span: Span
    operation: str
    began: int
    arrived: int | None = None
    arrival: float = 0.0

    def arrive(self, moment: float) -> None:
        """The engine has taken it, now and at that moment of the engine's clock."""
        self.arrived = time.time_ns()
        self.arrival = moment

    def at(self, moment: float) -> int:
        """A moment of the engine's clock in nanoseconds since 1970. Differences are the engine's."""
        assert self.arrived is not None
        return self.arrived + round((moment - self.arrival) * 1e9)


class TracingHook(EngineHook):
    """Traces the requests of one engine. `begin` and `fail` may be called from any thread.

    Args:
        model_name: as clients call the model.
        tracer_provider, meter_provider: where spans and metrics go; None: the process's own.
        server_address, server_port: where clients reach the server, for the metrics' attributes.
    """

    def __init__(
        self,
        model_name: str,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        *,
        server_address: str | None = None,
        server_port: int | None = None,
    ) -> None:
        from opentelemetry import metrics

        self._tracer = trace.get_tracer(SCOPE, tracer_provider=tracer_provider)
        meter = metrics.get_meter(SCOPE, meter_provider=meter_provider)
        self._request_seconds = meter.create_histogram(
            "gen_ai.server.request.duration",
            "s",
            "Generative AI server request duration, to the last output token.",
            explicit_bucket_boundaries_advisory=REQUEST_SECONDS,
        )
        self._first_token_seconds = meter.create_histogram(
            "gen_ai.server.time_to_first_token",
            "s",
            "Time to the first token of successful responses.",
            explicit_bucket_boundaries_advisory=FIRST_TOKEN_SECONDS,
        )
        self._token_seconds = meter.create_histogram(
            "gen_ai.server.time_per_output_token",
            "s",
            "Time per output token after the first of successful responses.",
            explicit_bucket_boundaries_advisory=TOKEN_SECONDS,
        )
        self._model_name = model_name
        self._attributes: dict[str, Any] = {
            "gen_ai.provider.name": SCOPE,
            "gen_ai.request.model": model_name,
            "gen_ai.response.model": model_name,
        }
        if server_address is not None:
            self._attributes["server.address"] = server_address
            if server_port is not None:
                self._attributes["server.port"] = server_port
        self._lock = threading.Lock()
        self._open: dict[str, _Request] = {}

    # ---- the server --------------------------------------------------------------------------------------

    def begin(
        self,
        request_id: str,
        headers: Mapping[str, str] | None = None,
        *,
        operation: str = "chat",
        stream: bool | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """A request has come that the engine will be given. Its span begins.

        Args:
            request_id: as the engine will know it.
            headers: of the HTTP request, with names in lower case or a mapping that ignores it.
            operation: "chat", "text_completion", "embeddings" or "generate_content".
            stream: whether the answer is streamed; None: not said.
            attributes: more of them for the span.

        Raises:
            RequestError: another operation, or a request of that id is open.
        """
        if operation not in OPERATIONS:
            raise RequestError("operation", operation, "one of " + ", ".join(map(repr, OPERATIONS)))
        with self._lock:
            if request_id in self._open:
                raise RequestError("request_id", request_id, "a name that no unfinished request has")
            self._open[request_id] = request = self._start(operation, headers)
        span = request.span
        span.set_attribute("gen_ai.response.id", request_id)
        if stream is not None:
            span.set_attribute("gen_ai.request.stream", stream)
        if attributes:
            span.set_attributes(attributes)

    def fail(self, request_id: str, error: BaseException) -> None:
        """A request that was begun was refused, or given up, before the engine took it. Of one that the
        engine has, or that is over, the engine says the end: then this does nothing."""
        with self._lock:
            request = self._open.get(request_id)
            if request is None or request.arrived is not None:
                return
            del self._open[request_id]
        # The message stays out: it may quote the request.
        kind = "abort" if isinstance(error, LEFT) else type(error).__name__
        now = time.time_ns()
        request.span.set_attribute("error.type", kind)
        if kind != "abort":
            request.span.set_status(StatusCode.ERROR)
        request.span.end(now)
        self._request_seconds.record(
            (now - request.began) * 1e-9, {**self._labels(request), "error.type": kind}
        )

    def _start(self, operation: str, headers: Mapping[str, str] | None) -> _Request:
        context: Context | None = None  # that of the caller
        if headers is not None and not trace.get_current_span().get_span_context().is_valid:
            context = _propagator.extract(headers)
        began = time.time_ns()
        span = self._tracer.start_span(
            f"{operation} {self._model_name}",
            context,
            SpanKind.SERVER,
            {"gen_ai.operation.name": operation, **self._attributes},
            start_time=began,
        )
        return _Request(span, operation, began)

    def _labels(self, request: _Request) -> dict[str, Any]:
        """Attributes of a metric's point."""
        return {"gen_ai.operation.name": request.operation, **self._attributes}

    # ---- the hook ----------------------------------------------------------------------------------------

    def on_queued(self, event: Queued) -> None:
        with self._lock:
            request = self._open.get(event.request_id)
            if request is None:  # nobody has begun it
                pools = isinstance(event.params, PoolingParams)
                request = self._start("embeddings" if pools else "text_completion", None)
                self._open[event.request_id] = request
            request.arrive(event.time)
        span = request.span
        if span.is_recording():
            span.set_attribute("gen_ai.response.id", event.request_id)
            span.set_attribute("gen_ai.usage.input_tokens", event.num_prompt_tokens)
            if isinstance(event.params, SamplingParams):
                span.set_attributes(_asked(event.params))
            if event.adapter is not None:
                span.set_attribute("fastllm.lora_adapter", event.adapter)

    def on_preempted(self, event: Preempted) -> None:
        request = self._open.get(event.request_id)
        if request is not None:
            attributes = {"fastllm.sequence": event.index, "fastllm.tokens_to_recompute": event.num_tokens}
            request.span.add_event("preempted", attributes, request.at(event.time))

    def on_finished(self, event: Finished) -> None:
        failure = "error" if "error" in event.finish_reasons else None
        self._end(event.request_id, event.finish_reasons, event.metrics, failure, max(event.num_tokens))

    def on_aborted(self, event: Aborted) -> None:
        self._end(event.request_id, ("abort",), event.metrics, event.failure or "abort", 0)

    def _end(
        self,
        request_id: str,
        reasons: tuple[str, ...],
        metrics: RequestMetrics,
        failure: str | None,
        longest: int,
    ) -> None:
        with self._lock:
            request = self._open.pop(request_id, None)
        if request is None:
            return
        assert metrics.finished_time is not None
        end = request.at(metrics.finished_time)
        if request.span.is_recording():
            self._phases(request, metrics)
            request.span.set_attributes(
                {
                    "gen_ai.response.finish_reasons": reasons,
                    "gen_ai.usage.output_tokens": metrics.num_generated_tokens,
                    "gen_ai.usage.cache_read.input_tokens": metrics.num_cached_tokens,
                }
            )
            if failure is not None:
                request.span.set_attribute("error.type", failure)
                if failure != "abort":  # clients that leave are no failure of the server's
                    request.span.set_status(StatusCode.ERROR)
        request.span.end(end)
        labels = self._labels(request)
        seconds = (end - request.began) * 1e-9
        if failure is not None:
            self._request_seconds.record(seconds, {**labels, "error.type": failure})
            return
        self._request_seconds.record(seconds, labels)
        if metrics.first_token_time is not None:
            first = (request.at(metrics.first_token_time) - request.began) * 1e-9
            self._first_token_seconds.record(first, labels)
        if metrics.decode_time is not None and longest > 1:
            self._token_seconds.record(metrics.decode_time / (longest - 1), labels)

    def _phases(self, request: _Request, metrics: RequestMetrics) -> None:
        """The child spans, as far as the request came."""
        above = trace.set_span_in_context(request.span)
        moments = (
            metrics.arrival_time,
            metrics.first_scheduled_time,
            metrics.first_token_time,
            metrics.last_token_time,
        )
        for name, start, stop in zip(("queue", "prefill", "decode"), moments, moments[1:], strict=False):
            if start is None or (name == "decode" and stop is None):
                break
            child = self._tracer.start_span(name, above, start_time=request.at(start))
            child.end(request.at(metrics.finished_time or start if stop is None else stop))


def _asked(params: SamplingParams) -> dict[str, Any]:
    """What a request asked for, as attributes of its span."""
    asked = {
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.seed": None if params.seed is None else _signed(params.seed),
        "gen_ai.request.top_k": float(params.top_k) if params.top_k > 0 else None,
        "gen_ai.request.choice.count": params.n if params.n != 1 else None,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _signed(seed: int) -> int:
    """The same seed as the 64-bit signed integer that attributes have room for."""
    return (seed + 2**63) % 2**64 - 2**63
