"""The parser of event streams: the same events however the bytes are cut, and those of the standard."""

from __future__ import annotations

import re
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm.bench.sse import Event, SSEError, SSEParser


def parse(pieces: list[bytes]) -> list[Event]:
    parser = SSEParser()
    return [event for piece in pieces for event in parser.feed(piece)] + parser.close()


def oracle(stream: bytes) -> list[Event]:
    """The standard's algorithm on the whole stream at once."""
    text = stream.decode("utf-8", "replace").removeprefix("\ufeff")
    events, data, name, last = [], [], "", ""
    for line in [*re.split("\r\n|\n|\r", text), ""]:  # the end of the stream ends a line and an event
        if not line:
            if data:
                events.append(Event("\n".join(data), name or "message", last))
            data, name = [], ""
            continue
        if line.startswith(":"):
            continue
        field, _, value = line.partition(":")
        value = value[1:] if value.startswith(" ") else value
        if field == "data":
            data.append(value)
        elif field == "event":
            name = value
        elif field == "id" and "\0" not in value:
            last = value
    return events


lines = st.one_of(
    st.sampled_from(
        ["data", "data:", "data: [DONE]", ": comment", ":", "event: error", "id: 7", "retry: 10", ""]
    ),
    st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12).map(
        lambda text: f"data: {text}"
    ),
    st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12),
)
streams = st.lists(st.tuples(lines, st.sampled_from(["\n", "\r\n", "\r", "\n\n", "\r\n\r\n", "\r\r"]))).map(
    lambda parts: "".join(line + end for line, end in parts).encode()
)


@given(streams | st.binary(max_size=60), st.lists(st.integers(0, 400), max_size=12))
def test_any_cut_gives_the_events_of_the_whole(stream: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [stream[low:high] for low, high in pairwise(edges)]
    assert parse(pieces) == parse([stream]) == parse([bytes([byte]) for byte in stream]) == oracle(stream)


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\n", [Event("a")]),
        (b"data:a\r\n\r\n", [Event("a")]),
        (b"data:  a\r\r", [Event(" a")]),
        (b"data: a\ndata\ndata: b\n\n", [Event("a\n\nb")]),
        (b": hello\n\n: again\n\n", []),
        (b"event: error\ndata: {}\n\ndata: x\n\n", [Event("{}", "error"), Event("x")]),
        (b"event: lost\n\ndata: x\n\n", [Event("x")]),
        (b"id: 3\ndata: x\n\ndata: y\n\n", [Event("x", id="3"), Event("y", id="3")]),
        (b"\xef\xbb\xbfdata: x\n\n", [Event("x")]),
        (b"data: \xff\n\n", [Event("\ufffd")]),
        (b"data: [DONE]", [Event("[DONE]")]),  # cut off before its blank line
        (b"DATA: x\n\nother: y\n\n", []),
    ],
)
def test_examples(stream: bytes, events: list[Event]) -> None:
    assert parse([stream]) == events


def test_an_event_comes_as_soon_as_its_blank_line() -> None:
    parser = SSEParser()
    assert parser.feed(b"data: a\r\n\r") == [Event("a")]
    assert parser.feed(b"\ndata: b\n") == []
    assert parser.feed(b"\n") == [Event("b")]


def test_an_endless_event_is_refused() -> None:
    parser = SSEParser(max_event_bytes=100)
    assert parser.feed(b"data: " + b"x" * 80 + b"\n\n") == [Event("x" * 80)]
    parser.feed(b"data: " + b"x" * 80)
    with pytest.raises(SSEError, match="more than 100 bytes"):
        parser.feed(b"x" * 80)
    with pytest.raises(SSEError, match="more than 100 bytes"):
        SSEParser(max_event_bytes=100).feed(b"data: x\n" * 20)


def test_the_time_is_linear_in_the_bytes() -> None:
    """One line of 2 MB in pieces of 16 bytes: quadratic work would be 131,072 searches of a megabyte."""
    parser = SSEParser()
    begin = time.process_time()
    parser.feed(b"data: ")
    for _ in range(131_072):
        parser.feed(b"x" * 16)
    assert parser.feed(b"\n\n") == [Event("x" * (131_072 * 16))]
    assert time.process_time() - begin < 5.0
