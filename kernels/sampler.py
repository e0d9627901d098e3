"""From logits to tokens on a GPU: what csrc/model/sampler.h says, for the rows of a StepBatch.

    out = sample(logits, rows, max_logprobs)     # logits float32 (R, V), rows: the arrays, on the device

Kernels in order, on the right what the rows must have for them to matter; C chunks of 4096 logits, P parts
of a row, the fewer the more rows there are:

    stats    (R, C)     what a row is; the highest logit of each chunk, its id, its mass    anything
    count    (R, 8)     how often a row's history has each token                            edits
    edit     (R, P)     bias, bans, mask and penalties on a copy; its chunks as by stats    edits
    bound    (R, 2)     a logit that just enough tokens reach                               filters, logprobs
    gather   (R, P, 2)  the tokens that reach it: candidates                                filters, logprobs
    choose   (R,)       the token                                                           anything
    sift     (R, 2)     the token from the whole row, where candidates do not suffice       filters, logprobs
    rank     (R, C + 1) the token's rank and log-probability, the n likeliest               logprobs

Nothing depends on the host: grids and memory follow from R and V, and a program ends at once where its row
has nothing for it. So a step can be captured in a CUDA graph, and one for steps without edits, filters or
logprobs leaves their kernels out. A row costs one read of its logits; edits another, and a copy that is
written once and read where a filter needs it; filters and logprobs the chunks that candidates are in; a wide
nucleus about 15 reads, by one program.

A row's result is a pure function of the row, to the last bit: sums are of integers (selection.py), and
neither other rows nor the order of programs matter. The CPU sampler's probabilities differ by the roundings
of float32 exponentials: tokens are the same unless a random number or the end of a nucleus falls within some
1e-7 of a boundary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl

from fastllm.errors import RequestError
from fastllm.kernels.products import INTERPRETED
from fastllm.kernels.selection import (
    ACTIVE,
    EDITED,
    FILTERED,
    INFINITY,
    LAST_ID,
    LAST_KEY,
    PENALTY,
    RANDOM,
    RAW,
    ROW_ARRAYS,
    SAMPLED,
    bound_kernel,
    choose_kernel,
    gather_kernel,
    id_of,
    is_finite,
    key_of,
    load_candidates,
    load_logits,
    log_sum,
    mass_of,
    row_highest,
    sift_kernel,
    value_of,
)

CHUNK = 4096  # logits that a program takes
BLOCK = 64  # logits that one maximum stands for
CANDIDATES = 2048  # tokens that a program selects from in registers
NUCLEUS = 256  # the m-th highest maximum bounds the candidates for top_p
PARTS = 8  # programs that count one row's history
HISTORY = 1024  # tokens of it at a time
LIST = 64  # entries of a bias or of banned ids at a time
PROGRAMS = 1024  # that share the rows where most have nothing to do
GATHER = 2048  # logits at a time where candidates are gathered
SIFT = 2048  # logits at a time where one program reads a row
VOCABULARY_MAX = 1 << 20  # the masses of a row have to fit 63 bits
LOGPROBS_MAX = 1024

# Of SampleRows: arrays of any length, and what is not int32.
_LISTS = ("bias_ids", "bias_values", "banned_ids", "history")
_FLOATS = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition", "bias_values")
_DTYPES = {"seed": torch.int64} | dict.fromkeys(_FLOATS, torch.float32)

SEEN = tl.constexpr(1 << 30)  # in a token's count: the history has it


@dataclass(frozen=True)
class SampleRows:
    """The row arrays of a StepBatch, on the device; int32 unless said otherwise.

    A row_kind of -1 is padding: nothing is read or written for it.
    """

    row_kind: torch.Tensor  # (R,)
    row_target: torch.Tensor  # (R,)
    num_logprobs: torch.Tensor  # (R,)
    temperature: torch.Tensor  # float32 (R,)
    top_k: torch.Tensor  # (R,)
    top_p: torch.Tensor  # float32 (R,)
    min_p: torch.Tensor  # float32 (R,)
    presence: torch.Tensor  # float32 (R,)
    frequency: torch.Tensor  # float32 (R,)
    repetition: torch.Tensor  # float32 (R,)
    seed: torch.Tensor  # int64 (R,) the bits of the uint64
    sample_index: torch.Tensor  # (R,)
    position: torch.Tensor  # (R,) positions[row_token[r]]
    bias_start: torch.Tensor  # (R+1,)
    bias_ids: torch.Tensor
    bias_values: torch.Tensor  # float32
    banned_start: torch.Tensor  # (R+1,)
    banned_ids: torch.Tensor
    mask_row: torch.Tensor  # (R,)
    mask_words: torch.Tensor  # (M, ceil(V/32)) the bits of the uint32
    history_start: torch.Tensor  # (R+1,)
    history: torch.Tensor
    history_prompt_len: torch.Tensor  # (R,)


@dataclass(frozen=True)
class SampleOutputs:
    """As in StepResult. Without logprobs asked for, logprob is NaN and rank 0."""

    tokens: torch.Tensor  # int32 (R,)
    logprob: torch.Tensor  # float32 (R,)
    rank: torch.Tensor  # int32 (R,)
    top_ids: torch.Tensor  # int32 (R, L)
    top_logprobs: torch.Tensor  # float32 (R, L)

    @classmethod
    def allocate(cls, rows: int, max_logprobs: int, device: torch.device | str) -> SampleOutputs:
        def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            empty(torch.int32, rows),
            empty(torch.float32, rows),
            empty(torch.int32, rows),
            empty(torch.int32, rows, max_logprobs),
            empty(torch.float32, rows, max_logprobs),
        )


@dataclass(frozen=True)
class SamplerScratch:
    """Memory of one call; nothing in it outlives the call. [r, 0] is of raw logits, [r, 1] of edited ones."""

    flags: torch.Tensor  # int32 (R,) what a row is
    edited: torch.Tensor  # float32 (R, V) logits after bias, bans, mask and penalties; before, counts (int32)
    highest: torch.Tensor  # float32 (R, 2, C)
    first: torch.Tensor  # int32 (R, 2, C) the lowest id with the highest logit
    mass: torch.Tensor  # int64 (R, 2, C) sum of exp((x - highest) / temperature), in units of 2^-43
    block_highest: torch.Tensor  # float32 (R, 2, B)
    limits: torch.Tensor  # float32 (R, 2, 3)
    found: torch.Tensor  # int32 (R, 2) number of candidates
    values: torch.Tensor  # float32 (R, 2, CANDIDATES)
    places: torch.Tensor  # int32 (R, 2, CANDIDATES)

    @classmethod
    def allocate(
        cls, rows: int, vocabulary: int, device: torch.device | str, *, edits: bool = True
    ) -> SamplerScratch:
        """For up to that many rows; without edits, for calls without edits."""

        def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        chunks = triton.cdiv(vocabulary, CHUNK)
        return cls(
            flags=empty(torch.int32, rows),
            edited=empty(torch.float32, rows if edits else 0, vocabulary),
            highest=empty(torch.float32, rows, 2, chunks),
            first=empty(torch.int32, rows, 2, chunks),
            mass=empty(torch.int64, rows, 2, chunks),
            block_highest=empty(torch.float32, rows, 2, triton.cdiv(vocabulary, BLOCK)),
            limits=empty(torch.float32, rows, 2, 3),
            found=empty(torch.int32, rows, 2),
            values=empty(torch.float32, rows, 2, CANDIDATES),
            places=empty(torch.int32, rows, 2, CANDIDATES),
        )

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))


def sample(
    logits: torch.Tensor,
    rows: SampleRows,
    max_logprobs: int,
    out: SampleOutputs | None = None,
    *,
    scratch: SamplerScratch | None = None,
    edits: bool = True,
    filters: bool = True,
    logprobs: bool = True,
) -> SampleOutputs:
    """A token for each row, and what the raw logits say of it.

    Args:
        logits: float32 (R, V), rows contiguous; not changed.
        rows: of R rows. Ids, ranges and offsets are not checked: StepBatches hold valid ones.
        max_logprobs: at least every num_logprobs of the rows.
        out: where to; top arrays with at least max_logprobs columns.
        scratch: for at least R rows of V.
        edits, filters, logprobs: False is a promise that no row has a bias, banned ids, a mask or a penalty;
            min_p, top_k or top_p; num_logprobs >= 0. Fewer kernels are launched, the results are the same.

    Raises:
        RequestError: a wrong dtype, shape or device.
    """
    _check(logits, rows, max_logprobs, out, scratch, edits)
    r, v = logits.shape
    if out is None:
        out = SampleOutputs.allocate(r, max_logprobs, logits.device)
    if r == 0:
        return out
    if scratch is None:
        scratch = SamplerScratch.allocate(r, v, logits.device, edits=edits)
    launch(logits, rows, out, scratch, edits=edits, filters=filters, logprobs=logprobs)
    return out


def launch(
    logits: torch.Tensor,
    rows: SampleRows,
    out: SampleOutputs,
    s: SamplerScratch,
    *,
    edits: bool = True,
    filters: bool = True,
    logprobs: bool = True,
) -> None:
    """The kernels of `sample`, whose arguments are checked."""
    r, v = logits.shape
    chunks, blocks = triton.cdiv(v, CHUNK), triton.cdiv(v, BLOCK)
    chunks_up = max(2, triton.next_power_of_2(chunks))
    stride = logits.stride(0)
    wanted = triton.cdiv(PROGRAMS, r)
    stats_kernel[(r, chunks)](
        logits, stride, v, chunks, blocks, rows.row_kind, rows.num_logprobs, rows.temperature, rows.top_k,
        rows.top_p, rows.min_p, rows.presence, rows.frequency, rows.repetition, rows.bias_start,
        rows.banned_start, rows.mask_row, rows.history_start, s.flags, s.edited, s.highest, s.first,
        s.mass, s.block_highest, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    if edits:
        count_kernel[(r, PARTS)](
            v, s.flags, rows.history_start, rows.history, rows.history_prompt_len,
            s.edited.view(torch.int32), LIST=HISTORY, num_warps=4,
        )  # fmt: skip
        edit_kernel[(r, min(chunks, wanted))](
            logits, stride, v, chunks, blocks, s.flags, rows.temperature, rows.presence, rows.frequency,
            rows.repetition, rows.bias_start, rows.bias_ids, rows.bias_values, rows.banned_start,
            rows.banned_ids, rows.mask_row, rows.mask_words, s.edited, s.highest, s.first, s.mass,
            s.block_highest, CHUNK=CHUNK, BLOCK=BLOCK, LIST=LIST, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    if filters or logprobs:
        bound_kernel[(r, 2)](
            v, chunks, blocks, rows.num_logprobs, rows.top_k, rows.min_p, s.flags, s.highest,
            s.block_highest, s.limits, s.found, CHUNKS=chunks_up, BLOCKS=triton.next_power_of_2(blocks),
            CANDIDATES=CANDIDATES, NUCLEUS=NUCLEUS, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
        gather_kernel[(r, min(triton.cdiv(v, GATHER), wanted), 2)](
            logits, stride, v, chunks, s.flags, rows.temperature, s.edited, s.highest, s.limits, s.found,
            s.values, s.places, CHUNK=CHUNK, BLOCK=GATHER, CANDIDATES=CANDIDATES,
            num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    choose_kernel[(r,)](
        logits, stride, v, chunks, rows.row_kind, rows.row_target, rows.num_logprobs, rows.temperature,
        rows.top_k, rows.top_p, rows.min_p, rows.seed, rows.sample_index, rows.position, s.flags, s.edited,
        s.highest, s.first, s.mass, s.found, s.values, s.places, out.tokens, out.logprob, out.rank,
        CHUNK=CHUNK, CHUNKS=chunks_up, CANDIDATES=CANDIDATES, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    if filters or logprobs:
        sift_kernel[(r, 2)](
            logits, stride, v, rows.num_logprobs, rows.temperature, rows.top_k, rows.top_p, rows.seed,
            rows.sample_index, rows.position, s.flags, s.edited, s.limits, s.found, s.values, s.places,
            out.tokens, CANDIDATES=CANDIDATES, BLOCK=SIFT, num_warps=16, enable_fp_fusion=False,
        )  # fmt: skip
    if logprobs:
        rank_kernel[(r, chunks + 1)](
            logits, stride, v, chunks, rows.num_logprobs, s.flags, s.highest, s.mass, s.found, s.values,
            s.places, out.tokens, out.logprob, out.rank, out.top_ids, out.top_logprobs,
            out.top_ids.stride(0), CHUNK=CHUNK, CHUNKS=chunks_up, CANDIDATES=CANDIDATES,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def _check(
    logits: torch.Tensor,
    rows: SampleRows,
    max_logprobs: int,
    out: SampleOutputs | None,
    scratch: SamplerScratch | None,
    edits: bool,
) -> None:
    if not isinstance(logits, torch.Tensor):
        raise RequestError("sample: logits", type(logits).__name__, "a torch tensor")
    device = logits.device
    if device.type != "cuda" and not INTERPRETED:
        raise RequestError(
            "sample: logits", f"on {device}", "on a CUDA device (or TRITON_INTERPRET=1, set before)"
        )
    fits = logits.dtype == torch.float32 and logits.ndim == 2 and 0 < logits.shape[1] < VOCABULARY_MAX
    if not fits or logits.stride(1) != 1:
        wanted = f"float32 (R, V), rows contiguous, V below {VOCABULARY_MAX}"
        raise RequestError("sample: logits", _describe(logits), wanted)
    r, v = logits.shape
    if not 0 <= max_logprobs <= min(LOGPROBS_MAX, CANDIDATES):
        raise RequestError("sample: max_logprobs", max_logprobs, f"0..{LOGPROBS_MAX}")
    for field in fields(rows):
        name, tensor = field.name, getattr(rows, field.name)
        dtype = _DTYPES.get(name, torch.int32)
        shape: tuple[int, ...] = (r + 1,) if name.endswith("_start") else (r,)
        if name in _LISTS:
            shape = (tensor.numel(),)
        elif name == "mask_words":
            shape = (tensor.shape[0], triton.cdiv(v, 32) if tensor.shape[0] else tensor.shape[-1])
        _check_tensor(f"rows.{name}", tensor, dtype, shape, device)
    if out is not None:
        for name in ("tokens", "logprob", "rank"):
            dtype = torch.float32 if name == "logprob" else torch.int32
            _check_tensor(f"out.{name}", getattr(out, name), dtype, (r,), device)
        columns = max(max_logprobs, out.top_ids.shape[-1])
        _check_tensor("out.top_ids", out.top_ids, torch.int32, (r, columns), device)
        _check_tensor("out.top_logprobs", out.top_logprobs, torch.float32, (r, columns), device)
    if scratch is not None:
        most = scratch.flags.shape[0]
        wanted_rows = (r if edits else 0, r)
        if most < r or scratch.edited.shape[0] < wanted_rows[0] or scratch.edited.shape[1] != v:
            given = f"for {scratch.edited.shape[0]} edited of {most} rows of {scratch.edited.shape[1]}"
            raise RequestError("sample: scratch", given, f"at least {wanted_rows[0]} of {r} rows of {v}")
        if scratch.flags.device != device:
            raise RequestError("sample: scratch", f"on {scratch.flags.device}", f"on {device}")


def _check_tensor(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    fits = tensor.dtype == dtype and tensor.shape == shape and tensor.device == device
    if not fits or not tensor.is_contiguous():
        raise RequestError(f"sample: {name}", _describe(tensor), f"{dtype} {shape} on {device}, contiguous")


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


# ---- passes over rows --------------------------------------------------------------------------------------


@triton.jit
def summarize(x, ids, inverse, wanted, at, highest, first, mass):
    """A chunk's highest logit, the lowest id that has it and, if wanted, its mass relative to that."""
    top = tl.max(x, 0)
    tl.store(highest + at, top)
    tl.store(first + at, tl.min(tl.where(x == top, ids, LAST_ID), 0))
    if wanted:
        tl.store(mass + at, tl.sum(mass_of(x, top, inverse), 0))


