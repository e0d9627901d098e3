# distutils: language = c++
"""C-level interface of the scheduler: what a serving framework written in Cython may `cimport`."""

from libc.stdint cimport int32_t
from libcpp.vector cimport vector

from fastllm.engine.block_pool cimport BlockPool
from fastllm.engine.drafter cimport Drafter
from fastllm.engine.sequence cimport FinishReason, Sequence, SequenceState
from fastllm.engine.step_batch cimport StepBatch
from fastllm.engine.step_cost cimport StepCost


cdef class Scheduler:
    cdef readonly BlockPool pool
    cdef readonly Py_ssize_t max_num_seqs
    cdef readonly Py_ssize_t max_num_batched_tokens
    cdef readonly Py_ssize_t max_model_len
    cdef readonly Py_ssize_t vocab_size
    cdef readonly StepBatch in_flight  # the batch between schedule and update or assume, else None
    cdef readonly StepBatch assumed  # the batch between assume and update, else None
    cdef readonly list admitted  # sequences that the last schedule took into the running ones
    cdef readonly list preempted  # sequences that the last schedule preempted

    cdef readonly double priority_interval  # seconds that make up for one level of priority
    cdef readonly Py_ssize_t num_prefix_queries, num_prefix_hits  # prompt tokens
    cdef readonly Py_ssize_t num_preemptions
    cdef public object offload  # where evicted blocks may be found again, an `Offload`; None: nowhere
    cdef readonly Py_ssize_t num_restored_tokens
    cdef readonly Drafter drafter
    cdef readonly double target_itl  # seconds; 0 = none
    cdef Py_ssize_t _steps_without_prompts
    cdef double _seconds  # that the step in flight took, once that is known
    cdef readonly StepCost cost
    cdef readonly Py_ssize_t num_drafts, num_draft_tokens, num_accepted_tokens
    cdef vector[Py_ssize_t] _accepted_at  # num_accepted_tokens by place in the draft

    cdef list _running  # by deadline
    cdef list _waiting  # by deadline
    cdef Py_ssize_t _num_following
    cdef list _draining  # ended while in flight; their blocks are given up when the step is over
    cdef tuple _batches  # two, used in turn
    cdef Py_ssize_t _turn
    cdef Py_ssize_t _arrivals

    cpdef int add(self, Sequence sequence, double now=*, list followers=*) except -1
    cpdef StepBatch schedule(self)
    cpdef bint assume(self) except -1
    cpdef list update(self, result)
    cpdef tuple intervals(self, list moved, double now)
    cpdef int observe(self, double seconds) except -1
    cpdef int rollback(self) except -1
    cpdef int finish(self, Sequence sequence, stop_reason=*) except -1
    cpdef int abort(self, Sequence sequence) except -1

    cdef int _lead(self, Sequence sequence, list followers) except -1
    cdef int _make_room(self) except -1
    cdef bint _yields(self, Py_ssize_t place, Sequence waiting)
    cdef Py_ssize_t _left_for(self, Sequence waiting, Py_ssize_t seats, Py_ssize_t blocks) except -2
    cdef bint _has_room(self, Py_ssize_t seats, Py_ssize_t blocks)
    cdef Py_ssize_t _blocks_to_admit(self, Sequence sequence, Py_ssize_t* hits) except -1
    cdef Py_ssize_t _schedule_decodes(self, StepBatch batch, Py_ssize_t budget, bint* room) except -1
    cdef bint _grow(self, StepBatch batch, Sequence sequence, Py_ssize_t count) except -1
    cdef Py_ssize_t _append(self, StepBatch batch, Sequence sequence, Py_ssize_t count) except -1
    cdef double _seconds_to_catch_up(self, list decodes)
    cdef double _seconds_for_prompts(self, StepBatch batch)
    cdef double _reach(self)
    cdef bint _keeps_target(self, Py_ssize_t newcomers, Py_ssize_t running)
    cdef int _schedule_prompts(
        self, StepBatch batch, Py_ssize_t budget, bint room, double seconds
    ) except -1
    cdef Py_ssize_t _shareable_blocks(self, Sequence sequence)
    cdef bint _admit(self, Sequence sequence) except -1
    cdef int _preempt(self, Sequence sequence) except -1
    cdef bint _foreseen(self)
    cdef list _resolve(self, const int32_t[::1] tokens)
    cdef int _withdraw(self) except -1
    cdef int _drop_ended(self) except -1
    cdef int _drop_retired(self) except -1
    cdef int _forget_pending(self, Sequence sequence) except -1
    cdef Py_ssize_t _made_of(self, StepBatch batch)
    cdef int _remember(self, Sequence sequence) except -1
    cdef list _release_followers(self, Sequence leader)
    cdef int _seat(self, Sequence follower) except -1
    cdef int _succeed(self, Sequence leader) except -1
    cdef int _end_step(self) except -1
    cdef FinishReason _take_tokens(self, Sequence sequence, const int32_t[::1] tokens)
    cdef FinishReason _take_hidden(self, Sequence sequence, const int32_t[::1] tokens)
    cdef bint _settle(self, Sequence sequence, FinishReason reason, list moved) except -1
    cdef FinishReason _finish_of(self, Sequence sequence)
    cdef int _leave(self, Sequence sequence, SequenceState state, FinishReason reason) except -1
    cdef int _retire(self, Sequence sequence, SequenceState state, FinishReason reason) except -1
