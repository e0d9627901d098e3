"""Sampling fields that several APIs share, and what the engine gets of them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fastllm.errors import RequestError
from fastllm.sampling_params import RequestOutputKind, SamplingParams
from fastllm.serve.errors import HTTPError
from fastllm.serve.protocol.base import Body, Harmless
from fastllm.structured_outputs import StructuredOutputsParams

GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


class StreamOptions(Body):
    """`include_obfuscation` pads chunks of some servers; nothing is padded here."""

    include_usage: bool | None = None
    include_obfuscation: Any = None


class JsonSchema(Body):
    name: str = Field(max_length=64)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """vLLM's field of this name."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Sampling(Harmless):
    """Fields of OpenAI's completions and chat completions, and those that vLLM adds."""

    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    cache_salt: str | None = Field(default=None, max_length=1024)
    priority: int | None = None


PLAIN = (
    *("n", "temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty"),
    *("top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos"),
    *("skip_special_tokens", "include_stop_str_in_output", "allowed_token_ids", "bad_words"),
)
"""Fields that mean the same to `SamplingParams`."""


def to_params(body: Sampling, **more: Any) -> SamplingParams:
    """What the engine gets.

    Args:
        more: arguments of `SamplingParams` that are spelt differently in each API, and the form.

    Raises:
        RequestError, HTTPError: naming the field.
    """
    given: dict[str, Any] = {name: value for name in PLAIN if (value := getattr(body, name)) is not None}
    if body.logit_bias is not None:
        given["logit_bias"] = {_token(token): bias for token, bias in body.logit_bias.items()}
    given["output_kind"] = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    return SamplingParams(**{**given, **more})


def _token(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise RequestError("logit_bias", text[:20], "token ids as keys")
    return int(text)


def form_of(body: Sampling) -> tuple[str, StructuredOutputsParams | None]:
    """The form that an answer has to have, and the one field that asks for it; "" and None: none does.

    Raises:
        RequestError, HTTPError: naming the field.
    """
    forms: dict[str, dict[str, Any]] = {}
    if body.response_format is not None and body.response_format.type != "text":
        forms["response_format"] = _format(body.response_format)
    if body.structured_outputs is not None:
        asked = body.structured_outputs.model_dump(by_alias=True, exclude_none=True)
        if asked:
            forms["structured_outputs"] = asked
    for name, kind in GUIDED.items():
        if getattr(body, name) is not None:
            forms[name] = {kind: getattr(body, name)}
    if len(forms) > 1:
        names = " and ".join(forms)
        raise HTTPError(400, f"{names}: one of them at a time", param=list(forms)[1], code="invalid_value")
    for name, form in forms.items():
        try:
            return name, StructuredOutputsParams(**form)
        except RequestError as error:
            raise RequestError(name, error.value, error.limit) from error
    return "", None


def _format(asked: ResponseFormat) -> dict[str, Any]:
    if asked.type == "json_object":
        return {"json_object": True}
    if asked.json_schema is None or asked.json_schema.schema_ is None:
        raise HTTPError(
            400, "response_format.json_schema: a schema is needed", param="response_format.json_schema",
            code="missing_required_parameter",
        )  # fmt: skip
    return {"json": asked.json_schema.schema_}
