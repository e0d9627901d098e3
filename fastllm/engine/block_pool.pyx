# cython: auto_pickle=False, autotestdict=False, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""Reference-counted blocks of the paged KV cache.

The cache is `num_blocks` blocks of `block_size` token slots; slot = block * block_size + offset. The pool
hands out block ids and counts their holders; the bytes behind an id belong to the executor. A holder is one
entry of one block table, so a block that two sequences share has two references.

States of a block
=================

                allocate               fork
      +------+ ----------> +--------+ ----------> +------------+ --+
      | FREE |             | OWNED  |             |   SHARED   |   | fork, free
      |  0   | <---------- |   1    | <---------- |    >= 2    | <-+ (while two or more are left)
      +------+    free     +--------+    free     +------------+
        references of the block = the number in its box

    from     to       function                       effect
    -------  -------  -----------------------------  ----------------------------------------------------
    FREE     OWNED    allocate, allocate_into        leaves the free stack; references 0 -> 1
    OWNED    SHARED   fork, fork_table               references 1 -> 2
    SHARED   SHARED   fork, fork_table, free, free_table   references +- 1, two or more are left
    SHARED   OWNED    free, free_table               references 2 -> 1
    OWNED    FREE     free, free_table               references 1 -> 0; goes on top of the free stack

Invariants (`check` recomputes every one of them)
=================================================

    P1  A block has 0 references exactly when it is on the free stack.
    P2  No block is on the free stack twice, and every entry is in [0, num_blocks).
    P3  No count is negative.
    P4  Given the tables of all holders: references[b] = how often b occurs in them, for every b.

