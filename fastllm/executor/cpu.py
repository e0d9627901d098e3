"""The CPU executor: packs a checkpoint's weights, makes the KV cache, runs StepBatches on the C++ decoder.

Every tensor is packed by one of a few threads straight from the mapped file, whose pages are released right
after, so loading holds little more than the packed weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastllm import _core
from fastllm.errors import CapacityError, RequestError, UnsupportedModelError
from fastllm.executor.base import StepBatch, StepResult
from fastllm.executor.kv_size import kv_blocks as size_kv
from fastllm.executor.memory import available_memory, format_bytes
from fastllm.executor.packing import pack_matrix, packed_slots
from fastllm.models.adapters import WEIGHTS_NAME, read_adapter
from fastllm.models.registry import hf_names
from fastllm.models.spec import DecoderSpec

if TYPE_CHECKING:
    from fastllm.formats.checkpoint import Checkpoint
    from fastllm.formats.keys import KeySource

logger = logging.getLogger(__name__)

KV_CACHE_DTYPES = ("int16", "int8", "fp16", "bf16", "fp32")
DEFAULT_KV_CACHE_DTYPE = "int16"
QUANTIZATIONS = ("int4", "int8")
BLOCK_SIZES = (16, 32, 64)

# Without a size asked for: a share of the free memory, but no more than every sequence at full length needs.
_DEFAULT_MEMORY_SHARE = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class CpuAdapter:
    """Implements `fastllm.executor.base.PreparedAdapter`."""

    path: Path
    digest: bytes
    matrices: _core.Adapter

    @property
    def rank(self) -> int:
        """The largest of its ranks."""
        return self.matrices.rank

    @property
    def nbytes(self) -> int:
        """Memory that its matrices take."""
        return self.matrices.nbytes


class CpuExecutor:
    """Runs one model on the CPU. Implements `Executor`, `AdapterHost`, `BlockStore`, `PhaseTimer` and
    `Sleeper` of `fastllm.executor.base`.

    Args:
        checkpoint: what the weights are read from; it may be closed afterwards.
        spec: the decoder, from `fastllm.models.registry.spec_from_checkpoint(checkpoint)`.
        quantization: "int4" or "int8" quantizes floating-point matrices while loading, in groups of 32
            columns (the embedding and the head to 8 bits either way); None keeps the file's precision.
        kv_cache_dtype: one of KV_CACHE_DTYPES.
        block_size: positions per block of the KV cache: 16, 32 or 64.
        kv_cache_bytes: size of the KV cache; None takes what max_num_seqs sequences of max_model_len need, at
            most half of the memory that is free once the weights are loaded.
        kv_cache_share: the same as a share, in (0, 1], of the memory that is free once the weights are
            loaded.
        kv_cache_tokens: the same in tokens, rounded up to whole blocks.
        kv_bytes_beside: what a block takes elsewhere besides, in another executor's cache of as many blocks:
            counted in all sizes above.
        kv_blocks: blocks of the KV cache, whatever the above says; 0: none before `allocate_kv`.
        max_model_len: positions that one sequence may have.
        max_num_seqs: sequences that may run at once.
        threads: 0 takes all processors that the process may use.
        reopen: opens the checkpoint again, for `wake` after `sleep(2)`; None: the weights stay loaded.
        keys: where the key of encrypted adapters is; None: in the environment.

    Raises:
        RequestError: an argument out of its range.
        UnsupportedModelError: a decoder that the CPU core does not run.
        CapacityError: the KV cache cannot hold one sequence of max_model_len.
        ModelFileError: a tensor is missing or of the wrong shape.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: DecoderSpec,
        *,
        quantization: str | None = None,
        kv_cache_dtype: str = DEFAULT_KV_CACHE_DTYPE,
        block_size: int = 16,
        kv_cache_bytes: int | None = None,
        kv_cache_share: float | None = None,
        kv_cache_tokens: int | None = None,
        kv_bytes_beside: int = 0,
        kv_blocks: int | None = None,
        max_model_len: int,
        max_num_seqs: int = 64,
        threads: int = 0,
        reopen: Callable[[], AbstractContextManager[Checkpoint]] | None = None,
        keys: KeySource | None = None,
    ) -> None:
        _choice("quantization", quantization, (None, *QUANTIZATIONS))
        _choice("kv_cache_dtype", kv_cache_dtype, KV_CACHE_DTYPES)
        _choice("block_size", block_size, BLOCK_SIZES)
        if spec.head_dim % 16:
            raise UnsupportedModelError(
                f"{spec.source}: head_dim: the CPU core runs multiples of 16, got {spec.head_dim}"
            )
        try:
            self._decoder = _core.Decoder(spec.as_dict(), threads)
        except RequestError as error:
            if error.field.startswith("spec: "):
                raise UnsupportedModelError(f"{spec.source}: {error}") from error
            raise
        self._spec = spec
        self._checkpoint_kind = checkpoint.kind
        self._block_size = block_size
        self._results: dict[int, StepResult] = {}
        self._tickets = 0
        self._spec = spec
        self._quantization = quantization
        self._kv_cache_dtype = kv_cache_dtype
        self._reopen = reopen
        self._keys = keys
        self._level = 0  # of sleep
        self._load(checkpoint)
        self.kv_bytes_per_block = self._decoder.kv_bytes_per_block(block_size, kv_cache_dtype)
        self._kv_beside = kv_bytes_beside
        self._kv_blocks = self.kv_cache_bytes = 0
        if kv_cache_tokens is not None:
            kv_cache_bytes = -(-kv_cache_tokens // block_size) * (self.kv_bytes_per_block + kv_bytes_beside)
        if kv_blocks is None:
            kv_blocks = self._size_kv(kv_cache_bytes, kv_cache_share, max_model_len, max_num_seqs)
        if kv_blocks:
            self.allocate_kv(kv_blocks)

    def allocate_kv(self, blocks: int) -> None:
        """Makes the KV cache, of so many blocks, in place of the one there is."""
        self._decoder.allocate_kv(blocks, self._block_size, self._kv_cache_dtype)
        self._kv_blocks = blocks
        self.kv_cache_bytes = blocks * self.kv_bytes_per_block

    def _load(self, checkpoint: Checkpoint) -> None:
        pack = partial(pack_matrix, quantization=self._quantization)
        for slot, layer, weights in packed_slots(checkpoint, self._spec, pack, self._decoder.threads):
            self._decoder.set(slot, layer, weights)
        self._decoder.check_complete()

    def _size_kv(self, asked: int | None, share: float | None, max_model_len: int, max_num_seqs: int) -> int:
        """Blocks of the KV cache; the arithmetic goes to the log."""
        dtype = self._kv_cache_dtype
        own, beside = self.kv_bytes_per_block, self._kv_beside
        blocks, origin = size_kv(
            free=available_memory(),
            own=own,
            beside=beside,
            weights=self._decoder.weight_bytes,
            block_size=self._block_size,
            asked=asked,
            share=share,
            default_share=_DEFAULT_MEMORY_SHARE,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
        )
        draft = f" and {beside // self._block_size} of a draft model" if beside else ""
        logger.info(
            "KV cache: %d blocks x %d tokens x %s = %s for %d tokens (%s); weights: %s; %s, %d threads",
            blocks,
            self._block_size,
            f"{own // self._block_size} bytes/token in {dtype}{draft}",
            format_bytes(blocks * (own + beside)),
            blocks * self._block_size,
            origin,
            format_bytes(self._decoder.weight_bytes),
            _core.isa(),
            self._decoder.threads,
        )
        return blocks

    @property
    def block_size(self) -> int:
        """Tokens per block of the KV cache."""
        return self._block_size

    @property
    def threads(self) -> int:
        """Threads that a step uses."""
        return self._decoder.threads

    @property
    def weight_bytes(self) -> int:
        """Bytes of all packed matrices."""
        return self._decoder.weight_bytes

    def kv_capacity(self) -> int:
        """Blocks in the KV cache."""
        return self._kv_blocks

    def submit(self, batch: StepBatch) -> int:
        """Runs the step; the GIL is released while it computes."""
        self._tickets += 1
        self._results.clear()
        self._results[self._tickets] = self.run(batch)[0]
        return self._tickets

    def collect(self, ticket: int) -> StepResult:
        """The result of `submit`."""
        return self._results.pop(ticket)

    def run(
        self, batch: StepBatch, *, logits: bool = False
    ) -> tuple[StepResult, npt.NDArray[np.float32] | None]:
        """One step at once; with `logits`, the raw logits float32 (R, V) of its rows as well."""
        out = self._decoder.step(batch, logits)
        result = StepResult(
            tokens=out["tokens"],
            logprob=out["logprob"],
            rank=out["rank"],
            top_ids=out["top_ids"],
            top_logprobs=out["top_logprobs"],
            hidden=out["hidden"],
        )
        return result, out["logits"]

    def read_adapter(self, path: Path) -> CpuAdapter:
        """Reads and packs a LoRA adapter; from any thread, also while a step runs.

        Raises:
            CapacityError: the free memory does not suffice.
            RequestError, ModelFileError, UnsupportedModelError: as `fastllm.models.adapters.read_adapter`.
        """
        weights = path / WEIGHTS_NAME
        if weights.is_file():
            # 16 bits become 32, and what was read is packed into memory of its own.
            asked, free = 4 * weights.stat().st_size, available_memory()
            if asked > free:
                raise CapacityError(
                    f"{weights}: reading it, 4 bytes for each of its own",
                    asked=asked, had=free, would_fit=free, unit="bytes",
                )  # fmt: skip
        read = read_adapter(path, self._spec, hf_names(self._checkpoint_kind, self._spec), self._keys)
        matrices = _core.Adapter()
        for part in read.parts:
            matrices.set(
                part.slot, part.layer, part.a, _core.PackedMatrix.from_float(part.b, "f32"), part.scale
            )
        return CpuAdapter(read.path, read.digest, matrices)

    def load_adapter(self, index: int, adapter: CpuAdapter) -> None:
        """Between two steps: sequences of this index (0 to 255) use the adapter.

        Raises:
            RequestError: it does not fit the decoder.
        """
        self._decoder.load_adapter(index, adapter.matrices)

    def unload_adapter(self, index: int) -> None:
        """Between two steps: forgets the adapter of an index, if it has one."""
        self._decoder.unload_adapter(index)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of the KV cache over all layers, K and V."""
        return self.kv_cache_bytes // self._kv_blocks

    def read_blocks(self, blocks: npt.NDArray[np.int32], out: npt.NDArray[np.uint8]) -> None:
        """Between two steps: copies blocks (B,) to out (B, block_bytes); the GIL is released.

        Raises:
            RequestError: a block or a shape out of range, or it sleeps.
        """
        self._decoder.read_blocks(blocks, out)

    def write_blocks(self, blocks: npt.NDArray[np.int32], data: npt.NDArray[np.uint8]) -> None:
        """Between two steps: copies data (B, block_bytes), from `read_blocks`, to blocks (B,).

        Raises:
            RequestError: a block or a shape out of range, or it sleeps.
        """
        self._decoder.write_blocks(blocks, data)

    def profile(self, on: bool) -> None:
        """Starts, from zero, or ends the measurement of `phase_seconds`."""
        self._decoder.profile(on)

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Seconds that the phases of all steps took since `profile(True)`, by name, waits between threads
        included."""
        return self._decoder.phase_seconds

    def sleep(self, level: int) -> None:
        """Gives the KV cache (level 1) and the weights (level 2) back to the operating system.

        Raises:
            RequestError: level 2, and there is no way to open the checkpoint again.
        """
        if level > 1 and self._reopen is None:
            raise RequestError("level", level, "1, where the weights cannot be read again")
        self._level = max(self._level, level)
        self._results.clear()
        if self._level > 1:
            self._decoder.release_weights()
        else:
            self._decoder.release_kv()
        _core.trim_memory()

    def wake(self) -> None:
        """Reads the weights again if they were given back; makes the KV cache anew, as large as before."""
        if self._level > 1 and self._reopen is not None:
            try:
                with self._reopen() as checkpoint:
                    self._load(checkpoint)
            except BaseException:
                self._decoder.release_weights()
                _core.trim_memory()
                raise
            self._level = 1
        self._decoder.allocate_kv(self._kv_blocks, self._block_size, self._kv_cache_dtype)
        self._level = 0

    def close(self) -> None:
        """Gives weights and KV cache back to the operating system."""
        self._results.clear()
        if hasattr(self, "_decoder"):
            self._decoder.close()
            _core.trim_memory()


def _choice(field: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise RequestError(field, value, "one of " + ", ".join(repr(choice) for choice in allowed))
