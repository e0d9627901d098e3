# distutils: language = c++
"""C-level interface of the drafter."""

from fastllm.engine.sequence cimport Sequence


cdef class NgramDrafter:
    cdef readonly Py_ssize_t max_tokens
    cdef readonly Py_ssize_t min_match

    cdef int propose(self, Sequence sequence, Py_ssize_t most, double price) except -1
    cdef Py_ssize_t _find(self, Sequence sequence, Py_ssize_t* length) noexcept
    cdef int learn(self, Sequence sequence, Py_ssize_t drafted, Py_ssize_t accepted) noexcept
