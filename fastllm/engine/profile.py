"""Where the time of an engine's steps goes.

    with llm.profile() as profile:
        llm.generate(prompts)
    print(profile)                              # a table
    profile.decode.parts["attention"]           # seconds, over all decode steps

A step is measured from the end of the one before, if there was still work then, to its own end. Its parts
lie end to end and add up to it; times are seconds of the engine's clock:

    end of the step before ─ between ─ schedule() ─ executor's call ─ update() ─ outputs ─ end
                                           └──── scheduling ────────────┘        python

The executor divides its call into phases; what remains of the call is "unaccounted". What the profile costs
itself, ten to thirty microseconds a step, is in no part. An engine without a profile runs none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fastllm.engine.drafter import Drafter
from fastllm.engine.hooks import Aborted, EngineHook, Finished, Queued, Step
from fastllm.executor.base import Executor, PhaseTimer, StepBatch, StepResult

GROUPS: Mapping[str, tuple[str, ...]] = {
    "matmul": ("qkv", "output", "gate_up", "down", "head"),
    "attention": ("attention",),
    "norm, rope, activation": ("norm", "rope_kv", "activation", "embed", "prepare"),
    "sampling": ("sample",),
    "waiting for threads": ("wait",),
    "executor": ("executor",),
    "drafting": ("drafting",),
    "scheduling": ("scheduling",),
    "Python": ("python",),
    "between steps": ("between",),
    "unaccounted": ("unaccounted",),
}
"""What the table calls the parts, and which it takes together.

waiting for threads: the first thread of the executor is done with its part of a large batch, another is not.
executor: the whole call of an executor that has no phases. drafting: the steps of a draft model. scheduling:
choosing the tokens, building the batch and taking in its result. Python: texts and outputs. between steps:
what hooks do at a step's end, handing outputs over and taking requests; where `Engine.step` is called
directly, all that its caller does meanwhile. unaccounted: checking the batch's arrays, waking threads,
waiting for the GIL.
"""

OVERHEAD = ("scheduling", "python", "between", "unaccounted")
"""The parts in which nothing of the model is computed."""


@dataclass(slots=True)
class StepTimes:
    """The steps of one kind, added up.

    Attributes:
        steps: how many there were.
        tokens: how many were computed in them, of prompts and of answers.
        seconds: what they took; the sum of `parts`.
        parts: seconds by part: the executor's phases, or "executor" where it has none, and those of OVERHEAD.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def overhead(self) -> float:
        """The share, from 0 to 1, of the time in which nothing of the model was computed."""
        return sum(self.parts.get(name, 0.0) for name in OVERHEAD) / self.seconds if self.seconds else 0.0

    def groups(self) -> dict[str, dict[str, float]]:
        """The parts, in seconds, by group; a phase that no group knows is a group of its own."""
        home = {part: group for group, parts in GROUPS.items() for part in parts}
        found: dict[str, dict[str, float]] = {group: {} for group in GROUPS}
        for part, seconds in self.parts.items():
            found.setdefault(home.get(part, part), {})[part] = seconds
        return {group: parts for group, parts in found.items() if parts}

    def add(self, tokens: int, parts: Mapping[str, float]) -> None:
        """One more step."""
        self.steps += 1
        self.tokens += tokens
        for part, seconds in parts.items():
            self.parts[part] = self.parts.get(part, 0.0) + seconds
            self.seconds += seconds


