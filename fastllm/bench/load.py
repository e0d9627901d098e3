"""One round of load: requests at their times, until enough were made, time is up, or somebody stops it.

Two ways to make requests:

- closed loop, `concurrency` clients that each send the next request when theirs is done. It never overloads a
server,
  and a slow answer holds back the requests after it.
- open loop, requests at given times whatever the server does. `concurrency` caps how many are under way; the
others
  wait, which latency from the scheduled time counts.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastllm.bench.client import Client
from fastllm.bench.prompts import MEASURED, Source, Work
from fastllm.bench.record import FAILED, UNFINISHED, RequestRecord

_LAG_SECONDS = 0.05
_READY_REQUESTS, _READY_BYTES = 10_000, 64 << 20
_BACK_OFF_SECONDS = 0.1  # of a closed loop's client whose request failed; doubles up to 32 times as much

MakeBody = Callable[[Work], bytes]


@dataclass
class Round:
    """What a round was.

    Attributes:
        start: of the load, on `time.perf_counter`; scheduled times count from it.
        wall_start: the same on the system's clock.
        seconds: until the last request was done or cut off.
        requests: in the order in which they were made.
        stopped: somebody ended it.
        cpu_seconds: processor time of the generator.
        lags: seconds by which a timer of the generator's was late; its times are as uncertain.
    """

    start: float = 0.0
    wall_start: float = 0.0
    seconds: float = 0.0
    requests: list[RequestRecord] = field(default_factory=list)
    stopped: bool = False
    cpu_seconds: float = 0.0
    lags: list[float] = field(default_factory=list)


class Load:
    """Makes the requests of one round.

    Args:
        client: what sends them.
        source: what they ask.
        make_body: a request as JSON.
        schedule: times in seconds from the start; None: a closed loop.
        concurrency: clients of a closed loop, or the most requests under way; None: any number.
        requests: how many at most; needed where `seconds` is not given.
        seconds: no request is begun after this.
        drain_seconds: what requests under way at the end have to finish; None: as long as they need.
        stop: ends the round when set.
        stream: the random stream of the prompts.
    """

    def __init__(
        self,
        client: Client,
        source: Source,
        make_body: MakeBody,
        *,
        schedule: Sequence[float] | None = None,
        concurrency: int | None = None,
        requests: int | None = None,
        seconds: float | None = None,
        drain_seconds: float | None = None,
        stop: asyncio.Event | None = None,
        stream: int = MEASURED,
    ) -> None:
        if schedule is None and concurrency is None:
            raise ValueError("neither a schedule nor a number of clients")
        if schedule is None and requests is None and seconds is None:
            raise ValueError("a closed loop without an end")
        self._client = client
        self._source = source
        self._make_body = make_body
        self._schedule = schedule
        self._concurrency = concurrency
        self._most = len(schedule) if schedule is not None else requests
        self._seconds = seconds
        self._drain_seconds = drain_seconds
        self._stop = stop or asyncio.Event()
        self._stream = stream
        self._round = Round()
        self._tasks: list[asyncio.Task[Any]] = []
        self._ready: list[tuple[Work, bytes]] = []

    def progress(self) -> str:
        """How far it is, in a line."""
        made = self._round.requests
        ended = sum(record.status != UNFINISHED for record in made)
        failed = sum(record.status == FAILED for record in made)
        time_s = time.perf_counter() - self._round.start
        of = f" of {self._most}" if self._most is not None else ""
        more = f", {failed} failed" if failed else ""
        return f"{time_s:.0f} s: {ended}{of} done, {len(made) - ended} under way{more}"

    async def prepare(self) -> None:
        """Make requests before the start, as many as fit: making one takes time from those under way."""
        size = 0
        for index in range(min(self._most or 0, _READY_REQUESTS)):
            self._ready.append(self._make(index))
            size += len(self._ready[-1][1])
            if size > _READY_BYTES:
                break
            if index % 64 == 0:
                await asyncio.sleep(0)  # Ctrl-C is heard

    def _make(self, index: int) -> tuple[Work, bytes]:
        work = self._source.make(index, self._stream)
        return work, self._make_body(work)

    async def run(self) -> Round:
        """The whole round; `prepare` comes first."""
        found = self._round
        gc.collect()
        gc.freeze()  # what is there stays; the collector need not look at it while times are taken
        lag = asyncio.create_task(self._watch())
        stopped = asyncio.create_task(self._stop.wait())
        cpu = _cpu_seconds()
        found.start, found.wall_start = time.perf_counter(), time.time()
        make = self._open if self._schedule is not None else self._closed
        making = asyncio.create_task(make())
        try:
            await self._until_done(making, stopped)
        finally:
            found.seconds = time.perf_counter() - found.start
            found.cpu_seconds = _cpu_seconds() - cpu
            all_tasks = (making, lag, stopped, *self._tasks)
            for task in all_tasks:
                task.cancel()
            await asyncio.gather(*all_tasks, return_exceptions=True)
            gc.unfreeze()
        if making.done() and not making.cancelled():
            making.result()  # a fault of the generator itself is no result
        return found

    async def _until_done(self, making: asyncio.Task[None], stopped: asyncio.Task[bool]) -> None:
        """Until all requests are done, or the time for that is over, or somebody stops it."""
        both = {making, stopped}
        end = self._schedule[-1] if self._schedule else self._seconds
        most = None if end is None or self._drain_seconds is None else end + self._drain_seconds
        await asyncio.wait(both, timeout=most, return_when=asyncio.FIRST_COMPLETED)
        self._round.stopped = self._stop.is_set()

    async def _closed(self) -> None:
        self._tasks = [asyncio.create_task(self._client_loop()) for _ in range(self._concurrency or 1)]
        await asyncio.gather(*self._tasks)

    async def _client_loop(self) -> None:
        failures = 0
        while (self._most is None or len(self._round.requests) < self._most) and not self._over():
            record = await self._send(time.perf_counter())
            failures = failures + 1 if record.status == FAILED else 0
            if failures:  # a server that refuses at once is not asked thousands of times a second
                await asyncio.sleep(_BACK_OFF_SECONDS * 2 ** min(failures - 1, 5))

    def _over(self) -> bool:
        return self._seconds is not None and time.perf_counter() - self._round.start >= self._seconds

    async def _open(self) -> None:
        assert self._schedule is not None
        room = asyncio.Semaphore(self._concurrency) if self._concurrency else None
        for at in self._schedule:
            due = self._round.start + at
            wait = due - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            self._tasks.append(asyncio.create_task(self._send(due, room)))
        await asyncio.gather(*self._tasks)

    async def _send(self, due: float, room: asyncio.Semaphore | None = None) -> RequestRecord:
        index = len(self._round.requests)
        work, body = self._ready[index] if index < len(self._ready) else self._make(index)
        record = RequestRecord(
            index,
            due,
            wanted_prompt_tokens=work.prompt_tokens,
            wanted_output_tokens=work.max_tokens,
            group=work.group,
        )
        self._round.requests.append(record)
        if room is None:
            await self._client.send(body, record)
        else:
            async with room:
                await self._client.send(body, record)
        return record

    async def _watch(self) -> None:
        while True:
            due = time.perf_counter() + _LAG_SECONDS
            await asyncio.sleep(_LAG_SECONDS)
            self._round.lags.append(max(0.0, time.perf_counter() - due))


def _cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system
