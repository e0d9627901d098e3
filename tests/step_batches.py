"""StepBatches by hand, for tests that drive an executor without the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]


@dataclass
class Chunk:
    """The next tokens of one sequence: `tokens` at positions from `start`, in a cache reached by `table`."""

    tokens: Sequence[int]
    start: int
    table: Sequence[int]
    rows: Sequence[int] = field(default=())
    """Which of the tokens yield a row; empty: the last."""


def ints(values: Any) -> Int32:
    return np.ascontiguousarray(values, dtype=np.int32)


def step_batch(chunks: Sequence[Chunk], block_size: int, **overrides: Any) -> Any:
    """A batch of greedy rows over `chunks`; `overrides` replace arrays."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, row_seq, row_token = [0], [], []
    for s, chunk in enumerate(chunks):
        first = len(tokens)
        for i, token in enumerate(chunk.tokens):
            position = chunk.start + i
            tokens.append(token)
            positions.append(position)
            slots.append(chunk.table[position // block_size] * block_size + position % block_size)
        for row in chunk.rows or (len(chunk.tokens) - 1,):
            row_seq.append(s)
            row_token.append(first + row)
        starts.append(len(tokens))
    width = max(len(chunk.table) for chunk in chunks)
    tables = np.zeros((len(chunks), width), dtype=np.int32)
    for s, chunk in enumerate(chunks):
        tables[s, : len(chunk.table)] = chunk.table
    rows = len(row_token)
    arrays: dict[str, Any] = {
        "token_ids": ints(tokens),
        "positions": ints(positions),
        "slot_mapping": ints(slots),
        "query_start": ints(starts),
        "seq_lens": ints([chunk.start + len(chunk.tokens) for chunk in chunks]),
        "block_tables": tables,
        "copy_blocks": np.zeros((0, 2), dtype=np.int32),
        "adapter": np.full(len(chunks), -1, dtype=np.int32),
        "row_seq": ints(row_seq),
        "row_token": ints(row_token),
        "row_kind": np.zeros(rows, dtype=np.int32),
        "row_target": np.full(rows, -1, dtype=np.int32),
        "num_logprobs": np.full(rows, -1, dtype=np.int32),
        "temperature": np.zeros(rows, dtype=np.float32),
        "top_k": np.zeros(rows, dtype=np.int32),
        "top_p": np.ones(rows, dtype=np.float32),
        "min_p": np.zeros(rows, dtype=np.float32),
        "presence": np.zeros(rows, dtype=np.float32),
        "frequency": np.zeros(rows, dtype=np.float32),
        "repetition": np.ones(rows, dtype=np.float32),
        "seed": np.zeros(rows, dtype=np.uint64),
        "sample_index": np.zeros(rows, dtype=np.int32),
        "bias_start": np.zeros(rows + 1, dtype=np.int32),
        "bias_ids": np.zeros(0, dtype=np.int32),
        "bias_values": np.zeros(0, dtype=np.float32),
        "banned_start": np.zeros(rows + 1, dtype=np.int32),
        "banned_ids": np.zeros(0, dtype=np.int32),
        "mask_row": np.full(rows, -1, dtype=np.int32),
        "mask_words": np.zeros((0, 0), dtype=np.uint32),
        "history_start": np.zeros(rows + 1, dtype=np.int32),
        "history": np.zeros(0, dtype=np.int32),
        "history_prompt_len": np.zeros(rows, dtype=np.int32),
    }
    return SimpleNamespace(**{**arrays, **overrides})


def whole(tokens: Sequence[int], table: Sequence[int]) -> Chunk:
    """A whole sequence at once, a row for every token."""
    return Chunk(tokens, 0, table, range(len(tokens)))
