"""From records to figures, by arithmetic alone: latencies, goodput, phases, series, comparisons, reports."""

from __future__ import annotations

import copy
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm.bench import compare, report
from fastllm.bench.arrivals import Spike
from fastllm.bench.chart import chart
from fastllm.bench.intervals import median_interval
from fastllm.bench.lengths import Lengths
from fastllm.bench.load import Round
from fastllm.bench.options import ServeOptions
from fastllm.bench.probe import Server
from fastllm.bench.record import FAILED, OK, UNFINISHED, RequestRecord
from fastllm.bench.rounds import make_round, new_record, read_record, write_record
from fastllm.bench.summary import meets, series, spread, summarize
from fastllm.errors import RequestError

Record = dict[str, Any]
COMMAND = ["--header", "X-Key: secret", "--header=Y-Key: secret", "--out", "/a/b/c", "--out=/a/b/c"]


def request(index: int, scheduled: float, *tokens: float, **more: Any) -> RequestRecord:
    """One that was sent 0.1 s after it was due, with text at these times, 0.05 s before its end."""
    end = tokens[-1] + 0.05 if tokens else scheduled + 1.0
    sent = scheduled + 0.1
    known: dict[str, Any] = {"sent": sent, "first_byte": sent, "end": end, "status": OK}
    known |= {
        "tokens": list(tokens),
        "output_tokens": len(tokens),
        "counted_by": "usage",
        "prompt_tokens": 10,
    }
    return RequestRecord(index, scheduled, **{**known, **more})


RECORDS = [
    request(0, 0.0, 0.3, 0.4, 0.6),
    request(1, 1.0, 1.5, 1.6, output_tokens=3, cached_tokens=4),
    request(2, 1.2, 2.0, status=UNFINISHED, output_tokens=None),
    request(3, 1.4, status=FAILED, error="HTTP 503"),
    RequestRecord(4, 1.9),  # the round ended before it was sent
]


def test_latencies_are_what_their_names_say() -> None:
    found = summarize(RECORDS, 2.0, {})
    latency = found["latency_ms"]

    def mean_and_count(name: str) -> tuple[float, int]:
        return latency[name]["mean"], latency[name]["count"]

    assert mean_and_count("ttft") == pytest.approx(((200 + 400 + 700) / 3, 3))
    assert mean_and_count("ttft_scheduled") == pytest.approx(((300 + 500 + 800) / 3, 3))
    assert mean_and_count("itl") == pytest.approx(((100 + 200 + 100) / 3, 3))
    assert mean_and_count("tpot") == pytest.approx(((150 + 50) / 2, 2))  # 0.1 s for 3 - 1 tokens
    assert mean_and_count("e2e") == pytest.approx(((550 + 550) / 2, 2))
    assert mean_and_count("e2e_scheduled") == pytest.approx(((650 + 650) / 2, 2))
    assert found["send_lag_ms"]["count"] == 4
    assert found["send_lag_ms"]["p50"] == pytest.approx(100)


def test_counts_and_throughput() -> None:
    found = summarize(RECORDS, 2.0, {})
    assert (found["ok"], found["failed"], found["unfinished"], found["requests"]) == (2, 1, 2, 5)
    assert found["errors"] == {"HTTP 503": 1}
    assert found["requests_per_second"] == pytest.approx(1.0)
    assert found["output_tokens"] == 3 + 3 + 1  # of the unfinished one what came
    assert found["output_tokens_per_second"] == pytest.approx(3.5)
    assert found["prompt_tokens_per_second"] == pytest.approx(10.0)
    assert found["cached_tokens"] == 4
    assert found["tokens_per_piece"] == pytest.approx(6 / 5)
    nothing = summarize([], 0.0, {"ttft_ms": 1.0}, [Spike(0, 1, 2)])
    assert nothing["latency_ms"]["ttft"] is None
    assert nothing["goodput"]["share"] is None


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_percentiles_are_those_of_numpy(values: list[float]) -> None:
    found = spread(values)
    assert found is not None
    for name, share in (("p50", 50), ("p90", 90), ("p95", 95), ("p99", 99)):
        assert found[name] == pytest.approx(np.percentile(values, share) * 1e3)
    assert found["p50"] <= found["p90"] <= found["p95"] <= found["p99"] <= found["max"] == max(values) * 1e3


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        ({"ttft_ms": 299}, False),  # from the scheduled time it was 300
        ({"ttft_ms": 301}, True),
        ({"itl_ms": 199}, False),
        ({"itl_ms": 201, "tpot_ms": 151, "e2e_ms": 651, "ttft_ms": 301}, True),
        ({"itl_ms": 201, "tpot_ms": 149}, False),
        ({"e2e_ms": 649}, False),
    ],
)
def test_limits_of_a_request(slo: dict[str, float], good: bool) -> None:
    assert meets(RECORDS[0], slo) is good


