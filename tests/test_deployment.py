"""The files of docs/deployment: what they start is what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from fastllm.serve.app import make_app
from fastllm.serve.arguments import make_parser
from fastllm.serve.config import ServeConfig
from fastllm.serve.models import Models
from fastllm.serve.state import ServerState

FOLDER = Path(__file__).parents[1] / "docs" / "deployment"


def documents(name: str) -> dict[str, Any]:
    """By kind."""
    return {item["kind"]: item for item in yaml.safe_load_all((FOLDER / "kubernetes" / name).read_text())}


def test_kubernetes() -> None:
    found = documents("deployment.yaml")
    pod = found["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    options = make_parser().parse_args(container["args"])
    assert pod["spec"]["terminationGracePeriodSeconds"] > options.drain_delay + options.drain_seconds
    app = make_app(ServerState(ServeConfig(model=None), Models(None, 0)))  # type: ignore[arg-type]
    routes = app.app._app.openapi()["paths"]  # type: ignore[attr-defined]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] in routes
    (port,) = container["ports"]
    assert str(port["containerPort"]) == pod["metadata"]["annotations"]["prometheus.io/port"] == "8000"
    labels = pod["metadata"]["labels"].items()
    assert found["Service"]["spec"]["selector"].items() <= labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels
    scaler = documents("autoscaling.yaml")["HorizontalPodAutoscaler"]
    assert scaler["spec"]["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]


def test_systemd() -> None:
    text = (FOLDER / "fastllm.service").read_text().replace("\\\n", " ")
    settings = dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))
    words = shlex.split(settings["ExecStart"])
    options = make_parser().parse_args(words[words.index("fastllm.serve") + 1 :])
    assert int(settings["TimeoutStopSec"]) > options.drain_delay + options.drain_seconds


def test_container() -> None:
    text = (FOLDER / "Containerfile").read_text()
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", text, re.MULTILINE)
    assert entry is not None
    words = yaml.safe_load(entry[1])
    make_parser().parse_args(words[words.index("fastllm.serve") + 1 :])
