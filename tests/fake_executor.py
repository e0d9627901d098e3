"""An executor without a model, whose answer depends on everything that a real one's would.

It keeps a store with one value per cache slot, written through `slot_mapping` and read back through
`block_tables`. The value of a position mixes its token with the values of all positions before it, and a
sampled token is a hash of the values of the whole context and of the row's sampling arrays. So a wrong slot,
a wrong block table, a block lost or shared by mistake, a wrong position, seed or list changes the tokens. An
adapter, here any file, has a part in every value. `expected_tokens` computes the same from the plain token
list, without pages or batches. A block read, and written to another one, takes its values along.

With `steps_ahead` it computes a step when that is submitted, as what computes steps in order, and takes
tokens that are named by their row in the step before (`fastllm.executor.base.Pipelined`).

Also here: a tokenizer and a detokenizer over a tiny vocabulary with multi-byte characters cut in two.
"""

from __future__ import annotations

import codecs
import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastllm.errors import RequestError
from fastllm.executor.base import ROW_LOGPROB, ROW_POOL, ROW_SAMPLE, StepBatch, StepResult
from fastllm.pooling_params import PoolingParams
from fastllm.sampling_params import SamplingParams

MASK = 2**64 - 1
WEIGHTS = np.random.default_rng(7).integers(0, 2**63, size=4096, dtype=np.uint64) * 2 + 1

PIECES = [
    b"<eos>",
    b"<end>",
    b"a",
    b"b",
    b"c",
    b"ab",
    b"ba",
    b" ",
    b"abc",
    b"\xc3",
    b"\xa9",
    b"\xc3\xa9",
    b"x",
]
EOS = 0
DIM = 3  # of a hidden state


