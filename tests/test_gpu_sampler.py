"""The GPU sampler against the float64 oracle and the CPU core: in Triton's interpreter, or on a GPU where
there is one.

Tokens are the oracle's unless the random number, the end of the nucleus or min_p lies within 1e-6 of a
boundary, and the CPU core's unless the random number lies within 1e-6 of one. Vocabularies are small, so most
tests also run with small chunks and few candidates: all paths of a large vocabulary in a thousand tokens.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import fields, replace
from types import SimpleNamespace
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

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from test_sampler import edited, make_batch  # noqa: E402

from fastllm import RequestError, _core, reference  # noqa: E402
from fastllm.kernels import sampler  # noqa: E402
from fastllm.kernels.philox import sample_uniform  # noqa: E402
from fastllm.kernels.sampler import SampleOutputs, SampleRows, SamplerScratch  # noqa: E402
from fastllm.kernels.selection import id_of, key_of, mass_of, value_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Row = dict[str, Any]
Result = dict[str, npt.NDArray[Any]]

DEVICE = "cuda" if GPU else "cpu"
SLACK = 1e-6
EXAMPLES = settings(deadline=None, max_examples=100 if GPU else 8)
NAMES = ("tokens", "logprob", "rank", "top_ids", "top_logprobs")
# Chunks, blocks, candidates and what is read at a time, as they are and so that a thousand tokens are many.
LARGE: dict[str, int] = {}
SMALL = {
    "CHUNK": 256,
    "BLOCK": 8,
    "CANDIDATES": 64,
    "NUCLEUS": 8,
    "SIFT": 256,
    "GATHER": 128,
    "PROGRAMS": 5,
    "HISTORY": 16,
    "LIST": 4,
}
SIZES = pytest.mark.parametrize("sizes", [LARGE, SMALL], ids=["large", "small"])
SENTINEL = 77  # what memory holds before


def on_device(batch: SimpleNamespace) -> SampleRows:
    arrays = vars(batch) | {"position": batch.positions[batch.row_token]}
    views = {"seed": np.int64, "mask_words": np.int32}
    return SampleRows(
        **{
            field.name: torch.from_numpy(arrays[field.name].view(views.get(field.name))).to(DEVICE)
            if field.name in views
            else torch.from_numpy(arrays[field.name]).to(DEVICE)
            for field in fields(SampleRows)
        }
    )


def filled(cls: type[Any], *arguments: Any) -> Any:
    """What cls.allocate gives, full of a number that nothing may rely on."""
    made = cls.allocate(*arguments, DEVICE)
    for field in fields(made):
        getattr(made, field.name).fill_(SENTINEL)
    return made


def sample(logits: Float32, rows: list[Row], sizes: dict[str, int] = LARGE, **options: Any) -> Result:
    most = max(0, *(row.get("num_logprobs", -1) for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes.items():
            patch.setattr(sampler, name, size)
        given_logits = torch.from_numpy(logits).to(DEVICE)
        scratch = filled(SamplerScratch, *logits.shape)
        out = sampler.sample(given_logits, on_device(make_batch(rows)), most, scratch=scratch, **options)
    assert given_logits.cpu().numpy().tobytes() == logits.tobytes(), "the logits are as they were"
    return {name: getattr(out, name).cpu().numpy() for name in NAMES}


def row_bits(result: Result, r: int, row: Row) -> list[bytes]:
    n = max(0, row.get("num_logprobs", -1))
    return [(result[name][r, :n] if result[name].ndim == 2 else result[name][r]).tobytes() for name in NAMES]


# ---- what a token may be -----------------------------------------------------------------------------------


def cumulative(
    logits: Float64, row: Row, p_by: float = 1.0, min_p_by: float = 1.0
) -> tuple[Float64, Float64]:
    """The oracle's probabilities and, for each id, the sum up to it; of float32 parameters as they are."""
    p = reference.sampling_probabilities(
        logits,
        temperature=float(np.float32(row.get("temperature", 0.0))),
        top_k=row.get("top_k", 0),
        top_p=min(1.0, float(np.float32(row.get("top_p", 1.0))) * p_by),
        min_p=min(1.0, float(np.float32(row.get("min_p", 0.0))) * min_p_by),
    )
    return p, np.cumsum(p)


