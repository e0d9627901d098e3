"""From text to content and tool calls: the same however the text is cut, nothing lost, nothing raised, in
linear time.
"""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastllm import RequestError
from fastllm.serve.parsers import (
    FORMATS,
    AnswerParser,
    ArgumentsDelta,
    CallBegun,
    CallEnded,
    Content,
    Event,
    Finished,
    Reasoning,
    ReasoningParser,
    SpecialTokenFilter,
    Tool,
    make,
    merge_events,
    needs_special_tokens,
)
from fastllm.serve.parsers.json_text import MAX_DEPTH, scan_value
from fastllm.serve.parsers.python_text import convert_value
from fastllm.serve.parsers.reader import MalformedError, Reader
from fastllm.serve.parsers.tool_parser import call_id, short_call_id

NAMES = ("f", "get_weather", "g-2")
SPECIAL = ["<|im_end|>", "<|eot_id|>", "[/INST]", "<|eot", "ab"]


def ids() -> Any:
    return map("id{}".format, itertools.count()).__next__


def read(name: str, pieces: list[str], **options: Any) -> list[Event]:
    parser = make(name, options.pop("tools", NAMES), new_id=ids(), **options)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return merge_events([*events, *parser.finish()])


def content(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


def calls(events: list[Event]) -> list[tuple[str, Any]]:
    """Names and arguments of the complete calls."""
    found: list[tuple[str, Any]] = []
    names = {event.index: event.name for event in events if isinstance(event, CallBegun)}
    texts = {event.index: event.text for event in events if isinstance(event, ArgumentsDelta)}
    for event in events:
        if isinstance(event, CallEnded) and event.complete:
            found.append((names[event.index], json.loads(texts[event.index])))
    return found


def cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


# ---- what each format looks like -------------------------------------------------------------------------

A: dict[str, Any] = {"city": 'Zürich "x" </tool_call> \\ \n', "days": [1, -2.5e3, None, True, {"a": {}}]}


def write(name: str, made: list[tuple[str, Any]]) -> str:
    """Calls as a model writes them."""
    if name == "hermes":
        return "\n".join(f"<tool_call>\n{as_json(f, a, 'arguments')}\n</tool_call>" for f, a in made)
    if name == "llama3_json":
        return "; ".join(as_json(f, a, "parameters") for f, a in made)
    if name == "mistral":
        return f"[TOOL_CALLS][{', '.join(as_json(f, a, 'arguments') for f, a in made)}]"
    if name == "mistral_args":
        return "".join(f"[TOOL_CALLS]{f}[ARGS]{json.dumps(a, ensure_ascii=False)}" for f, a in made)
    keywords = [", ".join(f"{key}={value!r}" for key, value in a.items()) for _, a in made]
    return f"[{', '.join(f'{f}({k})' for (f, _), k in zip(made, keywords, strict=True))}]"


def as_json(name: str, arguments: Any, key: str) -> str:
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


FREE = ("hermes", "mistral", "mistral_args")  # formats with text around calls
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text("abc'\"\\", max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
arguments_ = st.dictionaries(st.sampled_from(("a", "b_1", "city", "_x")), values, max_size=3)
some_calls = st.lists(st.tuples(st.sampled_from(NAMES), arguments_), min_size=1, max_size=3)
formats = st.sampled_from(sorted(FORMATS))
places = st.lists(st.integers(0, 10**6), max_size=12)
BITS = (
    *("<tool_call>", "</tool_call>", "<tool_", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"),
    *(
        "<|python_start|>",
        "<|python_end|>",
        "<think>",
        "</think>",
        "[",
        "]",
        "{",
        "}",
        "(",
        ")",
        ",",
        ";",
        ":",
    ),
    *(
        '"',
        "'",
        "\\",
        "\\u00e9",
        "\n",
        " ",
        "é",
        "text",
        "f",
        "f(",
        "a=1",
        "True",
        "1e5",
        "-",
        "null",
        '{"a": 1}',
    ),
    *(
        '{"name": "f", "arguments": {}}',
        '{"name": "f", "parameters": {"x": [1, 2]}}',
        '"name": "f"',
        "[f(a='x')]",
    ),
    *(
        '"arguments": {',
        '{"name": "nobody", "arguments": {}}',
        '{"arguments": {"k": "v"}, "name": "get_weather"}',
    ),
)
# Bits in any order, which now and then make a call, and broken ones most of the time.
texts = st.lists(st.sampled_from(BITS), max_size=14).map("".join) | st.text(max_size=12)


@given(formats, texts, places, st.booleans(), st.booleans())
@example("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1-}}</tool_call>', [33], True, True)
@example("hermes", '<tool_call>{"name": "f", "arguments": {}} \n text <tool_call>', [42], False, False)
@example("llama_pythonic", "[f(ab1=1)]", [4, 5], True, True)
def test_the_events_depend_on_the_text_and_not_on_the_cuts(
    name: str, text: str, cuts: list[int], parallel: bool, streams: bool
) -> None:
    options: Any = {"parallel": parallel, "stream_arguments": streams}
    whole = read(name, [text], **options)
    assert read(name, cut(text, cuts), **options) == whole
    assert read(name, list(text), **options) == whole
    check_sound(whole, streams)


def check_sound(events: list[Event], streams: bool) -> None:
    """Calls come one after the other, and what is complete is JSON."""
    begun = [event.index for event in events if isinstance(event, CallBegun)]
    ended = [event.index for event in events if isinstance(event, CallEnded)]
    assert begun == ended == list(range(len(begun)))
    complete = [event for event in events if isinstance(event, CallEnded) and event.complete]
    assert len(calls(events)) == len(complete)
    assert all(isinstance(arguments, dict) for _, arguments in calls(events))
    assert streams or len(complete) == len(begun)
    assert events[-1] == Finished(len(begun), len(complete) == len(begun))
    assert [event for event in events if isinstance(event, Finished)] == [events[-1]]


@given(formats, texts, places, st.booleans())
def test_text_without_a_call_comes_out_as_it_is(name: str, text: str, cuts: list[int], streams: bool) -> None:
    events = read(name, cut(text, cuts), tools=(), stream_arguments=streams)  # nothing may be called
    assert content(events) == text
    assert events[-1] == Finished(0, True)


@given(formats, some_calls, places, st.booleans())
@example("hermes", [("f", A)], [], True)
@example("llama_pythonic", [("f", A), ("f", {})], [], False)
def test_calls_come_out_as_the_model_meant_them(
    name: str, made: list[tuple[str, Any]], cuts: list[int], streams: bool
) -> None:
    events = read(name, cut(write(name, made), cuts), stream_arguments=streams)
    assert calls(events) == made
    assert content(events) == ""
    assert [event.id for event in events if isinstance(event, CallBegun)] == [
        f"id{i}" for i in range(len(made))
    ]
    assert events[-1] == Finished(len(made), True)


@given(st.sampled_from(FREE), st.lists(st.text("ab \n<[", max_size=6) | some_calls, max_size=5), places)
def test_text_around_calls_is_content(name: str, parts: list[Any], cuts: list[int]) -> None:
    text = "".join(part if isinstance(part, str) else write(name, part) for part in parts)
    events = read(name, cut(text, cuts))
    assert calls(events) == [call for part in parts if not isinstance(part, str) for call in part]
    written = "".join(part for part in parts if isinstance(part, str))
    assert "".join(content(events).split()) == "".join(written.split())  # spaces: see the next test


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Let me see.\n\n<CALL>", "Let me see."),
        ("\n<CALL>\n", ""),
        ("a <CALL> \n<CALL>\nb\n", "a\nb\n"),
        ("<CALL>\n\n b c ", "b c "),
        (" a ", " a "),
        ("  <tool_call>x", "  <tool_call>x"),
        ("a<CALL>\n<tool_call>{ ", "a\n<tool_call>{ "),
    ],
)
def test_spaces_beside_a_call_belong_to_it(text: str, expected: str) -> None:
    call = write("hermes", [("f", {})])
    for pieces in ([text.replace("<CALL>", call)], list(text.replace("<CALL>", call))):
        assert content(read("hermes", pieces)) == expected


# ---- what models do besides ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', {"a": 1}),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}', {"a": 1}),  # the end is missing
        ("hermes", '<tool_call>[{"name": "f", "arguments": {"a": 1}}]</tool_call>', {"a": 1}),  # SmolLM2
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', {"a": 1}),
        ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', {}),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', {}),
        ("hermes", '<tool_call>{"name": "\\u0066", "parameters": {"a": 1}}</tool_call>', {"a": 1}),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', {"a": 1}),
        ("llama3_json", ' {"type": "function", "name": "f", "parameters": {"a": 1}};\n', {"a": 1}),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]', {"a": 1}),
        ("mistral", '[TOOL_CALLS]{"name": "f", "arguments": {"a": 1}}', {"a": 1}),
        ("mistral_args", '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}', {"a": 1}),
        ("mistral_args", '[TOOL_CALLS]f{"a": 1}', {"a": 1}),
        ("llama_pythonic", "<|python_start|>[f(a=1)]<|python_end|>", {"a": 1}),
        ("llama_pythonic", "[ f ( a = +1. , ) ]".replace("f (", "f("), {"a": 1.0}),
    ],
)
def test_habits_of_models_are_understood(name: str, text: str, expected: dict[str, Any]) -> None:
    for streams in (False, True):
        events = read(name, list(text), stream_arguments=streams)
        assert calls(events) == [("f", expected)]
        assert content(events) == ""


