"""When requests arrive and what they ask: statistics of the processes, and that a seed decides everything."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm.bench.arrivals import Spike, arrival_times
from fastllm.bench.lengths import Lengths
from fastllm.bench.prompts import (
    MEASURED,
    WARM_UP,
    Dataset,
    FittedCount,
    RandomWords,
    TokenizerCount,
    random_text,
    read_dataset,
)
from fastllm.errors import RequestError

N = 20_000


@pytest.mark.parametrize(
    ("process", "burstiness", "cv2"),
    [
        ("poisson", 1.0, 1.0),
        ("gamma", 0.25, 4.0),
        ("gamma", 4.0, 0.25),
        ("gamma", 1.0, 1.0),
        ("constant", 1.0, 0.0),
    ],
)
def test_gaps_have_the_mean_and_the_variance_of_their_process(
    process: str, burstiness: float, cv2: float
) -> None:
    times = arrival_times(process, 50.0, 3, requests=N, burstiness=burstiness)
    gaps = np.diff(times)
    assert len(times) == N
    # The standard errors over 20,000 gaps: of the mean cv / sqrt(N), of the variance below 5 % here.
    assert gaps.mean() == pytest.approx(1 / 50, rel=4 * math.sqrt(cv2 / N) + 1e-9)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(cv2, rel=0.15, abs=1e-9)


def test_poisson_counts_of_seconds_are_poisson() -> None:
    """Mean and variance of the counts are equal, and neighbouring seconds do not know of each other."""
    times = arrival_times("poisson", 20.0, 1, seconds=1000.0)
    counts = np.bincount(np.array(times, int), minlength=1000)
    assert counts.mean() == pytest.approx(20.0, rel=0.03)
    assert counts.var() == pytest.approx(20.0, rel=0.15)
    assert abs(np.corrcoef(counts[:-1], counts[1:])[0, 1]) < 0.1


@pytest.mark.parametrize("process", ["poisson", "gamma", "constant"])
def test_a_spike_multiplies_the_rate_and_only_there(process: str) -> None:
    spikes = [Spike(20.0, 10.0, 10.0)]
    times = np.array(arrival_times(process, 100.0, 2, seconds=60.0, spikes=spikes, burstiness=0.5))
    inside = ((times >= 20) & (times < 30)).sum()
    before, after = (times < 20).sum(), (times >= 30).sum()
    assert inside == pytest.approx(10_000, rel=0.05)
    assert before == pytest.approx(2000, rel=0.12)
    assert after == pytest.approx(3000, rel=0.12)


def test_constant_arrivals_are_exact_through_a_spike() -> None:
    times = arrival_times("constant", 2.0, 0, seconds=4.0, spikes=[Spike(1.0, 1.0, 4.0)])
    assert times == pytest.approx([0, 0.5, *np.arange(1, 2, 0.125), 2.0, 2.5, 3.0, 3.5])


def test_overlapping_spikes_multiply() -> None:
    spikes = [Spike(0.0, 10.0, 2.0), Spike(5.0, 10.0, 3.0)]
    times = np.array(arrival_times("constant", 10.0, 0, seconds=20.0, spikes=spikes))
    counts = [((times >= low) & (times < low + 5)).sum() for low in (0, 5, 10, 15)]
    assert counts == [100, 300, 150, 50]


@given(
    st.sampled_from(["poisson", "gamma", "constant"]),
    st.floats(0.5, 200),
    st.integers(0, 2**32),
    st.lists(st.builds(Spike, st.floats(0, 5), st.floats(0.1, 5), st.floats(0.1, 20)), max_size=3),
    st.floats(0.1, 8),
    st.integers(1, 60),
)
def test_arrivals_are_in_order_within_the_time_and_decided_by_the_seed(
    process: str, rate: float, seed: int, spikes: list[Spike], seconds: float, requests: int
) -> None:
    def make(**limits: Any) -> list[float]:
        return arrival_times(process, rate, seed, spikes=spikes, burstiness=0.7, **limits)

    timed, counted = make(seconds=seconds), make(requests=requests)
    assert timed == make(seconds=seconds)
    assert all(early <= late for early, late in pairwise(timed))
    assert all(0 <= time < seconds + 1e-9 for time in timed)
    assert len(counted) == requests
    both = make(seconds=seconds, requests=requests)
    assert both == pytest.approx(timed[:requests])
    shorter = min(len(timed), requests)
    assert counted[:shorter] == pytest.approx(timed[:shorter])


@pytest.mark.parametrize(
    "bad",
    [
        {"process": "uniform"},
        {"rate": 0.0},
        {"rate": math.inf},
        {"burstiness": 0.0},
        {"requests": None},
        {"requests": None, "seconds": 1e9},
    ],
)
def test_bad_arrivals_are_refused(bad: dict[str, Any]) -> None:
    given = {"process": "poisson", "rate": 10.0, "seed": 0, "requests": 5, **bad}
    with pytest.raises(RequestError):
        arrival_times(given.pop("process"), given.pop("rate"), given.pop("seed"), **given)


@pytest.mark.parametrize("text", ["1:2", "a:b:c", "-1:1:2", "0:0:2", "0:1:0", "nan:1:2", "0:inf:2"])
def test_bad_spikes_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="spike"):
        Spike.parse(text)


# -- lengths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mean", "deviation", "least", "most"),
    [
        ("128", 128, 0, 128, 128),
        ("uniform:10:20", 15, math.sqrt((11**2 - 1) / 12), 10, 20),
        ("normal:200:20", 200, 20, 100, 300),
        ("lognormal:200:100", 200, 100, 1, 5000),
    ],
)
def test_lengths_have_their_mean_and_deviation(
    text: str, mean: float, deviation: float, least: int, most: int
) -> None:
    random, lengths = np.random.default_rng(4), Lengths.parse("prompt_tokens", text)
    drawn = np.array([lengths.draw(random) for _ in range(5000)])
    assert drawn.mean() == pytest.approx(mean, rel=0.03)
    assert drawn.std() == pytest.approx(deviation, rel=0.08, abs=1e-9)
    assert least <= drawn.min() <= drawn.max() <= most


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "1.5", "uniform:5", "uniform:9:5", "normal:10", "zipf:1:2", "x", "normal:1:-1", "nan"],
)
def test_bad_lengths_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="output_tokens"):
        Lengths.parse("output_tokens", text)


# -- prompts -------------------------------------------------------------------------------------------------


def by_letters(text: str) -> list[int]:
    """A tokenizer with tokens of up to three letters, so that words have several."""
    return [len(word[i : i + 3]) for word in text.split() for i in range(0, len(word), 3)]


@given(st.integers(1, 400), st.integers(0, 2**32))
def test_text_has_the_wanted_number_of_tokens_where_they_can_be_counted(tokens: int, seed: int) -> None:
    counter = TokenizerCount(by_letters)
    have = len(by_letters(random_text(np.random.default_rng(seed), tokens, counter)))
    assert abs(have - tokens) <= 3  # a word may have up to three tokens, and there is at least one word


def test_words_are_fitted_to_what_a_server_counts() -> None:
    words = [8, 24, 48, 64, 8, 24]
    fitted = FittedCount.fit(words, [5 + round(1.25 * n) for n in words])
    assert fitted.overhead == pytest.approx(5, abs=0.2)
    assert fitted.per_word == pytest.approx(1.25, rel=0.01)
    with pytest.raises(RequestError, match="tokenizer"):
        FittedCount.fit(words, [7] * len(words))


def make_words(seed: int, **more: Any) -> RandomWords:
    lengths = Lengths.parse("prompt_tokens", "uniform:20:60"), Lengths.parse("output_tokens", "8")
    return RandomWords(seed, *lengths, FittedCount(2.0, 1.0), **more)


@given(st.integers(0, 1000), st.integers(0, 50))
def test_a_request_depends_on_seed_and_number_alone(seed: int, index: int) -> None:
    work = make_words(seed).make(index)
    later = make_words(seed)
    later.make(index + 1)
    assert later.make(index) == work
    others = [make_words(seed + 1).make(index), make_words(seed).make(index + 1)]
    assert work.prompt not in [other.prompt for other in others]
    assert make_words(seed).make(index, WARM_UP).prompt != make_words(seed).make(index, MEASURED).prompt
    assert work.prompt_tokens == len(str(work.prompt).split()) + 2


def test_prompts_share_the_prefixes_of_their_groups() -> None:
    source = make_words(3, prefix_groups=4, prefix_tokens=30)
    works = [source.make(index) for index in range(400)]
    starts = {work.group: str(work.prompt).split()[:30] for work in works}
    assert len(starts) == 4
    assert len({" ".join(start) for start in starts.values()}) == 4
    assert all(str(work.prompt).split()[:30] == starts[work.group] for work in works)
    assert all(work.prompt_tokens == len(str(work.prompt).split()) + 2 for work in works)
    counts = np.bincount([work.group or 0 for work in works])
    assert counts.min() > 60  # 100 are expected, with a deviation of 8.7
    chat = make_words(3, chat=True).make(0)
    assert [message["role"] for message in chat.prompt] == ["user"]  # type: ignore[index]


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_a_data_set_is_taken_in_order_or_shuffled(tmp_path: Path) -> None:
    lines = [{"prompt": f"p{i}", **({"max_tokens": i} if i else {})} for i in range(10)]
    path = write(tmp_path / "d.jsonl", *lines, "")
    plain = Dataset(path, 0, Lengths.parse("output_tokens", "7"))
    assert [plain.make(i).prompt for i in range(12)] == [f"p{i % 10}" for i in range(12)]
    assert [plain.make(i).max_tokens for i in range(4)] == [7, 1, 2, 3]
    assert plain.make(0, WARM_UP).prompt == "p9"
    shuffled = Dataset(path, 5, None, shuffle=True)
    order = [shuffled.make(i).prompt for i in range(10)]
    assert sorted(map(str, order)) == [f"p{i}" for i in range(10)]
    assert order != [f"p{i}" for i in range(10)]
    assert order == [Dataset(path, 5, None, shuffle=True).make(i).prompt for i in range(10)]
    assert Dataset(path, 0, None).make(0).max_tokens is None


def test_conversations_are_for_chat(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    path = write(tmp_path / "d.jsonl", {"messages": messages}, {"prompt": "text"})
    assert [line[0] for line in read_dataset(path, chat=True)] == [
        messages,
        [{"role": "user", "content": "text"}],
    ]
    with pytest.raises(RequestError, match=r"d\.jsonl:1: messages"):
        read_dataset(path, chat=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "d.jsonl:2: expected JSON"),
        ("[" * 100_000, "d.jsonl:2: expected JSON"),
        ([], "either `prompt` or `messages`"),
        ({"text": "a"}, "either `prompt` or `messages`"),
        ({"prompt": "a", "messages": []}, "either `prompt` or `messages`"),
        ({"prompt": 5}, "d.jsonl:2: prompt: expected a text"),
        ({"messages": []}, "d.jsonl:2: messages: expected a list"),
        ({"messages": ["a"]}, "d.jsonl:2: messages: expected a list"),
        ({"prompt": "a", "max_tokens": 0}, "d.jsonl:2: max_tokens"),
        ({"prompt": "a", "max_tokens": True}, "d.jsonl:2: max_tokens"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "d.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(RequestError) as caught:
        read_dataset(path, chat=True)
    assert message in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="No such file"):
        read_dataset(tmp_path / "none", chat=False)
    with pytest.raises(RequestError, match="at least one line"):
        read_dataset(write(tmp_path / "empty", ""), chat=False)
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(RequestError, match="UTF-8"):
        read_dataset(tmp_path / "bytes", chat=False)
