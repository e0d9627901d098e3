"""What an engine tells those who listen: typed events, with one monotonic clock.

Metrics, traces and audit logs are hooks: subclasses of `EngineHook` that override the methods they care
about. An event that no hook listens to is never made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastllm.errors import RequestError
from fastllm.outputs import RequestMetrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Queued:
    """A request was taken in."""

    time: float  # seconds of the engine's clock, as in every event
    request_id: str
    num_prompt_tokens: int
    n: int


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A sequence was admitted to the running ones."""

    time: float
    request_id: str
    index: int
    resumed: bool  # whether it had been preempted


@dataclass(frozen=True, slots=True)
class Step:
    """A step is complete."""

    time: float
    duration: float  # seconds from scheduling to having the tokens
    num_prefill_tokens: int
    num_decode_tokens: int
    num_seqs: int  # sequences in the step
    num_running: int  # after it
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    delivery: float  # seconds from having the tokens to having the outputs
    num_cached_blocks: int  # known by their content, held or free
    num_prefix_queries: int  # prompt tokens looked up in the prefix cache so far
    num_prefix_hits: int  # and found there
    num_preemptions: int  # so far
    num_offloaded_blocks: int = 0  # evicted from the KV cache, and kept elsewhere
    offloaded_bytes: int = 0  # that they take there
    num_restored_tokens: int = 0  # of such blocks that were brought back so far


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A request has its first token. Once per request."""

    time: float
    request_id: str
    since_arrival: float  # seconds


@dataclass(frozen=True, slots=True)
class Tokens:
    """A sequence has new tokens."""

    time: float
    request_id: str
    index: int
    count: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A request has ended by itself. Once per request, unless it is aborted."""

    time: float
    request_id: str
    finish_reasons: tuple[str, ...]  # of its sequences in order of index: "stop", "length", "error"
    metrics: RequestMetrics


@dataclass(frozen=True, slots=True)
class Preempted:
    """A sequence lost its blocks and will be recomputed."""

    time: float
    request_id: str
    index: int
    num_tokens: int  # to recompute


@dataclass(frozen=True, slots=True)
class Aborted:
    """A request was ended from outside, or died with the engine."""

    time: float
    request_id: str
    metrics: RequestMetrics


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """Full blocks of the KV cache can be found from now on: a run of one prompt, each after the one before.

    This, like the two events below, speaks of memory alone: a block that goes to a file (kv_offload_bytes) is
    removed, one that comes back is stored again.

    A hash is SHA-256 over the hash before and the block's token ids, little-endian int32.
    """

    time: float
    hashes: tuple[bytes, ...]
    parent_hash: (
        bytes  # of the block before the first; before a prompt's first block, what stands for model and salt
    )
    token_ids: tuple[int, ...]  # of all of them, block_size each
    block_size: int


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """Blocks were given other contents: they can be found no more."""

    time: float
    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class CacheCleared:
    """No block that was stored until now can be found any more."""

    time: float


CacheEvent = BlocksStored | BlocksRemoved | CacheCleared


def cache_events(
    noted: Sequence[bytes | tuple[bytes, bytes, list[int]] | None], time: float, block_size: int
) -> Iterator[CacheEvent]:
    """What a block pool has noted (`BlockPool.events`) as events, in order, neighbours of one kind joined.

    Blocks stored are joined where each follows the one before.
    """
    at = 0
    while at < len(noted):
        entry = noted[at]
        if entry is None:
            at += 1
            yield CacheCleared(time)
        elif isinstance(entry, bytes):
            removed = []
            while at < len(noted) and isinstance(gone := noted[at], bytes):
                removed.append(gone)
                at += 1
            yield BlocksRemoved(time, tuple(removed))
        else:
            hashes = [entry[1]]  # the parent, then the blocks
            token_ids: list[int] = []
            while at < len(noted) and isinstance(block := noted[at], tuple) and block[1] == hashes[-1]:
                hashes.append(block[0])
                token_ids += block[2]
                at += 1
            yield BlocksStored(time, tuple(hashes[1:]), hashes[0], tuple(token_ids), block_size)


class EngineHook:
    """Base of all hooks: override what you listen to.

    The methods are called from the thread that calls the engine, within its calls, so they must be short.
    They may call `Engine.abort` and `Engine.add_request`. What they raise is logged and goes no further.
    """

    def on_queued(self, event: Queued) -> None: ...

    def on_scheduled(self, event: Scheduled) -> None: ...

    def on_step(self, event: Step) -> None: ...

    def on_first_token(self, event: FirstToken) -> None: ...

    def on_tokens(self, event: Tokens) -> None: ...

    def on_finished(self, event: Finished) -> None: ...

    def on_preempted(self, event: Preempted) -> None: ...

    def on_aborted(self, event: Aborted) -> None: ...

    def on_blocks_stored(self, event: BlocksStored) -> None: ...

    def on_blocks_removed(self, event: BlocksRemoved) -> None: ...

    def on_cache_cleared(self, event: CacheCleared) -> None: ...


Handlers = tuple[Callable[[Any], None], ...]


class HookTable:
    """Who listens to what: per event a tuple of methods, empty where no hook overrides the base."""

    __slots__ = (
        "aborted",
        "blocks_removed",
        "blocks_stored",
        "cache_cleared",
        "finished",
        "first_token",
        "preempted",
        "queued",
        "scheduled",
        "step",
        "tokens",
    )

    def __init__(self, hooks: Sequence[EngineHook]) -> None:
        for hook in hooks:
            if not isinstance(hook, EngineHook):
                raise RequestError("hooks", hook, "instances of EngineHook")

        def listeners(method: str) -> Handlers:
            base = getattr(EngineHook, method)
            return tuple(getattr(hook, method) for hook in hooks if getattr(type(hook), method) is not base)

        self.queued = listeners("on_queued")
        self.scheduled = listeners("on_scheduled")
        self.step = listeners("on_step")
        self.first_token = listeners("on_first_token")
        self.tokens = listeners("on_tokens")
        self.finished = listeners("on_finished")
        self.preempted = listeners("on_preempted")
        self.aborted = listeners("on_aborted")
        self.blocks_stored = listeners("on_blocks_stored")
        self.blocks_removed = listeners("on_blocks_removed")
        self.cache_cleared = listeners("on_cache_cleared")

    @property
    def cache(self) -> bool:
        """Whether anybody listens to what happens to cached blocks."""
        return bool(self.blocks_stored or self.blocks_removed or self.cache_cleared)


def emit(handlers: Handlers, event: object) -> None:
    """Give an event to its listeners. A listener that fails harms neither the engine nor the others."""
    for handler in handlers:
        try:
            handler(event)
        except Exception:
            logger.exception("a hook failed on %s", type(event).__name__)
