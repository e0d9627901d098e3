"""Which LoRA adapters an engine has, under which names, and who uses them.

Each has an index of its own, below max_loras, which `StepBatch.adapter` carries to the executor.

States of an adapter
====================

             add               remove, somebody uses it           sweep, nobody does any more
    (none) ------> LOADED --------------------------------> LEAVING ------------------------> (gone)
                     |                                                                          ^
                     +--------------------------------------------------------------------------+
                                            remove and sweep, nobody uses it

A request uses an adapter from its admission to its end. One that is leaving has no name any more: no new
request finds it, and its name may be given again. Its index and memory are free once it is gone; that happens
in `sweep` alone, which the engine calls between two steps, since a step in flight may still name the index.

Invariants (`check`)
====================

    A1  Names belong to loaded adapters, each under its own index; what has no name is leaving.
    A2  An adapter has as many users as there are unfinished requests with it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from fastllm.engine.sequence import prefix_root
from fastllm.errors import CapacityError, RequestError, UnsupportedModelError
from fastllm.executor.base import AdapterHost, PreparedAdapter
from fastllm.executor.memory import format_bytes

logger = logging.getLogger(__name__)

MAX_LORAS = 256
MAX_NAME_CHARACTERS = 1024


@dataclass(slots=True, eq=False)
class Adapter:
    """One adapter of an engine.

    Attributes:
        index: what a StepBatch calls it.
        prepared: the executor's.
        root: what the blocks of its sequences are known by before their tokens (`prefix_root`).
        users: unfinished requests that have it.
    """

    name: str
    index: int
    prepared: PreparedAdapter
    root: bytes
    users: int = 0


class Adapters:
    """The adapters of one engine. Not thread-safe, `paths` apart.

    Args:
        host: where they are loaded; None: the executor has no adapters.
        max_loras: most that there are at once, leaving ones included; 0..MAX_LORAS.
        root: what their own roots begin with.

    Attributes:
        paths: name -> directory of those that are loaded, in the order in which they were. Replaced and never
            changed, so that any thread may read it.
        leaving: those that wait for the end of their last request.
    """

    def __init__(self, host: AdapterHost | None, max_loras: int, root: bytes) -> None:
        if isinstance(max_loras, bool) or not isinstance(max_loras, int) or not 0 <= max_loras <= MAX_LORAS:
            raise RequestError("max_loras", max_loras, f"an integer in 0..{MAX_LORAS}")
        self._host = host
        self._root = root
        self._places: list[Adapter | None] = [None] * max_loras
        self._names: dict[str, Adapter] = {}
        self.leaving: list[Adapter] = []
        self.paths: Mapping[str, Path] = MappingProxyType({})

    def _publish(self) -> None:
        self.paths = MappingProxyType({name: item.prepared.path for name, item in self._names.items()})

    def read(self, path: Path) -> PreparedAdapter:
        """Read an adapter for `add`. From any thread.

        Raises:
            UnsupportedModelError: the executor has no adapters, or none of this kind.
            RequestError, ModelFileError, CapacityError: it cannot be used.
        """
        if self._host is None:
            raise UnsupportedModelError("this executor does not run LoRA adapters")
        return self._host.read_adapter(path)

    def check_room(self) -> None:
        """Raises CapacityError where `add` would have no room for one more."""
        count = len(self._names) + len(self.leaving)
        if count >= len(self._places):
            leaving = f", {len(self.leaving)} of them leaving" if self.leaving else ""
            raise CapacityError(
                f"max_loras: one more adapter beside {count}{leaving}",
                asked=count + 1, had=len(self._places), would_fit=len(self._places), unit="adapters",
            )  # fmt: skip

    def add(self, name: str, prepared: PreparedAdapter) -> None:
        """(none) -> LOADED. Between two steps.

        Raises:
            RequestError: the name is no text or is taken, or the adapter does not fit the executor.
            CapacityError: there are max_loras.
        """
        check_name(name)
        if name in self._names:
            raise RequestError("lora_name", name, "a name that no loaded adapter has")
        self.check_room()
        assert self._host is not None  # `prepared` came from it
        index = self._places.index(None)
        self._host.load_adapter(index, prepared)
        item = Adapter(name, index, prepared, prefix_root(self._root, "adapter", prepared.digest))
        self._places[index] = self._names[name] = item
        self._publish()
        held = [other.prepared.nbytes for other in self._places if other is not None]
        logger.info(
            "LoRA adapter %r: rank %d, %s, from %s; %d of %d adapters, %s together",
            name,
            prepared.rank,
            format_bytes(prepared.nbytes),
            prepared.path,
            len(held),
            len(self._places),
            format_bytes(sum(held)),
        )

    def remove(self, name: str) -> bool:
        """LOADED -> LEAVING. Whether there was one of that name."""
        item = self._names.pop(name, None)
        if item is None:
            return False
        self.leaving.append(item)
        self._publish()
        return True

    def sweep(self) -> None:
        """LEAVING -> (gone) where nobody uses it. Between two steps."""
        if not self.leaving:
            return
        for item in [item for item in self.leaving if not item.users]:
            self.leaving.remove(item)
            self._places[item.index] = None
            assert self._host is not None
            self._host.unload_adapter(item.index)
            logger.info("LoRA adapter %r is gone; it took %s", item.name, format_bytes(item.prepared.nbytes))

    def find(self, name: str) -> Adapter:
        """The loaded adapter of a name.

        Raises:
            RequestError: there is none.
        """
        item = self._names.get(name) if isinstance(name, str) else None
        if item is None:
            known = ", ".join(self._names) or "none"
            raise RequestError("adapter", name, f"the name of a loaded adapter (now: {known})")
        return item

    def check(self, used: Iterable[Adapter | None]) -> None:
        """Recompute everything from scratch.

        Args:
            used: for each unfinished request what it uses.

        Raises:
            AssertionError: naming the invariant.
        """
        placed = [item for item in self._places if item is not None]
        for index, item in enumerate(self._places):
            if item is not None and item.index != index:
                raise AssertionError(f"A1: {item.name!r} is at {index} and believes to be at {item.index}")
        named = [*self._names.values(), *self.leaving]
        if len(named) != len(placed) or {id(item) for item in named} != {id(item) for item in placed}:
            raise AssertionError("A1: loaded and leaving adapters are not those that have a place")
        if any(name != item.name for name, item in self._names.items()) or list(self.paths) != list(
            self._names
        ):
            raise AssertionError("A1: an adapter is known by another name than its own")
        users = Counter(id(item) for item in used if item is not None)
        for item in placed:
            if users.pop(id(item), 0) != item.users:
                raise AssertionError(f"A2: {item.name!r} counts {item.users} users")
        if users:
            raise AssertionError("A2: a request uses an adapter that is gone")


def check_name(name: object, field: str = "lora_name") -> None:
    """Raises RequestError for what cannot be the name of an adapter."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARACTERS:
        raise RequestError(field, name, f"a string of 1..{MAX_NAME_CHARACTERS} characters")
