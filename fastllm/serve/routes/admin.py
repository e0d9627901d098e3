"""/admin/models: models come, go, change and change back while requests run. For administrators alone."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from fastllm.async_llm import AsyncLLM
from fastllm.serve.config import ServeConfig
from fastllm.serve.errors import HTTPError
from fastllm.serve.models import Served, Source
from fastllm.serve.protocol.others import ActivateRequest, LoadRequest
from fastllm.serve.routes.common import RESPONSES, begin, takes
from fastllm.serve.state import ServerState

router = APIRouter()
ENGINE_OPTIONS = frozenset(inspect.signature(AsyncLLM).parameters) - {"model", "hooks", "progress", "device"}
OF_ONE_MODEL = ("sha256", "tokenizer")  # engine options of the first model that no other has
PATH_OPTIONS = ("tokenizer",)  # engine options that are paths or references


@router.get("/admin/models", responses=RESPONSES)
async def list_models(request: Request) -> Response:
    """Every version that is loaded or loading."""
    state: ServerState = request.app.state.server
    loaded = [_entry(served) for served in state.models.all()]
    loading = [_describe(source, "loading") for source in state.models.loading]
    return JSONResponse({"models": loaded + loading})


@router.post("/admin/models", responses=RESPONSES, openapi_extra=takes(LoadRequest))
async def load(request: Request) -> Response:
    """Load a version; with `activate` new requests go to it from then on. Answers when that is so."""
    state, _, body = await begin(request, LoadRequest)
    unknown = sorted(set(body.engine) - ENGINE_OPTIONS)
    if unknown:
        place = f"engine.{unknown[0][:64]}"
        raise HTTPError(400, f"{place}: no such option", param=place, code="unknown_parameter")
    for place, reference in _references(body):
        check_reference(state.config, place, reference)
    engine = {name: value for name, value in state.config.engine.items() if name not in OF_ONE_MODEL}
    engine.update(body.engine)
    if body.sha256 is not None:
        engine["sha256"] = body.sha256
    source = Source(body.name, body.version, body.model, engine, body.loras, body.aliases)
    served = await state.models.load(source)
    if body.activate:
        state.models.activate(body.name, body.version, keep=body.keep)
    return JSONResponse(_entry(served))


@router.post("/admin/models/{name:path}/activate", responses=RESPONSES, openapi_extra=takes(ActivateRequest))
async def activate(request: Request, name: str) -> Response:
    """Make a loaded version the current one."""
    state, _, body = await begin(request, ActivateRequest)
    return JSONResponse(_entry(state.models.activate(name, body.version, keep=body.keep)))


@router.post("/admin/models/{name:path}/rollback", responses=RESPONSES)
async def rollback(request: Request, name: str) -> Response:
    """Go back to the version that was current before."""
    state: ServerState = request.app.state.server
    return JSONResponse(_entry(await state.models.rollback(name)))


@router.delete("/admin/models/{name:path}", responses=RESPONSES)
async def unload(request: Request, name: str, version: str | None = None) -> Response:
    """Take a version, or all of a name, out of service. Answers when their requests have ended and the memory
    is free."""
    state: ServerState = request.app.state.server
    await state.models.unload(name, version)
    return JSONResponse({"unloaded": name, "version": version})


def check_reference(config: ServeConfig, place: str, reference: str) -> None:
    """
    Raises:
        HTTPError: 403, this is not where models may come from.
    """
    if reference.startswith(("pypi:", "hf:")):
        if not config.allow_download:
            raise HTTPError(403, f"{place}: nothing is fetched (--allow-download)", param=place)
        return
    path = Path(reference).resolve()
    if not any(path.is_relative_to(Path(root).resolve()) for root in config.model_roots):
        raise HTTPError(403, f"{place}: not below a directory for models (--model-root)", param=place)


def _references(body: LoadRequest) -> list[tuple[str, str]]:
    """All that the body would have the server read."""
    found = [("model", body.model), *((f"loras.{name}", path) for name, path in body.loras.items())]
    for name in PATH_OPTIONS:
        if isinstance(body.engine.get(name), str):
            found.append((f"engine.{name}", body.engine[name]))
    for name in ("kv_offload_dir", "key_file"):
        if name in body.engine:
            raise HTTPError(403, f"engine.{name}: set when the server starts alone", param=f"engine.{name}")
    draft = body.engine.get("speculative_config")
    if isinstance(draft, dict) and isinstance(draft.get("model"), str):
        found.append(("engine.speculative_config.model", draft["model"]))
    return found


def _entry(served: Served) -> dict[str, Any]:
    return {
        **_describe(served.source, served.state),
        "created": int(served.created),
        "requests": served.leases,
        "max_model_len": served.llm.max_model_len,
    }


def _describe(source: Source, state: str) -> dict[str, Any]:
    return {
        "name": source.name,
        "aliases": list(source.aliases),
        "loras": list(source.loras),
        "version": source.version,
        "model": source.reference,
        "state": state,
    }
