"""ONNX Runtime GenAI, measured step by step through its generator; int4 weights of its own, see models.py."""

from __future__ import annotations

import json
import time

import protocol

SETUP = protocol.setup()
protocol.reserve_stdout()


def main() -> None:
    begin = time.perf_counter()
    import numpy as np
    import onnxruntime_genai as genai

    imported = time.perf_counter()
    config = genai.Config(SETUP["model"])
    threads = {"intra_op_num_threads": SETUP["threads"]}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
    model = genai.Model(config)
    with open(f"{SETUP['model']}/genai_config.json") as file:
        vocab = json.load(file)["model"]["vocab_size"]

    def generate(prompts: list[list[int]], count: int) -> protocol.Sample:
        length = len(prompts[0]) + count
        steps = protocol.Steps(len(prompts))
        params = genai.GeneratorParams(model)
        params.set_search_options(
            batch_size=len(prompts), max_length=length, min_length=length, do_sample=False
        )
        generator = genai.Generator(model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        for number in range(1, count + 1):
            generator.generate_next_token()
            generator.get_next_tokens()
            steps.after(dict.fromkeys(range(len(prompts)), number))
        return steps.sample()

    about = {
        "version": genai.__version__,
        "import_seconds": imported - begin,
        "load_seconds": time.perf_counter() - begin,
    }
    protocol.serve(generate, vocab, about)


if __name__ == "__main__":
    main()