@triton.jit
def store_block_highest(x, at, c, B, block_highest, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    b = c * (CHUNK // BLOCK) + tl.arange(0, CHUNK // BLOCK)
    tl.store(block_highest + at * B + b, tl.max(tl.reshape(x, (CHUNK // BLOCK, BLOCK)), 1), mask=b < B)


@triton.jit(do_not_specialize_on_alignment=ROW_ARRAYS)
def stats_kernel(
    logits, row_stride, V, C, B, row_kind, num_logprobs, temperature, top_k, top_p, min_p, presence,
    frequency, repetition, bias_start, banned_start, mask_row, history_start,
    flags, edited, highest, first, mass, block_highest,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a row is, and its chunks in short; sets the counts of rows with penalties to 0. Grid: (R, C)

    About 22 instructions for the mass of a logit, 8 for the rest.
    """
    r = tl.program_id(0)
    c = tl.program_id(1)
    kind = tl.load(row_kind + r)
    asked = tl.load(num_logprobs + r)
    t = tl.load(temperature + r)
    k = tl.load(top_k + r)
    sampled = kind == 0
    active = sampled | (kind == 1)
    random = sampled & (t >= 1e-5)
    filtered = ((k > 0) & (k < V)) | (tl.load(top_p + r) < 1.0) | (tl.load(min_p + r) > 0.0)
    filtered = random & filtered
    penalty = (tl.load(presence + r) != 0.0) | (tl.load(frequency + r) != 0.0)
    penalty = penalty | (tl.load(repetition + r) != 1.0)
    penalty = sampled & penalty & (tl.load(history_start + r + 1) > tl.load(history_start + r))
    edited_row = tl.load(bias_start + r + 1) > tl.load(bias_start + r)
    edited_row = edited_row | (tl.load(banned_start + r + 1) > tl.load(banned_start + r))
    edited_row = sampled & (edited_row | penalty | (tl.load(mask_row + r) >= 0))
    if c == 0:
        what = tl.where(active, ACTIVE, 0) + tl.where(edited_row, EDITED, 0) + tl.where(penalty, PENALTY, 0)
        tl.store(flags + r, what + tl.where(random, RANDOM, 0) + tl.where(filtered, FILTERED, 0))
    if active:
        ids = c * CHUNK + tl.arange(0, CHUNK)
        x = load_logits(logits + r.to(tl.int64) * row_stride, ids, V)
        summarize(x, ids, 1.0, asked >= 0, (r * 2 + RAW) * C + c, highest, first, mass)
        if asked > 0:
            store_block_highest(x, r * 2 + RAW, c, B, block_highest, CHUNK, BLOCK)
        if penalty:
            zeros = tl.zeros((CHUNK,), tl.float32)  # of integers as well
            tl.store(edited + r.to(tl.int64) * V + ids, zeros, mask=ids < V)
        if not edited_row:
            inverse = tl.div_rn(1.0, tl.where(random, t, 1.0))
            summarize(x, ids, inverse, random, (r * 2 + SAMPLED) * C + c, highest, first, mass)
            if filtered:
                store_block_highest(x, r * 2 + SAMPLED, c, B, block_highest, CHUNK, BLOCK)


@triton.jit(do_not_specialize_on_alignment=ROW_ARRAYS)
def count_kernel(V, flags, history_start, history, history_prompt_len, counts, LIST: tl.constexpr):
    """For rows with penalties, whether the history has a token and how often its output does.

    Grid: (R, parts of a history). An integer atomic for each token of it.
    """
    r = tl.program_id(0)
    if (tl.load(flags + r) & PENALTY) != 0:
        begin = tl.load(history_start + r)
        end = tl.load(history_start + r + 1)
        output = begin + tl.load(history_prompt_len + r)
        row = counts + r.to(tl.int64) * V
        for start in range(begin + tl.program_id(1) * LIST, end, tl.num_programs(1) * LIST):
            i = start + tl.arange(0, LIST)
            token = tl.load(history + i, mask=i < end, other=0)
            tl.atomic_or(row + token, SEEN, mask=(i < end) & (i < output), sem="relaxed")
            tl.atomic_add(row + token, 1, mask=(i < end) & (i >= output), sem="relaxed")


@triton.jit
def apply_lists(
    row, first_id, r, bias_start, bias_ids, bias_values, banned_start, banned_ids,
    CHUNK: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Bias, then bans, on a chunk in memory. An id that a bias has twice gets both values, in order."""
    end = tl.load(bias_start + r + 1)
    for start in range(tl.load(bias_start + r), end, LIST):
        i = start + tl.arange(0, LIST)
        token = tl.load(bias_ids + i, mask=i < end, other=-1)
        value = tl.load(bias_values + i, mask=i < end, other=0.0)
        own = (token >= first_id) & (token < first_id + CHUNK)
        before = (token[:, None] == token[None, :]) & (i[:, None] > i[None, :])
        turn = tl.where(own, tl.sum(before.to(tl.int32), 1), -1)
        for now in range(tl.max(turn, 0) + 1):
            x = tl.load(row + token, mask=turn == now, other=0.0)
            tl.debug_barrier()
            tl.store(row + token, x + value, mask=turn == now)
            tl.debug_barrier()
    end = tl.load(banned_start + r + 1)
    for start in range(tl.load(banned_start + r), end, LIST):
        i = start + tl.arange(0, LIST)
        token = tl.load(banned_ids + i, mask=i < end, other=-1)
        own = (token >= first_id) & (token < first_id + CHUNK)
        tl.store(row + token, tl.full((LIST,), -INFINITY, tl.float32), mask=own)
    tl.debug_barrier()


@triton.jit(do_not_specialize_on_alignment=ROW_ARRAYS)
def edit_kernel(
    logits, row_stride, V, C, B, flags, temperature, presence, frequency, repetition,
    bias_start, bias_ids, bias_values, banned_start, banned_ids, mask_row, mask_words,
    edited, highest, first, mass, block_highest,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Bias, bans, mask and penalties on a copy of rows that have some, and its chunks in short.

    A token's count is where its edited logit will be. Launched without contraction of products and sums, so
    that the logits are the CPU's. Grid: (R, parts of a row).
    """
    r = tl.program_id(0)
    what = tl.load(flags + r)
    if (what & EDITED) != 0:
        raw = logits + r.to(tl.int64) * row_stride
        row = edited + r.to(tl.int64) * V
        penalty = (what & PENALTY) != 0
        random = (what & RANDOM) != 0
        inverse = tl.div_rn(1.0, tl.where(random, tl.load(temperature + r), 1.0))
        listed = tl.load(bias_start + r + 1) > tl.load(bias_start + r)
        listed = listed | (tl.load(banned_start + r + 1) > tl.load(banned_start + r))
        m = tl.load(mask_row + r)
        for c in range(tl.program_id(1), C, tl.num_programs(1)):
            ids = c * CHUNK + tl.arange(0, CHUNK)
            inside = ids < V
            x = load_logits(raw, ids, V)
            count = tl.zeros((CHUNK,), tl.int32)
            if penalty:
                count = tl.load(row + ids, mask=inside, other=0.0).to(tl.int32, bitcast=True)
                tl.debug_barrier()  # all threads have read their counts before one writes a logit
            if listed:
                tl.store(row + ids, x, mask=inside)
                tl.debug_barrier()
                apply_lists(
                    row, c * CHUNK, r, bias_start, bias_ids, bias_values, banned_start, banned_ids,
                    CHUNK, LIST,
                )  # fmt: skip
                x = tl.load(row + ids, mask=inside, other=-INFINITY)
                tl.debug_barrier()
            if m >= 0:
                words = mask_words + m.to(tl.int64) * tl.cdiv(V, 32)
                word = tl.load(words + ids // 32, mask=inside, other=0)
                x = tl.where(((word >> (ids % 32)) & 1) != 0, x, -INFINITY)
            if penalty:
                by = tl.load(repetition + r)
                x = tl.where(count != 0, tl.where(x > 0.0, tl.div_rn(x, by), x * by), x)
                count = count & (SEEN - 1)
                lower = x - tl.load(frequency + r) * count.to(tl.float32) - tl.load(presence + r)
                x = tl.where(count != 0, lower, x)
            x = tl.where(x == x, x, INFINITY)
            tl.store(row + ids, x, mask=inside)
            summarize(x, ids, inverse, random, (r * 2 + SAMPLED) * C + c, highest, first, mass)
            if (what & FILTERED) != 0:
                store_block_highest(x, r * 2 + SAMPLED, c, B, block_highest, CHUNK, BLOCK)


@triton.jit
def write_top(values, places, count, n, top, log_total, ids, logprobs, CANDIDATES: tl.constexpr):
    """The n likeliest of the candidates, one after another."""
    x, id, there = load_candidates(values, places, count, CANDIDATES)
    keys = tl.where(there, key_of(x, id), -1)
    last = tl.cast(LAST_KEY, tl.int64)
    for i in range(n):
        last = tl.max(tl.where(keys < last, keys, -1), 0)
        below = value_of(last).to(tl.float64) - top.to(tl.float64)
        tl.store(ids + i, id_of(last))
        tl.store(logprobs + i, (below - log_total).to(tl.float32))


@triton.jit(do_not_specialize_on_alignment=ROW_ARRAYS)
def rank_kernel(
    logits, row_stride, V, C, num_logprobs, flags, highest, mass, found, values, places,
    tokens, logprob, rank, top_ids, top_logprobs, top_stride,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """The token's log-probability, the top n, and how many raw logits are greater, added to the rank.

    Grid: (R, C + 1), the last for all but the rank. Reads the chunks whose highest logit is greater.
    """
    r = tl.program_id(0)
    c = tl.program_id(1)
    n = tl.load(num_logprobs + r)
    if ((tl.load(flags + r) & ACTIVE) != 0) & (n >= 0):
        at = r * 2 + RAW
        row = logits + r.to(tl.int64) * row_stride
        token = tl.load(tokens + r)
        own = tl.load(row + token, mask=token >= 0, other=INFINITY)
        if c < C:
            if tl.load(highest + at * C + c) > own:
                ids = c * CHUNK + tl.arange(0, CHUNK)
                greater = tl.sum((load_logits(row, ids, V) > own).to(tl.int32), 0)
                tl.atomic_add(rank + r, greater, sem="relaxed")
        else:
            top = row_highest(at, highest, C, CHUNKS)
            if is_finite(top):
                log_total = log_sum(at, top, highest, mass, C, CHUNKS)
                if token >= 0:
                    below = own.to(tl.float64) - top.to(tl.float64)
                    tl.store(logprob + r, (below - log_total).to(tl.float32))
                if n > 0:
                    write_top(
                        values + at.to(tl.int64) * CANDIDATES, places + at.to(tl.int64) * CANDIDATES,
                        tl.load(found + at), tl.minimum(n, V), top, log_total,
                        top_ids + r * top_stride, top_logprobs + r * top_stride, CANDIDATES,
                    )  # fmt: skip
