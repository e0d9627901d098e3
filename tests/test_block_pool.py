"""The block pool: sharing, determinism, refusals, and a machine that looks for a lost block."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastllm.engine.block_pool import BlockPool
from fastllm.errors import CapacityError, RequestError


def test_blocks_are_given_out_in_order_and_again_in_the_order_of_their_table() -> None:
    pool = BlockPool(6, 4)
    first = pool.allocate(4)
    assert first == [0, 1, 2, 3]
    pool.free(first)
    assert pool.allocate(6) == [0, 1, 2, 3, 4, 5]


def test_allocate_more_than_free_takes_nothing_and_gives_the_arithmetic() -> None:
    pool = BlockPool(3, 4)
    pool.allocate(1)
    assert pool.can_allocate(2)
    assert not pool.can_allocate(3)
    assert not pool.can_allocate(-1)
    with pytest.raises(CapacityError) as caught:
        pool.allocate(3)
    assert (caught.value.asked, caught.value.had, caught.value.would_fit) == (3, 2, 2)
    assert pool.num_free == 2
    with pytest.raises(RequestError):
        pool.allocate(-1)
    pool.check([[0]])


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(2, 4)
    mine = pool.allocate(1)
    yours = pool.fork(mine)
    assert pool.reference_count(0) == 2
    pool.free(mine)
    assert pool.num_free == 1
    pool.free(yours)
    assert pool.num_free == 2
    pool.check([])


@pytest.mark.parametrize("blocks", [[2], [0, 0], [-1], [7], [0, 1, 0]])
def test_freeing_what_is_not_held_changes_nothing(blocks: list[int]) -> None:
    pool = BlockPool(4, 4)
    held = pool.allocate(2)
    with pytest.raises(RequestError):
        pool.free(blocks)
    pool.check([held])
    assert pool.num_free == 2


def test_a_table_may_hold_a_block_as_often_as_it_has_references() -> None:
    pool = BlockPool(2, 4)
    table = pool.allocate(1)
    table += pool.fork(table)
    pool.check([table])
    pool.free(table)
    pool.check([])
    assert pool.allocate(2) == [0, 1]


def test_forking_a_free_block_is_refused() -> None:
    pool = BlockPool(4, 4)
    held = pool.allocate(1)
    with pytest.raises(RequestError):
        pool.fork([held[0], 3])
    pool.check([held])


@pytest.mark.parametrize(("blocks", "size"), [(0, 1), (1, 0), (-1, 4), (2**27, 16), (1, 2**40)])
def test_sizes_out_of_range_are_refused(blocks: int, size: int) -> None:
    with pytest.raises(RequestError):
        BlockPool(blocks, size)


def test_check_finds_a_wrong_count() -> None:
    pool = BlockPool(4, 4)
    held = pool.allocate(2)
    with pytest.raises(AssertionError, match="P4"):
        pool.check([held[:1]])
    with pytest.raises(AssertionError, match="P4"):
        pool.check([held, held])


@given(st.data(), st.integers(1, 5), st.integers(1, 6))
def test_slot_mapping(data: st.DataObject, block_size: int, num_blocks: int) -> None:
    pool = BlockPool(num_blocks, block_size)
    table = data.draw(st.permutations(pool.allocate(num_blocks)))
    stop = data.draw(st.integers(0, num_blocks * block_size))
    start = data.draw(st.integers(0, stop))
    slots = pool.slot_mapping(table, start, stop)
    assert slots.dtype == np.int32
    assert slots.tolist() == [
        table[position // block_size] * block_size + position % block_size for position in range(start, stop)
    ]
    for bad in ((-1, 0), (0, num_blocks * block_size + 1), (1, 0)):
        with pytest.raises(RequestError):
            pool.slot_mapping(table, *bad)


@given(st.integers(0, 1000), st.integers(1, 20))
def test_blocks_for(tokens: int, block_size: int) -> None:
    blocks = BlockPool(1, block_size).blocks_for(tokens)
    assert (blocks - 1) * block_size < tokens <= blocks * block_size or tokens == blocks == 0


class BlockPoolMachine(RuleBasedStateMachine):
    """Tables come and go, blocks are remembered and found; the model is the list of tables, what each hash
    stands for, and the order in which blocks that nobody holds were given up."""

    @initialize(blocks=st.integers(1, 12))
    def start(self, blocks: int) -> None:
        self.blocks = blocks
        self.pool = BlockPool(blocks, 4)
        self.tables: list[list[int]] = []
        self.known: dict[bytes, int] = {}
        self.idle: list[int] = []

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        possible = count <= self.pool.num_free
        assert self.pool.can_allocate(count) == possible
        if possible:
            table = self.pool.allocate(count)
            held = {block for other in self.tables for block in other}
            assert len(set(table)) == count
            assert not held & set(table)
            without_content = self.blocks - len(held) - len(self.idle)
            most = max(count - without_content, 0)
            lost, self.idle = self.idle[:most], self.idle[most:]
            self.known = {content: block for content, block in self.known.items() if block not in lost}
            self.tables.append(table)
        else:
            with pytest.raises(CapacityError):
                self.pool.allocate(count)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        shared = data.draw(st.integers(0, len(table)))
        assert self.pool.fork(table[:shared]) == table[:shared]
        self.tables.append(table[:shared])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.free(table)
        held = {block for other in self.tables for block in other}
        for block in dict.fromkeys(reversed(table)):
            if block in self.known.values() and block not in held:
                self.idle.append(block)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), content=st.sampled_from([b"u", b"v", b"w", b"x", b"y", b"z"]))
    def remember(self, data: st.DataObject, content: bytes) -> None:
        table = data.draw(st.sampled_from(self.tables))
        assume(table)
        block = data.draw(st.sampled_from(table))
        self.pool.remember_blocks([block], [content])
        if content not in self.known and block not in self.known.values():
            self.known[content] = block

    @rule(contents=st.lists(st.sampled_from([b"u", b"v", b"w", b"x", b"y", b"z"]), max_size=4))
    def take(self, contents: list[bytes]) -> None:
        expected = []
        for content in contents:
            if content not in self.known:
                break
            expected.append(self.known[content])
        assert self.pool.find_blocks(contents) == expected
        assert self.pool.take_blocks(contents) == expected
        self.idle = [block for block in self.idle if block not in expected]
        self.tables.append(expected)

    @rule()
    def reset(self) -> None:
        self.pool.reset_prefix_cache()
        self.known, self.idle = {}, []

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free_too_often(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        block = data.draw(st.integers(-2, self.blocks + 1))
        count = sum(other.count(block) for other in self.tables)
        with pytest.raises(RequestError):
            self.pool.free([*table, *[block] * (count + 1)])

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check(self.tables)
            held = {block for table in self.tables for block in table}
            assert self.pool.num_free == self.blocks - len(held)
            assert self.pool.num_cached == len(self.known)
            for content, block in self.known.items():
                assert self.pool.find_blocks([content]) == [block]

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for table in self.tables:
                self.pool.free(table)
            assert self.pool.num_free == self.blocks
            self.pool.check([])


TestBlockPoolMachine = BlockPoolMachine.TestCase
