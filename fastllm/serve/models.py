"""The models in service: by name and version, changed while requests run.

One version of a name is current: new requests go to it. A request holds a lease on the version that it began
with, so a change drops none: old streams finish on the old weights, and when the last one has, the version's
memory goes back.

    load ──► loading ──► standby ◄──────── keep ───────┐
                │           │ activate                 │
             (error)        ▼                          │
                         current ── another activated ─┤
                            │                          ▼
                            └──── unload ────────► retiring ── last lease ends ──► (gone)

`rollback` activates the version that was current before, and loads it again if it is gone. Loading takes a
thread of its own, one model at a time; all else happens on the event loop, and needs no lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastllm.async_llm import AsyncLLM
from fastllm.lora import LoRARequest
from fastllm.serve.admission import Seats
from fastllm.serve.chat_format import ChatFormat
from fastllm.serve.config import check_model_name
from fastllm.serve.errors import HTTPError

if TYPE_CHECKING:
    from fastllm.serve.tracing import TracingHook

logger = logging.getLogger(__name__)
HISTORY = 32  # versions of a name that `rollback` can go back through


@dataclass(frozen=True, slots=True)
class Source:
    """What a version is made from, so that it can be made again.

    Attributes:
        name: that requests call it by; `aliases`: further ones.
        version: what this version of the name is called.
        reference: as for `LLM`.
        engine: further arguments of `AsyncLLM`.
        loras: adapters, name -> path.
    """

    name: str
    version: str
    reference: str
    engine: Mapping[str, Any] = field(default_factory=dict)
    loras: Mapping[str, str] = field(default_factory=dict)
    aliases: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a loader makes.

    Attributes:
        llm: the engine.
        chat: how the model is talked with.
        tracing: that its requests are announced to, if anybody wants traces.
        on_close: to be called once the engine is closed.
    """

    llm: AsyncLLM
    chat: ChatFormat
    tracing: TracingHook | None = None
    on_close: Callable[[], None] = lambda: None


Loader = Callable[[Source], Loaded]
"""Makes the engine of a source; called in a thread."""


class Served:
    """A version that is loaded.

    Attributes:
        source: what it was made from.
        llm: the engine.
        seats: of its queue.
        chat: how it is talked with.
        tracing: that its requests are announced to, if anybody wants traces.
        created: seconds of the wall clock.
        leases: requests that use it.
        state: see the module.
    """

    def __init__(self, source: Source, loaded: Loaded, queued: int) -> None:
        llm = loaded.llm
        self.source = source
        self.llm = llm
        self.seats = Seats(llm.max_num_seqs, queued)
        self.chat = loaded.chat
        self.tracing = loaded.tracing
        self.created = time.time()
        self.leases = 0
        self.state = "standby"
        self.gone = asyncio.Event()
        self._on_close = loaded.on_close

    async def close(self) -> None:
        """Give its memory back."""
        await self.llm.aclose()
        self._on_close()
        self.gone.set()


