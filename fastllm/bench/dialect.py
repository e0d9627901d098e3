"""The OpenAI dialect: bodies of requests, and what their answers say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from fastllm.bench.prompts import Work
from fastllm.errors import RequestError

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
# Fields that a server may not know; they are left out if it refuses them.
IGNORE_EOS, USAGE = "ignore_eos", "stream_options"
_SEVERAL = ("n", "best_of")


class BadAnswer(Exception):
    """An answer that is not of the dialect; the text says what is wrong."""


class ServerSaid(Exception):
    """An error that the server reports inside an answer."""


@dataclass(frozen=True)
class Chunk:
    """What one event of a stream, or an answer in one piece, says.

    Attributes:
        text: it brings text (of an answer, of reasoning, or of a tool call).
        finish_reason: if the answer ends here.
        prompt_tokens, cached_tokens, output_tokens: of `usage`, if it is there.
    """

    text: bool
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None


def base_of(url: str) -> str:
    """The URL that the dialect's paths follow; a /v1 at its end is taken off.

    Raises:
        RequestError: it is no http or https URL, or carries a name, a password or a query.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port_ok = parts.port is None or parts.port > 0
    except ValueError:
        port_ok = False
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_ok:
        raise RequestError("base_url", _without_name(url), "an http or https URL")
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise RequestError("base_url", _without_name(url), "no name, password or query (--api-key-env)")
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def _without_name(url: str) -> str:
    before, at, after = url.rpartition("@")
    return f"...@{after}" if at else before + after


def check_extra(extra: Mapping[str, Any]) -> None:
    """Refuse fields that would make the figures mean something else.

    Raises:
        RequestError: more than one answer per request is asked for, or the stream is set.
    """
    for name in _SEVERAL:
        if extra.get(name) not in (None, 1):
            raise RequestError(f"extra: {name}", extra[name], "1: a request is measured by its one answer")
    if "stream" in extra:
        raise RequestError("extra: stream", extra["stream"], "the option --no-stream instead")


def make_body(
    endpoint: str,
    work: Work,
    *,
    model: str,
    stream: bool,
    temperature: float | None,
    left_out: frozenset[str],
    extra: Mapping[str, Any],
) -> bytes:
    """A request as JSON. A field of `extra` replaces ours; null takes a field away."""
    body: dict[str, Any] = {"model": model, "stream": stream}
    body["messages" if endpoint == "chat" else "prompt"] = work.prompt
    if work.max_tokens is not None:
        body["max_tokens"] = work.max_tokens
    if temperature is not None:
        body["temperature"] = temperature
    if IGNORE_EOS not in left_out:
        body[IGNORE_EOS] = True
    if stream and USAGE not in left_out:
        body[USAGE] = {"include_usage": True}
    body |= extra
    return json.dumps({name: value for name, value in body.items() if value is not None}).encode()


def read_chunk(endpoint: str, text: str | bytes, *, stream: bool) -> Chunk:
    """What an event's data, or a whole answer, says.

    Raises:
        BadAnswer: it is not of the dialect.
        ServerSaid: it is an error.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"no JSON: {_shown(text)}") from error
    if not isinstance(found, dict):
        raise BadAnswer(f"no JSON object: {_shown(text)}")
    if found.get("error"):
        raise ServerSaid(error_text(found))
    choices = found.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise BadAnswer(f"`choices` is no list of objects: {_shown(text)}")
    usage = found.get("usage") or {}
    if not choices and "choices" not in found and not usage:
        raise BadAnswer(f"neither `choices` nor `usage`: {_shown(text)}")
    brings_text, reason = False, None
    for choice in choices:
        inner = choice.get("delta" if stream else "message") if endpoint == "chat" else choice
        brings_text |= isinstance(inner, dict) and any(inner.get(name) for name in _TEXTS[endpoint])
        if isinstance(choice.get("finish_reason"), str):
            reason = choice["finish_reason"]
    if not isinstance(usage, dict):
        raise BadAnswer(f"`usage` is no object: {_shown(text)}")
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Chunk(
        bool(brings_text),
        reason,
        _count(usage.get("prompt_tokens")),
        _count(cached),
        _count(usage.get("completion_tokens")),
    )


_TEXTS = {
    "completions": ("text",),
    "chat": ("content", "reasoning_content", "reasoning", "tool_calls", "function_call", "refusal"),
}


def error_text(found: Any) -> str:
    """The message of an error object, in whichever of its usual forms."""
    if isinstance(found, dict):
        inner = found.get("error", found.get("detail", found.get("message", found)))
        if isinstance(inner, dict):
            inner = inner.get("message", inner)
        found = inner
    return found if isinstance(found, str) else json.dumps(found)


def error_body(body: bytes) -> str:
    """What the body of a refusal says."""
    try:
        return error_text(json.loads(body))
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _shown(text: str | bytes) -> str:
    return repr(text if isinstance(text, str) else text.decode("utf-8", "replace"))[:100]
