"""A short soak of the tiny model; `.ci/full` runs a long one."""

from __future__ import annotations

import pytest
import soak


@pytest.mark.parametrize("drafts", [False, True])
def test_a_few_hundred_rude_requests_leave_nothing_behind(drafts: bool) -> None:
    assert "400 requests" in soak.soak(soak.TINY, users=12, seed=1, requests=400, drafts=drafts)
