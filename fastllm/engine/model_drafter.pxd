# distutils: language = c++
"""C-level interface of the drafter that asks a second model."""

from libc.stdint cimport int64_t
from libcpp.vector cimport vector

from fastllm.engine.drafter cimport Drafter
from fastllm.engine.sequence cimport Sequence
from fastllm.engine.step_batch cimport StepBatch
from fastllm.engine.step_cost cimport StepCost


cdef class ModelDrafter(Drafter):
    cdef readonly object executor
    cdef public object clock  # () -> seconds
    cdef readonly StepCost cost  # of the draft model's steps
    cdef readonly Py_ssize_t max_model_len
    cdef readonly double hit_rate  # how often guesses were right of late, those of all sequences
    cdef readonly Py_ssize_t num_judged  # guesses, so far

    cdef StepBatch batch
    cdef list members  # (R,) whose the rows of the batch are
    cdef Py_ssize_t max_num_batched_tokens, vocab_size
    cdef vector[int64_t] filled  # (num_blocks,) the use (`BlockPool.uses`) for which it is computed whole
    cdef vector[int64_t] written  # (num_blocks,) the batch that last wrote to a block
    cdef int64_t num_batches
    cdef Py_ssize_t num_short  # batches that were hardly more than guesses
    cdef Py_ssize_t num_verified  # steps with drafts
    cdef Py_ssize_t num_idle  # steps since the last of them
    cdef double verify  # price of a token more to verify, in the steps at hand
    cdef double unit  # seconds that they take for a token without drafts; 0 = not known

    cdef list _choose(self, list decodes, Py_ssize_t spare, Py_ssize_t reserve)
    cdef bint _is_likely(self, Sequence sequence, double lone) noexcept
    cdef bint _is_cheap_to_reach(self, Sequence sequence) noexcept
    cdef int _give_room(self, Sequence sequence, Py_ssize_t most, Py_ssize_t reserve) except -1
    cdef list _worth(self, list sequences)
    cdef double _verifying(self, Py_ssize_t count, double context) noexcept
    cdef double _share(self, Py_ssize_t count, double context, double unit) noexcept
    cdef int _catch_up(self, list chosen, double seconds) except -1
    cdef Py_ssize_t _skip_filled(self, Sequence sequence) noexcept
    cdef Py_ssize_t _claim(self, Sequence sequence, Py_ssize_t count) noexcept
    cdef int _run(self) except -1
    cdef int _note_filled(self, Sequence sequence, Py_ssize_t stop) noexcept
    cdef int _take(self, result) except -1
    cdef int _go_on(self) except -1
    cdef int _cut(self, Sequence sequence) except -1
    cdef int _withdraw(self, Sequence sequence) except -1
    cdef int _judge(self, Sequence sequence, int kind, bint right) noexcept
