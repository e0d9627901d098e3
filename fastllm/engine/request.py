"""A request as the engine keeps it: its completions and what it has been told."""

from __future__ import annotations

from fastllm.engine.adapters import Adapter
from fastllm.engine.completion import Completion
from fastllm.outputs import PromptLogprobs, RequestMetrics, RequestOutput
from fastllm.sampling_params import RequestOutputKind, SamplingParams


class Request:
    """A request and its n completions."""

    __slots__ = (
        "adapter",
        "closed",
        "completions",
        "kind",
        "metrics",
        "num_running",
        "params",
        "prompt",
        "prompt_logprobs",
        "prompt_token_ids",
        "request_id",
        "seed",
        "sent_prompt_logprobs",
    )

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        seed: int,
        arrival_time: float,
        adapter: Adapter | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.kind = params.output_kind
        self.seed = seed
        self.completions: list[Completion] = []
        self.num_running = params.n  # completions that have not ended
        self.prompt_logprobs: PromptLogprobs | None = None if params.prompt_logprobs is None else [None]
        self.sent_prompt_logprobs = False
        self.metrics = RequestMetrics(arrival_time)
        self.adapter = adapter  # counts among its users from admission until closed
        self.closed = False  # its last output was made

    def output(self) -> RequestOutput:
        """What its caller is told now."""
        delta = self.kind is RequestOutputKind.DELTA
        prompt_logprobs = self.prompt_logprobs
        if delta and self.sent_prompt_logprobs:
            prompt_logprobs = None
        self.sent_prompt_logprobs = True
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            prompt_logprobs,
            [item.output(delta=delta) for item in self.completions if item.moved or not delta],
            self.num_running == 0,
            self.metrics,
            self.metrics.num_cached_tokens,
            self.seed,
        )
