"""fastllm, measured through `LLM.generate`: scheduling, sampling and the tokens' way out are in its time.

With "default" in its setup it makes `LLM(model)` with nothing but the number of threads, as loading is
measured; otherwise the KV cache and a step are as large as the job needs, so that all prompts go through in
one step wherever the program under comparison does that too.
"""

from __future__ import annotations

import time
from typing import Any

STARTED = time.time()

import protocol  # noqa: E402

SETUP = protocol.setup()
BEFORE_IMPORT = time.perf_counter()

import fastllm  # noqa: E402
from fastllm import LLM, SamplingParams, _core  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - BEFORE_IMPORT
IMPORT_PEAK = protocol.status().get("peak_bytes", 0)


def options() -> dict[str, Any]:
    if SETUP.get("default"):
        return {}
    return {
        "max_model_len": SETUP["max_len"],
        "max_num_seqs": SETUP["max_seqs"],
        "max_num_batched_tokens": SETUP["max_step_tokens"],
        "kv_cache_dtype": SETUP["kv_cache_dtype"],
    }


def main() -> None:
    begin = time.perf_counter()
    # What LLM(model, ...) does, in two steps, since the record wants to know the sizes as well.
    from fastllm.loading import ModelOptions, load_model

    loaded = load_model(
        ModelOptions(model=SETUP["model"], threads=SETUP["threads"], progress=False, **options())
    )
    with LLM._from_parts(loaded.engine, loaded.tokenizer) as llm:

        def generate(prompts: list[list[int]], count: int) -> protocol.Sample:
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
            times = [output.metrics for output in outputs]
            arrived = min(t.arrival_time for t in times)
            first = [t.first_token_time for t in times]
            last = max(t.last_token_time for t in times)
            assert all(t.num_generated_tokens == count for t in times)
            if count > 1 and max(first) != min(first):
                raise SystemExit(
                    "the prompts did not go through in one step: decoding was not measured alone"
                )
            return protocol.Sample(
                prefill_seconds=max(first) - arrived,
                decode_seconds=last - max(first),
                decoded=len(prompts) * (count - 1),
                total_seconds=last - arrived,
                requests=len(prompts),
            )

        about = {
            "version": fastllm.__version__,
            "isa": _core.isa(),
            "started": STARTED,
            "import_seconds": IMPORT_SECONDS,
            "import_peak_bytes": IMPORT_PEAK,
            "load_seconds": time.perf_counter() - begin,
            "weight_bytes": loaded.weight_bytes,
            "kv_cache_bytes": loaded.kv_cache_bytes,
            "options": options(),
        }
        protocol.serve(generate, llm.get_tokenizer().vocab_size, about)


if __name__ == "__main__":
    main()
