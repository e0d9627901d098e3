"""The engine's metrics as data: name, type, labels, buckets and meaning.

Names, types, labels and bucket boundaries are vLLM's, with `fastllm:` for `vllm:`, so that a dashboard made
for one serves the other. Sources: vLLM's metrics design document and its list of production metrics. Every
family has the labels model_name and engine besides its own; Prometheus adds `_total` to a counter's name.

Left out, since they cannot be told truthfully here:

- kv_block_lifetime_seconds, kv_block_idle_before_evict_seconds, kv_block_reuse_gap_seconds: the pool keeps no
  times of its blocks, and to note every block of every step costs more than the answer is worth.
- num_requests_waiting_by_reason: what a waiting sequence waits for is found out when it is admitted.
- engine_sleep_state: sleeping is no event; ask `AsyncLLM.is_sleeping`.
- external_prefix_cache_*, mm_cache_*, corrupted_requests, estimated_flops_*: there is nothing of the kind.
- time_per_output_token_seconds: an old name of inter_token_latency_seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

PREFIX = "fastllm:"
LABELS = ("model_name", "engine")

TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHOICES = (1, 2, 5, 10, 20)


@dataclass(frozen=True, slots=True)
class Family:
    """One metric.

    Attributes:
        name: without prefix, and without the `_total` of counters.
        kind: "gauge", "counter" or "histogram".
        meaning: the help text.
        labels: besides LABELS.
        bounds: upper bounds of a histogram's buckets, ascending, without infinity; none: 1, 2, 5, 10 ... up
            to the model's length (`token_bounds`).
    """

    name: str
    kind: str
    meaning: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        """As Prometheus knows the family."""
        return PREFIX + self.name


def token_bounds(max_model_len: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 ... up to max_model_len, >= 1."""

    def ascending() -> Iterator[float]:
        power = 1
        while True:
            for digit in (1, 2, 5):
                if digit * power > max_model_len:
                    return
                yield float(digit * power)
            power *= 10

    return tuple(ascending())


FAMILIES = (
    Family("num_requests_running", "gauge", "Sequences that hold blocks and take part in steps."),
    Family("num_requests_waiting", "gauge", "Sequences that wait to run, preempted ones included."),
    Family("kv_cache_usage_perc", "gauge", "Share of the KV cache's blocks that sequences hold, 0 to 1."),
    Family(
        "cache_config_info",
        "gauge",
        "The KV cache in labels, always 1. num_gpu_blocks is vLLM's name for its size, here in main memory.",
        ("block_size", "num_gpu_blocks", "enable_prefix_caching", "kv_offload_bytes"),
    ),
    Family(
        "lora_requests_info",
        "gauge",
        "LoRA adapters of requests that have begun and of those that wait, in labels; the scrape's time. "
        "Absent until a request names one.",
        ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
    ),
    Family(
        "kv_offload_blocks", "gauge", "Blocks that left the KV cache and can be brought back from the file."
    ),
    Family("kv_offload_size_bytes", "gauge", "Bytes of the file that they are in."),
    Family(
        "prompt_tokens",
        "counter",
        "Prompt tokens of requests whose prompt is complete, cached ones included, each once: neither "
        "preemptions nor n count them again.",
    ),
    Family(
        "prompt_tokens_by_source",
        "counter",
        "The same by where they came from: local_compute or local_cache_hit.",
        ("source",),
    ),
    Family(
        "prompt_tokens_cached", "counter", "Those that were found in the prefix cache, in memory or file."
    ),
    Family("generation_tokens", "counter", "Tokens generated."),
    Family("prefix_cache_queries", "counter", "Prompt tokens looked up in the prefix cache."),
    Family(
        "prefix_cache_hits",
        "counter",
        "Prompt tokens found there. What a preempted sequence finds is no hit.",
    ),
    Family("kv_offload_restored_tokens", "counter", "Tokens whose blocks were brought back from the file."),
    Family("num_preemptions", "counter", "Sequences that lost their blocks and were computed again."),
    Family(
        "request_success",
        "counter",
        "Requests that ended, each once: stop, length (a sequence of it), error (a sequence of it, or the "
        "engine's failure), abort.",
        ("finished_reason",),
    ),
    Family("spec_decode_num_drafts", "counter", "Runs of guessed tokens. Absent where nothing is guessed."),
    Family("spec_decode_num_draft_tokens", "counter", "Guessed tokens."),
    Family("spec_decode_num_accepted_tokens", "counter", "Guessed tokens that were right."),
    Family(
        "spec_decode_num_accepted_tokens_per_pos",
        "counter",
        "Guessed tokens that were right, by place in their draft, from 0.",
        ("position",),
    ),
    Family(
        "iteration_tokens_total",
        "histogram",
        "Tokens computed in a step, of prompts and of answers.",
        bounds=STEP_TOKENS,
    ),
    Family(
        "time_to_first_token_seconds",
        "histogram",
        "From a request's arrival in the engine to its first token, once per request.",
        bounds=FIRST_TOKEN_SECONDS,
    ),
    Family(
        "inter_token_latency_seconds",
        "histogram",
        "From step to step that gave a sequence tokens, several where guesses were right.",
        bounds=TOKEN_SECONDS,
    ),
    Family(
        "request_time_per_output_token_seconds",
        "histogram",
        "Decode time of a request over the tokens of its longest sequence after the first.",
        bounds=TOKEN_SECONDS,
    ),
    Family("e2e_request_latency_seconds", "histogram", "From arrival to the end.", bounds=REQUEST_SECONDS),
    Family(
        "request_queue_time_seconds", "histogram", "From arrival to the first step.", bounds=REQUEST_SECONDS
    ),
    Family(
        "request_prefill_time_seconds",
        "histogram",
        "From the first step to the first token, or to the end of a request that makes none.",
        bounds=REQUEST_SECONDS,
    ),
    Family(
        "request_decode_time_seconds",
        "histogram",
        "From the first token to the last.",
        bounds=REQUEST_SECONDS,
    ),
    Family(
        "request_inference_time_seconds",
        "histogram",
        "From the first step to the last token, or to the end of a request that makes none.",
        bounds=REQUEST_SECONDS,
    ),
    Family("request_prompt_tokens", "histogram", "Prompt tokens of a request."),
    Family(
        "request_prefill_kv_computed_tokens",
        "histogram",
        "Prompt tokens of a request without those from the prefix cache.",
    ),
    Family("request_generation_tokens", "histogram", "Tokens of a request's sequences together."),
    Family(
        "request_max_num_generation_tokens",
        "histogram",
        "Tokens of a request's longest sequence.",
    ),
    Family("request_params_n", "histogram", "Sequences that a request asked for.", bounds=CHOICES),
    Family(
        "request_params_max_tokens",
        "histogram",
        "The max_tokens that a request asked for, where it did.",
    ),
)
"""Histograms of requests are of those that ended by themselves; aborted ones are in request_success alone."""
