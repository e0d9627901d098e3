"""From logits to a token: bias, penalties, temperature, truncation, draw, log-probabilities.

The order is vLLM's: log-probabilities are taken from the raw logits; then the bias and banned tokens, the
penalties, the temperature, min_p, top_k, top_p, and the draw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fastllm.reference.dense import Float64, log_softmax, softmax

GREEDY_BELOW = 1e-5
"""A temperature under this counts as 0, as in vLLM."""


def apply_bias(
    logits: npt.ArrayLike,
    bias: Mapping[int, float] | None = None,
    banned: Sequence[int] = (),
    allowed: Sequence[int] | None = None,
) -> Float64:
    """Adds `bias[token]` to its logit and sets the logits of `banned` tokens to minus infinity, and those of
    all that are not `allowed` (None: all are).

    Args:
        logits: (V,).
    """
    out = np.array(logits, dtype=np.float64)
    for token, value in (bias or {}).items():
        out[token] += value
    for token in banned:
        out[token] = -np.inf
    if allowed is not None:
        for token in range(len(out)):
            if token not in allowed:
                out[token] = -np.inf
    return out


def apply_penalties(
    logits: npt.ArrayLike,
    prompt: Sequence[int],
    output: Sequence[int],
    *,
    presence: float = 0.0,
    frequency: float = 0.0,
    repetition: float = 1.0,
) -> Float64:
    """Makes tokens that were seen less likely.

    repetition (Keskar et al. 2019): the logit l of every token of prompt or output becomes l / repetition
    where l > 0 and l * repetition otherwise. Then, for tokens of the output only: l - frequency * count -
    presence.

    Args:
        logits: (V,).
        prompt, output: token ids so far.
    """
    out = np.array(logits, dtype=np.float64)
    for token in set(prompt) | set(output):
        out[token] = out[token] / repetition if out[token] > 0.0 else out[token] * repetition
    for token, count in Counter(output).items():
        out[token] -= frequency * count + presence
    return out


def sampling_probabilities(
    logits: npt.ArrayLike,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Float64:
    """The distribution that a token is drawn from, after bias and penalties.

    Tokens stand in one order: falling logit, then rising id. A temperature below 1e-5 leaves the first alone.
    Otherwise, with p = softmax(logits / temperature): min_p drops tokens with p < min_p * max(p); top_k (0:
    off) keeps the first top_k and all that equal the last of them; top_p, on the renormalised rest, keeps
    each token while the sum of those before it is below top_p. What is left is renormalised.

    Args:
        logits: (V,); minus infinity for tokens that must not appear.

    Returns:
        (V,), summing to 1.
    """
    logits = np.asarray(logits, dtype=np.float64)
    order = np.argsort(-logits, kind="stable")  # ties: the lower id first
    if temperature < GREEDY_BELOW:
        p = np.zeros_like(logits)
        p[order[0]] = 1.0
        return p
    p = softmax(logits / temperature)
    p = np.where(p < min_p * np.max(p), 0.0, p)
    if 0 < top_k < logits.size:
        p = np.where(logits < logits[order[top_k - 1]], 0.0, p)
    p = p / np.sum(p)
    if top_p < 1.0:
        before = 0.0
        for token in order:
            kept = before < top_p or token == order[0]
            before += p[token]
            if not kept:
                p[token] = 0.0
    return np.asarray(p / np.sum(p))


def draw(probabilities: npt.ArrayLike, uniform: float) -> int:
    """The lowest token id whose cumulative probability, in order of id, exceeds `uniform`.

    Args:
        probabilities: (V,).
        uniform: in [0, 1), see `philox.sample_uniform`.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    above = np.flatnonzero(np.cumsum(p) > uniform)
    # Rounding may leave the sum a little below a uniform number next to 1: then the last possible token.
    return int(above[0] if above.size else np.flatnonzero(p)[-1])


def rank(logits: npt.ArrayLike, token: int) -> int:
    """1 + the number of tokens with a greater logit: 1 for the most likely token."""
    logits = np.asarray(logits, dtype=np.float64)
    return 1 + int(np.sum(logits > logits[token]))


def top_logprobs(logits: npt.ArrayLike, count: int) -> tuple[npt.NDArray[np.int64], Float64]:
    """The `count` most likely tokens and their log-probabilities, most likely first, ties in order of id.

    Args:
        logits: (V,), raw.

    Returns:
        ids (count,), natural-log probabilities (count,).
    """
    logits = np.asarray(logits, dtype=np.float64)
    ids = np.argsort(-logits, kind="stable")[:count]
    return ids, log_softmax(logits)[ids]
