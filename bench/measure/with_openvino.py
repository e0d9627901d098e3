"""OpenVINO GenAI, measured through `LLMPipeline` on the GGUF file, with its own performance metrics."""

from __future__ import annotations

import time
from typing import Any

import protocol

SETUP = protocol.setup()
protocol.reserve_stdout()
VOCAB = 49152


def main() -> None:
    begin = time.perf_counter()
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    imported = time.perf_counter()
    pipeline = genai.LLMPipeline(SETUP["model"], "CPU", INFERENCE_NUM_THREADS=SETUP["threads"])

    def generate(prompts: list[list[int]], count: int) -> protocol.Sample:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = count
        config.ignore_eos = True
        config.do_sample = False
        ids = np.array(prompts, np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        start = time.perf_counter()
        result: Any = pipeline.generate(inputs, config)
        total = time.perf_counter() - start
        assert sum(map(len, result.tokens)) == len(prompts) * count
        prefill = result.perf_metrics.get_ttft().mean / 1000
        return protocol.Sample(prefill, total - prefill, len(prompts) * (count - 1), total, len(prompts))

    about = {
        "version": genai.__version__,
        "import_seconds": imported - begin,
        "load_seconds": time.perf_counter() - begin,
    }
    protocol.serve(generate, VOCAB, about)


if __name__ == "__main__":
    main()
