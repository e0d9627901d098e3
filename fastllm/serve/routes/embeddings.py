"""/v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from fastllm.errors import RequestError
from fastllm.outputs import EmbeddingOutput
from fastllm.pooling_params import PoolingParams
from fastllm.serve.answers import JsonAnswer
from fastllm.serve.call import Call
from fastllm.serve.errors import HTTPError
from fastllm.serve.generation import render_text, token_ids
from fastllm.serve.protocol.others import INPUTS, EmbeddingRequest
from fastllm.serve.routes.common import RESPONSES, begin, takes
from fastllm.serve.state import ServerState

router = APIRouter()


@router.post("/v1/embeddings", responses=RESPONSES, openapi_extra=takes(EmbeddingRequest))
async def embeddings(request: Request) -> Response:
    """Embed texts: vectors of length 1."""
    state, call, body = await begin(request, EmbeddingRequest)
    return JsonAnswer(_work(state, call, body), state.config.limits.request_seconds)


async def _work(state: ServerState, call: Call, body: EmbeddingRequest) -> dict[str, Any]:
    inputs = body.inputs()
    if not 0 < len(inputs) <= INPUTS:
        raise HTTPError(400, f"input: 1..{INPUTS} texts", param="input", code="invalid_value")
    if body.dimensions is not None:
        raise HTTPError(400, "dimensions: not supported", param="dimensions", code="unknown_parameter")
    params = PoolingParams() if body.pooling is None else PoolingParams(pooling=body.pooling)
    renders = [
        render_text(item, f"input[{index}]" if len(inputs) > 1 else "input")
        for index, item in enumerate(inputs)
    ]
    async with state.models.lease(body.model) as (served, lora):
        call.model, call.version = body.model or served.source.name, served.source.version
        async with state.admission.enter(call, served.seats, len(inputs)):
            prompts = await token_ids(state, served, renders, "input")
            salt = state.cache_salt(call, body.cache_salt)

            async def embed(index: int) -> EmbeddingOutput:
                outputs = served.llm.encode(
                    {"prompt_token_ids": prompts[index], "cache_salt": salt},
                    params,
                    f"embd-{call.request_id}-{id(call):x}-{index}",
                    lora_request=lora,
                    priority=body.priority or 0,
                )
                try:
                    async with contextlib.aclosing(outputs) as items:
                        return await anext(items)
                except RequestError as error:  # in the engine's words
                    name = {"prompt_token_ids": "input"}.get(error.field, error.field)
                    raise RequestError(name, error.value, error.limit) from error

            tasks = [asyncio.ensure_future(embed(index)) for index in range(len(prompts))]
            try:
                found = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
    if any(item.finish_reason != "stop" for item in found):
        raise HTTPError(500, "an embedding could not be computed", code="generation_failed")
    call.prompt_tokens = sum(map(len, prompts))
    call.cached_tokens = sum(item.num_cached_tokens for item in found)
    call.finish_reasons = [item.finish_reason or "" for item in found]
    as_text = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(item.embedding, as_text)}
        for index, item in enumerate(found)
    ]
    usage = {"prompt_tokens": call.prompt_tokens, "total_tokens": call.prompt_tokens}
    return {"object": "list", "data": data, "model": call.model, "usage": usage}


def _encoded(vector: Any, as_text: bool) -> Any:
    """Numbers, or base64 of little-endian float32."""
    if as_text:
        return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
    return [float(value) for value in vector]
