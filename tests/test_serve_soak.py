"""A short soak of the server; `tests/serve_soak.py` runs a long one."""

from __future__ import annotations

import asyncio

import serve_soak


def test_a_few_hundred_rude_requests_leave_nothing_behind() -> None:
    options = serve_soak.parse(["--requests", "400", "--clients", "16", "--changes", "4", "--seed", "1"])
    assert "audit log" in asyncio.run(serve_soak.whole(options))
