"""Work that ends when nobody waits for it any more, or when its time is up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

from fastllm.serve.errors import HTTPError

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Disconnected(Exception):
    """The client is gone."""


async def while_connected(
    receive: Receive, work: Coroutine[Any, Any, T], *, seconds: float | None = None
) -> T:
    """What `work` gives. It is cancelled, and has ended, when the client leaves or the time is up.

    Args:
        receive: of ASGI, after the request's body.

    Raises:
        Disconnected: the client has left.
        HTTPError: 504, the time is up.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_leaving(receive))
    try:
        await asyncio.wait({task, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if leaving.done():
            raise Disconnected
        raise HTTPError(504, f"not done within {seconds:g} seconds", code="timeout")
    finally:
        for item in (task, leaving):
            if not item.done():
                item.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
