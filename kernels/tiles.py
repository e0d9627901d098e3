"""Which tile a product takes: a look into a static table, never a trial at run time.

`tables/sm_90.json` was measured by `python -m fastllm.kernels.tune` on an H200; those of sm_80 and sm_89 were
chosen by what the compiler reports (registers, shared memory) and have not been timed, nor has what the tuner
does not
time: "u4 groups" and "u6". A table has, for each kind of product, tiles for M up to a bound, ascending; and
from which M on a weight-only product is done by dequantizing the weights and a plain product.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import NamedTuple

ARCHITECTURES = ("sm_80", "sm_89", "sm_90")


class Tile(NamedTuple):
    """bn x bm outputs per program (bn of N, bm of M)."""

    bn: int
    bm: int
    warps: int
    stages: int  # of the pipeline from memory to shared memory
    programs: int  # per multiprocessor: what a split of K aims at
    descriptors: int  # 1: tensor descriptors (the copy engine) instead of pointers

    @property
    def scales_sums(self) -> bool:
        """Whether a thread's registers hold a block's sums beside the whole ones; see weight_only.py."""
        return self.bn * self.bm <= 64 * 32 * self.warps


class Table(NamedTuple):
    tiles: dict[str, list[tuple[int, Tile]]]  # kind: (M up to, tile), ascending
    dequantize_from: int  # M

    def tile(self, kind: str, m: int) -> Tile:
        """The tile for M = m, or that of the largest bound. kind: `GpuMatrix.tile_kind`, or "int8"."""
        choices = self.tiles[kind]
        return next((tile for bound, tile in choices if m <= bound), choices[-1][1])


@cache
def table(architecture: str) -> Table:
    """The table of an architecture; any without its own takes sm_89's, which asks for the least memory."""
    known = architecture if architecture in ARCHITECTURES else "sm_89"
    raw = json.loads((resources.files("fastllm.kernels") / "tables" / f"{known}.json").read_text())
    tiles = {
        kind: [(int(bound), Tile(*tile)) for bound, tile in bounds.items()]
        for kind, bounds in raw["tiles"].items()
    }
    return Table(tiles, raw["dequantize_from"])
