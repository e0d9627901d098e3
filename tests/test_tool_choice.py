"""What a request says about tools: refused with a path, or obeyed, whatever the model would rather say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import jsonschema
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from fastllm import LLM, RequestError, SamplingParams
from fastllm.engine.grammar import try_grammar
from fastllm.serve.parsers import (
    FORMATS,
    ArgumentsDelta,
    CallBegun,
    CallEnded,
    Content,
    Finished,
    Formats,
    Reasoning,
    Tool,
    parse_tool_choice,
    parse_tools,
    plan_answer,
    special_token_texts,
)
from fastllm.serve.parsers.tool_choice import MAX_CHARACTERS, MAX_DESCRIPTION_CHARACTERS, MAX_TOOLS
from fastllm.structured_outputs import MAX_BYTES, MAX_DEPTH

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8, "description": 'a "city"'},
        "unit": {"enum": ["C", "F", "[temperature=1] ::= \"%json\" // <|eos|>"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
        "where": {"$ref": "#/$defs/place"},
    },
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"],
                        "additionalProperties": False}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}  # fmt: skip
SCHEMAS: dict[str, Any] = {
    "get_weather": WEATHER,
    "temperature": {
        "type": "object",
        "properties": {"temperature": {"type": "boolean"}, "description": {"type": "null"}},
        "required": ["temperature", "description"],
        "additionalProperties": False,
        "description": "temperature = 3",
    },
    "f-1": None,
}


def function(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def the_tools(**more: Any) -> tuple[Tool, ...]:
    odd = 'Ends """ with \\ and start: /x/ %json { [temperature=9] ::= <|im_end|> \n \u2028 é'
    return parse_tools([function(name, schema, description=odd, **more) for name, schema in SCHEMAS.items()])


# ---- what is refused -------------------------------------------------------------------------------------


def deep(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth - 1):
        schema = {"properties": schema}
    return schema


@pytest.mark.parametrize(
    ("tools", "field", "limit"),
    [
        ("f", "tools", "a list of tools"),
        ({}, "tools", "a list of tools"),
        ([function("f")] * (MAX_TOOLS + 1), "tools", f"at most {MAX_TOOLS} tools"),
        (["f"], "tools[0]", "an object"),
        ([{"type": "function"}], "tools[0].function", "an object"),
        ([{"type": "web_search", "function": {}}], "tools[0].type", "function"),
        ([{**function("f"), "more": 1}], "tools[0].more", "no such entry"),
        ([function("f"), function("f")], "tools[1].function.name", "no other tool"),
        ([function("a b")], "tools[0].function.name", "1..64 characters"),
        ([function("f\n")], "tools[0].function.name", "1..64 characters"),
        ([function("")], "tools[0].function.name", "1..64 characters"),
        ([function("x" * 65)], "tools[0].function.name", "1..64 characters"),
        ([function("fé")], "tools[0].function.name", "1..64 characters"),
        ([function("f", more=1)], "tools[0].function.more", "no such entry"),
        ([function("f", description=3)], "tools[0].function.description", "a text"),
        ([function("f", description="\ud800")], "tools[0].function.description", "surrogates"),
        (
            [function("f", description="x" * (MAX_DESCRIPTION_CHARACTERS + 1))],
            "tools[0].function.description",
            "at most",
        ),
        ([function("f", strict=1)], "tools[0].function.strict", "true or false"),
        ([function("f"), function("g", [])], "tools[1].function.parameters", "JSON schema"),
        ([function("f", {"type": "array"})], "tools[0].function.parameters.type", "object"),
        ([function("f", {"type": ["object"]})], "tools[0].function.parameters.type", "object"),
        ([function("f", {"properties": []})], "tools[0].function.parameters.properties", "schemas"),
        ([function("f", {"properties": {"a": 1}})], "tools[0].function.parameters.properties.a", "schema"),
        ([function("f", {"required": "a"})], "tools[0].function.parameters.required", "names"),
        ([function("f", {"x-guidance": {}})], "tools[0].function.parameters", "without that key"),
        ([function("f", {"minimum": float("inf")})], "tools[0].function.parameters", "finite"),
        ([function("f", deep(MAX_DEPTH + 1))], "tools[0].function.parameters", f"at most {MAX_DEPTH} deep"),
        ([function("f", {"enum": ["x" * MAX_BYTES]})], "tools[0].function.parameters", "bytes"),
        (
            [function(f"f{i}", {"enum": ["x" * 60000]}) for i in range(MAX_CHARACTERS // 60000 + 1)],
            f"tools[{MAX_CHARACTERS // 60000}]",
            "in all",
        ),
    ],
)
def test_tools_beyond_their_limits_are_refused_with_their_path(tools: Any, field: str, limit: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_tools(tools)
    assert caught.value.field == field
    assert limit in caught.value.limit


keys = st.sampled_from(["type", "function", "name", "parameters", "strict", "description", "properties"])
words = st.sampled_from(["function", "f", "object"])
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner | words, max_size=4),
    max_leaves=12,
)


@given(junk)
def test_no_tools_raise_anything_else(value: Any) -> None:
    field: str = "tools"
    tools: tuple[Tool, ...] = ()
    try:
        tools = parse_tools([value])
    except RequestError as error:
        field = error.field
    assert field.startswith("tools")
    assert json.dumps([tool.for_template() for tool in tools])


@pytest.mark.parametrize(
    ("choice", "parallel", "field"),
    [
        ("any", None, "tool_choice"),
        (3, None, "tool_choice"),
        ({"type": "function"}, None, "tool_choice.function"),
        ({"type": "tool", "function": {"name": "f-1"}}, None, "tool_choice.type"),
        ({"type": "function", "function": {"name": 1}}, None, "tool_choice.function.name"),
        ({"type": "function", "function": {"name": "nobody"}}, None, "tool_choice.function.name"),
        ({"type": "function", "function": {"name": "f-1", "x": 1}}, None, "tool_choice.function.x"),
        ("auto", 1, "parallel_tool_calls"),
    ],
)
def test_a_choice_that_is_none_is_refused(choice: Any, parallel: Any, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_tool_choice(the_tools(), choice, parallel)
    assert caught.value.field == field


def test_what_a_choice_means() -> None:
    tools = the_tools()
    auto = parse_tool_choice(tools)
    assert auto == parse_tool_choice(tools, "auto", True)
    assert (auto.tools, auto.required, auto.parallel) == (tools, False, True)
    assert [shown["function"]["name"] for shown in auto.for_template() or ()] == list(SCHEMAS)
    assert parse_tool_choice(tools, "none").for_template() is None
    assert parse_tool_choice(()) == parse_tool_choice((), "auto")
    assert not parse_tool_choice(tools, None, False).parallel
    named = parse_tool_choice(tools, {"type": "function", "function": {"name": "f-1"}})
    assert ([tool.name for tool in named.tools], named.required, named.parallel) == (["f-1"], True, False)
    assert named.offered == tools
    with pytest.raises(RequestError, match="at least one tool"):
        parse_tool_choice((), "required")
    (tool,) = parse_tools([function("f", {"properties": {}}, strict=True)])
    assert tool.strict
    assert "strict" not in tool.for_template()["function"]
    assert parse_tools(None) == ()


def test_a_model_without_tools_is_not_asked_to_call() -> None:
    for choice in ("auto", "required"):
        with pytest.raises(RequestError, match="writes no calls"):
            plan_answer(parse_tool_choice(the_tools(), choice), Formats())
    plan = plan_answer(parse_tool_choice(the_tools(), "none"), Formats("hermes", None))
    assert (plan.lead, plan.structured_outputs, plan.skip_special_tokens) == ("", None, True)
    parser = plan.parser()
    text = '<tool_call>{"name": "f-1"}</tool_call>'
    assert [*parser.feed(text), *parser.finish()] == [Content(text), Finished(0, True)]
    with pytest.raises(RequestError, match="reasoning_parser"):
        Formats.of(None, reasoning_parser="nothing")
    with pytest.raises(RequestError, match="tool_parser"):
        Formats.of(None, tool_parser="nothing")


def test_control_tokens_that_belong_to_a_format_are_asked_for() -> None:
    special = frozenset(("[TOOL_CALLS]", "</s>", "[INST]"))
    choice = parse_tool_choice(the_tools())
    plan = plan_answer(choice, Formats("mistral", None, special))
    assert not plan.skip_special_tokens
    parser = plan.parser()
    events = parser.feed('a[INST][TOOL_CALLS]</s>[{"name": "f-1"}]')
    assert [event for event in events if isinstance(event, Content)] == [Content("a")]
    assert CallEnded(0, True) in events
    assert plan_answer(choice, Formats("mistral", None, frozenset(("</s>",)))).skip_special_tokens
    assert plan_answer(parse_tool_choice((), None), Formats("mistral", None, special)).skip_special_tokens


# ---- random weights ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """Random weights: anything that a grammar allows, it writes."""
    model = tiny.make_model(max_position_embeddings=1024)
    path = tiny.save_hf(model, tmp_path_factory.mktemp("tiny"))
    with LLM(path, max_model_len=700, kv_cache_tokens=9000, threads=1, progress=False) as llm:
        yield llm


def answers(llm: LLM, plan: Any, count: int = 8) -> list[tuple[str, list[Any]]]:
    """Answers of random prompts at temperature 1: how each ended, and its events."""
    lead = llm.get_tokenizer().encode(plan.lead, add_special_tokens=False, parse_special=True)
    prompts = [{"prompt_token_ids": [*tiny.tokens(5 + i, seed=i), *lead]} for i in range(count)]
    params = [
        SamplingParams(
            structured_outputs=plan.structured_outputs,
            skip_special_tokens=plan.skip_special_tokens,
            max_tokens=500,
            seed=i,
        )
        for i in range(count)
    ]
    found = []
    for output in llm.generate(prompts, params):
        parser = plan.parser(stream_arguments=True)
        events = [event for c in output.outputs[0].text for event in parser.feed(c)] + parser.finish()
        found.append((str(output.outputs[0].finish_reason), events))
    return found


def made(events: list[Any]) -> list[tuple[str, str]]:
    """Names and arguments of the calls."""
    texts: dict[int, str] = {}
    for event in events:
        if isinstance(event, ArgumentsDelta):
            texts[event.index] = texts.get(event.index, "") + event.text
    return [(event.name, texts[event.index]) for event in events if isinstance(event, CallBegun)]


def check_calls(events: list[Any]) -> int:
    calls = made(events)
    for name, text in calls:
        arguments = json.loads(text)
        assert isinstance(arguments, dict)
        if SCHEMAS[name] is not None:
            jsonschema.validate(arguments, SCHEMAS[name])
        else:
            assert arguments == {}
    return len(calls)


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_random_weights_make_the_calls_that_are_required(llm: LLM, form: str) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice, parallel in (("required", True), ("required", False), (named, None)):
        plan = plan_answer(parse_tool_choice(the_tools(), choice, parallel), Formats(form))
        counts = []
        for ended, events in answers(llm, plan):
            assert (
                not [event for event in events if isinstance(event, (Content, Reasoning))] or ended != "stop"
            )
            if ended == "stop":
                assert events[-1].complete
                counts.append(check_calls(events))
                if choice == named:
                    assert made(events)[0][0] == "get_weather"
        assert len(counts) >= 3
        assert min(counts) == 1
        assert max(counts) == 1 or (choice == "required" and parallel)


@pytest.mark.parametrize("form", ["hermes", "mistral", "llama3_json"])
def test_reasoning_comes_before_the_calls_that_are_required(form: str) -> None:
    choice = parse_tool_choice(the_tools(), "required", False)
    thinks = Formats(form, "think")
    opened = plan_answer(choice, thinks, prompt_end="<|im_start|>assistant\n<think>\n")
    call = '"f-1", "%s": {}}' % ("parameters" if form == "llama3_json" else "arguments")
    call = {
        "hermes": '<tool_call>\n{"name": ' + call + "\n</tool_call>",
        "mistral": '[TOOL_CALLS][{"name": ' + call + "]",
        "llama3_json": '{"name": ' + call,
    }[form]
    assert opened.lead == ""
    assert accepts(opened, f"I think {{so}}.\n</think>\n\n{call}")
    assert not accepts(opened, "I think.\n</think>\n\nNo call.", whole=False)
    assert not accepts(opened, call)  # still thinking
    if form == "mistral":
        assert plan_answer(choice, thinks).lead == "[TOOL_CALLS]"
        return
    may = plan_answer(choice, thinks, prompt_end="<|im_start|>assistant\n")
    assert accepts(may, f"<think>\nso</think>{call}")
    assert accepts(may, call)
    over = plan_answer(choice, thinks, prompt_end="<think>\n\n</think>\n\n")
    assert accepts(over, call)
    assert not accepts(over, "<think>", whole=False)
    parser = opened.parser()
    events = [*parser.feed(f"I think.\n</think>\n\n{call}"), *parser.finish()]
    assert events[0] == Reasoning("I think.")
    assert check_calls(events) == 1


@lru_cache
def compiled(grammar: str) -> str:
    return try_grammar("grammar", grammar)


def accepts(plan: Any, text: str, *, whole: bool = True) -> bool:
    """Whether a plan's grammar has this text among its sentences, or as the beginning of one."""
    matcher = LLMatcher(LLTokenizer("byte"), compiled(plan.structured_outputs.text), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    data = list(text.encode())
    return bool(matcher.try_consume_tokens(data) == len(data) and (not whole or matcher.is_accepting()))


# ---- auto, with strict functions -------------------------------------------------------------------------

STRICT = [
    function("get_weather", WEATHER, strict=True),
    function("loose", {"type": "object", "properties": {"a": {"type": "integer"}}}),
]
GOOD = {"city": "Bern", "unit": "C"}
BAD = {"city": "Bern", "unit": "K"}


@pytest.mark.parametrize("form", ["hermes", "llama3_json", "llama_pythonic"])
def test_strict_functions_are_obeyed_where_the_model_may_choose(form: str) -> None:
    plan = plan_answer(parse_tool_choice(parse_tools(STRICT)), Formats(form))

    def call(name: str, arguments: dict[str, Any]) -> str:
        if form == "hermes":
            return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
        if form == "llama3_json":
            return f'{{"name": "{name}", "parameters": {json.dumps(arguments)}}}'
        return f"[{name}({', '.join(f'{k}={json.dumps(v)}' for k, v in arguments.items())})]"

    for text in ("", "Hello {there} [you] <b>", "\n x", call("get_weather", GOOD), call("loose", {"a": 3})):
        assert accepts(plan, text), text
    assert not accepts(plan, call("get_weather", BAD))
    assert not accepts(plan, call("nobody", {}))
    assert accepts(plan, call("loose", {"a": "x"})) == (form != "llama_pythonic")
    if form == "hermes":
        twice = f"Well. {call('get_weather', GOOD)}\n{call('loose', {})} <tool_ Done."
        assert accepts(plan, twice)
        assert not accepts(plan, f"Well. {call('get_weather', GOOD)}\n{call('get_weather', BAD)}")
        special = Formats(form, None, frozenset(("<tool_call>",)))
        assert plan_answer(parse_tool_choice(parse_tools(STRICT)), special).structured_outputs is None
    parser = plan.parser()
    (_, arguments, *_) = parser.feed(call("get_weather", GOOD))
    assert isinstance(arguments, ArgumentsDelta)
    assert json.loads(arguments.text) == GOOD


@pytest.mark.parametrize("form", ["hermes", "llama3_json", "llama_pythonic"])
def test_no_call_hides_behind_reasoning(form: str) -> None:
    bad = {
        "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>',
        "llama3_json": '{"name": "get_weather", "parameters": {}}',
        "llama_pythonic": "[get_weather()]",
    }[form]
    choice, thinks = parse_tool_choice(parse_tools(STRICT)), Formats(form, "think")
    for end in ("", "<think>\n\n</think>\n\n", "<think>\n"):
        plan = plan_answer(choice, thinks, prompt_end=end)
        assert not accepts(plan, f"<think>\nI call {bad}\n</think>\n\n{bad}")
        assert not accepts(plan, f" <think>x</think>{bad}")
        if "</think>" not in end:
            opening = "" if end else "<think>"
            assert accepts(plan, f"{opening}\nI call {bad}.\n</think>\n\nNo.")
        assert accepts(plan, "Yes </think> <thi")


def test_without_strict_functions_the_answer_is_free() -> None:
    for form in FORMATS:
        assert plan_answer(parse_tool_choice(the_tools()), Formats(form)).structured_outputs is None
    for form in ("mistral", "mistral_args"):  # calls begin with a control token
        assert plan_answer(parse_tool_choice(parse_tools(STRICT)), Formats(form)).structured_outputs is None


def test_random_weights_say_anything_where_they_may(llm: LLM) -> None:
    plan = plan_answer(parse_tool_choice(parse_tools(STRICT)), Formats("hermes", "think"))
    for _, events in answers(llm, plan, 4):
        assert check_calls(events) == 0
        assert any(isinstance(event, Content) for event in events)


# ---- any text in names and schemas -----------------------------------------------------------------------


@settings(max_examples=12)  # a process each
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.text('"\\\n={}[]%<|>:/#é temperature', min_size=1, max_size=16),
)
def test_no_text_breaks_the_grammar(described: str, key: str) -> None:
    schema = {
        "description": key,
        "type": "object",
        "properties": {key: {"const": described, "title": key}},
        "required": [key],
        "additionalProperties": False,
    }
    tools = parse_tools([function("f", schema, description=described)])
    plan = plan_answer(parse_tool_choice(tools, "required", False), Formats("hermes"))
    good, bad = ({key: value} for value in (described, described + "x"))
    for arguments, expected in ((good, True), (bad, False)):
        written = json.dumps({"name": "f", "arguments": arguments}, ensure_ascii=False)
        assert accepts(plan, f"<tool_call>\n{written}\n</tool_call>") == expected


@pytest.mark.parametrize(
    ("schema", "field"),
    [
        ({"anyOf": [{"required": ["a"]}]}, "tools[0].function.parameters.anyOf"),
        ({"properties": {"a b": {}}}, "tools[0].function.parameters.properties"),
    ],
)
def test_what_cannot_be_written_as_python_is_refused(schema: Any, field: str) -> None:
    choice = parse_tool_choice(parse_tools([function("f", schema)]), "required")
    with pytest.raises(RequestError) as caught:
        plan_answer(choice, Formats("llama_pythonic"))
    assert caught.value.field == field


def test_schemas_too_large_for_one_grammar_are_refused() -> None:
    tools = parse_tools([function(f"f{i}", {"enum": [{"a": f"{i}" * 30000}]}) for i in range(3)])
    with pytest.raises(RequestError, match="fit into one grammar"):
        plan_answer(parse_tool_choice(tools, "required"), Formats("hermes"))
    assert plan_answer(parse_tool_choice(tools, "auto"), Formats("hermes")).structured_outputs is None


def test_texts_of_control_tokens(llm: LLM) -> None:
    assert special_token_texts(llm.get_tokenizer()) == set(tiny.SPECIAL_TOKENS)
