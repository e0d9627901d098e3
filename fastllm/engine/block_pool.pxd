# distutils: language = c++
"""C-level interface of the block pool: what another Cython module may `cimport`."""

from libc.stdint cimport int32_t
from libcpp.vector cimport vector


cdef class BlockPool:
    cdef readonly Py_ssize_t num_blocks
    cdef readonly Py_ssize_t block_size  # tokens per block
    cdef vector[int32_t] references  # (num_blocks,) holders of each block; 0 = free
    cdef vector[int32_t] free_stack  # ids of the free blocks; the next one to be given out is at the back

    cpdef Py_ssize_t blocks_for(self, Py_ssize_t num_tokens) noexcept
    cpdef bint can_allocate(self, Py_ssize_t count) noexcept
    # The table forms, for callers that hold their block table as a vector. Neither calls into Python.
    cdef int allocate_into(self, vector[int32_t]& table, Py_ssize_t count) except -1
    cdef int free_table(self, vector[int32_t]& table) except -1
    cdef int fork_table(self, const vector[int32_t]& source, vector[int32_t]& target) except -1
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
