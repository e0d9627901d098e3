"""Which program attends to which keys: queries in tiles, the keys of long tiles in parts. NumPy alone.

A tile is a few neighbouring queries of a sequence, each with the `group` heads that share a KV head: the rows
of q that a program multiplies K with, at most `Tile.rows`. Sequences whose queries fit into one tile of `few`
(decodes, small drafts) make the list "few", the others (prefill) the list "many": in tiles of `some` if each
fits into one of those, else of `many`. A tile's keys go from its first query's window to its last query.

A list is one launch of its items for every KV head. So that it fills the machine, however few or uneven the
sequences are, no item has more than

    length = max(Tile.part, keys of all tiles * kv_heads / (Tile.programs * multiprocessors))

keys, rounded up to whole key tiles: a tile with more is cut into equal parts, as few as that allows. Nothing
bounds the number of parts and no case depends on the number of sequences, so no batch is much slower than
the next smaller one. With P = programs * multiprocessors / kv_heads a list has at most tiles + P items, 2 P
of them parts (a tile that is cut is longer than `length`): `capacity` knows how much a graph needs.

Deterministic: a query's result is made of parts of DETERMINISTIC_KEYS keys that begin at multiples of that,
added in ascending order, whatever the batch and however its prompt was cut. All sequences are in "many", in
tiles of `fixed`. An item has one such part, or all of its tile's, which the program then adds up itself in
the same order: to cut is a matter of speed alone, and there are at most 2 P parts, or those of one tile.

An item is 8 int32; keys are positions in the sequence:

    0 where its sequence's block table begins   1 first row of q   2 queries   3 position of the first query
    4 first key   5 end of the keys   6 slot of the tile's first part, unused if it has one
    7 part * 65536 + parts of the tile
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastllm.errors import RequestError

Int32Array = npt.NDArray[np.int32]

DETERMINISTIC_KEYS = 1024  # of a part: half a megabyte of K and V for a head of 128 in 16 bits
FIELDS = 8  # of an item


class Tile(NamedTuple):
    """rows x keys scores at a time, and how the program that computes them is compiled."""

    rows: int  # queries * group, a power of two
    keys: int  # a power of two, 16 or more
    warps: int
    stages: int  # of the pipeline from memory to shared memory
    programs: int  # per multiprocessor: what cutting tiles into parts aims at
    loops: int  # 2: the key tiles that need no mask have their own
    part: int  # the fewest keys of a part; of `fixed`, the keys of every part. A multiple of `keys`


class Tiles(NamedTuple):
    """The tiles of a model on a device (`attention.tiles`)."""

    few: Tile
    some: Tile
    many: Tile
    fixed: Tile


class AttentionPlan(NamedTuple):
    """The items of a step, and what they were made for."""

    few: Int32Array  # (n, 8)
    many: Int32Array  # (n, 8)
    few_slots: int  # parts of tiles that have several
    many_slots: int
    few_tile: Tile
    many_tile: Tile
    group: int
    kv_heads: int
    window: int
    deterministic: bool


class Capacity(NamedTuple):
    """As much as the plan of any step has; see `capacity`."""

    few: int  # items
    many: int
    few_slots: int
    many_slots: int
    rows: int  # of one KV head in all slots of a list

    def holds(self, plan: AttentionPlan) -> bool:
        needed = needs(plan)
        return all(own >= other for own, other in zip(self, needed, strict=True))


_NONE: Int32Array = np.zeros((0, FIELDS), dtype=np.int32)


def plan_attention(
    query_start: Int32Array,
    seq_lens: Int32Array,
    *,
    tiles: Tiles,
    group: int,
    kv_heads: int,
    multiprocessors: int,
    table_width: int,
    window: int = 0,
    deterministic: bool = False,
    many_tile: Tile | None = None,
) -> AttentionPlan:
    """The items of a step.

    Args:
        query_start: (S + 1,) from 0, ascending: the queries of sequence s are query_start[s] to
            query_start[s + 1], the last ones of its seq_lens[s] positions. It may have none.
        seq_lens: (S,) lengths with these queries.
        group: query heads for each KV head.
        table_width: entries of a sequence's block table; that of sequence s begins at s * table_width.
        window: how many positions a query sees, its own included; 0: all before.
        deterministic: a query's result depends neither on the batch nor on how its prompt was cut.
        many_tile: the tile of "many", tiles.some or tiles.many, if it must not follow from this step: if it
            runs as a graph that was captured with that one.

    Raises:
        RequestError: more heads share a KV head than a tile has rows.
    """
    if group > min(tiles.some.rows, tiles.fixed.rows):
        raise RequestError("attention: group", group, f"up to {min(tiles.some.rows, tiles.fixed.rows)}")
    starts = query_start[:-1]
    queries = query_start[1:] - starts
    positions = seq_lens - queries
    tables = np.arange(0, len(queries) * table_width, table_width, dtype=np.int32)
    in_few = 0 if deterministic else tiles.few.rows // group
    most = int(queries.max(initial=0))
    if deterministic:
        many_tile = tiles.fixed
    elif many_tile is None:
        many_tile = tiles.some if most * group <= tiles.some.rows else tiles.many
    few, few_slots, many, many_slots = _NONE, 0, _NONE, 0
    if in_few and len(queries):
        cut = _Cut(tiles.few, window, _programs(tiles.few, multiprocessors, kv_heads), aligned=False)
        if most <= in_few and queries.all():  # as in most steps
            few, few_slots = cut.items(tables, starts, queries, positions)
        else:
            (s,) = ((queries > 0) & (queries <= in_few)).nonzero()
            if len(s):
                few, few_slots = cut.items(tables[s], starts[s], queries[s], positions[s])
    if most > in_few:
        (s,) = (queries > in_few).nonzero()
        per_tile = many_tile.rows // group
        count = -(-queries[s] // per_tile)
        s = s.repeat(count)
        first = (np.arange(len(s)) - (count.cumsum() - count).repeat(count)) * per_tile  # of its sequence
        queries, positions = np.minimum(queries[s] - first, per_tile), positions[s] + first
        cut = _Cut(many_tile, window, _programs(many_tile, multiprocessors, kv_heads), deterministic)
        many, many_slots = cut.items(tables[s], starts[s] + first, queries, positions)
        # The longest first: what begins last, when the machine runs out of work, is short.
        many = many[(many[:, 4] - many[:, 5]).argsort(kind="stable")]
    return AttentionPlan(
        few, many, few_slots, many_slots, tiles.few, many_tile, group, kv_heads, window, deterministic
    )


def capacity(
    tokens: int,
    *,
    tiles: Tiles,
    group: int,
    kv_heads: int,
    multiprocessors: int,
    sequences: int = 0,
    keys_max: int = 0,
    deterministic: bool = False,
    many: bool = True,
) -> Capacity:
    """What holds the plan of any step of so many tokens, whatever its window.

    Args:
        sequences: of a step, at most; 0: as many as tokens.
        keys_max: the longest sequence there may be; needed if deterministic.
        many: whether "many" may have items; without, sequences have few queries in all steps.
    """
    sequences = sequences or tokens
    few = few_slots = few_rows = many_items = many_slots = many_rows = 0
    if not deterministic and group <= tiles.few.rows:
        wanted = _programs(tiles.few, multiprocessors, kv_heads)
        few, few_slots = sequences + wanted, 2 * wanted
        few_rows = few_slots * tiles.few.rows
    for tile in (tiles.fixed,) if deterministic else (tiles.some, tiles.many) if many else ():
        wanted = _programs(tile, multiprocessors, kv_heads)
        slots = max(2 * wanted, -(-keys_max // tile.part)) if deterministic else 2 * wanted
        # A sequence with n queries has at most (n + per_tile - 1) / per_tile tiles.
        per_tile = tile.rows // group
        count = min(tokens, (tokens + sequences * (per_tile - 1)) // per_tile)
        many_items = max(many_items, count + (slots if deterministic else wanted))
        many_slots = max(many_slots, slots)
        many_rows = max(many_rows, slots * tile.rows)
    return Capacity(few, many_items, few_slots, many_slots, max(few_rows, many_rows))


def needs(plan: AttentionPlan) -> Capacity:
    """What holds this plan alone."""
    rows = max(plan.few_slots * plan.few_tile.rows, plan.many_slots * plan.many_tile.rows)
    return Capacity(len(plan.few), len(plan.many), plan.few_slots, plan.many_slots, rows)


def _programs(tile: Tile, multiprocessors: int, kv_heads: int) -> int:
    """Items of a list that fill the machine."""
    return max(1, tile.programs * multiprocessors // kv_heads)


class _Cut(NamedTuple):
    """How the tiles of a list are cut into parts."""

    tile: Tile
    window: int
    wanted: int  # items
    aligned: bool  # to parts of tile.part keys, or not at all

    def items(
        self, table: Int32Array, row: Int32Array, queries: Int32Array, position: Int32Array
    ) -> tuple[Int32Array, int]:
        """Items of tiles, whose fields 0 to 3 are given, and how many of them are parts of several."""
        keys = self.tile.keys
        tiles = np.empty((len(table), FIELDS), dtype=np.int32)
        tiles[:, 0], tiles[:, 1], tiles[:, 2], tiles[:, 3] = table, row, queries, position
        begin, end = tiles[:, 4], tiles[:, 5]
        begin[:] = np.maximum(position - (self.window - 1), 0) & -keys if self.window else 0
        end[:] = position + queries
        tiles[:, 6] = 0
        tiles[:, 7] = 1
        length = end - begin
        limit = max(self.tile.part, -(-int(length.sum()) // self.wanted))
        limit = -(-limit // keys) * keys
        if int(length.max()) <= limit:
            return tiles, 0
        if self.aligned:
            first, step, parts = self._aligned(begin, end, length > limit)
        else:
            first = begin
            parts = (length + (limit - 1)) // limit
            step = ((length + (parts - 1)) // parts + (keys - 1)) & -keys
            parts = (length + (step - 1)) // step
        slots = parts * (parts > 1)
        slot_ends = slots.cumsum()
        tiles[:, 6] = slot_ends - slots
        ends = parts.cumsum()
        tile = np.arange(len(parts)).repeat(parts)
        part = np.arange(len(tile)) - (ends - parts).take(tile)
        items: Int32Array = tiles.take(tile, axis=0)
        step = step.take(tile)
        at = first.take(tile) + part * step
        items[:, 4] = np.maximum(items[:, 4], at)
        items[:, 5] = np.minimum(items[:, 5], at + step)
        items[:, 7] = part * 65536 + parts.take(tile)
        return items, int(slot_ends[-1])

    def _aligned(
        self, begin: Int32Array, end: Int32Array, long: npt.NDArray[np.bool_]
    ) -> tuple[Int32Array, Int32Array, Int32Array]:
        """Where the first part of each tile would begin, a part's keys, and how many there are."""
        size = self.tile.part
        first = begin // size * size
        parts = np.where(long, -(-(end - first) // size), 1)
        cut = np.where(parts > 1, parts, 0)
        most = max(2 * self.wanted, int(cut.max()))
        if int(cut.sum()) > most:
            order = np.argsort(-cut, kind="stable")
            beyond = order[np.cumsum(cut[order]) > most]  # the longest are cut
            parts[beyond] = 1
        return first, np.where(parts > 1, size, end - first), parts
