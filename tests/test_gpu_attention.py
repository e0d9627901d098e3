"""Paged attention on GPUs and its plan, against a float64 oracle: in Triton's interpreter, or on a GPU where
there is one. See test_gpu_kernels.py for what the interpreter leaves out.

Most cases have tiles of 16 keys, so that a few hundred positions are many tiles and parts; the tiles of the
tables have a test of their own. What a step does not own is not a number: slots of the cache that no sequence
uses or that lie before every window, and the blocks that unused entries of the tables name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read as the kernels are imported

from fastllm import RequestError  # noqa: E402
from fastllm.kernels import attention, products  # noqa: E402
from fastllm.kernels.attention import DeviceItems, Scratch, paged_attention, to_device  # noqa: E402
from fastllm.kernels.attention_plan import (  # noqa: E402
    AttentionPlan,
    Tile,
    Tiles,
    capacity,
    needs,
    plan_attention,
)
from fastllm.kernels.tiles import ARCHITECTURES  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

Array = npt.NDArray[Any]
DEVICE = torch.device("cuda" if GPU else "cpu")
# Of a result's relative error: what rounding q, P and the result to the type leaves.
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3} | ({torch.bfloat16: 8e-3} if GPU else {})
SMALL = Tiles(
    Tile(16, 16, 1, 2, 4, 1, 32),
    Tile(32, 16, 2, 2, 2, 1, 32),
    Tile(64, 32, 4, 2, 2, 2, 64),
    Tile(32, 16, 2, 2, 2, 1, 64),
)
EXAMPLES = settings(deadline=None, max_examples=12)


@dataclass(frozen=True)
class Step:
    """A step's sequences, and what attends how."""

    queries: tuple[int, ...]
    lengths: tuple[int, ...]
    kv_heads: int = 1
    group: int = 1
    head_dim: int = 64
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0
    dtype: torch.dtype = torch.float32
    int8: bool = False
    seed: int = 0

    @property
    def query_start(self) -> npt.NDArray[np.int32]:
        return np.concatenate([[0], np.cumsum(self.queries)]).astype(np.int32)

    @property
    def seq_lens(self) -> npt.NDArray[np.int32]:
        return np.array(self.lengths, dtype=np.int32)

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def table_width(self) -> int:
        return max(-(-length // self.block_size) for length in self.lengths) + 1

    def first_seen(self, sequence: int) -> int:
        """The first position that a query of the sequence sees."""
        position = self.lengths[sequence] - self.queries[sequence]
        return max(0, position - self.window + 1) if self.window else 0

    def plan(self, tiles: Tiles = SMALL, **named: Any) -> AttentionPlan:
        given: dict[str, Any] = {
            "multiprocessors": 4,
            "window": self.window,
            "table_width": self.table_width,
        } | named
        return plan_attention(
            self.query_start, self.seq_lens, tiles=tiles, group=self.group, kv_heads=self.kv_heads, **given
        )


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32)).to(dtype)


