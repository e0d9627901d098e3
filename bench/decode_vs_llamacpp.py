"""One sequence at a time, fastllm against llama.cpp on the same file: decode and prefill, tokens per second.

    python bench/decode_vs_llamacpp.py --llama-bench PATH [--pairs 15] [--json FILE]

decode: 128 tokens after a prompt of 8. prefill: a prompt of 512. Every measurement is a process of its own,
which loads the model, warms up and measures a few times; its figure is the median. The programs take turns,
fastllm, llama.cpp without flash attention, llama.cpp with it, and again, so that a change of the machine's
pace meets all of them. llama.cpp is taken with the setting that has the higher median. A ratio is the median
over the rounds; its interval, by order statistics, holds the true median with at least 95 % from 6 rounds on.

fastllm's time is that of its engine, sampling, scheduling and the tokens' way out included; llama-bench
leaves sampling out. Run it on a machine that does nothing else: the record says how busy it was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import machine

DECODED = 128
DEPTH = 8  # tokens in the cache when decoding begins
PREFILL = 512
SETTINGS = ("off", "on")  # llama.cpp's flash attention
FASTLLM, PEER = "fastllm", "llama.cpp, flash attention {}"

Figures = dict[str, float]
"""Work -> tokens per second."""


# -- one process each ----------------------------------------------------------------------------------------


def measure_fastllm(model: str, threads: int, repeats: int) -> Figures:
    """In this process, through `LLM.generate`."""
    import numpy as np

    from fastllm import LLM, SamplingParams

    samples: dict[str, list[float]] = {"decode": [], "prefill": []}
    with LLM(model, threads=threads, max_model_len=PREFILL + DEPTH + DECODED + 2, max_num_seqs=1) as llm:
        ids = np.random.default_rng(0).integers(100, llm.get_tokenizer().vocab_size, PREFILL).tolist()
        decode = SamplingParams(temperature=0, max_tokens=DECODED + 1, ignore_eos=True)
        prefill = SamplingParams(temperature=0, max_tokens=1)
        for repeat in range(repeats + 1):  # the first one warms up
            for work, prompt, params in (("decode", ids[:DEPTH], decode), ("prefill", ids, prefill)):
                (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
                times = output.metrics
                assert times is not None
                first, last = times.first_token_time, times.last_token_time
                assert first is not None
                assert last is not None
                assert times.num_generated_tokens == params.max_tokens
                rate = (
                    DECODED / (last - first) if work == "decode" else PREFILL / (first - times.arrival_time)
                )
                if repeat:
                    samples[work].append(rate)
    return {work: statistics.median(rates) for work, rates in samples.items()}


def run_fastllm(options: argparse.Namespace) -> Figures:
    """In a process of its own."""
    arguments = [options.model, str(options.threads), str(options.repeats)]
    done = subprocess.run(
        [sys.executable, __file__, "--measure", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    figures: Figures = json.loads(done.stdout)
    return figures


def run_llama_bench(options: argparse.Namespace, setting: str) -> tuple[Figures, dict[str, Any]]:
    """One llama-bench for each work, since a depth would hold for both. With what it says about itself."""
    common = ["-m", options.model, "-t", str(options.threads), "-r", str(options.repeats), "-fa", setting]
    figures: Figures = {}
    for work, shape in (
        ("decode", ["-p", "0", "-n", str(DECODED), "-d", str(DEPTH)]),
        ("prefill", ["-p", str(PREFILL), "-n", "0"]),
    ):
        done = subprocess.run(
            [options.llama_bench, *common, *shape, "-o", "json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        )
        (row,) = json.loads(done.stdout)
        figures[work] = statistics.median(row["samples_ts"])
    about = ("build_commit", "build_number", "cpu_info", "backends", "model_type", "type_k", "type_v")
    return figures, {key: row[key] for key in about if key in row}


# -- ratios --------------------------------------------------------------------------------------------------


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The closest two order statistics that enclose the true median with 95 %, and with how much they do.

    Of n independent values, the k-th smallest and the k-th largest do with probability
    1 - 2 P(Binomial(n, 1/2) < k). Fewer than 6 values cannot; then it is the least and the greatest.
    """
    n, ordered = len(values), sorted(values)
    outside = [2 * sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(n // 2 + 1)]
    k = max([k for k in range(1, n // 2 + 1) if outside[k] <= 0.05], default=1)
    return ordered[k - 1], ordered[n - k], (1 - outside[k]) if k < len(outside) else 0.0


def compare(rounds: list[dict[str, Figures]], work: str) -> dict[str, Any]:
    """fastllm against the better setting of llama.cpp."""
    rates = {name: [figures[name][work] for figures in rounds] for name in rounds[0]}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = max((name for name in medians if name != FASTLLM), key=medians.__getitem__)
    ratios = [ours / theirs for ours, theirs in zip(rates[FASTLLM], rates[best], strict=True)]
    low, high, level = median_interval(ratios)
    return {
        "tokens_per_second": medians,
        "best_peer": best,
        "ratio": statistics.median(ratios),
        "interval": [low, high],
        "interval_level": level,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--llama-bench", required=True, help="llama.cpp's program, a native release build")
    parser.add_argument("--model", help="a GGUF file; otherwise the default model")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--pairs", type=int, default=15, help="rounds")
    parser.add_argument("--repeats", type=int, default=3, help="measurements in a process, besides a warm-up")
    parser.add_argument("--json", type=Path, help="write the record there")
    options = parser.parse_args()

    from fastllm.formats.source import DEFAULT_MODEL, resolve

    path = resolve(options.model or DEFAULT_MODEL)
    options.model = str(path)
    record: dict[str, Any] = {
        "machine": machine.describe(["fastllm", "numpy"]),
        "model": machine.file_facts(path),
        "threads": options.threads,
        "shape": {"decoded": DECODED, "depth": DEPTH, "prefill": PREFILL, "repeats": options.repeats},
        "llama.cpp": {},
        "rounds": [],
        "load_average": [],
    }
    for number in range(options.pairs):
        figures = {FASTLLM: run_fastllm(options)}
        for setting in SETTINGS:
            figures[PEER.format(setting)], record["llama.cpp"] = run_llama_bench(options, setting)
        record["rounds"].append(figures)
        record["load_average"].append(os.getloadavg()[0])
        rates = "  ".join(f"{name} {f['decode']:.1f} {f['prefill']:.1f}" for name, f in figures.items())
        print(f"round {number + 1}/{options.pairs}, decode and prefill: {rates}", file=sys.stderr)

    record["results"] = {work: compare(record["rounds"], work) for work in ("decode", "prefill")}
    print("| work | fastllm | llama.cpp | ratio | interval |\n|---|---|---|---|---|")
    for work, result in record["results"].items():
        medians, best = result["tokens_per_second"], result["best_peer"]
        low, high = result["interval"]
        print(
            f"| {work} | {medians[FASTLLM]:.1f} | {medians[best]:.1f} ({best.partition(', ')[2]}) "
            f"| {result['ratio']:.3f} | {low:.3f} to {high:.3f} ({result['interval_level']:.1%}) |"
        )
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure_fastllm(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
    else:
        main()
