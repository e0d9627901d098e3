"""One engine and one list of requests, in a process of its own: what bench/ablation.py measures.

The script gets the options of `ModelOptions` as one JSON argument. It answers with a line about itself, and
then with one line for every line of JSON, a job:

    {"requests": [...], "group": G}

A request has "at" (seconds after the job's begin), "prompt" (token ids), "tokens" (to generate, past any
end-of-sequence token), "temperature" and "seed". With G = 0 it is handed to the engine when it is due; else G
of those that are due begin together, the next ones when the last of these has ended. The answer:

    seconds            from the begin to the last token
    requests           in the order of the job: "at", "began" (handed over), "first", "last" (its tokens), in
                       seconds after the begin; "gaps", seconds between two deliveries of tokens; "tokens"
    computed           tokens that went through the layers
    steps              of the engine
    at_once, most_at_once   sequences in a step: the mean over the time, and the most
    peak_blocks        of the KV cache, held at the end of a step
    preemptions, prefix_queries, prefix_hits, draft_tokens, accepted_tokens   as the scheduler counts them
    peak_bytes         of memory that the process has held
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from itertools import pairwise
from typing import Any

import protocol

ANSWERS = protocol.reserve_stdout()  # an editable install says on standard output what it compiles

import fastllm  # noqa: E402, F401  (what it takes is told apart)

IMPORT_PEAK = protocol.status().get("peak_bytes", 0)

from fastllm import SamplingParams  # noqa: E402
from fastllm.engine.engine import Engine  # noqa: E402
from fastllm.engine.hooks import EngineHook, Step, Tokens  # noqa: E402
from fastllm.loading import ModelOptions, load_model  # noqa: E402
from fastllm.sampling_params import RequestOutputKind  # noqa: E402

WARM_UP = {"at": 0.0, "prompt": [3] * 48, "tokens": 8, "temperature": 0.0, "seed": 0}
COUNTERS = ("preemptions", "prefix_queries", "prefix_hits", "draft_tokens", "accepted_tokens")


class Watch(EngineHook):
    """When tokens came, and what the steps held."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget everything."""
        self.deliveries: dict[str, list[float]] = {}
        self.steps = self.computed = self.peak_blocks = self.most_at_once = 0
        self.busy = self.sequence_seconds = 0.0

    def on_tokens(self, event: Tokens) -> None:
        self.deliveries.setdefault(event.request_id, []).append(event.time)

    def on_step(self, event: Step) -> None:
        self.steps += 1
        self.computed += event.num_prefill_tokens + event.num_decode_tokens
        self.peak_blocks = max(self.peak_blocks, event.num_blocks - event.num_free_blocks)
        self.most_at_once = max(self.most_at_once, event.num_seqs)
        self.busy += event.duration
        self.sequence_seconds += event.duration * event.num_seqs


def run(engine: Engine, watch: Watch, job: dict[str, Any]) -> dict[str, Any]:
    """One job; the engine's prefix cache is empty before it."""
    engine.reset_prefix_cache()
    watch.begin()
    before = _counters(engine)
    requests, group = job["requests"], job["group"]
    began: dict[str, float] = {}
    tokens: dict[str, list[int]] = {}
    waiting = deque(enumerate(requests))
    begin = time.monotonic()
    while waiting or engine.has_unfinished():
        now = time.monotonic() - begin
        room = (0 if engine.has_unfinished() else group) if group else len(waiting)
        while room > 0 and waiting and waiting[0][1]["at"] <= now:
            index, request = waiting.popleft()
            began[str(index)] = now
            engine.add_request(str(index), request["prompt"], _params(request))
            room -= 1
        if not engine.has_unfinished():
            time.sleep(max(waiting[0][1]["at"] - now, 0.0))
            continue
        for output in engine.step():
            tokens[output.request_id] = output.outputs[0].token_ids
    after = _counters(engine)
    done = []
    for index, request in enumerate(requests):
        times = [moment - begin for moment in watch.deliveries[str(index)]]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        done.append(
            {
                "at": request["at"],
                "began": began[str(index)],
                "first": times[0],
                "last": times[-1],
                "gaps": gaps,
                "tokens": tokens[str(index)],
            }
        )
    return {
        "seconds": max(one["last"] for one in done),
        "requests": done,
        "computed": watch.computed,
        "steps": watch.steps,
        "at_once": watch.sequence_seconds / watch.busy,
        "most_at_once": watch.most_at_once,
        "peak_blocks": watch.peak_blocks,
        **{name: after[name] - before[name] for name in COUNTERS},
        **protocol.status(),
    }


def _params(request: dict[str, Any]) -> SamplingParams:
    return SamplingParams(
        temperature=request["temperature"],
        seed=request["seed"],
        max_tokens=request["tokens"],
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _counters(engine: Engine) -> dict[str, int]:
    return {name: getattr(engine.scheduler, f"num_{name}") for name in COUNTERS}


def main() -> None:
    watch = Watch()
    loaded = load_model(ModelOptions(**protocol.setup(), progress=False), [watch])
    engine = loaded.engine
    about = {
        "import_peak_bytes": IMPORT_PEAK,
        "weight_bytes": loaded.weight_bytes,
        "kv_cache_bytes": loaded.kv_cache_bytes,
        "num_blocks": engine.pool.num_blocks,
        "block_size": engine.pool.block_size,
    }
    print(json.dumps(about), file=ANSWERS, flush=True)
    run(engine, watch, {"requests": [WARM_UP], "group": 0})
    for line in sys.stdin:
        print(json.dumps(run(engine, watch, json.loads(line))), file=ANSWERS, flush=True)
    engine.close()


if __name__ == "__main__":
    main()
