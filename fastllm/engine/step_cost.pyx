# cython: auto_pickle=False, autotestdict=False, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""What a step takes, learnt from the steps there were.

    seconds = w0 + w1 * tokens + w2 * rows + w3 * context

tokens: all of the step; rows: those that yield a token, each with a product of the model's head; context: the
positions that attention reads, summed over the tokens. The weights minimize the squared relative error over
the steps so far, which count for less the older they are, plus a penalty for leaving a first guess: weights
about which the steps say nothing stay there (ridge regression). So they fit the kind of steps at hand and
follow a machine whose pace changes. Nothing that is predicted here changes a token.
"""

from libc.math cimport fabs

cdef double FORGETTING = 0.99  # weight of a step, to that of the step after it
cdef double TRUST = 0.0005  # in the first guess: so many steps that say the same
cdef double DEVIATION_RATE = 0.05
cdef double GUESS = 0.25  # cost of a token, to that of a step with nothing in it
cdef double CONTEXT = 1e-3  # of a token's cost: reading one position
cdef double SHORTEST = 1e-6  # seconds of a step; less is the clock's resolution
cdef double SURPRISE = 3.0  # a step so many times longer than predicted tells of the machine, not of itself


cdef class StepCost:
    """Predicts steps.

    Attributes:
        num_steps: how many were observed.
        deviation: mean absolute difference from what was predicted, in seconds, of late.
    """

    cpdef int observe(self, double tokens, double rows, double context, double seconds) except -1:
        """A step was computed in so many seconds."""
        cdef double features[FEATURES]
        cdef double weight, expected
        cdef int i, j
        seconds = max(seconds, SHORTEST)
        if self.num_steps == 0:
            self.guess[0] = seconds / (1.0 + GUESS * (tokens + rows + CONTEXT * context))
            self.guess[1] = self.guess[2] = GUESS * self.guess[0]
            self.guess[3] = CONTEXT * self.guess[1]
            for i in range(FEATURES):
                self.weights[i] = self.guess[i]
        expected = self.predict(tokens, rows, context)
        if self.num_steps > 8 and expected > 0.0:
            seconds = min(seconds, SURPRISE * expected)
        self.num_steps += 1
        self.deviation += DEVIATION_RATE * (fabs(seconds - expected) - self.deviation)
        features[0] = 1.0
        features[1] = tokens
        features[2] = rows
        features[3] = context
        weight = 1.0 / (seconds * seconds)  # the error is a relative one
        for i in range(FEATURES):
            for j in range(FEATURES):
                self.moments[i][j] = FORGETTING * self.moments[i][j] + weight * features[i] * features[j]
            self.products[i] = FORGETTING * self.products[i] + weight * features[i] * seconds
        return self._solve()

    cdef int _solve(self) except -1:
        """The weights, by elimination. The guess makes the matrix positive definite. Nothing costs less than
        nothing: a feature whose weight would be negative is left out, and the others anew."""
        cdef double matrix[FEATURES][FEATURES + 1]
        cdef double factor
        cdef bint left_out[FEATURES]
        cdef bint again = True
        cdef int i, j, k
        for i in range(FEATURES):
            left_out[i] = False
        while again:
            again = False
            for i in range(FEATURES):
                for j in range(FEATURES):
                    matrix[i][j] = 0.0 if left_out[i] or left_out[j] else self.moments[i][j]
                matrix[i][i] += TRUST / (self.guess[i] * self.guess[i])
                matrix[i][FEATURES] = 0.0 if left_out[i] else self.products[i] + TRUST / self.guess[i]
            for i in range(FEATURES):
                for k in range(i + 1, FEATURES):
                    factor = matrix[k][i] / matrix[i][i]
                    for j in range(i, FEATURES + 1):
                        matrix[k][j] -= factor * matrix[i][j]
            for i in range(FEATURES - 1, -1, -1):
                factor = matrix[i][FEATURES]
                for j in range(i + 1, FEATURES):
                    factor -= matrix[i][j] * self.weights[j]
                self.weights[i] = factor / matrix[i][i]
            for i in range(FEATURES):
                if self.weights[i] < 0.0:
                    left_out[i] = again = True
        return 0

    cpdef double predict(self, double tokens, double rows, double context) noexcept:
        """Seconds of a step; 0 before the first was observed."""
        cdef double seconds = self.weights[0] + self.weights[1] * tokens
        return seconds + self.weights[2] * rows + self.weights[3] * context

    cpdef double per_token(self, double context) noexcept:
        """Seconds that one more token of a prompt takes, which attends to `context` positions."""
        return self.weights[1] + self.weights[3] * context

    cpdef double per_sampled_token(self, double context) noexcept:
        """Seconds that one more token takes that a token is sampled from."""
        return self.weights[1] + self.weights[2] + self.weights[3] * context
