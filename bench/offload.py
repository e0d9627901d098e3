"""What a prefix costs that is computed, known in memory, or brought back from the file; what saving costs.

    python bench/offload.py [MODEL] [--rounds 9] [--directory DIR] [--json FILE]

A prompt of 512 tokens whose first blocks, all but the last one's 16 tokens, are known or not; milliseconds to
its one token. Then a prompt of 2,048 tokens no token of which is known, in a cache that is full: each of its
blocks evicts one, and with a file each of those is written. Its variants take turns. Medians over the rounds.
The file's pages are where the system puts them, which is memory as long as there is some.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fastllm import SamplingParams
from fastllm.engine.engine import Engine
from fastllm.formats.source import DEFAULT_MODEL
from fastllm.loading import ModelOptions, load_model

PREFIX = 512
FILLER = 2048
FILE_BYTES = 1 << 30
VARIANTS: dict[str, dict[str, Any]] = {
    "no file": {},
    "file": {"kv_offload_bytes": FILE_BYTES},
    "encrypted": {"kv_offload_bytes": FILE_BYTES, "kv_offload_encrypted": True},
}


def make_engine(model: str, directory: str | None, options: dict[str, Any]) -> Engine:
    """An engine with room for one filler and little else."""
    if options:
        options = {**options, "kv_offload_dir": directory}
    return load_model(
        ModelOptions(model=model, kv_cache_tokens=FILLER + 64, max_model_len=FILLER + 64, **options)
    ).engine


def answer_ms(engine: Engine, prompt: list[int]) -> tuple[float, int, Any]:
    """Milliseconds to the one token, the prompt's known tokens, the token and its logprob."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=1, detokenize=False)
    start = time.perf_counter()
    engine.add_request("a", prompt, params)
    while engine.has_unfinished():
        outputs = engine.step()
    took = (time.perf_counter() - start) * 1e3
    (output,) = outputs
    return took, output.num_cached_tokens, (output.outputs[0].token_ids, output.outputs[0].logprobs)


def settle(engine: Engine) -> None:
    """Let the writer finish, so that what follows is read from the file."""
    if engine.scheduler.offload is not None:
        engine.scheduler.offload.file.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--directory", help="where the file is made")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    engines = {name: make_engine(options.model, options.directory, more) for name, more in VARIANTS.items()}
    rng = random.Random(0)
    times: dict[str, list[float]] = {}

    def fresh(count: int) -> list[int]:
        return [rng.randrange(100, 20_000) for _ in range(count)]

    for number in range(options.rounds + 1):  # the first one warms up
        prompt, filler = fresh(PREFIX), fresh(FILLER)
        for name, engine in engines.items():
            found = {"computed": answer_ms(engine, prompt), "memory": answer_ms(engine, prompt)}
            filling = answer_ms(engine, filler)
            settle(engine)
            if name != "no file":
                found[name] = answer_ms(engine, prompt)
            assert len({str(item[2]) for item in found.values()}) == 1, "another answer"
            assert all(item[1] == (0 if kind == "computed" else PREFIX - 16) for kind, item in found.items())
            if number:
                for kind, item in found.items():
                    times.setdefault(f"prefix of {PREFIX}, {kind}", []).append(item[0])
                times.setdefault(f"{FILLER} new tokens, {name}", []).append(filling[0])
            settle(engine)
    for name in sorted(times):
        low, high = min(times[name]), max(times[name])
        print(f"{name:32s} {statistics.median(times[name]):9.2f} ms  ({low:.2f} to {high:.2f})")
    dropped = {
        name: engine.scheduler.offload.file.num_dropped
        for name, engine in engines.items()
        if engine.scheduler.offload
    }
    print("dropped:", dropped)
    for engine in engines.values():
        engine.close()
    if options.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        record = {
            "command": " ".join(sys.argv), "commit": commit, "machine": platform.platform(),
            "python": platform.python_version(), "dropped": dropped, "ms": times,
        }  # fmt: skip
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