class Profile(EngineHook):
    """The times of an engine's steps, from `Engine.start_profile` or `LLM.profile`. Complete once it ended.

    Attributes:
        prefill: steps with tokens of prompts alone.
        mixed: steps with both.
        decode: steps in which every sequence goes on from its newest token.
    """

    def __init__(
        self,
        executor: Executor,
        clock: Callable[[], float],
        num_requests: int,
        drafter: Drafter | None = None,
    ) -> None:
        self.prefill = StepTimes()
        self.mixed = StepTimes()
        self.decode = StepTimes()
        self.executor = _TimedExecutor(executor, clock)
        self._clock = clock
        self._num_requests = num_requests
        self._drafter = drafter
        self._end: float | None = None  # of the step before, if there was still work

    def kinds(self) -> dict[str, StepTimes]:
        """Those that occurred, by name."""
        kinds = {"prefill": self.prefill, "mixed": self.mixed, "decode": self.decode}
        return {name: times for name, times in kinds.items() if times.steps}

    def __str__(self) -> str:
        """The table: milliseconds per step and percent of the step."""
        return "\n".join(_table(self.kinds()))

    # ---- the hook ----------------------------------------------------------------------------------------

    def on_queued(self, event: Queued) -> None:
        self._num_requests += 1

    def on_finished(self, event: Finished) -> None:
        self._num_requests -= 1  # the step that did it is still to come to its end

    def on_aborted(self, event: Aborted) -> None:
        self._num_requests -= 1
        if self._num_requests == 0:
            self._end = None  # from here on the engine waits for work

    def on_step(self, event: Step) -> None:
        begin, call = event.time - event.duration, self.executor
        seconds = call.returned - call.called
        phases = {"executor": seconds} if call.phases is None else call.phases
        drafting = 0.0 if self._drafter is None else self._drafter.seconds
        parts = {
            **phases,
            **({"drafting": drafting} if drafting else {}),
            "scheduling": (call.entered - begin) + (event.time - call.left) - drafting,
            "python": event.delivery,
            "between": 0.0 if self._end is None else begin - self._end,
            "unaccounted": seconds - sum(phases.values()),
        }
        tokens = event.num_prefill_tokens + event.num_decode_tokens
        if not event.num_prefill_tokens:
            self.decode.add(tokens, parts)
        elif event.num_decode_tokens:
            self.mixed.add(tokens, parts)
        else:
            self.prefill.add(tokens, parts)
        self._end = self._clock() if self._num_requests else None


class _TimedExecutor:
    """An executor, and when it was last called.

    Attributes:
        entered, called, returned, left: seconds of the clock. Between the first two and between the last two
            lies the profile's own work.
        phases: seconds of the last step by phase; None where the executor has none.
    """

    def __init__(self, executor: Executor, clock: Callable[[], float]) -> None:
        self._inner = executor
        self.entered = self.called = self.returned = self.left = 0.0
        self.phases: Mapping[str, float] | None = None
        self._timer = executor if isinstance(executor, PhaseTimer) else None
        self._clock = clock

    @property
    def block_size(self) -> int:
        return self._inner.block_size

    def kv_capacity(self) -> int:
        return self._inner.kv_capacity()

    def submit(self, batch: StepBatch) -> int:
        self.entered = self._clock()
        if self._timer is not None:
            self._timer.profile(True)  # from zero
        self.called = self._clock()
        return self._inner.submit(batch)

    def collect(self, ticket: int) -> StepResult:
        result = self._inner.collect(ticket)
        self.returned = self._clock()
        if self._timer is not None:
            self.phases = self._timer.phase_seconds
        self.left = self._clock()
        return result

    def end(self) -> Executor:
        """The executor itself, which measures its phases no longer."""
        if self._timer is not None:
            self._timer.profile(False)
        return self._inner

    def close(self) -> None:
        self._inner.close()


# ---- the table -------------------------------------------------------------------------------------------

_LABEL_WIDTH = 24
_COLUMN_WIDTH = 22


def _table(kinds: Mapping[str, StepTimes]) -> Iterator[str]:
    if not kinds:
        yield "no steps"
        return
    columns = list(kinds.values())
    yield _line("", kinds)
    yield _line("", [f"{times.steps:,} step{'s' * (times.steps != 1)}" for times in columns])
    yield _line("", [f"{times.tokens:,} token{'s' * (times.tokens != 1)}" for times in columns])
    yield _line("", ["ms/step       %"] * len(columns))
    grouped = [times.groups() for times in columns]
    for group in dict.fromkeys(name for groups in grouped for name in groups):
        parts = [groups.get(group, {}) for groups in grouped]
        yield _times(group, [sum(its.values()) for its in parts], columns)
        names = dict.fromkeys(name for its in parts for name in its)
        if len(names) > 1:
            for name in names:
                yield _times("  " + name, [its.get(name, 0.0) for its in parts], columns)
    yield _times("step", [times.seconds for times in columns], columns)
    yield _line("tokens/s", [f"{times.tokens_per_second:,.1f}" for times in columns])


def _times(label: str, seconds: Sequence[float], columns: Sequence[StepTimes]) -> str:
    shown = []
    for value, times in zip(seconds, columns, strict=True):
        shown.append(f"{value / times.steps * 1e3:.3f}  {value / (times.seconds or 1.0):6.1%}")
    return _line(label, shown)


def _line(label: str, cells: Iterable[str]) -> str:
    return (label.ljust(_LABEL_WIDTH) + "".join(cell.rjust(_COLUMN_WIDTH) for cell in cells)).rstrip()
