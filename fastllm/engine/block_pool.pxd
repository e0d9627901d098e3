# distutils: language = c++
"""C-level interface of the block pool: what another Cython module may `cimport`."""

from libc.stdint cimport int32_t, int64_t
from libcpp.vector cimport vector


cdef class BlockPool:
    cdef readonly Py_ssize_t num_blocks
    cdef readonly Py_ssize_t block_size  # tokens per block
    cdef vector[int32_t] references  # (num_blocks,) holders of each block
    cdef vector[int64_t] uses  # (num_blocks,) how often each was given out: the same number, the same content
    cdef vector[int32_t] free_stack  # ids of the free blocks; the next one to be given out is at the back

    # The prefix index.
    cdef dict _block_of  # content hash -> block
    cdef list _hash_of  # block -> its content hash, or None
    cdef vector[int32_t] older, newer  # neighbours among the cached blocks; num_blocks = the list's own end
    cdef Py_ssize_t num_idle  # cached blocks
    # Gets what happens to the index, in order: the hash of a block that is forgotten; None when all are; from
    # the scheduler (hash, hash of the block before, token ids) of one that is remembered. None: nobody
    # listens.
    cdef public list events
    # Gets (block, content hash) of what is evicted. The block's bytes are what they were until somebody
    # writes to it, before which whoever keeps them elsewhere empties the list. None: nobody does.
    cdef public list evicted

    cpdef Py_ssize_t blocks_for(self, Py_ssize_t num_tokens) noexcept
    cpdef bint can_allocate(self, Py_ssize_t count) noexcept
    # The table forms, for callers that hold their block table as a vector.
    cdef int allocate_into(self, vector[int32_t]& table, Py_ssize_t count) except -1
    cdef int free_table(self, vector[int32_t]& table) except -1
    cdef int fork_table(self, const vector[int32_t]& source, vector[int32_t]& target) except -1
    cdef int truncate_table(self, vector[int32_t]& table, Py_ssize_t count) except -1
    cdef int32_t take_private(self, int32_t shared) except -1
    cdef int give_back_private(self, int32_t private, int32_t shared) except -1

    cdef Py_ssize_t find_prefix(self, list hashes, Py_ssize_t most, Py_ssize_t* idle)
    cdef int take_prefix(self, list hashes, Py_ssize_t count, vector[int32_t]& table) except -1
    cdef bint remember(self, int32_t block, bytes content) except -1
    cpdef int reset_prefix_cache(self) except -1

    cdef int _release(self, int32_t block) except -1
    cdef int32_t _evict(self) except -1
    cdef void _append_idle(self, int32_t block) noexcept
    cdef void _remove_idle(self, int32_t block) noexcept
    cdef inline void fill_slots(
        self, int32_t* slots, const vector[int32_t]& table, Py_ssize_t start, Py_ssize_t count
    ) noexcept nogil:
        """Write the cache slots of positions start .. start + count to slots (count,)."""
        cdef Py_ssize_t block = start // self.block_size
        cdef Py_ssize_t offset = start - block * self.block_size
        cdef Py_ssize_t i
        for i in range(count):
            slots[i] = <int32_t> (table[block] * self.block_size + offset)
            offset += 1
            if offset == self.block_size:
                offset = 0
                block += 1
