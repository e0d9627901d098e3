"""Whatever is sent to the routes, as /openapi.json describes it or not so: an answer, and never a 5xx."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode
from serving import Running

from fastllm.serve.app import make_app
from fastllm.serve.config import ServeConfig
from fastllm.serve.models import Models
from fastllm.serve.state import ServerState

ADMIN = "admin-key-for-these-tests"
EXAMPLES = 10  # of a route


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_hf(tiny.make_model("llama"), tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLLM_ADMIN_KEY", ADMIN)
        with Running(model, limits={"request_seconds": 20.0}) as running:
            yield running


def operations() -> list[tuple[str, str]]:
    """Method and path of every route, from an app without models."""
    app = make_app(ServerState(ServeConfig(model=None), Models(None, 0)))  # type: ignore[arg-type]
    paths = app.app._app.openapi()["paths"]  # type: ignore[attr-defined]
    return sorted((method.upper(), path) for path, item in paths.items() for method in item)


@pytest.mark.parametrize(
    "mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["as told", "not so"]
)
@pytest.mark.parametrize(("method", "path"), operations())
def test_every_route(server: Running, method: str, path: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = schema[path][method]
    headers = {"authorization": f"Bearer {ADMIN}"}
    asked = 0

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        nonlocal asked
        asked += 1
        response = case.call(headers=headers, timeout=25)
        # By 503 the server says that there is no room or no model: administration is among the routes.
        assert response.status_code < 500 or response.status_code == 503, response.text
        if response.status_code >= 400:
            assert response.json()["error"]["message"]

    with contextlib.suppress(Unsatisfiable):  # nothing can be wrong about a route without arguments
        check()
    assert asked > (0 if method == "POST" and "rollback" not in path else -1)
    with server.client() as client:
        assert client.get("/health").status_code == 200
