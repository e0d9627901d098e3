"""The sampler against the float64 oracle, and bit for bit against itself on every instruction set.

The sampler adds float32 exponentials, the oracle float64 ones, so a draw or a nucleus may fall to either side
of a boundary that lies within 1e-5 (relative) of the number drawn; everything else is equal.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm import _core, reference
from fastllm.errors import RequestError

Float32 = npt.NDArray[np.float32]
Result = dict[str, npt.NDArray[Any]]

ISAS = _core.supported_isas()
SLACK = 1e-5


def pack_mask(allowed: Sequence[int], vocab: int) -> npt.NDArray[np.uint32]:
    """A bit for each allowed id; those past the vocabulary, which nobody may look at, are all 1."""
    bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
    bits[list(allowed)] = 1
    bits[vocab:] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def make_batch(rows: list[dict[str, Any]]) -> SimpleNamespace:
    """The row attributes of a StepBatch; each row names what differs from greedy, no logprobs."""

    def column(name: str, default: float, dtype: type) -> npt.NDArray[Any]:
        return np.array([row.get(name, default) for row in rows], dtype)

    def lists(name: str, dtype: type) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
        parts = [list(row.get(name, [])) for row in rows]
        start = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int32)
        return start, np.array([x for part in parts for x in part], dtype)

    bias_start, bias_ids = lists("bias_ids", np.int32)
    banned_start, banned_ids = lists("banned", np.int32)
    history_start, history = lists("history", np.int32)
    masks = [pack_mask(row["allowed"], row["vocab"]) for row in rows if "allowed" in row]
    numbers = iter(range(len(masks)))
    return SimpleNamespace(
        row_kind=column("kind", 0, np.int32),
        row_target=column("target", -1, np.int32),
        num_logprobs=column("num_logprobs", -1, np.int32),
        temperature=column("temperature", 0.0, np.float32),
        top_k=column("top_k", 0, np.int32),
        top_p=column("top_p", 1.0, np.float32),
        min_p=column("min_p", 0.0, np.float32),
        presence=column("presence", 0.0, np.float32),
        frequency=column("frequency", 0.0, np.float32),
        repetition=column("repetition", 1.0, np.float32),
        seed=column("seed", 0, np.uint64),
        sample_index=column("sample_index", 0, np.int32),
        row_token=np.arange(len(rows), dtype=np.int32),
        positions=column("position", 0, np.int32),
        bias_start=bias_start,
        bias_ids=bias_ids,
        bias_values=lists("bias_values", np.float32)[1],
        banned_start=banned_start,
        banned_ids=banned_ids,
        mask_row=np.array([next(numbers) if "allowed" in row else -1 for row in rows], np.int32),
        mask_words=np.array(masks, np.uint32) if masks else np.zeros((0, 0), np.uint32),
        history_start=history_start,
        history=history,
        history_prompt_len=column("history_prompt_len", 0, np.int32),
    )


def sample(logits: Float32, rows: list[dict[str, Any]], isa: str = "") -> Result:
    result: Result = _core.sample(logits, make_batch(rows), isa=isa)
    return result


def edited(logits: Float32, row: dict[str, Any]) -> npt.NDArray[np.float64]:
    """The oracle's logits after bias, bans and penalties."""
    out = np.array(logits, np.float64)
    for token, value in zip(row.get("bias_ids", []), row.get("bias_values", []), strict=True):
        out = reference.apply_bias(out, {token: value})
    out = reference.apply_bias(out, banned=row.get("banned", []), allowed=row.get("allowed"))
    history, prompt = row.get("history", []), row.get("history_prompt_len", 0)
    return reference.apply_penalties(
        out,
        history[:prompt],
        history[prompt:],
        presence=row.get("presence", 0.0),
        frequency=row.get("frequency", 0.0),
        repetition=row.get("repetition", 1.0),
    )


