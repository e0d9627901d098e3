"""Which tile a product takes."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """bn x bm outputs per program, by `warps` warps; `stages` of the pipeline from memory; `programs` per multiprocessor."""

    bn: int
    bm: int
    warps: int
    stages: int
    programs: int
    chain: int = 1
    descriptors: int = 0
