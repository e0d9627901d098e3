# distutils: language = c++
"""C-level interface of the scheduler: what a serving framework written in Cython may `cimport`."""

from fastllm.engine.block_pool cimport BlockPool
from fastllm.engine.sequence cimport FinishReason, Sequence, SequenceState
from fastllm.engine.step_batch cimport StepBatch


cdef class Scheduler:
    cdef readonly BlockPool pool
    cdef readonly Py_ssize_t max_num_seqs
    cdef readonly Py_ssize_t max_num_batched_tokens
    cdef readonly Py_ssize_t max_model_len
    cdef readonly Py_ssize_t vocab_size
    cdef readonly StepBatch in_flight  # the batch between schedule and update, else None
    cdef readonly list admitted  # sequences that the last schedule took into the running ones
    cdef readonly list preempted  # sequences that the last schedule preempted

    cdef list _running  # ascending arrival
    cdef object _waiting  # deque, ascending arrival
    cdef list _draining  # aborted while in flight; their blocks are given up by update or rollback
    cdef tuple _batches  # two, used in turn
    cdef Py_ssize_t _turn
    cdef Py_ssize_t _arrivals

    cpdef int add(self, Sequence sequence) except -1
    cpdef StepBatch schedule(self)
    cpdef list update(self, result)
    cpdef int rollback(self) except -1
    cpdef int finish(self, Sequence sequence, stop_reason=*) except -1
    cpdef int abort(self, Sequence sequence) except -1

    cdef Py_ssize_t _schedule_running(self, StepBatch batch, Py_ssize_t budget) except -1
    cdef Py_ssize_t _admit_waiting(self, StepBatch batch, Py_ssize_t budget) except -1
    cdef int _preempt(self, Sequence sequence) except -1
    cdef int _end_step(self) except -1
    cdef FinishReason _finish_of(self, Sequence sequence)
    cdef int _retire(self, Sequence sequence, SequenceState state, FinishReason reason) except -1