BROKEN = [
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\n"}}</tool_call>'),  # no JSON
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 01}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": "[1]"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "name": "f", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "more": {}}</tool_call>'),
    ("hermes", "<tool_call>[]</tool_call>"),
    ("llama3_json", '{"name": "Alice", "parameters": {}}'),
    ("llama3_json", 'Here: {"name": "f", "parameters": {}}'),
    ("llama3_json", "<|python_tag|>print(1)"),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}} x'[:44]),
    ("mistral_args", "[TOOL_CALLS]f[ARGS]x"),
    ("mistral_args", "[TOOL_CALLS]nobody[ARGS]{}"),
    ("llama_pythonic", "[1, 2, 3]"),
    ("llama_pythonic", "[f](http://example.org)"),
    ("llama_pythonic", "[f(a=1), nobody()]"),
    ("llama_pythonic", "[f(a=1), f(a=g())]"),
    ("llama_pythonic", "[f(a=1, a=2)]"),
    ("llama_pythonic", "[f(1)]"),
    ("llama_pythonic", "[f(a=1)"),
]


@pytest.mark.parametrize(("name", "text"), BROKEN)
def test_a_malformed_call_is_text(name: str, text: str) -> None:
    events = read(name, [text])
    if name == "mistral":  # the first of the array was complete
        assert calls(events) == [("f", {})]
    else:
        assert events == [Content(text), Finished(0, True)]