def mix(*parts: int) -> int:
    """A 64-bit hash of integers."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state ^= part & MASK
        state = (state * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & MASK
        state ^= state >> 29
    return state


def unpack_mask(words: np.ndarray, vocab_size: int) -> frozenset[int]:
    """The ids that a row of mask_words allows."""
    return frozenset(
        np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[:vocab_size]).tolist()
    )


def fold(values: np.ndarray) -> int:
    """One number that depends on every value and its place."""
    return int((values * WEIGHTS[: len(values)]).sum(dtype=np.uint64)) if len(values) else 0


@dataclass
class Row:
    """What the fake samples from."""

    context: int  # fold of the values 0..position
    position: int
    temperature: float
    seed: int
    sample_index: int
    penalties: tuple[float, float, float]
    history: list[int]
    history_prompt_len: int
    bias: list[tuple[int, float]]
    banned: list[int]
    allowed: frozenset[int] | None  # None: no mask
    filters: tuple[int, float, float]


def choose(row: Row, vocab_size: int) -> int:
    """The token that a row samples."""
    state = row.context
    if row.temperature > 0:
        state = mix(state, row.seed, row.sample_index, row.position, row.filters[0])
        state = mix(state, int(row.temperature * 1000), *(int(item * 1000) for item in row.filters[1:]))
    if row.penalties != (0.0, 0.0, 1.0):
        state = mix(
            state, *(int(item * 1000) for item in row.penalties), row.history_prompt_len, *row.history
        )
    for token, value in row.bias:
        state = mix(state, token, int(value * 1000))
    left = (set(range(vocab_size)) if row.allowed is None else row.allowed) - set(row.banned)
    if not left:
        return -1
    while (token := mix(state) % vocab_size) not in left:
        state = mix(state, 1)
    return token


def scores(context: int, token: int, vocab_size: int) -> tuple[float, int]:
    """A logprob and a rank for a token, as a function of the context."""
    number = mix(context, token)
    return -float(number % 997) / 64, number % vocab_size + 1


def top(context: int, count: int, vocab_size: int) -> tuple[list[int], list[float]]:
    start = mix(context, 3) % vocab_size
    return [(start + k) % vocab_size for k in range(count)], [-k / 8 for k in range(count)]


def hidden_state(context: int) -> np.ndarray:
    """float32 (DIM,), as a function of the context; sums of several depend on their order."""
    return np.array([mix(context, 5 + i) % 100_003 / 7 - 7000 for i in range(DIM)], dtype=np.float32)


@dataclass(frozen=True)
class FakeAdapter:
    """An adapter is what its file contains."""

    path: Path
    digest: bytes
    rank: int = 1
    nbytes: int = 1000

    def parts(self) -> tuple[int, ...]:
        """What a value is mixed with besides."""
        return adapter_parts(self.digest)


def adapter_parts(digest: bytes | None) -> tuple[int, ...]:
    return () if digest is None else (int.from_bytes(digest[:8], "little"),)


class FakeExecutor:
    """See the module's docstring.

    Args:
        pick: what a row samples, instead of the hash; for scripted answers.
        fail_at: the step (from 0) at which `collect` raises, and what it raises.
    """

    steps_ahead = 0

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        vocab_size: int = len(PIECES),
        *,
        pick: Callable[[Row], int] | None = None,
        fail_at: tuple[int, BaseException] | None = None,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.vocab_size = vocab_size
        self.values = np.random.default_rng(3).integers(0, 2**63, num_blocks * block_size, dtype=np.uint64)
        self.tokens = np.full(num_blocks * block_size, -1, dtype=np.int64)
        self.num_steps = 0
        self.num_copies = 0
        self.num_tokens = 0
        self.num_closed = 0
        self.reported: list[tuple[int, int]] = []
        self.max_tokens_seen = 0
        self.adapters: dict[int, FakeAdapter] = {}
        self.adapters_seen: set[int] = set()
        self.before_read: Callable[[], None] = lambda: None
        self._pick = pick or (lambda row: choose(row, vocab_size))
        self._fail_at = fail_at
        self._batch: StepBatch | None = None
        self._results: dict[int, StepResult] = {}  # of steps submitted, the last two
        self._sampled = np.zeros(0, np.int32)

    def kv_capacity(self) -> int:
        return self.num_blocks

    def submit(self, batch: StepBatch) -> int:
        if not self.steps_ahead:
            self._batch = batch
            return self.num_steps
        ticket = self.num_steps
        for old in [old for old in self._results if old < ticket - 1]:
            spoil(self._results.pop(old))
        self._results[ticket] = self.run(batch)
        return ticket

    def collect(self, ticket: int) -> StepResult:
        if self._fail_at is not None and self._fail_at[0] == ticket:
            error, self._fail_at = self._fail_at[1], None
            raise error
        if self.steps_ahead:
            return self._results[ticket]
        assert self._batch is not None
        result = self.run(self._batch)
        self._batch = None
        return result

    def close(self) -> None:
        self.num_closed += 1

    @property
    def block_bytes(self) -> int:
        return 2 * 8 * self.block_size

    def read_blocks(self, blocks: np.ndarray, out: np.ndarray) -> None:
        for block, row in zip(blocks.tolist(), out, strict=True):
            tokens = self.tokens.reshape(self.num_blocks, self.block_size)[block]
            assert (tokens >= 0).all(), "a block is saved that is not full"
            values = self.values.reshape(self.num_blocks, self.block_size)[block]
            row.view(np.uint64)[:] = np.concatenate([values, tokens.astype(np.uint64)])

    def write_blocks(self, blocks: np.ndarray, data: np.ndarray) -> None:
        for block, row in zip(blocks.tolist(), data, strict=True):
            values, tokens = np.ascontiguousarray(row).view(np.uint64).reshape(2, self.block_size)
            self.values.reshape(self.num_blocks, self.block_size)[block] = values
            self.tokens.reshape(self.num_blocks, self.block_size)[block] = tokens.astype(np.int64)

    def read_adapter(self, path: Path) -> FakeAdapter:
        self.before_read()
        if not path.is_file():
            raise RequestError("lora_path", str(path), "a file")
        return FakeAdapter(path, hashlib.sha256(path.read_bytes()).digest())

    def load_adapter(self, index: int, adapter: FakeAdapter) -> None:
        assert index not in self.adapters
        self.adapters[index] = adapter

    def unload_adapter(self, index: int) -> None:
        del self.adapters[index]

    def run(self, batch: StepBatch) -> StepResult:
        check_shapes(
            batch, self.block_size, self.num_blocks, self.vocab_size, self.adapters, len(self._sampled)
        )
        named = batch.token_ids < 0
        token_ids = batch.token_ids.copy()
        token_ids[named] = self._sampled[-1 - token_ids[named]].clip(0)
        self.adapters_seen |= set(batch.adapter.tolist()) - {-1}
        self.num_steps += 1
        for source, target in batch.copy_blocks.tolist():
            for store in (self.values, self.tokens):
                blocks = store.reshape(self.num_blocks, self.block_size)
                blocks[target] = blocks[source]
        self.num_copies += len(batch.copy_blocks)
        self.num_tokens += len(batch.token_ids)
        self.max_tokens_seen = max(self.max_tokens_seen, len(batch.token_ids))
        contexts = np.zeros(len(batch.token_ids), dtype=np.uint64)
        for s in range(len(batch.seq_lens)):
            first, stop = int(batch.query_start[s]), int(batch.query_start[s + 1])
            length = int(batch.seq_lens[s])
            adapter = self.adapters[int(batch.adapter[s])].parts() if batch.adapter[s] >= 0 else ()
            positions = np.arange(length)
            slots = batch.block_tables[s][positions // self.block_size] * self.block_size
            slots = slots + positions % self.block_size
            for t in range(first, stop):
                position = int(batch.positions[t])
                before = fold(self.values[slots[:position]])
                slot = batch.slot_mapping[t]
                self.values[slot] = mix(before, int(token_ids[t]), position, *adapter)
                self.tokens[slot] = token_ids[t]
                contexts[t] = fold(self.values[slots[: position + 1]])
        result = self._answer(batch, contexts)
        self._sampled = result.tokens.copy()
        return result

    def _answer(self, batch: StepBatch, contexts: np.ndarray) -> StepResult:
        rows = len(batch.row_seq)
        width = max([0, *batch.num_logprobs.tolist()])
        result = StepResult(
            np.zeros(rows, np.int32),
            np.full(rows, np.nan, np.float32),
            np.zeros(rows, np.int32),
            np.full((rows, width), -1, np.int32),
            np.full((rows, width), np.nan, np.float32),
            np.zeros((0, DIM), np.float32),
        )
        states = []
        for r in range(rows):
            t = int(batch.row_token[r])
            context = int(contexts[t])
            if batch.row_kind[r] == ROW_LOGPROB:
                token = int(batch.row_target[r])
                self.reported.append((int(batch.row_seq[r]), int(batch.positions[t])))
            elif batch.row_kind[r] == ROW_POOL:
                states.append(hidden_state(context))
                token = 0
            else:
                token = self._pick(self._row(batch, r, context))
            result.tokens[r] = token
            count = int(batch.num_logprobs[r])
            if count >= 0:
                result.logprob[r], result.rank[r] = scores(context, token, self.vocab_size)
                ids, logprobs = top(context, count, self.vocab_size)
                result.top_ids[r, :count] = ids
                result.top_logprobs[r, :count] = logprobs
        if states:
            result.hidden = np.array(states)
        return result

    def _row(self, batch: StepBatch, r: int, context: int) -> Row:
        s, t = int(batch.row_seq[r]), int(batch.row_token[r])
        position = int(batch.positions[t])
        history = batch.history[batch.history_start[r] : batch.history_start[r + 1]].tolist()
        if history:
            positions = np.arange(position + 1)
            slots = batch.block_tables[s][positions // self.block_size] * self.block_size
            assert history == self.tokens[slots + positions % self.block_size].tolist()
        bias = slice(batch.bias_start[r], batch.bias_start[r + 1])
        return Row(
            context,
            position,
            float(batch.temperature[r]),
            int(batch.seed[r]),
            int(batch.sample_index[r]),
            (float(batch.presence[r]), float(batch.frequency[r]), float(batch.repetition[r])),
            history,
            int(batch.history_prompt_len[r]),
            list(zip(batch.bias_ids[bias].tolist(), batch.bias_values[bias].tolist(), strict=True)),
            batch.banned_ids[batch.banned_start[r] : batch.banned_start[r + 1]].tolist(),
            None
            if batch.mask_row[r] < 0
            else unpack_mask(batch.mask_words[batch.mask_row[r]], self.vocab_size),
            (int(batch.top_k[r]), float(batch.top_p[r]), float(batch.min_p[r])),
        )


def spoil(result: StepResult) -> None:
    """Overwrite a result that nobody may read any more."""
    for array in (result.tokens, result.rank, result.top_ids):
        array[:] = -7
    for array in (result.logprob, result.top_logprobs, result.hidden):
        array[:] = np.nan


@pytest.fixture(autouse=True, params=[0, 1], ids=["in turns", "a step ahead"])
def steps_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """For modules that import it: each test runs on both kinds of executor."""
    count: int = request.param
    monkeypatch.setattr(FakeExecutor, "steps_ahead", count)
    return count


class MemoryFile:
    """What `OffloadFile` does, in memory and at once: the last `room` blocks; each `every`-th `get` fails."""

    def __init__(self, room: int, every: int = 0) -> None:
        self.blocks: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self.room = room
        self.every = every
        self.gets = 0

    def put(self, contents: Sequence[bytes], read: Callable[[list[int]], np.ndarray]) -> None:
        self.touch(contents)
        places = [place for place, content in enumerate(contents) if content not in self.blocks]
        for place, block in zip(places, read(places), strict=True):
            self.blocks[contents[place]] = block.copy()
        while len(self.blocks) > self.room:
            self.blocks.popitem(last=False)

    def get(self, content: bytes) -> np.ndarray | None:
        self.gets += 1
        if self.every and self.gets % self.every == 0:
            self.blocks.pop(content, None)
        return self.blocks.get(content)

    def touch(self, contents: Iterable[bytes]) -> None:
        for content in contents:
            if content in self.blocks:
                self.blocks.move_to_end(content)

    def reset(self) -> None:
        self.blocks.clear()


class SureExecutor(FakeExecutor):
    """A draft model that is always sure of its tokens."""

    def run(self, batch: StepBatch) -> StepResult:
        assert (batch.num_logprobs == 0).all()
        assert len(batch.copy_blocks) == 0
        result = super().run(batch)
        result.logprob[:] = 0.0
        return result


def check_shapes(
    batch: StepBatch,
    block_size: int,
    num_blocks: int,
    vocab_size: int,
    adapters: Collection[int],
    sampled: int = 0,
) -> None:
    """Everything that an executor may rely on; `sampled` rows of the step before may be named."""
    tokens, seqs, rows = len(batch.token_ids), len(batch.seq_lens), len(batch.row_seq)
    lengths = {
        "token_ids": tokens, "positions": tokens, "slot_mapping": tokens, "query_start": seqs + 1,
        "seq_lens": seqs, "adapter": seqs,
        "bias_start": rows + 1, "banned_start": rows + 1, "history_start": rows + 1,
    }  # fmt: skip
    for name in (
        "row_seq", "row_token", "row_kind", "row_target", "num_logprobs", "temperature", "top_k", "top_p",
        "min_p", "presence", "frequency", "repetition", "seed", "sample_index", "history_prompt_len",
        "mask_row",
    ):  # fmt: skip
        lengths[name] = rows
    for name, start in (("bias", "bias"), ("banned", "banned"), ("history", "history")):
        starts = getattr(batch, f"{start}_start")
        assert starts[0] == 0
        assert (np.diff(starts) >= 0).all()
        bodies = {"bias": ("bias_ids", "bias_values"), "banned": ("banned_ids",), "history": ("history",)}[
            name
        ]
        for body in bodies:
            lengths[body] = int(starts[-1])
    floats = {"temperature", "top_p", "min_p", "presence", "frequency", "repetition", "bias_values"}
    for name, length in lengths.items():
        array = getattr(batch, name)
        dtype = np.float32 if name in floats else np.uint64 if name == "seed" else np.int32
        assert array.shape == (length,), (name, array.shape, length)
        assert array.dtype == dtype, name
        assert array.flags.c_contiguous, name
    masks = batch.mask_row[batch.mask_row >= 0].tolist()
    assert masks == list(range(len(masks)))
    assert (batch.row_kind[batch.mask_row >= 0] == ROW_SAMPLE).all()
    assert batch.mask_words.dtype == np.uint32
    assert batch.mask_words.flags.c_contiguous
    if masks:
        assert batch.mask_words.shape == (len(masks), (vocab_size + 31) // 32)
    assert batch.block_tables.dtype == np.int32
    assert batch.block_tables.flags.c_contiguous
    assert batch.copy_blocks.dtype == np.int32
    assert batch.copy_blocks.flags.c_contiguous
    assert batch.copy_blocks.shape == (len(batch.copy_blocks), 2)
    assert ((batch.copy_blocks >= 0) & (batch.copy_blocks < num_blocks)).all()
    assert not set(batch.copy_blocks[:, 0].tolist()) & set(batch.copy_blocks[:, 1].tolist())
    assert batch.query_start[0] == 0
    assert batch.query_start[-1] == tokens > 0
    assert set(batch.adapter.tolist()) <= {-1, *adapters}
    assert ((batch.token_ids >= -sampled) & (batch.token_ids < vocab_size)).all()
    assert len(set(batch.slot_mapping.tolist())) == tokens, "a slot is written twice"
    for s in range(seqs):
        first, stop, length = batch.query_start[s], batch.query_start[s + 1], batch.seq_lens[s]
        assert stop > first
        expected = np.arange(length - (stop - first), length)
        assert (batch.positions[first:stop] == expected).all()
        table = batch.block_tables[s]
        assert ((table >= 0) & (table < num_blocks)).all()
        slots = table[expected // block_size] * block_size + expected % block_size
        assert (batch.slot_mapping[first:stop] == slots).all()
    assert (np.diff(batch.row_token) >= 0).all()  # the same for those that sample from one prompt
    keys = list(zip(batch.row_token.tolist(), batch.sample_index.tolist(), strict=True))
    assert len(set(keys)) == rows, "two rows with one key"
    for r in range(rows):
        s, t = batch.row_seq[r], batch.row_token[r]
        assert batch.query_start[s] <= t < batch.query_start[s + 1]
        if batch.row_kind[r] == ROW_SAMPLE:
            following = batch.row_token[r + 1] if r + 1 < rows and batch.row_seq[r + 1] == s else t
            assert following - t in (0, 1)  # those of a draft are one behind the other, up to the end
            assert following > t or t == batch.query_start[s + 1] - 1
            assert batch.row_target[r] == -1
        elif batch.row_kind[r] == ROW_POOL:
            assert batch.row_target[r] == batch.num_logprobs[r] == -1
            assert batch.temperature[r] == 0.0
        else:
            assert batch.row_kind[r] == ROW_LOGPROB
            assert 0 <= batch.row_target[r] < vocab_size
            assert batch.num_logprobs[r] >= 0
            assert batch.temperature[r] == 0.0


def expected_tokens(
    prompt: Sequence[int],
    params: SamplingParams,
    limit: int,
    *,
    index: int = 0,
    seed: int = 0,
    eos: Sequence[int] = (EOS,),
    vocab_size: int = len(PIECES),
    adapter: bytes | None = None,
) -> tuple[list[int], str, Any]:
    """Output tokens, finish_reason and stop_reason that `prompt` gets alone; `limit` tokens in all.

    adapter: the digest of its adapter, None for none."""
    tokens = list(prompt)
    values: list[int] = []
    ending = set() if params.ignore_eos else set(eos)
    words = [FakeTokenizer().encode(text) for word in params.bad_words or () for text in (word, " " + word)]
    while True:
        for position in range(len(values), len(tokens)):
            values.append(
                mix(
                    fold(np.array(values, dtype=np.uint64)),
                    tokens[position],
                    position,
                    *adapter_parts(adapter),
                )
            )
        made = len(tokens) - len(prompt)
        penalties = (
            float(np.float32(params.presence_penalty)),
            float(np.float32(params.frequency_penalty)),
            float(np.float32(params.repetition_penalty)),
        )
        penalized = penalties != (0.0, 0.0, 1.0)
        greedy = params.greedy
        row = Row(
            fold(np.array(values, dtype=np.uint64)),
            len(tokens) - 1,
            0.0 if greedy else float(np.float32(params.temperature)),
            seed,
            index,
            penalties,
            tokens if penalized else [],
            len(prompt) if penalized else 0,
            [(token, float(np.float32(bias))) for token, bias in (params.logit_bias or {}).items()],
            [
                *(sorted(ending | set(params.stop_ids)) if made < params.min_tokens else []),
                *(word[-1] for word in words if tokens[len(prompt) :][made - len(word) + 1 :] == word[:-1]),
            ],
            None if params.allowed_token_ids is None else frozenset(params.allowed_token_ids),
            (0, 1.0, 0.0)
            if greedy
            else (max(params.top_k, 0), float(np.float32(params.top_p)), float(np.float32(params.min_p))),
        )
        token = choose(row, vocab_size)
        if token < 0:
            return tokens[len(prompt) :], "error", None
        tokens.append(token)
        if made >= params.min_tokens:
            if token in ending:
                return tokens[len(prompt) :], "stop", None
            if token in params.stop_ids:
                return tokens[len(prompt) :], "stop", token
        if len(tokens) >= limit:
            return tokens[len(prompt) :], "length", None


def expected_values(tokens: Sequence[int]) -> list[int]:
    """What the cache holds of tokens without an adapter."""
    values: list[int] = []
    for position, token in enumerate(tokens):
        values.append(mix(fold(np.array(values, dtype=np.uint64)), token, position))
    return values


def expected_states(prompt: Sequence[int]) -> list[np.ndarray]:
    """The hidden state of every token of a prompt."""
    values = np.array(expected_values(prompt), dtype=np.uint64)
    return [hidden_state(fold(values[: count + 1])) for count in range(len(prompt))]


def expected_embedding(prompt: Sequence[int], params: PoolingParams) -> np.ndarray:
    """The embedding that `prompt` gets alone, float32 (DIM,)."""
    states = expected_states(prompt)
    vector = [float(value) for value in states[-1]]
    if params.pooling == "mean":
        vector = [0.0] * DIM
        for state in states:
            vector = [total + float(value) for total, value in zip(vector, state, strict=True)]
        vector = [total / len(states) for total in vector]
    if params.normalize:
        length = math.sqrt(math.fsum(value * value for value in vector))
        vector = [value / length for value in vector]
    return np.array(vector, dtype=np.float32)


class FakeTokenizer:
    """PIECES as a vocabulary."""

    vocab_size = len(PIECES)
    eos_token_ids = frozenset({EOS})

    def token_bytes(self, id: int) -> bytes:
        return PIECES[id]

    def is_special(self, id: int) -> bool:
        return id < 2

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """One token for each character."""
        return [PIECES.index(character.encode()) for character in text]


class FakeDetokenizer:
    """Never half a character; the special tokens 0 and 1 are left out if asked."""

    def __init__(self, tokenizer: FakeTokenizer, prompt: Sequence[int], skip_special_tokens: bool) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._skip = skip_special_tokens

    def push(self, ids: Sequence[int]) -> str:
        kept = [PIECES[token] for token in ids if not (self._skip and token < 2)]
        return self._decoder.decode(b"".join(kept))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def full_text(ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """The text of all tokens at once."""
    kept = [PIECES[token] for token in ids if not (skip_special_tokens and token < 2)]
    return b"".join(kept).decode("utf-8", "replace")
