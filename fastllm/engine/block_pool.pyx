# cython: auto_pickle=False, autotestdict=False, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""Reference-counted blocks of the paged KV cache, and the index of what they hold.

The cache is `num_blocks` blocks of `block_size` token slots; slot = block * block_size + offset. The pool
hands out block ids and counts their holders; the bytes behind an id belong to the executor. A holder is one
entry of one block table, so a block that two sequences share has two references.

A full block may be remembered under its content hash (`Sequence.hashes`), one block per hash. When nobody
holds it any more, it stays as it is, idle, until it is taken again by its hash, or until a block is needed
and none is free: then the idle block that was given up first loses its content. Of a table the last blocks
count as given up first, since nobody can use them without those before.

States of a block
=================

      +------+ allocate +--------+  fork, take_prefix  +------------+ --+ fork, free,
      | FREE | -------> | OWNED  | ------------------> |   SHARED   |   | take_prefix
      |  0   | <------- |   1    | <------------------ |    >= 2    | <-+
      +------+   free   +--------+    free             +------------+
         ^                  |  ^                          (references of the block = the number in its box)
         |  evict, reset    |  | take_prefix
         |                  v  |
         |              +--------+
         +------------- |  IDLE  |   remembered, held by nobody
                        |   0    |
                        +--------+

    from     to       function                                  effect
    -------  -------  ----------------------------------------  ------------------------------------------
    FREE     OWNED    allocate, allocate_into, take_private     leaves the free stack; references 0 -> 1
    IDLE     OWNED    allocate, ... with none free: _evict      is forgotten; references 0 -> 1
    IDLE     OWNED    take_prefix                               leaves the idle list; references 0 -> 1
    OWNED    SHARED   fork, fork_table, take_prefix             references 1 -> 2
    SHARED   SHARED   fork, take_prefix, free, ...              references +- 1, two or more are left
    SHARED   OWNED    free, free_table, take_private            references 2 -> 1
    OWNED    FREE     free, free_table; not remembered          references 1 -> 0; on top of the free stack
    OWNED    IDLE     free, free_table; remembered              references 1 -> 0; last of the idle list
    IDLE     FREE     reset_prefix_cache                        is forgotten; on the free stack

    remember and reset_prefix_cache change what the index knows of a block that is held, not its state.