def test_after_a_malformed_call_the_next_is_found() -> None:
    good = write("hermes", [("f", {"a": 1})])
    for bad in ("<tool_call>", "<tool_call>{", '<tool_call>{"name": "f", "arguments": {]', "</tool_call>"):
        events = read("hermes", [f"{bad} {good}"])
        assert calls(events) == [("f", {"a": 1})]
        assert content(events) == bad


def test_streamed_arguments_come_as_they_are_written() -> None:
    parser = make("hermes", NAMES, stream_arguments=True, new_id=ids())
    assert parser.feed('<tool_call>{"name": "f", "argu') == []
    assert parser.feed('ments": {"a": "x') == [CallBegun(0, "id0", "f"), ArgumentsDelta(0, '{"a": "x')]
    assert parser.feed("y") == [ArgumentsDelta(0, "y")]
    assert parser.feed('"') == [ArgumentsDelta(0, '"')]
    assert parser.feed("}}") == [ArgumentsDelta(0, "}"), CallEnded(0, True)]
    assert parser.finish() == [Finished(1, True)]


def test_a_streamed_call_that_breaks_off_is_not_complete() -> None:
    parser = make("hermes", NAMES, stream_arguments=True, new_id=ids())
    events = parser.feed('<tool_call>{"name": "f", "arguments": {"a": 1, 2}} ...')
    assert events == [
        CallBegun(0, "id0", "f"),
        ArgumentsDelta(0, '{"a": 1, '),
        CallEnded(0, False),
        Content("2}} ..."),
    ]
    assert parser.finish() == [Finished(1, False)]


