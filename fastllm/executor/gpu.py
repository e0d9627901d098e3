"""The GPU executor: packs a checkpoint's weights, makes the KV cache, runs StepBatches on torch and Triton.

A step is one transfer to the GPU, the decoder and the sampler there, and one small transfer back. Steps of up
to `max_num_seqs` tokens without hidden states to report (decodes, drafts, short chunks) are CUDA graphs,
captured once for each of a few sizes and replayed with padding; the others run kernel by kernel.

    submit   fill buffers ─► transfer ─► graph or kernels ─► transfer back ─► event
    collect  wait for the event, make arrays of what came

All of it is on one stream, so that steps are computed in the order of their submission. The next one may be
submitted before this one is collected: tokens that it does not know it names by their row in this one, and
finds them in `_sampled`.

Without a GPU, and with Triton's interpreter, everything runs on the CPU, slowly: a graph is then the same
function called again on the same buffers. That is for tests.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fastllm.errors import RequestError, UnsupportedModelError
from fastllm.executor.base import NO_HIDDEN, ROW_POOL, StepBatch, StepResult
from fastllm.executor.gpu_batch import StepBuffers
from fastllm.executor.gpu_decoder import AdapterStack, GpuDecoder
from fastllm.executor.gpu_weights import load_weights
from fastllm.executor.kv_size import kv_blocks as size_kv
from fastllm.executor.memory import available_memory, format_bytes
from fastllm.executor.ranks import Rank
from fastllm.kernels import attention, products
from fastllm.kernels.attention_plan import (
    AttentionPlan,
    Capacity,
    Tile,
    capacity,
    needs,
    plan_attention,
)
from fastllm.kernels.heads import LayerCache
from fastllm.kernels.sampler import SampleOutputs, SamplerScratch, launch
from fastllm.models.adapters import AdapterPart, read_adapter
from fastllm.models.registry import hf_names
from fastllm.models.spec import DecoderSpec

if TYPE_CHECKING:
    from fastllm.formats.checkpoint import Checkpoint
    from fastllm.formats.keys import KeySource

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KV_CACHE_DTYPES = {**DTYPES, "int8": torch.int8}
BLOCK_SIZES = (16, 32, 64)
_DEFAULT_MEMORY_SHARE = 0.9
_LOGIT_ROWS = 256  # whose logits are in memory at a time
_GRAPH_LOGPROBS = 20  # a graph has room for so many, or none


@dataclass(frozen=True, slots=True, eq=False)
class GpuAdapter:
    """Implements `fastllm.executor.base.PreparedAdapter`."""

    path: Path
    digest: bytes
    rank: int
    parts: tuple[AdapterPart, ...]

    @property
    def nbytes(self) -> int:
        """Memory that its matrices take, in float32."""
        return sum(part.a.nbytes + part.b.nbytes for part in self.parts)


class _GraphKey(NamedTuple):
    size: int  # tokens and rows, padding included
    many: Tile | None  # attention's tile for long chunks, if there are any
    edits: bool
    filters: bool
    logprobs: int
    adapters: bool


class _Graph(NamedTuple):
    replay: Callable[[], None]
    out: _Outputs


@dataclass(frozen=True)
class _Outputs:
    """What the sampler writes, in one stretch of memory."""

    memory: torch.Tensor  # int32
    arrays: SampleOutputs

    @classmethod
    def allocate(cls, rows: int, logprobs: int, device: torch.device) -> _Outputs:
        memory = torch.zeros(rows * (3 + 2 * logprobs), dtype=torch.int32, device=device)
        parts = torch.split(memory, [rows, rows, rows, rows * logprobs, rows * logprobs])
        arrays = SampleOutputs(
            parts[0],
            parts[1].view(torch.float32),
            parts[2],
            parts[3].view(rows, logprobs),
            parts[4].view(torch.float32).view(rows, logprobs),
        )
        return cls(memory, arrays)


class _Pending(NamedTuple):
    """A step under way: what `collect` waits for and reads."""

    event: torch.cuda.Event | None
    memory: torch.Tensor  # int32, on the host
    rows: int
    padded: int
    logprobs: int
    hidden: torch.Tensor | None
    begun: Any  # when its computing did, if that is measured: an event, or a time


class GpuExecutor:
    """Runs one model on one GPU, or a rank's share of it. Implements `Executor`, `AdapterHost`, `BlockStore`,
    `Pipelined`, `PhaseTimer` and `Sleeper` of `fastllm.executor.base`.

    Args:
        checkpoint: what the weights are read from; it may be closed afterwards.
        spec: the decoder, from `fastllm.models.registry.spec_from_checkpoint(checkpoint)`.
        dtype: of activations, and of weights that are not quantized: "bf16", "fp16" or "fp32".
        quantization: "int4" or "int8" quantizes floating-point matrices while loading, as on the CPU; None
            keeps the file's weights.
        kv_cache_dtype: that of the activations (also "auto"), or "int8".
        block_size: positions per block of the KV cache: 16, 32 or 64.
        kv_cache_bytes: size of the KV cache; None takes what max_num_seqs sequences of max_model_len need, at
            most 0.9 of the memory that is free once weights are loaded and a step's memory is set aside.
        kv_cache_share: the same as a share, in (0, 1].
        kv_cache_tokens: the same in tokens.
        kv_bytes_beside: what a block takes in another executor's cache of as many blocks.
        kv_blocks: blocks of the KV cache, whatever the above says; 0: none before `allocate_kv`.
        max_model_len: positions that one sequence may have.
        max_num_seqs: sequences that may run at once.
        max_num_batched_tokens: tokens of a step.
        device: "cuda", "cuda:1", ...; "cpu" with Triton's interpreter.
        deterministic: a request's answer does not depend on the others in its batch; slower.
        graphs: replay CUDA graphs where possible.
        rank: this process's share of the model.
        reopen: opens the checkpoint again, for `wake` after `sleep(2)`; None: the weights stay loaded.
        keys: where the key of encrypted adapters is; None: in the environment.

    Raises:
        RequestError: an argument out of its range.
        UnsupportedModelError: no GPU, or a decoder that the kernels do not run.
        CapacityError: the KV cache cannot hold one block.
        ModelFileError: a tensor is missing or of the wrong shape.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: DecoderSpec,
        *,
        dtype: str = "bf16",
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        block_size: int = 16,
        kv_cache_bytes: int | None = None,
        kv_cache_share: float | None = None,
        kv_cache_tokens: int | None = None,
        kv_bytes_beside: int = 0,
        kv_blocks: int | None = None,
        max_model_len: int,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        device: str = "cuda",
        deterministic: bool = False,
        graphs: bool = True,
        rank: Rank | None = None,
        reopen: Callable[[], AbstractContextManager[Checkpoint]] | None = None,
        keys: KeySource | None = None,
    ) -> None:
        self._device = usable_device(device)
        _choice("dtype", dtype, tuple(DTYPES))
        _choice("kv_cache_dtype", kv_cache_dtype, ("auto", "int8", dtype))
        _choice("block_size", block_size, BLOCK_SIZES)
        if spec.head_dim > attention.HEAD_DIM_MAX:
            raise UnsupportedModelError(
                f"{spec.source}: head_dim: the GPU kernels run up to {attention.HEAD_DIM_MAX}, got "
                f"{spec.head_dim}"
            )
        self._spec = spec
        self._checkpoint_kind = checkpoint.kind
        self._dtype = DTYPES[dtype]
        self._kv_name = dtype if kv_cache_dtype == "auto" else kv_cache_dtype
        self._kv_dtype = KV_CACHE_DTYPES[self._kv_name]
        self._quantization = quantization
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._deterministic = deterministic
        self._rank = rank or Rank()
        self._reopen = reopen
        self._keys = keys
        self._level = 0  # of sleep
        self._group = spec.num_heads // spec.num_kv_heads
        self._kv_heads = spec.num_kv_heads // self._rank.size
        self._tiles = attention.tiles(self._device, spec.head_dim, self._dtype, self._kv_dtype)
        self._processors = products.multiprocessors(self._device)
        self._windows = sorted({spec.layer_window(i) for i in range(spec.num_layers)})  # 0: none
        self._adapters: dict[tuple[str, int], AdapterStack] = {}  # outlive the weights, as on the CPU
        self._decoder: GpuDecoder | None = None
        self._load(checkpoint)
        self.kv_bytes_per_block = self._block_bytes()
        self._memory: torch.Tensor | None = None  # (layers, 2, blocks, KH, block_size, D)
        self._scales: torch.Tensor | None = None  # of int8: (layers, 2, blocks, KH, block_size)
        self._cache: list[LayerCache] = []
        self._kv_blocks = self.kv_cache_bytes = 0
        self._use_graphs = graphs
        self._buffers: StepBuffers | None = None  # of steps without a graph
        self._graph_buffers: StepBuffers | None = None
        self._graphs: dict[_GraphKey, _Graph] = {}
        self._pool: Any = None  # memory that the graphs share: one runs at a time
        self._sampled = torch.zeros(max_num_seqs, dtype=torch.int32, device=self._device)
        self._scratch: SamplerScratch | None = None
        self._pending: dict[int, _Pending] = {}
        self._profiling = False
        self._busy = 0.0  # seconds
        self._tickets = 0
        if kv_blocks is None:
            if kv_cache_tokens is not None:
                per_block = self.kv_bytes_per_block + kv_bytes_beside
                kv_cache_bytes = -(-kv_cache_tokens // block_size) * per_block
            kv_blocks = self._size_kv(kv_cache_bytes, kv_cache_share, kv_bytes_beside, max_num_batched_tokens)
        if kv_blocks:
            self.allocate_kv(kv_blocks)

    # ---- memory -------------------------------------------------------------------------------------------

    def _load(self, checkpoint: Checkpoint) -> None:
        weights = load_weights(
            checkpoint,
            self._spec,
            quantization=self._quantization,
            dtype=self._dtype,
            device=self._device,
            rank=self._rank,
            threads=min(8, torch.get_num_threads()),
        )
        self._decoder = GpuDecoder(
            self._spec,
            weights,
            dtype=self._dtype,
            device=self._device,
            positions=self._max_model_len,
            deterministic=self._deterministic,
            rank=self._rank,
            adapters=self._adapters,
        )

    @property
    def _model(self) -> GpuDecoder:
        assert self._decoder is not None
        return self._decoder

    def _block_bytes(self) -> int:
        vectors = 2 * self._spec.num_layers * self._kv_heads * self._block_size
        scale = 4 if self._kv_dtype == torch.int8 else 0
        return vectors * (self._spec.head_dim * self._kv_dtype.itemsize + scale)

    def _size_kv(self, asked: int | None, share: float | None, beside: int, tokens: int) -> int:
        """Blocks of the KV cache; the arithmetic goes to the log."""
        step = self._step_bytes(tokens)
        free = max(self._free() - step, 0)
        own = self.kv_bytes_per_block
        blocks, origin = size_kv(
            free=free,
            own=own,
            beside=beside,
            weights=self.weight_bytes,
            block_size=self._block_size,
            asked=asked,
            share=share,
            default_share=_DEFAULT_MEMORY_SHARE,
            max_model_len=self._max_model_len,
            max_num_seqs=self._max_num_seqs,
        )
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "interpreted"
        logger.info(
            "KV cache: %d blocks x %d tokens x %d bytes/token in %s = %s for %d tokens (%s); weights: %s; a "
            "step: %s; %s",
            blocks,
            self._block_size,
            own // self._block_size,
            self._kv_name,
            format_bytes(blocks * own),
            blocks * self._block_size,
            origin,
            format_bytes(self.weight_bytes),
            format_bytes(step),
            name,
        )
        return blocks

    def _free(self) -> int:
        if self._device.type != "cuda":
            return available_memory()
        return torch.cuda.mem_get_info(self._device)[0]

    def _step_bytes(self, tokens: int) -> int:
        """What a step of so many tokens may have in memory at once beside weights and cache."""
        spec = self._spec
        heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        of_token = 4 * spec.dim + 2 * heads + 3 * spec.ffn_dim
        rows = min(tokens, _LOGIT_ROWS)
        logits = 3 * rows * spec.vocab_size * 4
        # A large product has one matrix dequantized beside it; sums of split products take as much again.
        widest = max(spec.dim, spec.ffn_dim) * max(2 * spec.ffn_dim, heads)
        return (tokens * of_token + 2 * widest) * self._dtype.itemsize + logits

    def allocate_kv(self, blocks: int) -> None:
        """Makes the KV cache, of so many blocks, in place of the one there is."""
        self._drop_graphs()
        self._memory = None
        spec, device = self._spec, self._device
        shape = (spec.num_layers, 2, blocks, self._kv_heads, self._block_size)
        memory = torch.zeros(*shape, spec.head_dim, dtype=self._kv_dtype, device=device)
        scales = torch.zeros(shape, device=device) if self._kv_dtype == torch.int8 else None
        self._memory, self._scales = memory, scales
        self._cache = [
            LayerCache(
                memory[i, 0],
                memory[i, 1],
                None if scales is None else scales[i, 0],
                None if scales is None else scales[i, 1],
            )
            for i in range(spec.num_layers)
        ]
        self._kv_blocks = blocks
        self.kv_cache_bytes = blocks * self.kv_bytes_per_block

    @property
    def block_size(self) -> int:
        """Tokens per block of the KV cache."""
        return self._block_size

    @property
    def threads(self) -> int:
        """Threads that a step uses: the one that launches kernels."""
        return 1

    @property
    def steps_ahead(self) -> int:
        """Steps that may be submitted beyond the one that is waited for."""
        return 1

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights on this GPU."""
        return self._model.weights.nbytes

    def kv_capacity(self) -> int:
        """Blocks in the KV cache."""
        return self._kv_blocks

    # ---- steps --------------------------------------------------------------------------------------------

    def submit(self, batch: StepBatch) -> int:
        """Begins a step; does not wait for it."""
        self._tickets += 1
        while len(self._pending) > self.steps_ahead:  # superseded: those that were submitted were interrupted
            del self._pending[min(self._pending)]
        self._pending[self._tickets] = self._run(batch)
        return self._tickets

    def collect(self, ticket: int) -> StepResult:
        """Waits for the step of `submit`."""
        step = self._pending.pop(ticket)
        if step.event is not None:
            step.event.synchronize()
            if step.begun is not None:
                self._busy += step.begun.elapsed_time(step.event) / 1e3
        r, padded, n = step.rows, step.padded, step.logprobs
        values = step.memory.numpy()
        top = values[3 * padded :].reshape(2, padded, n)
        return StepResult(
            tokens=values[:r],
            logprob=values[padded : padded + r].view(np.float32),
            rank=values[2 * padded : 2 * padded + r],
            top_ids=top[0, :r],
            top_logprobs=top[1, :r].view(np.float32),
            hidden=NO_HIDDEN if step.hidden is None else step.hidden.numpy(),
        )

    def run(
        self, batch: StepBatch, *, logits: bool = False
    ) -> tuple[StepResult, npt.NDArray[np.float32] | None]:
        """One step at once; with `logits`, the raw logits float32 (R, V) of its rows as well."""
        self._tickets += 1
        kept: list[torch.Tensor] | None = [] if logits else None
        self._pending[self._tickets] = self._run(batch, kept)
        result = self.collect(self._tickets)
        return result, torch.cat(kept).cpu().numpy() if kept else None

    def _check(self, batch: StepBatch) -> None:
        """Everything that a kernel would use as an index: outside of its range it would read or write the
        memory of others."""
        slots = self._kv_blocks * self._block_size
        width = batch.block_tables.shape[1] * self._block_size
        for name, least, most in (
            ("slot_mapping", 0, slots),
            ("block_tables", 0, self._kv_blocks),
            ("copy_blocks", 0, self._kv_blocks),
            ("token_ids", -self._sampled.shape[0], self._spec.vocab_size),
            ("positions", 0, self._max_model_len),
            ("seq_lens", 1, width + 1),
        ):
            values = getattr(batch, name)
            if values.size and not least <= int(values.min()) <= int(values.max()) < most:
                found = f"{values.min()} to {values.max()}"
                raise RequestError(f"StepBatch: {name}", found, f"values in [{least}, {most})")

    def _run(self, batch: StepBatch, logits: list[torch.Tensor] | None = None) -> _Pending:
        self._check(batch)
        if len(batch.copy_blocks):
            self._copy_blocks(batch.copy_blocks)
        plans = {window: self._plan(batch, window) for window in self._windows}
        key = None if logits is not None else self._graph_key(batch, plans)
        if key is None:
            return self._run_eagerly(batch, plans, logits)
        buffers = self._graph_buffers
        if buffers is None:
            buffers = self._graph_buffers = self._new_graph_buffers()
        if not buffers.fill(batch, plans, key.size, key.size):
            self._graphs.clear()
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._capture(key, buffers, plans)
        begun = self._now()
        graph.replay()
        return self._fetch(graph.out.memory, len(batch.row_seq), key.size, max(key.logprobs, 0), None, begun)

    def _plan(self, batch: StepBatch, window: int) -> AttentionPlan:
        return plan_attention(
            batch.query_start,
            batch.seq_lens,
            tiles=self._tiles,
            group=self._group,
            kv_heads=self._kv_heads,
            window=window,
            multiprocessors=self._processors,
            deterministic=self._deterministic,
            table_width=batch.block_tables.shape[1],
        )

    def _copy_blocks(self, pairs: npt.NDArray[np.int32]) -> None:
        source, target = torch.from_numpy(pairs.astype(np.int64)).to(self._device).unbind(1)
        for memory in (self._memory, self._scales):
            if memory is not None:
                memory[:, :, target] = memory[:, :, source]

    def _run_eagerly(
        self, batch: StepBatch, plans: dict[int, AttentionPlan], logits: list[torch.Tensor] | None
    ) -> _Pending:
        t, r = len(batch.token_ids), len(batch.row_seq)
        entries = batch.block_tables.size
        room = {window: needs(plan) for window, plan in plans.items()}
        buffers = self._buffers
        if buffers is None or not buffers.holds(t, r, entries, plans):
            # Twice as much as is asked for, so that a growing batch does not ask every time.
            twice = {window: Capacity(*(2 * count for count in one)) for window, one in room.items()}
            buffers = self._buffers = self._new_buffers(2 * t, 2 * r, 2 * entries, twice)
        buffers.fill(batch, plans, t, r)
        adapters = bool((batch.adapter >= 0).any())
        items = {window: buffers.items_of(plan, window, room[window]) for window, plan in plans.items()}
        step = buffers.step(t, r, items, adapters=adapters)
        begun = self._now()
        hidden = self._model.hidden(step, self._sampled, self._cache)
        pooled = batch.row_kind == ROW_POOL
        most = min(int(batch.num_logprobs.max(initial=0)), self._spec.vocab_size)
        out = _Outputs.allocate(r, max(most, 0), self._device)
        needed = _needed(batch)
        if not pooled.all():
            for first in range(0, r, _LOGIT_ROWS):
                last = min(first + _LOGIT_ROWS, r)
                values = self._model.logits(hidden[first:last])
                if logits is not None:
                    logits.append(values)
                self._sample(buffers, values, first, last, out, needed)
        self._remember(out.arrays.tokens)
        states = None
        if pooled.any():
            rows = torch.from_numpy(np.flatnonzero(pooled)).to(self._device)
            states = hidden[rows].float().cpu()
        return self._fetch(out.memory, r, r, max(most, 0), states, begun)

    def _sample(
        self, buffers: StepBuffers, logits: torch.Tensor, first: int, last: int, out: _Outputs,
        needed: dict[str, bool],
    ) -> None:  # fmt: skip
        rows = last - first
        scratch = self._scratch
        if scratch is None or scratch.flags.shape[0] < rows:
            most = max(rows, self._max_num_seqs)  # that graphs have
            scratch = SamplerScratch.allocate(most, self._spec.vocab_size, self._device)
            self._scratch = scratch
            self._graphs.clear()
        arrays = SampleOutputs(
            out.arrays.tokens[first:last],
            out.arrays.logprob[first:last],
            out.arrays.rank[first:last],
            out.arrays.top_ids[first:last],
            out.arrays.top_logprobs[first:last],
        )
        launch(logits, buffers.sample_rows(first, last), arrays, scratch, **needed)

    def _remember(self, tokens: torch.Tensor) -> None:
        """The sampled tokens stay on the GPU for a next step that names them by row."""
        if self._sampled.shape[0] < tokens.shape[0]:
            self._sampled = torch.zeros(tokens.shape[0], dtype=torch.int32, device=self._device)
            self._graphs.clear()
        self._sampled[: tokens.shape[0]].copy_(tokens)

    def _fetch(
        self,
        memory: torch.Tensor,
        rows: int,
        padded: int,
        logprobs: int,
        hidden: torch.Tensor | None,
        begun: Any,
    ) -> _Pending:
        if self._device.type != "cuda":
            if begun is not None:
                self._busy += time.perf_counter() - begun
            return _Pending(None, memory.clone(), rows, padded, logprobs, hidden, None)
        host = torch.empty(memory.shape, dtype=memory.dtype, pin_memory=True)
        host.copy_(memory, non_blocking=True)
        event = torch.cuda.Event(enable_timing=begun is not None)  # type: ignore[no-untyped-call]
        event.record()
        return _Pending(event, host, rows, padded, logprobs, hidden, begun)

    def _now(self) -> Any:
        """Where the GPU is, if the time that it computes is measured."""
        if not self._profiling:
            return None
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def profile(self, on: bool) -> None:
        """Starts, from zero, or ends the measurement of `phase_seconds`."""
        self._profiling = on
        self._busy = 0.0 if on else self._busy

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Of "gpu" alone: from the first kernel of each step to the end of its transfer back."""
        return {"gpu": self._busy}

    def _new_buffers(self, tokens: int, rows: int, entries: int, room: dict[int, Capacity]) -> StepBuffers:
        return StepBuffers(
            self._device,
            tokens=tokens,
            rows=rows,
            entries=entries,
            room=room,
            vocabulary=self._spec.vocab_size,
            kv_heads=self._kv_heads,
            head_dim=self._spec.head_dim,
        )

    def _new_graph_buffers(self) -> StepBuffers:
        """For all graphs."""
        most = self._max_num_seqs
        per_sequence = -(-self._max_model_len // self._block_size)
        room = dict.fromkeys(self._windows, self._room(most, many=True))
        return self._new_buffers(most, most, most * per_sequence, room)

    def _room(self, tokens: int, *, many: bool) -> Capacity:
        """What holds attention's work of a graph for so many tokens."""
        return capacity(
            tokens,
            tiles=self._tiles,
            group=self._group,
            kv_heads=self._kv_heads,
            multiprocessors=self._processors,
            keys_max=self._max_model_len,
            deterministic=self._deterministic,
            many=many,
        )

    # ---- graphs -------------------------------------------------------------------------------------------

    def _graph_key(self, batch: StepBatch, plans: dict[int, AttentionPlan]) -> _GraphKey | None:
        """Which graph a step takes; None: none."""
        if not self._use_graphs or self._rank.size > 1:
            return None
        t, r = len(batch.token_ids), len(batch.row_seq)
        size = _graph_size(max(t, r), self._max_num_seqs)
        if size is None or r == 0 or (batch.row_kind == ROW_POOL).any():
            return None
        logprobs = int(batch.num_logprobs.max(initial=-1))
        if logprobs > min(_GRAPH_LOGPROBS, self._spec.vocab_size):
            return None
        needed = _needed(batch)
        return _GraphKey(
            size,
            next((plan.many_tile for plan in plans.values() if len(plan.many)), None),
            needed["edits"],
            needed["filters"],
            -1 if logprobs < 0 else min(_GRAPH_LOGPROBS, self._spec.vocab_size),
            bool((batch.adapter >= 0).any()),
        )

    def _capture(self, key: _GraphKey, buffers: StepBuffers, plans: dict[int, AttentionPlan]) -> _Graph:
        """A graph of the step that the buffers hold; `replay` runs it."""
        out = _Outputs.allocate(key.size, max(key.logprobs, 0), self._device)
        room = self._room(key.size, many=key.many is not None)
        items = {window: buffers.items_of(plan, window, room) for window, plan in plans.items()}
        step = buffers.step(key.size, key.size, items, adapters=key.adapters)
        needed = {"edits": key.edits, "filters": key.filters, "logprobs": key.logprobs >= 0}

        def compute() -> None:
            hidden = self._model.hidden(step, self._sampled, self._cache)
            self._sample(buffers, self._model.logits(hidden), 0, key.size, out, needed)
            self._sampled[: key.size].copy_(out.arrays.tokens)

        if self._device.type != "cuda":
            return _Graph(compute, out)
        # Once outside, so that kernels are compiled and the library has its workspace: the step is the same
        # however often it is computed, but what it sampled before must be there for the second time.
        before = self._sampled.clone()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self._sampled.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            compute()
        if self._pool is None:
            self._pool = graph.pool()
        return _Graph(graph.replay, out)

    def _drop_graphs(self) -> None:
        self._graphs.clear()
        self._pool = None

    # ---- adapters -----------------------------------------------------------------------------------------

    def read_adapter(self, path: Path) -> GpuAdapter:
        """Reads a LoRA adapter; from any thread, also while a step runs.

        Raises:
            RequestError, ModelFileError, UnsupportedModelError: as `fastllm.models.adapters.read_adapter`.
        """
        read = read_adapter(path, self._spec, hf_names(self._checkpoint_kind, self._spec), self._keys)
        return GpuAdapter(read.path, read.digest, read.rank, read.parts)

    def load_adapter(self, index: int, adapter: GpuAdapter) -> None:
        """Between two steps: sequences of this index use the adapter."""
        self.unload_adapter(index)
        for part in adapter.parts:
            a, b = torch.from_numpy(part.a), torch.from_numpy(part.b)
            if self._rank.size > 1:
                share = b.shape[0] // self._rank.size
                b = b[self._rank.index * share : (self._rank.index + 1) * share]
            stack = self._stack_with(part.slot, part.layer, index, a, b)
            rank = a.shape[0]
            stack.a[index, :rank] = a.to(self._dtype)
            stack.b[index, :, :rank] = b.to(self._dtype)
            stack.scales[index] = part.scale

    def _stack_with(
        self, slot: str, layer: int, index: int, a: torch.Tensor, b: torch.Tensor
    ) -> AdapterStack:
        """The projection's stack, with room for an adapter of that rank at that index."""
        known = self._adapters.get((slot, layer))
        count, rank = index + 1, max(16, 1 << (a.shape[0] - 1).bit_length())
        if known is not None:
            if known.a.shape[0] >= count and known.a.shape[1] >= rank:
                return known
            count, rank = max(count, known.a.shape[0]), max(rank, known.a.shape[1])

        def zeros(*shape: int, dtype: torch.dtype = self._dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        stack = AdapterStack(
            zeros(count, rank, a.shape[1]),
            zeros(count, b.shape[0], rank),
            zeros(count, dtype=torch.float32),
        )
        if known is not None:
            had, less = known.a.shape[:2]
            stack.a[:had, :less] = known.a
            stack.b[:had, :, :less] = known.b
            stack.scales[:had] = known.scales
        self._adapters[slot, layer] = stack
        self._graphs.clear()
        return stack

    def unload_adapter(self, index: int) -> None:
        """Between two steps: forgets the adapter of an index, if it has one."""
        for stack in self._adapters.values():
            if index < stack.a.shape[0]:
                stack.a[index] = 0
                stack.b[index] = 0
                stack.scales[index] = 0

    # ---- blocks, sleep ------------------------------------------------------------------------------------

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of the KV cache over all layers, K and V and their scales."""
        return self.kv_bytes_per_block

    def read_blocks(self, blocks: npt.NDArray[np.int32], out: npt.NDArray[np.uint8]) -> None:
        """Between two steps: copies blocks (B,) to out (B, block_bytes)."""
        place = self._block_places("read_blocks", blocks, out, "out")
        done = 0
        for memory in (self._memory, self._scales):
            if memory is not None:
                rows = memory[:, :, place].transpose(0, 2).contiguous().view(torch.uint8)
                rows = rows.reshape(len(blocks), -1).cpu()
                out[:, done : done + rows.shape[1]] = rows.numpy()
                done += rows.shape[1]

    def write_blocks(self, blocks: npt.NDArray[np.int32], data: npt.NDArray[np.uint8]) -> None:
        """Between two steps: copies data (B, block_bytes), from `read_blocks`, to blocks (B,)."""
        place = self._block_places("write_blocks", blocks, data, "data")
        done = 0
        for memory in (self._memory, self._scales):
            if memory is not None:
                layers, _, _, *rest = memory.shape
                size = (
                    self.kv_bytes_per_block - done
                    if memory is self._scales
                    else (2 * layers * math.prod(rest) * memory.element_size())
                )
                part = torch.from_numpy(np.ascontiguousarray(data[:, done : done + size]))
                values = part.view(memory.dtype).view(len(blocks), 2, layers, *rest)
                memory[:, :, place] = values.transpose(0, 2).to(self._device)
                done += size

    def _block_places(
        self, call: str, blocks: npt.NDArray[np.int32], data: npt.NDArray[np.uint8], name: str
    ) -> torch.Tensor:
        if self._memory is None:
            raise RequestError(f"GpuExecutor.{call}", "no KV cache", "allocate_kv before")
        if data.shape != (len(blocks), self.block_bytes) or data.dtype != np.uint8:
            limit = f"uint8 {(len(blocks), self.block_bytes)}"
            raise RequestError(f"GpuExecutor.{call}: {name}", f"{data.dtype} {data.shape}", limit)
        if len(blocks) and not 0 <= int(blocks.min()) <= int(blocks.max()) < self._kv_blocks:
            limit = f"values in [0, {self._kv_blocks})"
            raise RequestError(f"GpuExecutor.{call}: blocks", blocks.tolist()[:8], limit)
        return torch.from_numpy(blocks.astype(np.int64)).to(self._device)

    def sleep(self, level: int) -> None:
        """Gives the memory of the KV cache (level 1) and of the weights (level 2) back.

        Raises:
            RequestError: level 2, and there is no way to open the checkpoint again.
        """
        if level > 1 and self._reopen is None:
            raise RequestError("level", level, "1, where the weights cannot be read again")
        self._level = max(self._level, level)
        self._release(weights=self._level > 1)

    def _release(self, *, weights: bool) -> None:
        self._pending.clear()
        self._drop_graphs()
        self._cache, self._memory, self._scales = [], None, None
        self._scratch = self._buffers = self._graph_buffers = None
        if weights:
            self._decoder = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Reads the weights again if they were given back; makes the KV cache anew, as large as before."""
        if self._level > 1 and self._reopen is not None:
            try:
                with self._reopen() as checkpoint:
                    self._load(checkpoint)
            except BaseException:
                self._release(weights=True)
                raise
            self._level = 1
        self.allocate_kv(self._kv_blocks)
        self._level = 0

    def close(self) -> None:
        """Gives all memory back."""
        if hasattr(self, "_pending"):
            self._release(weights=True)


def usable_device(name: str) -> torch.device:
    """The device of a name, if steps can run there.

    Raises:
        UnsupportedModelError: they cannot.
    """
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UnsupportedModelError("device: 'cuda' needs an NVIDIA GPU and a torch that can use it")
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if not products.INTERPRETED:
        raise UnsupportedModelError(f"device: {name!r} has no GPU (TRITON_INTERPRET=1 interprets kernels)")
    return device


def _needed(batch: StepBatch) -> dict[str, bool]:
    """What the sampler has to look at."""
    return {
        "edits": bool(
            len(batch.bias_ids) or len(batch.banned_ids) or len(batch.history) or len(batch.mask_words)
        ),
        "filters": bool(batch.top_k.any() or (batch.top_p < 1.0).any() or batch.min_p.any()),
        "logprobs": bool((batch.num_logprobs >= 0).any()),
    }


def _graph_size(count: int, most: int) -> int | None:
    """The size of the graph for so many tokens and rows: powers of two up to 8, multiples of 8 up to 64, of
    32 up to 256, then powers of two; at most `most`."""
    if count > most:
        return None
    if count <= 8:
        size = 1 << (count - 1).bit_length()
    elif count <= 256:
        step = 8 if count <= 64 else 32
        size = -(-count // step) * step
    else:
        size = 1 << (count - 1).bit_length()
    return min(size, most)


def _choice(field: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise RequestError(field, value, "one of " + ", ".join(repr(choice) for choice in allowed))
