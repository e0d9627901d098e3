"""What an engine tells those who listen: typed events, with one monotonic clock.

Metrics, traces and audit logs are hooks: subclasses of `EngineHook` that override the methods they care
about. An event that no hook listens to is never made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
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


Handlers = tuple[Callable[[Any], None], ...]


class HookTable:
    """Who listens to what: per event a tuple of methods, empty where no hook overrides the base."""

    __slots__ = (
        "aborted",
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


def emit(handlers: Handlers, event: object) -> None:
    """Give an event to its listeners. A listener that fails harms neither the engine nor the others."""
    for handler in handlers:
        try:
            handler(event)
        except Exception:
            logger.exception("a hook failed on %s", type(event).__name__)
