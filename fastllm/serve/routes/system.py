"""What is served, and whether the server is well: /v1/models, /health, /ready, /version."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from fastllm import __version__
from fastllm.errors import EngineDeadError
from fastllm.serve.errors import HTTPError
from fastllm.serve.metrics import render
from fastllm.serve.models import Served
from fastllm.serve.routes.common import RESPONSES
from fastllm.serve.state import ServerState

router = APIRouter()
STEP_SECONDS = 5.0  # an engine that does not come to the end of a step in this time is not ready


@router.get("/v1/models", responses=RESPONSES)
async def models(request: Request) -> Response:
    """The names that requests may use."""
    state: ServerState = request.app.state.server
    data = [entry for served in state.models.current() for entry in _entries(state, served)]
    return JSONResponse({"object": "list", "data": data})


@router.get("/v1/models/{model:path}", responses=RESPONSES)
async def model(request: Request, model: str) -> Response:
    """One of them."""
    state: ServerState = request.app.state.server
    served, _ = state.models.find(model)
    entry = next((item for item in _entries(state, served) if item["id"] == model), None)
    if entry is None:
        raise HTTPError(404, f"there is no model {model!r}", param="model", code="model_not_found")
    return JSONResponse(entry)


def _entries(state: ServerState, served: Served) -> list[dict[str, Any]]:
    return [
        {
            "id": name,
            "object": "model",
            "created": int(served.created),
            "owned_by": "fastllm",
            "root": served.source.name,
            "parent": parent,
            "version": served.source.version,
            "max_model_len": served.llm.max_model_len,
        }
        for name, parent in state.models.names_of(served)
    ]


@router.get("/health", responses={503: RESPONSES[503]})
async def health(request: Request) -> Response:
    """Alive: no engine has failed."""
    state: ServerState = request.app.state.server
    for served in state.models.current():
        if served.llm.errored:
            raise HTTPError(503, "an engine has stopped", code="engine_dead")
    return JSONResponse({"status": "ok"})


@router.get("/ready", responses={503: RESPONSES[503]})
async def ready(request: Request) -> Response:
    """To be sent requests: a model is loaded, its engine comes to the end of its steps, nothing drains."""
    state: ServerState = request.app.state.server
    if state.draining or state.leaving:
        raise HTTPError(503, "the server is shutting down", code="draining")
    current = state.models.current()
    if not current:
        raise HTTPError(503, "no model is loaded", code="no_model")
    try:
        await asyncio.wait_for(asyncio.gather(*(served.llm.load() for served in current)), STEP_SECONDS)
    except (asyncio.TimeoutError, EngineDeadError):
        raise HTTPError(503, "an engine does not answer", code="engine_dead") from None
    return JSONResponse({"status": "ready"})


@router.get("/metrics", responses={401: RESPONSES[401]}, response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """For Prometheus; in OpenMetrics' form where that is accepted."""
    state: ServerState = request.app.state.server
    accept = request.headers.get("accept")
    body, kind = await asyncio.to_thread(render, state.telemetry.registry, accept)
    return Response(body, headers={"content-type": kind})


@router.get("/version", responses={401: RESPONSES[401]})
async def version(request: Request) -> Response:
    """The version of fastllm."""
    return JSONResponse({"version": __version__})