class Cache:
    """A step's q, and a paged cache whose sequences lie in shuffled blocks, as the kernel and the oracle see
    them. Sequence s is that of `seeds[s]` whatever else is in the step."""

    def __init__(self, step: Step, seeds: tuple[int, ...] = ()) -> None:
        self.step = step
        kh, d, size = step.kv_heads, step.head_dim, step.block_size
        shuffle = np.random.default_rng(step.seed)
        width, count = step.table_width, len(step.lengths)
        blocks = count * width + 3
        order = shuffle.permutation(blocks).astype(np.int32)
        nowhere, self.tables = order[0], order[1 : count * width + 1].reshape(count, width).copy()
        shape = (blocks, kh, size, d)
        keys, values = (torch.full(shape, 77 if step.int8 else torch.nan, dtype=self.stored) for _ in "kv")
        key_scales, value_scales = (torch.full(shape[:3], torch.nan) for _ in "kv")
        self.sequences: list[tuple[Array, Array]] = []
        q = []
        for s, (n, length) in enumerate(zip(step.queries, step.lengths, strict=True)):
            rng = np.random.default_rng(seeds[s] if seeds else 1000 * step.seed + s)
            # By position, so that a sequence has the same beginning however long it is.
            at = np.arange(step.first_seen(s), length)
            whole = numbers(rng, (512, kh * (step.group + 2), d), step.dtype)[:length]
            q.append(whole[length - n :, : kh * step.group])
            pair = []
            block, offset = torch.from_numpy(self.tables[s, at // size]), torch.from_numpy(at % size)
            for i, (cache, scales) in enumerate(((keys, key_scales), (values, value_scales))):
                own = whole[:, kh * (step.group + i) : kh * (step.group + i + 1)]
                exact = double(own)
                if step.int8:
                    scale = own.float().abs().amax(2) / 127
                    own = (own.float() / scale[:, :, None]).round().to(torch.int8)
                    exact = double(own) * double(scale)[:, :, None]
                    scales[block, :, offset] = scale[at]
                cache[block, :, offset] = own[at]
                pair.append(exact)
            self.sequences.append((pair[0], pair[1]))
            unused = np.arange(width)
            self.tables[s, (unused * size >= length) | ((unused + 1) * size <= step.first_seen(s))] = nowhere
        self.q, self.keys, self.values = torch.cat(q).to(DEVICE), keys.to(DEVICE), values.to(DEVICE)
        self.scales: dict[str, torch.Tensor] = {}
        if step.int8:
            self.scales = {
                "key_scales": key_scales.to(DEVICE), "value_scales": value_scales.to(DEVICE)
            }  # fmt: skip

    @property
    def stored(self) -> torch.dtype:
        return torch.int8 if self.step.int8 else self.step.dtype

    @property
    def exact(self) -> Array:
        """Attention, plainly."""
        step, q = self.step, double(self.q)
        out = np.empty_like(q)
        row = 0
        for n, length, (keys, values) in zip(step.queries, step.lengths, self.sequences, strict=True):
            for position in range(length - n, length):
                seen = slice(max(0, position - step.window + 1) if step.window else 0, position + 1)
                for h in range(q.shape[1]):
                    scores = step.scale * (keys[seen, h // step.group] @ q[row, h])
                    if step.softcap:
                        scores = step.softcap * np.tanh(scores / step.softcap)
                    p = np.exp(scores - scores.max())
                    out[row, h] = p @ values[seen, h // step.group] / p.sum()
                row += 1
        return out

    def attend(self, items: AttentionPlan | DeviceItems, **named: Any) -> torch.Tensor:
        step = self.step
        if isinstance(items, AttentionPlan):
            items = to_device(items, DEVICE, head_dim=step.head_dim)
        given: dict[str, Any] = {
            "keys": self.keys,
            "values": self.values,
            "q": self.q,
            "scale": step.scale,
        } | self.scales
        given |= {"softcap": step.softcap, "window": step.window} | named
        tables = torch.from_numpy(self.tables).to(DEVICE)
        y = paged_attention(block_tables=tables, items=items, **given)
        assert not items.scratch.counters.any()
        return y


def double(tensor: torch.Tensor) -> Array:
    return tensor.double().cpu().numpy()


def check_close(got: torch.Tensor, expected: Array, dtype: torch.dtype) -> None:
    assert (got.dtype, tuple(got.shape)) == (dtype, expected.shape)
    assert np.linalg.norm(double(got) - expected) / np.linalg.norm(expected) < BOUNDS[dtype]


@st.composite
def steps(draw: st.DrawFn, longest: int = 140, chunk: int = 24, sequences: int = 3) -> Step:
    lengths, queries = [], []
    for _ in range(draw(st.integers(1, sequences))):
        n = draw(st.one_of(st.just(1), st.integers(1, chunk)))
        queries.append(n)
        lengths.append(draw(st.integers(n, longest)))
    return Step(
        tuple(queries),
        tuple(lengths),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 8)),
        head_dim=draw(st.sampled_from([32, 64, 80, 96, 128, 46])),
        block_size=draw(st.sampled_from([16, 32, 64])),
        window=draw(st.one_of(st.just(0), st.integers(1, longest))),
        softcap=draw(st.sampled_from([0.0, 0.0, 2.0, 30.0])),
        dtype=draw(st.sampled_from(list(BOUNDS))),
        seed=draw(st.integers(0, 99)),
    )


# ---- results -----------------------------------------------------------------------------------------------


@EXAMPLES
@given(steps(), st.booleans())
def test_attention(step: Step, deterministic: bool) -> None:
    cache = Cache(step)
    check_close(cache.attend(step.plan(deterministic=deterministic)), cache.exact, step.dtype)


@EXAMPLES
@given(steps(), st.booleans())
def test_int8_cache(step: Step, deterministic: bool) -> None:
    step = replace(step, int8=True)
    cache = Cache(step)
    check_close(cache.attend(step.plan(deterministic=deterministic)), cache.exact, step.dtype)


def tables() -> list[tuple[Tile, torch.dtype, torch.dtype, int, bool]]:
    """Every shape of tile of any table, with a dtype of q and of the cache and a head that it is for."""
    found: dict[Any, Any] = {}
    half, single = torch.float16, torch.float32
    for architecture in ARCHITECTURES:
        for head_dim in (64, 80, 256):
            for dtype, stored in ((half, half), (half, torch.int8), (single, single)):
                tiles = attention.tiles_of(architecture, head_dim, dtype, stored)
                for name, tile in tiles._asdict().items():
                    found.setdefault(
                        (tile.rows, tile.keys, tile.loops, stored, name == "fixed"),
                        (tile, dtype, stored, head_dim, name == "fixed"),
                    )
    return list(found.values())


@pytest.mark.parametrize(
    ("tile", "dtype", "stored", "head_dim", "fixed"), tables() if not GPU else [], ids=str
)
def test_tiles_of_the_tables(
    tile: Tile, dtype: torch.dtype, stored: torch.dtype, head_dim: int, fixed: bool
) -> None:
    """Two tiles of queries, one after more keys than the other, with some tiles of keys in each."""
    group = 5
    n = tile.rows // group + 1
    step = Step(
        (n, 1), (n + 150, 140), 1, group, head_dim, 32, window=100 if tile.keys == 32 else 0, dtype=dtype,
        int8=stored == torch.int8,
    )  # fmt: skip
    cache = Cache(step)
    tiles = Tiles(tile, tile, tile, tile)
    check_close(cache.attend(step.plan(tiles, deterministic=fixed)), cache.exact, dtype)


@pytest.mark.skipif(not GPU, reason="in the interpreter tiles of all tables are tested, one by one")
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (64, torch.bfloat16),
        (80, torch.float16),
        (96, torch.bfloat16),
        (128, torch.bfloat16),
        (128, torch.float32),
        (256, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_tiles_of_this_gpu(head_dim: int, dtype: torch.dtype, int8: bool, deterministic: bool) -> None:
    step = Step((1, 3, 100, 1), (400, 333, 300, 17), 2, 4, head_dim, dtype=dtype, int8=int8)
    cache = Cache(step)
    tiles = attention.tiles(DEVICE, head_dim, dtype, cache.stored)
    plan = step.plan(tiles, deterministic=deterministic, multiprocessors=products.multiprocessors(DEVICE))
    check_close(cache.attend(plan), cache.exact, dtype)


def test_more_heads_than_few_rows_and_sequences_without_queries() -> None:
    step = Step((0, 1, 0, 2), (40, 70, 3, 20), 1, 20)
    cache = Cache(step)
    plan = step.plan()
    assert len(plan.few) == 0
    check_close(cache.attend(plan), cache.exact, step.dtype)


@pytest.mark.parametrize("int8", [False, True])
def test_slices_of_larger_tensors(int8: bool) -> None:
    """q as part of q, k and v in one; a layer of a cache that has its layers inside of its blocks."""
    step = Step((1, 9), (60, 50), 2, 2, int8=int8)
    cache = Cache(step)
    plan = step.plan()
    expected = cache.attend(plan)
    t, heads, d = cache.q.shape
    fused = torch.full((t, (heads + 4) * d), torch.nan, device=DEVICE)
    q = fused[:, : heads * d].view(t, heads, d)
    q.copy_(cache.q)

    def layer(tensor: torch.Tensor) -> torch.Tensor:
        larger = tensor[:, None, None].repeat(1, 3, 2, *([1] * (tensor.ndim - 1)))
        return larger[:, 1, 1]

    scales = {name: layer(own) for name, own in cache.scales.items()}
    out = torch.full((t + 2, heads, d), 7.0, device=DEVICE)
    y = cache.attend(plan, q=q, keys=layer(cache.keys), values=layer(cache.values), out=out[:t], **scales)
    assert y.data_ptr() == out.data_ptr()
    assert torch.equal(y, expected)
    assert (out[t:] == 7.0).all()


# ---- the same bits -----------------------------------------------------------------------------------------


def test_the_same_bits_from_run_to_run() -> None:
    step = Step((1, 30), (190, 150), 2, 4, dtype=torch.float16)
    cache = Cache(step)
    plan = step.plan()
    assert min(plan.few_slots, plan.many_slots) > 1  # parts whose sums meet
    items = to_device(plan, DEVICE, head_dim=64)
    first = cache.attend(items)
    assert torch.equal(first, cache.attend(items))


VARIANTS = [
    {},
    {"window": 70},
    {"softcap": 3.0, "dtype": torch.float16},
    {"int8": True, "window": 90, "dtype": torch.float16, "head_dim": 80},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_deterministic_results_do_not_know_the_batch(variant: dict[str, Any]) -> None:
    """The same 140 positions: as one prompt; in chunks; some as decodes, alone and in a batch."""
    options: dict[str, Any] = {"group": 3, "block_size": 32} | variant
    cut: list[bool] = []

    def attend(queries: tuple[int, ...], lengths: tuple[int, ...], multiprocessors: int) -> torch.Tensor:
        """Sequence 0; the others are there too."""
        step = Step(queries, lengths, seed=len(queries), **options)
        plan = step.plan(deterministic=True, multiprocessors=multiprocessors)
        cut.append(plan.many_slots > 0)
        return Cache(step, (5, *range(50, 49 + len(queries)))).attend(plan)[: queries[0]]

    whole = attend((140,), (140,), 1)
    assert torch.equal(attend((7,), (140,), 4), whole[133:])
    assert torch.equal(attend((40,), (97,), 4), whole[57:97])
    for position in (64, 139):
        alone = attend((1,), (position + 1,), 16)
        assert torch.equal(alone, whole[position : position + 1])
        assert torch.equal(alone, attend((1, 1, 12), (position + 1, 100, 12), 1))
    assert any(cut)
    assert not all(cut)


# ---- graphs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
def test_items_that_are_filled_anew(deterministic: bool) -> None:
    """What a graph sees: tensors that stay, with more room than the items of a step."""
    step = Step((1, 1, 20), (170, 60, 80), 1, 4)
    plan = step.plan(deterministic=deterministic)
    room = capacity(
        30, tiles=SMALL, group=4, kv_heads=1, multiprocessors=4, keys_max=200, deterministic=deterministic
    )
    scratch = Scratch.allocate(room, 1, 64, DEVICE)
    items = DeviceItems.allocate(plan, room, scratch, DEVICE)
    for queries, lengths in (((1, 1, 20), (170, 60, 80)), ((1, 1), (12, 150)), ((17,), (17,))):
        step = replace(step, queries=queries, lengths=lengths)
        plan = step.plan(deterministic=deterministic, many_tile=items.many_tile)
        assert room.holds(plan)
        assert len(plan.few) + len(plan.many) < room.few + room.many
        items.fill(plan)
        cache = Cache(step)
        assert torch.equal(cache.attend(items), cache.attend(plan))


# ---- the plan ----------------------------------------------------------------------------------------------

TABLE = attention.tiles_of("sm_90", 128, torch.bfloat16, torch.bfloat16)


@st.composite
def plans(draw: st.DrawFn) -> tuple[Step, Tiles, dict[str, Any]]:
    """Steps with long contexts, of which only the plan is made."""
    chunk = draw(st.sampled_from([1, 8, 600]))
    step = draw(steps(longest=draw(st.sampled_from([300, 20_000])), chunk=min(chunk, 300), sequences=8))
    tiles = draw(st.sampled_from([SMALL, TABLE]))
    return step, tiles, {"multiprocessors": draw(st.sampled_from([1, 4, 132]))}


@settings(deadline=None, max_examples=100)
@given(plans(), st.booleans())
def test_each_query_and_key_once(drawn: tuple[Step, Tiles, dict[str, Any]], deterministic: bool) -> None:
    step, tiles, options = drawn
    plan = step.plan(tiles, deterministic=deterministic, **options)
    starts, lengths, width = step.query_start, step.seq_lens, step.table_width
    covered: dict[int, list[tuple[int, int, int]]] = {}
    for items, tile in ((plan.few, plan.few_tile), (plan.many, plan.many_tile)):
        assert items.dtype == np.int32
        for table, row, n, position, begin, end, _, _ in items.tolist():
            s = table // width
            assert table == s * width
            assert n >= 1
            assert n * step.group <= tile.rows
            assert starts[s] <= row
            assert row + n <= starts[s + 1]
            assert position == lengths[s] - (starts[s + 1] - row)
            assert begin % tile.keys == 0
            assert begin < end <= position + n
            for query in range(row, row + n):
                covered.setdefault(query, []).append((position + query - row, begin, end))
    assert covered.keys() == set(range(starts[-1]))
    for spans in covered.values():
        position = spans[0][0]
        first = max(0, position - step.window + 1) if step.window else 0
        at = sorted((begin, end) for _, begin, end in spans)
        assert at[0][0] <= first
        assert at[-1][1] > position
        assert [begin for begin, _ in at[1:]] == [end for _, end in at[:-1]]


@settings(deadline=None, max_examples=100)
@given(plans(), st.booleans())
def test_parts_are_counted_and_about_equal(
    drawn: tuple[Step, Tiles, dict[str, Any]], deterministic: bool
) -> None:
    step, tiles, options = drawn
    plan = step.plan(tiles, deterministic=deterministic, **options)
    for items, slots, tile in (
        (plan.few, plan.few_slots, plan.few_tile), (plan.many, plan.many_slots, plan.many_tile)
    ):  # fmt: skip
        tiles_of_list: dict[tuple[int, int], list[list[int]]] = {}
        for item in items.tolist():
            tiles_of_list.setdefault((item[0], item[1]), []).append(item)
        taken: list[int] = []
        total = sum(item[5] - item[4] for item in items.tolist())
        wanted = max(1, tile.programs * options["multiprocessors"] // step.kv_heads)
        for own in tiles_of_list.values():
            own.sort(key=lambda item: item[4])
            assert [item[7] for item in own] == [part * 65536 + len(own) for part in range(len(own))]
            if len(own) > 1:
                assert len({item[6] for item in own}) == 1
                taken += range(own[0][6], own[0][6] + len(own))
            length = [item[5] - item[4] for item in own]
            if deterministic:
                assert len(own) == 1 or all(item[4] % tile.part == 0 for item in own[1:])
                assert len(own) == 1 or max(length) <= tile.part
            else:
                assert max(length) <= max(tile.part, total / wanted) + tile.keys
                assert all(own_length == length[0] for own_length in length[:-1])
                assert length[-1] <= length[0]
        assert sorted(taken) == list(range(slots))


@settings(deadline=None, max_examples=100)
@given(plans(), st.booleans(), st.booleans())
def test_the_capacity_holds_every_plan(
    drawn: tuple[Step, Tiles, dict[str, Any]], deterministic: bool, longer: bool
) -> None:
    step, tiles, options = drawn
    plan = step.plan(tiles, deterministic=deterministic, **options)
    tokens, longest = sum(step.queries), max(step.lengths)
    shared: dict[str, Any] = {
        "tiles": tiles,
        "group": step.group,
        "kv_heads": step.kv_heads,
        "deterministic": deterministic,
    }
    room = capacity(
        tokens + longer, sequences=len(step.queries), keys_max=longest + longer, **shared, **options
    )
    assert room.holds(plan)
    assert capacity(tokens + longer, keys_max=longest, **shared, **options).holds(plan)
    if not len(plan.many):
        assert capacity(tokens, keys_max=longest, many=False, **shared, **options).holds(plan)
    assert needs(plan).holds(plan)
    if longer and len(plan.few):
        assert not room._replace(few=len(plan.few) - 1).holds(plan)


def test_a_long_sequence_does_not_wait_for_short_ones() -> None:
    """Where one sequence is most of the work, its parts are as many as fill the machine; no more with more
    short ones beside it than there is work for."""
    most = 0
    for count in range(1, 200):
        lengths = (100_000,) + (100,) * (count - 1)
        step = Step((1,) * count, lengths, kv_heads=8, group=4)
        plan = step.plan(TABLE, multiprocessors=132)
        longest = int((plan.few[:, 5] - plan.few[:, 4]).max())
        assert longest <= sum(lengths) * 8 / (TABLE.few.programs * 132) + TABLE.few.keys
        assert longest >= most
        most = longest


# ---- errors ------------------------------------------------------------------------------------------------


def test_errors_name_the_argument() -> None:
    step = Step((1, 5), (30, 20), 2, 2)
    cache, int8 = Cache(step), Cache(replace(step, int8=True))
    plan = step.plan()

    def refused(match: str, cache: Cache = cache, **named: Any) -> None:
        with pytest.raises(RequestError, match=match):
            cache.attend(plan, **named)

    q, keys = cache.q, cache.keys
    refused("paged_attention: q: .*float64", q=q.double())
    refused(r"paged_attention: q: .*\(T, 4, D\)", q=q[:, :3])
    refused("paged_attention: q", q=q.transpose(1, 2).contiguous().transpose(1, 2))
    refused("paged_attention: q", q=q[:, :, :-1], keys=keys[..., :-1], values=keys[..., :-1])
    refused("paged_attention: keys: .*int8 or torch.float32", keys=keys.half(), values=keys.half())
    refused("paged_attention: keys", keys=keys[:, :, :10], values=keys[:, :, :10])
    refused("paged_attention: keys: .*strides", keys=keys.repeat(1, 1, 2, 1)[:, :, ::2], values=keys)
    refused("paged_attention: values: .*of keys", values=keys[:-1])
    refused("paged_attention: key_scales", int8, key_scales=None, value_scales=None)
    refused("paged_attention: key_scales", cache, **int8.scales)
    refused("paged_attention: value_scales", int8, value_scales=int8.scales["key_scales"][:-1])
    refused("paged_attention: scale: .*positive", scale=-1.0)
    refused("paged_attention: scale: .*positive", scale=float("nan"))
    refused("paged_attention: softcap", softcap=-1.0)
    refused("paged_attention: window: .*that of the plan, 0", window=3)
    refused("paged_attention: out", out=torch.empty(6, 4, 32, device=DEVICE))
    with pytest.raises(RequestError, match=r"group: .*up to 32"):
        replace(step, group=33).plan()


def test_without_a_gpu_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step((1,), (5,))
    cache = Cache(step)
    monkeypatch.setattr(products, "INTERPRETED", False)
    if not GPU:
        with pytest.raises(RequestError, match="CUDA device"):
            cache.attend(step.plan())
