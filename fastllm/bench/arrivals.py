"""When requests arrive: Poisson, gamma or constant gaps at a rate that spikes multiply.

A process is drawn with a mean gap of 1 and then stretched: with the expected number of arrivals until t,

    L(t) = integral of rate(u) du from 0 to t,    arrival k is at L^-1(gap_1 + ... + gap_k).

For Poisson arrivals that is the inhomogeneous Poisson process itself (Cinlar, "Introduction to Stochastic
Processes", 1975, section 4.7); the others keep their shape. The squared coefficient of
variation of the gaps is 1 for Poisson, 0 for constant and 1 / burstiness for gamma arrivals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fastllm.errors import RequestError

PROCESSES = ("poisson", "gamma", "constant")
_ARRIVALS = 1  # of the random streams of a seed; the others are in prompts.py
MOST_REQUESTS = 10_000_000


@dataclass(frozen=True)
class Spike:
    """The rate is `factor` times as high for `seconds`, from `at` seconds after the start on."""

    at: float
    seconds: float
    factor: float

    @classmethod
    def parse(cls, text: str) -> Spike:
        """From "AT:SECONDS:FACTOR".

        Raises:
            RequestError: it is not of that form, or a number is out of range.
        """
        try:
            at, seconds, factor = (float(part) for part in text.split(":"))
        except ValueError:
            raise RequestError("spike", text, "AT:SECONDS:FACTOR, three numbers") from None
        spike = cls(at, seconds, factor)
        if not (0 <= at < math.inf and 0 < seconds < math.inf and 0 < factor < math.inf):
            raise RequestError("spike", text, "a time of at least 0, a length and a factor above 0")
        return spike

    @property
    def end(self) -> float:
        """Seconds after the start at which it is over."""
        return self.at + self.seconds


def arrival_times(
    process: str,
    rate: float,
    seed: int,
    *,
    requests: int | None = None,
    seconds: float | None = None,
    burstiness: float = 1.0,
    spikes: Sequence[Spike] = (),
) -> list[float]:
    """Seconds after the start at which requests are due, in order.

    Args:
        process: one of `PROCESSES`.
        rate: requests per second outside spikes. Spikes that overlap multiply.
        seed: the same seed gives the same times.
        requests: how many at most.
        seconds: none at this time or later. One of the two has to be given.
        burstiness: the gamma distribution's shape; below 1 is burstier than Poisson, above 1 more even.

    Raises:
        RequestError: a value is out of range.
    """
    if process not in PROCESSES:
        raise RequestError("arrivals", process, f"one of {', '.join(PROCESSES)}")
    if not 0 < rate < math.inf:
        raise RequestError("rate", rate, "a number of requests per second above 0")
    if not 0 < burstiness < math.inf:
        raise RequestError("burstiness", burstiness, "a number above 0")
    if requests is None and seconds is None:
        raise RequestError("requests", None, "a number of requests, or a number of seconds")
    edges, expected = _expected(rate, spikes)
    units = math.inf if seconds is None else _units_until(seconds, rate, edges, expected)
    most = MOST_REQUESTS if requests is None else requests
    if requests is None and units > MOST_REQUESTS:
        raise RequestError("rate", rate, f"at most {MOST_REQUESTS} requests in a run")
    random = np.random.default_rng([seed, _ARRIVALS])
    times: list[float] = []
    now = 0.0
    while len(times) < most and now < units:
        gaps = _gaps(process, random, min(most - len(times), 4096), burstiness)
        if process == "constant" and not times:
            gaps[0] = 0.0  # it begins with one; the others begin within a gap
        at = now + np.cumsum(gaps)
        now = float(at[-1])
        times += _stretch(at[at < units], rate, edges, expected).tolist()
    return times


def _gaps(process: str, random: np.random.Generator, count: int, shape: float) -> npt.NDArray[np.float64]:
    if process == "constant":
        return np.ones(count)
    if process == "poisson":
        return random.exponential(1.0, count)
    return random.gamma(shape, 1 / shape, count)


def _expected(
    rate: float, spikes: Sequence[Spike]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Where the rate changes, and how many arrivals are expected until then."""
    edges = np.array(sorted({0.0, *(s.at for s in spikes), *(s.end for s in spikes)}))
    rates = [
        rate * math.prod(s.factor for s in spikes if s.at <= low and high <= s.end)
        for low, high in pairwise(edges.tolist())
    ]
    return edges, np.concatenate([[0.0], np.cumsum(np.array(rates) * np.diff(edges))])


def _units_until(
    seconds: float, rate: float, edges: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]
) -> float:
    over = max(seconds - float(edges[-1]), 0.0) * rate
    return float(np.interp(seconds, edges, expected)) + over


def _stretch(
    units: npt.NDArray[np.float64],
    rate: float,
    edges: npt.NDArray[np.float64],
    expected: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    over = np.maximum(units - expected[-1], 0.0) / rate
    return np.asarray(np.interp(units, expected, edges) + over)
