# distutils: language = c++
"""C-level interface of the step batch."""

from libc.stdint cimport int32_t
from libcpp.vector cimport vector

from fastllm.engine.block_pool cimport BlockPool
from fastllm.engine.sequence cimport Sequence


cdef class Column:
    cdef object storage  # one-dimensional array, as long as the capacity
    cdef object view  # its first `shown` entries
    cdef Py_ssize_t capacity
    cdef Py_ssize_t shown
    cdef void* data

    cdef int _hold(self, storage) except -1
    cdef int reserve(self, Py_ssize_t count) except -1
    cdef object publish(self, Py_ssize_t count)


cdef struct Share:  # of a sequence in a step
    Py_ssize_t num_tokens
    Py_ssize_t first_row
    Py_ssize_t num_prompt_rows
    Py_ssize_t num_new


cdef class StepBatch:
    # The contract (fastllm/executor/base.py): NumPy arrays, set by seal().
    cdef readonly object token_ids, positions, slot_mapping, query_start, seq_lens, block_tables
    cdef readonly object copy_blocks, adapter
    cdef readonly object row_seq, row_token, row_kind, row_target, num_logprobs
    cdef readonly object temperature, top_k, top_p, min_p, presence, frequency, repetition, seed, sample_index
    cdef readonly object bias_start, bias_ids, bias_values, banned_start, banned_ids
    cdef readonly object mask_row, mask_words
    cdef readonly object history_start, history, history_prompt_len

    # What the engine wants to know besides.
    cdef readonly Py_ssize_t num_tokens  # T
    cdef readonly Py_ssize_t num_seqs  # S
    cdef readonly Py_ssize_t num_rows  # R
    cdef readonly Py_ssize_t num_hidden  # P
    cdef readonly Py_ssize_t num_prefill_tokens  # tokens of chunks, the rest are decodes
    cdef readonly Py_ssize_t num_draft_tokens  # of the decodes
    cdef readonly double context  # positions that attention reads, summed over the tokens
    cdef list sequences  # (S,)
    cdef vector[Share] shares  # (S,) of those that `append` added
    cdef list copies  # (sequence, index in its block table) of each block that is a copy

    # The buffers behind the arrays.
    cdef Column _token_ids, _positions, _slot_mapping, _query_start, _seq_lens, _block_tables, _adapter
    cdef Column _copy_blocks
    cdef Column _row_seq, _row_token, _row_kind, _row_target, _num_logprobs
    cdef Column _temperature, _top_k, _top_p, _min_p, _presence, _frequency, _repetition, _seed, _sample_index
    cdef Column _bias_start, _bias_ids, _bias_values, _banned_start, _banned_ids
    cdef Column _mask_row, _mask_words
    cdef Column _history_start, _history, _history_prompt_len
    cdef Py_ssize_t num_bias, num_banned, num_masks, num_history, table_width, shown_seqs
    cdef Py_ssize_t mask_width  # words of a row of mask_words
    # block_tables, copy_blocks and mask_words before they got their shape
    cdef object flat_tables, flat_copies, flat_masks

    cdef int begin(self) except -1
    cdef int append(self, Sequence sequence, Py_ssize_t count, BlockPool pool) except -1
    cdef int recall(self, Py_ssize_t place) except -1
    cdef int append_guess(
        self, Sequence sequence, Py_ssize_t start, Py_ssize_t count, BlockPool pool
    ) except -1
    cdef int append_copy(self, Sequence sequence, Py_ssize_t index, int32_t source) except -1
    cdef int undo_copies(self, BlockPool pool) except -1
    cdef int seal(self) except -1
    cdef int _append_tokens(
        self, Sequence sequence, Py_ssize_t start, Py_ssize_t count, BlockPool pool, int32_t adapter
    ) except -1
    cdef int _close_sequence(self, Sequence sequence, Py_ssize_t start, Py_ssize_t count) except -1
    cdef int _reserve_rows(self, Py_ssize_t count) except -1
    cdef int _append_pool_rows(
        self, Sequence sequence, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t first
    ) except -1
    cdef int _append_row(self, Sequence sequence, Py_ssize_t token, int kind, Py_ssize_t drafted) except -1
    cdef int _append_mask(self, Sequence sequence, Py_ssize_t row) except -1
    cdef int _append_bad_words(self, Sequence sequence) except -1
    cdef int _append_lists(self, Sequence sequence, Py_ssize_t row, Py_ssize_t drafted) except -1
    cdef int _fill_block_tables(self) except -1
    cdef int _publish(self) except -1
