"""The load generator against a server with known delays and known faults.

What arrives cannot be earlier than it was sent: that bound is strict. How much later it is depends on what
else the machine does, so that other bounds are wide, and on medians only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import tiny
from bench_server import Behaviour, Server, serving

from fastllm.bench.__main__ import main
from fastllm.bench.arrivals import arrival_times
from fastllm.bench.rounds import read_record
from fastllm.formats.tokenizer import Tokenizer

LATE = 0.5  # seconds that a median may be late on a machine that others use


class Runs:
    """Runs `serve` in this process."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys
        self.out = self.err = ""

    def run(self, url: str, *arguments: str, out: str = "r") -> int:
        name = str(self.folder / out) if out != "-" else "-"
        status = main(["serve", "--base-url", url, "--out", name, *arguments])
        self.out, self.err = self._capsys.readouterr()
        return status

    def round(self, out: str = "r") -> dict[str, Any]:
        found = read_record(self.folder / f"{out}.json")["rounds"][-1]
        assert isinstance(found, dict)
        return found


@pytest.fixture
def runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runs:
    return Runs(tmp_path, capsys)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as made:
        yield made


def measured(server: Server, made: dict[str, Any]) -> list[tuple[dict[str, Any], Any]]:
    """A round's requests beside what the server logged of them; one client sends them in order."""
    return list(zip(made["requests"], server.log[-len(made["requests"]) :], strict=True))


# -- right figures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_latencies_are_the_delays_of_the_server(server: Server, runs: Runs, endpoint: str) -> None:
    server.behaviour.first, server.behaviour.gap = 0.06, 0.02
    assert runs.run(server.url, "--endpoint", endpoint, "--requests", "12", "--concurrency", "3",
                    "--output-tokens", "8", "--warmup", "2") == 0  # fmt: skip
    made = runs.round()
    latency = made["summary"]["latency_ms"]
    assert made["summary"]["ok"] == 12
    assert latency["itl"]["count"] == 12 * 7
    for name, least in (("ttft", 60), ("tpot", 20), ("e2e", 60 + 7 * 20)):
        assert least <= latency[name]["p50"] <= least + LATE * 1e3
        assert latency[name]["p50"] <= latency[name]["p90"] <= latency[name]["p99"] <= latency[name]["max"]
    sent = [entry.tokens for entry in server.log[-12:]]
    theirs = sorted(late - early for its in sent for early, late in pairwise(its))
    assert latency["itl"]["p50"] / 1e3 == pytest.approx(median(theirs), abs=0.05)
    assert latency["ttft"]["p50"] / 1e3 == pytest.approx(
        median(entry.tokens[0] - entry.came for entry in server.log[-12:]), abs=LATE
    )


def test_no_token_is_seen_before_it_was_sent(server: Server, runs: Runs) -> None:
    """Both clocks are the machine's one monotonic clock."""
    server.behaviour.gap = 0.01
    begin = time.perf_counter()
    assert runs.run(server.url, "--requests", "6", "--output-tokens", "10", "--warmup", "0") == 0
    made = runs.round()
    start = made["requests"][0]["scheduled"]
    for request, entry in measured(server, made):
        assert len(request["tokens"]) == len(entry.tokens) == 10
        shift = entry.came - request["sent"]  # clock of the server's log against seconds of the round
        assert begin <= shift + start
        for seen, sent in zip(request["tokens"], entry.tokens, strict=True):
            # `came` is later than `sent` by the request's way to the server.
            assert seen + shift >= sent - 2e-6
        before = [request[name] for name in ("scheduled", "sent", "first_byte")]
        times = [*before, *request["tokens"], request["end"]]
        assert times == sorted(times)


def test_clients_wait_for_their_answers(server: Server, runs: Runs) -> None:
    server.behaviour.first = 0.02
    assert runs.run(server.url, "--requests", "20", "--concurrency", "4", "--output-tokens", "2") == 0
    made = runs.round()
    times = [(r["sent"], 1) for r in made["requests"]] + [(r["end"], -1) for r in made["requests"]]
    under_way, most = 0, 0
    for _, change in sorted(times):
        under_way += change
        most = max(most, under_way)
    assert most == 4
    assert server.connections <= 8  # connections are used again


