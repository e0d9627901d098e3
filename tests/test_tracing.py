"""Spans and GenAI metrics, taken by the SDK's exporters in memory."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from api_fakes import ApiTokenizer, HeldExecutor, make_engine
from fake_executor import FakeExecutor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from fastllm import AsyncLLM, PoolingParams, RequestError, SamplingParams
from fastllm.engine.engine import Engine
from fastllm.engine.hooks import EngineHook
from fastllm.errors import EngineDeadError
from fastllm.serve.otlp import open_otlp, service_resource
from fastllm.serve.tracing import FIRST_TOKEN_SECONDS, REQUEST_SECONDS, TOKEN_SECONDS, TracingHook

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
DURATION = "gen_ai.server.request.duration"
FIRST_TOKEN = "gen_ai.server.time_to_first_token"
PER_TOKEN = "gen_ai.server.time_per_output_token"


def answer(tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0.5, seed=1, max_tokens=tokens, ignore_eos=True, **more)


class Traced:
    """A hook whose spans and metrics stay in memory."""

    def __init__(self, **options: Any) -> None:
        self._spans = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.traces = TracerProvider(**options)
        self.traces.add_span_processor(SimpleSpanProcessor(self._spans))
        self.metrics = MeterProvider([self._reader])
        self.hook = TracingHook(
            "m", self.traces, self.metrics, server_address="example.com", server_port=8000
        )

    def engine(self, executor: FakeExecutor | None = None, **config: Any) -> Engine:
        return make_engine(executor or FakeExecutor(), [self.hook], **config)

    def spans(self) -> dict[str, ReadableSpan]:
        """By name, or request's attribute and name where there are several requests."""
        return {span.name: span for span in self._spans.get_finished_spans()}

    def all(self) -> list[ReadableSpan]:
        return list(self._spans.get_finished_spans())

    def points(self, name: str) -> list[HistogramDataPoint]:
        data = self._reader.get_metrics_data()
        if data is None:
            return []
        return [
            point
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
            if isinstance(point, HistogramDataPoint)
        ]

    def close(self) -> None:
        self.traces.shutdown()
        self.metrics.shutdown()


@pytest.fixture
def traced() -> Iterator[Traced]:
    made = Traced()
    yield made
    made.close()


def run(engine: Engine) -> None:
    while engine.has_unfinished():
        engine.step()


def test_a_request_and_its_phases(traced: Traced) -> None:
    engine = traced.engine()
    traced.hook.begin("a", HEADERS, operation="chat", stream=True, attributes={"user.id": "u"})
    engine.add_request("a", [2] * 9, answer(5, top_k=3, n=2))
    run(engine)
    spans = traced.spans()
    assert set(spans) == {"chat m", "queue", "prefill", "decode"}
    root = spans["chat m"]
    assert root.kind is SpanKind.SERVER
    assert root.parent is not None
    assert root.context is not None
    assert f"{root.context.trace_id:032x}" == TRACE
    assert f"{root.parent.span_id:016x}" == PARENT
    assert root.context.trace_state.get("vendor") == "1"
    assert root.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "fastllm",
        "gen_ai.request.model": "m",
        "gen_ai.response.model": "m",
        "gen_ai.response.id": "a",
        "gen_ai.request.stream": True,
        "user.id": "u",
        "server.address": "example.com",
        "server.port": 8000,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 3.0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.seed": 1,
        "gen_ai.request.choice.count": 2,
        "gen_ai.usage.input_tokens": 9,
        "gen_ai.usage.output_tokens": 10,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ("length", "length"),
    }
    assert root.status.status_code is StatusCode.UNSET
    phases = [spans[name] for name in ("queue", "prefill", "decode")]
    for phase in phases:
        assert phase.parent is not None
        assert phase.parent.span_id == root.context.span_id
    for one, other in itertools.pairwise(phases):
        assert one.end_time == other.start_time
    assert root.start_time <= phases[0].start_time  # type: ignore[operator]
    assert root.end_time == phases[-1].end_time


