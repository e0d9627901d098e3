"""Messages of OpenAI's API as chat templates want them, and what is found out about a template."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tool_templates import DEEPSEEK, HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, PLAIN, PYTHONIC, QWEN3, TEMPLATES

from fastllm import RequestError
from fastllm.formats.chat_template import ChatTemplate
from fastllm.serve.parsers import (
    CallBegun,
    Content,
    Formats,
    Thought,
    detect,
    detect_reasoning,
    make,
    normalize_messages,
    thought_of_prompt,
)

ARGUMENTS = {"city": 'Zürich "x"', "days": [1, 2.5], "deep": {"a": None}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "Weather"}, {"type": "text", "text": "please"}]},
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "tool_calls": [
            {
                "id": "call_0123456789abcdefghijklmn",
                "type": "function",
                "function": {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_0123456789abcdefghijklmn", "content": "sunny"},
]


def render(template: str, messages: list[dict[str, Any]], **more: Any) -> str:
    return ChatTemplate(template, origin=None).render(
        normalize_messages(messages, template),
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        **more,
    )


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_formats_are_found_out(name: str) -> None:
    template, tools, reasoning = TEMPLATES[name]
    assert detect(template) == tools
    assert detect_reasoning(template) == reasoning
    assert Formats.of(template, ["</s>"]) == Formats(tools, reasoning, frozenset(("</s>",)))
    named = Formats.of(template, tool_parser="hermes", reasoning_parser="none")
    assert named == Formats("hermes", None)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if %}", None),
        ("<tool_call> {% if %}", "hermes"),
        ("{{ raise_exception('no') }} [TOOL_CALLS] [", "mistral"),
        ("{{ messages[0].content }} respond as [func_name1(a=b)]", "llama_pythonic"),
        ("{{ messages[0].content }} {\"name\": function name, \"parameters\": dictionary}", "llama3_json"),
        ("{% for m in messages %}{{ m | tojson }}{% endfor %}", None),
        ("{% for i in range(10**9) %}{% endfor %}", None),
    ],
)  # fmt: skip
def test_templates_that_show_no_call_are_taken_at_their_word(template: str, expected: str | None) -> None:
    assert detect(template) == expected


@pytest.mark.parametrize("name", [name for name in sorted(TEMPLATES) if TEMPLATES[name][1]])
def test_what_a_template_writes_is_what_its_parser_reads(name: str) -> None:
    template, form, _ = TEMPLATES[name]
    assert form is not None
    messages = copy.deepcopy(CONVERSATION[:2])
    if form == "llama_pythonic":  # Meta's template writes texts without quotes
        messages[1]["tool_calls"][0]["function"]["arguments"] = '{"days": 3}'
    text = render(template, messages, add_generation_prompt=False)
    answer = text[text.rindex("please") + 6 :]
    for frame in ("[/INST]", "<|im_end|>\n", "<|im_start|>assistant", "<|eot_id|>", "</s>",
                  "<|start_header_id|>assistant<|end_header_id|>"):  # fmt: skip
        answer = answer.replace(frame, "")
    parser = make(form, ["get_weather"])
    events = [*parser.feed(answer), *parser.finish()]
    assert isinstance(events[0], CallBegun)
    wanted = {"days": 3} if form == "llama_pythonic" else ARGUMENTS
    assert json.loads(events[1].text) == wanted  # type: ignore[union-attr]
    assert not [event for event in events if isinstance(event, Content)]


def test_a_template_that_does_not_end_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr("fastllm.formats.template_budget.STEPS_MAX", 1000)
    render = ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda *a, **k: (tried.append(1), render(*a, **k))[1])
    assert detect("{% for i in range(9999) %}{{ i }}{% endfor %}{# but one #}") is None
    assert len(tried) == 1


def test_each_family_gets_what_it_wants() -> None:
    before = copy.deepcopy(CONVERSATION)
    hermes = render(HERMES, CONVERSATION)
    assert "Weather\nplease<|im_end|>" in hermes
    assert '"arguments": {"city": "Zürich \\"x\\"", "days": [1, 2.5], "deep": {"a": null}}}' in hermes
    assert "<tool_response>\nsunny\n" in hermes
    assert "None" not in hermes
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city"' in render(QWEN3, CONVERSATION)
    assert '{"name": "get_weather", "parameters": {"city": "Zürich' in render(LLAMA3, CONVERSATION)
    assert "get_weather(city=Zürich" in render(PYTHONIC, CONVERSATION)
    assert '[TOOL_CALLS]get_weather[ARGS]{"city"' in render(MISTRAL_ARGS, CONVERSATION)
    assert "get_weather\n```json\n" + json.dumps(ARGUMENTS) + "\n```" in render(DEEPSEEK, CONVERSATION)
    mistral = render(MISTRAL, CONVERSATION)
    short = normalize_messages(CONVERSATION, MISTRAL)[2]["tool_call_id"]
    assert len(short) == 9
    assert mistral.count(short) == 2
    assert f'"call_id": "{short}"' in mistral
    assert before == CONVERSATION
    assert normalize_messages(CONVERSATION, HERMES)[2] == {
        "role": "tool",
        "content": "sunny",
        "tool_call_id": "call_0123456789abcdefghijklmn",
        "name": "get_weather",
    }


def test_arguments_that_are_given_as_an_object_or_empty() -> None:
    messages = copy.deepcopy(CONVERSATION)
    function = messages[1]["tool_calls"][0]["function"]
    for given_, expected in (({"a": 1}, {"a": 1}), ("", {}), ("  ", {}), ("{}", {})):
        function["arguments"] = given_
        (call,) = normalize_messages(messages, HERMES)[1]["tool_calls"]
        assert call["function"]["arguments"] == expected
        (call,) = normalize_messages(messages, DEEPSEEK)[1]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == expected


def test_ids_that_a_template_takes_stay() -> None:
    messages = copy.deepcopy(CONVERSATION)
    messages[1]["tool_calls"][0]["id"] = messages[2]["tool_call_id"] = "abcDEF123"
    assert normalize_messages(messages, MISTRAL)[2]["tool_call_id"] == "abcDEF123"


def test_the_role_developer_is_system_where_it_is_not_known() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert normalize_messages(messages, PLAIN)[0]["role"] == "system"
    knows = PLAIN + "{# the role 'developer' #}"
    assert normalize_messages(messages, knows)[0]["role"] == "developer"


def test_reasoning_of_earlier_answers_is_kept_where_it_is_read() -> None:
    for key in ("reasoning_content", "reasoning"):
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", key: "hm"}]
        assert normalize_messages(messages, QWEN3)[1]["reasoning_content"] == "hm"
        assert "<think>\nhm\n</think>\n\nHo" in render(QWEN3, messages)
        assert normalize_messages(messages, PLAIN)[1] == {"role": "assistant", "content": "Ho"}


def test_content_of_an_assistant() -> None:
    def normal(**message: Any) -> Any:
        return normalize_messages([{"role": "assistant", **message}], PLAIN)[0]["content"]

    assert normal(content="") == ""
    assert normal(content=[{"type": "refusal", "refusal": "no"}, {"type": "text", "text": "x"}]) == "no\nx"
    assert normal(content=None, refusal="no") == "no"
    assert normalize_messages([{"role": "assistant", "content": "x", "tool_calls": []}], LLAMA3) == [
        {"role": "assistant", "content": "x"}
    ]
    for content, template in (("", HERMES), (None, DEEPSEEK)):
        assert normalize_messages(CONVERSATION, template)[1]["content"] == content


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("x", "messages[1]"),
        ({"role": "robot", "content": "x"}, "messages[1].role"),
        ({"content": "x"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": {"text": "x"}}, "messages[1].content"),
        ({"role": "user", "content": ["x"]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
         "messages[1].content[0].type"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "input_audio"}]},
         "messages[1].content[1].type"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "messages[1].content[0].text"),
        ({"role": "user", "content": "x", "tool_calls": []}, "messages[1].tool_calls"),
        ({"role": "user", "content": "x", "name": 3}, "messages[1].name"),
        ({"role": "assistant"}, "messages[1].content"),
        ({"role": "assistant", "content": "x", "audio": {"id": "y"}}, "messages[1].audio"),
        ({"role": "assistant", "content": "x", "refusal": 3}, "messages[1].refusal"),
        ({"role": "assistant", "content": "x", "reasoning_content": 3}, "messages[1].reasoning_content"),
        ({"role": "assistant", "tool_calls": {}}, "messages[1].tool_calls"),
        ({"role": "assistant", "tool_calls": [{}] * 129}, "messages[1].tool_calls"),
        ({"role": "assistant", "tool_calls": ["x"]}, "messages[1].tool_calls[0]"),
        ({"role": "tool", "content": "x"}, "messages[1].tool_call_id"),
        ({"role": "tool", "content": "x", "tool_call_id": "unknown"}, "messages[1].tool_call_id"),
    ],
)  # fmt: skip
def test_what_is_refused(message: Any, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        normalize_messages([{"role": "user", "content": "Hi"}, message], PLAIN)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": ""}, "id"),
        ({"id": None}, "id"),
        ({"type": "custom"}, "type"),
        ({"function": None}, "function"),
        ({"function": {"name": "a b", "arguments": "{}"}}, "function.name"),
        ({"function": {"name": "f", "arguments": "{"}}, "function.arguments"),
        ({"function": {"name": "f", "arguments": "[]"}}, "function.arguments"),
        ({"function": {"name": "f", "arguments": '{"a": NaN}'}}, "function.arguments"),
        ({"function": {"name": "f", "arguments": '{"a":' * 100_000}}, "function.arguments"),
        ({"function": {"name": "f"}}, "function.arguments"),
    ],
)
def test_calls_that_are_refused(change: dict[str, Any], field: str) -> None:
    call = {**CONVERSATION[1]["tool_calls"][0], **change}
    with pytest.raises(RequestError) as caught:
        normalize_messages([{"role": "assistant", "tool_calls": [call]}], HERMES)
    assert caught.value.field == f"messages[0].tool_calls[0].{field}"
    twice = {"role": "assistant", "tool_calls": CONVERSATION[1]["tool_calls"] * 2}
    with pytest.raises(RequestError, match="no other call"):
        normalize_messages([twice], HERMES)


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["user", "assistant", "tool", "x", "text", "{}"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "tool_calls", "id", "function", "name", "type", "text", "arguments"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(st.lists(junk, max_size=3) | junk)
def test_no_messages_raise_anything_else(messages: Any) -> None:
    field, normal = "messages", []
    try:
        normal = normalize_messages(messages, HERMES)
    except RequestError as error:
        field = error.field
    assert field.startswith("messages")
    assert all(message["role"] in ("user", "system", "assistant", "tool") for message in normal)


def test_where_a_prompt_leaves_reasoning() -> None:
    user = [{"role": "user", "content": "Hi <think>"}]
    assert thought_of_prompt("think", render(DEEPSEEK, user)) is Thought.OPEN
    assert thought_of_prompt("think", render(QWEN3, user)) is Thought.COMES
    over = render(QWEN3, user, variables={"enable_thinking": False})
    assert thought_of_prompt("think", over) is Thought.OVER
