"""Bodies of the smaller routes: tokens, embeddings, administration."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fastllm.serve.protocol.base import Body, Harmless
from fastllm.serve.protocol.chat import MESSAGES

INPUTS = 2048  # of one request for embeddings
NAME_LENGTH = 256
PATH_LENGTH = 4096


class TokenizeRequest(Body):
    """A text, or a conversation as /v1/chat/completions would have it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(default=None, min_length=1, max_length=MESSAGES)
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int] = Field(max_length=1 << 20)


class EmbeddingRequest(Harmless):
    """Texts or token ids; OpenAI's body, with the pooling that fastllm can do."""

    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    pooling: Literal["last", "mean"] | None = None
    cache_salt: str | None = Field(default=None, max_length=1024)
    priority: int | None = None

    def inputs(self) -> list[str | list[int]]:
        """One entry for each."""
        given = self.input
        if isinstance(given, str) or (given and all(isinstance(item, int) for item in given)):
            return [given]  # type: ignore[list-item]
        return list(given)  # type: ignore[arg-type]


class LoadRequest(Body):
    """A version of a model to load. `activate`: make it current at once; `keep`: and leave the one before
    loaded."""

    name: str = Field(min_length=1, max_length=NAME_LENGTH)
    version: str = Field(min_length=1, max_length=NAME_LENGTH)
    model: str = Field(min_length=1, max_length=PATH_LENGTH)
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    aliases: list[str] = Field(default_factory=list, max_length=16)
    loras: dict[str, str] = Field(default_factory=dict, max_length=64)
    engine: dict[str, Any] = Field(default_factory=dict, max_length=64)
    activate: bool = True
    keep: bool = False


class ActivateRequest(Body):
    version: str = Field(min_length=1, max_length=NAME_LENGTH)
    keep: bool = False


class ErrorDetail(Body):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Body):
    """What an answer with an error looks like."""

    error: ErrorDetail
