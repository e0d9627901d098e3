from collections.abc import Iterable

from typing_extensions import disjoint_base

from fastllm.engine.sequence import Sequence

@disjoint_base
class Drafter:
    @property
    def max_tokens(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    def __init__(self, max_tokens: int) -> None: ...
    def check(self, sequences: Iterable[Sequence]) -> None: ...

@disjoint_base
class NgramDrafter(Drafter):
    @property
    def min_match(self) -> int: ...
    def __init__(self, max_tokens: int = 10, min_match: int = 2) -> None: ...