def test_an_open_loop_sends_at_its_times(server: Server, runs: Runs) -> None:
    server.behaviour.first = 0.3  # far longer than the gaps
    arguments = ["--rate", "60", "--requests", "30", "--output-tokens", "1", "--seed", "7"]
    assert runs.run(server.url, *arguments) == 0
    made = runs.round()
    due = [request["scheduled"] for request in made["requests"]]
    assert due == pytest.approx(arrival_times("poisson", 60.0, 7, requests=30), abs=1e-5)
    assert all(request["sent"] >= request["scheduled"] - 1e-6 for request in made["requests"])
    assert median(request["sent"] - request["scheduled"] for request in made["requests"]) < LATE


def test_waiting_for_a_place_counts_from_the_scheduled_time(server: Server, runs: Runs) -> None:
    """Coordinated omission: one at a time, 0.1 s each, ten due at once."""
    server.behaviour.first = 0.1
    assert runs.run(server.url, "--rate", "1000", "--arrivals", "constant", "--requests", "10",
                    "--concurrency", "1", "--output-tokens", "1") == 0  # fmt: skip
    latency = runs.round()["summary"]["latency_ms"]
    assert latency["ttft_scheduled"]["max"] >= 10 * 100 - 10
    assert latency["ttft_scheduled"]["p50"] >= latency["ttft"]["p50"] + 300


def test_a_round_ends_with_its_time(server: Server, runs: Runs) -> None:
    server.behaviour.first = 0.05
    assert runs.run(server.url, "--seconds", "0.5", "--concurrency", "2", "--output-tokens", "1") == 0
    made = runs.round()
    assert all(request["sent"] < 0.5 + LATE for request in made["requests"])
    assert made["summary"]["unfinished"] == 0
    assert 2 <= made["summary"]["ok"] <= 2 * 11


def test_what_is_under_way_at_the_end_is_cut_off(server: Server, runs: Runs) -> None:
    server.behaviour.gap = 0.05
    arguments = ["--seconds", "0.4", "--concurrency", "2", "--output-tokens", "200", "--drain", "0.1"]
    assert runs.run(server.url, *arguments, "--warmup", "0") == 1  # none succeeded
    summary = runs.round()["summary"]
    assert (summary["unfinished"], summary["ok"], summary["failed"]) == (2, 0, 0)
    assert summary["latency_ms"]["itl"]["p50"] >= 50
    assert summary["output_tokens"] == sum(len(r["tokens"]) for r in runs.round()["requests"])


def test_answers_in_one_piece(server: Server, runs: Runs) -> None:
    server.behaviour.first, server.behaviour.gap = 0.02, 0.01
    for endpoint in ("completions", "chat"):
        assert runs.run(server.url, "--endpoint", endpoint, "--no-stream", "--requests", "4",
                        "--output-tokens", "5") == 0  # fmt: skip
        made = runs.round()
        assert made["summary"]["output_tokens"] == 20
        assert made["summary"]["latency_ms"]["ttft"] is None
        assert made["summary"]["latency_ms"]["e2e"]["p50"] >= 60
        assert any("Not streamed" in note for note in made["notes"])
        assert "stream_options" not in server.log[-1].body


def test_tokens_are_those_of_usage_though_pieces_hold_several(server: Server, runs: Runs) -> None:
    server.behaviour.piece = 3
    server.behaviour.gap = 0.03
    assert runs.run(server.url, "--requests", "4", "--output-tokens", "10") == 0
    made = runs.round()
    assert made["summary"]["output_tokens"] == 40
    assert made["summary"]["counted_by"] == ["usage"]
    assert made["summary"]["latency_ms"]["itl"]["count"] == 4 * 3
    assert made["summary"]["latency_ms"]["tpot"]["p50"] >= 3 * 30 / 9
    assert any("2.50 tokens" in note for note in made["notes"])


def test_without_usage_pieces_are_counted(server: Server, runs: Runs, tmp_path: Path) -> None:
    server.behaviour.usage = False
    (tmp_path / "d.jsonl").write_text('{"prompt": "a b c", "max_tokens": 6}\n')
    assert runs.run(server.url, "--requests", "3", "--dataset", str(tmp_path / "d.jsonl")) == 0
    made = runs.round()
    assert made["summary"]["counted_by"] == ["chunks"]
    assert made["summary"]["output_tokens"] == 18
    assert any("no `usage`" in note for note in made["notes"])
    assert "(by chunks)" in runs.out
    assert runs.run(server.url, "--requests", "3") == 2  # random words cannot be counted
    assert "tokenizer" in runs.err


