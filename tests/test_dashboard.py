"""The Grafana dashboard and docs/metrics.md, held against the metrics that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_fakes import make_engine
from fake_executor import FakeExecutor
from prometheus_client import CollectorRegistry
from scrapes import Scrape

from fastllm import SamplingParams
from fastllm.serve.http_metrics import HttpMetrics
from fastllm.serve.metric_families import FAMILIES, LABELS
from fastllm.serve.metrics import EngineMetrics, PrometheusHook

ROOT = Path(__file__).parents[1]
DASHBOARD = json.loads((ROOT / "docs" / "grafana" / "fastllm.json").read_text())
PAGE = (ROOT / "docs" / "metrics.md").read_text()

FUNCTIONS = {"rate", "increase", "sum", "max", "histogram_quantile", "label_values"}
KEYWORDS = {"by", "ignoring", "group_left"}
TOKEN = re.compile(r'"[^"]*"|\$\w+|[A-Za-z_:][A-Za-z0-9_:]*|\d+(?:\.\d+)?m?|[=!]~|!=|\S')


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    """(where, expression) of the dashboard and of the page's table of questions."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]
    for line in PAGE.split("Questions, and")[1].split("## ")[0].splitlines():
        for quoted in re.findall(r"`([^`]*)`", line):
            if ":" in quoted or "(" in quoted:
                yield "page", quoted


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    """Every sample's name with its labels, of an engine that has all of them."""
    metrics = EngineMetrics(CollectorRegistry())
    engine = make_engine(FakeExecutor(), [PrometheusHook(metrics, "m")], num_speculative_tokens=4)
    engine.add_request("a", [2, 3], SamplingParams(max_tokens=4))
    while engine.has_unfinished():
        engine.step()
    http = HttpMetrics(metrics.registry)
    http.end(http.begin("GET"), "/", "GET", 200)
    found: dict[str, set[str]] = {}
    for sample in Scrape(metrics.registry):
        found.setdefault(sample.name, set()).update(sample.labels)
    return found


def parse(expression: str) -> tuple[set[str], set[str], list[tuple[str, set[str]]]]:
    """Metric names, all labels that are grouped by, and (name, labels of its selector)."""
    tokens = TOKEN.findall(expression)
    pairs = {")": "(", "}": "{", "]": "["}
    open_brackets: list[str] = []
    names, grouped = set(), set()
    selectors: list[tuple[str, set[str]]] = []
    inside = ""  # the name whose selector it is, or the keyword whose list of labels
    for i, token in enumerate(tokens):
        before = tokens[i - 1] if i else ""
        following = tokens[i + 1] if i + 1 < len(tokens) else ""
        if token in pairs.values():
            open_brackets.append(token)
            inside = before if token == "{" or before in KEYWORDS else ""
            if token == "{":
                selectors.append((before, set()))
        elif token in pairs:
            assert open_brackets, expression
            assert open_brackets.pop() == pairs[token], expression
            inside = ""
        elif re.match(r"[A-Za-z_:]", token) and not token.startswith('"'):
            top = open_brackets[-1] if open_brackets else ""
            if top == "{":
                assert following in ("=", "=~", "!=", "!~"), expression
                selectors[-1][1].add(token)
            elif inside in KEYWORDS and top == "(":
                if inside == "by":
                    grouped.add(token)
            elif token in FUNCTIONS:
                assert following in ("(", "by"), expression
            elif token not in KEYWORDS and not (tokens[0] == "label_values" and before == ","):
                names.add(token)
    assert not open_brackets, expression
    return names, grouped, selectors


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_expression_is_of_metrics_that_exist(
    where: str, expression: str, series: dict[str, set[str]]
) -> None:
    names, grouped, selectors = parse(expression)
    assert names, where
    assert names <= series.keys()
    for name, labels in selectors:
        assert labels <= series[name]
    for label in grouped:
        assert any(label in series[name] for name in names), label
    if "rate(" in expression or "increase(" in expression:  # of what grows, over a range
        assert "[$__rate_interval]" in expression or "[5m]" in expression
    for name in re.findall(r"(?:rate|increase)\((\S+?)[{\[]", expression):
        assert name.endswith(("_total", "_bucket", "_count", "_sum")), name
    for inner in re.findall(r"histogram_quantile\([\d.]+, (.*)\)", expression):
        assert "_bucket" in inner
        assert "le" in grouped


def test_a_wrong_expression_is_found() -> None:
    names, grouped, selectors = parse('sum by (le, x) (rate(fastllm:no_such{model="a"}[5m])) / other')
    assert names == {"fastllm:no_such", "other"}
    assert grouped == {"le", "x"}
    assert selectors == [("fastllm:no_such", {"model"})]
    with pytest.raises(AssertionError):
        parse("sum(rate(fastllm:no_such[5m])")


def test_panels_show_what_operators_look_for() -> None:
    titles = {panel["title"] for panel in panels()}
    assert titles >= {
        *("Requests that end", "Running and waiting sequences", "KV cache in use", "Time to first token"),
        *("Inter-token latency", "Tokens", "Preemptions", "Prefix cache hit rate", "Requests that failed"),
    }
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        for label in re.findall(
            r"\{\{(\w+)\}\}", " ".join(item["legendFormat"] for item in panel["targets"])
        ):
            assert any(re.search(rf"\b{label}\b", item["expr"]) for item in panel["targets"]), panel["title"]


def rows(title: str) -> dict[str, tuple[str, str]]:
    """name -> (type, labels) of the table that begins with a column."""
    found = {}
    for line in PAGE.split(title)[1].split("\n\n")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].startswith("`"):
            found[cells[0].strip("`")] = (cells[1], cells[2])
    return found


def test_the_page_lists_what_the_registry_has() -> None:
    registry = CollectorRegistry()
    HttpMetrics(registry)
    EngineMetrics(registry)

    def full_name(name: str, kind: str) -> str:
        return name + "_total" if kind == "counter" else name

    listed = rows("| name | type | further labels | meaning |\n") | rows(
        "| name | type | labels | meaning |\n"
    )
    there = {full_name(metric.name, metric.type): metric.type for metric in registry.collect()}
    assert {name: kind for name, (kind, _) in listed.items()} == there
    for family in FAMILIES:
        name = full_name(family.full_name, family.kind)
        assert listed[name][1] == ", ".join(family.labels)
        assert f"| {family.meaning} |" in PAGE


def test_every_sample_has_the_labels_of_its_family(series: dict[str, set[str]]) -> None:
    for family in FAMILIES:
        for name, labels in series.items():
            if re.fullmatch(re.escape(family.full_name) + "(_total|_bucket|_count|_sum)?", name):
                assert labels - {"le"} == {*LABELS, *family.labels}
