"""A StepBatch on its way to the GPU: one block of pinned memory, one transfer.

There are two such blocks, which take turns: while a step waits for its transfer, the next is filled.

    rows      R    parameters of sampling, CSR starts, the token of each row
    tokens    T    ids, positions, slots, adapters
    items          attention's work, for every sliding window
    tables         block tables, S x width, as wide as the batch has them

The sections stand at fixed places of one buffer, whose device side keeps its address: a CUDA graph that was
captured on it reads what the next transfer brings. Lists that are rarely there (biases, bans, masks,
histories) have buffers of their own, transferred where a batch has them; whoever outgrows a buffer gets a
larger one, and the graphs on it are gone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fastllm.executor.base import StepBatch
from fastllm.executor.gpu_decoder import DeviceStep
from fastllm.kernels.attention import DeviceItems, Scratch
from fastllm.kernels.attention_plan import FIELDS, AttentionPlan, Capacity
from fastllm.kernels.sampler import SampleRows

_ROWS = (
    "row_kind", "row_target", "num_logprobs", "temperature", "top_k", "top_p", "min_p", "presence",
    "frequency", "repetition", "sample_index", "mask_row", "history_prompt_len",
)  # fmt: skip
_FLOATS = frozenset(("temperature", "top_p", "min_p", "presence", "frequency", "repetition"))
_STARTS = ("bias_start", "banned_start", "history_start")
_TOKENS = ("token_ids", "positions", "slots", "adapter")
_LISTS = ("bias_ids", "bias_values", "banned_ids", "history", "mask_words")
_ALIGNED = 4  # sections begin at multiples of 16 bytes

Int32 = npt.NDArray[np.int32]


class StepBuffers:
    """Room for batches of up to so many tokens, rows, table entries and items.

    Args:
        tokens, rows: T and R.
        entries: of the block tables, S x width.
        room: sliding window -> what its plans may need.
        vocabulary: of the masks.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        tokens: int,
        rows: int,
        entries: int,
        room: dict[int, Capacity],
        vocabulary: int,
        kv_heads: int,
        head_dim: int,
    ) -> None:
        self.tokens, self.rows, self.entries, self.room = tokens, rows, entries, room
        self._device = device
        self._words = -(-vocabulary // 32)
        self._places: dict[str, int] = {}
        self._end = 0
        for name in _ROWS:
            self._place(name, rows)
        for name in _STARTS:
            self._place(name, rows + 1)
        for name in ("row_token", "position"):
            self._place(name, rows)
        self._place("seed", 2 * rows)
        for name in _TOKENS:
            self._place(name, tokens)
        for window, own in room.items():
            self._place(f"few{window}", FIELDS * own.few)
            self._place(f"many{window}", FIELDS * own.many)
            self._place(f"counts{window}", 2)
        self._place("tables", entries)
        self._hosts = [_pinned(self._end, device) for _ in range(2)]
        self._sent: list[torch.cuda.Event | None] = [None, None]  # when a block has been read
        self._turn = 0
        self._array: Int32 = self._hosts[0].numpy()
        self._here = torch.zeros(self._end, dtype=torch.int32, device=device)
        self._lists = {name: _empty_list(name, 0, device) for name in _LISTS}
        largest = Capacity(*(max(counts) for counts in zip(*room.values(), strict=True)))
        self._scratch = Scratch.allocate(largest, kv_heads, head_dim, device)

    def _place(self, name: str, count: int) -> None:
        self._places[name] = self._end
        self._end += -(-max(count, 1) // _ALIGNED) * _ALIGNED

    def _view(self, name: str, count: int) -> Int32:
        start = self._places[name]
        return self._array[start : start + count]

    def device(self, name: str, count: int) -> torch.Tensor:
        start = self._places[name]
        return self._here[start : start + count]

    def holds(self, tokens: int, rows: int, entries: int, plans: dict[int, AttentionPlan]) -> bool:
        plain = tokens <= self.tokens and rows <= self.rows and entries <= self.entries
        return plain and all(self.room[window].holds(plan) for window, plan in plans.items())

    def items_of(self, plan: AttentionPlan, window: int, room: Capacity) -> DeviceItems:
        """Attention's work as `fill` brings it, for plans like this one that `room` holds."""
        few = self.device(f"few{window}", FIELDS * room.few).view(-1, FIELDS)
        many = self.device(f"many{window}", FIELDS * room.many).view(-1, FIELDS)
        return DeviceItems.over(plan, few, many, self.device(f"counts{window}", 2), self._scratch)

    def fill(self, batch: StepBatch, plans: dict[int, AttentionPlan], tokens: int, rows: int) -> bool:
        """Brings a batch to the GPU, with padding up to so many tokens and rows.

        Returns:
            Whether all buffers are where they were.
        """
        t, r = len(batch.token_ids), len(batch.row_seq)
        self._turn = 1 - self._turn
        host, sent = self._hosts[self._turn], self._sent[self._turn]
        if sent is not None:
            sent.synchronize()
        self._array = host.numpy()
        for name in _ROWS:
            values = getattr(batch, name)
            self._view(name, r)[:] = values.view(np.int32) if name in _FLOATS else values
        self._view("row_kind", rows)[r:] = -1
        for name in _STARTS:
            view = self._view(name, rows + 1)
            view[: r + 1] = getattr(batch, name)
            view[r + 1 :] = view[r]
        row_token = self._view("row_token", rows)
        row_token[:r] = batch.row_token
        row_token[r:] = 0
        self._view("position", r)[:] = batch.positions[batch.row_token]
        self._view("seed", 2 * r)[:] = batch.seed.view(np.int32)
        for name, values, padding in (
            ("token_ids", batch.token_ids, 0),
            ("positions", batch.positions, 0),
            ("slots", batch.slot_mapping, -1),
        ):
            view = self._view(name, tokens)
            view[:t] = values
            view[t:] = padding
        lengths = batch.query_start[1:] - batch.query_start[:-1]
        adapter = self._view("adapter", tokens)
        adapter[:t] = np.repeat(batch.adapter, lengths)
        adapter[t:] = -1
        for window, plan in plans.items():
            for name, items in ((f"few{window}", plan.few), (f"many{window}", plan.many)):
                self._view(name, items.size)[:] = items.reshape(-1)
            self._view(f"counts{window}", 2)[:] = (len(plan.few), len(plan.many))
        tables = batch.block_tables
        self._view("tables", tables.size)[:] = tables.reshape(-1)
        used = self._places["tables"] + tables.size
        self._here[:used].copy_(host[:used], non_blocking=True)
        if self._device.type == "cuda":
            self._sent[self._turn] = event = sent or torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        kept = [self._fill_list(name, getattr(batch, name)) for name in _LISTS]
        return all(kept)

    def _fill_list(self, name: str, values: npt.NDArray[np.generic]) -> bool:
        count = values.size
        if count == 0:
            return True
        kept = count <= self._lists[name].numel()
        if not kept:
            self._lists[name] = _empty_list(name, 2 * count, self._device)
        plain = np.ascontiguousarray(values).reshape(-1)
        source = torch.from_numpy(plain.view(np.float32 if name == "bias_values" else np.int32))
        self._lists[name][:count].copy_(source)
        return kept

    def step(self, tokens: int, rows: int, items: dict[int, DeviceItems], *, adapters: bool) -> DeviceStep:
        """The device's side of what `fill` brings."""
        return DeviceStep(
            token_ids=self.device("token_ids", tokens),
            positions=self.device("positions", tokens),
            slots=self.device("slots", tokens),
            tables=self.device("tables", self.entries),
            items=items,
            row_token=self.device("row_token", rows),
            adapter=self.device("adapter", tokens) if adapters else None,
        )

    def sample_rows(self, start: int, stop: int) -> SampleRows:
        """Rows [start, stop) for the sampler."""

        def own(name: str, more: int = 0) -> torch.Tensor:
            view = self.device(name, stop + more)[start:]
            return view.view(torch.float32) if name in _FLOATS else view

        seed = self.device("seed", 2 * stop).view(torch.int64)[start:]
        lists = self._lists
        return SampleRows(
            **{name: own(name) for name in _ROWS},
            **{name: own(name, 1) for name in _STARTS},
            seed=seed,
            position=own("position"),
            bias_ids=lists["bias_ids"],
            bias_values=lists["bias_values"],
            banned_ids=lists["banned_ids"],
            mask_words=lists["mask_words"].view(-1, self._words),
            history=lists["history"],
        )


def _pinned(count: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, pin_memory=device.type == "cuda")


def _empty_list(name: str, count: int, device: torch.device) -> torch.Tensor:
    kind = torch.float32 if name == "bias_values" else torch.int32
    return torch.zeros(count, dtype=kind, device=device)