def test_without_parallel_calls_the_answer_ends_with_the_first() -> None:
    made: list[tuple[str, Any]] = [("f", {"a": 1}), ("g-2", {})]
    for name, streams in itertools.product(FORMATS, (False, True)):
        parser = make(name, NAMES, parallel=False, stream_arguments=streams, new_id=ids())
        events = [event for c in write(name, made) + " and more" for event in parser.feed(c)]
        assert parser.done
        events += parser.finish()
        assert calls(merge_events(events)) == made[:1]
        assert content(events) == ""
        assert events[-1] == Finished(1, True)


# ---- as early as it can be known -------------------------------------------------------------------------


@given(formats, st.lists(st.text("abé.,!x", min_size=1, max_size=5), max_size=5))
def test_plain_words_are_not_held_back(name: str, pieces: list[str]) -> None:
    parser = make(name, NAMES)
    for piece in pieces:
        assert parser.feed(piece) == [Content(piece)]


@pytest.mark.parametrize(
    ("name", "held", "then"),
    [
        ("hermes", "<tool_cal", "m"),
        ("hermes", "\n", "m"),
        ("hermes", "<tool_call>\n{", "m"),
        ("hermes", '<tool_call>\n{"name": "get_', "m"),
        ("llama3_json", '{"name": "', "n"),
        ("llama3_json", '{"', "c"),
        ("llama3_json", '{"name": "f"', "]"),
        ("llama_pythonic", "[", "1"),
        ("llama_pythonic", "[get_", "m"),
        ("mistral", "[TOOL_CALLS", "x"),
        ("mistral_args", "[TOOL_CALLS]get_", "m"),
    ],
)
def test_what_may_be_a_call_is_held_until_it_cannot_be(name: str, held: str, then: str) -> None:
    parser = make(name, NAMES)
    assert [event for c in held for event in parser.feed(c)] == []
    assert content(parser.feed(then)) == held + then


# ---- JSON and Python -------------------------------------------------------------------------------------


def scanned(text: str, scan: Any) -> str | None:
    """What a scanner hands on of a whole text; None where it is malformed."""
    reader, pieces = Reader(text, final=True), []
    try:
        for _ in scan(reader, pieces.append):
            pass
    except MalformedError:
        return None
    return "".join(pieces) if not reader.available else None


@given(st.lists(st.sampled_from([*'{}[],:"\\ \n0123-+.eEtu', '"a"', "true", "null", "\\u12aF", "\x01", "é"]))
       .map("".join) | values.map(json.dumps))  # fmt: skip
@example("[1, 2,]")
@example('{"a": 1, "a": 2}')
@example("-")
@example("1.")
def test_json_is_what_python_reads_as_json(text: str) -> None:
    text = text.strip(" \n")
    try:
        json.loads(text, parse_constant=lambda constant: 1 / 0)
    except (ValueError, ZeroDivisionError):
        assert scanned(text, scan_value) is None
    else:
        assert scanned(text, scan_value) == text