def test_prompts_have_the_wanted_length_by_the_servers_count(server: Server, runs: Runs) -> None:
    server.behaviour.overhead = 9
    assert runs.run(server.url, "--requests", "10", "--prompt-tokens", "uniform:30:90",
                    "--output-tokens", "1", "--prefix-groups", "2", "--prefix-tokens", "50") == 0  # fmt: skip
    for request in runs.round()["requests"]:
        assert request["prompt_tokens"] == request["wanted_prompt_tokens"]
        assert request["group"] in (0, 1)
    prompts = [entry.body["prompt"] for entry in server.log[-10:]]
    assert len({" ".join(prompt.split()[:50]) for prompt in prompts}) <= 2
    assert len(set(prompts)) == 10
    assert runs.run(server.url, "--prompt-tokens", "5") == 2
    assert "at least 10" in runs.err


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_prompts_have_the_wanted_length_by_a_tokenizer(server: Server, runs: Runs, endpoint: str) -> None:
    tiny.save_tokenizer(runs.folder)
    tokenizer = Tokenizer.from_directory(runs.folder)
    arguments = ["--requests", "6", "--prompt-tokens", "uniform:40:300", "--output-tokens", "1"]
    arguments += ["--tokenizer", str(runs.folder), "--endpoint", endpoint]
    server.behaviour.usage = False  # nobody else counts
    assert runs.run(server.url, *arguments) == 0
    for request, entry in measured(server, runs.round()):
        text = entry.body["prompt"] if endpoint == "completions" else entry.body["messages"][0]["content"]
        have = len(tokenizer.encode(text, add_special_tokens=False))
        assert abs(have - request["wanted_prompt_tokens"]) <= 12  # the tokens of one word
    assert any("not known" in note for note in runs.round()["notes"])
    assert runs.run(server.url, *arguments[:-4], "--tokenizer", "/nowhere/at/all") == 2


def test_rounds_ask_for_other_things_and_two_records_for_the_same(server: Server, runs: Runs) -> None:
    arguments = ["--requests", "3", "--output-tokens", "2", "--warmup", "2", "--append"]
    asked = {}
    for out in ("a", "b", "a", "b"):
        assert runs.run(server.url, *arguments, out=out) == 0
        asked.setdefault(out, []).append([entry.body["prompt"] for entry in server.log[-3:]])
    assert asked["a"] == asked["b"]
    everything = [entry.body["prompt"] for entry in server.log]
    assert len(set(everything)) == len(everything) // 2  # neither rounds nor warm-up repeat a prompt
    assert [each["seed"] for each in read_record(runs.folder / "a.json")["rounds"]] == [0, 1]
    files = [str(runs.folder / f"{name}.json") for name in "ab"]
    assert main(["serve", "--compare", *files]) == 0
    assert runs.run(server.url, *arguments, "--prompt-tokens", "64", out="a") == 2
    assert "append: prompt_tokens" in runs.err


def test_fields_that_a_server_does_not_know_are_left_out(server: Server, runs: Runs) -> None:
    server.behaviour.refused = ("ignore_eos",)
    server.behaviour.end_of_text = 3
    assert runs.run(server.url, "--requests", "3", "--output-tokens", "8") == 0
    notes = runs.round()["notes"]
    assert any("refuses ignore_eos" in note for note in notes)
    assert any("3 answers ended before" in note for note in notes)
    assert "stream_options" in server.log[-1].body
    server.behaviour.refused = ("max_tokens",)
    assert runs.run(server.url, "--requests", "3") == 2
    assert "HTTP 400: unknown field max_tokens" in runs.err


def test_extra_fields_replace_ours_and_null_takes_one_away(server: Server, runs: Runs) -> None:
    extra = '{"top_k": 1, "max_tokens": null, "max_completion_tokens": 4}'
    assert runs.run(server.url, "--requests", "2", "--extra", extra, "--temperature", "none") == 0
    body = server.log[-1].body
    assert (body["top_k"], body["max_completion_tokens"], body["model"]) == (1, 4, "tiny")
    assert not {"max_tokens", "temperature"} & body.keys()


