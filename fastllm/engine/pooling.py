"""From the hidden states of one prompt to its embedding: what `Request` and `Completion` are to generating.

An embedding has the same bits alone, batched, in chunks and after a preemption: a mean is summed in float64
in ascending order of the positions, each once, and lengths and cosines are sums that are rounded once, at the
end.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fastllm.engine.adapters import Adapter
from fastllm.engine.sequence import Sequence
from fastllm.executor.base import StepResult
from fastllm.outputs import EmbeddingOutput, RequestMetrics, ScoringOutput
from fastllm.pooling_params import PoolingParams
from fastllm.sampling_params import RequestOutputKind


class PooledPrompt:
    """The one sequence of a pooling request, in the place of a `Completion`."""

    __slots__ = ("_sum", "finish_reason", "sequence")

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.finish_reason: str | None = None
        self._sum: npt.NDArray[np.float64] | None = None  # (dim,)

    # What the engine asks of a completion, of which this one has nothing.

    @property
    def num_tokens(self) -> int:
        """Tokens generated."""
        return 0

    @property
    def deferred(self) -> bool:
        """Whether tokens may be taken in later."""
        return False

    def advance(self, result: StepResult) -> None:
        """Take in the hidden states of the last step, which follow those of the steps before."""
        first = self.sequence.first_hidden
        lines = result.hidden[first : first + self.sequence.num_prompt_rows]
        if self._sum is None:
            self._sum = np.zeros(lines.shape[1], dtype=np.float64)
        for line in lines:  # one after the other: NumPy's own sums may add up in another order
            self._sum += line

    def close(self, finish_reason: str) -> None:
        """It has ended."""
        self.finish_reason = finish_reason
        self.sequence.owner = None  # the two refer to each other no longer

    def cut(self, finish_reason: str, *, text: bool = True) -> None:
        """Ended from outside ("abort"), or unable to go on ("error"): there is no embedding."""
        self._sum = None
        self.close(finish_reason)

    def embedding(self, params: PoolingParams) -> npt.NDArray[np.float32]:
        """float32 (dim,); (0,) where there is none."""
        if self._sum is None or self.finish_reason != "stop":
            return np.zeros(0, dtype=np.float32)
        vector = self._sum / (self.sequence.num_prompt if params.pooling == "mean" else 1)
        if params.normalize:
            length = math.sqrt(math.fsum((vector * vector).tolist()))
            if length > 0.0:
                vector = vector / length
        return vector.astype(np.float32)


class PoolingRequest:
    """A request for an embedding, with what the engine reads of a `Request`."""

    __slots__ = (
        "adapter",
        "closed",
        "completions",
        "kind",
        "metrics",
        "num_running",
        "params",
        "prompt",
        "prompt_token_ids",
        "request_id",
    )

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: PoolingParams,
        arrival_time: float,
        adapter: Adapter | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.kind = RequestOutputKind.FINAL_ONLY
        self.completions: list[PooledPrompt] = []
        self.num_running = 1
        self.metrics = RequestMetrics(arrival_time)
        self.closed = False  # its output was made
        self.adapter = adapter  # counts among its users from admission until closed

    def output(self) -> EmbeddingOutput:
        """What its caller is told."""
        (pooled,) = self.completions
        return EmbeddingOutput(
            self.request_id,
            pooled.embedding(self.params),
            self.prompt_token_ids,
            self.metrics.num_cached_tokens,
            self.prompt,
            pooled.finish_reason,
            self.metrics,
        )


def cosine(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """The cosine of the angle between vectors (dim,), in -1..1; NaN where one has no direction or is (0,)."""
    if one.size == 0 or other.size == 0:
        return math.nan
    a, b = one.astype(np.float64), other.astype(np.float64)
    lengths = math.fsum((a * a).tolist()) * math.fsum((b * b).tolist())
    if lengths == 0.0:
        return math.nan
    return max(-1.0, min(1.0, math.fsum((a * b).tolist()) / math.sqrt(lengths)))


def score_pair(query: EmbeddingOutput, document: EmbeddingOutput) -> ScoringOutput:
    """How alike the two are."""
    return ScoringOutput(
        document.request_id,
        cosine(query.embedding, document.embedding),
        query.prompt_token_ids + document.prompt_token_ids,
        query.num_cached_tokens + document.num_cached_tokens,
    )
