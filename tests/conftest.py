"""Hypothesis profiles and the fixtures that all tests share.

FASTLLM_TEST_PROFILE=full runs ten times the examples, with fresh random ones each time; the default is the
same few examples everywhere.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from fastllm import _core
from fastllm.formats.source import DEFAULT_MODEL, resolve

settings.register_profile(
    "ci", derandomize=True, max_examples=30, deadline=None, print_blob=True, database=None
)
settings.register_profile(
    "full", max_examples=300, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("FASTLLM_TEST_PROFILE", "ci"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """A module's `begin_early` starts work that its tests will wait for: it goes on beside the tests before
    them, most of which use one processor."""
    if not session.config.option.collectonly:
        for module in dict.fromkeys(getattr(item, "module", None) for item in session.items):
            begin = getattr(module, "begin_early", None)
            if begin is not None:
                begin()


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The default model's file: fetched once, then offline."""
    return resolve(DEFAULT_MODEL, progress=False)


@pytest.fixture(params=_core.supported_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set that this machine runs."""
    return str(request.param)