def test_metrics_of_a_success(traced: Traced) -> None:
    engine = traced.engine()
    for name, tokens in (("a", 5), ("b", 1)):
        traced.hook.begin(name, operation="text_completion")
        engine.add_request(name, [2] * 9, answer(tokens))
    run(engine)
    for name, bounds, count in (
        (DURATION, REQUEST_SECONDS, 2),
        (FIRST_TOKEN, FIRST_TOKEN_SECONDS, 2),
        (PER_TOKEN, TOKEN_SECONDS, 1),
    ):
        (point,) = traced.points(name)
        assert point.count == count
        assert point.explicit_bounds == bounds
        assert point.attributes == {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "fastllm",
            "gen_ai.request.model": "m",
            "gen_ai.response.model": "m",
            "server.address": "example.com",
            "server.port": 8000,
        }
    roots = [span for span in traced.all() if span.parent is None]
    total = sum(span.end_time - span.start_time for span in roots)  # type: ignore[operator, misc]
    assert traced.points(DURATION)[0].sum == pytest.approx(total * 1e-9, abs=1e-6)


def test_without_a_begin_there_is_a_span_all_the_same(traced: Traced) -> None:
    engine = traced.engine()
    engine.add_request("a", [2] * 5, answer(2))
    engine.add_request("b", [2] * 5, PoolingParams())
    run(engine)
    names = [span.name for span in traced.all()]
    assert sorted(names) == [
        *("decode", "embeddings m", "prefill", "prefill", "queue", "queue", "text_completion m")
    ]


def test_the_current_span_is_the_parent(traced: Traced) -> None:
    engine = traced.engine()
    tracer = traced.traces.get_tracer("http")
    with tracer.start_as_current_span("POST /v1/chat/completions") as above:
        traced.hook.begin("a", HEADERS)
    engine.add_request("a", [2], answer(2))
    run(engine)
    root = traced.spans()["chat m"]
    assert root.parent is not None
    assert root.parent.span_id == above.get_span_context().span_id


@pytest.mark.parametrize("headers", [{}, {"traceparent": "nonsense"}, None])
def test_without_a_parent_a_trace_begins(traced: Traced, headers: dict[str, str] | None) -> None:
    engine = traced.engine()
    traced.hook.begin("a", headers)
    engine.add_request("a", [2], answer(1))
    run(engine)
    assert traced.spans()["chat m"].parent is None


def test_a_preemption_is_an_event(traced: Traced) -> None:
    engine = traced.engine(FakeExecutor(num_blocks=8))
    for name in "abc":
        engine.add_request(name, [2] * 9, answer(15))
    run(engine)
    events = [event for span in traced.all() for event in span.events]
    assert events
    assert len(events) == engine.scheduler.num_preemptions
    assert {event.name for event in events} == {"preempted"}
    for span in traced.all():
        for event in span.events:
            assert span.start_time <= event.timestamp <= span.end_time  # type: ignore[operator]


@pytest.mark.parametrize(
    ("steps", "phases"), [(0, ["queue"]), (1, ["prefill", "queue"]), (4, ["decode", "prefill", "queue"])]
)
def test_an_abort_ends_the_span_where_it_is(traced: Traced, steps: int, phases: list[str]) -> None:
    engine = traced.engine(max_num_batched_tokens=8)
    engine.add_request("a", [2] * 20, answer(9))
    for _ in range(steps):
        engine.step()
    engine.abort("a")
    spans = traced.spans()
    root = spans.pop("text_completion m")
    assert sorted(spans) == phases
    assert root.attributes is not None
    assert root.attributes["error.type"] == "abort"
    assert root.attributes["gen_ai.response.finish_reasons"] == ("abort",)
    assert root.status.status_code is StatusCode.UNSET
    (point,) = traced.points(DURATION)
    assert point.attributes is not None
    assert point.attributes["error.type"] == "abort"
    assert traced.points(FIRST_TOKEN) == traced.points(PER_TOKEN) == []
    assert traced.hook._open == {}


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("event", ["on_queued", "on_scheduled", "on_first_token"])
def test_another_hook_may_abort_first(traced: Traced, event: str, begun: bool) -> None:
    class Ender(EngineHook):
        pass

    setattr(Ender, event, lambda self, event: engine.abort("a"))
    engine = make_engine(FakeExecutor(), [Ender(), traced.hook])
    if begun:
        traced.hook.begin("a")
    engine.add_request("a", [2] * 5, answer(9))
    run(engine)
    roots = [span for span in traced.all() if span.parent is None]
    assert len(roots) == 1
    assert (roots[0].attributes or {})["error.type"] == "abort"
    assert traced.hook._open == {}