def test_keys_and_headers_are_sent_and_not_kept(
    server: Server, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.behaviour.key = "s3cret"
    assert runs.run(server.url, "--requests", "1") == 2
    assert "HTTP 401" in runs.err
    monkeypatch.setenv("SERVER_KEY", "s3cret")
    assert runs.run(server.url, "--requests", "1", "--api-key-env", "SERVER_KEY") == 0
    for path in runs.folder.iterdir():
        assert "s3cret" not in path.read_text()
    assert runs.run(server.url, "--requests", "1", "--api-key-env", "NOT_SET") == 2


def test_a_connection_that_the_server_closed_is_no_failure(server: Server, runs: Runs) -> None:
    """It announces nothing and closes after each answer; what was sent into that is sent again."""
    server.behaviour.fault = "stream:no keep-alive"
    assert runs.run(server.url, "--requests", "20", "--concurrency", "2", "--output-tokens", "2") == 0
    assert runs.round()["summary"]["failed"] == 0
    assert runs.run(server.url, "--requests", "5", "--no-keep-alive", "--output-tokens", "2") == 0
    assert not any(request.get("reused") for request in runs.round()["requests"])


# -- faults --------------------------------------------------------------------------------------------------

PROBES = 8  # requests by which the server counts

FAULTS = {
    "503": ("HTTP 503", "it is 503"),
    "429": ("HTTP 429", "it is 429"),
    "302": ("HTTP 302", "it is 302"),
    "close": ("cut short", "closed the connection"),
    "no http": ("bad answer", "no HTTP"),
    "html": ("bad answer", "text/html"),
    "hang": ("timeout: silence", None),
    "stream:error": ("error in the answer", "out of memory"),
    "stream:event": ("error in the answer", "overloaded"),
    "stream:nonsense": ("bad answer", "no JSON"),
    "stream:list": ("bad answer", "no JSON object"),
    "stream:cut": ("cut short", "closed the connection"),
    "stream:cut clean": ("cut short", "neither [DONE] nor"),
    "stream:hang": ("timeout: silence", None),
    "stream:silent": ("timeout: silence", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_failed_request_and_the_others_go_on(server: Server, runs: Runs, fault: str) -> None:
    server.behaviour.fault, server.behaviour.spared, server.behaviour.faulty = fault, PROBES + 2, 2
    status = runs.run(server.url, "--requests", "6", "--output-tokens", "4", "--warmup", "0",
                      "--no-keep-alive", "--silence-timeout", "0.4")  # fmt: skip
    summary = runs.round()["summary"]
    kind, detail = FAULTS[fault]
    assert status == 0
    assert summary["errors"] == {kind: 2}
    assert (summary["ok"], summary["failed"]) == (4, 2)
    failed = [request for request in runs.round()["requests"] if request["status"] == "failed"]
    assert [request["index"] for request in failed] == [2, 3]
    assert all(detail is None or detail in request["detail"] for request in failed)
    assert f"error: {kind}" in runs.out
    assert detail is None or detail in runs.out
    assert "\x1b" not in runs.out + (runs.folder / "r.md").read_text()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_with_a_fault_from_the_start_is_an_error(server: Server, runs: Runs, fault: str) -> None:
    server.behaviour.fault = fault
    assert runs.run(server.url, "--silence-timeout", "0.4") == 2
    kind, detail = FAULTS[fault]
    assert runs.err.startswith(f"fastllm.bench: error: {server.url}/v1/completions: {kind}")
    assert detail is None or detail in runs.err
    assert len(runs.err.splitlines()) == 1
    assert "\x1b" not in runs.err
    assert runs.out == ""
    assert not list(runs.folder.iterdir())


def test_a_stream_may_end_without_done_after_a_finish_reason(server: Server, runs: Runs) -> None:
    server.behaviour.fault = "stream:no done"
    assert runs.run(server.url, "--requests", "3", "--output-tokens", "2") == 0
    assert runs.round()["summary"]["ok"] == 3


def test_a_whole_request_has_a_time_limit(server: Server, runs: Runs) -> None:
    server.behaviour.gap = 0.05
    arguments = ["--requests", "1", "--output-tokens", "100", "--warmup", "0", "--timeout", "0.6"]
    assert runs.run(server.url, *arguments) == 1
    assert runs.round()["summary"]["errors"] == {"timeout: whole request": 1}


def test_nobody_there(runs: Runs) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert runs.run(url) == 2  # bound, but not listening
        assert "no connection" in runs.err
        begin = time.perf_counter()
        assert runs.run(url, "--wait", "0.6") == 2
        assert time.perf_counter() - begin >= 0.6
    assert runs.run("http://name.invalid:1") == 2


def test_a_server_that_goes_away_in_the_middle(runs: Runs) -> None:
    """Every request after that fails, and the clients wait in between."""
    with serving(Behaviour(gap=0.01)) as server:
        server.behaviour.fault, server.behaviour.spared = "close", PROBES + 3
        begin = time.perf_counter()
        assert runs.run(server.url, "--requests", "7", "--output-tokens", "2", "--warmup", "0") == 0
        assert runs.round()["summary"]["errors"] == {"cut short": 4}
        assert time.perf_counter() - begin >= 0.1 + 0.2 + 0.4


@pytest.mark.parametrize(
    "arguments",
    [
        ["--base-url", "ftp://x"],
        ["--base-url", "http://"],
        ["--base-url", "http://u:p@h"],
        ["--base-url", "http://h:99999"],
        ["--rate", "-1"],
        ["--requests", "0"],
        ["--seconds", "nan"],
        ["--spike", "1:1:2"],
        ["--prefix-groups", "2"],
        ["--shuffle"],
        ["--extra", "[]"],
        ["--extra", "{"],
        ["--extra", '{"n": 2}'],
        ["--extra", '{"stream": false}'],
        ["--slo", "ttft=5"],
        ["--slo", "ttft_ms"],
        ["--header", "no colon"],
        ["--header", "A: b\r\nC: d"],
        ["--dataset", "/nowhere/at/all"],
        ["--out", "/nowhere/at/all"],
        ["--out", "-", "--append"],
        ["--ca", "/nowhere/at/all"],
        ["--compare", "/nowhere/a.json", "/nowhere/b.json"],
    ],
)
def test_bad_arguments_are_one_line(server: Server, runs: Runs, arguments: list[str]) -> None:
    assert main(["serve", "--base-url", server.url, "--out", "-", *arguments]) == 2
    _, err = runs._capsys.readouterr()
    assert err.startswith("fastllm.bench: error: ")
    assert len(err.splitlines()) == 1
    assert "u:p" not in err


# -- the program ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def program(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`python -m fastllm.bench serve` that Ctrl-C reaches, and that does not outlive its test."""

    def heed() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-m", "fastllm.bench", "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_ctrl_c_ends_it_with_the_figures_so_far(server: Server, tmp_path: Path) -> None:
    server.behaviour.gap = 0.02
    arguments = ["--base-url", server.url, "--concurrency", "2", "--requests", "100000"]  # made as it goes
    arguments += ["--output-tokens", "5", "--warmup", "0"]
    with program(*arguments, "--out", str(tmp_path / "r")) as process:
        until(lambda: len(server.log) > PROBES + 6)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "note: Stopped before its end." in out
    made = read_record(tmp_path / "r.json")["rounds"][0]
    assert made["stopped"]
    assert made["summary"]["ok"] >= 4
    assert 1 <= made["summary"]["unfinished"] <= 2
    assert made["summary"]["failed"] == 0


def test_ctrl_c_before_the_start_ends_it_at_once(server: Server, tmp_path: Path) -> None:
    server.behaviour.fault = "hang"
    with program("--base-url", server.url, "--out", str(tmp_path / "r")) as process:
        until(lambda: server.log)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")
    assert not list(tmp_path.iterdir())


def test_without_its_extra_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['aiohttp'] = None\n"
        "from fastllm.bench.__main__ import main; sys.exit(main(['serve']))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'fastllm[bench]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    code = "import sys, fastllm, fastllm.bench.svg; sys.exit('aiohttp' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_files_are_written_where_it_was_said(server: Server, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "fastllm.bench",
            "serve",
            "--base-url",
            server.url + "/v1/",
            "--requests",
            "2",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    names = sorted(path.suffix for path in tmp_path.iterdir())
    assert names == [".json", ".md", ".svg"]
    assert "time to first token" in done.stdout
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert found["rounds"][0]["server"]["version"] == "1.2.3"
    assert found["rounds"][0]["server"]["server"] == "fake/1"
