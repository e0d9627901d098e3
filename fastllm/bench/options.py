"""What a run is asked to be: the options of `serve`, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastllm.bench.arrivals import PROCESSES, Spike
from fastllm.bench.dialect import PATHS, base_of, check_extra
from fastllm.bench.lengths import Lengths
from fastllm.errors import RequestError

SLOS = ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms")
DEFAULT_REQUESTS = 100
_LENGTH = Lengths.parse("tokens", "128")


@dataclass(frozen=True)
class ServeOptions:
    """One run.

    Attributes:
        base_url: the server; paths of the dialect are added.
        endpoint: "completions" or "chat".
        model: its name there; None: the first that the server lists.
        stream: answers come token by token.
        requests, seconds: it ends after so many requests, or begins none after so long.
        concurrency: clients of a closed loop; with a rate, the most requests under way.
        rate: requests per second of an open loop.
        arrivals, burstiness, spikes: see `arrivals.py`.
        seed: of arrivals, prompts and lengths. Round k of a record has the seed `seed` + k.
        prompt_tokens, output_tokens: see `lengths.py`.
        prefix_groups, prefix_tokens: shared prefixes of random prompts.
        dataset, shuffle: a JSONL file in place of random prompts.
        ignore_eos: answers have their full length, if the server knows how.
        temperature: of the sampling; None: the server's own.
        extra: more fields of the body.
        tokenizer: counts tokens in place of the server; a path or a model reference.
        warmup: requests that do not count, before the start.
        drain_seconds: what requests under way at the end have to finish.
        slo: limits in milliseconds, by the names of `SLOS`.
    """

    base_url: str = "http://127.0.0.1:8000"
    endpoint: str = "completions"
    model: str | None = None
    stream: bool = True
    requests: int | None = None
    seconds: float | None = None
    concurrency: int | None = None
    rate: float | None = None
    arrivals: str = "poisson"
    burstiness: float = 1.0
    spikes: tuple[Spike, ...] = ()
    seed: int = 0
    prompt_tokens: Lengths = _LENGTH
    output_tokens: Lengths | None = None
    prefix_groups: int = 0
    prefix_tokens: int = 0
    dataset: str | None = None
    shuffle: bool = False
    ignore_eos: bool | None = None
    temperature: float | None = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    warmup: int = 4
    drain_seconds: float | None = None
    slo: Mapping[str, float] = field(default_factory=dict)
    timeout: float = 600.0
    connect_timeout: float = 10.0
    silence_timeout: float = 120.0
    keep_alive: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_url", base_of(self.base_url))
        _check(self.endpoint in PATHS, "endpoint", self.endpoint, f"one of {', '.join(PATHS)}")
        _check(self.arrivals in PROCESSES, "arrivals", self.arrivals, f"one of {', '.join(PROCESSES)}")
        for name, least in (("requests", 1), ("concurrency", 1), ("warmup", 0), ("seed", 0)):
            value = getattr(self, name)
            _check(value is None or least <= value <= 10**7, name, value, f"{least} to 10000000")
        for name in ("seconds", "rate", "burstiness", "timeout", "connect_timeout", "silence_timeout"):
            value = getattr(self, name)
            _check(value is None or 0 < value < math.inf, name, value, "a number above 0")
        for name in ("drain_seconds", "temperature"):
            value = getattr(self, name)
            _check(value is None or 0 <= value < math.inf, name, value, "a number of at least 0")
        if self.rate is None:
            object.__setattr__(self, "concurrency", self.concurrency or 1)
            _check(not self.spikes, "spike", len(self.spikes), "--rate with it: clients set no rate")
        if self.requests is None and self.seconds is None:
            object.__setattr__(self, "requests", DEFAULT_REQUESTS)
        prefixes = self.prefix_groups, self.prefix_tokens
        _check(min(prefixes) >= 0, "prefix_groups", prefixes, "numbers of at least 0")
        _check((prefixes[0] > 0) == (prefixes[1] > 0), "prefix_groups", prefixes, "--prefix-tokens with it")
        _check(
            not (self.dataset and self.prefix_groups), "prefix_groups", prefixes[0], "no --dataset with it"
        )
        _check(not self.shuffle or self.dataset is not None, "shuffle", True, "--dataset with it")
        if self.dataset is None and self.output_tokens is None:
            object.__setattr__(self, "output_tokens", _LENGTH)
        if self.ignore_eos is None:  # answers to real prompts end where they end
            object.__setattr__(self, "ignore_eos", self.dataset is None)
        for name, value in self.slo.items():
            _check(name in SLOS, "slo", name, f"one of {', '.join(SLOS)}")
            _check(0 < value < math.inf, f"slo: {name}", value, "a number of milliseconds above 0")
        check_extra(self.extra)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a record."""
        found = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        for name in ("prompt_tokens", "output_tokens"):
            found[name] = found[name].text if found[name] is not None else None
        if self.dataset is not None:
            found["dataset"] = self.dataset.rsplit("/", 1)[-1]
            found["prompt_tokens"] = None
        if self.tokenizer is not None:
            found["tokenizer"] = self.tokenizer.rstrip("/").rsplit("/", 1)[-1]
        found["spikes"] = [dataclasses.asdict(spike) for spike in self.spikes]
        return {**found, "extra": dict(self.extra), "slo": dict(self.slo)}


def _check(ok: bool, field_name: str, value: object, limit: str) -> None:
    if not ok:
        raise RequestError(field_name, value, limit)