@given(values)
@example("\U0001f600 '\"\\ \x00 \x7f \u2028")
@example({"": [[], {}, ""]})
def test_python_literals_are_what_python_means(value: Any) -> None:
    made = scanned(repr(value), convert_value)
    assert made is not None
    assert json.loads(made) == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r'"a\n\x41\u00e9\U0001F600\101\q\/"', "a\nAé😀A\\q/"),
        (r'"\ud83d\ude00"', "😀"),
        ("'a\nb'", "a\nb"),
        ("+.5", 0.5),
        ("5.", 5.0),
        ("[1, 2,]", [1, 2]),
        ("{\"a\": true, 'b': null,}", {"a": True, "b": None}),
        ("007", None),
        ("1__0", None),
        ("inf", None),
        ("(1, 2)", None),
        ("f'x'", None),
        ("{1: 2}", None),
        ("'''x'''", None),
        (r'"\U00110000"', None),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), None),
    ],
)
def test_python_literals_in_other_spellings(text: str, expected: Any) -> None:
    made = scanned(text, convert_value)
    assert (None if made is None else json.loads(made)) == expected


def test_a_lone_surrogate_stays_an_escape() -> None:
    made = scanned(r'"\ud800x"', convert_value)
    assert made == '"\\ud800x"'


# ---- linear time -----------------------------------------------------------------------------------------

