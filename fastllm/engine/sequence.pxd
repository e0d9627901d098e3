# distutils: language = c++
"""C-level interface of one sequence."""

from libc.stdint cimport int32_t, uint64_t
from libcpp.vector cimport vector


cdef enum SequenceState:  # drawn in scheduler.pyx
    SEQUENCE_NEW = 0
    SEQUENCE_WAITING = 1
    SEQUENCE_RUNNING = 2
    SEQUENCE_PREEMPTED = 3
    SEQUENCE_FINISHED = 4
    SEQUENCE_ABORTED = 5
    SEQUENCE_FOLLOWING = 6

cdef enum FinishReason:
    FINISH_NONE = 0
    FINISH_STOP = 1
    FINISH_LENGTH = 2
    FINISH_ABORT = 3
    FINISH_ERROR = 4


cdef class Sequence:
    cdef readonly str request_id
    cdef readonly Py_ssize_t index  # which of the request's n
    cdef public object owner  # whatever the owner of the scheduler wants to find again

    cdef SequenceState state_code
    cdef FinishReason finish_code
    cdef readonly Py_ssize_t arrival  # place in the order of arrival; -1 before Scheduler.add
    cdef readonly Py_ssize_t priority  # lower is more important
    cdef readonly double deadline  # seconds; what is served first, then arrival; set by Scheduler.add
    cdef vector[int32_t] tokens  # prompt, then output
    cdef vector[int32_t] blocks  # block table: block i holds positions i * block_size ..
    cdef readonly Py_ssize_t num_prompt
    cdef readonly Py_ssize_t num_computed  # tokens whose K and V are in the cache
    cdef readonly Py_ssize_t num_scheduled  # tokens in the step in flight; 0 when there is none
    cdef readonly Py_ssize_t num_preemptions
    cdef readonly list followers  # sequences with the same prompt that wait until this one has computed it
    cdef readonly Sequence leader  # whom it follows, or None

    # What the prefix index knows it by.
    cdef bytes root  # hash of what is before the first token; None: its blocks are not shared
    cdef list hashes  # of its full blocks, each over all tokens up to the block's end; see extend_hashes
    cdef Py_ssize_t num_remembered  # of its blocks, which the scheduler has told the index about
    cdef readonly Py_ssize_t num_cached  # prompt tokens found in the index when it was first admitted

    # When it ends.
    cdef readonly Py_ssize_t max_tokens  # -1 = up to the model length
    cdef readonly Py_ssize_t min_tokens
    cdef readonly Py_ssize_t length_limit  # tokens, prompt included; set by Scheduler.add
    cdef vector[int32_t] eos_ids  # ascending; empty with ignore_eos
    cdef vector[int32_t] stop_ids  # ascending
    cdef vector[int32_t] banned_ids  # ascending; the union of the two, banned before min_tokens
    cdef readonly object stop_reason  # the stop token id or string that ended it, or None

    # How it samples.
    cdef float temperature  # 0 = greedy
    cdef float top_p
    cdef float min_p
    cdef float presence
    cdef float frequency
    cdef float repetition
    cdef int32_t top_k  # 0 = all
    cdef bint penalized  # any of the three penalties is on
    cdef readonly uint64_t seed
    cdef readonly int32_t adapter  # index in the executor; -1 = none
    cdef int32_t num_logprobs  # -1 = none
    cdef int32_t num_prompt_logprobs  # -1 = none
    cdef readonly Py_ssize_t prompt_logprobs_done  # positions whose successor's logprob was reported
    cdef vector[int32_t] bias_ids
    cdef vector[float] bias_values

    # What the last update brought; valid until the next schedule.
    cdef readonly Py_ssize_t first_row  # of the rows of the step's result
    cdef readonly Py_ssize_t num_prompt_rows  # logprobs of prompt tokens, the first of its rows
    cdef readonly Py_ssize_t num_new  # new tokens, one row each, after those

    cdef int extend_hashes(self, Py_ssize_t count, Py_ssize_t block_size) except -1
    cdef inline bint may_stop(self) noexcept:
        """Whether the next token may be one that ends the sequence."""
        return <Py_ssize_t> self.tokens.size() - self.num_prompt >= self.min_tokens
