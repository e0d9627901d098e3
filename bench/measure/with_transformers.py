"""The traditional loop: `model.generate` of `transformers`, one request after the other.

Of many requests only the first few are run ("requests" in the answer says how many): they do not influence
each other, so that the rate is the same, and waiting for the rest would say nothing more.
"""

from __future__ import annotations

import time

import protocol

SETUP = protocol.setup()
protocol.reserve_stdout()
AT_MOST = 4  # requests of a job


def main() -> None:
    begin = time.perf_counter()
    import torch
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    imported = time.perf_counter()
    torch.set_num_threads(SETUP["threads"])
    dtype = getattr(torch, SETUP["dtype"])
    model = AutoModelForCausalLM.from_pretrained(SETUP["model"], dtype=dtype).eval()

    class Clock(BaseStreamer):
        """When each token came; the prompt is what comes first."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def generate(prompts: list[list[int]], count: int) -> protocol.Sample:
        prefill = decode = 0.0
        run = prompts[:AT_MOST]
        for ids in run:
            clock = Clock()
            tokens = torch.tensor([ids])
            start = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=count,
                    min_new_tokens=count,
                    do_sample=False,
                    streamer=clock,
                    pad_token_id=0,
                )
            times = clock.times[1:]
            assert len(times) == count
            prefill += times[0] - start
            decode += times[-1] - times[0]
        return protocol.Sample(prefill, decode, len(run) * (count - 1), prefill + decode, len(run))

    about = {
        "version": transformers.__version__,
        "torch": torch.__version__,
        "import_seconds": imported - begin,
        "load_seconds": time.perf_counter() - begin,
    }
    protocol.serve(generate, model.config.vocab_size, about)


if __name__ == "__main__":
    main()
