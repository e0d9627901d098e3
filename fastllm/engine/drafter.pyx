# cython: auto_pickle=False, autotestdict=False, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""Drafts from the text itself: what followed the last time that the newest tokens stood there.

A draft is a guess at the tokens that come next. They are computed together with the newest token, in one
step, and each is kept exactly if it is the token that is sampled there anyway; so a draft changes what a step
costs and how many tokens it yields, and no token.

How far a draft is worth its price is decided for every sequence at every step. From how often guesses were
right of late, by the length of the match that they came from, follows the chance that a guess and all before
it are right; a guess is made while that chance is above its price, which is the time that one more token adds
to the step, in steps that yield one token. Guesses are made in mind even where they are not worth computing,
and held against the token that came: so a sequence that begins to repeat itself is noticed at no cost.

Prompt lookup: Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from libc.stdint cimport int32_t

from fastllm.errors import RequestError

from fastllm.engine.sequence cimport Sequence

cdef Py_ssize_t LONGEST_MATCH = 8  # longer ones are not told apart
cdef float LEARNING_RATE = 0.2


cdef class NgramDrafter:
    """Proposes tokens that followed earlier.

    Args:
        max_tokens: most tokens of a draft, 1..64.
        min_match: tokens that must have stood there before, 1..8.

    Raises:
        RequestError: one of them is out of range.
    """

    def __init__(self, Py_ssize_t max_tokens=10, Py_ssize_t min_match=2):
        if not 1 <= max_tokens <= 64:
            raise RequestError("num_speculative_tokens", max_tokens, "an integer in 1..64")
        if not 1 <= min_match <= LONGEST_MATCH:
            raise RequestError("prompt_lookup_min", min_match, f"an integer in 1..{LONGEST_MATCH}")
        self.max_tokens = max_tokens
        self.min_match = min_match

    cdef int propose(self, Sequence sequence, Py_ssize_t most, double price) except -1:
        """Set the draft of a sequence: at most `most` tokens, none that is not worth `price`."""
        cdef Py_ssize_t length = 0
        cdef Py_ssize_t start, i
        cdef Py_ssize_t size = <Py_ssize_t> sequence.tokens.size()
        cdef double chance = 1.0
        cdef int32_t token
        sequence.draft.clear()
        sequence.guess = -1
        start = self._find(sequence, &length)
        if start < 0:
            return 0
        sequence.guess = sequence.tokens[start]
        sequence.match_kind = 0 if length <= 2 else 1 if length <= 4 else 2
        for i in range(min(most, self.max_tokens)):
            chance *= sequence.acceptance[sequence.match_kind]
            if chance < price:
                break
            # A match near the end goes on in the draft itself: it repeats.
            token = sequence.tokens[start + i] if start + i < size else sequence.draft[start + i - size]
            sequence.draft.push_back(token)
        return 0

    cdef Py_ssize_t _find(self, Sequence sequence, Py_ssize_t* length) noexcept:
        """Where the text goes on after the longest match of its end, of equals the newest; -1: nowhere."""
        cdef const int32_t* tokens = sequence.tokens.data()
        cdef Py_ssize_t size = <Py_ssize_t> sequence.tokens.size()
        cdef Py_ssize_t best = self.min_match - 1
        cdef Py_ssize_t found = -1
        cdef Py_ssize_t end, matched
        cdef int32_t last = tokens[size - 1]
        for end in range(size - 2, best - 1, -1):
            if tokens[end] != last:
                continue
            matched = 1
            while matched < min(LONGEST_MATCH, end + 1):
                if tokens[end - matched] != tokens[size - 1 - matched]:
                    break
                matched += 1
            if matched > best:
                best = matched
                found = end + 1
                if matched == LONGEST_MATCH:
                    break
        length[0] = best
        return found

    cdef int learn(self, Sequence sequence, Py_ssize_t drafted, Py_ssize_t accepted) noexcept:
        """Of `drafted` guesses, made in earnest or in mind, the first `accepted` were right."""
        cdef float* chance = &sequence.acceptance[sequence.match_kind]
        cdef Py_ssize_t _i
        if sequence.guess < 0:
            return 0
        for _i in range(accepted):
            chance[0] += LEARNING_RATE * (1 - chance[0])
        if accepted < drafted:
            chance[0] -= LEARNING_RATE * chance[0]
        return 0