def test_a_death_is_an_error(traced: Traced) -> None:
    engine = traced.engine(FakeExecutor(fail_at=(1, RuntimeError("broken"))))
    engine.add_request("a", [2], answer(9))
    with pytest.raises(EngineDeadError):
        run(engine)
    root = traced.spans()["text_completion m"]
    assert root.attributes is not None
    assert root.attributes["error.type"] == "RuntimeError"
    assert root.status.status_code is StatusCode.ERROR


def test_a_sequence_in_error_is_an_error(traced: Traced) -> None:
    engine = traced.engine(FakeExecutor(pick=lambda row: -1))
    engine.add_request("a", [2], answer(9))
    run(engine)
    root = traced.spans()["text_completion m"]
    assert root.attributes is not None
    assert root.attributes["error.type"] == "error"
    assert root.status.status_code is StatusCode.ERROR
    assert traced.points(FIRST_TOKEN) == []


def test_a_refused_request_fails(traced: Traced) -> None:
    engine = traced.engine()
    traced.hook.begin("a", HEADERS)
    with pytest.raises(RequestError) as caught:
        engine.add_request("a", [], answer(1))
    traced.hook.fail("a", caught.value)
    traced.hook.fail("a", caught.value)
    traced.hook.fail("unknown", caught.value)
    (span,) = traced.all()
    assert span.attributes is not None
    assert span.attributes["error.type"] == "RequestError"
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description is None
    assert traced.points(DURATION)[0].count == 1
    assert traced.hook._open == {}


@pytest.mark.parametrize("error", [asyncio.CancelledError(), GeneratorExit()])
def test_a_client_that_leaves_before_the_engine_has_it(traced: Traced, error: BaseException) -> None:
    traced.hook.begin("a")
    traced.hook.fail("a", error)
    (span,) = traced.all()
    assert span.attributes is not None
    assert span.attributes["error.type"] == "abort"
    assert span.status.status_code is StatusCode.UNSET


def test_no_text_of_a_request_is_in_a_span(traced: Traced) -> None:
    engine = traced.engine()
    traced.hook.begin("a")
    engine.add_request("a", [2, 3], answer(4, stop=["cab"], bad_words=["abc"]), prompt="a secret")
    traced.hook.begin("b")
    traced.hook.fail("b", RequestError("prompt", "a secret", "another one"))
    run(engine)
    for span in traced.all():
        events = [dict(event.attributes or {}) for event in span.events]
        shown = repr((span.name, dict(span.attributes or {}), events, span.status.description))
        assert "secret" not in shown
        assert "cab" not in shown
        assert "abc" not in shown


def test_what_the_engine_has_is_ended_by_the_engine(traced: Traced) -> None:
    engine = traced.engine()
    traced.hook.begin("a")
    engine.add_request("a", [2], answer(3))
    traced.hook.fail("a", RuntimeError("the client left"))
    assert traced.all() == []
    run(engine)
    root = traced.spans()["chat m"]
    assert root.attributes is not None
    assert root.attributes["gen_ai.usage.output_tokens"] == 3


