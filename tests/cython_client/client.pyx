# distutils: language = c++
"""A client of fastllm's C-level interface: what a serving framework written in Cython would do.

It drives the scheduler through `cpdef` calls, without Python's attribute lookup, reads fields that Python
does not see, and keeps a block table of its own as a C++ vector.
"""

from libc.stdint cimport int32_t
from libcpp.vector cimport vector

from fastllm.engine.block_pool cimport BlockPool
from fastllm.engine.scheduler cimport Scheduler
from fastllm.engine.sequence cimport SEQUENCE_RUNNING, Sequence
from fastllm.engine.step_batch cimport StepBatch


cdef class Reservation:
    """Blocks held outside the scheduler, for as long as this object lives."""

    cdef BlockPool pool
    cdef vector[int32_t] table

    def __init__(self, BlockPool pool not None, Py_ssize_t num_tokens):
        self.pool = pool
        pool.allocate_into(self.table, pool.blocks_for(num_tokens))

    def __dealloc__(self):
        if self.pool is not None:
            self.pool.free_table(self.table)

    def slots(self, Py_ssize_t count):
        """The cache slots of the first `count` tokens."""
        cdef vector[int32_t] filled
        filled.resize(count)
        with nogil:
            self.pool.fill_slots(filled.data(), self.table, 0, count)
        return list(filled)


def run_step(Scheduler scheduler not None, Sequence sequence not None):
    """Schedules a step. Returns its tokens, whether `sequence` runs, and its tokens and blocks."""
    cdef StepBatch batch = scheduler.schedule()
    if batch is None:
        return None
    running = sequence.state_code == SEQUENCE_RUNNING
    return batch.num_tokens, running, sequence.tokens.size(), sequence.blocks.size()