The order in which blocks are given out depends on nothing but the calls made: a new pool gives 0, 1, 2, ...;
later, what was freed last is given out first, each table in its own order (its bytes are the likeliest to
be in the processor's caches still).
"""

from libc.stdint cimport INT32_MAX, int32_t
from libcpp.vector cimport vector

import numpy as np

from fastllm.errors import CapacityError, RequestError


cdef class BlockPool:
    """Reference-counted blocks with a deterministic free stack. Not thread-safe.

    Args:
        num_blocks: blocks in the pool, >= 1.
        block_size: tokens per block, >= 1.

    Raises:
        RequestError: a size is out of range, or num_blocks * block_size exceeds an int32 slot number.
    """

    def __init__(self, Py_ssize_t num_blocks, Py_ssize_t block_size):
        if block_size < 1 or block_size > INT32_MAX:
            raise RequestError("block_size", block_size, "an integer in 1..2**31-1")
        if num_blocks < 1 or num_blocks > INT32_MAX // block_size:
            raise RequestError(
                "num_blocks", num_blocks,
                f"an integer in 1..{INT32_MAX // block_size} (slots are int32, {block_size} to a block)",
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.references.assign(num_blocks, 0)
        self.free_stack.resize(num_blocks)
        cdef Py_ssize_t i
        for i in range(num_blocks):
            self.free_stack[i] = <int32_t> (num_blocks - 1 - i)

    @property
    def num_free(self):
        """Blocks that nothing holds."""
        return <Py_ssize_t> self.free_stack.size()

    cpdef Py_ssize_t blocks_for(self, Py_ssize_t num_tokens) noexcept:
        """Blocks that num_tokens >= 0 tokens take: the quotient by block_size, rounded up."""
        return (num_tokens + self.block_size - 1) // self.block_size

    cpdef bint can_allocate(self, Py_ssize_t count) noexcept:
        """Whether allocate(count) would succeed now."""
        return count >= 0 and <size_t> count <= self.free_stack.size()

    cdef int allocate_into(self, vector[int32_t]& table, Py_ssize_t count) except -1:
        """Append count blocks to table. Nothing changes when there are too few."""
        cdef Py_ssize_t _i
        cdef int32_t block
        if count < 0:
            raise RequestError("count", count, "an integer >= 0")
        if <size_t> count > self.free_stack.size():
            raise CapacityError(
                "KV cache", asked=count, had=self.free_stack.size(), would_fit=self.free_stack.size(),
                unit="blocks",
            )
        table.reserve(table.size() + count)
        for _i in range(count):
            block = self.free_stack.back()
            self.free_stack.pop_back()
            self.references[block] = 1
            table.push_back(block)
        return 0

    cdef int free_table(self, vector[int32_t]& table) except -1:
        """Give up every entry of table and clear it. Nothing changes when an entry is not held."""
        cdef Py_ssize_t i, undo
        cdef Py_ssize_t size = <Py_ssize_t> table.size()
        cdef size_t free_before = self.free_stack.size()
        cdef int32_t block
        for i in range(size - 1, -1, -1):  # from the back, so that they are given out in this order again
            block = table[i]
            if block < 0 or block >= self.num_blocks or self.references[block] == 0:
                self.free_stack.resize(free_before)
                for undo in range(i + 1, size):
                    self.references[table[undo]] += 1
                raise RequestError("blocks", block, "only ids of blocks that are held")
            self.references[block] -= 1
            if self.references[block] == 0:
                self.free_stack.push_back(block)
        table.clear()
        return 0

    cdef int fork_table(self, const vector[int32_t]& source, vector[int32_t]& target) except -1:
        """Append the entries of source to target, each with one more reference."""
        cdef Py_ssize_t i
        cdef Py_ssize_t size = <Py_ssize_t> source.size()
        cdef int32_t block
        for i in range(size):
            block = source[i]
            if block < 0 or block >= self.num_blocks or self.references[block] == 0:
                raise RequestError("blocks", block, "only ids of blocks that are held")
        target.reserve(target.size() + size)
        for i in range(size):
            self.references[source[i]] += 1
            target.push_back(source[i])
        return 0

    def allocate(self, Py_ssize_t count):
        """Take count free blocks, each with one reference.

        Returns:
            Their ids, list[int] of length count.

        Raises:
            CapacityError: fewer than count are free; nothing was taken.
        """
        cdef vector[int32_t] table
        self.allocate_into(table, count)
        return table

    def free(self, blocks):
        """Give up one reference of each entry of blocks; those left without any become free.

        Raises:
            RequestError: an entry is not held (as often as it is given); nothing was freed.
        """
        cdef vector[int32_t] table = blocks
        self.free_table(table)

    def fork(self, blocks):
        """Share held blocks: one more reference each.

        Returns:
            A second table with the same ids, list[int].

        Raises:
            RequestError: an entry is not held; nothing changed.
        """
        cdef vector[int32_t] source = blocks
        cdef vector[int32_t] target
        self.fork_table(source, target)
        return target

    def reference_count(self, Py_ssize_t block):
        """Holders of one block; 0 = free."""
        if block < 0 or block >= self.num_blocks:
            raise RequestError("block", block, f"an id in 0..{self.num_blocks - 1}")
        return self.references[block]

    def slot_mapping(self, blocks, Py_ssize_t start, Py_ssize_t stop):
        """Cache slots of the positions start .. stop-1 of a sequence with the block table `blocks`.

        Returns:
            slots, int32 (stop - start,): blocks[p // block_size] * block_size + p % block_size.

        Raises:
            RequestError: the range is not within the table.
        """
        cdef vector[int32_t] table = blocks
        cdef Py_ssize_t covered = <Py_ssize_t> table.size() * self.block_size
        if start < 0 or start > stop or stop > covered:
            raise RequestError("positions", (start, stop), f"a range within 0..{covered}")
        result = np.empty(stop - start, dtype=np.int32)
        cdef int32_t[::1] slots = result
        if stop > start:
            self.fill_slots(&slots[0], table, start, stop - start)
        return result

    def check(self, tables=None):
        """Recompute the invariants from scratch.

        Args:
            tables: the block tables of all holders (an iterable of lists of ids); None leaves P4 out.

        Raises:
            AssertionError: an invariant is broken; the message begins with its number.
        """
        cdef Py_ssize_t i
        cdef int32_t block
        cdef vector[char] on_stack
        on_stack.assign(self.num_blocks, 0)
        for i in range(<Py_ssize_t> self.free_stack.size()):
            block = self.free_stack[i]
            if block < 0 or block >= self.num_blocks or on_stack[block]:
                raise AssertionError(f"P2: entry {i} of the free stack is {block}, no block or there twice")
            on_stack[block] = 1
        for i in range(self.num_blocks):
            if self.references[i] < 0:
                raise AssertionError(f"P3: block {i} has {self.references[i]} references")
            if (self.references[i] == 0) != (on_stack[i] == 1):
                raise AssertionError(
                    f"P1: block {i} has {self.references[i]} references, is free: {on_stack[i] == 1}"
                )
        if tables is None:
            return
        counted = [0] * self.num_blocks
        for table in tables:
            for held in table:
                if not 0 <= held < self.num_blocks:
                    raise AssertionError(f"P4: a table holds {held}, which is no block")
                counted[held] += 1
        for i in range(self.num_blocks):
            if counted[i] != self.references[i]:
                raise AssertionError(
                    f"P4: block {i} has {self.references[i]} references, but is in {counted[i]} tables"
                )
