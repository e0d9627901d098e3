"""The vocabulary in a GGUF file: which token stands for what, which are control tokens, which end a sequence.

Everything is checked here, once, so that the tokenizers built on a `Vocabulary` need not look at metadata
again.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from fastllm.errors import ModelFileError

_KEY = "tokenizer.ggml."


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_CONTROL = (TokenType.CONTROL, TokenType.UNKNOWN)

# Token texts that end generation wherever they occur, whatever type the file gives them.
END_TEXTS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
        *("<end_of_turn>", "<|end_of_turn|>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>"),
        *("[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>"),
        *("<｜end▁of▁sentence｜>", "[e~["),
    )
)
# Tokens for filling in the middle of a text: role -> (metadata keys, texts that are known for it). A model
# that was trained on them ends with the last three what it was asked for.
_MIDDLE_TOKENS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "prefix": (
        ("fim_pre_token_id", "prefix_token_id"),
        (
            *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>"),
            *("<|code_prefix|>", "<|prefix|>"),
        ),
    ),
    "suffix": (
        ("fim_suf_token_id", "suffix_token_id"),
        (
            *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>"),
            *("<|code_suffix|>", "<|suffix|>"),
        ),
    ),
    "middle": (
        ("fim_mid_token_id", "middle_token_id"),
        (
            *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>"),
            *("<|code_middle|>", "<|middle|>"),
        ),
    ),
    "pad": (("fim_pad_token_id",), ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")),
    "repo": (
        ("fim_rep_token_id",),
        ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    ),
    "file": (("fim_sep_token_id",), ("<|file_sep|>",)),
}
_MIDDLE_ENDS = ("pad", "repo", "file")


@dataclass(frozen=True)
class Vocabulary:
    """A checked vocabulary.

    Attributes:
        texts: text of each token as the file spells it; bytes that are not UTF-8 as surrogate escapes.
        types: `TokenType` of each token; texts known as control tokens are CONTROL whatever the file says.
        ids: text -> token.
        scores: priority of each token in SentencePiece merges, 0.0 without `tokenizer.ggml.scores`.
        control_ids: tokens that stand for no text.
        end_ids: every token that ends a sequence.
    """

    texts: list[str]
    types: list[int]
    scores: list[float]
    ids: dict[str, int]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    pad_id: int | None
    control_ids: frozenset[int]
    end_ids: frozenset[int]


class Reader:
    """Typed access to GGUF metadata; every mismatch is a `ModelFileError` that names the key."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self.metadata = metadata
        self.source = source

    def error(self, key: str, reason: str) -> ModelFileError:
        return ModelFileError(self.source, reason, key=key)

    def text(self, key: str, default: str) -> str:
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"expected a string, got {type(value).__name__}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, (bool, int)) or value not in (0, 1):
            raise self.error(key, f"expected a bool, got {value!r}")
        return bool(value)

    def array(self, key: str) -> list[Any]:
        value = self.metadata[key]
        if hasattr(value, "tolist"):
            value = value.tolist()
        if not isinstance(value, (list, tuple)):
            raise self.error(key, f"expected an array, got {type(value).__name__}")
        return list(value)

    def strings(self, key: str) -> list[str]:
        values = self.array(key)
        if set(map(type, values)) - {str}:
            raise self.error(key, "expected an array of strings")
        return values

    def token_id(self, key: str, vocab_size: int, default: int | None) -> int | None:
        """A token id; -1 (also as an unsigned number) means none."""
        value = self.metadata.get(key)
        if value is None:
            return default if default is not None and default < vocab_size else None
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise self.error(key, f"expected an integer, got {value!r}")
        value = operator.index(value)
        if value in (-1, 0xFFFF_FFFF):
            return None
        if not 0 <= value < vocab_size:
            raise self.error(key, f"token id {value} is outside of the vocabulary of {vocab_size}")
        return value


