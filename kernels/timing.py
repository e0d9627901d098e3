"""Timing of GPU calls: replays of a graph of many launches, over inputs that the cache has forgotten."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


def seconds_per_call(calls: Sequence[Callable[[], object]], launches: int = 50, replays: int = 7) -> float:
    """Median seconds of one call, over `replays` replays of a graph of at least `launches` launches.

    Args:
        calls: the same work on different buffers, launched in turn; together larger than the second-level cache.
        launches: at least so many in a graph, in whole rounds.
        replays: of which the median is taken, after one that is not counted.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = -(-launches // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times) / (rounds * len(calls))
