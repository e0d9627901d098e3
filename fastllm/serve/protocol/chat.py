"""/v1/chat/completions: OpenAI's body with vLLM's additions."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from fastllm.serve.protocol.sampling import Sampling

MESSAGES = 4096  # of one conversation


class ChatRequest(Sampling):
    """A conversation to answer. `max_completion_tokens` is OpenAI's newer name of `max_tokens`; without
    either an answer may run to the end of the context."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MESSAGES)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    # vLLM's
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: int | None = Field(None, ge=1, le=2**31 - 1)
