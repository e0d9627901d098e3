from collections.abc import Callable, Iterable

from typing_extensions import disjoint_base

from fastllm.engine.drafter import Drafter
from fastllm.engine.sequence import Sequence
from fastllm.engine.step_cost import StepCost
from fastllm.executor.base import Executor

@disjoint_base
class ModelDrafter(Drafter):
    clock: Callable[[], float]
    @property
    def executor(self) -> Executor: ...
    @property
    def cost(self) -> StepCost: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def hit_rate(self) -> float: ...
    @property
    def num_judged(self) -> int: ...
    def __init__(
        self,
        executor: Executor,
        max_tokens: int = 4,
        *,
        max_model_len: int,
        clock: Callable[[], float] = ...,
    ) -> None: ...
    def check(self, sequences: Iterable[Sequence]) -> None: ...
