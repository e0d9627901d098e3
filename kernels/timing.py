"""Timing of GPU calls: replays of a graph of many launches, over inputs that the cache has forgotten."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")
FORGOTTEN_BYTES = 256 << 20  # more than any second-level cache holds


def rotating(make: Callable[[], T], nbytes: Callable[[T], int], copies: int | None = None) -> list[T]:
    """Copies of an input to be read in turn, together too large for the cache; or `copies` of them."""
    first = make()
    wanted = copies or -(-FORGOTTEN_BYTES // nbytes(first)) + 1
    return [first] + [make() for _ in range(wanted - 1)]


def seconds_per_call(
    call: Callable[[T], object], inputs: Sequence[T], launches: int = 50, replays: int = 5
) -> float:
    """Median seconds of one call over replays of a graph of `launches` calls, inputs in turn."""
    call(inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            call(inputs[i % len(inputs)])
    graph.replay()
    times: list[float] = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times) / launches
