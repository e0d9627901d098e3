"""Our server and llama-server, on the same model with the same clients, in turns.

    python bench/peers.py install llama.cpp
    python bench/two_servers.py [--rounds 5] [--clients 32] [--out NAME]

Each side is started anew for its turn, warmed up, and given the same requests by `python -m fastllm.bench`:
C clients, each with one request under way, prompts of 32 to 256 tokens, answers of 32 to 128, streamed. Only
one server runs at a time. llama-server runs with as many slots as there are clients, continuous batching, a
KV cache that is split among them and flash attention, the setting that was best of those tried (`--settings`
tries them). Its prompt cache is on, as ours is; no prompt is asked twice. Goals: twice its throughput at
least, with lower p50 and p99 of the time to the first token.

Writes OUT.json (the figures of every round) and OUT.md. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import machine
import models
import peers

from fastllm.bench.intervals import median_interval

OUT = machine.ROOT / "docs" / "benchmarks" / "serving_vs_llamacpp"
CONTEXT = 512  # tokens of a request at most
SETTINGS: dict[str, tuple[str, ...]] = {
    "flash": ("-fa", "on", "--kv-unified"),
    "no-flash": ("-fa", "off", "--kv-unified"),
    "split": ("-fa", "on", "--no-kv-unified"),
    "small-batch": ("-fa", "on", "--kv-unified", "-ub", "128"),
    "no-polling": ("-fa", "on", "--kv-unified", "--poll", "0"),
    "split-no-polling": ("-fa", "on", "--no-kv-unified", "--poll", "0"),
}
BEST = "split"
FIGURES = ("tokens_per_second", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def command(side: str, model: Path, port: int, options: argparse.Namespace) -> list[str]:
    """How a side is started."""
    clients, threads = options.clients, options.threads
    if side == "fastllm":
        return [
            *(sys.executable, "-m", "fastllm.serve", "--model", str(model), "--port", str(port)),
            *("--max-num-seqs", str(clients), "--max-model-len", str(CONTEXT), "--threads", str(threads)),
            *("--served-model-name", "model"),
        ]
    return [
        *(str(peers.llama("llama-server")), "-m", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *("-c", str(CONTEXT * clients), "-np", str(clients), "-t", str(threads), "-tb", str(threads)),
        *("-a", "model", "--no-webui", *SETTINGS[side]),
    ]


def wait(url: str, process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit("the server did not come up")


def turn(side: str, model: Path, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """One side once."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        command(side, model, port, options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait(url, process)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "load"
            load = [
                *(sys.executable, "-m", "fastllm.bench", "serve", "--base-url", url, "--model", "model"),
                *("--concurrency", str(options.clients), "--requests", str(options.requests)),
                *("--warmup", str(options.clients), "--prompt-tokens", "uniform:32:256"),
                *("--output-tokens", "uniform:32:128", "--seed", str(seed), "--out", str(out), "--quiet"),
            ]
            subprocess.run(load, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
            return figures(json.loads(out.with_suffix(".json").read_text()))
    finally:
        process.terminate()
        process.wait()


def figures(record: dict[str, Any]) -> dict[str, float]:
    """What is compared of a run."""
    summary = record["rounds"][-1]["summary"]
    if summary["errors"]:
        raise SystemExit(f"requests failed: {summary['errors']}")
    latency = summary["latency_ms"]
    return {
        "tokens_per_second": summary["output_tokens_per_second"],
        "ttft_p50": latency["ttft"]["p50"],
        "ttft_p99": latency["ttft"]["p99"],
        "itl_p50": latency["itl"]["p50"],
        "itl_p99": latency["itl"]["p99"],
    }


def run(options: argparse.Namespace) -> None:
    model = models.path(options.model)
    sides = ["fastllm", *(SETTINGS if options.settings else [BEST])]
    record: dict[str, Any] = {
        "machine": machine.describe(["fastllm", "aiohttp"]),
        "model": machine.file_facts(model),
        "llama.cpp": peers.LLAMA_CPP,
        "clients": options.clients,
        "requests": options.requests,
        "threads": options.threads,
        "settings": {side: SETTINGS[side] for side in sides[1:]},
        "rounds": [],
    }
    for number in range(options.rounds):
        found: dict[str, Any] = {"load_average": os.getloadavg()[0]}
        for side in sides if number % 2 == 0 else sides[::-1]:
            found[side] = turn(side, model, number, options)
            speed = found[side]["tokens_per_second"]
            print(f"{side} {number + 1}/{options.rounds}: {speed:.0f} tokens/s", file=sys.stderr, flush=True)
        record["rounds"].append(found)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(table(record))
    print(options.out.with_suffix(".md").read_text())


def table(record: dict[str, Any]) -> str:
    about, rounds = record["machine"], record["rounds"]
    lines = [
        "# Two servers",
        "",
        f"Made by `bench/two_servers.py`; {about['date']}, {about['processor']}, "
        f"{record['threads']} threads, {record['model']['name']}, llama.cpp b{record['llama.cpp']}. "
        f"{record['clients']} clients, "
        f"{record['requests']} requests a round: 32 to 256 tokens in, 32 to 128 out, streamed. "
        f"{len(rounds)} rounds in turns; medians, and ratios with their 95 % intervals.",
        "",
        "| | tokens/s | first token p50, ms | p99 | between tokens p50, ms | p99 | throughput of fastllm |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for side in [key for key in rounds[0] if key != "load_average"]:
        cells = [statistics.median(item[side][name] for item in rounds) for name in FIGURES]
        ratio = ""
        if side != "fastllm":
            values = [
                item["fastllm"]["tokens_per_second"] / item[side]["tokens_per_second"] for item in rounds
            ]
            low, high, _ = median_interval(values)
            ratio = f"**{statistics.median(values):.2f}** ({low:.2f} to {high:.2f})"
        name = side if side == "fastllm" else f"llama-server {' '.join(record['settings'][side])}"
        lines.append(f"| {name} | " + " | ".join(f"{cell:.0f}" for cell in cells) + f" | {ratio} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-q4_1", help="a name of bench/models.py")
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--clients", type=int, default=32, help="(32)")
    parser.add_argument("--requests", type=int, default=96, help="of a round (96)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--settings", action="store_true", help="try all settings of llama-server")
    parser.add_argument("--out", type=Path, default=OUT, help="without suffix")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