def read_vocabulary(
    reader: Reader, generation_config: Mapping[str, Any], *, default_ids: tuple[int | None, ...]
) -> Vocabulary:
    """The vocabulary of `tokenizer.ggml.*`.

    Args:
        generation_config: contents of generation_config.json, {} without one; its `eos_token_id` (one or a
            list) joins the ends of sequence.
        default_ids: (bos, eos, unknown) where the file names none.
    """
    if _KEY + "tokens" not in reader.metadata:
        raise reader.error(_KEY + "tokens", "is missing")
    texts = reader.strings(_KEY + "tokens")
    n = len(texts)
    if n == 0:
        raise reader.error(_KEY + "tokens", "is empty")
    texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(texts)]
    ids = {text: i for i, text in enumerate(texts)}
    if len(ids) != n:
        twice = next(text for i, text in enumerate(texts) if ids[text] != i)
        raise reader.error(_KEY + "tokens", f"token {twice!r} occurs more than once")
    types = _types(reader, n)

    bos_id = reader.token_id(_KEY + "bos_token_id", n, default_ids[0])
    eos_id = reader.token_id(_KEY + "eos_token_id", n, default_ids[1])
    unknown_id = reader.token_id(_KEY + "unknown_token_id", n, default_ids[2])
    pad_id = reader.token_id(_KEY + "padding_token_id", n, None)
    ends = {eos_id}
    for name in ("eot_token_id", "eom_token_id"):
        ends.add(reader.token_id(_KEY + name, n, None))
    for role, (keys, known) in _MIDDLE_TOKENS.items():
        token = next((i for k in keys if (i := reader.token_id(_KEY + k, n, None)) is not None), None)
        if token is None:
            token = next((ids[text] for text in known if text in ids), None)
            if token is not None:
                types[token] = TokenType.CONTROL
        if role in _MIDDLE_ENDS:
            ends.add(token)
    marked = {ids[text] for text in END_TEXTS if text in ids}
    for token in marked:
        types[token] = TokenType.CONTROL
    ends |= marked
    ends -= _not_an_end(ids, ends)
    ends |= set(listed_ends(generation_config, n))
    return Vocabulary(
        texts=texts,
        types=types,
        scores=_scores(reader, n),
        ids=ids,
        bos_id=bos_id,
        eos_id=eos_id,
        unknown_id=unknown_id,
        pad_id=pad_id,
        control_ids=frozenset(i for i, kind in enumerate(types) if kind in _CONTROL),
        end_ids=frozenset(token for token in ends if token is not None),
    )


def listed_ends(generation_config: Mapping[str, Any], vocab_size: int) -> Iterable[int]:
    """The ids in `eos_token_id` of a generation_config.json that are in the vocabulary."""
    listed = generation_config.get("eos_token_id")
    values = listed if isinstance(listed, (list, tuple)) else [listed]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < vocab_size]


def _not_an_end(ids: Mapping[str, int], ends: set[int | None]) -> set[int]:
    """End texts that mean something else in vocabularies which have other ends."""

    def has(text: str) -> bool:
        return ids.get(text) in ends and text in ids

    wrong = set()
    call = has("<|call|>") or has("<|calls|>")
    if has("<|end|>") and call and (has("<|return|>") or has("<|flush|>")):
        wrong.add(ids["<|end|>"])  # ends a part of a message, the others end the turn
    if has("</s>") and has("<|tool_response>"):
        wrong.add(ids["</s>"])  # an HTML tag
    return wrong


def _types(reader: Reader, n: int) -> list[int]:
    key = _KEY + "token_type"
    if key not in reader.metadata:
        return [int(TokenType.NORMAL)] * n
    types = reader.array(key)
    if len(types) < n:
        raise reader.error(key, f"has {len(types)} entries for {n} tokens")
    try:
        types = list(map(operator.index, types[:n]))
    except TypeError:
        raise reader.error(key, "expected an array of integers") from None
    return [value if 0 <= value <= 6 else int(TokenType.UNDEFINED) for value in types]


def _scores(reader: Reader, n: int) -> list[float]:
    key = _KEY + "scores"
    if key not in reader.metadata:
        return [0.0] * n
    scores = reader.array(key)
    if len(scores) < n:
        raise reader.error(key, f"has {len(scores)} entries for {n} tokens")
    try:
        scores = [float(value) for value in scores[:n]]
    except (TypeError, ValueError):
        raise reader.error(key, "expected an array of numbers") from None
    if any(map(math.isnan, scores)):
        raise reader.error(
            key, f"score of token {next(i for i, s in enumerate(scores) if s != s)} is not a number"
        )
    return scores
