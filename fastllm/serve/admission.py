"""Who is let in: rates and concurrency per key, and a queue that ends somewhere.

A request of several sequences (prompts x n) counts as that many in the queue. Beyond a key's own limits the
answer is 429, where the server as a whole is full 503; both say when to come again.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator

from limits import parse_many
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter

from fastllm.serve.call import Call
from fastllm.serve.config import Limits
from fastllm.serve.errors import HTTPError

ROUND_RATE = 0.2  # how fast the time that a sequence takes is relearnt


class Seats:
    """What one engine may have on its hands: as many sequences as run at once, and a queue behind them.

    Args:
        at_once: sequences that the engine runs together.
        queued: further ones that may wait.

    Attributes:
        taken: sequences now.
        seconds: that a request takes, of late.
    """

    def __init__(self, at_once: int, queued: int) -> None:
        self.at_once = at_once
        self.queued = queued
        self.taken = 0
        self.seconds = 1.0

    def take(self, count: int) -> None:
        """
        Raises:
            HTTPError: 503, there is no room. A request alone always finds some.
        """
        if self.taken and self.taken + count > self.at_once + self.queued:
            waiting = self.taken + count - self.at_once
            raise HTTPError(
                503,
                f"the queue is full: {self.taken} sequences are running or waiting",
                code="overloaded",
                retry_after=self.seconds * waiting / self.at_once,
            )
        self.taken += count

    def give(self, count: int, seconds: float) -> None:
        """Those of a request that took so long."""
        self.taken -= count
        self.seconds += ROUND_RATE * (seconds - self.seconds)


class Admission:
    """The limits of keys; without keys, of client addresses."""

    def __init__(self, limits: Limits) -> None:
        self._concurrent = limits.concurrent
        self._rates = parse_many(limits.rate) if limits.rate is not None else []
        self._running: Counter[str] = Counter()
        self._limiter = MovingWindowRateLimiter(MemoryStorage()) if self._rates else None

    @contextlib.asynccontextmanager
    async def enter(self, call: Call, seats: Seats, count: int) -> AsyncIterator[None]:
        """A place for a request of `count` sequences, as long as it is in there.

        Raises:
            HTTPError: 429 or 503.
        """
        who = f"key {call.key}" if call.key is not None else f"address {call.client}"
        if self._concurrent is not None and self._running[who] >= self._concurrent:
            raise HTTPError(
                429,
                f"{self._concurrent} requests at a time are allowed",
                code="concurrency_limit_exceeded",
                retry_after=seats.seconds,
            )
        self._running[who] += 1  # before anything waits: two at once would both find room
        try:
            await self._count(who)
            seats.take(count)
            begin = time.monotonic()
            try:
                yield
            finally:
                seats.give(count, time.monotonic() - begin)
        finally:
            self._running[who] -= 1
            if not self._running[who]:
                del self._running[who]

    async def _count(self, who: str) -> None:
        if self._limiter is None:
            return
        for rate in self._rates:
            if not await self._limiter.hit(rate, who):
                reset, _ = await self._limiter.get_window_stats(rate, who)
                raise HTTPError(
                    429, f"{rate} are allowed", code="rate_limit_exceeded", retry_after=reset - time.time()
                )
