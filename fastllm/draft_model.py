"""The draft model: a second, smaller model of the same vocabulary, from its reference to an executor."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastllm.errors import RequestError
from fastllm.formats.source import resolve

if TYPE_CHECKING:
    from fastllm.executor.base import ModelExecutor
    from fastllm.executor.make import Device
    from fastllm.formats.checkpoint import Checkpoint
    from fastllm.formats.keys import KeySource
    from fastllm.formats.tokenizer import Tokenizer
    from fastllm.models.spec import DecoderSpec

logger = logging.getLogger(__name__)

_SHOWN_BYTES = 40  # of a token, in a message


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A draft model that is ready, but for its KV cache.

    Attributes:
        executor: has its weights; `allocate_kv` follows.
        max_model_len: positions that it has.
        encrypted: whether its weights are encrypted on disk.
    """

    executor: ModelExecutor
    max_model_len: int
    encrypted: bool = False


def load_draft_model(
    config: Mapping[str, Any],
    spec: DecoderSpec,
    tokenizer: Tokenizer,
    *,
    place: Device,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    block_size: int,
    threads: int,
    progress: bool,
    keys: KeySource | None = None,
    reopening: Callable[[Path, Checkpoint, DecoderSpec], Callable[[], AbstractContextManager[Checkpoint]]],
) -> DraftModel:
    """Read a draft model's weights.

    Args:
        config: speculative_config, checked.
        spec, tokenizer: of the model that it drafts for.
        place: where the model runs, and the draft model with it.
        max_num_seqs, max_num_batched_tokens: of the model's steps.
        block_size: tokens per block of the KV cache.
        threads: that compute; 0: all processors.
        progress: say on stderr what is being fetched.
        keys: where the key of encrypted files is; None: in the environment.
        reopening: gives the way to open a checkpoint again, for waking from sleep.

    Raises:
        RequestError: its vocabulary is another one, or an entry of config does not fit it.
        FastLLMError: it cannot be fetched, read or run.
    """
    from fastllm.executor.memory import format_bytes
    from fastllm.formats.checkpoint import open_checkpoint
    from fastllm.formats.tokenizer import load_tokenizer
    from fastllm.models.registry import spec_from_checkpoint

    reference: str | os.PathLike[str] = config["model"]
    try:
        path = resolve(reference, progress=progress)
    except RequestError as error:
        raise RequestError("speculative_config: model", error.value, error.limit) from error
    with open_checkpoint(path, keys) as checkpoint:
        encrypted = checkpoint.encrypted
        own = spec_from_checkpoint(checkpoint)
        length = config.get("max_model_len", own.context_length)
        if length > own.context_length:
            limit = f"at most the draft model's context of {own.context_length} tokens"
            raise RequestError("speculative_config: max_model_len", length, limit)
        check_vocabulary(str(path), spec, tokenizer, own, load_tokenizer(checkpoint))
        executor = place.executor(
            checkpoint,
            own,
            quantization=config.get("quantization"),
            kv_cache_dtype=config.get("kv_cache_dtype", "auto"),
            block_size=block_size,
            kv_blocks=0,
            max_model_len=length,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            threads=threads,
            reopen=reopening(path, checkpoint, own),
        )
    logger.info(
        "draft model %s: weights %s, at most %d tokens per sequence",
        path,
        format_bytes(executor.weight_bytes),
        length,
    )
    return DraftModel(executor, length, encrypted)


def check_vocabulary(
    name: str, spec: DecoderSpec, tokenizer: Tokenizer, draft_spec: DecoderSpec, draft_tokenizer: Tokenizer
) -> None:
    """Raises RequestError, with the first difference, unless a draft model means by every token id what the
    model means by it."""

    def refuse(what: str, own: object, wanted: object) -> None:
        raise RequestError(
            "speculative_config: model", name, f"the model's vocabulary; {what}: {own} there, {wanted} here"
        )

    if draft_spec.vocab_size != spec.vocab_size:
        refuse("vocab_size", draft_spec.vocab_size, spec.vocab_size)
    for token in range(max(tokenizer.vocab_size, draft_tokenizer.vocab_size)):
        own, wanted = draft_tokenizer.token_bytes(token), tokenizer.token_bytes(token)
        if own != wanted:
            refuse(f"token {token}", own[:_SHOWN_BYTES], wanted[:_SHOWN_BYTES])
        if draft_tokenizer.is_special(token) != tokenizer.is_special(token):
            kinds = {True: "a control token", False: "text"}
            refuse(
                f"token {token}", kinds[draft_tokenizer.is_special(token)], kinds[tokenizer.is_special(token)]
            )
    if draft_tokenizer.eos_token_ids != tokenizer.eos_token_ids:
        refuse("eos_token_ids", sorted(draft_tokenizer.eos_token_ids), sorted(tokenizer.eos_token_ids))
