"""vLLM on the CPU, measured by stepping its engine in this process: bf16 weights, no prefix cache."""

from __future__ import annotations

import os
import time
from typing import Any

import protocol

SETUP = protocol.setup()
protocol.reserve_stdout()
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process: no queues between
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
PROCESSORS = sorted(os.sched_getaffinity(0))[: SETUP["threads"]]
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, PROCESSORS)))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", str(SETUP["threads"]))


def main() -> None:
    begin = time.perf_counter()
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    imported = time.perf_counter()
    llm = LLM(
        model=SETUP["model"],
        dtype="bfloat16",
        max_model_len=SETUP["max_len"],
        max_num_seqs=SETUP["max_seqs"],
        max_num_batched_tokens=max(SETUP["max_step_tokens"], SETUP["max_len"]),
        enable_prefix_caching=False,
        enforce_eager=bool(SETUP.get("eager", False)),
        disable_log_stats=True,
    )
    engine = llm.llm_engine
    numbers = iter(range(1 << 60))

    def generate(prompts: list[list[int]], count: int) -> protocol.Sample:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=True)
        steps = protocol.Steps(len(prompts))
        for ids in prompts:
            engine.add_request(str(next(numbers)), TokensPrompt(prompt_token_ids=ids), params)
        while engine.has_unfinished_requests():
            outputs: list[Any] = engine.step()
            steps.after({output.request_id: len(output.outputs[0].token_ids) for output in outputs})
        return steps.sample()

    about = {
        "version": vllm.__version__,
        "import_seconds": imported - begin,
        "load_seconds": time.perf_counter() - begin,
    }
    protocol.serve(generate, llm.get_tokenizer().vocab_size, about)


if __name__ == "__main__":
    main()
