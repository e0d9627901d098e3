"""The contract between the engine and what computes: `StepBatch`, `StepResult` and `Executor`.

The engine knows nothing else of CPU or GPU. All arrays are NumPy, C-contiguous, int32 unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
UInt32Array = npt.NDArray[np.uint32]
UInt64Array = npt.NDArray[np.uint64]

ROW_SAMPLE = 0  # row_kind: sample the token that follows
ROW_LOGPROB = 1  # row_kind: the logprob of a given token, row_target
ROW_POOL = 2  # row_kind: the hidden state of the token, after the final norm; nothing is sampled

NO_HIDDEN: Float32Array = np.zeros((0, 0), dtype=np.float32)


class StepBatch(Protocol):
    """One flat batch of T tokens of S sequences, R rows of which yield something.

    The tokens of sequence s are query_start[s] .. query_start[s+1], consecutive positions ending at
    seq_lens[s]-1. The executor stores the K and V of each in its slot, then reads the context through the
    block table: position p of sequence s is in slot block_tables[s, p // block_size] * block_size +
    p % block_size. The arrays are views of buffers that are filled again two steps later.

    CSR pairs: the entries of row r are ids[start[r] : start[r+1]].
    """

    # What to compute.
    token_ids: Int32Array  # (T,) -1 - r: what row r of the step before yielded, see Pipelined
    positions: Int32Array  # (T,)
    slot_mapping: Int32Array  # (T,) block * block_size + offset
    query_start: Int32Array  # (S+1,)
    seq_lens: Int32Array  # (S,) context length with this step's tokens
    block_tables: Int32Array  # (S, max_blocks) unused entries 0
    copy_blocks: Int32Array  # (C, 2) source, target; done before anything else
    adapter: Int32Array  # (S,) index of a loaded adapter, see AdapterHost; -1 = none

    # What to yield.
    row_seq: Int32Array  # (R,) in 0..S-1, ascending
    row_token: Int32Array  # (R,) in 0..T-1, ascending: the token whose hidden state is used
    row_kind: Int32Array  # (R,) ROW_SAMPLE, ROW_LOGPROB or ROW_POOL
    row_target: Int32Array  # (R,) ROW_LOGPROB: the token wanted; others: -1
    num_logprobs: Int32Array  # (R,) -1 = none, n >= 0 = that token and the top n

    # How to sample; neutral in rows of another kind.
    temperature: Float32Array  # (R,) 0 = greedy
    top_k: Int32Array  # (R,) 0 = all
    top_p: Float32Array  # (R,) 1 = all
    min_p: Float32Array  # (R,) 0 = all
    presence: Float32Array  # (R,) 0 = off
    frequency: Float32Array  # (R,) 0 = off
    repetition: Float32Array  # (R,) 1 = off
    seed: UInt64Array  # (R,) the random key is (seed, sample_index, positions[row_token])
    sample_index: Int32Array  # (R,)
    bias_start: Int32Array  # (R+1,)
    bias_ids: Int32Array  # (bias_start[R],)
    bias_values: Float32Array  # (bias_start[R],)
    banned_start: Int32Array  # (R+1,)
    banned_ids: Int32Array  # (banned_start[R],) never to be sampled in this row
    mask_row: Int32Array  # (R,) its row of mask_words; -1 = none
    mask_words: UInt32Array  # (M, ceil(V/32)) bit i % 32 of word i // 32: token i is allowed; (0, any)
    history_start: Int32Array  # (R+1,)
    history: Int32Array  # (history_start[R],) prompt and output; only of rows with a penalty
    history_prompt_len: Int32Array  # (R,) how many of its history are prompt


@dataclass(slots=True)
class StepResult:
    """What R rows of one StepBatch yield. Logprobs are taken from the raw logits.

    Attributes:
        tokens: int32 (R,). The sampled token; in ROW_LOGPROB rows the target again, in ROW_POOL rows 0. -1
            where logits or hidden state are not numbers.
        logprob: float32 (R,). Of that token. Read only where num_logprobs >= 0.
        rank: int32 (R,). Of that token; 1 = most likely. Read only where num_logprobs >= 0.
        top_ids: int32 (R, L), best first; L >= every num_logprobs of the batch. Entries past a row's own
            number are undefined.
        top_logprobs: float32 (R, L).
        hidden: float32 (P, dim), one line for each of the P ROW_POOL rows, in order; without any it has no
            lines.
    """

    tokens: Int32Array
    logprob: Float32Array
    rank: Int32Array
    top_ids: Int32Array
    top_logprobs: Float32Array
    hidden: Float32Array = field(default_factory=lambda: NO_HIDDEN)


class Executor(Protocol):
    """Something that computes StepBatches and owns the bytes of the KV cache.

    A ticket stands for one submitted batch. A submit after an uncollected ticket supersedes it: the engine
    does that only when a step was interrupted, and then with the same batch contents, whose effect on the
    cache is the same however often it is applied.
    """

    @property
    def block_size(self) -> int:
        """Tokens per block of the KV cache."""
        ...

    def kv_capacity(self) -> int:
        """Blocks in the KV cache."""
        ...

    def submit(self, batch: StepBatch) -> int:
        """Begin a step. Returns its ticket. The batch may be read until the ticket is collected."""
        ...

    def collect(self, ticket: int) -> StepResult:
        """Wait for a step. Its result may be overwritten by the second submit after it."""
        ...

    def close(self) -> None:
        """Give the memory back. Called once or more; nothing else is called after it."""
        ...


@runtime_checkable
class Pipelined(Protocol):
    """What an executor has besides if it computes while its caller goes on.

    A step may then be submitted while the one before it is not collected; a third one supersedes the oldest.
    Where a row yielded no token (-1) any id does for the one that goes on from it: nobody looks at what
    follows. Steps are computed in the order of their submission, and whatever else it is asked for (adapters,
    blocks) happens between the steps between which it was asked.
    """

    @property
    def steps_ahead(self) -> int:
        """Steps that may be submitted beyond the one that is waited for: 0 or 1."""
        ...


class ModelExecutor(Executor, Protocol):
    """An executor that has read a model: what loading needs of it."""

    @property
    def kv_bytes_per_block(self) -> int:
        """Bytes of one block of its KV cache."""
        ...

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of its KV cache."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weights."""
        ...

    @property
    def threads(self) -> int:
        """Threads that a step uses."""
        ...

    def allocate_kv(self, blocks: int) -> None:
        """Make the KV cache, of so many blocks, in place of the one there is."""
        ...


class PreparedAdapter(Protocol):
    """A LoRA adapter in the form in which the executor that read it takes it."""

    @property
    def path(self) -> Path:
        """The directory that it was read from."""
        ...

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for its contents."""
        ...

    @property
    def rank(self) -> int:
        """The largest of its ranks."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        ...


@runtime_checkable
class AdapterHost(Protocol):
    """What an executor has besides if sequences may have adapters (`StepBatch.adapter`)."""

    def read_adapter(self, path: Path) -> PreparedAdapter:
        """Read and convert an adapter. From any thread, while steps run.

        Raises:
            RequestError, ModelFileError, UnsupportedModelError, CapacityError: it cannot be used.
        """
        ...

    def load_adapter(self, index: int, adapter: Any) -> None:
        """Between two steps: sequences of this index, from 0, use the adapter, a `PreparedAdapter` of this
        executor. Takes no time."""
        ...

    def unload_adapter(self, index: int) -> None:
        """Between two steps: forget it. No later step names the index until it is loaded again."""
        ...


@runtime_checkable
class BlockStore(Protocol):
    """What an executor has besides if the content of its KV cache's blocks can be kept elsewhere and brought
    back, into any block. Called between steps."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: K and V of all layers, and what belongs to them."""
        ...

    def read_blocks(self, blocks: Int32Array, out: npt.NDArray[np.uint8]) -> None:
        """Copy blocks (B,) to out (B, block_bytes)."""
        ...

    def write_blocks(self, blocks: Int32Array, data: npt.NDArray[np.uint8]) -> None:
        """Copy data (B, block_bytes), which `read_blocks` gave, to blocks (B,): to whoever reads them they
        are what those that were read were then."""
        ...


@runtime_checkable
class PhaseTimer(Protocol):
    """What an executor has besides if it can tell where the time of its steps goes."""

    def profile(self, on: bool) -> None:
        """Start, from zero, or end the measurement of `phase_seconds`. Off at first."""
        ...

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Seconds that the phases of all steps took since `profile(True)`, by name, in order."""
        ...


@runtime_checkable
class Sleeper(Protocol):
    """What an executor has besides if it can give its memory back for a while. Called between steps."""

    def sleep(self, level: int) -> None:
        """Free the KV cache (level 1), and the weights as well (level 2). No step follows before `wake`.

        May be called again while it sleeps; the deeper level counts.
        """
        ...

    def wake(self) -> None:
        """Allocate again what `sleep` freed; the KV cache has its size, but not its contents.

        Raises:
            FastLLMError: what was freed cannot be had again; it sleeps on, and the call can be repeated.
            MemoryError: likewise.
        """
        ...