Invariants (`check` recomputes every one of them)
=================================================

    P1  A block with 0 references is either on the free stack or on the idle list, others are on neither.
    P2  No block is on either of them twice, and every entry is in [0, num_blocks).
    P3  No count is negative.
    P4  Given the tables of all holders: references[b] = how often b occurs in them, for every b.
    P5  Index and hashes of the blocks say the same. A block on the free stack has none, an idle one has one.
    P6  A block whose eviction is noted is noted once, and is known by no other content yet.

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
        self.uses.assign(num_blocks, 0)
        self.free_stack.resize(num_blocks)
        cdef Py_ssize_t i
        for i in range(num_blocks):
            self.free_stack[i] = <int32_t> (num_blocks - 1 - i)
        self._block_of = {}
        self._hash_of = [None] * num_blocks
        self.older.assign(num_blocks + 1, <int32_t> num_blocks)
        self.newer.assign(num_blocks + 1, <int32_t> num_blocks)

    @property
    def num_free(self):
        """Blocks that nothing holds, idle ones included."""
        return <Py_ssize_t> self.free_stack.size() + self.num_idle

    def hash_of(self, Py_ssize_t block):
        """What a block is remembered by: bytes, or None."""
        return self._hash_of[block]

    @property
    def num_cached(self):
        """Blocks that are remembered, held or idle."""
        return len(self._block_of)

    cpdef Py_ssize_t blocks_for(self, Py_ssize_t num_tokens) noexcept:
        """Blocks that num_tokens >= 0 tokens take: the quotient by block_size, rounded up."""
        return (num_tokens + self.block_size - 1) // self.block_size

    cpdef bint can_allocate(self, Py_ssize_t count) noexcept:
        """Whether allocate(count) would succeed now."""
        return 0 <= count <= <Py_ssize_t> self.free_stack.size() + self.num_idle

    # ---- giving out and taking back ----------------------------------------------------------------------

    cdef int allocate_into(self, vector[int32_t]& table, Py_ssize_t count) except -1:
        """Append count blocks to table. Nothing changes when there are too few."""
        cdef Py_ssize_t _i
        cdef int32_t block
        if count < 0:
            raise RequestError("count", count, "an integer >= 0")
        if not self.can_allocate(count):
            raise CapacityError(
                "KV cache", asked=count, had=self.num_free, would_fit=self.num_free, unit="blocks",
            )
        table.reserve(table.size() + count)
        for _i in range(count):
            if self.free_stack.empty():
                block = self._evict()
            else:
                block = self.free_stack.back()
                self.free_stack.pop_back()
            self.references[block] = 1
            self.uses[block] += 1
            table.push_back(block)
        return 0

    cdef int free_table(self, vector[int32_t]& table) except -1:
        """Give up every entry of table and clear it. Nothing changes when an entry is not held."""
        cdef Py_ssize_t i, undo
        cdef Py_ssize_t size = <Py_ssize_t> table.size()
        cdef int32_t block
        for i in range(size):
            block = table[i]
            if block < 0 or block >= self.num_blocks or self.references[block] == 0:
                for undo in range(i):
                    self.references[table[undo]] += 1
                raise RequestError("blocks", block, "only ids of blocks that are held")
            self.references[block] -= 1
        for i in range(size):  # one that occurs twice is released once, where it comes last
            self.references[table[i]] += 1
        for i in range(size - 1, -1, -1):  # from the back, so that they are given out in this order again
            self._release(table[i])
        table.clear()
        return 0

    cdef int truncate_table(self, vector[int32_t]& table, Py_ssize_t count) except -1:
        """Give up the entries of table past the first `count`, which are held."""
        while <Py_ssize_t> table.size() > count:
            self._release(table.back())
            table.pop_back()
        return 0

    cdef int _release(self, int32_t block) except -1:
        """One reference less of a block that is held."""
        self.references[block] -= 1
        if self.references[block] == 0:
            if self._hash_of[block] is None:
                self.free_stack.push_back(block)
            else:
                self._append_idle(block)
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

    cdef int32_t take_private(self, int32_t shared) except -1:
        """A block in the place of a shared one, of which there is one reference less: copy on write.

        The caller has made sure that one can be allocated, and copies the bytes.
        """
        cdef vector[int32_t] table
        self.allocate_into(table, 1)
        self._release(shared)
        return table[0]

    cdef int give_back_private(self, int32_t private, int32_t shared) except -1:
        """Undo take_private: the other holders still have the shared block."""
        self.references[shared] += 1
        self._release(private)
        return 0

    # ---- the prefix index --------------------------------------------------------------------------------

    cdef Py_ssize_t find_prefix(self, list hashes, Py_ssize_t most, Py_ssize_t* idle):
        """How many of the first `most` hashes are known, from the first on; sets idle to how many of those
        blocks nobody holds."""
        cdef Py_ssize_t count = 0
        idle[0] = 0
        for content in hashes[:most]:
            block = self._block_of.get(content)
            if block is None:
                break
            idle[0] += self.references[<Py_ssize_t> block] == 0
            count += 1
        return count

    cdef int take_prefix(self, list hashes, Py_ssize_t count, vector[int32_t]& table) except -1:
        """Append the blocks of the first `count` hashes, which are known, each with one more reference."""
        cdef Py_ssize_t i
        cdef int32_t block
        for i in range(count):
            block = self._block_of[hashes[i]]
            if self.references[block] == 0:
                self._remove_idle(block)
            self.references[block] += 1
            table.push_back(block)
        return 0

    cdef bint remember(self, int32_t block, bytes content) except -1:
        """Remember a held block under its content's hash. Returns whether it is: not if another one is."""
        if content in self._block_of or self._hash_of[block] is not None:
            return False
        self._block_of[content] = block
        self._hash_of[block] = content
        return True

    cpdef int reset_prefix_cache(self) except -1:
        """Forget the content of all blocks. Those that are held stay held, and are shared as they were."""
        cdef int32_t block
        for block in self._block_of.values():
            self._hash_of[block] = None
        self._block_of.clear()
        while self.num_idle:
            block = self.newer[self.num_blocks]
            self._remove_idle(block)
            self.free_stack.push_back(block)
        if self.evicted is not None:
            self.evicted.clear()
        if self.events is not None:
            self.events.append(None)
        return 0

    cdef int32_t _evict(self) except -1:
        """The idle block that was given up first, forgotten and off the list."""
        cdef int32_t block = self.newer[self.num_blocks]
        self._remove_idle(block)
        content = self._hash_of[block]
        self._hash_of[block] = None
        del self._block_of[content]
        if self.evicted is not None:
            self.evicted.append((block, content))
        if self.events is not None:
            self.events.append(content)
        return block

    cdef void _append_idle(self, int32_t block) noexcept:
        cdef int32_t end = <int32_t> self.num_blocks
        cdef int32_t last = self.older[end]
        self.older[block] = last
        self.newer[block] = end
        self.newer[last] = block
        self.older[end] = block
        self.num_idle += 1

    cdef void _remove_idle(self, int32_t block) noexcept:
        self.newer[self.older[block]] = self.newer[block]
        self.older[self.newer[block]] = self.older[block]
        self.num_idle -= 1

    # ---- for Python --------------------------------------------------------------------------------------

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

    def remember_blocks(self, blocks, hashes):
        """Remember held, full blocks under the hashes of their contents; a hash that is known stays as it is.

        Args:
            blocks: ids, each held.
            hashes: bytes, one for each block.

        Raises:
            RequestError: a block is not held, or there are more or fewer hashes; nothing changed.
        """
        cdef vector[int32_t] table = blocks
        contents = [bytes(content) for content in hashes]
        if len(contents) != <Py_ssize_t> table.size():
            raise RequestError("hashes", f"{len(contents)} hashes", f"one for each of {table.size()} blocks")
        for block in table:
            if block < 0 or block >= self.num_blocks or self.references[block] == 0:
                raise RequestError("blocks", block, "only ids of blocks that are held")
        for block, content in zip(table, contents):
            self.remember(block, content)

    def find_blocks(self, hashes):
        """The blocks of the longest run of known hashes from the first on, list[int]; takes no references."""
        found = []
        for content in hashes:
            block = self._block_of.get(content)
            if block is None:
                break
            found.append(block)
        return found

    def take_blocks(self, hashes):
        """`find_blocks`, each with one more reference, which the caller gives up with `free`."""
        cdef vector[int32_t] table
        cdef list known = list(hashes)
        self.take_prefix(known, len(self.find_blocks(known)), table)
        return table

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
        cdef Py_ssize_t steps = 0
        cdef vector[char] place  # 1: on the free stack, 2: on the idle list
        place.assign(self.num_blocks, 0)
        for i in range(<Py_ssize_t> self.free_stack.size()):
            block = self.free_stack[i]
            if block < 0 or block >= self.num_blocks or place[block]:
                raise AssertionError(f"P2: entry {i} of the free stack is {block}, no block or there twice")
            place[block] = 1
        block = self.newer[self.num_blocks]
        while block != self.num_blocks:
            if block < 0 or block > self.num_blocks or place[block] or steps == self.num_idle:
                raise AssertionError(f"P2: the idle list has {block}, no block or there twice")
            if self.older[self.newer[block]] != block:
                raise AssertionError(f"P2: the idle list is broken behind {block}")
            place[block] = 2
            steps += 1
            block = self.newer[block]
        if steps != self.num_idle:
            raise AssertionError(f"P2: {steps} blocks on the idle list, {self.num_idle} counted")
        for i in range(self.num_blocks):
            if self.references[i] < 0:
                raise AssertionError(f"P3: block {i} has {self.references[i]} references")
            if (self.references[i] == 0) != (place[i] != 0):
                raise AssertionError(
                    f"P1: block {i} has {self.references[i]} references, is available: {place[i] != 0}"
                )
            content = self._hash_of[i]
            if (place[i] == 1 and content is not None) or (place[i] == 2 and content is None):
                raise AssertionError(f"P5: block {i} is {'idle' if place[i] == 2 else 'free'}: {content!r}")
            if content is not None and self._block_of.get(content) != i:
                raise AssertionError(f"P5: block {i} is not found by its hash")
        if len(self._block_of) != sum(content is not None for content in self._hash_of):
            raise AssertionError("P5: the index has hashes that no block has")
        noted = [gone for gone, _ in self.evicted or ()]
        if len(set(noted)) < len(noted) or any(self._hash_of[gone] is not None for gone in noted):
            raise AssertionError(f"P6: evictions noted of {noted}, of some of them too late")
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