def could_be_drawn(logits: npt.NDArray[np.float64], row: dict[str, Any], token: int) -> bool:
    """Whether the oracle draws `token`, for some nearby value of each boundary."""
    nearby = (1.0, 1.0 - SLACK, 1.0 + SLACK)
    u = reference.sample_uniform(row["seed"], row["sample_index"], row["position"])
    top_p, min_p = float(np.float32(row["top_p"])), float(np.float32(row["min_p"]))
    for a, b in itertools.product(
        nearby if top_p < 1.0 else nearby[:1], nearby if min_p > 0.0 else nearby[:1]
    ):
        p = reference.sampling_probabilities(
            logits,
            temperature=float(np.float32(row["temperature"])),
            top_k=row["top_k"],
            top_p=min(top_p * a, 1.0),
            min_p=min(min_p * b, 1.0),
        )
        above = float(np.sum(p[: token + 1]))
        if p[token] > 0.0 and above - p[token] - SLACK <= u <= above + SLACK:
            return True
    return False


@st.composite
def logit_rows(draw: st.DrawFn, rows: int) -> Float32:
    """(rows, V): peaked or flat, with or without ties and -inf."""
    vocab = draw(st.sampled_from([1, 2, 15, 16, 17, 63, 65, 128, 129, 255, 257, 1000, 5000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = rng.standard_normal((rows, vocab)) * draw(st.sampled_from([0.0, 0.01, 1.0, 4.0])) + 3.0
    if draw(st.booleans()):
        logits = np.round(logits * 4) / 4
    if draw(st.booleans()):
        holes = rng.random((rows, vocab)) < 0.3
        holes[:, vocab // 2] = False
        logits[holes] = -np.inf
    return logits.astype(np.float32)


@st.composite
def random_rows(draw: st.DrawFn, vocab: int) -> dict[str, Any]:
    return {
        "temperature": draw(st.sampled_from([0.3, 0.7, 1.0, 1.0, 2.5])),
        "top_k": draw(st.sampled_from([0, 0, 1, 2, 20, vocab - 1, vocab, vocab + 7])),
        "top_p": draw(st.sampled_from([1.0, 1.0, 1e-6, 0.3, 0.5, 0.9, 0.99, 0.999999])),
        "min_p": draw(st.sampled_from([0.0, 0.0, 1e-30, 0.01, 0.2, 1.0])),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "sample_index": draw(st.integers(0, 2**31 - 1)),
        "position": draw(st.integers(0, 2**31 - 1)),
        "num_logprobs": draw(st.sampled_from([-1, -1, 0, 1, 5, vocab])),
    }


def rows_equal(
    a: dict[str, npt.NDArray[Any]], i: int, b: dict[str, npt.NDArray[Any]], j: int, width: int
) -> bool:
    for name in ("tokens", "logprob", "rank"):
        if a[name][i].tobytes() != b[name][j].tobytes():
            return False
    return all(
        a[name][i, :width].tobytes() == b[name][j, :width].tobytes() for name in ("top_ids", "top_logprobs")
    )


@given(st.data())
def test_draws(data: st.DataObject) -> None:
    """What is drawn is what the oracle draws; on every instruction set, alone as in a batch."""
    logits = data.draw(logit_rows(3))
    vocab = logits.shape[1]
    rows = [data.draw(random_rows(vocab)) for _ in range(3)]
    result = sample(logits, rows, ISAS[0])
    for r, row in enumerate(rows):
        assert could_be_drawn(edited(logits[r], row), row, int(result["tokens"][r]))
    for isa in ISAS[1:]:
        other = sample(logits, rows, isa)
        assert all(result[name].tobytes() == other[name].tobytes() for name in result)
    for r, row in enumerate(rows):
        alone = sample(logits[r : r + 1], [row])
        assert rows_equal(result, r, alone, 0, max(row["num_logprobs"], 0))


@given(st.data())
def test_log_probabilities(data: st.DataObject) -> None:
    """Logprobs, ranks and top are the raw logits', whatever the bias, for sampled and given tokens."""
    logits = data.draw(logit_rows(2))
    vocab = logits.shape[1]
    count = data.draw(st.sampled_from([0, 1, 3, 20, vocab, vocab + 5]))
    target = data.draw(st.integers(0, vocab - 1))
    rows = [
        {"num_logprobs": count, "bias_ids": [target], "bias_values": [100.0]},
        {"num_logprobs": count, "kind": 1, "target": target},
    ]
    result = sample(logits, rows)
    for r in range(2):
        with np.errstate(invalid="ignore"):
            exact = reference.log_softmax(logits[r].astype(np.float64))
        token = int(result["tokens"][r])
        assert r == 0 or token == target
        assert np.isclose(result["logprob"][r], exact[token], rtol=2e-6, atol=2e-6)
        assert result["rank"][r] == reference.rank(logits[r], token)
        ids, logprobs = reference.top_logprobs(logits[r], min(count, vocab))
        assert np.array_equal(result["top_ids"][r], ids)
        assert np.allclose(result["top_logprobs"][r], logprobs, rtol=2e-6, atol=2e-6)


def masks(vocab: int) -> st.SearchStrategy[dict[str, Any]]:
    """No mask, a few ids, or all but a few."""
    few = st.lists(st.integers(0, vocab - 1), max_size=6)
    return st.one_of(
        st.just({}),
        few.map(lambda ids: {"vocab": vocab, "allowed": ids}),
        few.map(lambda ids: {"vocab": vocab, "allowed": [i for i in range(vocab) if i not in ids]}),
    )


@given(st.data())
def test_a_mask_is_a_list_of_banned_ids(data: st.DataObject) -> None:
    """Bit for bit, logprobs of the raw logits included, with every vocabulary's end within a word."""
    vocab = data.draw(st.sampled_from([1, 31, 32, 33, 64, 300, 1000]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits = rng.standard_normal((1, vocab)).astype(np.float32)
    allowed = data.draw(st.lists(st.integers(0, vocab - 1), max_size=40))
    row = {
        "temperature": data.draw(st.sampled_from([0.0, 0.7, 1.0])),
        "top_p": data.draw(st.sampled_from([0.5, 1.0])),
        "top_k": data.draw(st.sampled_from([0, 2])),
        "seed": data.draw(st.integers(0, 2**64 - 1)),
        "num_logprobs": min(3, vocab),
        "history": allowed[:2],
        "presence": 0.5,
    }
    banned = sample(logits, [row | {"banned": sorted(set(range(vocab)) - set(allowed))}])
    for isa in ISAS:
        masked = sample(np.repeat(logits, 2, axis=0), [{}, row | {"vocab": vocab, "allowed": allowed}], isa)
        assert rows_equal(masked, 1, banned, 0, min(3, vocab))
        assert masked["tokens"][0] == np.argmax(logits)
        assert masked["tokens"][1] in (allowed or [-1])


@given(st.data())
def test_greedy_after_bias_bans_and_penalties(data: st.DataObject) -> None:
    """On a coarse grid float32 and float64 agree exactly, so the greedy token does."""
    vocab = data.draw(st.sampled_from([3, 16, 40, 300]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits = (rng.integers(-24, 24, (1, vocab)) / 8).astype(np.float32)
    tokens = st.lists(st.integers(0, min(vocab, 12) - 1), max_size=12)
    history = data.draw(tokens)
    bias_ids = data.draw(tokens)
    row: dict[str, Any] = {
        "bias_ids": bias_ids,
        "bias_values": [data.draw(st.integers(-16, 16)) / 8 for _ in bias_ids],
        "banned": data.draw(tokens)[: vocab - 1],
        **data.draw(masks(vocab)),
        "history": history,
        "history_prompt_len": data.draw(st.integers(0, len(history))),
        "repetition": data.draw(st.sampled_from([1.0, 1.25, 2.0, 0.5])),
        "presence": data.draw(st.integers(-8, 8)) / 4,
        "frequency": data.draw(st.integers(-8, 8)) / 4,
    }
    expected = edited(logits[0], row)
    for isa in ISAS:
        token = int(sample(logits, [row], isa)["tokens"][0])
        if np.all(np.isneginf(expected)):
            assert token == -1
        else:
            assert token == int(np.argmax(expected))
    # The workspace carries nothing over: the same row twice, with others between, is the same.
    plain = {"temperature": 1.0, "seed": 5}
    both = sample(np.repeat(logits, 3, axis=0), [row, plain, row])
    assert both["tokens"][0] == both["tokens"][2]
    assert both["tokens"][1] == sample(logits, [plain])["tokens"][0]


def test_filters_that_remove_nothing_change_nothing(isa: str) -> None:
    rng = np.random.default_rng(2)
    logits = np.repeat(rng.standard_normal((1, 3000)).astype(np.float32), 200, axis=0)
    keys = [{"temperature": 0.8, "seed": int(seed)} for seed in rng.integers(0, 2**63, 200)]
    plain = sample(logits, keys, isa)["tokens"]
    filtered = sample(logits, [key | {"min_p": 1e-30, "top_k": 3000} for key in keys], isa)["tokens"]
    assert np.array_equal(plain, filtered)
    assert len(np.unique(plain)) > 100


def test_nucleus_of_equals_is_cut_by_id() -> None:
    logits = np.zeros((400, 1000), np.float32)
    rows = [{"temperature": 1.0, "top_p": 0.25, "seed": seed} for seed in range(400)]
    tokens = sample(logits, rows)["tokens"]
    assert tokens.max() < 250
    assert tokens.max() > 200
    ties = sample(logits, [row | {"top_p": 1.0, "top_k": 3} for row in rows])["tokens"]
    assert ties.max() > 900, "all that equal the k-th highest stay"


@given(
    st.integers(0, 2**32),
    st.sampled_from([40, 140, 300]),
    st.sampled_from([0.0, 0.01, 0.3]),
    st.sampled_from(
        [
            {"top_p": 0.5},
            {"top_p": 0.9},
            {"top_k": 30},
            {"min_p": 0.8},
            {"top_p": 0.7, "min_p": 0.75, "top_k": 250},
        ]
    ),
)
def test_everything_that_is_kept_is_drawn(
    seed: int, vocab: int, spread: float, filters: dict[str, float]
) -> None:
    """Of nearly equal probabilities, 8,000 draws meet each: just the tokens that the oracle keeps."""
    rng = np.random.default_rng(seed)
    logits = np.full((1, 1000), -2.0, np.float32)
    logits[0, rng.permutation(1000)[:vocab]] = 10.0 + rng.uniform(-spread, spread, vocab).astype(np.float32)
    rows = [filters | {"temperature": 1.0, "seed": seed, "position": position} for position in range(8000)]
    drawn = sample(np.repeat(logits, len(rows), axis=0), rows)["tokens"]
    kept = [
        np.flatnonzero(reference.sampling_probabilities(logits[0], temperature=1.0, **(filters | change)))
        for change in (
            [{"top_p": filters["top_p"] * (1 + e)} for e in (-SLACK, 0, SLACK)]
            if "top_p" in filters
            else [{}]
        )
    ]
    assert any(np.array_equal(np.unique(drawn), some) for some in kept)


def test_draws_follow_the_distribution() -> None:
    """4,000 draws from 8 tokens; every count within 5 standard deviations."""
    logits = np.log(np.array([[1, 2, 3, 4, 5, 6, 7, 8]], np.float64) / 36).astype(np.float32)
    rows = [{"temperature": 1.0, "seed": 7, "position": position} for position in range(4000)]
    tokens = sample(np.repeat(logits, 4000, axis=0), rows)["tokens"]
    p = np.arange(1, 9) / 36
    assert np.all(np.abs(np.bincount(tokens, minlength=8) - 4000 * p) < 5 * np.sqrt(4000 * p * (1 - p)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 63, 99])
def test_a_broken_row_fails_alone(isa: str, bad: float, place: int) -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((4, 100)).astype(np.float32)
    rows = [
        {"num_logprobs": 2},
        {"temperature": 1.0, "num_logprobs": 2},
        {"kind": 1, "target": 5, "num_logprobs": 0},
        {},
    ]
    good = sample(logits, rows, isa)
    for r in range(3):
        broken = logits.copy()
        broken[r, place] = bad
        result = sample(broken, rows, isa)
        assert result["tokens"][r] == -1
        assert np.isnan(result["logprob"][r])
        for other in set(range(4)) - {r}:
            assert rows_equal(result, other, good, other, 2)


def test_nothing_to_choose() -> None:
    logits = np.full((3, 5), -np.inf, np.float32)
    logits[1:] = 0.0
    everything = list(range(5))
    rows = [{}, {"banned": everything, "temperature": 1.0}, {"bias_ids": [2], "bias_values": [np.inf]}]
    assert np.array_equal(sample(logits, rows)["tokens"], [-1, -1, -1])


def test_zeros_of_both_signs_are_equal() -> None:
    logits = np.array([[-1.0, -0.0, 0.0, -0.0]], np.float32)
    result = sample(logits, [{"num_logprobs": 3}])
    assert result["tokens"][0] == 1
    assert result["rank"][0] == 1
    assert np.array_equal(result["top_ids"][0], [1, 2, 3])


@given(
    st.sampled_from([1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 49152]),
    st.integers(0, 2**32),
    st.sampled_from([0.1, 3.0, 30.0]),
)
def test_logits_summary(vocab: int, seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    logits = (spread * rng.standard_normal(vocab)).astype(np.float32)
    logits[rng.random(vocab) < 0.1] = -np.inf
    logits[rng.integers(vocab)] = np.max(logits) if np.any(np.isfinite(logits)) else 0.0
    highest, total, at = _core.logits_summary(logits, isa=ISAS[0])
    assert highest == np.max(logits)
    assert at == int(np.argmax(logits))
    exact = float(np.sum(np.exp(logits.astype(np.float64) - float(highest))))
    assert abs(total - exact) <= 2e-6 * exact
    for isa in ISAS[1:]:
        assert _core.logits_summary(logits, isa=isa) == (highest, total, at)
    place = int(rng.integers(vocab))
    logits[place] = np.nan
    for isa in ISAS:
        highest, total, at = _core.logits_summary(logits, isa=isa)
        assert np.isnan(highest)
        assert np.isnan(total)
        assert vocab == 1 or at != place or not np.any(logits > -np.inf)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers of the authors' library, Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    assert tuple(_core.philox(counter, key)) == words
    assert reference.philox4x32_10(counter, key) == words


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_uniform_numbers(seed: int, sample_index: int, position: int) -> None:
    u = _core.sample_uniform(seed, sample_index, position)
    assert 0.0 <= u < 1.0
    assert u == reference.sample_uniform(seed, sample_index, position)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"kind": 2}, "row_kind"),
        ({"kind": 1, "target": 8}, "row_target"),
        ({"kind": 1}, "row_target"),
        ({"num_logprobs": -2}, "num_logprobs"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": np.nan}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition": 0.0}, "repetition"),
        ({"presence": np.inf}, "presence"),
        ({"frequency": np.nan}, "frequency"),
        ({"bias_ids": [8], "bias_values": [1.0]}, "bias_ids"),
        ({"bias_ids": [1], "bias_values": []}, "bias_values"),
        ({"banned": [-1]}, "banned_ids"),
        ({"history": [9]}, "history"),
        ({"history": [1], "history_prompt_len": 2}, "history_prompt_len"),
    ],
)
def test_sample_refuses(change: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError, match=field):
        sample(np.zeros((1, 8), np.float32), [change])


def test_sample_refuses_arrays_of_another_shape() -> None:
    logits = np.zeros((2, 8), np.float32)
    batch = make_batch([{}, {}])
    with pytest.raises(RequestError, match="logits"):
        _core.sample(logits.astype(np.float64), batch)
    with pytest.raises(RequestError, match="row_kind"):
        _core.sample(logits[:1], batch)
    for words in (np.ones((1, 2), np.uint32), np.ones((1, 1), np.int32), np.ones(1, np.uint32)):
        batch.mask_words = words
        with pytest.raises(RequestError, match="mask_words"):
            _core.sample(logits, batch)
    batch.mask_words = np.ones((1, 1), np.uint32)
    for mask_row in ([0, 1], [-2, 0]):
        batch.mask_row = np.array(mask_row, np.int32)
        with pytest.raises(RequestError, match="mask_row"):
            _core.sample(logits, batch)
    batch.mask_row = np.array([0, -1], np.int32)
    assert _core.sample(logits, batch)["tokens"].tolist() == [0, 0]
    batch.row_kind = np.array([1, 0], np.int32)
    batch.row_target = np.array([0, -1], np.int32)
    with pytest.raises(RequestError, match="mask_row"):
        _core.sample(logits, batch)
    batch.row_kind = np.array([0, 0], np.int32)
    batch.history_start = np.array([0, 1, 0], np.int32)
    with pytest.raises(RequestError, match="history_start"):
        _core.sample(logits, batch)
