# cython: auto_pickle=False, autotestdict=False, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""Drafts from a second, smaller model of the same vocabulary.

The draft model has an executor of its own, whose cache has as many blocks of the same size as the main one.
So the block table of a sequence addresses both, and sharing, copying and preempting need no second pool. What
the draft model's cache holds is known twice:

    Sequence.num_drafted   so many leading positions of the sequence are computed
    filled[block]          the use of a block (`BlockPool.uses`) for which all of its positions are computed,
                           with tokens that are known: whoever has the block besides, or takes it from the
                           prefix index later, need not compute it again

Neither is looked at for an answer: a cache that held something else would only cost guesses.

When drafts are made, the draft model first computes what it has missed, the prompt included, in one batch of
chunks a step; the sequences of which it knows every token then get a guess each, in that same batch, and go
on guessing in batches of one token each:

    chosen ── catch up ──► a first guess ── one more batch ──► a second ── ... ──► cut to what is worth it
                 │                                │
                 └─ to be continued next step     └─ too unlikely by now, or long enough

A guess is sampled by the same parameters and the same random key as the token that verifies it. Where both
models think alike they draw alike, at any temperature.

What a guess costs is the time that one more token adds to the step that verifies it, and its share of the
batch that makes it, in steps that yield one token each; what it is worth is the chance that it is right. Both
are learnt: times by a `StepCost` each, on a few guesses of one sequence at first; chances for every sequence,
by how sure the draft model was of its token. A sequence whose guesses are not worth their price is left
alone, for 64 tokens, then 128, 256, ...; it is tried again only where what the draft model has to compute for
that is little against the tokens that came meanwhile. A try begins with one guess a step, then two, and so
on, as they turn out right. If most sequences are left alone, new ones begin that way.
"""

from libc.math cimport INFINITY
from libc.stdint cimport int32_t

import time

from fastllm.errors import RequestError

from fastllm.engine.block_pool cimport BlockPool
from fastllm.engine.drafter cimport Drafter
from fastllm.engine.sequence cimport Sequence
from fastllm.engine.step_batch cimport StepBatch
from fastllm.engine.step_cost cimport StepCost

cdef float LEARNING_RATE = 0.2
cdef double SLOW_RATE = 0.05  # of what is learnt over all sequences
cdef Py_ssize_t ENOUGH_JUDGED = 16  # guesses, to believe that
cdef float FIRST_RATE = 0.6  # how often guesses are right, before anything is known of it
cdef double MARGIN = 1.2  # guesses are worth it only if they pay more than that
cdef Py_ssize_t ENOUGH_MADE = 3  # batches of guesses, to know what they take
cdef double FIRST_SHARE = 0.1  # price of a guess's making before that
cdef Py_ssize_t ENOUGH_VERIFIED = 8  # drafts, to know what they add to a step
cdef double FIRST_PRICE = 0.2  # of verifying a guess before that, at most
cdef Py_ssize_t MOST_IDLE = 1000  # steps without a draft, until what guesses cost is found out again
cdef Py_ssize_t FIRST_PAUSE = 64  # tokens
cdef double RETRY_SHARE = 0.02  # of the time since the pause began: what another try may spend on catching up
cdef double CATCH_UP_SHARE = 0.25  # the same for the first try, of the time that all that may come takes
cdef Py_ssize_t LEAST_CHUNK = 16  # tokens to catch up with, whatever the target
cdef float SURE = -0.35  # logprob of a token that the draft model is sure of: 70 %
cdef float DOUBTFUL = -1.2  # below: 30 %


cdef class ModelDrafter(Drafter):
    """Proposes what a second model would say.

    Args:
        executor: runs the draft model; with as many blocks as the main one's, of the same size. Whoever made
            it closes it.
        max_tokens: most tokens of a draft, 1..64.
        max_model_len: positions that the draft model has, >= 1; sequences are not drafted beyond.
        clock: seconds, monotonic.

    Attributes:
        cost: what the draft model's steps take.
        hit_rate, num_judged: how often guesses were right of late, in 0..1, and how many there were.

    Raises:
        RequestError: an argument is out of range.
    """

    def __init__(self, executor, Py_ssize_t max_tokens=4, *, Py_ssize_t max_model_len, clock=time.monotonic):
        super().__init__(max_tokens)
        if max_model_len < 1:
            raise RequestError("max_model_len", max_model_len, "an integer >= 1")
        self.executor = executor
        self.max_model_len = max_model_len
        self.clock = clock
        self.cost = StepCost()
        self.hit_rate = FIRST_RATE
        self.members = []

    cdef int attach(
        self, BlockPool pool, StepCost verification, Py_ssize_t max_num_seqs,
        Py_ssize_t max_num_batched_tokens, Py_ssize_t vocab_size,
    ) except -1:
        for name, value, limit in (
            ("block_size", self.executor.block_size, pool.block_size),
            ("kv_capacity", self.executor.kv_capacity(), pool.num_blocks),
        ):
            if value != limit:
                raise RequestError(f"draft model: {name}", value, f"that of the main executor ({limit})")
        Drafter.attach(self, pool, verification, max_num_seqs, max_num_batched_tokens, vocab_size)
        self.batch = StepBatch(max_num_batched_tokens, max_num_seqs)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.vocab_size = vocab_size
        self.filled.assign(pool.num_blocks, 0)
        self.written.assign(pool.num_blocks, 0)
        return 0

    cdef int propose(self, list decodes, Py_ssize_t spare, Py_ssize_t reserve, double seconds) except -1:
        cdef list chosen
        cdef bint drafted
        if spare <= 0:
            return 0
        self.num_idle += 1
        if self.num_idle > MOST_IDLE:  # steps without guesses do not tell whether their price has changed
            self.num_idle = self.num_short = self.num_verified = 0
        chosen = self._choose(decodes, spare, reserve)
        if not chosen:
            return 0
        try:
            self._catch_up(chosen, seconds)
            while self.batch.num_tokens:
                self._run()
                self._go_on()
        except BaseException:
            for item in chosen:
                self._withdraw(<Sequence> item)
            raise
        finally:
            self.batch.sequences.clear()
            self.members = []
        drafted = False
        for item in chosen:
            self._cut(<Sequence> item)
            drafted |= not (<Sequence> item).draft.empty()
        self.num_verified += drafted
        if drafted:
            self.num_idle = 0
        return 0

    # ---- whom to draft -----------------------------------------------------------------------------------

    cdef list _choose(self, list decodes, Py_ssize_t spare, Py_ssize_t reserve):
        """The sequences to be drafted now, each with room for a draft (`draft_room`) and blocks for it."""
        cdef Sequence sequence
        cdef Py_ssize_t count = len(decodes)
        cdef double context = 0.0
        cdef double lone
        cdef Py_ssize_t each
        cdef list chosen = []
        for item in decodes:
            sequence = <Sequence> item
            sequence.guess = -1
            context += <double> sequence.tokens.size()
        self.verify = self._verifying(count, context)
        self.unit = self.verification.predict(count, count, context) / count
        context /= count
        lone = self._verifying(1, context)
        lone += self._share(1, context, self.verification.predict(1.0, 1.0, context))
        for item in decodes:
            sequence = <Sequence> item
            if sequence.followers or not sequence.may_be_drafted() or sequence.held:
                continue
            sequence.draft_room = min(
                self.max_tokens, sequence.length_limit - 1 - <Py_ssize_t> sequence.tokens.size(),
                self.max_model_len + 1 - <Py_ssize_t> sequence.tokens.size(), sequence.draft_hits + 1,
            )
            if sequence.draft_room > 0 and self._is_likely(sequence, lone):
                sequence.draft_chance = 1.0
                chosen.append(sequence)
        chosen = self._worth(chosen)
        if not chosen:
            return chosen
        if self.num_verified < ENOUGH_VERIFIED:  # what guesses cost is found out on one sequence
            chosen = chosen[:1]
        each = max(spare // <Py_ssize_t> len(chosen), 1)
        for item in chosen:
            sequence = <Sequence> item
            self._give_room(sequence, min(spare, each), reserve)
            spare -= max(sequence.draft_room, 0)
        return [item for item in chosen if (<Sequence> item).draft_room > 0]

    cdef bint _is_likely(self, Sequence sequence, double lone) noexcept:
        """Whether a sequence is to be drafted if the batch lets it; `lone` is the price of a guess for one
        that decodes alone. Where even that is too much, it pauses."""
        cdef Py_ssize_t size = <Py_ssize_t> sequence.tokens.size()
        cdef Py_ssize_t resumes = sequence.draft_since + sequence.draft_pause
        # As good as it takes to be tried: one more disappointment ends it if guesses are dear, a few if not.
        cdef double hopeful = max(FIRST_RATE, min(1.1 * lone, 0.95))
        if size < resumes:
            return False
        if sequence.hit_rate < 0.0:
            sequence.hit_rate = self.hit_rate if self.num_judged > ENOUGH_JUDGED else hopeful
        if sequence.hit_rate >= lone:
            return self._is_cheap_to_reach(sequence)
        if sequence.draft_tried or sequence.draft_pause == 0:
            # A try that was worth it for longer than the pause before begins anew.
            if sequence.draft_pause == 0 or size - resumes > sequence.draft_pause:
                sequence.draft_pause = FIRST_PAUSE
            else:
                sequence.draft_pause *= 2
            sequence.draft_since = size
            sequence.draft_tried = False
            sequence.draft_hits = 0
        sequence.hit_rate = hopeful
        return False

    cdef bint _is_cheap_to_reach(self, Sequence sequence) noexcept:
        """Whether what the draft model has missed of a sequence takes little time: against what is to come,
        or, where guesses were not worth it before, against what has come since."""
        cdef Py_ssize_t size = <Py_ssize_t> sequence.tokens.size()
        cdef Py_ssize_t missing = size - self._skip_filled(sequence)
        cdef double most, needed
        if missing <= 2 * self.max_tokens or self.unit <= 0.0 or self.cost.num_steps == 0:
            return True
        if sequence.draft_pause and not sequence.draft_tried:
            most = RETRY_SHARE * (size - sequence.draft_since)
        else:
            most = CATCH_UP_SHARE * (sequence.length_limit - size)
        needed = missing * self.cost.per_token(size - 0.5 * missing)
        needed += missing // self.max_num_batched_tokens * self.cost.predict(0.0, 0.0, 0.0)
        return needed <= most * self.unit

    cdef int _give_room(self, Sequence sequence, Py_ssize_t most, Py_ssize_t reserve) except -1:
        """Blocks for a draft of at most so many tokens, or as many as fit into those it has."""
        cdef Py_ssize_t size = <Py_ssize_t> sequence.tokens.size()
        cdef Py_ssize_t held = <Py_ssize_t> sequence.blocks.size()
        cdef Py_ssize_t missing
        sequence.draft_room = min(sequence.draft_room, most)
        missing = self.pool.blocks_for(size + sequence.draft_room) - held
        if missing > 0:
            if self.pool.can_allocate(missing + reserve):
                self.pool.allocate_into(sequence.blocks, missing)
            else:  # nobody is to be preempted for a guess
                sequence.draft_room = held * self.pool.block_size - size
        return 0

    cdef list _worth(self, list sequences):
        """Those for which one more guess is worth its price. The fewer they are, the more each of them pays
        for a batch of the draft model."""
        cdef list kept = sequences
        cdef Py_ssize_t count = -1
        cdef double context, price
        while len(kept) != count:
            count = len(kept)
            context = 0.0
            for item in kept:
                context += <double> (<Sequence> item).tokens.size()
            if count:
                price = self.verify + self._share(count, context / count, self.unit)
                kept = [
                    item for item in kept
                    if (<Sequence> item).draft_chance * (<Sequence> item).hit_rate >= price
                ]
        return kept

    cdef double _verifying(self, Py_ssize_t count, double context) noexcept:
        """`price`, but no more than a first guess until some drafts were verified: steps without any say
        little of what these add to them."""
        cdef double price = self.price(count, context)
        return price if self.num_verified >= ENOUGH_VERIFIED else min(price, FIRST_PRICE)

    cdef double _share(self, Py_ssize_t count, double context, double unit) noexcept:
        """What a guess costs that so many sequences get in one batch, with so much context each, in units.
        Chunks of prompts say little of it."""
        if unit <= 0.0 or self.num_short < ENOUGH_MADE:
            return FIRST_SHARE
        return MARGIN * self.cost.predict(count, count, count * context) / (count * unit)

    # ---- the batches of the draft model ------------------------------------------------------------------

    cdef int _catch_up(self, list chosen, double seconds) except -1:
        """Fill the batch with what the draft model has missed of sequences: first of those that lack little,
        whose first guess comes of it; the others get what is left of a step's tokens, or of the seconds."""
        cdef Sequence sequence
        cdef Py_ssize_t left = self.max_num_batched_tokens
        cdef Py_ssize_t size, missing, count
        cdef double price
        cdef bint little
        self.num_batches += 1
        self.members = []
        self.batch.begin()
        for little in (True, False):
            if not little and seconds != INFINITY:
                price = self.cost.per_token(0.0)
                if price > 0.0 and left * price > seconds - self.cost.predict(self.batch.num_tokens, 0, 0.0):
                    left = min(left, max(<Py_ssize_t> (seconds / price), LEAST_CHUNK))
            for item in chosen:
                if left == 0:
                    break
                sequence = <Sequence> item
                size = <Py_ssize_t> sequence.tokens.size()
                missing = size - self._skip_filled(sequence)
                if (missing <= 2 * self.max_tokens) != little:
                    continue
                count = self._claim(sequence, min(missing, left))
                if count == 0:
                    continue
                left -= count
                self.batch.append_guess(sequence, sequence.num_drafted, count, self.pool)
                if count == missing:
                    self.members.append(sequence)
        return 0

    cdef Py_ssize_t _skip_filled(self, Sequence sequence) noexcept:
        """Count the blocks that are computed already, for somebody else. Returns `num_drafted`."""
        cdef Py_ssize_t size = self.pool.block_size
        cdef Py_ssize_t i = sequence.num_drafted // size
        cdef int32_t block
        while (i + 1) * size < <Py_ssize_t> sequence.tokens.size():
            block = sequence.blocks[i]
            if self.filled[block] != self.pool.uses[block]:
                break
            i += 1
            sequence.num_drafted = i * size
        return sequence.num_drafted

    cdef Py_ssize_t _claim(self, Sequence sequence, Py_ssize_t count) noexcept:
        """Of the next `count` positions, those in blocks that nobody else writes to in this batch: two that
        share a block do not compute it at once, the second one waits for the first."""
        cdef Py_ssize_t size = self.pool.block_size
        cdef Py_ssize_t start = sequence.num_drafted
        cdef Py_ssize_t i
        for i in range(start // size, (start + count + size - 1) // size):
            if self.written[sequence.blocks[i]] == self.num_batches:
                return max(i * size - start, 0)
            self.written[sequence.blocks[i]] = self.num_batches
        return count

    cdef int _run(self) except -1:
        """Compute the batch, and take the guesses that come of it."""
        cdef StepBatch batch = self.batch
        cdef Py_ssize_t s
        cdef double begun, took
        batch.seal()
        begun = self.clock()
        result = self.executor.collect(self.executor.submit(batch))
        took = self.clock() - begun
        self.seconds += took
        self.cost.observe(batch.num_tokens, batch.num_rows, batch.context, took)
        self.num_short += batch.num_tokens <= 2 * batch.num_rows
        for s in range(batch.num_seqs):
            self._note_filled(<Sequence> batch.sequences[s], (<int32_t*> batch._seq_lens.data)[s])
        return self._take(result)

    cdef int _note_filled(self, Sequence sequence, Py_ssize_t stop) noexcept:
        """The positions before `stop` are computed; those of known tokens for everybody.

        What was drafted and turned out right has not been noted yet: it is not further back than a draft is
        long.
        """
        cdef Py_ssize_t size = self.pool.block_size
        cdef Py_ssize_t i
        for i in range(
            max(sequence.num_drafted - self.max_tokens, 0) // size,
            min(stop, <Py_ssize_t> sequence.tokens.size()) // size,
        ):
            self.filled[sequence.blocks[i]] = self.pool.uses[sequence.blocks[i]]
        sequence.num_drafted = stop
        return 0

    cdef int _take(self, result) except -1:
        """Append a guess to each sequence with a row, and what it comes from: how sure the model was."""
        cdef const int32_t[::1] tokens = result.tokens
        cdef const float[::1] logprobs = result.logprob
        cdef Sequence sequence
        cdef Py_ssize_t row
        cdef int kind
        if tokens.shape[0] != self.batch.num_rows or logprobs.shape[0] != self.batch.num_rows:
            raise ValueError(f"a result of {tokens.shape[0]} rows for a batch of {self.batch.num_rows}")
        for row in range(tokens.shape[0]):
            sequence = <Sequence> self.members[row]
            if tokens[row] < 0 or tokens[row] >= self.vocab_size:  # no number
                sequence.draft_room = 0
                if sequence.draft.empty():
                    self._judge(sequence, 0, False)
                continue
            kind = 2 if logprobs[row] >= SURE else 1 if logprobs[row] >= DOUBTFUL else 0
            if sequence.draft.empty():
                sequence.guess = tokens[row]
                sequence.draft_kinds.clear()
            sequence.draft.push_back(tokens[row])
            sequence.draft_kinds.push_back(kind)
            sequence.draft_chance *= sequence.acceptance[kind]
        return 0

    cdef int _go_on(self) except -1:
        """Fill the batch with the newest guess of every sequence for which another one is worth it."""
        cdef Sequence sequence
        cdef list active = []
        for item in self.members:
            sequence = <Sequence> item
            if <Py_ssize_t> sequence.draft.size() < sequence.draft_room:
                active.append(sequence)
        self.members = self._worth(active)
        self.batch.begin()
        for item in self.members:
            sequence = <Sequence> item
            self.batch.append_guess(sequence, sequence.num_drafted, 1, self.pool)
        return 0

    # ---- what becomes of them ----------------------------------------------------------------------------

    cdef int _cut(self, Sequence sequence) except -1:
        """Leave of the draft what is worth verifying: its making is paid for. Give back the other blocks."""
        cdef Py_ssize_t size = <Py_ssize_t> sequence.tokens.size()
        cdef Py_ssize_t kept = 0
        cdef double chance = 1.0
        while kept < <Py_ssize_t> sequence.draft.size():
            chance *= sequence.acceptance[sequence.draft_kinds[kept]]
            if chance < self.verify:
                break
            kept += 1
        sequence.draft.resize(kept)
        sequence.num_drafted = min(sequence.num_drafted, size + kept)
        return self.pool.truncate_table(sequence.blocks, self.pool.blocks_for(size + kept))

    cdef int _withdraw(self, Sequence sequence) except -1:
        """The draft was not completed: as if it had not begun."""
        cdef Py_ssize_t size = <Py_ssize_t> sequence.tokens.size()
        sequence.draft.clear()
        sequence.guess = -1
        sequence.num_drafted = min(sequence.num_drafted, size - 1)
        return self.pool.truncate_table(sequence.blocks, self.pool.blocks_for(size))

    cdef int learn(self, Sequence sequence, Py_ssize_t drafted, Py_ssize_t accepted) noexcept:
        cdef Py_ssize_t i
        if sequence.guess < 0:
            return 0
        for i in range(accepted + (accepted < drafted)):
            self._judge(sequence, sequence.draft_kinds[i], i < accepted)
        sequence.guess = -1
        return 0

    cdef int _judge(self, Sequence sequence, int kind, bint right) noexcept:
        sequence.acceptance[kind] += LEARNING_RATE * (right - sequence.acceptance[kind])
        sequence.hit_rate += LEARNING_RATE * (right - sequence.hit_rate)
        sequence.draft_tried = True
        sequence.draft_hits += right
        self.hit_rate += SLOW_RATE * (right - self.hit_rate)
        self.num_judged += 1
        return 0

    def check(self, sequences):
        cdef Sequence sequence
        cdef Py_ssize_t i
        cdef int32_t block
        for sequence in sequences:
            if sequence.num_drafted > <Py_ssize_t> sequence.blocks.size() * self.pool.block_size:
                raise AssertionError(f"S13: {sequence!r} has {sequence.num_drafted} drafted without blocks")
            for i in range(max(sequence.num_drafted - self.max_tokens, 0) // self.pool.block_size):
                block = sequence.blocks[i]
                if self.filled[block] != self.pool.uses[block]:
                    raise AssertionError(f"S13: {sequence!r} has block {block}, which is not filled")
