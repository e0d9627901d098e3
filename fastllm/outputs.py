"""What a request gives back: `RequestOutput` and its parts, or `EmbeddingOutput`, with vLLM's meanings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log probability under the raw logits.

    Attributes:
        logprob: natural logarithm of the probability.
        rank: place among all tokens, 1 = most likely; None where it was not asked for.
        decoded_token: the text of the token alone (U+FFFD for part of a character); None without detokenize.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# One dict per token: the chosen token first, then the most likely ones, best first. A prompt's first entry
# is None, since nothing comes before it.
SampleLogprobs = list[dict[int, Logprob]]
PromptLogprobs = list["dict[int, Logprob] | None"]


@dataclass(slots=True)
class RequestMetrics:
    """Moments in the life of a request, in seconds of the engine's one monotonic clock.

    The object is the engine's own and goes on being filled until the request is finished. With n > 1 the
    moments are those of the first sequence to reach them (finished_time: the last).

    Attributes:
        arrival_time: when the engine took the request.
        first_scheduled_time: when its first prompt chunk went into a step; None while it waits.
        first_token_time: when its first token was known; None before.
        last_token_time: when its newest token was known; None before.
        finished_time: when its last sequence ended; None before.
        num_preemptions: how often a sequence of it lost its blocks and was recomputed.
        num_generated_tokens: tokens generated so far, over all its sequences.
        num_cached_tokens: prompt tokens that were found in the prefix cache instead of computed. What a
            preempted request finds again does not count.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0

    @property
    def queue_time(self) -> float | None:
        """Seconds between arrival and the first step."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds between arrival and the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def prefill_time(self) -> float | None:
        """Seconds between the first step and the first token."""
        return _between(self.first_scheduled_time, self.first_token_time)

    @property
    def decode_time(self) -> float | None:
        """Seconds between the first token and the newest one."""
        return _between(self.first_token_time, self.last_token_time)

    @property
    def mean_inter_token_latency(self) -> float | None:
        """Seconds per token after the first, those of all sequences counted; None before there is one."""
        seconds = self.decode_time
        if seconds is None or self.num_generated_tokens < 2:
            return None
        return seconds / (self.num_generated_tokens - 1)

    @property
    def e2e_latency(self) -> float | None:
        """Seconds between arrival and the end."""
        return _between(self.arrival_time, self.finished_time)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


@dataclass(slots=True)
class CompletionOutput:
    """One of the n sequences generated for a prompt.

    Attributes:
        index: which of the n.
        text: the text (so far, or what is new, by `output_kind`).
        token_ids: the token ids, likewise. They include a token that ended the sequence, and every token
            that took part in a stop string.
        cumulative_logprob: sum of the chosen tokens' logprobs so far; None unless logprobs were asked for.
        logprobs: one dict per token of token_ids; None unless asked for.
        finish_reason: "stop", "length", "abort", "error" (the model's logits were not numbers, so that there
            is no next token; what came before stays), or None while it runs.
        stop_reason: the stop string or stop token id that ended it; None for an end-of-sequence id.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: SampleLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """What one request has produced.

    Attributes:
        request_id: as given.
        prompt: the prompt's text, if it came as text.
        prompt_token_ids: the prompt's token ids.
        prompt_logprobs: one entry per prompt token, the first None; None unless asked for. With
            `output_kind` DELTA, only in the request's first output.
        outputs: its sequences in order of index: all of them, or with DELTA those with something new.
        finished: whether all its sequences have ended.
        metrics: its times and counts; None where the engine keeps none.
        num_cached_tokens: prompt tokens that were found in the prefix cache instead of computed.
        seed: the seed that its random streams are keyed by, given or drawn: the same prompt and parameters
            with this seed give the same answer again.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    seed: int = 0


@dataclass(slots=True, eq=False)
class EmbeddingOutput:
    """The embedding of one prompt.

    Attributes:
        request_id: as given.
        embedding: float32 (dim,); (0,) where finish_reason is not "stop".
        prompt_token_ids: the prompt's token ids.
        num_cached_tokens: prompt tokens that were found in the prefix cache instead of computed.
        prompt: the prompt's text, if it came as text.
        finish_reason: "stop"; "abort"; "error" (the model's hidden states were not numbers).
        metrics: its times and counts; None where the engine keeps none.
    """

    request_id: str
    embedding: npt.NDArray[np.float32]
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    prompt: str | None = None
    finish_reason: str | None = "stop"
    metrics: RequestMetrics | None = None

    @property
    def finished(self) -> bool:
        """Always: there is one output."""
        return True


@dataclass(slots=True)
class ScoringOutput:
    """How alike a query and a document are.

    Attributes:
        request_id: of the document's embedding.
        score: the cosine of the two embeddings, in -1..1; NaN where one of them could not be made.
        prompt_token_ids: those of the query, then those of the document.
        num_cached_tokens: of both, how many were found in the prefix cache instead of computed.
    """

    request_id: str
    score: float
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
