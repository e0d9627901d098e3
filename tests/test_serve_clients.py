"""The clients that people have: `openai` and `anthropic`, sync and async, streams and tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema
import openai
import pytest
import tiny
from serving import Running

TEMPLATE = (
    "{{ bos_token }}{% if tools %}Tools:\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'Call them as <tool_call>{"name": ..., "arguments": {...}}</tool_call>\n{% endif %}'
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Bern", "Basel"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "function": {"name": "weather", "description": 'of a "city"', "parameters": SCHEMA},
}
KEY = "sk-" + "k" * 30


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = tiny.make_model("llama", max_position_embeddings=1024)
    path = tiny.save_hf(model, tmp_path_factory.mktemp("serve") / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLLM_API_KEY", KEY)
        with Running(path, chat_template=TEMPLATE) as running:
            yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key=KEY,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as found:
        yield found


@pytest.fixture(scope="module")
def claude(server: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=server.url,
        api_key=KEY,
        max_retries=0,
        http_client=anthropic.DefaultHttpxClient(trust_env=False),
    ) as found:
        yield found


MESSAGES: Any = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "Hi"}]
SAMPLED: Any = {"model": "tiny", "seed": 3, "temperature": 1.0}


# openai: chat


def test_chat(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(messages=MESSAGES, max_completion_tokens=12, **SAMPLED)
    assert found.usage is not None
    assert found.usage.completion_tokens <= 12
    pieces = client.chat.completions.create(
        messages=MESSAGES,
        max_completion_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        **SAMPLED,
    )
    text = ""
    for piece in pieces:
        if piece.choices:
            text += piece.choices[0].delta.content or ""
        else:
            assert piece.usage is not None
            assert piece.usage.completion_tokens == found.usage.completion_tokens
            assert piece.usage.prompt_tokens == found.usage.prompt_tokens
    assert text == found.choices[0].message.content


async def test_chat_async(server: Running, client: openai.OpenAI) -> None:
    found = client.chat.completions.create(messages=MESSAGES, max_tokens=12, **SAMPLED)
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key=KEY, http_client=openai.DefaultAsyncHttpxClient(trust_env=False)
    ) as many:
        stream = await many.chat.completions.create(messages=MESSAGES, max_tokens=12, stream=True, **SAMPLED)
        text = "".join([piece.choices[0].delta.content or "" async for piece in stream])
        models = [item.id async for item in many.models.list()]
    assert text == found.choices[0].message.content
    assert models == ["tiny"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("seed", range(3))
def test_tools_that_have_to_be_called(client: openai.OpenAI, choice: Any, seed: int) -> None:
    asked: Any = {"messages": MESSAGES, "model": "tiny", "seed": seed, "tools": [TOOL], "tool_choice": choice,
                  "parallel_tool_calls": False, "max_tokens": 300}  # fmt: skip
    found = client.chat.completions.create(**asked).choices[0]
    assert found.finish_reason == "tool_calls"
    assert found.message.content is None
    assert found.message.tool_calls is not None
    (call,) = found.message.tool_calls
    assert call.type == "function"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)

    names, arguments, reasons = [], "", []
    for piece in client.chat.completions.create(**asked, stream=True):
        for delta in piece.choices[0].delta.tool_calls or []:
            assert delta.index == 0
            assert delta.function is not None
            names += [delta.function.name] if delta.function.name else []
            arguments += delta.function.arguments or ""
        reasons += [piece.choices[0].finish_reason] if piece.choices[0].finish_reason else []
    assert (names, arguments, reasons) == (["weather"], call.function.arguments, ["tool_calls"])


def test_a_conversation_with_calls(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Bern", "days": 2}'}}  # fmt: skip
    history: Any = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
    ]
    found = client.chat.completions.create(messages=history, tools=[TOOL], max_tokens=4, **SAMPLED)
    assert found.usage is not None
    assert found.usage.prompt_tokens > 100
    history[3]["tool_call_id"] = "call_2"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=history, tools=[TOOL], max_tokens=4, **SAMPLED)
    assert caught.value.param == "messages[3].tool_call_id"


def test_structured_output(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA, "strict": True}}
    found = client.chat.completions.create(messages=MESSAGES, response_format=form, **SAMPLED)
    jsonschema.validate(json.loads(found.choices[0].message.content or ""), SCHEMA)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            messages=MESSAGES, response_format=form, tools=[TOOL], tool_choice="required", **SAMPLED
        )
    assert caught.value.param == "response_format"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{**TOOL, "type": "x"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": [TOOL] * 200}, "tools"),
        ({"tools": [TOOL], "tool_choice": "some"}, "tool_choice"),
        ({"tool_choice": "required"}, "tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content[0].type"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "messages[0].role"),
    ],
)  # fmt: skip
def test_tools_and_messages_that_are_wrong(client: openai.OpenAI, more: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"messages": MESSAGES, "model": "tiny", **more})
    assert caught.value.param == param


def test_errors_are_of_the_clients_classes(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(messages=MESSAGES, model="gpt-4")
    other = client.with_options(api_key="sk-wrong-wrong-wrong-wrong")
    with pytest.raises(openai.AuthenticationError):
        other.models.list()
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(prompt="a", model="tiny", extra_body={"nonsense": 1})
    assert caught.value.code == "unknown_parameter"


# openai: the rest


def test_completions_and_embeddings(client: openai.OpenAI) -> None:
    found = client.completions.create(prompt=["a", "b"], max_tokens=3, logprobs=2, **SAMPLED)
    assert [choice.index for choice in found.choices] == [0, 1]
    assert found.choices[0].logprobs is not None
    # The client asks for base64 by itself and unpacks it.
    vectors = client.embeddings.create(input=["a", "b"], model="tiny").data
    assert len(vectors[0].embedding) == 64
    assert sum(value * value for value in vectors[1].embedding) == pytest.approx(1.0, abs=1e-5)


def test_responses(client: openai.OpenAI) -> None:
    asked: Any = {"input": "Hi", "instructions": "be brief", "model": "tiny", "temperature": 0,
                  "max_output_tokens": 10}  # fmt: skip
    found = client.responses.create(**asked)
    assert found.status == "incomplete"
    assert found.usage is not None
    assert found.usage.output_tokens == 10
    chat = client.chat.completions.create(
        messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "Hi"}],
        model="tiny", temperature=0, max_tokens=10,
    )  # fmt: skip
    assert found.output_text == chat.choices[0].message.content
    kinds, text, numbers = [], "", []
    for event in client.responses.create(**asked, stream=True):
        kinds.append(event.type)
        numbers.append(event.sequence_number)
        if event.type == "response.output_text.delta":
            text += event.delta
    assert text == found.output_text
    assert numbers == list(range(len(numbers)))
    assert [kinds[i] for i in (0, 1, 2, 3, -4, -3, -2, -1)] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert event.type == "response.incomplete"
    assert event.response.output_text == found.output_text


def test_log_probabilities_of_responses(client: openai.OpenAI) -> None:
    asked: Any = {"input": "Hi", "model": "tiny", "temperature": 0, "max_output_tokens": 12,
                  "include": ["message.output_text.logprobs"], "top_logprobs": 2}  # fmt: skip
    answer = client.responses.create(**asked)
    whole = answer.to_dict()["output"][0]["content"][0]["logprobs"]  # type: ignore[index]
    assert answer.usage is not None
    assert len(whole) == answer.usage.output_tokens > 5
    assert all(len(token["top_logprobs"]) == 2 for token in whole)
    streamed: list[Any] = []
    for event in client.responses.create(**asked, stream=True):
        if event.type == "response.output_text.delta":
            streamed += event.to_dict()["logprobs"]  # type: ignore[misc]
        if event.type == "response.output_text.done":
            done = event.to_dict()["logprobs"]
    assert streamed == done == whole[: len(streamed)]
    assert streamed


def test_tokens_of_a_conversation_are_those_of_its_answer(client: openai.OpenAI, server: Running) -> None:
    call = {"id": "call_1", "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Bern", "days": 2}'}}  # fmt: skip
    history: Any = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sun"}]},
    ]
    answer = client.chat.completions.create(messages=history, tools=[TOOL], max_tokens=1, **SAMPLED)
    headers = {"authorization": f"Bearer {KEY}"}
    with server.client(headers=headers) as plain:
        found = plain.post("/tokenize", json={"messages": history, "tools": [TOOL]}).json()
        assert answer.usage is not None
        assert found["count"] == answer.usage.prompt_tokens
        wrong = plain.post("/tokenize", json={"messages": history, "tools": [{"type": "x"}]}).json()
        assert wrong["error"]["param"] == "tools[0].type"


def test_responses_with_tools(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", **TOOL["function"], "strict": True}
    asked: Any = {"input": "Hi", "model": "tiny", "tools": [tool], "tool_choice": "required",
                  "parallel_tool_calls": False}  # fmt: skip
    (call,) = client.responses.create(**asked).output
    assert call.type == "function_call"
    jsonschema.validate(json.loads(call.arguments), SCHEMA)
    with client.responses.stream(**asked) as stream:
        for _ in stream:
            pass
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call"
    jsonschema.validate(json.loads(streamed.arguments), SCHEMA)
    history: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        call.to_dict(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sun"},
    ]
    found = client.responses.create(input=history, model="tiny", tools=[tool], max_output_tokens=3)
    assert found.usage is not None
    assert found.usage.input_tokens > 100
    for more, param in (
        ({"previous_response_id": "x"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**{"input": "Hi", "model": "tiny", **more})
        assert caught.value.param == param
    text: Any = {"format": {"type": "json_schema", "name": "w", "schema": SCHEMA}}
    jsonschema.validate(
        json.loads(client.responses.create(input="Hi", model="tiny", text=text).output_text), SCHEMA
    )


# anthropic


USER: Any = [{"role": "user", "content": "Hi"}]


def test_messages(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "max_tokens": 10, "messages": USER, "system": "be brief",
                  "extra_body": {"temperature": 0}}  # fmt: skip
    found = claude.messages.create(**asked)
    chat = client.chat.completions.create(
        messages=[{"role": "system", "content": "be brief"}, *USER],
        model="tiny",
        temperature=0,
        max_tokens=10,
    )
    (block,) = found.content
    assert block.type == "text"
    assert block.text == chat.choices[0].message.content
    assert found.stop_reason == "max_tokens"
    counted = claude.messages.count_tokens(model="tiny", messages=USER, system="be brief").input_tokens
    usage = found.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted
    assert usage.output_tokens == 10
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == block.text
        final = stream.get_final_message()
    assert final.content[0].type == "text"
    assert final.content[0].text == block.text
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 10)
    stop = block.text[3:5]
    stopped = claude.messages.create(**asked, stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)


async def test_messages_async(server: Running) -> None:
    async with (
        anthropic.AsyncAnthropic(
            base_url=server.url, api_key=KEY, http_client=anthropic.DefaultAsyncHttpxClient(trust_env=False)
        ) as many,
        many.messages.stream(model="tiny", max_tokens=5, messages=USER) as stream,
    ):
        text = "".join([piece async for piece in stream.text_stream])
        assert (await stream.get_final_text()) == text


@pytest.mark.parametrize("streaming", [False, True])
def test_messages_with_tools(claude: anthropic.Anthropic, streaming: bool) -> None:
    asked: Any = {
        "model": "tiny", "max_tokens": 300, "messages": USER,
        "tool_choice": {"type": "tool", "name": "weather"},
        "tools": [{"name": "weather", "description": "of a city", "input_schema": SCHEMA}],
    }  # fmt: skip
    if streaming:
        with claude.messages.stream(**asked) as stream:
            found: Any = stream.get_final_message()
    else:
        found = claude.messages.create(**asked)
    (block,) = found.content
    assert (found.stop_reason, block.type, block.name) == ("tool_use", "tool_use", "weather")
    jsonschema.validate(block.input, SCHEMA)
    history: Any = [
        *USER,
        {"role": "assistant", "content": [block.model_dump(exclude_none=True)]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "sun"},
                                     {"type": "text", "text": "and?"}]},
    ]  # fmt: skip
    asked["tool_choice"] = {"type": "auto", "disable_parallel_tool_use": True}
    assert claude.messages.create(**{**asked, "messages": history, "max_tokens": 3}).content


def test_errors_in_anthropics_shape(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(model="tiny", max_tokens=0, messages=USER)
    assert caught.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="claude", max_tokens=1, messages=USER)
    with pytest.raises(anthropic.AuthenticationError):
        claude.with_options(api_key="wrong-wrong-wrong-wrong").messages.create(
            model="tiny", max_tokens=1, messages=USER
        )
    image: Any = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\]\.content\[0\]\.type"):
        claude.messages.create(model="tiny", max_tokens=1, messages=image)
