# cython: auto_pickle=False, autotestdict=False, boundscheck=False, wraparound=False
# distutils: language = c++
"""The flat batch of one step, filled by the scheduler and read by an executor.

`fastllm.executor.base.StepBatch` says what each array means. This class owns the buffers: those that are
bounded by the scheduler's limits are made once, the others (rows, lists, block tables) grow by doubling. The
arrays are views of the buffers and are made anew only when their length changes, so that a steady run of
decodes makes no Python object per step.
"""

from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

import numpy as np

from fastllm.executor import base as _contract

from fastllm.engine.block_pool cimport BlockPool
from fastllm.engine.sequence cimport POOL_MEAN, POOL_NONE, Sequence

cdef int KIND_SAMPLE = _contract.ROW_SAMPLE
cdef int KIND_LOGPROB = _contract.ROW_LOGPROB
cdef int KIND_POOL = _contract.ROW_POOL


cdef class Column:
    """A growing one-dimensional buffer and the array that shows its first entries."""

    def __init__(self, dtype, Py_ssize_t capacity):
        self.storage = None
        self._hold(np.zeros(max(capacity, 1), dtype=dtype))

    cdef int _hold(self, storage) except -1:
        cdef unsigned char[::1] raw = storage.view(np.uint8)
        self.storage = storage
        self.capacity = len(storage)
        self.data = &raw[0]
        self.view = None
        self.shown = -1
        return 0

    cdef int reserve(self, Py_ssize_t count) except -1:
        """Make room for count entries; those there are kept."""
        if count <= self.capacity:
            return 0
        grown = np.zeros(max(count, 2 * self.capacity), dtype=self.storage.dtype)
        grown[: self.capacity] = self.storage
        self._hold(grown)
        return 0

    cdef object publish(self, Py_ssize_t count):
        """The array of the first count entries."""
        if count != self.shown:
            self.view = self.storage[:count]
            self.shown = count
        return self.view


