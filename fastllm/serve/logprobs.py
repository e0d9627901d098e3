"""Log probabilities in the shapes of OpenAI's two APIs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastllm.formats.tokenizer import Tokenizer
from fastllm.outputs import Logprob, SampleLogprobs


def of_chat(
    tokenizer: Tokenizer, token_ids: Sequence[int], entries: SampleLogprobs, top: int
) -> dict[str, Any]:
    """`logprobs` of a chat's choice: its tokens, each with the `top` most likely ones."""
    content = []
    for token, entry in zip(token_ids, entries, strict=True):
        best = [item for item in _best(entry) if item[1].rank is not None and item[1].rank <= top]
        content.append(
            {
                **_token(tokenizer, token, entry[token]),
                "top_logprobs": [_token(tokenizer, other, found) for other, found in best],
            }
        )
    return {"content": content, "refusal": None}


def of_completion(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    entries: Sequence[dict[int, Logprob] | None],
    top: int,
    offset: int,
) -> dict[str, Any]:
    """`logprobs` of a completion's choice.

    Args:
        entries: one for each token; None for a prompt's first.
        offset: characters of the text before the first token.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token, entry in zip(token_ids, entries, strict=True):
        text = _text(tokenizer, token)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        values.append(None if entry is None else entry[token].logprob)
        if entry is None:
            tops.append(None)
        else:
            best = [item for item in _best(entry) if item[1].rank is not None and item[1].rank <= top]
            tops.append({_text(tokenizer, other): found.logprob for other, found in best})
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _best(entry: dict[int, Logprob]) -> list[tuple[int, Logprob]]:
    return sorted(entry.items(), key=lambda item: item[1].rank or 0)


def _token(tokenizer: Tokenizer, token: int, found: Logprob) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    return {"token": raw.decode("utf-8", "replace"), "logprob": found.logprob, "bytes": list(raw)}


def _text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_bytes(token).decode("utf-8", "replace")