class Models:
    """All models of a server.

    Args:
        load: makes engines.
        queued: sequences that may wait for each.
    """

    def __init__(self, load: Loader, queued: int) -> None:
        self._load = load
        self._queued = queued
        self._versions: dict[str, dict[str, Served]] = {}  # of a name, those that are loaded
        self._current: dict[str, Served] = {}
        self._history: dict[str, list[Source]] = {}  # of a name, what was current, the newest last
        self._names: dict[str, tuple[str, str | None]] = {}  # what requests may say -> name, adapter
        self._loading: dict[tuple[str, str], Source] = {}
        self._closing: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastllm-models")

    # ---- for requests ------------------------------------------------------------------------------------

    def find(self, asked: str | None) -> tuple[Served, LoRARequest | None]:
        """The current version of what a request calls a model; None or "" where there is only one.

        Raises:
            HTTPError: 404, there is none of that name; 503, none is loaded at all.
        """
        if not self._current:
            raise HTTPError(503, "no model is loaded", code="no_model", retry_after=5)
        if not asked and len(self._current) == 1:
            return next(iter(self._current.values())), None
        entry = self._names.get(asked or "")
        if entry is None or entry[0] not in self._current:
            raise HTTPError(404, f"there is no model {asked!r}", param="model", code="model_not_found")
        name, adapter = entry
        return self._current[name], None if adapter is None else LoRARequest(adapter)

    @contextlib.asynccontextmanager
    async def lease(self, asked: str | None) -> AsyncIterator[tuple[Served, LoRARequest | None]]:
        """The model for one request, which stays as long as this lasts. Raises as `find`."""
        served, lora = self.find(asked)
        served.leases += 1
        try:
            yield served, lora
        finally:
            served.leases -= 1
            self._let_go(served)

    def current(self) -> list[Served]:
        """The current version of every name."""
        return list(self._current.values())

    def all(self) -> list[Served]:
        """Every version that is loaded."""
        return [served for versions in self._versions.values() for served in versions.values()]

    def names_of(self, served: Served) -> list[tuple[str, str | None]]:
        """What requests may call a current version: names, and those of adapters with the model's name."""
        own = served.source.name
        return [
            (said, own if adapter else None) for said, (name, adapter) in self._names.items() if name == own
        ]

    @property
    def loading(self) -> list[Source]:
        return list(self._loading.values())

    # ---- for administrators ------------------------------------------------------------------------------

    async def load(self, source: Source) -> Served:
        """Load a version, and leave it on standby.

        Raises:
            HTTPError: 409, the name has this version already, or another model has one of the names.
            FastLLMError: it cannot be loaded; what there was goes on.
        """
        self._check_names(source)
        place = (source.name, source.version)
        if place in self._loading or source.version in self._versions.get(source.name, {}):
            raise HTTPError(409, f"{source.name}: there is a version {source.version} already", code="exists")
        self._loading[place] = source
        try:
            if place in self._closing:  # the same version, a moment ago
                await asyncio.shield(self._closing[place])
            loop = asyncio.get_running_loop()
            loaded = await loop.run_in_executor(self._thread, self._load, source)
        finally:
            del self._loading[place]
        served = Served(source, loaded, self._queued)
        try:
            for name, path in source.loras.items():
                await served.llm.add_lora(LoRARequest(name, path))
        except BaseException:
            await served.close()
            raise
        self._versions.setdefault(source.name, {})[source.version] = served
        logger.info("loaded %s, version %s", source.name, source.version)
        return served

    def activate(self, name: str, version: str, *, keep: bool = False) -> Served:
        """Make a loaded version the current one.

        Args:
            keep: leave the one before loaded, on standby; else it retires.

        Raises:
            HTTPError: 404, it is not loaded.
        """
        served = self._versions.get(name, {}).get(version)
        if served is None or served.state == "retiring":
            raise HTTPError(404, f"{name}: no version {version} is loaded", code="model_not_found")
        before = self._current.get(name)
        if before is served:
            return served
        self._check_names(served.source)
        self._current[name] = served
        served.state = "current"
        self._rename(served.source)
        history = self._history.setdefault(name, [])
        history.append(served.source)
        del history[:-HISTORY]
        if before is not None:
            self._retire(before, keep=keep)
        logger.info("%s: version %s is current", name, version)
        return served

    async def rollback(self, name: str) -> Served:
        """Make the version current that was so before, loading it again if it is gone.

        Raises:
            HTTPError: 404, there is no such name; 409, it had no version before.
            FastLLMError: it cannot be loaded; what is current stays so.
        """
        history = self._history.get(name)
        if not history or name not in self._current:
            raise HTTPError(404, f"there is no model {name!r}", code="model_not_found")
        if len(history) < 2:
            raise HTTPError(409, f"{name}: there was no version before", code="no_version")
        source = history[-2]
        found = self._versions[name].get(source.version)
        if found is not None and found.state == "retiring":
            await found.gone.wait()
            found = None
        if found is None:
            await self.load(source)
        served = self.activate(name, source.version)
        del history[-2:]  # the one that failed, and the entry that activate has doubled
        return served

    async def unload(self, name: str, version: str | None = None) -> None:
        """Take a version out of service, or all of a name; returns when their requests have ended and the
        memory is free.

        Raises:
            HTTPError: 404, there is none.
        """
        versions = self._versions.get(name, {})
        chosen = list(versions.values()) if version is None else [versions.get(version)]
        found = [served for served in chosen if served is not None]
        if not found:
            raise HTTPError(404, f"there is no model {name!r} to unload", code="model_not_found")
        for served in found:
            if self._current.get(name) is served:
                del self._current[name]
                self._names = {said: entry for said, entry in self._names.items() if entry[0] != name}
            self._retire(served, keep=False)
        for served in found:
            await served.gone.wait()

    async def close(self) -> None:
        """Close all; requests that are left get errors."""
        for served in self.all():
            served.state = "closing"  # its last lease has nothing to do any more
            await served.close()
        self._versions.clear()
        self._current.clear()
        self._names.clear()
        await asyncio.gather(*self._closing.values())
        self._thread.shutdown(wait=True)

    # ---- inside ------------------------------------------------------------------------------------------

    def _retire(self, served: Served, *, keep: bool) -> None:
        served.state = "standby" if keep else "retiring"
        self._let_go(served)

    def _let_go(self, served: Served) -> None:
        """Close a version that retires once nobody uses it."""
        if served.state != "retiring" or served.leases:
            return
        served.state = "closing"
        del self._versions[served.source.name][served.source.version]
        place = (served.source.name, served.source.version)
        task = self._closing[place] = asyncio.ensure_future(served.close())
        task.add_done_callback(lambda _: self._closing.pop(place))

    def _rename(self, source: Source) -> None:
        names = {said: entry for said, entry in self._names.items() if entry[0] != source.name}
        names.update((said, (source.name, None)) for said in (source.name, *source.aliases))
        names.update((lora, (source.name, lora)) for lora in source.loras)
        self._names = names

    def _check_names(self, source: Source) -> None:
        own: Iterable[str] = (source.name, *source.aliases, *source.loras)
        for said in own:
            check_model_name(said)
            entry = self._names.get(said)
            if entry is not None and entry[0] != source.name:
                raise HTTPError(409, f"the name {said!r} is that of another model", code="exists")
