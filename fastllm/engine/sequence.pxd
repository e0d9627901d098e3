# distutils: language = c++
"""C-level interface of one sequence."""

from libc.stdint cimport int32_t, uint32_t, uint64_t
from libcpp.vector cimport vector


cdef enum SequenceState:  # drawn in scheduler.pyx
    SEQUENCE_NEW = 0
    SEQUENCE_WAITING = 1
    SEQUENCE_RUNNING = 2
    SEQUENCE_PREEMPTED = 3
    SEQUENCE_FINISHED = 4
    SEQUENCE_ABORTED = 5
    SEQUENCE_FOLLOWING = 6

cdef enum:
    MATCH_KINDS = 3

cdef enum FinishReason:
    FINISH_NONE = 0
    FINISH_STOP = 1
    FINISH_LENGTH = 2
    FINISH_ABORT = 3
    FINISH_ERROR = 4


cdef enum Pooling:  # what becomes of the hidden states of the prompt
    POOL_NONE = 0  # nothing: the sequence generates tokens
    POOL_LAST = 1  # that of the last token is wanted
    POOL_MEAN = 2  # those of all tokens are


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
    cdef readonly bint pending  # its newest token is that of row r of the step assumed, and stands as -1 - r
    cdef readonly Py_ssize_t num_preemptions
    cdef readonly list followers  # sequences with the same prompt that wait until this one has computed it
    cdef readonly Sequence leader  # whom it follows, or None

    # What the prefix index knows it by.
    cdef bytes root  # hash of what is before the first token; None: its blocks are not shared
    cdef list hashes  # of its full blocks, each over all tokens up to the block's end; see extend_hashes
    cdef Py_ssize_t num_remembered  # of its blocks, which the scheduler has told the index about
    cdef readonly Py_ssize_t num_cached  # prompt tokens found when it was first admitted, in memory or file

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
    cdef Pooling pooling
    cdef readonly Py_ssize_t prompt_rows_done  # positions reported: hidden states, or the successor's logprob
    cdef vector[int32_t] bias_ids
    cdef vector[float] bias_values

    # What it may sample next.
    cdef readonly bint held  # until set_mask: what may follow its newest token is not known yet
    cdef object mask  # keeps mask_words alive; None: anything
    cdef const uint32_t* mask_words  # (mask_width,) a bit for each token; NULL: anything
    cdef Py_ssize_t mask_width
    cdef vector[int32_t] bad_words  # token ids, one word after the other
    cdef vector[Py_ssize_t] bad_ends  # where each word ends
    # Speculation.
    cdef vector[int32_t] draft  # tokens computed in the step in flight besides those that are known
    cdef int32_t guess  # the first of what might come next, drafted or not; -1 = none
    cdef int match_kind  # what it comes from
    cdef float acceptance[MATCH_KINDS]  # how often such guesses were right of late, 0..1
    # Speculation with a draft model (model_drafter.pyx).
    cdef readonly Py_ssize_t num_drafted  # leading positions that the draft model's cache holds
    cdef vector[int] draft_kinds  # what the guesses of the draft, and those cut from it, come from
    cdef float hit_rate  # how often a guess was right of late, whatever it came from; < 0 before the first
    cdef Py_ssize_t draft_since  # tokens that it had when it was last left alone
    cdef Py_ssize_t draft_pause  # for so many; 0 = it never was
    cdef bint draft_tried  # since that was over
    cdef Py_ssize_t draft_hits  # guesses that were right since then
    cdef Py_ssize_t draft_room  # most tokens of the draft that is being made
    cdef double draft_chance  # that all of it is right

    cdef double last_token_time  # seconds, for whoever asks for intervals; NaN before the first token

    # What the last update brought; valid until the next schedule.
    cdef readonly Py_ssize_t first_row  # of the rows of the step's result
    cdef readonly Py_ssize_t num_prompt_rows  # logprobs or hidden states of the prompt, the first of its rows
    cdef readonly Py_ssize_t first_hidden  # of the lines of the result's hidden states, if it pools
    cdef readonly Py_ssize_t num_new  # new tokens, one row each, after those

    cdef inline bint reports_prompt(self) noexcept:
        """Whether something of every position of the prompt is reported, so that each has to be computed."""
        return self.num_prompt_logprobs >= 0 or self.pooling == POOL_MEAN
    cdef int _sample_with(self, params, eos_token_ids, bint report_prompt) except -1
    cdef int extend_hashes(self, Py_ssize_t count, Py_ssize_t block_size) except -1
    cpdef int set_mask(self, const uint32_t[::1] mask, bint ends=*) except -1
    cpdef int hold(self) except -1
    cdef inline Py_ssize_t due(self) noexcept:
        """Tokens that a step may compute. The newest one waits while what may follow it is not known."""
        return <Py_ssize_t> self.tokens.size() - self.num_computed - self.held
    cdef inline bint may_be_drafted(self) noexcept:
        """Whether the tokens after the next one may be guessed: what is allowed depends on none of them."""
        return self.pooling == POOL_NONE and self.mask_words == NULL and self.bad_ends.empty()
    cdef inline bint may_stop(self, Py_ssize_t drafted) noexcept:
        """Whether the token after so many drafted ones may be one that ends the sequence."""
        return <Py_ssize_t> self.tokens.size() + drafted - self.num_prompt >= self.min_tokens