cdef class StepBatch:
    """Buffers of one step's batch. Made and filled by a `Scheduler`.

    Args:
        max_tokens: most tokens in a step (T). Rows (R) may be more: one for each sequence of a request.
        max_seqs: most sequences in a step (S).
    """

    def __init__(self, Py_ssize_t max_tokens, Py_ssize_t max_seqs):
        max_seqs = min(max_seqs, max_tokens)

        def for_tokens(dtype=np.int32):
            return Column(dtype, max_tokens)

        def for_seqs():
            return Column(np.int32, max_seqs)

        self._token_ids = for_tokens()
        self._positions = for_tokens()
        self._slot_mapping = for_tokens()
        self._query_start = Column(np.int32, max_seqs + 1)
        self._seq_lens = for_seqs()
        self._adapter = for_seqs()
        self._block_tables = Column(np.int32, max_seqs)
        self._row_seq = for_tokens()
        self._row_token = for_tokens()
        self._row_kind = for_tokens()
        self._row_target = for_tokens()
        self._num_logprobs = for_tokens()
        self._temperature = for_tokens(np.float32)
        self._top_k = for_tokens()
        self._top_p = for_tokens(np.float32)
        self._min_p = for_tokens(np.float32)
        self._presence = for_tokens(np.float32)
        self._frequency = for_tokens(np.float32)
        self._repetition = for_tokens(np.float32)
        self._seed = for_tokens(np.uint64)
        self._sample_index = for_tokens()
        self._history_prompt_len = for_tokens()
        self._bias_start = Column(np.int32, max_tokens + 1)
        self._banned_start = Column(np.int32, max_tokens + 1)
        self._history_start = Column(np.int32, max_tokens + 1)
        self._bias_ids = Column(np.int32, 1)
        self._bias_values = Column(np.float32, 1)
        self._banned_ids = Column(np.int32, 1)
        self._mask_row = for_tokens()
        self._mask_words = Column(np.uint32, 1)
        self._history = Column(np.int32, 1)
        self._copy_blocks = Column(np.int32, 2)
        self.copies = []
        self.sequences = []

    cdef int begin(self) except -1:
        """Empty the batch. The first entries of query_start and the CSR starts stay 0 for good."""
        self.sequences.clear()
        self.shares.clear()
        self.copies.clear()
        self.num_tokens = self.num_seqs = self.num_rows = self.num_prefill_tokens = self.num_hidden = 0
        self.num_draft_tokens = 0
        self.context = 0.0
        self.num_bias = self.num_banned = self.num_masks = self.num_history = 0
        self.table_width = 1
        return 0

    cdef int append(self, Sequence sequence, Py_ssize_t count, BlockPool pool) except -1:
        """Add the next count tokens of a sequence, its draft's included, and the rows that they yield.

        Its block table covers them. A chunk that reaches the newest token yields a sample, one for each of
        its followers too, and one for each token of a draft behind it. Chunks of a prompt whose logprobs are
        wanted yield one row for each position whose successor is prompt too, unless an earlier step, before a
        preemption, has reported it. Instead of all this one that pools yields hidden states: of each position
        not reported yet, or of the last alone.
        """
        cdef Py_ssize_t start = sequence.num_computed
        cdef Py_ssize_t stop = start + count
        cdef Py_ssize_t drafted = <Py_ssize_t> sequence.draft.size()
        cdef Py_ssize_t known = count - drafted
        cdef Py_ssize_t first = self.num_tokens
        cdef Py_ssize_t i, position
        cdef Sequence follower
        self._append_tokens(sequence, start, count, pool, sequence.adapter)

        sequence.first_row = self.num_rows
        sequence.num_prompt_rows = 0
        sequence.num_new = 0
        if sequence.pooling != POOL_NONE:
            self._append_pool_rows(sequence, start, stop, first)
        elif sequence.num_prompt_logprobs >= 0:
            position = max(start, sequence.prompt_rows_done)
            while position < stop and position < sequence.num_prompt - 1:
                self._append_row(sequence, first + position - start, KIND_LOGPROB, 0)
                sequence.num_prompt_rows += 1
                position += 1
        if stop - drafted == <Py_ssize_t> sequence.tokens.size() and sequence.pooling == POOL_NONE:
            for i in range(drafted + 1):
                self._append_row(sequence, first + known - 1 + i, KIND_SAMPLE, i)
            sequence.num_new = drafted + 1
            for item in sequence.followers:
                follower = <Sequence> item
                follower.first_row = self.num_rows
                follower.num_prompt_rows = 0
                follower.num_new = 1
                self._append_row(follower, first + count - 1, KIND_SAMPLE, 0)

        if known > 1 or start < sequence.num_prompt:
            self.num_prefill_tokens += count
        self.num_draft_tokens += drafted
        self.shares.push_back(
            Share(count, sequence.first_row, sequence.num_prompt_rows, sequence.num_new)
        )
        self._close_sequence(sequence, start, count)
        return 0

    cdef int recall(self, Py_ssize_t place) except -1:
        """Tell the sequence at a place its rows in this step: a later one may have been made since."""
        cdef Sequence sequence = <Sequence> self.sequences[place]
        sequence.first_row = self.shares[place].first_row
        sequence.num_prompt_rows = self.shares[place].num_prompt_rows
        sequence.num_new = self.shares[place].num_new
        return 0

    cdef int append_guess(
        self, Sequence sequence, Py_ssize_t start, Py_ssize_t count, BlockPool pool
    ) except -1:
        """Add `count` positions of a sequence and its draft from `start` on, for a model that goes on with
        the draft; with the last of them comes a row for the next token and its logprob. What the sequence
        knows of its own rows stays as it is.

        The row samples as the one does that verifies the token: with the same parameters and the same key.
        """
        cdef Py_ssize_t drafted = <Py_ssize_t> sequence.draft.size()
        self._append_tokens(sequence, start, count, pool, -1)
        if start + count == <Py_ssize_t> sequence.tokens.size() + drafted:
            self._append_row(sequence, self.num_tokens + count - 1, KIND_SAMPLE, drafted)
            (<int32_t*> self._num_logprobs.data)[self.num_rows - 1] = 0
        self._close_sequence(sequence, start, count)
        return 0

    cdef int _append_tokens(
        self, Sequence sequence, Py_ssize_t start, Py_ssize_t count, BlockPool pool, int32_t adapter
    ) except -1:
        """The next sequence's tokens: positions start .. start + count of what it knows and its draft."""
        cdef Py_ssize_t size = <Py_ssize_t> sequence.tokens.size()
        cdef Py_ssize_t known = max(min(count, size - start), 0)
        cdef Py_ssize_t first = self.num_tokens
        cdef Py_ssize_t s = self.num_seqs
        cdef Py_ssize_t i
        cdef int32_t* positions = <int32_t*> self._positions.data + first
        cdef int32_t* token_ids = <int32_t*> self._token_ids.data + first
        if known:
            memcpy(token_ids, &sequence.tokens[start], known * sizeof(int32_t))
        if known < count:
            memcpy(
                token_ids + known, sequence.draft.data() + (start + known - size),
                (count - known) * sizeof(int32_t),
            )
        for i in range(count):
            positions[i] = <int32_t> (start + i)
        pool.fill_slots(<int32_t*> self._slot_mapping.data + first, sequence.blocks, start, count)
        (<int32_t*> self._query_start.data)[s + 1] = <int32_t> (first + count)
        (<int32_t*> self._seq_lens.data)[s] = <int32_t> (start + count)
        (<int32_t*> self._adapter.data)[s] = adapter
        self.table_width = max(self.table_width, <Py_ssize_t> sequence.blocks.size())
        return 0

    cdef int _close_sequence(self, Sequence sequence, Py_ssize_t start, Py_ssize_t count) except -1:
        """Its tokens and rows are complete."""
        self.context += 0.5 * count * (2 * start + count + 1)
        self.num_tokens += count
        self.num_seqs += 1
        self.sequences.append(sequence)
        return 0

    cdef int _append_pool_rows(
        self, Sequence sequence, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t first
    ) except -1:
        """The rows of a sequence that pools; its positions start .. stop-1 are the tokens from `first` on."""
        cdef Py_ssize_t position = sequence.num_prompt - 1
        if sequence.pooling == POOL_MEAN:
            position = sequence.prompt_rows_done
        position = max(start, position)
        sequence.first_hidden = self.num_hidden
        while position < stop:
            self._append_row(sequence, first + position - start, KIND_POOL, 0)
            sequence.num_prompt_rows += 1
            position += 1
        self.num_hidden += sequence.num_prompt_rows
        return 0

    cdef int _append_row(self, Sequence sequence, Py_ssize_t token, int kind, Py_ssize_t drafted) except -1:
        """Add a row for the token at a place of the step; before it lie so many drafted ones."""
        cdef Py_ssize_t row = self.num_rows
        self._reserve_rows(row + 1)
        cdef bint sampled = kind == KIND_SAMPLE
        cdef Py_ssize_t position = (<int32_t*> self._positions.data)[token]
        (<int32_t*> self._row_seq.data)[row] = <int32_t> self.num_seqs
        (<int32_t*> self._row_token.data)[row] = <int32_t> token
        (<int32_t*> self._row_kind.data)[row] = kind
        (<int32_t*> self._row_target.data)[row] = (
            sequence.tokens[position + 1] if kind == KIND_LOGPROB else -1
        )
        (<int32_t*> self._num_logprobs.data)[row] = (
            sequence.num_logprobs if sampled else sequence.num_prompt_logprobs
        )
        (<float*> self._temperature.data)[row] = sequence.temperature if sampled else 0.0
        (<int32_t*> self._top_k.data)[row] = sequence.top_k if sampled else 0
        (<float*> self._top_p.data)[row] = sequence.top_p if sampled else 1.0
        (<float*> self._min_p.data)[row] = sequence.min_p if sampled else 0.0
        (<float*> self._presence.data)[row] = sequence.presence if sampled else 0.0
        (<float*> self._frequency.data)[row] = sequence.frequency if sampled else 0.0
        (<float*> self._repetition.data)[row] = sequence.repetition if sampled else 1.0
        (<uint64_t*> self._seed.data)[row] = sequence.seed
        (<int32_t*> self._sample_index.data)[row] = <int32_t> sequence.index
        (<int32_t*> self._history_prompt_len.data)[row] = 0
        (<int32_t*> self._mask_row.data)[row] = -1
        if sampled:
            self._append_lists(sequence, row, drafted)
            if sequence.mask_words != NULL:
                self._append_mask(sequence, row)
        (<int32_t*> self._bias_start.data)[row + 1] = <int32_t> self.num_bias
        (<int32_t*> self._banned_start.data)[row + 1] = <int32_t> self.num_banned
        (<int32_t*> self._history_start.data)[row + 1] = <int32_t> self.num_history
        self.num_rows += 1
        return 0

    cdef int _reserve_rows(self, Py_ssize_t count) except -1:
        if count > self._row_seq.capacity:
            for column in (
                self._row_seq, self._row_token, self._row_kind, self._row_target, self._num_logprobs,
                self._temperature, self._top_k, self._top_p, self._min_p, self._presence, self._frequency,
                self._repetition, self._seed, self._sample_index, self._history_prompt_len, self._mask_row,
            ):
                (<Column> column).reserve(count)
            for column in (self._bias_start, self._banned_start, self._history_start):
                (<Column> column).reserve(self._row_seq.capacity + 1)
        return 0

    cdef int append_copy(self, Sequence sequence, Py_ssize_t index, int32_t source) except -1:
        """Before anything else the executor copies block `source` to the block at `index` of the sequence's
        table."""
        cdef Py_ssize_t count = len(self.copies)
        self._copy_blocks.reserve(2 * count + 2)
        (<int32_t*> self._copy_blocks.data)[2 * count] = source
        (<int32_t*> self._copy_blocks.data)[2 * count + 1] = sequence.blocks[index]
        self.copies.append((sequence, index))
        return 0

    cdef int undo_copies(self, BlockPool pool) except -1:
        """The step does not take place: the sequences get back the blocks that were to be copied."""
        cdef Sequence sequence
        cdef Py_ssize_t i, index
        cdef int32_t private
        for i in range(len(self.copies) - 1, -1, -1):
            sequence, index = self.copies[i]
            private = sequence.blocks[index]
            sequence.blocks[index] = (<int32_t*> self._copy_blocks.data)[2 * i]
            pool.give_back_private(private, sequence.blocks[index])
        self.copies.clear()
        return 0

    cdef int _append_lists(self, Sequence sequence, Py_ssize_t row, Py_ssize_t drafted) except -1:
        """The lists of a row that samples: biases, banned ids, the history that penalties look at."""
        cdef Py_ssize_t size = <Py_ssize_t> sequence.bias_ids.size()
        if size:
            self._bias_ids.reserve(self.num_bias + size)
            self._bias_values.reserve(self.num_bias + size)
            memcpy(
                <int32_t*> self._bias_ids.data + self.num_bias, sequence.bias_ids.data(),
                size * sizeof(int32_t),
            )
            memcpy(
                <float*> self._bias_values.data + self.num_bias, sequence.bias_values.data(),
                size * sizeof(float),
            )
            self.num_bias += size
        size = <Py_ssize_t> sequence.banned_ids.size()
        if size and not sequence.may_stop(drafted):
            self._banned_ids.reserve(self.num_banned + size)
            memcpy(
                <int32_t*> self._banned_ids.data + self.num_banned, sequence.banned_ids.data(),
                size * sizeof(int32_t),
            )
            self.num_banned += size
        if sequence.bad_ends.size():
            self._append_bad_words(sequence)
        if sequence.penalized:
            size = <Py_ssize_t> sequence.tokens.size()
            self._history.reserve(self.num_history + size + drafted)
            memcpy(
                <int32_t*> self._history.data + self.num_history, sequence.tokens.data(),
                size * sizeof(int32_t),
            )
            self.num_history += size
            if drafted:
                memcpy(
                    <int32_t*> self._history.data + self.num_history, sequence.draft.data(),
                    drafted * sizeof(int32_t),
                )
                self.num_history += drafted
            (<int32_t*> self._history_prompt_len.data)[row] = <int32_t> sequence.num_prompt
        return 0

    cdef int _append_mask(self, Sequence sequence, Py_ssize_t row) except -1:
        """A copy of the sequence's mask: its own may be another one while the step is still in flight."""
        cdef Py_ssize_t width = sequence.mask_width
        if self.num_masks == 0:
            self.mask_width = width
        elif width != self.mask_width:
            raise ValueError(f"a mask of {width} words beside one of {self.mask_width}")
        self._mask_words.reserve((self.num_masks + 1) * width)
        memcpy(
            <uint32_t*> self._mask_words.data + self.num_masks * width, sequence.mask_words,
            width * sizeof(uint32_t),
        )
        (<int32_t*> self._mask_row.data)[row] = <int32_t> self.num_masks
        self.num_masks += 1
        return 0

    cdef int _append_bad_words(self, Sequence sequence) except -1:
        """Ban the last token of each bad word whose other tokens the output ends with."""
        cdef Py_ssize_t size = <Py_ssize_t> sequence.tokens.size()
        cdef Py_ssize_t begin = 0
        cdef Py_ssize_t end, length, i
        self._banned_ids.reserve(self.num_banned + <Py_ssize_t> sequence.bad_ends.size())
        for end in sequence.bad_ends:
            length = end - begin - 1
            if length <= size - sequence.num_prompt:
                i = 0
                while i < length and sequence.tokens[size - length + i] == sequence.bad_words[begin + i]:
                    i += 1
                if i == length:
                    (<int32_t*> self._banned_ids.data)[self.num_banned] = sequence.bad_words[end - 1]
                    self.num_banned += 1
            begin = end
        return 0

    cdef int seal(self) except -1:
        """The batch is complete: fill the block tables and show the arrays."""
        self._fill_block_tables()
        self._publish()
        return 0

    cdef int _fill_block_tables(self) except -1:
        cdef Sequence sequence
        cdef Py_ssize_t size, s
        cdef int32_t* line
        self._block_tables.reserve(self.num_seqs * self.table_width)
        for s in range(self.num_seqs):
            sequence = <Sequence> self.sequences[s]
            size = <Py_ssize_t> sequence.blocks.size()
            line = <int32_t*> self._block_tables.data + s * self.table_width
            memcpy(line, sequence.blocks.data(), size * sizeof(int32_t))
            memset(line + size, 0, (self.table_width - size) * sizeof(int32_t))
        return 0

    cdef int _publish(self) except -1:
        cdef Py_ssize_t tokens = self.num_tokens
        cdef Py_ssize_t seqs = self.num_seqs
        cdef Py_ssize_t rows = self.num_rows
        flat = self._block_tables.publish(seqs * self.table_width)
        if flat is not self.flat_tables or seqs != self.shown_seqs:
            self.flat_tables = flat
            self.shown_seqs = seqs
            self.block_tables = flat.reshape(seqs, self.table_width)
        flat = self._copy_blocks.publish(2 * len(self.copies))
        if flat is not self.flat_copies:
            self.flat_copies = flat
            self.copy_blocks = flat.reshape(-1, 2)
        flat = self._mask_words.publish(self.num_masks * self.mask_width)
        if flat is not self.flat_masks:
            self.flat_masks = flat
            self.mask_words = flat.reshape(self.num_masks, self.mask_width)
        self.mask_row = self._mask_row.publish(rows)
        self.token_ids = self._token_ids.publish(tokens)
        self.positions = self._positions.publish(tokens)
        self.slot_mapping = self._slot_mapping.publish(tokens)
        self.query_start = self._query_start.publish(seqs + 1)
        self.seq_lens = self._seq_lens.publish(seqs)
        self.adapter = self._adapter.publish(seqs)
        self.row_seq = self._row_seq.publish(rows)
        self.row_token = self._row_token.publish(rows)
        self.row_kind = self._row_kind.publish(rows)
        self.row_target = self._row_target.publish(rows)
        self.num_logprobs = self._num_logprobs.publish(rows)
        self.temperature = self._temperature.publish(rows)
        self.top_k = self._top_k.publish(rows)
        self.top_p = self._top_p.publish(rows)
        self.min_p = self._min_p.publish(rows)
        self.presence = self._presence.publish(rows)
        self.frequency = self._frequency.publish(rows)
        self.repetition = self._repetition.publish(rows)
        self.seed = self._seed.publish(rows)
        self.sample_index = self._sample_index.publish(rows)
        self.bias_start = self._bias_start.publish(rows + 1)
        self.bias_ids = self._bias_ids.publish(self.num_bias)
        self.bias_values = self._bias_values.publish(self.num_bias)
        self.banned_start = self._banned_start.publish(rows + 1)
        self.banned_ids = self._banned_ids.publish(self.num_banned)
        self.history_start = self._history_start.publish(rows + 1)
        self.history = self._history.publish(self.num_history)
        self.history_prompt_len = self._history_prompt_len.publish(rows)
        return 0
