"""From logits to tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from fastllm import _core
from fastllm.errors import RequestError
from fastllm.executor.base import ROW_SAMPLE
from fastllm.ops.arrays import Float32Array, Int32Array, contiguous, describe

Entry = TypeVar("Entry", bound=Sized | None)


class Samples(NamedTuple):
    """One token per row, and what the raw logits say of it.

    Attributes:
        tokens: int32 (R,); -1 where a row's logits hold NaN or +infinity, or nothing is left to choose.
        logprobs: float32 (R,): natural logarithm of the token's probability under the raw logits, before
            temperature, penalties and bias.
        ranks: int32 (R,): 1 = most likely.
        top_ids: int32 (R, num_logprobs): the most likely tokens, best first.
        top_logprobs: float32 (R, num_logprobs).
    """

    tokens: Int32Array
    logprobs: Float32Array
    ranks: Int32Array
    top_ids: Int32Array
    top_logprobs: Float32Array


def sample(
    logits: Float32Array,
    *,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    min_p: float | Sequence[float] = 0.0,
    presence_penalty: float | Sequence[float] = 0.0,
    frequency_penalty: float | Sequence[float] = 0.0,
    repetition_penalty: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    position: int | Sequence[int] = 0,
    sample_index: int | Sequence[int] = 0,
    history: Sequence[Sequence[int]] | None = None,
    prompt_len: int | Sequence[int] = 0,
    logit_bias: Sequence[Mapping[int, float]] | None = None,
    banned: Sequence[Sequence[int]] | None = None,
    allowed: Sequence[Sequence[int] | None] | None = None,
    num_logprobs: int = 0,
) -> Samples:
    """Sample a token from each row of logits.

    The random number of a row comes from Philox4x32-10 (Salmon et al. 2011) with the key (seed, sample_index,
    position): the same key always draws the same, whatever else is in the batch.

    Args:
        logits: float32 (R, V).
        temperature: divides the logits; 0: the most likely token, the lowest id among equals.
        top_k, top_p, min_p: restrict the choice, as in `SamplingParams`; 0, 1 and 0 are off.
        presence_penalty, frequency_penalty, repetition_penalty: as in `SamplingParams`; 0, 0 and 1 are off.
        seed: 0..2^64-1.
        history: for each row the tokens so far, prompt first; needed for penalties.
        prompt_len: how many of them are the prompt, which presence and frequency leave out.
        logit_bias: for each row what is added to the logits of some ids.
        banned: for each row the ids that must not be sampled.
        allowed: for each row the only ids that may be sampled; None: all.
        num_logprobs: how many of the most likely tokens to report.

        A number stands for all rows, a sequence has one entry per row.

    Raises:
        RequestError: a wrong dtype, shape, id or parameter.
    """
    if not isinstance(logits, np.ndarray) or logits.ndim != 2:
        raise RequestError("sample: logits", describe(logits), "float32 (R, V)")
    rows = logits.shape[0]
    bias = _per_row("logit_bias", logit_bias, {}, rows)
    forbidden = _per_row("banned", banned, (), rows)
    mask_row, mask_words = _masks(_per_row("allowed", allowed, None, rows), logits.shape[1])
    past = _per_row("history", history, (), rows)
    batch = SimpleNamespace(  # the rows of a StepBatch
        row_kind=np.full(rows, ROW_SAMPLE, np.int32),
        row_target=np.full(rows, -1, np.int32),
        row_token=np.arange(rows, dtype=np.int32),
        positions=_column("position", position, rows, np.int32),
        num_logprobs=_column("num_logprobs", num_logprobs, rows, np.int32),
        temperature=_column("temperature", temperature, rows, np.float32),
        top_k=_column("top_k", top_k, rows, np.int32),
        top_p=_column("top_p", top_p, rows, np.float32),
        min_p=_column("min_p", min_p, rows, np.float32),
        presence=_column("presence_penalty", presence_penalty, rows, np.float32),
        frequency=_column("frequency_penalty", frequency_penalty, rows, np.float32),
        repetition=_column("repetition_penalty", repetition_penalty, rows, np.float32),
        seed=_column("seed", seed, rows, np.uint64),
        sample_index=_column("sample_index", sample_index, rows, np.int32),
        bias_start=_starts(bias),
        bias_ids=_ids("logit_bias", bias),
        bias_values=np.array([value for entry in bias for value in entry.values()], dtype=np.float32),
        banned_start=_starts(forbidden),
        banned_ids=_ids("banned", forbidden),
        mask_row=mask_row,
        mask_words=mask_words,
        history_start=_starts(past),
        history=_ids("history", past),
        history_prompt_len=_column("prompt_len", prompt_len, rows, np.int32),
    )
    out = _core.sample(contiguous(logits), batch)
    return Samples(out["tokens"], out["logprob"], out["rank"], out["top_ids"], out["top_logprobs"])


def _column(name: str, value: Any, rows: int, dtype: type[np.generic]) -> npt.NDArray[Any]:
    """One value per row, from a number for all or a sequence; a value that changes in `dtype` is refused."""
    given = np.asarray(value)
    integers = np.issubdtype(dtype, np.integer)
    if given.shape not in ((), (rows,)) or given.dtype.kind not in ("iu" if integers else "iuf"):
        wanted = "an integer" if integers else "a number"
        raise RequestError(f"sample: {name}", value, f"{wanted}, or {rows} of them, one for each row")
    if integers and given.size:
        limits = np.iinfo(dtype)  # type: ignore[type-var]
        if int(given.min()) < limits.min or int(given.max()) > limits.max:
            raise RequestError(f"sample: {name}", value, f"integers in {limits.min}..{limits.max}")
    return np.full(rows, given, dtype=dtype)


def _per_row(name: str, lists: Sequence[Entry] | None, empty: Entry, rows: int) -> list[Entry]:
    if lists is None:
        return [empty] * rows
    if len(lists) != rows:
        raise RequestError(f"sample: {name}", f"{len(lists)} entries", f"{rows}, one for each row")
    return list(lists)


def _starts(entries: Iterable[Sized]) -> Int32Array:
    """Where each row's entries begin in the concatenation of all, and the end."""
    return np.cumsum([0, *(len(entry) for entry in entries)], dtype=np.int32)


def _masks(
    entries: Sequence[Sequence[int] | None], vocab_size: int
) -> tuple[Int32Array, npt.NDArray[np.uint32]]:
    """`mask_row` and `mask_words` of a StepBatch, from each row's allowed ids."""
    lists = [entry for entry in entries if entry is not None]
    words = np.zeros((len(lists), (vocab_size + 31) // 32), dtype=np.uint32)
    for line, entry in zip(words, lists, strict=True):
        ids = _ids("allowed", [entry])
        if ids.size and ids.max() >= vocab_size:
            raise RequestError("sample: allowed", int(ids.max()), f"token ids in 0..{vocab_size - 1}")
        np.bitwise_or.at(line, ids // 32, np.uint32(1) << (ids % 32).astype(np.uint32))
    rows = iter(range(len(lists)))
    return np.array([-1 if entry is None else next(rows) for entry in entries], dtype=np.int32), words


def _ids(name: str, entries: Iterable[Iterable[int]]) -> Int32Array:
    """All rows' token ids, one after the other."""
    flat = [token for entry in entries for token in entry]
    ids = np.asarray(flat, dtype=None if flat else np.int32)
    if ids.dtype.kind not in "iu" or ids.ndim != 1 or (ids.size and not 0 <= ids.min() <= ids.max() < 2**31):
        raise RequestError(f"sample: {name}", flat, "token ids")
    return ids.astype(np.int32)