def uniform_of(row: Row) -> float:
    return reference.sample_uniform(row.get("seed", 0), row.get("sample_index", 0), row.get("position", 0))


def check_token(logits: Float64, row: Row, token: int, by_cpu: int) -> None:
    """`token` is what the oracle draws, or there is a boundary within 1e-6 that says why it is not."""
    if np.all(np.isneginf(logits)):
        assert token == by_cpu == -1
        return
    u = uniform_of(row)
    nearby = (1.0, 1.0 - SLACK, 1.0 + SLACK)
    by_top_p = nearby if row.get("top_p", 1.0) < 1.0 else nearby[:1]
    by_min_p = nearby if row.get("min_p", 0.0) > 0.0 else nearby[:1]
    explained = False
    for a, b in itertools.product(by_top_p, by_min_p):
        p, upto = cumulative(logits, row, a, b)
        near = p[token] > 0.0 and upto[token] - p[token] - SLACK <= u <= upto[token] + SLACK
        explained = explained or token == reference.draw(p, u) or near
    assert explained, f"{token} is not drawn by {u} nor near it"
    if token != by_cpu:
        _, upto = cumulative(logits, row)
        assert np.min(np.abs(upto - u)) < SLACK, f"{token}, and not the CPU's {by_cpu}, without a boundary"


def check(logits: Float32, rows: list[Row], result: Result) -> None:
    """Tokens against oracle and CPU, all else against the CPU, whose own tests compare it with the oracle."""
    by_cpu = _core.sample(logits, make_batch(rows))
    for r, row in enumerate(rows):
        token = int(result["tokens"][r])
        if row.get("kind", 0) == 0:
            check_token(edited(logits[r], row), row, token, int(by_cpu["tokens"][r]))
        else:
            assert token == row["target"]
        n = row.get("num_logprobs", -1)
        if n < 0:
            continue
        with np.errstate(invalid="ignore"):
            exact = reference.log_softmax(logits[r].astype(np.float64))
        if token >= 0:
            np.testing.assert_allclose(result["logprob"][r], exact[token], rtol=1e-6, atol=1e-6)
            assert result["rank"][r] == reference.rank(logits[r], token)
        if not np.all(np.isneginf(logits[r])):
            n = min(n, logits.shape[1])
            ids, logprobs = reference.top_logprobs(logits[r], n)
            np.testing.assert_array_equal(result["top_ids"][r, :n], ids)
            np.testing.assert_allclose(result["top_logprobs"][r, :n], logprobs, rtol=1e-6, atol=1e-6)


# ---- parts -------------------------------------------------------------------------------------------------


@triton.jit
def uniforms_kernel(seed, sample_index, position, out):  # type: ignore[no-untyped-def]
    r = tl.program_id(0)
    u = sample_uniform(tl.load(seed + r), tl.load(sample_index + r), tl.load(position + r))
    tl.store(out + r, u)


def test_random_numbers_are_the_cpus() -> None:
    rng = np.random.default_rng(1)
    edges = [(0, 0, 0), (2**64 - 1, 2**31 - 1, 2**31 - 1), (2**63, 1, 0), (2**32, 0, 1), (2**32 - 1, 5, 9)]
    keys = edges + [
        (int(rng.integers(0, 2**64, dtype=np.uint64)), int(rng.integers(2**31)), int(rng.integers(2**31)))
        for _ in range(60)
    ]
    seed, index, position = zip(*keys, strict=True)
    out = torch.zeros(len(keys), dtype=torch.float64, device=DEVICE)
    uniforms_kernel[(len(keys),)](
        torch.from_numpy(np.array(seed, np.uint64).view(np.int64)).to(DEVICE),
        torch.tensor(index, dtype=torch.int32, device=DEVICE),
        torch.tensor(position, dtype=torch.int32, device=DEVICE),
        out,
    )
    expected = [_core.sample_uniform(*key) for key in keys]
    np.testing.assert_array_equal(out.cpu().numpy(), expected)


