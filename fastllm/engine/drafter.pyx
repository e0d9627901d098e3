# cython: auto_pickle=False, autotestdict=False, boundscheck=False, wraparound=False, cdivision=True
# distutils: language = c++
"""Drafts, and those from the text itself: what followed the last time that the newest tokens stood there.

A draft is a guess at the tokens that come next. They are computed together with the newest token, in one
step, and each is kept exactly if it is the token that is sampled there anyway; so a draft changes what a step
costs and how many tokens it yields, and no token.

How far a draft is worth its price is decided for every sequence at every step. From how often guesses were
right of late, by the length of the match that they came from, follows the chance that a guess and all before
it are right; a guess is made while that chance is above its price, which is the time that one more token adds
to the step, in steps that yield one token. Guesses are made in mind even where they are not worth computing,
and held against the token that came: so a sequence that begins to repeat itself is noticed at no cost.
That is a forecast, from costs that are taken to grow evenly with the tokens of a step. So what came of it is
measured: the tokens that a step with drafts yields and the seconds that it takes, against a step without
drafts of as many sequences. Where steps with drafts lose on the average, there are none for 32 steps, then
64, 128, ...

`model_drafter.pyx` has another source of guesses, a second model.

Prompt lookup: Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from libc.stdint cimport int32_t

from fastllm.errors import RequestError

from fastllm.engine.block_pool cimport BlockPool
from fastllm.engine.sequence cimport Sequence
from fastllm.engine.step_cost cimport StepCost

cdef Py_ssize_t LONGEST_MATCH = 8  # longer ones are not told apart
cdef float LEARNING_RATE = 0.2
cdef double FIRST_PRICE = 0.4  # of a guess, before anything is known of what steps take
cdef double PRICE_MARGIN = 1.2  # guesses are worth it only if they pay more than that
cdef double LOWEST_PRICE = 0.15  # a second token may cost nothing, the tenth does
cdef double FIRST_GAIN = 0.1  # in steps without drafts, before anything is known: an advance
cdef double NEXT_GAIN = 0.05  # after a pause
cdef double WELL = 0.3  # a gain after which the next pause is a short one again
cdef double GAIN_RATE = 0.1
cdef double PLAIN_RATE = 0.1
cdef double SURPRISE = 3.0  # a step so many times longer than others tells of the machine
cdef Py_ssize_t FIRST_REST = 32
cdef Py_ssize_t LONGEST_REST = 1024


cdef class Drafter:
    """Where guesses come from; this one has none.

    Args:
        max_tokens: most tokens of a draft, 1..64.

    Attributes:
        seconds: what a model of its own took in the last schedule; 0 without one.

    Raises:
        RequestError: it is out of range.
    """

    def __init__(self, Py_ssize_t max_tokens):
        if not 1 <= max_tokens <= 64:
            raise RequestError("num_speculative_tokens", max_tokens, "an integer in 1..64")
        self.max_tokens = max_tokens

    cdef int attach(
        self, BlockPool pool, StepCost verification, Py_ssize_t max_num_seqs,
        Py_ssize_t max_num_batched_tokens, Py_ssize_t vocab_size,
    ) except -1:
        """Learn what it works for: the blocks of a scheduler, what its steps take, and its limits."""
        self.pool = pool
        self.verification = verification
        return 0

    cdef int propose(self, list decodes, Py_ssize_t spare, Py_ssize_t reserve, double seconds) except -1:
        """Set the drafts of sequences, none of which has one, and give them the blocks that these need.

        Args:
            decodes: sequences that compute their newest token in the next step.
            spare: tokens that all drafts may have together; may be negative.
            reserve: blocks that have to stay free.
            seconds: that may be spent on what a model of its own has missed of the sequences.
        """
        return 0

    cdef int learn(self, Sequence sequence, Py_ssize_t drafted, Py_ssize_t accepted) noexcept:
        """Of `drafted` guesses, made in earnest or in mind, the first `accepted` were right."""
        return 0

    cdef double price(self, Py_ssize_t decodes, double context) noexcept:
        """What verifying one token more adds to a step of so many decodes with so much context in all, in
        time that a step takes for one token without drafts; 0 or more."""
        cdef double seconds = self.verification.predict(decodes, decodes, context)
        if decodes == 0 or seconds <= 0.0:
            return FIRST_PRICE
        return max(
            PRICE_MARGIN * decodes * self.verification.per_sampled_token(context / decodes) / seconds,
            LOWEST_PRICE,
        )

    cdef int judge(
        self, Py_ssize_t decodes, Py_ssize_t drafted, Py_ssize_t made, double context, double seconds
    ) except -1:
        """Take in what came of a step that did nothing but decode.

        Args:
            decodes, drafted: its sequences, and the tokens of their drafts.
            made: tokens that it yielded.
            context: positions that attention read, summed over its tokens.
            seconds: that it took to compute.
        """
        return 0

    def check(self, sequences):
        """Recompute what it believes of running sequences from scratch.

        Raises:
            AssertionError: it is wrong.
        """


cdef class NgramDrafter(Drafter):
    """Proposes tokens that followed earlier.

    Args:
        max_tokens: most tokens of a draft, 1..64.
        min_match: tokens that must have stood there before, 1..8.

    Attributes:
        gain: what a step with drafts was worth of late beyond its time, in steps without any.
        pause: so many steps are to come without drafts.

    Raises:
        RequestError: one of them is out of range.
    """

    def __init__(self, Py_ssize_t max_tokens=10, Py_ssize_t min_match=2):
        super().__init__(max_tokens)
        if not 1 <= min_match <= LONGEST_MATCH:
            raise RequestError("prompt_lookup_min", min_match, f"an integer in 1..{LONGEST_MATCH}")
        self.min_match = min_match
        self.gain = FIRST_GAIN
        self.rest = FIRST_REST

    cdef int attach(
        self, BlockPool pool, StepCost verification, Py_ssize_t max_num_seqs,
        Py_ssize_t max_num_batched_tokens, Py_ssize_t vocab_size,
    ) except -1:
        self.plain.assign(max_num_seqs + 1, 0.0)
        return Drafter.attach(
            self, pool, verification, max_num_seqs, max_num_batched_tokens, vocab_size
        )

    cdef int propose(self, list decodes, Py_ssize_t spare, Py_ssize_t reserve, double seconds) except -1:
        cdef Sequence sequence
        cdef double context = 0.0
        cdef double price
        cdef Py_ssize_t size, missing
        if spare < 0 or self.rests():  # then guesses are made in mind alone
            spare = 0
        for item in decodes:
            context += <double> (<Sequence> item).tokens.size()
        price = self.price(len(decodes), context)
        for item in decodes:
            sequence = <Sequence> item
            if sequence.followers or not sequence.may_be_drafted():
                continue
            size = <Py_ssize_t> sequence.tokens.size()
            self._guess(sequence, min(spare, sequence.length_limit - 1 - size), price)
            missing = self.pool.blocks_for(size + <Py_ssize_t> sequence.draft.size())
            missing -= <Py_ssize_t> sequence.blocks.size()
            if missing > 0:
                if self.pool.can_allocate(missing + reserve):
                    self.pool.allocate_into(sequence.blocks, missing)
                else:  # nobody is to be preempted for a guess
                    sequence.draft.clear()
            spare -= <Py_ssize_t> sequence.draft.size()
        return 0

    cdef bint rests(self) noexcept:
        """Whether the next step is to have no drafts, since those of late did not pay."""
        if self.pause == 0:
            return False
        self.pause -= 1
        return True

    cdef int judge(
        self, Py_ssize_t decodes, Py_ssize_t drafted, Py_ssize_t made, double context, double seconds
    ) except -1:
        cdef double plain = self.plain[decodes]
        cdef double took = seconds
        if drafted == 0:
            if plain > 0.0:
                took = plain + PLAIN_RATE * (min(seconds, SURPRISE * plain) - plain)
            self.plain[decodes] = took
            return 0
        if plain == 0.0:
            plain = self.verification.predict(decodes, decodes, context * decodes / (decodes + drafted))
        if plain <= 0.0:
            return 0
        took = min(seconds, SURPRISE * plain)
        self.gain += GAIN_RATE * (<double> made / decodes - took / plain - self.gain)
        if self.gain < 0.0:
            self.pause = self.rest
            self.rest = min(2 * self.rest, LONGEST_REST)
            self.gain = NEXT_GAIN
        elif self.gain > WELL:
            self.rest = FIRST_REST
        return 0

    cdef int _guess(self, Sequence sequence, Py_ssize_t most, double price) except -1:
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
        cdef float* chance = &sequence.acceptance[sequence.match_kind]
        cdef Py_ssize_t _i
        if sequence.guess < 0:
            return 0
        for _i in range(accepted):
            chance[0] += LEARNING_RATE * (1 - chance[0])
        if accepted < drafted:
            chance[0] -= LEARNING_RATE * chance[0]
        return 0
