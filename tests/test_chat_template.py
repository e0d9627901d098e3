"""Chat templates: the text is jinja2's, control tokens are the template's own, every rendering ends."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from fastllm.errors import FastLLMError, ModelFileError, RequestError, UnsupportedModelError
from fastllm.formats import template_budget
from fastllm.formats.chat_template import ChatTemplate
from fastllm.formats.codec import CHARACTER_BYTES
from fastllm.formats.template_text import TemplateText, join_text, spans_of
from fastllm.formats.tokenizer import Tokenizer

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
CONTROL_TEXTS = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "[INST]",
]
MARKUP_WORDS = ["<|tool|>", "<think>", "</think>"]
USER = [{"role": "user", "content": "Hi"}]

CHATML = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
BUILT = "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '</s>\\n' }}{% endfor %}"
WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}{{ '[INST] ' ~ m['content'] ~ ' ' ~ eos_token }}{% endfor %}"
)
THINKING = """\
{%- set ns = namespace(out='') -%}
{%- macro turn(role, text) -%}<|im_start|>{{ role }}
{{ text }}<|im_end|>{%- endmacro -%}
{%- for m in messages -%}
  {%- set text = m.content -%}
  {%- if '</think>' in text -%}
    {%- set ns.out = ns.out + '<think>' + text.split('</think>')[0].strip() + '</think>' -%}
    {%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
  {%- endif -%}
  {%- set ns.out = ns.out ~ turn(m.role, text) -%}
{%- endfor -%}
{{ ns.out }}{% if tools %}{{ tools | tojson }}{% endif %}"""
BLOCKS = """\
{% for m in messages %}
{% set line %}<|{{ m.role }}|>{{ m.content }}{% endset %}
{{ line | replace('Hi', 'Hello') }}
{% if loop.last %}{% break %}{% endif %}
{% endfor %}
{{ ['<|im', '_end|>'] | join }}{{ '<|im_start|>' | upper | lower }}{{ '<|%s|>{}' | format('user') }}"""
FORMATTED = "{% for m in messages %}{{ '<|{}|>{}<|im_end|>'.format(m.role, m.content) }}{% endfor %}"
PARTS = (
    "{% for m in messages %}<|im_start|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "built": BUILT,
    "bos": WITH_BOS,
    "thinking": THINKING,
    "blocks": BLOCKS,
    "formatted": FORMATTED,
    "parts": PARTS,
}


def metadata(template: str | None, **keys: Any) -> dict[str, Any]:
    characters = sorted(CHARACTER_BYTES, key=lambda character: CHARACTER_BYTES[character])
    types = dict.fromkeys([*characters, "<|", "|>", "im", "Ġa"], NORMAL)
    types |= dict.fromkeys(CONTROL_TEXTS, CONTROL) | dict.fromkeys(MARKUP_WORDS, USER_DEFINED)
    made = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": list(types),
        "token_type": list(types.values()),
        "merges": ["< |", "| >", "i m", "Ġ a"],
        "bos_token_id": list(types).index("<s>"),
        "eos_token_id": list(types).index("</s>"),
        **keys,
    }
    found = {f"tokenizer.ggml.{key}": value for key, value in made.items()}
    return found | ({} if template is None else {"tokenizer.chat_template": template})


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {name: Tokenizer.from_gguf(metadata(template)) for name, template in TEMPLATES.items()}


def control_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [i for i in ids if tokenizer.is_special(i)]


# -- the text ------------------------------------------------------------------------------------------------

FRAGMENTS = st.sampled_from(
    [
        *(
            *CONTROL_TEXTS,
            *MARKUP_WORDS,
            "<|",
            "|>",
            "<|im_",
            "im_end|>",
            "user",
            "<",
            ">",
            "|",
            " ",
            "\n",
            "a",
        ),
        *("Hi", "é", "{{ x }}", "{% raw %}", "%s", "{}", "'", '"', "\u00a0", "\ue000", "<s", "</", "s>"),
    ]
)
contents = st.lists(FRAGMENTS | st.text(max_size=3), max_size=7).map("".join)
conversations = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": contents}),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations, prompt=st.booleans())
def test_text_as_transformers(
    tokenizers: dict[str, Tokenizer], name: str, messages: list[dict[str, str]], prompt: bool
) -> None:
    ours = tokenizers[name].render_chat_template(messages, add_generation_prompt=prompt)
    theirs, _ = render_jinja_template(
        [messages],
        chat_template=TEMPLATES[name],
        add_generation_prompt=prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert ours == theirs[0]


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations)
@example(messages=[{"role": "user", "content": "<|im_end|>"}])
def test_control_tokens_are_the_template_s(
    tokenizers: dict[str, Tokenizer], name: str, messages: list[dict[str, str]]
) -> None:
    """Whatever a message says, the control tokens are those that a harmless message gives."""
    tokenizer = tokenizers[name]
    ids = tokenizer.apply_chat_template(messages)
    text = tokenizer.render_chat_template(messages)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    harmless = [{**message, "content": "x"} for message in messages]
    expected = control_ids(tokenizer, tokenizer.apply_chat_template(harmless))
    assert control_ids(tokenizer, ids) == expected
    said = [message["content"] for message in messages]
    if not any(written in content for content in said for written in [*CONTROL_TEXTS, "<|tool|>"]):
        assert ids == tokenizer.encode(text, add_special_tokens=False)


def test_literal_control_text_is_merged_with_what_is_around_it(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["parts"]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a <|im_end|> b"}])
    start, end = tokenizer.encode("<|im_start|><|im_end|>")
    assert ids == [start, *tokenizer.encode("a <|im_end|> b", parse_special=False), end]
    assert tokenizer.token_bytes(ids[3]) == b"<|"


def test_a_control_token_in_several_parts(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["parts"]
    parts = [{"type": "text", "text": text} for text in ("x<|im_", "end|>", "<|im_start", "|>y")]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": parts}])
    assert len(control_ids(tokenizer, ids)) == 2
    assert tokenizer.decode(ids) == "x<|im_end|><|im_start|>y"


def test_everything_that_is_given_is_text(tokenizers: dict[str, Tokenizer]) -> None:
    """Tools, template arguments, unusual roles, names of entries: none of it makes control tokens."""
    tokenizer = tokenizers["thinking"]
    tools = [{"name": "<|im_end|>", "<|im_start|>": 1}]
    ids = tokenizer.apply_chat_template(USER, tools=tools)
    assert len(control_ids(tokenizer, ids)) == 2
    template = "{{ style }}{{ messages[0].role }}{{ messages[0].items() | list | string }}{{ documents }}"
    messages = [{"role": "<|im_end|>", "content": "x", "<|user|>": "</s>"}]
    ids = tokenizer.apply_chat_template(
        messages, chat_template=template, style="<|im_start|>", documents=["<|im_end|>"]
    )
    assert control_ids(tokenizer, ids) == []


def test_control_tokens_in_messages_on_request(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["parts"]
    messages = [{"role": "user", "content": "a<|im_end|>b<|tool|>"}]
    ids = tokenizer.apply_chat_template(messages, parse_special=True)
    assert ids == tokenizer.encode(tokenizer.render_chat_template(messages))
    assert len(control_ids(tokenizer, ids)) == 3


def test_roles_inside_of_control_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["built"]
    user, end = tokenizer.encode("<|user|></s>")
    assert control_ids(tokenizer, tokenizer.apply_chat_template(USER)) == [user, end]
    # A role that nobody knows is text like any other, also where it would complete a control token.
    ids = tokenizer.apply_chat_template([{"role": "im_end", "content": "x"}])
    assert control_ids(tokenizer, ids) == [end]


def test_words_that_look_like_markup(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["parts"]
    tool, think = tokenizer.encode("<|tool|><think>")
    assert tokenizer.encode("<|tool|>", parse_special=False) == [tool]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "<|tool|><think>"}])
    assert tool not in ids
    assert think in ids
    ids = tokenizer.apply_chat_template(USER, chat_template="<|tool|>{{ messages[0].content }}")
    assert ids[0] == tool


@pytest.mark.parametrize("adds", [True, False])
def test_one_bos(adds: bool) -> None:
    for template, writes in ((WITH_BOS, True), (CHATML, False)):
        tokenizer = Tokenizer.from_gguf(metadata(template, add_bos_token=adds, add_eos_token=True))
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "<s>"}])
        assert ids.count(tokenizer.bos_token_id) == (1 if adds or writes else 0)
        assert (ids[0] == tokenizer.bos_token_id) == (adds or writes)


# -- arguments -----------------------------------------------------------------------------------------------


def test_arguments(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["chatml"]
    end = "<|im_start|>assistant\n"
    assert tokenizer.render_chat_template(USER).endswith(end)
    assert not tokenizer.render_chat_template(USER, add_generation_prompt=False).endswith(end)
    assert tokenizer.render_chat_template(USER, chat_template="{{ flag }}", flag=True) == "True"
    assert tokenizer.render_chat_template(USER, chat_template="{{ tools }}") == "None"
    for name in ("messages", "_x", "loop", "self"):
        with pytest.raises(RequestError):
            tokenizer._template(None, None).render(USER, variables={name: 1})


def test_named_templates() -> None:
    both = metadata("plain") | {"tokenizer.chat_template.tool_use": "tools: {{ tools | length }}"}
    tokenizer = Tokenizer.from_gguf(both | {"tokenizer.chat_templates": ["tool_use"]})
    assert set(tokenizer.chat_templates) == {"default", "tool_use"}
    assert tokenizer.render_chat_template(USER) == "plain"
    assert tokenizer.render_chat_template(USER, tools=[{}, {}]) == "tools: 2"
    assert tokenizer.render_chat_template(USER, chat_template="default", tools=[{}]) == "plain"


def test_no_template() -> None:
    tokenizer = Tokenizer.from_gguf(metadata(None), source="m.gguf")
    with pytest.raises(UnsupportedModelError, match=r"m\.gguf: the model has no chat template"):
        tokenizer.apply_chat_template(USER)
    assert tokenizer.render_chat_template(USER, chat_template="x") == "x"


def test_parts_for_a_template_that_wants_text(tokenizers: dict[str, Tokenizer]) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    for name in ("chatml", "built", "formatted"):
        text = tokenizers[name].render_chat_template([{"role": "user", "content": parts}])
        assert "one\ntwo" in text
        assert "type" not in text
    assert "onetwo" in tokenizers["parts"].render_chat_template([{"role": "user", "content": parts}])


def test_extensions_of_chat_templates() -> None:
    for source, expected in [
        ("{% generation %}a{{ messages | length }}{% endgeneration %}b", "a1b"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'a': '<é>&'} | tojson }}", '{"a": "<é>&"}'),
        ("{{ {'a': [1]} | tojson(indent=2) }}", '{\n  "a": [\n    1\n  ]\n}'),
        ("{{ strftime_now('%Y') }}", time.strftime("%Y")),
        ("  {% if true %}\n  x\n  {% endif %}\ny\n", "  x\ny"),
    ]:
        assert ChatTemplate(source, None).render(USER) == expected


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        (None, "messages"),
        ("hello", "messages"),
        ({}, "messages"),
        ([], "messages"),
        (["hello"], r"messages\[0\]"),
        ([{"content": "x"}], r"messages\[0\]\.role"),
        ([{"role": 7, "content": "x"}], r"messages\[0\]\.role"),
        ([{"role": "", "content": "x"}], r"messages\[0\]\.role"),
        ([{"role": "user"}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": 7}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"messages\[0\]\.content\[0\]"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\]\.content\[0\]"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], r"messages\[0\]\.content\[0\]"),
        ([*USER, {"role": "user", "content": "\ud800"}], r"messages\[1\]\.content"),
        ([{"role": "user", "content": "x", "extra": object()}], r"messages\[0\]\.extra"),
        ([{"role": "user", "content": "x", 7: 7}], r"messages\[0\]"),
        ([{"role": "user", "content": "x", "n": 1 << 2000}], r"messages\[0\]\.n"),
    ],
)
def test_bad_messages(tokenizers: dict[str, Tokenizer], messages: Any, field: str) -> None:
    with pytest.raises(RequestError, match=f"^{field}"):
        tokenizers["chatml"].apply_chat_template(messages)


@pytest.mark.parametrize("tools", ["get_weather", {"type": "function"}, 5])
def test_tools_are_a_list(tokenizers: dict[str, Tokenizer], tools: Any) -> None:
    with pytest.raises(RequestError, match=r"^tools: expected a list"):
        tokenizers["chatml"].apply_chat_template(USER, tools=tools)


def test_messages_that_contain_themselves(tokenizers: dict[str, Tokenizer]) -> None:
    deep: list[Any] = []
    deep.append(deep)
    with pytest.raises(RequestError, match="levels of nesting"):
        tokenizers["chatml"].apply_chat_template([{"role": "user", "content": "x", "deep": deep}])


def test_a_call_without_text(tokenizers: dict[str, Tokenizer]) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    template = "{{ messages[0].tool_calls[0].function.name }}"
    assert tokenizers["chatml"].render_chat_template([message], chat_template=template) == "f"


# -- hostile templates ---------------------------------------------------------------------------------------

GROWING = (
    "{% set ns = namespace(x=START) %}{% for i in range(200) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"
)


def growing(start: str, step: str) -> str:
    return GROWING.replace("START", start).replace("STEP", step)


ENDLESS = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
    '{{ "a" * 10**9 }}',
    '{{ 10**9 * "a" }}',
    "{{ messages[0].content * 1000000000 }}",
    "{{ [1] * 10**9 }}",
    "{{ (10**1000) ** 10000 }}",
    "{{ 9 ** (9 ** 9) }}",
    growing("'aaaa'", "ns.x + ns.x"),
    growing("'aaaa'", "ns.x ~ ns.x"),
    growing("'aaaa'", "'%s%s' % (ns.x, ns.x)"),
    growing("'aaaa'", "'{0}{0}'.format(ns.x)"),
    growing("'aaaa'", "[ns.x, ns.x] | join"),
    growing("'aaaa'", "ns.x | replace('a', 'aa')"),
    growing("[1]", "[ns.x, ns.x]"),
    growing("[1]", "(ns.x, ns.x)"),
    growing("[1]", "ns.x + ns.x"),
    growing("1", "{'a': ns.x, 'b': ns.x}"),
    growing("1", "dict(a=ns.x, b=ns.x)"),
    growing("[1]", "[ns.x] | batch(3, ns.x) | list"),
    '{{ "a" | center(1000000000) }}',
    '{{ "a".rjust(1000000000) }}',
    '{{ "%1000000000d" % 1 }}',
    '{{ "%*d" % (1000000000, 1) }}',
    '{{ "{:1000000000}".format(1) }}',
    '{{ "{:{}}".format(1, 1000000000) }}',
    '{{ "a" | indent(1000000000) }}',
    "{{ [1, 2] | tojson(indent=1000000000) }}",
    '{{ ("a" * 1000000).replace("", "b" * 1000000) }}',
    '{{ ("x" * 1000000).join(range(100000) | map("string")) }}',
    '{{ range(100000) | map("string") | join("y" * 1000000) }}',
    '{{ ("%(a)s" * 20000) % {"a": "z" * 1000000} }}',
    "{{ [[1]] * 3 | sum(start=[]) }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
]
FORBIDDEN = [
    '{{ "".__class__.__mro__ }}',
    "{{ messages.__class__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    '{{ "a".own("x").strip() }}',
    '{{ "a"._spans[0] }}',
    "{{ messages.append(1) }}",
    "{{ messages[0].update({}) }}",
    "{{ (5).to_bytes(1000000000) }}",
    '{{ "{0.__class__.__mro__}".format("") }}',
    '{{ (messages | attr("__class__"))() }}',
]


@pytest.fixture
def small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_budget, "STEPS_MAX", 50_000)
    monkeypatch.setattr(template_budget, "TIME_S_MAX", 1.0)


@pytest.mark.usefixtures("small_budget")
@pytest.mark.parametrize("source", [*ENDLESS, *FORBIDDEN], ids=lambda source: source[:60])
def test_hostile_templates(source: str) -> None:
    started = time.monotonic()
    with pytest.raises((ModelFileError, RequestError)) as caught:
        ChatTemplate(source, "m.gguf").render(USER)
    if source in ENDLESS:
        assert isinstance(caught.value, ModelFileError)
        assert "m.gguf: chat_template" in str(caught.value)
    assert time.monotonic() - started < 10


def test_the_clock_stops_a_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_budget, "TIME_S_MAX", 0.05)
    with pytest.raises(ModelFileError, match=r"ran for more than 0\.05 s"):
        ChatTemplate(ENDLESS[0], "m.gguf").render(USER)


def test_attributes_out_of_reach_are_nothing() -> None:
    for source in ("{{ x.__class__ }}", '{{ "" | attr("__class__") }}', "{{ raise_exception.__globals__ }}"):
        assert ChatTemplate(source, "m.gguf").render(USER) == ""


def test_renderings_in_many_threads(tokenizers: dict[str, Tokenizer]) -> None:
    def conversation(n: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{n} <|im_end|>"}] * (n % 7 + 1)

    tokenizer = tokenizers["thinking"]
    expected = [tokenizer.apply_chat_template(conversation(n)) for n in range(40)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(tokenizer.apply_chat_template, map(conversation, range(40)))) == expected


def test_no_rendering_holds_another_s_budget() -> None:
    template = ChatTemplate("{% for i in range(1000) %}{{ 'a' + 'b' }}{% endfor %}", "m.gguf")
    for _ in range(3):
        assert template.render(USER) == "ab" * 1000


@pytest.mark.parametrize(
    "source",
    [
        *("{{", "{% if %}", "{% for %}", "{% include 'x' %}", "{% extends 'x' %}", "{% import 'x' as y %}"),
        *("{{ 'x' | nofilter }}", "{{ lipsum | nofilter }}", "{{ " + "(" * 5000, "{% for a in x %}" * 60),
        *("x" * (256 * 1024 + 1), "{{ " + "[" * 4000 + "]" * 4000 + " }}", "{{ " + "9" * 5000 + " }}"),
    ],
    ids=lambda source: source[:24],
)
def test_templates_that_are_none(source: str) -> None:
    with pytest.raises(ModelFileError, match=r"^m\.gguf: chat_template"):
        ChatTemplate(source, "m.gguf")
    with pytest.raises(RequestError, match=r"^chat_template"):
        Tokenizer.from_gguf(metadata(None)).apply_chat_template(USER, chat_template=source)


def test_a_template_of_the_model_fails_when_used() -> None:
    tokenizer = Tokenizer.from_gguf(metadata("{{"), source="m.gguf")
    with pytest.raises(ModelFileError, match=r"m\.gguf"):
        tokenizer.apply_chat_template(USER)
    assert tokenizer.encode("text is not touched by it")


def test_refusals_of_the_template() -> None:
    refusing = ChatTemplate("{{ raise_exception('roles must alternate') }}", "m.gguf")
    with pytest.raises(RequestError, match="roles must alternate"):
        refusing.render(USER)
    with pytest.raises(RequestError, match="UndefinedError"):
        ChatTemplate("{{ messages[0].tool_calls[0] }}", "m.gguf").render(USER)
    with pytest.raises(FastLLMError, match="ZeroDivisionError"):
        ChatTemplate("{{ 1 / 0 }}", "m.gguf").render(USER)


# -- TemplateText --------------------------------------------------------------------------------------------
# Letters tell where text comes from: the template's is upper case, everybody else's lower case.


def own_and_foreign(pieces: list[str]) -> str:
    return join_text([TemplateText.own(piece) if piece.isupper() else piece for piece in pieces])


marked = st.lists(
    st.text("AB", min_size=1, max_size=3) | st.text("ab", min_size=1, max_size=3), min_size=1, max_size=6
).map(own_and_foreign)
short = st.text("ABab", max_size=2)
OPERATIONS = {
    "add": st.tuples(marked).map(lambda a: lambda s: s + a[0]),
    "radd": st.tuples(marked).map(lambda a: lambda s: str.__str__(a[0]).lower() + s),
    "multiply": st.integers(-1, 3).map(lambda n: lambda s: s * n),
    "rmultiply": st.integers(-1, 3).map(lambda n: lambda s: n * s),
    "slice": st.slices(12).map(lambda key: lambda s: s[key]),
    "index": st.integers(0, 3).map(lambda i: lambda s: s[i % len(s)] if s else s),
    "strip": st.sampled_from(["A", "b", "Aa", None]).map(lambda c: lambda s: s.strip(c)),
    "lstrip": st.sampled_from(["A", "b", "Aa", None]).map(lambda c: lambda s: s.lstrip(c)),
    "rstrip": st.sampled_from(["A", "b", "Aa", None]).map(lambda c: lambda s: s.rstrip(c)),
    "removeprefix": short.map(lambda c: lambda s: s.removeprefix(c)),
    "removesuffix": short.map(lambda c: lambda s: s.removesuffix(c)),
    "split": short.filter(bool).map(lambda c: lambda s: s.split(c)[-1]),
    "rsplit": short.filter(bool).map(lambda c: lambda s: s.rsplit(c, 1)[0]),
    "partition": short.filter(bool).map(lambda c: lambda s: s.partition(c)[2]),
    "rpartition": short.filter(bool).map(lambda c: lambda s: s.rpartition(c)[0]),
    "splitlines": st.booleans().map(lambda keep: lambda s: ("a\n" + s + "\na" + s).splitlines(keep)[-1]),
    "split on space": st.none().map(lambda _: lambda s: (" " + s + "  " + s).split()[-1] if s else s),
    "join": st.tuples(marked, marked).map(lambda parts: lambda s: s.join(parts)),
    "replace": st.tuples(short.filter(bool), marked).map(lambda a: lambda s: s.replace(a[0], a[1])),
    "replace once": st.tuples(short.filter(bool), marked).map(lambda a: lambda s: s.replace(a[0], a[1], 1)),
    "percent": st.tuples(marked).map(lambda a: lambda s: TemplateText.own("A%sB") % s if s else s),
}


@given(st.data(), marked)
def test_spans_follow_the_text(data: st.DataObject, text: str) -> None:
    """After any operations: the same text as of plain strings, and the spans are exactly the upper case."""
    plain = str.__str__(text)
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(sorted(OPERATIONS)))
        operation = data.draw(OPERATIONS[name], label=name)
        text, plain = operation(text), str.__str__(operation(plain))
        assert text == plain
        # Without spans the operation may have begun with a plain str, whose own additions are not followed.
        own = {i for a, b in spans_of(text) for i in range(a, b)}
        assert all(plain[i] in "AB" for i in own)
        if isinstance(text, TemplateText):
            assert own == {i for i, character in enumerate(plain) if character in "AB"}
        text = text if isinstance(text, TemplateText) else own_and_foreign(_runs(plain))


def _runs(text: str) -> list[str]:
    runs: list[str] = []
    for character in text:
        if runs and runs[-1].isupper() == character.isupper():
            runs[-1] += character
        else:
            runs.append(character)
    return runs


def test_spans_are_sorted_disjoint_and_joined() -> None:
    text = join_text(
        [TemplateText.own("A"), TemplateText.own("B"), "a", "", TemplateText.own("C"), TemplateText()]
    )
    assert spans_of(text) == ((0, 2), (3, 4))
    assert spans_of("plain") == spans_of(TemplateText("plain")) == ()
    assert spans_of(join_text(["a", "b"])) == ()


def test_literals_with_values_in_them() -> None:
    value = TemplateText.own("X")
    for text, expected in [
        (TemplateText.own("%s%%%s") % (value, "y"), "X%y"),
        (ChatTemplate("{{ 'a{0}b{1}'.format('c', 'd') }}", None).render(USER), "acbd"),
    ]:
        assert text == expected
    assert spans_of(TemplateText.own("%s%%%s") % (value, "y")) == ((0, 2),)
    assert spans_of(TemplateText.own("a%d") % 7) == ()  # not followed, so nobody's
    for source, spans in [
        ("{{ 'a{}b{}'.format('c', messages[0].role ~ messages[0].content) }}", ((0, 7),)),
        ("{{ 'a{x}'.format(x=messages[0].content) }}", ((0, 1),)),
        ("{{ 'a{:>3}'.format('b') }}", ()),
        ("{{ 'a{{'.format() }}", ()),
    ]:
        assert spans_of(ChatTemplate(source, None).render(USER)) == spans


def test_texts_are_json_and_keys() -> None:
    text = TemplateText.own("a")
    assert json.dumps({text: text}) == '{"a": "a"}'
    assert {text: 1}["a"] == 1
    assert hash(text) == hash("a")
