"""What the server tells: counts that add up over HTTP, series that go with their model, traces that join."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from serving import Running

from fastllm.serve import otlp
from fastllm.serve.otlp import OtlpProviders

ADMIN = "admin-key-for-these-tests"
TRACE = "0af7651916cd43dd8448eb211c80319c"
BODY = {"prompt": "the river ran past", "max_tokens": 8}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    long = tiny.make_model("llama", max_position_embeddings=8192)  # no answer ends before its reader leaves
    return tiny.save_hf(long, tmp_path / "model")


@pytest.fixture
def server(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setenv("FASTLLM_ADMIN_KEY", ADMIN)
    with Running(model, model_roots=[model.parent]) as running:
        yield running


def sums(client: httpx.Client) -> dict[str, float]:
    """Of all metrics, summed over their labels."""
    found: dict[str, float] = collections.defaultdict(float)
    for line in client.get("/metrics").text.splitlines():
        if not line.startswith("#"):
            found[line.split("{")[0].split(" ")[0]] += float(line.rsplit(" ", 1)[1])
    return found


def test_counts_add_up(server: Running) -> None:
    with server.client() as client:
        for n in (1, 2, 3):
            client.post("/v1/completions", json={**BODY, "n": n})
        with client.stream(
            "POST", "/v1/completions", json={**BODY, "max_tokens": 8000, "ignore_eos": True, "stream": True}
        ) as response:
            lines = response.iter_lines()
            next(lines)
        client.post("/v1/completions", json={**BODY, "n": -1})
        client.get("/v1/nothing/at/all")
        end = time.monotonic() + 5
        while (found := sums(client))["fastllm:request_success_total"] < 4:
            assert time.monotonic() < end, dict(found)
        assert found["fastllm:time_to_first_token_seconds_count"] == 4
        assert found["fastllm:e2e_request_latency_seconds_count"] == 3  # the one that was left has no end
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert found[f"fastllm:{gauge}"] == 0
        text = client.get("/metrics").text
        assert 'handler="/v1/completions",method="POST",status="200"' in text
        assert 'status="400"' in text
        assert 'handler="unmatched"' in text
        assert "nothing/at/all" not in text
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        assert client.get("/metrics", headers=accept).text.rstrip().endswith("# EOF")


def test_series_go_with_their_model(server: Running, model: Path) -> None:
    with server.client(headers={"authorization": f"Bearer {ADMIN}"}) as client:
        client.post("/v1/completions", json=BODY)
        body = {"name": "tiny", "version": "2", "model": str(model)}
        assert client.post("/admin/models", json=body).status_code == 200
        client.post("/v1/completions", json=BODY)
        end = time.monotonic() + 5
        while 'engine="1"' in client.get("/metrics").text:
            assert time.monotonic() < end
        assert 'engine="2",model_name="tiny"' in client.get("/metrics").text
        assert client.delete("/admin/models/tiny").status_code == 200
        assert "model_name=" not in client.get("/metrics").text


def test_traces_are_joined(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    traces = TracerProvider()
    traces.add_span_processor(SimpleSpanProcessor(spans))
    providers = OtlpProviders(traces, MeterProvider([reader]))
    monkeypatch.setattr(otlp, "open_otlp", lambda endpoint: providers)
    with Running(model, otlp_endpoint="http://localhost:4318") as server, server.client() as client:
        headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        client.post("/v1/completions", json=BODY, headers=headers)
        messages: list[Any] = [{"role": "user", "content": "Hi"}]
        client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2})
        client.post("/v1/completions", json={"prompt": [299] * 3, "logit_bias": {"999": 1}})
        done = spans.get_finished_spans()
    operations = [(span.attributes or {}).get("gen_ai.operation.name") for span in done]
    assert sorted(str(name) for name in operations if name) == ["chat", "text_completion", "text_completion"]
    of_trace = [span for span in done if f"{span.context.trace_id:032x}" == TRACE]
    (joined,) = [span for span in of_trace if "gen_ai.operation.name" in (span.attributes or {})]
    assert joined.attributes is not None
    assert joined.attributes["gen_ai.request.model"] == "tiny"
    assert joined.attributes["gen_ai.usage.output_tokens"] == 8
