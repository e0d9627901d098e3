"""bench/ablation.py: every configuration gives the same answers; the report is arithmetic on the record."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import ablation
import ablation_report
import peaks

SHAPE = [
    *("--requests", "8", "--system", "40", "--own", "4,20", "--answer", "2,24"),
    *("--max-model-len", "128", "--reservations", "2", "--threads", "1"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_gguf(tiny.make_model(), tmp_path_factory.mktemp("ablation") / "model.gguf")


# -- the requests --------------------------------------------------------------------------------------------


def test_requests_are_the_same_for_a_seed_and_of_the_lengths_asked_for(model: Path) -> None:
    options = ablation.parse([*SHAPE, "--rate", "5"])
    requests = ablation.workload(options, model)
    assert requests == ablation.workload(options, model)
    assert requests != ablation.workload(ablation.parse([*SHAPE, "--rate", "5", "--seed", "1"]), model)
    assert len(requests) == 8
    assert len({tuple(request["prompt"][:40]) for request in requests}) == 1
    assert len({tuple(request["prompt"]) for request in requests}) == 8
    assert all(44 <= len(request["prompt"]) <= 60 and 2 <= request["tokens"] <= 24 for request in requests)
    arrivals = [request["at"] for request in requests]
    assert arrivals[0] == 0 < arrivals[1]
    assert arrivals == sorted(arrivals)


@given(
    answers=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=4),
    count=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_single_tokens_are_drawn_once_each_with_the_text_before_them(
    answers: list[list[int]], count: int, seed: int
) -> None:
    requests = [{"prompt": [100 + i], "tokens": len(a), "seed": i, "at": 3.0} for i, a in enumerate(answers)]
    asked, expected = ablation.single_tokens(requests, answers, count, seed)
    assert len(asked) == min(count, sum(map(len, answers)))
    places = [(request["seed"], len(request["prompt"]) - 1) for request in asked]
    assert len(set(places)) == len(places)
    for request, wanted, (index, place) in zip(asked, expected, places, strict=True):
        assert request["prompt"] == [100 + index, *answers[index][:place]]
        assert (request["tokens"], request["at"], wanted) == (1, 0.0, [answers[index][place]])


def test_an_answer_that_differs_ends_the_run() -> None:
    case = ablation.CASES[1]
    ablation.check_answers(case, [[1, 2], [3]], [[1, 2], [3]])
    with pytest.raises(SystemExit, match="one: request 0: token 1 differs"):
        ablation.check_answers(case, [[1, 7], [3]], [[1, 2], [3]])
    with pytest.raises(SystemExit, match="request 1: 0 tokens, not 1"):
        ablation.check_answers(case, [[1, 2], []], [[1, 2], [3]])


# -- every configuration -------------------------------------------------------------------------------------


def test_every_row_runs_and_does_what_it_is_called(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peaks, "measure", lambda *_: {"int8": 1e11})
    options = ablation.parse([*SHAPE, "--model", str(model), "--rounds", "1", "--out", str(tmp_path)])
    record = ablation.run(options)
    rounds = {row["name"]: row["rounds"][0] for row in record["rows"]}
    assert list(rounds) == [case.name for case in ablation.CASES]
    total = sum(record["answer_tokens"])
    assert {name: its["generated"] for name, its in rounds.items()} == {
        name: min(options.sampled, total) if name == "no-cache" else total for name in rounds
    }
    most = {name: its["most_at_once"] for name, its in rounds.items()}
    assert [most[name] for name in ("no-cache", "one", "static", "continuous")] == [1, 1, 2, 2]
    assert most["paged"] > 2
    for name in ("one", "static", "continuous"):  # each token of prompts and answers, but the last, once
        assert rounds[name]["computed"] == sum(record["prompt_tokens"]) + total - 8
    assert rounds["continuous"]["steps"] < rounds["static"]["steps"] < rounds["one"]["steps"]
    assert rounds["no-cache"]["computed"] > options.sampled * 44
    assert [name for name, its in rounds.items() if its["prefix_hits"]] == ["prefix", "int8", "lookup"]
    assert rounds["prefix"]["computed"] < rounds["continuous"]["computed"]
    assert rounds["int8"]["kv_cache_bytes"] <= rounds["paged"]["kv_cache_bytes"]
    assert rounds["int8"]["num_blocks"] > rounds["paged"]["num_blocks"]
    assert [name for name, its in rounds.items() if its["draft_tokens"]] in ([], ["lookup"])
    assert record["answers"]["auto"]["equal"] == 8
    assert json.loads((tmp_path / "ablation.json").read_text())["rows"] == record["rows"]
    shown = (tmp_path / "ablation.md").read_text()
    assert all(case.title in shown for case in ablation.CASES)
    more = ["--model", str(model), "--rounds", "1", "--out", str(tmp_path), "--append"]
    with pytest.raises(SystemExit, match="--append: the record has other rows"):
        ablation.run(ablation.parse([*SHAPE, *more, "--rows", "paged"]))
    with pytest.raises(SystemExit, match="--append: seed"):
        ablation.run(ablation.parse([*SHAPE, *more, "--seed", "1"]))


def test_rounds_are_added_to_a_record_of_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peaks, "measure", lambda *_: {"int8": 1e11})
    more = ["--model", str(model), "--rounds", "1", "--rows", "paged", "--out", str(tmp_path), "--append"]
    first = ablation.run(ablation.parse([*SHAPE, *more]))
    second = ablation.run(ablation.parse([*SHAPE, *more, "--under", "nice -n 1"]))
    assert second["rows"][0]["rounds"][:1] == first["rows"][0]["rounds"]
    assert len(second["rows"][0]["rounds"]) == len(second["limits"]) == 2
    assert "2 interleaved rounds" in (tmp_path / "ablation.md").read_text()


def test_a_row_that_is_not_there_is_refused(model: Path) -> None:
    with pytest.raises(SystemExit, match="no such row: fast"):
        ablation.run(ablation.parse([*SHAPE, "--model", str(model), "--rows", "one,fast"]))


def test_a_request_longer_than_a_reservation_is_refused(model: Path) -> None:
    with pytest.raises(SystemExit, match="--max-model-len: 48 tokens"):
        ablation.Bench(ablation.parse([*SHAPE, "--max-model-len", "48"]), model)


# -- the report ----------------------------------------------------------------------------------------------


def a_round(seconds: float, **more: Any) -> dict[str, Any]:
    found = {
        "seconds": seconds,
        "generated": 100,
        "computed": 400,
        "at_once": 1.5,
        "most_at_once": 2,
        "peak_blocks": 5,
        "num_blocks": 10,
        "block_size": 16,
        "kv_cache_bytes": 1_000_000,
        "weight_bytes": 96_000_000,
        "peak_bytes": 150_000_000,
        "import_peak_bytes": 50_000_000,
        "gap_p50": 0.004,
        "gap_p99": 0.25,
        "first_seconds": [0.5, 1.0, 1.5, 2.0],
        "request_seconds": [2.0, 3.0, 4.0, seconds],
        "load_average": 1.0,
        **dict.fromkeys(("preemptions", "prefix_queries", "prefix_hits"), 0),
        **dict.fromkeys(("draft_tokens", "accepted_tokens"), 0),
    }
    return found | more


def a_record(rate: float = 0.0) -> dict[str, Any]:
    rows = [
        ("no-cache", False, False, [a_round(seconds, generated=4) for seconds in (8.0, 10.0, 9.0)]),
        ("continuous", True, True, [a_round(seconds) for seconds in (10.0, 5.0, 8.0)]),
        (
            "lookup",
            True,
            False,
            [
                a_round(seconds, draft_tokens=20, accepted_tokens=15, preemptions=3)
                for seconds in (5.0, 2.0, 4.0)
            ],
        ),
    ]
    titles = {case.name: case.title for case in ablation.CASES}
    return {
        "machine": {"date": "2026-01-01", "commit": "c" * 40, "processor": "<a processor>", "isa": "avx2"},
        "threads": 2,
        "rate": rate,
        "max_model_len": 64,
        "reservations": 2,
        "system": 20,
        "own": [2, 20],
        "answer": [8, 64],
        "sampled": 4,
        "dollars_per_hour": 0.36,
        "model": {
            "name": "a.gguf",
            "work": {
                "layer_weights": 1_000_000,
                "head_weights": 500_000,
                "layer_bytes": 600_000,
                "head_bytes": 300_000,
                "attention_width": 64,
                "kv_width": 32,
            },
        },
        "prompt_tokens": [30, 40],
        "answer_tokens": [10, 40],
        "limits": [{"int8": 1e9}, {"int8": 2e9}, {"int8": 1e9}],
        "answers": {"auto": {"equal": 2, "sha256": ""}, "int8": {"equal": 1, "sha256": ""}},
        "rows": [
            {"name": name, "title": titles[name], "keeps": keeps, "reserves": reserves, "rounds": rounds}
            for name, keeps, reserves, rounds in rows
        ],
    }


def test_results_are_the_arithmetic_of_the_rounds() -> None:
    loop, continuous, lookup = ablation_report.results(a_record())
    assert loop["tokens_per_second"] == 4 / 9
    assert "ratio" not in loop
    assert "request_p50" not in loop
    assert loop["kv_bytes"] == 0
    assert continuous["tokens_per_second"] == 12.5  # of 10, 20 and 12.5
    assert (continuous["least"], continuous["most"]) == (10.0, 20.0)
    assert continuous["requests_per_second"] == 0.5
    assert continuous["kv_bytes"] == 2 * 4 * 100_000  # two reservations of four blocks
    assert continuous["resident_bytes"] == 100_000_000
    assert continuous["dollars_per_million_tokens"] == pytest.approx(8.0)
    # 2 x (400 x 1e6 + 100 x 5e5) operations in 8 s, of 2 Gop/s
    assert continuous["of_int8_peak"] == pytest.approx(900e6 / 8 / 2e9)
    assert (continuous["first_p50"], continuous["first_p99"]) == (1.0, 2.0)
    assert continuous["request_p50"] == 3.0
    assert lookup["kv_bytes"] == 500_000
    assert lookup["ratio"] == {"median": 2.0, "low": 2.0, "high": 2.5}
    # five guesses went through the head in vain
    assert lookup["of_int8_peak"] == pytest.approx(2 * (400e6 + 105 * 5e5) / 4 / 2e9)


def test_at_a_rate_of_arrivals_the_ratio_is_that_of_the_requests_times() -> None:
    record = a_record(rate=3.0)
    for its in record["rows"][2]["rounds"]:
        its["request_seconds"] = [1.0, 1.5, 9.0, 9.0]
    assert ablation_report.results(record)[2]["ratio"]["median"] == 2.0
    assert "3 a second" in ablation_report.markdown(record, ablation_report.results(record))


def test_the_report_is_written_from_a_record_alone(tmp_path: Path) -> None:
    record = a_record()
    file = tmp_path / "some.json"
    file.write_text(json.dumps(record))
    ablation_report.save(json.loads(file.read_text()), file.with_suffix(""))
    shown = file.with_suffix(".md").read_text()
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
    assert len({line.count("|") for line in lines}) == 1
    assert "| 12.5 |" in lines[3]
    assert "| 2.00 (2.00 to 2.50) |" in lines[4]
    assert "not measured" in lines[2]
    assert "15 of 20 guesses were right" in shown
    assert "3 sequences a round lost their blocks" in shown
    assert "1 of 2 are those of int16" in shown
    drawing = ElementTree.fromstring(file.with_suffix(".svg").read_text())
    assert any(
        "<a processor>" in (text.text or "") for text in drawing.iter("{http://www.w3.org/2000/svg}text")
    )


@given(values=st.lists(st.integers(0, 50), min_size=1), share=st.floats(0.01, 1.0))
def test_a_quantile_is_the_least_value_that_covers_its_share(values: list[int], share: float) -> None:
    found = ablation_report.quantile(values, share)
    covered = sum(value <= found for value in values)
    below = sum(value < found for value in values)
    assert found in values
    assert below < share * len(values) <= covered