def test_a_request_that_did_not_succeed_meets_no_limit() -> None:
    assert not any(meets(record, {"e2e_ms": 1e9}) for record in RECORDS[2:])
    found = summarize(RECORDS, 2.0, {"ttft_ms": 400})["goodput"]
    assert found["requests_per_second"] == pytest.approx(0.5)
    assert found["share"] == pytest.approx(1 / 3)  # what was cut off is neither


def test_phases_of_a_spike() -> None:
    gaps = [0.5 if 10 <= i < 20 else 0.1 for i in range(30)]
    records = [request(i, i / 10, i / 10 + 0.2, i / 10 + 0.2 + gap) for i, gap in enumerate(gaps)]
    before, spike, after = summarize(records, 4.0, {}, [Spike(1.0, 1.0, 2.0)])["phases"]
    assert [each["requests"] for each in (before, spike, after)] == [10, 10, 10]
    assert before["latency_ms"]["itl"]["max"] == pytest.approx(100)
    # Of the requests with the long gap it ended in the spike for 10 to 12, and after it for the others.
    assert spike["latency_ms"]["itl"]["max"] == pytest.approx(500)
    assert after["latency_ms"]["itl"]["max"] == pytest.approx(500)
    assert sum(each["latency_ms"]["itl"]["count"] for each in (before, spike, after)) == 30


def test_the_series_says_what_happened_in_each_second() -> None:
    rows = series(RECORDS, 2.6)
    assert [row["due"] for row in rows] == [1, 4, 0]
    assert [row["sent"] for row in rows] == [1, 3, 0]
    assert [row["done"] for row in rows] == [1, 1, 0]
    assert [row["failed"] for row in rows] == [0, 0, 1]
    assert [row["pieces"] for row in rows] == [3, 2, 1]
    assert [row["under_way"] for row in rows] == [0, 2, 1]
    assert rows[0]["ttft_ms"]["p50"] == pytest.approx(300)
    assert rows[1]["itl_ms"]["max"] == pytest.approx(100)
    assert rows[2]["ttft_ms"] is None


@given(st.lists(st.tuples(st.floats(0, 9), st.lists(st.floats(0, 2), max_size=5)), max_size=20))
def test_the_series_leaves_nothing_out(given: list[tuple[float, list[float]]]) -> None:
    records = [request(i, at, *np.cumsum([at + 0.1, *gaps]).tolist()) for i, (at, gaps) in enumerate(given)]
    rows = series(records, 8.0)  # some ended later than the round: they stand in its last second
    assert sum(row["due"] for row in rows) == sum(row["done"] for row in rows) == len(records)
    assert sum(row["pieces"] for row in rows) == sum(len(record.tokens) for record in records)
    assert rows[-1]["under_way"] == 0
    assert all(row["under_way"] >= 0 for row in rows)


# -- records and reports -------------------------------------------------------------------------------------


def make_record(rounds: int = 1, factor: float = 1.0, began: float = 0.0, **settings: Any) -> Record:
    known = {"rate": 2.0, "spikes": (Spike(0.5, 0.5, 3.0),), "slo": {"ttft_ms": 400}}
    options = ServeOptions(**{**known, **settings})
    record = new_record(options)
    for number in range(rounds):
        requests = []
        for each in RECORDS:
            one = copy.deepcopy(each)
            one.tokens = [one.scheduled + (time - one.scheduled) * factor for time in one.tokens]
            requests.append(one)
        found = Round(0.0, began + 10 * number, 2.0, requests, cpu_seconds=0.1, lags=[0.001])
        server = Server("a|model\x1b<b>", {"version": "1"})
        made = make_round(found, options, server, number, COMMAND)
        record["rounds"].append(made)
    return record


