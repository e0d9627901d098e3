# distutils: language = c++
"""C-level interface of the drafters."""

from libcpp.vector cimport vector

from fastllm.engine.block_pool cimport BlockPool
from fastllm.engine.sequence cimport Sequence
from fastllm.engine.step_cost cimport StepCost


cdef class Drafter:
    cdef readonly Py_ssize_t max_tokens
    cdef readonly double seconds  # that the last schedule spent on a model of its own
    cdef BlockPool pool
    cdef StepCost verification  # of the steps in which drafts are computed

    cdef int attach(
        self, BlockPool pool, StepCost verification, Py_ssize_t max_num_seqs,
        Py_ssize_t max_num_batched_tokens, Py_ssize_t vocab_size,
    ) except -1
    cdef int propose(self, list decodes, Py_ssize_t spare, Py_ssize_t reserve, double seconds) except -1
    cdef int learn(self, Sequence sequence, Py_ssize_t drafted, Py_ssize_t accepted) noexcept
    cdef double price(self, Py_ssize_t decodes, double context) noexcept
    cdef int judge(
        self, Py_ssize_t decodes, Py_ssize_t drafted, Py_ssize_t made, double context, double seconds
    ) except -1


cdef class NgramDrafter(Drafter):
    cdef readonly Py_ssize_t min_match
    cdef vector[double] plain  # seconds of steps without drafts, by their decodes; 0 = not known
    cdef readonly double gain  # of steps with drafts, of late
    cdef readonly Py_ssize_t pause  # steps without drafts that are still to come
    cdef Py_ssize_t rest  # the next pause

    cdef bint rests(self) noexcept
    cdef int _guess(self, Sequence sequence, Py_ssize_t most, double price) except -1
    cdef Py_ssize_t _find(self, Sequence sequence, Py_ssize_t* length) noexcept