MEGABYTE = 1 << 20
ADVERSARIAL = (
    *("<tool_call>", "<tool_call", "[TOOL_CALLS]", "[TOOL_CALLS][", "<|python_tag|>", "f(),", " \n", "\\"),
    *('<tool_call>{"name": "f", "arguments": {"a": [', '{"a":', '<tool_call>{"name": "', "[f(a=", '"x", '),
)
HEADS = {  # so that the text is within a call
    "hermes": (
        "",
        '<tool_call>{"name": "f", "arguments": {"a": "',
        '<tool_call>{"name": "f", "arguments": {"a":',
    ),
    "llama3_json": ("", '{"name": "f", "parameters": {"a": "', '{"name": "f", "parameters": {"a":'),
    "mistral": ("", '[TOOL_CALLS][{"name": "f", "arguments": {"a": "'),
    "mistral_args": ("", '[TOOL_CALLS]f[ARGS]{"a": '),
    "llama_pythonic": ("", "[", "[f(a='", "[f(a=[", "[f(a=1"),
}
MARKERS = {"mistral": "[TOOL_CALLS]", "mistral_args": "[TOOL_CALLS]", "llama_pythonic": "f(),"}


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_megabyte_of_anything_takes_linear_time(name: str) -> None:
    """A megabyte takes 1 to 3 s of a processor here; in square time it would be hours."""

    def seconds(text: str, size: int) -> float:
        parser = make(name, NAMES)
        start = time.process_time()
        events = [event for at in range(0, len(text), size) for event in parser.feed(text[at : at + size])]
        events += parser.finish()
        assert content(events) == text
        return time.process_time() - start

    for head, unit in itertools.product(HEADS[name], ADVERSARIAL):
        assert seconds(head + unit * (8192 // len(unit)), 5) < 2, (head, unit)
    marker = MARKERS.get(name, "<tool_call>")
    assert seconds(marker * (MEGABYTE // len(marker)), 4096) < 20
    assert seconds(HEADS[name][1] + "x" * MEGABYTE, 16) < 20


# ---- reasoning, control tokens, all of it ----------------------------------------------------------------


def think(text: str, pieces: list[str] | None = None, *, opened: bool = False) -> tuple[str, str]:
    parser = ReasoningParser("think", opened=opened)
    events = [event for piece in pieces or [text] for event in parser.feed(piece)] + parser.finish()
    assert merge_events(events) == sorted(merge_events(events), key=lambda event: isinstance(event, Content))
    return "".join(e.text for e in events if isinstance(e, Reasoning)), content(events)


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>\na b\n</think>\n\nanswer\n", False, ("a b", "answer\n")),
        ("\n<think>a</think>b", False, ("a", "b")),
        ("a b\n</think>\n\nanswer", True, ("a b", "answer")),
        ("<think>\na</think>b", True, ("a", "b")),  # opened twice
        ("<think>\n\n</think>\n\nb", False, ("", "b")),
        ("<think>never\n closed </thin", False, ("never\n closed </thin", "")),
        ("never closed", True, ("never closed", "")),
        ("no <think>x</think>", False, ("", "no <think>x</think>")),
        ("  plain", False, ("", "  plain")),
        ("<thin", False, ("", "<thin")),
        ("", True, ("", "")),
    ],
)
def test_reasoning_and_content(text: str, opened: bool, expected: tuple[str, str]) -> None:
    assert think(text, opened=opened) == expected
    assert think(text, list(text), opened=opened) == expected


@given(texts, places, st.booleans())
def test_reasoning_does_not_depend_on_the_cuts(text: str, cuts: list[int], opened: bool) -> None:
    assert think(text, cut(text, cuts), opened=opened) == think(text, opened=opened)


def test_reasoning_comes_out_while_it_is_thought() -> None:
    parser = ReasoningParser("think")
    assert parser.feed("<think>") == []
    assert parser.feed("one") == [Reasoning("one")]
    assert parser.feed(" ") == []
    assert parser.feed("two </thi") == [Reasoning(" two")]
    assert parser.feed("s") == [Reasoning(" </this")]
    assert parser.feed("</think>x") == [Content("x")]


@given(
    st.lists(st.sampled_from([*SPECIAL, "<|", "eot_id|>", "[/", "a", "b", "x", "<tool_call>"])).map("".join),
    places,
)
@example("<|eot_id|", [3])
@example("a<|eot_id|>b", [3])
def test_control_tokens_are_taken_out(text: str, cuts: list[int]) -> None:
    import re

    expected = re.sub("|".join(map(re.escape, sorted(SPECIAL, key=len, reverse=True))), "", text)
    for pieces in ([text], cut(text, cuts), list(text)):
        filtered = SpecialTokenFilter(SPECIAL, keep=["<tool_call>"])
        assert "".join(map(filtered.feed, pieces)) + filtered.finish() == expected


def test_reasoning_then_content_then_calls() -> None:
    text = "<think>\nA <tool_call>\n</think>\n\nSo.<|im_end|>\n" + write("hermes", [("f", {"a": 1})])
    expected = [
        Reasoning("A <tool_call>"),
        Content("So."),
        CallBegun(0, "id0", "f"),
        ArgumentsDelta(0, '{"a": 1}'),
        CallEnded(0, True),
        Finished(1, True),
    ]
    for pieces in ([text], list(text)):
        parser = AnswerParser(
            make("hermes", NAMES, new_id=ids()), ReasoningParser("think"), SpecialTokenFilter(SPECIAL)
        )
        events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
        assert merge_events(events) == expected
    parser = AnswerParser(None, ReasoningParser("think"))
    assert merge_events([*parser.feed("<think>a</think>b"), *parser.finish()]) == [
        Reasoning("a"),
        Content("b"),
        Finished(0, True),
    ]


def test_names_and_ids() -> None:
    with pytest.raises(RequestError, match="tool_parser: expected one of"):
        make("nothing")
    assert [name for name in sorted(FORMATS) if needs_special_tokens(name)] == [
        *("llama3_json", "llama_pythonic", "mistral", "mistral_args")
    ]
    assert needs_special_tokens("hermes", ["<tool_call>"])
    assert not needs_special_tokens("mistral", ["</s>"])
    assert len({call_id() for _ in range(100)}) == 100
    assert all(len(short_call_id()) == 9 and short_call_id().isalnum() for _ in range(100))
    events = read("hermes", [write("hermes", [("anything", {})])], tools=None)
    assert calls(events) == [("anything", {})]
    (begun, *_) = make("mistral", [Tool("f")]).feed(write("mistral", [("f", {})]))
    assert isinstance(begun, CallBegun)
    assert len(begun.id) == 9