def test_a_record_comes_back_from_its_file(tmp_path: Path) -> None:
    record = make_record(2)
    write_record(tmp_path / "r.json", record)
    again = read_record(tmp_path / "r.json")
    assert again == json.loads(json.dumps(record))
    found = [RequestRecord.from_json(each) for each in again["rounds"][0]["requests"]]
    assert [each.index for each in found] == [0, 1, 2, 3, 4]
    assert found[0] == RECORDS[0]
    assert summarize(found, 2.0, {"ttft_ms": 400}, [Spike(0.5, 0.5, 3.0)]) == record["rounds"][0]["summary"]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_record_holds_neither_secrets_nor_paths() -> None:
    text = json.dumps(make_record())
    assert "secret" not in text
    assert "/a/b" not in text
    assert "X-Key: ..." in text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "fastllm.bench.serve", "version": 2}'])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(RequestError, match="record"):
        read_record(tmp_path / "r.json")
    with pytest.raises(RequestError, match="record"):
        read_record(tmp_path / "none.json")


@pytest.mark.parametrize("rounds", [1, 3])
def test_reports_of_a_record(rounds: int) -> None:
    record = make_record(rounds)
    text = report.markdown(record)
    assert "| time to first token |" in text
    assert "a\\|model" in text
    assert "\x1b" not in text
    assert ("least to greatest" in text) is (rounds > 1)
    (line,) = (line for line in text.splitlines() if line.startswith("| time to first token"))
    assert line.split(" | ")[1] == str(3 * rounds)
    assert line.split(" | ")[2].startswith("433.3")
    assert "time to first token" in report.terminal(record)
    drawing = ElementTree.fromstring(chart(record))
    assert drawing.tag.endswith("svg")
    assert len(drawing.findall(".//{*}polyline")) >= 3


def test_a_record_without_a_success_has_reports_too() -> None:
    options = ServeOptions(concurrency=2)
    record = new_record(options)
    failed = [request(0, 0.0, status=FAILED, error="no connection")]
    record["rounds"].append(make_round(Round(0.0, 0.0, 0.2, failed), options, Server("m"), 0, []))
    assert "error: no connection" in report.terminal(record)
    assert "no connection" in report.markdown(record)
    ElementTree.fromstring(chart(record))


# -- comparisons ---------------------------------------------------------------------------------------------


def test_ratios_over_interleaved_rounds() -> None:
    ours, theirs = make_record(8), make_record(8, factor=2.0, began=5.0)
    found = {each.name: each for each in compare.compare(ours, theirs)}
    itl = found["ITL p50, ms"]
    assert itl.ratio == pytest.approx(0.5, rel=1e-3)
    assert (itl.first, itl.second) == pytest.approx((100, 200), rel=1e-3)
    assert itl.low == pytest.approx(0.5, rel=1e-3)
    assert itl.level is not None
    assert itl.level >= 0.95
    assert itl.rounds == 8
    assert found["requests per second"].ratio == pytest.approx(1.0)
    assert compare.remarks(ours, theirs) == ["A: 8 requests failed.", "B: 8 requests failed."]
    rows = {row[0]: row for row in compare.table(list(found.values()))}
    assert rows["ITL p50, ms"][-1] == "A"
    assert rows["requests per second"][-1] == "neither"


def test_what_weakens_a_comparison_is_said() -> None:
    apart = compare.remarks(make_record(3), make_record(2, began=100.0))
    assert any("3 rounds" in note for note in apart)
    assert any("in turns" in note for note in apart)
    one = compare.compare(make_record(), make_record(began=5.0))
    assert all(each.low is None for each in one)
    assert all(row[-1] == "?" for row in compare.table(one)[1:])


def test_another_load_is_not_compared() -> None:
    with pytest.raises(RequestError, match="compare: rate"):
        compare.compare(make_record(), make_record(rate=3.0))
    with pytest.raises(RequestError, match="prompt_tokens"):
        compare.compare(make_record(), make_record(prompt_tokens=Lengths.parse("prompt_tokens", "5")))
    assert compare.compare(make_record(), make_record(base_url="http://other:1", model="b"))


def test_the_interval_of_a_median_holds_it_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    for count in (3, 8, 15):
        draws = random.exponential(1.0, (2000, count))
        found = [median_interval(row.tolist()) for row in draws]
        held = np.mean([low <= np.log(2) <= high for low, high, _ in found])
        level = found[0][2]
        assert held == pytest.approx(level, abs=0.02)
