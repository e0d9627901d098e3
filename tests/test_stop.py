"""Stop strings: found wherever the text is cut, and never a character given out that must be taken back."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from fastllm.engine.stop import StopMatcher, StopStrings

text_strategy = st.text("ab", max_size=30) | st.text("abé€x", max_size=30)
stops_strategy = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


def first_stop(text: str, stops: list[str], after: int = 0) -> tuple[int, str] | None:
    """The oracle: read the text character by character; (start, string) of the stop that is complete first.

    Stops complete within the first `after` characters do not count.
    """
    for end in range(after + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return end - len(longest), longest
    return None


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted({cut % (len(text) + 1) for cut in cuts}), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(text_strategy, stops_strategy, st.lists(st.integers(0, 100), max_size=8), st.booleans())
def test_the_text_is_cut_at_the_first_stop_wherever_the_pieces_end(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    matcher = StopMatcher(StopStrings(stops), include=include)
    out = ""
    stop = None
    for piece in pieces_of(text, cuts):
        more, stop = matcher.push(piece)
        out += more
        if stop is not None:
            break
    else:
        out += matcher.flush()
    expected = first_stop(text, stops)
    if expected is None:
        assert (out, stop) == (text, None)
    else:
        start, string = expected
        assert (out, stop) == (text[: start + len(string)] if include else text[:start], string)


@given(text_strategy, stops_strategy)
def test_exactly_what_could_still_match_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(StopStrings(stops))
    out = ""
    for end in range(1, len(text) + 1):
        more, stop = matcher.push(text[end - 1])
        out += more
        if stop is not None:
            return
        prefixes = {string[:size] for string in stops for size in range(1, len(string))}
        held = max((len(prefix) for prefix in prefixes if text[:end].endswith(prefix)), default=0)
        assert out == text[: end - held]


@given(text_strategy, stops_strategy, st.integers(0, 30), st.lists(st.integers(0, 100), max_size=8))
def test_a_stop_counts_only_if_it_is_complete_in_armed_text(
    text: str, stops: list[str], unarmed: int, cuts: list[int]
) -> None:
    unarmed = min(unarmed, len(text))
    matcher = StopMatcher(StopStrings(stops))
    out, stop = matcher.push(text[:unarmed], armed=False)
    assert stop is None
    for piece in pieces_of(text[unarmed:], cuts):
        more, stop = matcher.push(piece)
        out += more
        if stop is not None:
            break
    else:
        out += matcher.flush()
    expected = first_stop(text, stops, after=unarmed)
    if expected is None:
        assert (out, stop) == (text, None)
    else:
        assert (out, stop) == (text[: expected[0]], expected[1])


def test_a_string_within_another() -> None:
    stops = StopStrings(["abcd", "c"])
    assert StopMatcher(stops).push("xabcd") == ("xab", "c")
    stops = StopStrings(["bc", "abc"])
    assert StopMatcher(stops).push("xabc") == ("x", "abc")


def test_a_long_repetitive_stop_string_takes_linear_time() -> None:
    matcher = StopMatcher(StopStrings(["a" * 1023 + "b"]))
    out = ""
    for _ in range(100):
        more, stop = matcher.push("a" * 1000)
        out += more
        assert stop is None
    assert len(out) == 100_000 - 1023
    assert matcher.push("b") == ("", "a" * 1023 + "b")


def test_a_stop_that_was_turned_down_holds_nothing_back() -> None:
    assert StopMatcher(StopStrings(["ab"])).push("xab", armed=False) == ("xab", None)
    assert StopMatcher(StopStrings(["aba"])).push("xaba", armed=False) == ("xab", None)
    assert StopMatcher(StopStrings(["ab", "abc"])).push("xab", armed=False) == ("x", None)
