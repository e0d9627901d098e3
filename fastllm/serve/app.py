"""The ASGI application: the routes behind the guard."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware

from fastllm import __version__
from fastllm.serve.guard import App, Guard
from fastllm.serve.metrics import MetricsMiddleware
from fastllm.serve.protocol.chat import ChatRequest
from fastllm.serve.protocol.completion import CompletionRequest
from fastllm.serve.protocol.messages import CountRequest, MessagesRequest
from fastllm.serve.protocol.others import (
    ActivateRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ErrorBody,
    LoadRequest,
    TokenizeRequest,
)
from fastllm.serve.protocol.responses import ResponsesRequest
from fastllm.serve.routes import (
    admin,
    chat,
    completions,
    embeddings,
    messages,
    page,
    responses,
    system,
    tokens,
)
from fastllm.serve.state import ServerState

BODIES = (
    ChatRequest,
    CompletionRequest,
    ResponsesRequest,
    MessagesRequest,
    CountRequest,
    EmbeddingRequest,
    TokenizeRequest,
    DetokenizeRequest,
    LoadRequest,
    ActivateRequest,
    ErrorBody,
)
ROUTES = (chat, completions, responses, messages, embeddings, tokens, system, admin)


class Routes(FastAPI):
    """FastAPI for routing and /openapi.json. Errors go through it: the guard gives them their shape."""

    def build_middleware_stack(self) -> Any:
        return AsyncExitStackMiddleware(self.router)

    def openapi(self) -> dict[str, Any]:
        """The description, with the bodies that the routes read themselves."""
        if self.openapi_schema is None:
            found = super().openapi()
            schemas = found.setdefault("components", {}).setdefault("schemas", {})
            for kind in BODIES:
                schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(schema.pop("$defs", {}))
                schemas[kind.__name__] = schema
            schemes = found["components"].setdefault("securitySchemes", {})
            schemes["key"] = {"type": "http", "scheme": "bearer"}
            found["security"] = [{"key": []}]
            self.openapi_schema = found
        return self.openapi_schema


def make_app(state: ServerState) -> App:
    """The application of a server."""
    routes = Routes(title="fastllm", version=__version__, docs_url=None, redoc_url=None)
    routes.state.server = state
    for module in ROUTES:
        routes.include_router(module.router)
    if state.config.page:
        routes.include_router(page.router)
    return MetricsMiddleware(Guard(routes, state), state.http_metrics)
