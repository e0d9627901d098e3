"""/tokenize and /detokenize, with vLLM's fields."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastllm.errors import RequestError
from fastllm.sampling_params import SamplingParams
from fastllm.serve.answers import JsonAnswer
from fastllm.serve.conversation import Conversation, prompt_of
from fastllm.serve.errors import HTTPError
from fastllm.serve.models import Served
from fastllm.serve.parsers import parse_tool_choice, parse_tools
from fastllm.serve.protocol.others import DetokenizeRequest, TokenizeRequest
from fastllm.serve.routes.common import RESPONSES, begin, takes
from fastllm.serve.state import ServerState

router = APIRouter()


@router.post("/tokenize", responses=RESPONSES, openapi_extra=takes(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """The token ids of a text or a conversation."""
    state, _, body = await begin(request, TokenizeRequest)
    if (body.prompt is None) == (body.messages is None):
        raise HTTPError(400, "prompt or messages: one of them", param="prompt", code="invalid_value")
    served, _ = state.models.find(body.model)
    tokenizer = served.llm.tokenizer

    async def work() -> dict[str, Any]:
        ids = await asyncio.to_thread(_encode, state, served, body)
        found = {"count": len(ids), "max_model_len": served.llm.max_model_len, "tokens": ids}
        if body.return_token_strs:
            found["token_strs"] = [tokenizer.token_bytes(id).decode("utf-8", "replace") for id in ids]
        return found

    return JsonAnswer(work(), state.config.limits.request_seconds)


def _encode(state: ServerState, served: Served, body: TokenizeRequest) -> list[int]:
    tokenizer = served.llm.tokenizer
    if body.prompt is not None:
        try:
            return tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
        except RequestError as error:
            raise RequestError("prompt", error.value, error.limit) from error
    assert body.messages is not None
    conversation = Conversation(
        model=body.model,
        messages=body.messages,
        params=SamplingParams(),
        choice=parse_tool_choice(parse_tools(body.tools)),
        template_kwargs=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt,
    )
    return prompt_of(state, served, conversation, tokenizer)[0]


@router.post("/detokenize", responses=RESPONSES, openapi_extra=takes(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    state, _, body = await begin(request, DetokenizeRequest)
    served, _ = state.models.find(body.model)
    tokenizer = await served.llm.get_tokenizer()
    wrong = [id for id in body.tokens if not 0 <= id < tokenizer.vocab_size]
    if wrong:
        raise RequestError("tokens", wrong[0], f"token ids in 0..{tokenizer.vocab_size - 1}")

    async def work() -> dict[str, Any]:
        text = await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)
        return {"prompt": text}

    return JsonAnswer(work(), state.config.limits.request_seconds)
