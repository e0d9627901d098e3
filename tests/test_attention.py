"""Paged attention and the cache it reads: against the float64 oracle, and bit for bit against itself.

Every run starts from a cache full of NaN, so that reading a slot that was never written shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm import _core, reference
from fastllm.errors import RequestError

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

ISAS = _core.supported_isas()
DTYPES = ["f32", "f16", "bf16", "i16", "i8"]
# The greatest codes of q, K, V and of a tile's weights.
CODES = {"i16": (4095, 8191, 4095, 8191), "i8": (127, 127, 127, 127 * 128)}


def same_bits(a: Float32, b: Float32) -> bool:
    return bool(np.array_equal(a.view(np.uint32), b.view(np.uint32)))


def bf16_round(x: Float32) -> Float32:
    """To bfloat16, ties to even, and back."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return rounded.astype(np.uint32).view(np.float32)


def code_round(x: Float32, dtype: str, which: int) -> Float32:
    """To integers with a scale per last axis, and back, in float32 arithmetic; rotated in between for i8."""
    one = np.float32(CODES[dtype][which])
    x = reference.hadamard(x) if dtype == "i8" else x
    top = np.max(np.abs(x), axis=-1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(top > 2.0**-110, one / top, np.float32(0.0))
    back = (top / one) * np.rint(x * inverse)
    return reference.hadamard(back) if dtype == "i8" else back


@dataclass(repr=False)
class Batch:
    """Sequences in a paged cache, and the queries that are their last positions."""

    cache: _core.KvCache
    q: Float32  # (T, H, D)
    k: list[Float32]  # per sequence (length, Hkv, D)
    v: list[Float32]
    query_start: Int32
    seq_lens: Int32
    block_tables: Int32
    block_size: int
    dtype: str

    def run(self, **options: object) -> Float32:
        return _core.paged_attention(
            self.cache, self.q, self.query_start, self.seq_lens, self.block_tables, **options
        )

    def __repr__(self) -> str:
        heads = (self.q.shape[1], self.k[0].shape[1], self.q.shape[2])
        return (
            f"Batch({self.dtype}, block_size={self.block_size}, heads={heads}, "
            f"query_start={self.query_start}, seq_lens={self.seq_lens})"
        )

    def slots(self, sequence: int) -> Int32:
        positions = np.arange(self.seq_lens[sequence])
        blocks = self.block_tables[sequence, positions // self.block_size]
        return (blocks * self.block_size + positions % self.block_size).astype(np.int32)

    def oracle(self, scale: float, window: int, cap: float) -> npt.NDArray[np.float64]:
        out = np.empty(self.q.shape)
        for s, length in enumerate(self.seq_lens):
            k, v = self.cache.read(self.slots(s))
            chunk = slice(self.query_start[s], self.query_start[s + 1])
            first = int(length) - (chunk.stop - chunk.start)
            q = code_round(self.q[chunk], self.dtype, 0) if self.dtype in CODES else self.q[chunk]
            out[chunk] = reference.attention(
                q, k, v, scale=scale, first_position=first, window=window, cap=cap
            )
        return out


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))
    block_size = draw(st.sampled_from([16, 32, 48, 64]))
    head_dim = draw(st.sampled_from([16, 32, 48, 64, 80, 112, 128]))
    kv_heads = draw(st.integers(1, 2))
    group = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 9]))
    lengths = draw(
        st.lists(st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 100, 128, 129, 200]), min_size=1, max_size=3)
    )
    queries = [draw(st.integers(1, min(length, 40))) for length in lengths]
    used = [-(-length // block_size) for length in lengths]
    blocks = 1 + sum(used)
    # Block 0 belongs to nobody: entries of the tables past a sequence's end point at it.
    ids = 1 + rng.permutation(blocks - 1).astype(np.int32)
    tables = np.zeros((len(lengths), max(used) + 1), np.int32)
    for s, count in enumerate(used):
        tables[s, :count], ids = ids[:count], ids[count:]
    cache = _core.KvCache(blocks, kv_heads, head_dim, block_size, dtype)
    cache.poison()
    spread = draw(st.sampled_from([0.3, 1.0, 3.0]))
    tokens = sum(queries)
    batch = Batch(
        cache=cache,
        q=(spread * rng.standard_normal((tokens, kv_heads * group, head_dim))).astype(np.float32),
        k=[rng.standard_normal((length, kv_heads, head_dim)).astype(np.float32) for length in lengths],
        v=[rng.standard_normal((length, kv_heads, head_dim)).astype(np.float32) for length in lengths],
        query_start=np.concatenate([[0], np.cumsum(queries)]).astype(np.int32),
        seq_lens=np.array(lengths, np.int32),
        block_tables=tables,
        block_size=block_size,
        dtype=dtype,
    )
    for s in range(len(lengths)):
        cache.write(batch.k[s], batch.v[s], batch.slots(s))
    return batch


windows = st.sampled_from([0, 0, 1, 5, 16, 64, 100])
caps = st.sampled_from([0.0, 0.0, 5.0])


@given(batches(), windows, caps, st.data())
def test_attention(batch: Batch, window: int, cap: float, data: st.DataObject) -> None:
    """Right, and the same bits on every instruction set, for any grouping of queries and split of tiles."""
    scale = float(np.float32(1.0 / np.sqrt(batch.q.shape[2])))
    out = batch.run(window=window, softcap=cap, isa=ISAS[0])
    largest = max(float(np.max(np.abs(v))) for v in batch.v)
    expected = batch.oracle(scale, window, cap)
    # An integer cache: weights of 64 positions rounded to a fraction of the greatest.
    bound = 64 * 0.5 / CODES[batch.dtype][3] if batch.dtype in CODES else 1e-5
    assert np.max(np.abs(out - expected)) <= bound * largest
    for isa in ISAS[1:]:
        assert same_bits(out, batch.run(window=window, softcap=cap, isa=isa))
    together = data.draw(st.sampled_from([1, 2, 3, 7]))
    split = data.draw(st.integers(1, 3))
    assert same_bits(out, batch.run(window=window, softcap=cap, queries_at_once=together))
    assert same_bits(out, batch.run(window=window, softcap=cap, split=split, scale=scale))
    assert same_bits(out, batch.run(window=window, softcap=cap, split=split, queries_at_once=together))


@given(batches(), windows, st.data())
def test_alone_as_in_a_chunk(batch: Batch, window: int, data: st.DataObject) -> None:
    """A query gives the same bits when nothing after its position or before its window was ever written."""
    out = batch.run(window=window)
    s = data.draw(st.integers(0, len(batch.seq_lens) - 1))
    begin, end, length = batch.query_start[s], batch.query_start[s + 1], int(batch.seq_lens[s])
    t = data.draw(st.integers(int(begin), int(end) - 1))
    position = length - int(end) + t
    first = max(0, position - window + 1) if window else 0
    batch.cache.poison()
    seen = slice(first, position + 1)
    batch.cache.write(batch.k[s][seen], batch.v[s][seen], batch.slots(s)[seen])
    table = batch.block_tables[s : s + 1].copy()
    table[0, : first // batch.block_size] = 0  # blocks that slid out of the window may be anyone's
    alone = _core.paged_attention(
        batch.cache,
        batch.q[t : t + 1],
        np.array([0, 1], np.int32),
        np.array([position + 1], np.int32),
        table,
        window=window,
    )
    assert same_bits(out[t : t + 1], alone)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_tile_of_minus_infinity_has_no_weight(dtype: str) -> None:
    cache = _core.KvCache(8, 1, 16, 16, dtype)
    rng = np.random.default_rng(1)
    k = rng.standard_normal((100, 1, 16)).astype(np.float32)
    v = rng.standard_normal((100, 1, 16)).astype(np.float32)
    k[:64] = -3e38
    q = np.full((1, 1, 16), 2.0, np.float32)
    cache.write(k, v, np.arange(100, dtype=np.int32))
    ends, lengths = np.array([0, 1], np.int32), np.array([100], np.int32)
    table = np.arange(8, dtype=np.int32)[None]
    out = _core.paged_attention(cache, q, ends, lengths, table)
    assert np.all(np.isfinite(out))
    assert same_bits(out, _core.paged_attention(cache, q, ends, lengths, table, window=36))
    assert same_bits(out, _core.paged_attention(cache, q, ends, lengths, table, split=1))


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sums_of_the_greatest_codes_fit(isa: str, dtype: str, head_dim: int, sign: float) -> None:
    """Every code of q, K, V and of the weights is the greatest: no integer sum may overflow."""
    cache = _core.KvCache(4, 1, head_dim, 16, dtype)
    # A rotated head is flat where the head is one value and then zeros.
    head = np.ones(head_dim) if dtype == "i16" else np.eye(head_dim)[0]
    ones = np.tile(head.astype(np.float32), (64, 1, 1))
    cache.write(ones, np.float32(sign) * ones, np.arange(64, dtype=np.int32), isa=isa)
    out = _core.paged_attention(
        cache,
        sign * ones[:1],
        np.array([0, 1], np.int32),
        np.array([64], np.int32),
        np.arange(4, dtype=np.int32)[None],
        isa=isa,
    )
    assert np.allclose(out, sign * ones[:1], rtol=1e-3, atol=1e-6)


@given(
    st.sampled_from(DTYPES),
    st.sampled_from([16, 32, 48, 64]),
    st.sampled_from([16, 48, 128]),
    st.integers(1, 3),
    st.integers(0, 60),
    st.floats(-12, 12),
    st.integers(0, 2**32),
)
def test_cache_write(
    dtype: str, block_size: int, head_dim: int, heads: int, tokens: int, magnitude: float, seed: int
) -> None:
    """What is stored is the rounding that the type says, in the named slots and in no other."""
    rng = np.random.default_rng(seed)
    shape = (tokens, heads, head_dim)
    k, v = (
        (rng.standard_normal(shape) * 10 ** rng.uniform(-3, 3, shape) * 10.0**magnitude).astype(np.float32)
        for _ in range(2)
    )
    k[rng.random(shape) < 0.05] = 0.0
    v[: tokens // 3, 0] = 0.0
    slots = rng.permutation(4 * block_size)[:tokens].astype(np.int32)
    others = np.setdiff1d(np.arange(4 * block_size), slots).astype(np.int32)
    for isa in ISAS:
        cache = _core.KvCache(4, heads, head_dim, block_size, dtype)
        cache.write(k, v, slots, isa=isa)
        with np.errstate(over="ignore"):
            for which, stored, x in zip((1, 2), cache.read(slots), (k, v), strict=True):
                if dtype == "f32":
                    expected = x
                elif dtype == "f16":
                    expected = x.astype(np.float16).astype(np.float32)
                elif dtype == "bf16":
                    expected = bf16_round(x)
                else:
                    expected = code_round(x, dtype, which)
                assert np.array_equal(stored, expected)
        for rest in cache.read(others):
            assert not np.any(rest)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_integer_cache_keeps_what_is_not_finite_visible(isa: str, bad: float, dtype: str) -> None:
    cache = _core.KvCache(1, 2, 32, 16, dtype)
    x = np.ones((1, 2, 32), np.float32)
    x[0, 1, 7] = bad
    cache.write(x, x, np.array([3], np.int32), isa=isa)
    for which, stored in zip((1, 2), cache.read(np.array([3], np.int32)), strict=True):
        assert np.array_equal(stored[0, 0], code_round(x[0, 0], dtype, which))
        assert np.all(np.isnan(stored[0, 1]))


@pytest.mark.parametrize("dtype", CODES)
def test_integer_cache_takes_denormals_for_zero(dtype: str) -> None:
    cache = _core.KvCache(1, 1, 16, 16, dtype)
    x = np.full((1, 1, 16), 2.0**-140, np.float32)
    cache.write(x, x, np.array([0], np.int32))
    assert not np.any(cache.read(np.array([0], np.int32))[0])


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ((0, 1, 64, 16, "f32"), "blocks"),
        ((1, 0, 64, 16, "f32"), "kv_heads"),
        ((1, 1, 24, 16, "f32"), "head_dim"),
        ((1, 1, 272, 16, "f32"), "head_dim"),
        ((1, 1, 64, 8, "f32"), "block_size"),
        ((1, 1, 64, 128, "f32"), "block_size"),
        ((1, 1, 64, 16, "fp8"), "dtype"),
    ],
)
def test_cache_refuses(arguments: tuple[int, int, int, int, str], field: str) -> None:
    with pytest.raises(RequestError, match=field):
        _core.KvCache(*arguments)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"q": np.zeros((3, 4, 16), np.float64)}, "q"),
        ({"q": np.zeros((3, 4, 32), np.float32)}, "q"),
        ({"q": np.zeros((3, 3, 16), np.float32)}, "q"),
        ({"q": np.zeros((3, 4, 32), np.float32)[:, :, ::2]}, "q"),
        ({"query_start": np.array([0, 2], np.int32)}, "query_start"),
        ({"query_start": np.array([0, 1, 3], np.int32)}, "query_start"),
        ({"seq_lens": np.array([2], np.int32)}, "seq_lens"),
        ({"seq_lens": np.array([33], np.int32)}, "seq_lens"),
        ({"block_tables": np.array([[0, 4]], np.int32)}, "block_tables"),
        ({"block_tables": np.array([[-1, 0]], np.int32)}, "block_tables"),
        ({"window": -1}, "window"),
        ({"split": -1}, "split"),
        ({"softcap": float("nan")}, "softcap"),
        ({"isa": "sse9"}, "sse9"),
    ],
)
def test_attention_refuses(change: dict[str, object], field: str) -> None:
    arguments: dict[str, object] = {
        "cache": _core.KvCache(4, 2, 16, 16, "f32"),
        "q": np.zeros((3, 4, 16), np.float32),
        "query_start": np.array([0, 3], np.int32),
        "seq_lens": np.array([20], np.int32),
        "block_tables": np.array([[1, 3]], np.int32),
    }
    assert _core.paged_attention(**arguments).shape == (3, 4, 16)
    with pytest.raises(RequestError, match=field):
        _core.paged_attention(**(arguments | change))


def test_write_refuses_slots_outside() -> None:
    cache = _core.KvCache(2, 1, 16, 16, "f32")
    x = np.zeros((1, 1, 16), np.float32)
    for slot in (-1, 32):
        with pytest.raises(RequestError, match="slots"):
            cache.write(x, x, np.array([slot], np.int32))
        with pytest.raises(RequestError, match="slots"):
            cache.read(np.array([slot], np.int32))
