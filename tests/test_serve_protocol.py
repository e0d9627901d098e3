"""What the server answers: OpenAI's shapes, the same text in a stream as at once, errors with the field."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from serving import Running, events

from fastllm import LLM, SamplingParams

MESSAGES = [{"role": "user", "content": "where the river ran"}]
PROMPT = "the river ran past a small town"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_hf(tiny.make_model("llama"), tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Running]:
    with Running(path) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with LLM(path, threads=1, kv_cache_tokens=2048) as found:
        yield found


def post(client: httpx.Client, path: str, status: int = 200, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


def stream(client: httpx.Client, path: str, **body: Any) -> list[Any]:
    """The events of a stream, [DONE] looked for and left out."""
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        found = events(response)
    assert found[-1] == "[DONE]"
    return [json.loads(item) for item in found[:-1]]


# Completions


def test_completion_is_what_the_engine_says(client: httpx.Client, llm: LLM) -> None:
    found = post(client, "/v1/completions", model="tiny", prompt=PROMPT, seed=5, n=2, max_tokens=12)
    (expected,) = llm.generate(PROMPT, SamplingParams(seed=5, n=2, max_tokens=12))
    assert [choice["text"] for choice in found["choices"]] == [item.text for item in expected.outputs]
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    prompt = len(expected.prompt_token_ids)
    generated = sum(len(item.token_ids) for item in expected.outputs)
    assert found["usage"]["prompt_tokens"] == prompt
    assert found["usage"]["completion_tokens"] == generated
    assert found["usage"]["total_tokens"] == prompt + generated
    assert found["object"] == "text_completion"
    assert found["model"] == "tiny"


@given(
    st.lists(st.sampled_from((PROMPT, "a", [5, 6, 7], "the ")), min_size=1, max_size=3),
    st.integers(1, 2),
    st.integers(1, 20),
    st.sampled_from((0.0, 1.0)),
    st.sampled_from((None, ["e"], ["he", "t"])),
    st.booleans(),
)
def test_stream_joined_is_the_answer_at_once(
    client: httpx.Client, prompts: Any, n: int, most: int, heat: float, stop: Any, echo: bool
) -> None:
    if any(isinstance(item, list) for item in prompts):
        prompts = [item for item in prompts if isinstance(item, list)]
    asked = {
        "prompt": prompts, "n": n, "max_tokens": most, "temperature": heat, "stop": stop, "seed": 3,
        "logprobs": 2, "echo": echo,
    }  # fmt: skip
    whole = post(client, "/v1/completions", **asked)
    pieces = stream(client, "/v1/completions", **asked, stream_options={"include_usage": True})
    assert pieces[-1]["choices"] == []
    assert pieces[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for choice in whole["choices"]:
        own = [item for piece in pieces for item in piece["choices"] if item["index"] == choice["index"]]
        assert "".join(item["text"] for item in own) == choice["text"]
        assert [item["finish_reason"] for item in own if item["finish_reason"]] == [choice["finish_reason"]]
        joined: dict[str, list[Any]] = {name: [] for name in ("tokens", "token_logprobs", "top_logprobs")}
        for item in own:
            for name in joined:
                joined[name] += (item["logprobs"] or {}).get(name, [])
        assert joined == {name: choice["logprobs"][name] for name in joined}


def test_echo_without_tokens_scores_a_text(client: httpx.Client, llm: LLM) -> None:
    """As evaluation harnesses ask: the log probabilities of a text itself."""
    asked = {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    found = post(client, "/v1/completions", **asked)
    (expected,) = llm.generate(PROMPT, SamplingParams(max_tokens=1, prompt_logprobs=1))
    (choice,) = found["choices"]
    assert choice["text"] == PROMPT
    assert found["usage"]["completion_tokens"] == 0
    assert expected.prompt_logprobs is not None
    values = [
        None if entry is None else entry[token].logprob
        for token, entry in zip(expected.prompt_token_ids, expected.prompt_logprobs, strict=True)
    ]
    assert choice["logprobs"]["token_logprobs"] == values
    assert stream(client, "/v1/completions", **asked)[0]["choices"][0]["text"] == PROMPT


def test_a_completion_has_16_tokens_unless_told(client: httpx.Client) -> None:
    found = post(client, "/v1/completions", prompt=PROMPT, ignore_eos=True)
    assert found["usage"]["completion_tokens"] == 16
    assert found["choices"][0]["finish_reason"] == "length"


# Chat


def test_chat_is_what_the_engine_says(client: httpx.Client, llm: LLM) -> None:
    found = post(client, "/v1/chat/completions", messages=MESSAGES, seed=9, max_completion_tokens=10)
    (expected,) = llm.chat(MESSAGES, SamplingParams(seed=9, max_tokens=10))
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.outputs[0].text, "refusal": None}
    assert found["object"] == "chat.completion"
    assert found["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)


def test_chat_goes_on_to_the_end_of_the_context(client: httpx.Client) -> None:
    found = post(client, "/v1/chat/completions", messages=MESSAGES, ignore_eos=True, temperature=0)
    assert found["usage"]["total_tokens"] == 256
    assert found["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("top", [None, 0, 3])
def test_chat_stream_joined_is_the_answer_at_once(client: httpx.Client, n: int, top: int | None) -> None:
    asked: dict[str, Any] = {"messages": MESSAGES, "n": n, "seed": 4, "max_tokens": 15}
    if top is not None:
        asked |= {"logprobs": True, "top_logprobs": top}
    whole = post(client, "/v1/chat/completions", **asked)
    pieces = stream(client, "/v1/chat/completions", **asked)
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    assert len({piece["id"] for piece in pieces}) == 1
    assert all("usage" not in piece for piece in pieces)
    for choice in whole["choices"]:
        own = [piece["choices"][0] for piece in pieces if piece["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        text = "".join(item["delta"].get("content", "") for item in own)
        assert text == choice["message"]["content"]
        if top is not None:
            tokens = [token for item in own if item["logprobs"] for token in item["logprobs"]["content"]]
            assert tokens == choice["logprobs"]["content"]
            assert all(len(token["top_logprobs"]) == top for token in tokens)
        else:
            assert choice["logprobs"] is None


@pytest.mark.parametrize("streaming", [False, True])
def test_response_format(client: httpx.Client, streaming: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    asked: dict[str, Any] = {"messages": MESSAGES, "response_format": form, "max_tokens": 60, "seed": 1}
    if streaming:
        pieces = stream(client, "/v1/chat/completions", **asked)
        text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    else:
        text = post(client, "/v1/chat/completions", **asked)["choices"][0]["message"]["content"]
    assert json.loads(text)["a"] in (1, 2)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("guided_choice", ["red", "green"], {"red", "green"}),
        ("structured_outputs", {"choice": ["red", "green"]}, {"red", "green"}),
        ("guided_regex", "[ab]", {"a", "b"}),
        ("structured_outputs", {"json": {"const": 1}}, {"1"}),
        ("guided_grammar", 'start: "x" | "y"', {"x", "y"}),
    ],
)
def test_forms_of_vllm(client: httpx.Client, field: str, value: Any, allowed: set[str]) -> None:
    found = post(client, "/v1/chat/completions", messages=MESSAGES, **{field: value})
    assert found["choices"][0]["message"]["content"] in allowed


def test_fields_of_vllm_do_what_they_say(client: httpx.Client) -> None:
    def text(**more: Any) -> str:
        asked = {"prompt": PROMPT, "max_tokens": 8, "seed": 1, "temperature": 1.5, **more}
        return str(post(client, "/v1/completions", **asked)["choices"][0]["text"])

    greedy = text(temperature=0)
    assert text(top_k=1) == greedy
    assert text(min_p=1.0) == greedy
    assert text() != greedy
    assert text(temperature=0, repetition_penalty=0.01) != greedy
    assert set(text(allowed_token_ids=[68])) == {text(allowed_token_ids=[68])[0]}
    assert text(priority=3, cache_salt="a") == text()


def test_harmless_fields_and_nulls_are_taken(client: httpx.Client) -> None:
    asked = {"messages": MESSAGES, "max_tokens": 3, "temperature": 0}
    expected = post(client, "/v1/chat/completions", **asked)["choices"]
    more = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "audio": None,
            "functions": None, "safety_identifier": "x", "prompt_cache_key": "y"}  # fmt: skip
    assert post(client, "/v1/chat/completions", **asked, **more)["choices"] == expected


# What is refused


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"function_call": "auto"}, "function_call"),
        ({"verbosity": "low"}, "verbosity"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1_000_000}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"seed": 2**70}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"guided_regex": "(", }, "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"nonsense": 1}}, "chat_template_kwargs"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"cache_salt": 5}, "cache_salt"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "x" * 1000}]}, "messages"),
    ],
)  # fmt: skip
def test_a_field_that_is_wrong_is_named(client: httpx.Client, more: dict[str, Any], param: str) -> None:
    for streaming in (False, True):
        body = {"messages": MESSAGES, "max_tokens": 3, "stream": streaming, **more}
        if "max_completion_tokens" not in more and "max_tokens" not in more:
            body["max_tokens"] = 3
        error = post(client, "/v1/chat/completions", 400, **body)["error"]
        assert error["param"] == param, error
        assert error["type"] == "invalid_request_error"
        assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1 << 40]}, "prompt"),
        ({"prompt": [400]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 65}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 30}, "logprobs"),
        ({"prompt": {"a": 1}}, "prompt"),
    ],
)
def test_a_prompt_that_is_wrong_is_named(client: httpx.Client, more: dict[str, Any], param: str) -> None:
    error = post(client, "/v1/completions", 400, **{"prompt": PROMPT, "max_tokens": 2, **more})["error"]
    assert error["param"].split("[")[0].split(".")[0] == param, error


def test_no_model_of_that_name(client: httpx.Client) -> None:
    error = post(client, "/v1/chat/completions", 404, model="gpt-4", messages=MESSAGES)["error"]
    assert error["code"] == "model_not_found"


def test_lone_surrogates_are_refused(client: httpx.Client) -> None:
    raw = b'{"prompt":"\\ud800","max_tokens":1}'
    response = client.post("/v1/completions", content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 5000, b"{}" * 2, b"NaN"],
)
def test_what_is_no_body(client: httpx.Client, raw: bytes) -> None:
    response = client.post("/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_routes_that_are_not_there(client: httpx.Client) -> None:
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    response = client.get("/v1/chat/completions")
    assert response.status_code == 405
    assert response.json()["error"]["message"]


# Tokens, embeddings, models


def test_tokenize_and_back(client: httpx.Client, llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    found = post(client, "/tokenize", prompt=PROMPT)
    assert found["tokens"] == tokenizer.encode(PROMPT)
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 256
    assert post(client, "/detokenize", tokens=found["tokens"])["prompt"] == PROMPT
    chat = post(client, "/tokenize", messages=MESSAGES, return_token_strs=True)
    assert chat["tokens"] == tokenizer.apply_chat_template(MESSAGES)
    assert "".join(chat["token_strs"]).endswith("assistant:")
    assert post(client, "/tokenize", 400)["error"]["param"] == "prompt"
    assert post(client, "/detokenize", 400, tokens=[-5])["error"]["param"]


def test_embeddings(client: httpx.Client, llm: LLM) -> None:
    texts = [PROMPT, "where"]
    found = post(client, "/v1/embeddings", input=texts, pooling="mean")
    expected = llm.embed(texts, pooling="mean")
    for entry, output in zip(found["data"], expected, strict=True):
        assert np.array_equal(np.array(entry["embedding"], np.float32), output.embedding)
    packed = post(client, "/v1/embeddings", input=texts, pooling="mean", encoding_format="base64")
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert np.array_equal(np.frombuffer(raw, "<f4"), expected[0].embedding)
    assert found["usage"]["prompt_tokens"] == sum(len(item.prompt_token_ids) for item in expected)
    assert post(client, "/v1/embeddings", 400, input=PROMPT, dimensions=5)["error"]["param"] == "dimensions"
    assert post(client, "/v1/embeddings", 400, input=[])["error"]["param"] == "input"


def test_models(client: httpx.Client) -> None:
    (entry,) = client.get("/v1/models").json()["data"]
    assert (entry["id"], entry["object"], entry["max_model_len"]) == ("tiny", "model", 256)
    assert client.get("/v1/models/tiny").json() == entry
    assert client.get("/v1/models/other").status_code == 404


def test_version_health_ready(client: httpx.Client) -> None:
    import fastllm

    assert client.get("/version").json() == {"version": fastllm.__version__}
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}


def test_description(client: httpx.Client) -> None:
    found = client.get("/openapi.json").json()
    body = found["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    name = body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
    schema = found["components"]["schemas"][name]
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["messages"]

    def check(value: Any) -> None:
        if isinstance(value, dict):
            reference = value.get("$ref")
            if reference is not None:
                assert reference.rsplit("/", 1)[1] in found["components"]["schemas"], reference
            for item in value.values():
                check(item)
        elif isinstance(value, list):
            for item in value:
                check(item)

    check(found)


# Reasoning


@pytest.fixture(scope="module")
def thinker(path: Path) -> Iterator[httpx.Client]:
    """A server that takes what stands between <think> and </think> for reasoning."""
    with Running(path, reasoning_parser="think") as running, running.client() as found:
        yield found


@pytest.mark.parametrize("thought", ["<think>[a-z ]{9}</think>", "<think>[a-z ]{30}", ""])
def test_tokens_of_reasoning_are_counted(thinker: httpx.Client, llm: LLM, thought: str) -> None:
    """With its markers; all of them where it has no end. A stream counts the same."""
    body = {
        "model": "tiny",
        "messages": MESSAGES,
        "max_tokens": 60 if thought.endswith("</think>") or not thought else 12,
        "structured_outputs": {"regex": thought + "[xyz ]{6}"},
        "seed": 3,
    }
    found = post(thinker, "/v1/chat/completions", **body)
    *_, last = stream(thinker, "/v1/chat/completions", **body, stream_options={"include_usage": True})
    for name in ("completion_tokens", "completion_tokens_details"):
        assert last["usage"][name] == found["usage"][name]
    counted = found["usage"]["completion_tokens_details"]["reasoning_tokens"]
    answer = post(thinker, "/v1/responses", input="where the river ran", max_output_tokens=12, model="tiny")
    assert answer["usage"]["output_tokens_details"] == {"reasoning_tokens": 0}
    message = found["choices"][0]["message"]
    generated = found["usage"]["completion_tokens"]
    if not thought:
        assert (counted, message.get("reasoning_content")) == (0, None)
    elif thought.endswith("</think>"):
        assert message["reasoning_content"]
        assert 0 < counted < generated
        # The end of the reasoning may be in one token with the first letter of what follows.
        rest = len(llm.get_tokenizer().encode(message["content"], add_special_tokens=False))
        assert abs(generated - counted - rest) <= 2
    else:
        assert counted == generated == 12
        assert not message["content"]


@pytest.fixture(scope="module")
def deep(path: Path) -> Iterator[httpx.Client]:
    """The prompt opens the reasoning, and the model, which knows no better, never ends it."""
    template = (
        "{% for message in messages %}{{ message.content }}{% endfor %}"
        "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
    )
    with (
        Running(path, reasoning_parser="think", chat_template=template) as running,
        running.client() as found,
    ):
        yield found


def test_a_budget_ends_reasoning(deep: httpx.Client, llm: LLM) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 40, "seed": 3}
    endless = post(deep, "/v1/chat/completions", **body)
    assert endless["usage"]["completion_tokens_details"]["reasoning_tokens"] == 40
    found = post(deep, "/v1/chat/completions", **body, thinking_token_budget=10)
    end = len(llm.get_tokenizer().encode("\n</think>\n\n", add_special_tokens=False))
    counted = found["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 10 < counted <= 10 + end
    message = found["choices"][0]["message"]
    assert endless["choices"][0]["message"]["reasoning_content"].startswith(message["reasoning_content"])
    assert message["content"]
    *_, last = stream(
        deep, "/v1/chat/completions", **body, thinking_token_budget=10, stream_options={"include_usage": True}
    )
    for name in ("completion_tokens", "completion_tokens_details"):
        assert last["usage"][name] == found["usage"][name]


def test_thinking_of_a_template_that_cannot_be_told(client: httpx.Client, thinker: httpx.Client) -> None:
    """It may be asked to go on as it does, and, if it reasons, not to change."""
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 5}
    post(client, "/v1/messages", **body, thinking={"type": "enabled", "budget_tokens": 1024})
    post(client, "/v1/messages", **body, thinking={"type": "disabled"})
    found = post(thinker, "/v1/messages", 400, **body, thinking={"type": "disabled"})
    assert found["error"]["message"].startswith("thinking")


def test_the_budget_of_a_message(deep: httpx.Client) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30, "temperature": 0}
    found = post(deep, "/v1/messages", **body, thinking={"type": "enabled", "budget_tokens": 8})
    assert [block["type"] for block in found["content"]] == ["thinking", "text"]
    found = post(deep, "/v1/messages", 400, **body, thinking={"type": "enabled", "budget_tokens": 0})
    assert "budget_tokens" in found["error"]["message"]


@pytest.mark.parametrize("more", [{"thinking_token_budget": 5}, {"thinking_token_budget": 5, "n": 2}])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_form_is_that_of_the_answer_and_not_of_the_reasoning(
    deep: httpx.Client, more: dict[str, Any], streamed: bool
) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 60, "seed": 3, **more}
    body["structured_outputs"] = {"choice": ["red", "green"]}
    if streamed:
        texts = dict.fromkeys(range(more.get("n", 1)), "")
        for event in stream(deep, "/v1/chat/completions", **body):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
        contents = list(texts.values())
    else:
        found = post(deep, "/v1/chat/completions", **body)
        contents = [choice["message"]["content"] for choice in found["choices"]]
        assert all(choice["message"]["reasoning_content"] for choice in found["choices"])
    assert set(contents) <= {"red", "green"}


def test_fields_that_a_template_cannot_obey_are_named(client: httpx.Client, deep: httpx.Client) -> None:
    chat = {"model": "tiny", "messages": MESSAGES, "max_tokens": 3}
    found = post(client, "/v1/chat/completions", 400, **chat, reasoning_effort="low")
    assert found["error"]["param"] == "reasoning_effort"
    found = post(client, "/v1/responses", 400, model="tiny", input="a", reasoning={"effort": "low"})
    assert found["error"]["param"] == "reasoning.effort"
    found = post(deep, "/v1/messages", 400, **chat, thinking={"type": "enabled", "display": "omitted"})
    assert "display" in found["error"]["message"]
    prefilled = {**chat, "messages": [*MESSAGES, {"role": "assistant", "content": "The"}]}
    found = post(client, "/v1/messages", 400, **prefilled)
    assert "messages" in found["error"]["message"]


def test_a_response_that_is_cut_off_in_its_reasoning(deep: httpx.Client) -> None:
    """The same items in a stream and at once; they can be sent back."""
    body = {"model": "tiny", "input": "where the river ran", "max_output_tokens": 4, "temperature": 0}
    found = post(deep, "/v1/responses", **body)
    assert [(item["type"], item["status"]) for item in found["output"]] == [("reasoning", "incomplete")]
    with deep.stream("POST", "/v1/responses", json={**body, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    last = json.loads(lines[-1].removeprefix("data: "))["response"]
    assert [(item["type"], item["status"]) for item in last["output"]] == [("reasoning", "incomplete")]
    again = [{"role": "user", "content": "a"}, *found["output"], {"role": "user", "content": "b"}]
    post(deep, "/v1/responses", **{**body, "input": again})


@pytest.mark.parametrize("ids", [[-1], [10**9], [5, 2**70]])
def test_ids_that_there_are_not(client: httpx.Client, ids: list[int]) -> None:
    found = post(client, "/detokenize", 400, model="tiny", tokens=ids)
    assert found["error"]["param"].startswith("tokens")
    found = post(client, "/v1/embeddings", 400, model="tiny", input=ids)
    assert found["error"]["param"].startswith("input")
