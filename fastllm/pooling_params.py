"""What a request asks of the hidden states of its prompt: `PoolingParams`, beside `SamplingParams`."""

from __future__ import annotations

from dataclasses import dataclass

from fastllm.errors import RequestError
from fastllm.sampling_params import RequestOutputKind

POOLINGS = ("last", "mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """How a prompt becomes one vector. No token is generated.

    Attributes:
        pooling: "last", the hidden state of the last token, or "mean" of those of all tokens; after the final
            norm, where the head would read it. "last" uses the prefix cache, "mean" computes every token.
        normalize: divide by the Euclidean length, so that dot products are cosines. A vector of zeros stays.

    Raises:
        RequestError: naming the field, its value and what would be accepted.
    """

    pooling: str = "last"
    normalize: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.pooling, str) or self.pooling not in POOLINGS:
            raise RequestError("pooling", self.pooling, "one of " + ", ".join(map(repr, POOLINGS)))
        if not isinstance(self.normalize, bool):
            raise RequestError("normalize", self.normalize, "a bool")

    # What the engine asks of SamplingParams too.

    @property
    def n(self) -> int:
        """Sequences computed for the prompt."""
        return 1

    @property
    def max_tokens(self) -> int:
        """Tokens to generate at most."""
        return 0

    @property
    def output_kind(self) -> RequestOutputKind:
        """There is one output, at the end."""
        return RequestOutputKind.FINAL_ONLY

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids outside a model's vocabulary: there are none."""