def test_bad_arguments(traced: Traced) -> None:
    traced.hook.begin("a")
    with pytest.raises(RequestError, match="request_id"):
        traced.hook.begin("a")
    with pytest.raises(RequestError, match="operation"):
        traced.hook.begin("b", operation="dance")
    assert list(traced.hook._open) == ["a"]


def test_what_is_not_sampled_still_counts() -> None:
    made = Traced(sampler=ALWAYS_OFF)
    engine = made.engine()
    made.hook.begin("a")
    engine.add_request("a", [2] * 3, answer(4))
    run(engine)
    assert made.all() == []
    assert made.points(DURATION)[0].count == 1
    assert made.points(FIRST_TOKEN)[0].count == 1
    made.close()


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1, 2**64 - 1])
def test_every_seed_fits_an_attribute(traced: Traced, seed: int) -> None:
    engine = traced.engine()
    engine.add_request("a", [2], SamplingParams(seed=seed, max_tokens=1))
    run(engine)
    shown = (traced.spans()["text_completion m"].attributes or {})["gen_ai.request.seed"]
    assert isinstance(shown, int)
    assert -(2**63) <= shown < 2**63
    assert shown % 2**64 == seed % 2**64


async def test_through_async_llm(traced: Traced) -> None:
    tokenizer: Any = ApiTokenizer()
    async with AsyncLLM._from_parts(make_engine(HeldExecutor(), [traced.hook]), tokenizer) as llm:
        traced.hook.begin("mine", HEADERS, operation="chat", stream=True)
        async for output in llm.generate("abc", answer(6), "mine"):
            assert output.request_id == "mine"
        root = traced.spans()["chat m"]
        assert root.context is not None
        assert f"{root.context.trace_id:032x}" == TRACE
    assert traced.hook._open == {}


def test_without_the_hook_nothing_is_imported() -> None:
    code = (
        "import sys, fastllm, fastllm.llm, fastllm.async_llm, fastllm.serve\n"
        "found = [name for name in sys.modules if name.split('.')[0] in "
        "('opentelemetry', 'prometheus_client', 'fastapi', 'starlette')]\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("metrics", "prometheus_client", "serve"),
        ("http_metrics", "prometheus_client", "serve"),
        ("tracing", "opentelemetry", "otel"),
        ("otlp", "opentelemetry.exporter", "otel"),
    ],
)
def test_a_missing_extra_is_named(module: str, package: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from fastllm.errors import FastLLMError\n"
        f"try:\n    import fastllm.serve.{module}\n"
        f'except FastLLMError as error:\n    assert "fastllm[{extra}]" in str(error), error\n'
        "else:\n    raise AssertionError('imported')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_collector_gets_both() -> None:
    """Over HTTP, to the paths of OTLP, at the latest when the providers are closed."""
    got: list[tuple[str, str, int]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.path, self.headers["Content-Type"], len(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            providers = open_otlp(f"http://127.0.0.1:{server.server_port}")
            hook = TracingHook("m", providers.traces, providers.metrics)
            engine = make_engine(FakeExecutor(), [hook])
            engine.add_request("a", [2, 3], answer(3))
            run(engine)
            providers.close()
        finally:
            server.shutdown()
            thread.join()
    assert {path for path, _, _ in got} == {"/v1/traces", "/v1/metrics"}
    assert all(kind == "application/x-protobuf" and size > 100 for _, kind, size in got)


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://collector", "http://", ""])
def test_an_endpoint_that_is_none(endpoint: str) -> None:
    with pytest.raises(RequestError, match="endpoint"):
        open_otlp(endpoint)


def test_the_name_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"):
        monkeypatch.delenv(name, raising=False)
    assert service_resource(None).attributes["service.name"] == "fastllm"
    assert service_resource("mine").attributes["service.name"] == "mine"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "named")
    assert service_resource(None).attributes["service.name"] == "named"
    assert service_resource("mine").attributes["service.name"] == "mine"