@triton.jit  # type: ignore[untyped-decorator]
def parts_kernel(x, masses, keys, values, ids, top, inverse, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    v = tl.load(x + i)
    key = key_of(v, i)
    tl.store(masses + i, mass_of(v, tl.load(top), tl.load(inverse)))
    tl.store(keys + i, key)
    tl.store(values + i, value_of(key))
    tl.store(ids + i, id_of(key))


@pytest.mark.parametrize(("top", "inverse"), [(0.0, 1.0), (11.25, 0.7), (-3.0, 20.0), (5e4, 1.0), (0.0, 1e5)])
def test_masses_and_keys(top: float, inverse: float) -> None:
    n = 1024
    rng = np.random.default_rng(3)
    x = (top - rng.exponential(8.0, n) / inverse).astype(np.float32)
    x[:8] = [
        top,
        -np.inf,
        np.float32(-3.4e38),
        -0.0 if top == 0 else top,
        0.0 if top >= 0 else top,
        top,
        top,
        top,
    ]
    arrays = [torch.zeros(n, dtype=kind, device=DEVICE) for kind in (torch.int64,) * 2]
    values = torch.zeros(n, device=DEVICE)
    ids = torch.zeros(n, dtype=torch.int32, device=DEVICE)
    numbers = [torch.tensor([value], device=DEVICE) for value in (top, inverse)]
    parts_kernel[(1,)](
        torch.from_numpy(x).to(DEVICE), *arrays, values, ids, *numbers, N=n, enable_fp_fusion=False
    )
    masses, keys = (array.cpu().numpy() for array in arrays)
    with np.errstate(over="ignore"):
        y = (x - np.float32(top)) * np.float32(inverse)  # rounded as the CPU does
    exact = np.exp(y.astype(np.float64)) * 2.0**43
    assert np.all(np.abs(masses - exact) <= 1.0 + 4e-7 * exact)
    assert masses[0] == 2**43
    assert masses[1] == masses[2] == 0
    np.testing.assert_array_equal(np.argsort(-keys), np.argsort(-x, kind="stable"))
    np.testing.assert_array_equal(values.cpu().numpy(), x)
    np.testing.assert_array_equal(ids.cpu().numpy(), np.arange(n))
    assert keys.min() >= 0


# ---- tokens ------------------------------------------------------------------------------------------------


@st.composite
def logit_rows(draw: st.DrawFn, rows: int, coarse: bool) -> Float32:
    """(rows, V): peaked or flat, with or without ties and -inf. Coarse: multiples of 1/8 up to 16, with which
    float32 computes edits exactly."""
    vocab = draw(st.sampled_from([1, 2, 31, 129, 400, 1003]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = rng.standard_normal((rows, vocab)) * draw(st.sampled_from([0.01, 1.0, 1.0, 4.0]))
    logits += draw(st.sampled_from([3.0, 0.0, -5.0]))
    if coarse or draw(st.booleans()):
        logits = np.clip(np.round(logits * 8) / 8, -16, 16)
    if draw(st.booleans()):
        holes = rng.random((rows, vocab)) < 0.3
        holes[:, vocab // 2] = False
        logits[holes] = -np.inf
    return logits.astype(np.float32)


@st.composite
def random_rows(draw: st.DrawFn, vocab: int) -> Row:
    return {
        "temperature": draw(st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.0, 2.5])),
        "top_k": draw(st.sampled_from([0, 0, 1, 2, 20, vocab - 1, vocab, vocab + 7])),
        "top_p": draw(st.sampled_from([1.0, 1.0, 1e-6, 0.3, 0.9, 0.99, 0.999999])),
        "min_p": draw(st.sampled_from([0.0, 0.0, 1e-30, 0.01, 0.2, 1.0])),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "sample_index": draw(st.integers(0, 2**31 - 1)),
        "position": draw(st.integers(0, 2**31 - 1)),
    }


@st.composite
def edits(draw: st.DrawFn, vocab: int) -> Row:
    """Bias, bans, a mask and penalties on a coarse grid, with ids that come more than once."""
    tokens = st.lists(st.integers(0, min(vocab, 12) - 1), max_size=12)
    far = st.lists(st.integers(0, vocab - 1), max_size=5)
    bias_ids = draw(tokens) + draw(far)
    history = draw(tokens) * draw(st.integers(1, 9)) + draw(far)
    allowed = st.integers(0, 2**32).map(
        lambda seed: np.flatnonzero(np.random.default_rng(seed).random(vocab) < 0.5).tolist()
    )
    mask = draw(st.one_of(st.none(), st.none(), allowed, far))
    return {
        "bias_ids": bias_ids,
        "bias_values": [draw(st.integers(-16, 16)) / 8 for _ in bias_ids],
        "banned": draw(st.one_of(st.just([]), tokens, far)),
        **({} if mask is None else {"vocab": vocab, "allowed": mask}),
        "history": history,
        "history_prompt_len": draw(st.integers(0, len(history))),
        "repetition": draw(st.sampled_from([1.0, 2.0, 0.5])),
        "presence": draw(st.integers(-8, 8)) / 4,
        "frequency": draw(st.integers(-8, 8)) / 4,
    }


@SIZES
@EXAMPLES
@given(st.data())
def test_draws(sizes: dict[str, int], data: st.DataObject) -> None:
    logits = data.draw(logit_rows(4, coarse=False))
    rows = [data.draw(random_rows(logits.shape[1])) for _ in logits]
    check(logits, rows, sample(logits, rows, sizes, edits=False, logprobs=False))


@SIZES
@EXAMPLES
@given(st.data())
def test_draws_after_edits(sizes: dict[str, int], data: st.DataObject) -> None:
    logits = data.draw(logit_rows(3, coarse=True))
    vocab = logits.shape[1]
    rows = [data.draw(random_rows(vocab)) | data.draw(edits(vocab)) for _ in logits]
    check(logits, rows, sample(logits, rows, sizes, logprobs=False))


@SIZES
@EXAMPLES
@given(st.data())
def test_log_probabilities(sizes: dict[str, int], data: st.DataObject) -> None:
    """Of the raw logits, whatever the bias, for sampled and given tokens; ties by id."""
    logits = data.draw(logit_rows(3, coarse=data.draw(st.booleans())))
    vocab = logits.shape[1]
    counts = st.sampled_from([0, 1, 3, 20, 64, min(vocab + 5, 64)])
    target = data.draw(st.integers(0, vocab - 1))
    rows: list[Row] = [
        {"num_logprobs": data.draw(counts), "bias_ids": [target], "bias_values": [100.0]},
        {"num_logprobs": data.draw(counts), "kind": 1, "target": target},
        {"num_logprobs": data.draw(counts), "temperature": 1.0, "top_p": 0.9, "seed": target},
    ]
    check(logits, rows, sample(logits, rows, sizes))


FILTERS: list[Row] = [
    {},
    {"top_k": 30},
    {"top_p": 0.9},
    {"top_p": 0.5},
    {"min_p": 0.3},
    {"min_p": 0.1, "top_p": 0.7},
    {"top_k": 200, "top_p": 0.7, "min_p": 0.05},
    {"top_k": 400},
]


@SIZES
def test_many_draws_of_one_row(sizes: dict[str, int]) -> None:
    """Of a nearly flat distribution, where a wrong boundary shows."""
    rng = np.random.default_rng(8)
    logits = np.repeat(rng.uniform(9.0, 10.0, (1, 500)).astype(np.float32), 3 * len(FILTERS), axis=0)
    rows: list[Row] = [
        row | {"temperature": 0.8, "seed": int(rng.integers(2**63)), "position": i}
        for i in range(3)
        for row in FILTERS
    ]
    check(logits, rows, sample(logits, rows, sizes, edits=False, logprobs=False))


@SIZES
def test_equals(sizes: dict[str, int]) -> None:
    """A nucleus of equals is cut by id, top_k keeps all that equal the last, the top n are of low ids."""
    logits = np.zeros((7, 600), np.float32)
    logits[:, ::2] = -0.0  # as good as the other zero
    logits[5:, 300:] = 1.0
    rows: list[Row] = [{"temperature": 1.0, "top_p": 0.25, "seed": seed} for seed in range(2)]
    rows += [{"temperature": 1.0, "top_p": 0.0025, "seed": 18}]  # the first two, with a number of 0.524
    rows += [{"temperature": 1.0, "top_k": 3, "seed": seed} for seed in range(2)]
    rows += [{"temperature": 1.0, "top_k": 3, "top_p": 0.5, "seed": 1}, {"num_logprobs": 64}]
    rows[0]["num_logprobs"] = 2
    result = sample(logits, rows, sizes)
    check(logits, rows, result)
    assert 75 < result["tokens"][:2].max() < 150
    assert result["tokens"][2] == 1
    assert result["tokens"][3:5].max() > 300
    assert 300 <= result["tokens"][5] < 450
    assert result["tokens"][6] == 300
    np.testing.assert_array_equal(result["top_ids"][0, :2], [0, 1])
    np.testing.assert_array_equal(result["top_ids"][6], np.arange(300, 364))
    np.testing.assert_array_equal(result["rank"][[0, 6]], 1)


def test_top_k_beyond_what_is_allowed() -> None:
    """More wanted than there are tokens, and more than there are blocks: the whole row is searched."""
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((4, 900)).astype(np.float32)
    few, many = [3, 500, 501, 899], list(range(0, 900, 3))
    rows: list[Row] = [
        {"temperature": 1.0, "top_k": 400, "seed": 1, "vocab": 900, "allowed": few},
        {"temperature": 1.0, "top_k": 850, "seed": 2, "top_p": 0.99},
        {"temperature": 1.0, "top_k": 400, "seed": 3, "vocab": 900, "allowed": many},
        {"temperature": 1.0, "top_k": 400, "seed": 4, "vocab": 900, "allowed": many, "min_p": 0.5},
    ]
    result = sample(logits, rows, SMALL, logprobs=False)
    check(logits, rows, result)
    assert result["tokens"][0] in few


def test_a_top_n_of_impossible_tokens() -> None:
    """-inf and the lowest number, which others use in its place, take part in the order.

    More are asked for than there are blocks, so that none are gathered before the row is searched.
    """
    logits = np.full((3, 460), -np.inf, np.float32)
    logits[:, 17], logits[:, 400] = 2.0, 3.0
    logits[1, 100:450] = -3.4028234663852886e38
    logits[1, 400] = 3.0
    logits[2, 100:130] = -3.4028234663852886e38
    rows: list[Row] = [{"num_logprobs": 60}] * 3
    result = sample(logits, rows, SMALL)
    check(logits, rows, result)
    np.testing.assert_array_equal(result["top_ids"][0, :5], [400, 17, 0, 1, 2])
    np.testing.assert_array_equal(result["top_ids"][1, :4], [400, 17, 100, 101])
    np.testing.assert_array_equal(result["top_ids"][2, 31:34], [129, 0, 1])


def test_a_long_history() -> None:
    """Longer than the vocabulary, in many parts; a token is penalised once, by its count in the output."""
    rng = np.random.default_rng(4)
    vocab = 50
    logits = (rng.integers(-24, 24, (3, vocab)) / 8).astype(np.float32)
    history = rng.integers(0, vocab, 3000).tolist()
    row = {"history": history, "history_prompt_len": 1000, "presence": 0.5, "frequency": 1 / 256, "seed": 3}
    rows = [row, row | {"repetition": 2.0, "temperature": 1.0}, row | {"history_prompt_len": 3000}]
    check(logits, rows, sample(logits, rows, logprobs=False))


def test_edits_round_as_on_the_cpu() -> None:
    """Greedy tokens of rows in which hundreds of pairs are but a rounding apart."""
    rng = np.random.default_rng(6)
    base = rng.standard_normal(20).astype(np.float32)
    logits = (base[rng.integers(0, 20, (6, 300))] * np.float32(1.0)).astype(np.float32)
    rows = []
    for r in range(len(logits)):
        tokens = rng.integers(0, 300, 400).tolist()
        rows.append(
            {
                "bias_ids": list(range(300)),
                "bias_values": ((-1) ** r * 3.0 + 0.1 * rng.integers(0, 3, 300) - logits[r])
                .astype(np.float32)
                .tolist(),
                "history": tokens,
                "history_prompt_len": 100,
                "repetition": 1.1 + 0.07 * r,
                "presence": 0.3,
                "frequency": 0.013,
            }
        )
    by_cpu = _core.sample(logits, make_batch(rows))["tokens"]
    np.testing.assert_array_equal(sample(logits, rows)["tokens"], by_cpu)


# ---- rows that are broken, empty or none -------------------------------------------------------------------


@SIZES
def test_a_broken_row_fails_alone(sizes: dict[str, int]) -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((8, 300)).astype(np.float32)
    rows: list[Row] = [
        {"num_logprobs": 2},
        {"temperature": 1.0, "top_p": 0.9, "num_logprobs": 2},
        {"kind": 1, "target": 5, "num_logprobs": 0},
        {"temperature": 1.0, "bias_ids": [7], "bias_values": [1.0]},
    ] * 2
    good = sample(logits[:4], rows[:4], sizes)
    logits[4, 299], logits[5, 0], logits[6, 64], logits[7, 7] = np.nan, np.inf, np.inf, -np.nan
    result = sample(logits, rows, sizes)
    np.testing.assert_array_equal(result["tokens"][4:], -1)
    np.testing.assert_array_equal(result["rank"][4:], 0)
    assert np.all(np.isnan(result["logprob"][4:]))
    for r, row in enumerate(rows[:4]):
        assert row_bits(result, r, row) == row_bits(good, r, row)


def test_nothing_to_choose() -> None:
    logits = np.full((4, 300), -np.inf, np.float32)
    logits[1:] = 0.0
    everything = list(range(300))
    rows: list[Row] = [
        {"num_logprobs": 1},
        {"banned": everything, "temperature": 1.0, "num_logprobs": 1},
        {"bias_ids": [200], "bias_values": [np.inf]},
        {"temperature": 1.0, "top_k": 3, "vocab": 300, "allowed": []},
    ]
    for sizes in (LARGE, SMALL):
        result = sample(logits, rows, sizes)
        np.testing.assert_array_equal(result["tokens"], -1)
        assert np.all(np.isnan(result["logprob"]))
        assert result["top_ids"][1, 0] == 0, "the raw logits have a best token"


@SIZES
def test_padding_and_pooled_rows(sizes: dict[str, int]) -> None:
    """Nothing is written for padding, whose parameters may be anything; a row to pool has token 0."""
    rng = np.random.default_rng(7)
    logits = rng.standard_normal((5, 300)).astype(np.float32)
    logits[3:] = np.nan
    wild = {"temperature": 1.0, "top_k": 5, "num_logprobs": 2, "presence": 1.0, "history": [1, 2], "kind": -1}
    rows: list[Row] = [
        {"temperature": 1.0, "num_logprobs": 2},
        {"kind": 2},
        {"top_k": 3, "temperature": 0.5},
        wild,
        wild,
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes.items():
            patch.setattr(sampler, name, size)
        out = filled(SampleOutputs, 5, 2)
        sampler.sample(torch.from_numpy(logits).to(DEVICE), on_device(make_batch(rows)), 2, out)
    for name in NAMES:
        assert torch.all(getattr(out, name)[3:] == SENTINEL), name
    assert out.tokens[1] == 0
    alone = sample(logits[:3], rows[:3], sizes)
    np.testing.assert_array_equal(out.tokens[:3].cpu().numpy(), alone["tokens"])


# ---- the same whatever is around ---------------------------------------------------------------------------


@SIZES
@settings(EXAMPLES, max_examples=40 if GPU else 3)
@given(st.data())
def test_a_row_depends_on_nothing_else(sizes: dict[str, int], data: st.DataObject) -> None:
    """The same bits alone, among others, with strided logits, used memory and only the kernels it needs."""
    logits = data.draw(logit_rows(3, coarse=False))
    vocab = logits.shape[1]
    rows: list[Row] = [data.draw(random_rows(vocab)) for _ in logits]
    rows[0] |= data.draw(edits(vocab))
    for row in rows[:2]:
        row["num_logprobs"] = min(vocab, data.draw(st.sampled_from([-1, 0, 3, 20])))
    together = sample(logits, rows, sizes)
    for r, row in enumerate(rows):
        needs = {"edits": r == 0, "logprobs": r < 2, "filters": any(row[n] != off for n, off in OFF.items())}
        alone = sample(logits[r : r + 1], [row], sizes, **needs)
        assert row_bits(alone, 0, row) == row_bits(together, r, row)
    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes.items():
            patch.setattr(sampler, name, size)
        scratch, out = filled(SamplerScratch, 7, vocab), filled(SampleOutputs, 3, 30)
        wide = torch.full((3, vocab + 3), float("nan"), device=DEVICE)
        wide[:, 1 : vocab + 1] = torch.from_numpy(logits[::-1].copy()).to(DEVICE)
        sampler.sample(wide[:, 1 : vocab + 1], on_device(make_batch(rows[::-1])), 20, out, scratch=scratch)
    backwards = {name: getattr(out, name).cpu().numpy()[::-1] for name in NAMES}
    for r, row in enumerate(rows):
        assert row_bits(backwards, r, row) == row_bits(together, r, row)


OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


# ---- arguments ---------------------------------------------------------------------------------------------


def test_wrong_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = on_device(make_batch([{}, {}]))
    logits = torch.zeros(2, 40, device=DEVICE)
    scratch = SamplerScratch.allocate(2, 40, DEVICE, edits=False)
    for arguments, options, match in (
        ((logits.half(), rows, 0), {}, "logits.*float16"),
        ((logits.t(), rows, 0), {}, "logits"),
        ((logits[0], rows, 0), {}, "logits"),
        ((logits[:1], rows, 0), {}, r"rows\.row_kind.*\(1,\)"),
        (([0.0], rows, 0), {}, "logits.*list"),
        ((logits, rows, 2000), {}, "max_logprobs.*2000"),
        ((logits, replace(rows, seed=rows.top_k), 0), {}, r"rows\.seed.*int64"),
        ((logits, replace(rows, bias_start=rows.top_k), 0), {}, r"rows\.bias_start"),
        ((logits, replace(rows, mask_words=rows.top_k[None, :1]), 0), {}, r"rows\.mask_words.*\(1, 2\)"),
        ((logits, rows, 3, SampleOutputs.allocate(2, 2, DEVICE)), {}, r"out\.top_ids.*\(2, 3\)"),
        ((logits, rows, 0), {"scratch": scratch}, "scratch.*0 edited"),
        ((logits[:, :39], rows, 0), {"scratch": scratch, "edits": False}, "scratch.*rows of 40"),
    ):
        with pytest.raises(RequestError, match=match):
            sampler.sample(*arguments, **options)
    assert scratch.nbytes < SamplerScratch.allocate(2, 40, DEVICE).nbytes
    assert sampler.sample(logits, rows, 0, scratch=scratch, edits=False).tokens.tolist() == [0, 0]
    none = sampler.sample(logits[:0], on_device(make_batch([])), 3)
    assert none.top_ids.shape == (0, 3)
    monkeypatch.setattr(sampler, "INTERPRETED", False)
    with pytest.raises(RequestError, match="CUDA device"):
        sampler.sample(logits.cpu(), rows, 0)
