# distutils: language = c++
"""C-level interface of the step cost."""

cdef enum:
    FEATURES = 4


cdef class StepCost:
    cdef double weights[FEATURES]  # seconds per feature
    cdef double guess[FEATURES]  # of the weights, from the first step
    cdef double moments[FEATURES][FEATURES]  # sums over the steps: features by features
    cdef double products[FEATURES]  # features by seconds
    cdef readonly Py_ssize_t num_steps
    cdef readonly double deviation

    cpdef int observe(self, double tokens, double rows, double context, double seconds) except -1
    cpdef double predict(self, double tokens, double rows, double context) noexcept
    cpdef double per_token(self, double context) noexcept
    cpdef double per_sampled_token(self, double context) noexcept
    cdef int _solve(self) except -1
