# cython: auto_pickle=False, autotestdict=False, boundscheck=False, wraparound=False
# distutils: language = c++
"""Continuous batching: which tokens of which sequences the next step computes.

`schedule` and `update` take turns. Each step has one budget of max_num_batched_tokens. Sequences that decode
come first, one token each; what is left goes to chunks of prompts, of running and waiting sequences alike, in
the order of their deadlines, for as long as budget, max_num_seqs and blocks last. A sequence gets the blocks
for all its known tokens when it is admitted, those of a known prefix from the index of the block pool and
further ones filled from a file (`offload`), then one block at a time as it grows.

A deadline is the time of arrival, plus priority_interval seconds for each level that the priority lies below
0: of two that wait the more important one is served first, but nobody is overtaken by what arrives later than
that, so that nothing waits for ever. Equal deadlines go by arrival. A waiting sequence also takes seat and
blocks of running ones that are of lower priority and have a later deadline, and their share of the target.

When a running sequence needs a block and none is free, the one with the last deadline is preempted: it gives
up its blocks and returns to the queue; later its tokens, prompt and output, are computed again as if they
were a prompt, less those whose blocks the index still has (of a preempted sequence the last blocks are used
up first). Since the executor's arithmetic does not depend on how tokens are batched, that changes no token
that follows.

The n sequences of one request are a leader and its followers. The leader computes the prompt; when that is
done every one of them samples from it, and the followers go on with the leader's blocks as their own. A block
that somebody else has too is copied before it is written to.

States of a sequence
====================

                add              schedule              update, finish
    +-----+ ---------> +---------+ ------> +---------+ --------------> +----------+
    | NEW |            | WAITING |         | RUNNING |                 | FINISHED |
    +-----+            +---------+         +---------+                 +----------+
                            |               |  ^    |
                            |      schedule |  | schedule
                            |               v  |    |
                            |         +-----------+ |
                            |         | PREEMPTED | |
                            |         +-----------+ |
                            |  abort        | abort | abort
                            v               v       v
                          +---------------------------+
                          |          ABORTED          |
                          +---------------------------+

                add                update, when the leader has computed the prompt
    +-----+ ---------> +-----------+ ----------> RUNNING (there is a seat), WAITING (there is none),
    | NEW |            | FOLLOWING |             FINISHED (its first token ends it)
    +-----+            +-----------+ ----------> WAITING, when its leader is gone and it is the first follower
                             |
                             +-----------------> ABORTED (abort)

    from       to         function                     when                          blocks
    ---------  ---------  ---------------------------  ----------------------------  -------------------------
    NEW        WAITING    add                          it can fit                    none
    NEW        FOLLOWING  add                          with its leader               none
    FOLLOWING  RUNNING    update, _fork                the prompt is computed, a     the leader's, shared
                                                       seat is free
    FOLLOWING  WAITING    update, _fork                the same, but no seat         none
    FOLLOWING  WAITING    abort, _succeed              the leader is gone; it leads  none
    FOLLOWING  FINISHED   update, _fork                its first token ends it       none
    WAITING    RUNNING    schedule, _admit             seat, budget, blocks free     for all its known tokens
    PREEMPTED  RUNNING    schedule, _admit             the same                      the same
    RUNNING    RUNNING    schedule, _schedule_decodes  it grows                      one more as they fill, a
                                                                                     copy of a shared one
    RUNNING    PREEMPTED  schedule, _preempt           an earlier one (or itself)    freed; num_computed is 0
                                                       needs a block, none is free;
                                                       or a more important one
                                                       waits for seat, blocks, or
                                                       room under the target
    RUNNING    FINISHED   update                       stop token or length limit;   freed
                                                       one that pools: its prompt
                                                       is computed ("stop")
    RUNNING    FINISHED   update                       no number where logits or     freed
                                                       hidden states ought to be
                                                       ("error")
    RUNNING    FINISHED   finish                       stop string (the caller's)    freed
    WAITING    FINISHED   finish                       the same, of a follower that  none
                                                       had no seat
    NEW,       ABORTED    abort                        any time                      had none
    FOLLOWING,
    WAITING,
    PREEMPTED
    RUNNING    ABORTED    abort                        no step in flight             freed
    RUNNING    ABORTED,   abort, finish, or update     its step is in flight         freed when that is over
               FINISHED   of the step before

    A step is in flight between schedule and update (or rollback, which forgets it: nothing was counted yet,
    copies are undone, and the next schedule gives the same tokens again).

A step ahead
============

An executor that computes while its caller goes on gets the next step before it has finished one:

             schedule              assume                schedule                    update
    nothing ---------> in flight ---------> assumed ---------------> assumed, and ---------> in flight
       ^                   |                   |  (nothing follows:   one in flight             |
       +-------------------+                   |   None)                  |                     |
       |      update                           | update                   | rollback of both    |
       +---------------------------------------+--------------------------+         (as above) -+

`assume` counts the step in flight as if all went on: its tokens are in the cache, and each sequence that
samples has one more, `pending`: it stands as -1 - r, which the executor reads as what row r of the step
before yielded. What the next step holds is then chosen as ever. Only what could not be taken back is not done
for it: where it would have to preempt, there is no step ahead. `update` puts the tokens in; what has ended by
them is in the next step for nothing, and drains. Where the host has to look at a token before the next one
can be sampled (penalties, grammars, bad words, guesses), `assume` declines.

The executor computes steps in the order in which it gets them. So blocks that were free when a step was
chosen may be in use by the one before it.

Nothing waits for ever, and nothing deadlocks
=============================================

One whose next mask is still being worked out is held: it keeps seat and blocks, and its newest token waits
for a later step. Whoever holds it must let it go (`Sequence.set_mask`) or end it.

A sequence ends at the latest with length_limit = min(prompt + max_tokens, max_model_len, pool tokens + 1)
tokens; the newest token is never in the cache, so it needs at most length_limit - 1 <= pool tokens. `add`
refuses a prompt that is not below that. So the running sequence with the first deadline, which may preempt
all others, always finds its block, and with nothing running the head of the queue always fits. That the limit
is arithmetic known at admission, rather than what the pool happens to have left, also makes a sequence end at
the same token however it was batched. One that pools ends with its prompt, which may fill model and pool.

Invariants (`check` recomputes every one of them)
=================================================

    S1  Every live sequence is in exactly one of _running (RUNNING), _waiting (WAITING, PREEMPTED), _draining
        (ABORTED or FINISHED, in flight) and the followers of one in the first two (FOLLOWING).
    S2  _running and _waiting are in ascending order of (deadline, arrival).
    S3  A waiting sequence has no blocks, nothing computed and nothing scheduled; so has a follower.
    S4  A running sequence has computed less than it knows (there is always a next token to compute), is below
        its length limit (or pools: it is its prompt), and has blocks for what is computed and scheduled, but
        none beyond its known tokens.
    S5  At most max_num_seqs run.
    S6  The references in the pool are those of the running and the draining sequences.
    S7  The tokens scheduled are those of the step in flight, at most max_num_batched_tokens; with none in
        flight they are zero, and nothing drains.
    S8  A sequence that reports prompt logprobs has reported each computed position, the prompt's last
        excepted, and none twice (prompt_rows_done never falls; after a preemption it is ahead); so has one
        that pools all positions, without exception.
    S9  The blocks that scheduled tokens are written to have one holder.
    S10 The index knows a sequence's block by the hash of its tokens up to the block's end, or not at all; the
        first num_remembered blocks, all computed, were told.
    S11 One that has followers has no output.
    S12 The newest token of a sequence that is held is not in the step in flight.
    S13 Of a running sequence a draft model's cache holds no more than its tokens, the newest excepted, and
        while a step is in flight its draft; of one that waits, nothing. What the drafter believes of the
        blocks holds (`Drafter.check`).
    S14 Tokens are pending only while a step is assumed, each the newest of a running sequence.
"""

from libc.math cimport INFINITY, NAN, isnan
from libc.stdint cimport int32_t
from libcpp.algorithm cimport binary_search

from fastllm.errors import CapacityError, RequestError

from fastllm.engine.block_pool cimport BlockPool
from fastllm.engine.drafter cimport Drafter
from fastllm.engine.sequence cimport (
    FINISH_ABORT, FINISH_ERROR, FINISH_LENGTH, FINISH_NONE, FINISH_STOP, POOL_MEAN, POOL_NONE,
    SEQUENCE_ABORTED, SEQUENCE_FINISHED,
    SEQUENCE_FOLLOWING, SEQUENCE_NEW, SEQUENCE_PREEMPTED, SEQUENCE_RUNNING, SEQUENCE_WAITING, FinishReason,
    Sequence, SequenceState,
)
from fastllm.engine.step_batch cimport StepBatch
from fastllm.engine.step_cost cimport StepCost


cdef double DEVIATIONS = 2.0  # of the predictions, that steps stay below the target by
cdef double FOR_DECODES = 0.75  # of the target at most, if there are prompts to come
cdef Py_ssize_t STEPS_WITHOUT_PROMPTS = 32
cdef Py_ssize_t LEAST_PROMPT_TOKENS = 16


cdef class Scheduler:
    """Continuous batching with chunked prefill over a block pool, in the order of deadlines. Not thread-safe.

    Args:
        num_blocks, block_size: size of the KV cache (see `BlockPool`).
        max_num_seqs: most sequences running at once, >= 1.
        max_num_batched_tokens: most tokens in a step, >= 1.
        max_model_len: most tokens of a sequence, prompt included, >= 2.
        vocab_size: sampled ids must be below it.
        priority_interval: seconds of waiting that make up for one level of priority.
        drafter: guesses at tokens for sequences that decode; None: nothing is guessed.
        target_itl: seconds between two tokens of a sequence that steps are cut to, as far as `StepCost` can
            tell: chunks of prompts get what decodes leave of it, and nothing is admitted that would not leave
            room for them. 0: steps are as large as max_num_batched_tokens allows.

    Attributes:
        admitted, preempted: sequences that the last `schedule` moved, for whoever reports such things.
        num_prefix_queries, num_prefix_hits: prompt tokens that were looked up in the prefix index when their
            sequence was first admitted, and those found there. What a preempted sequence finds again counts
            in neither, nor do prompts of which every hidden state is wanted.
        offload: where blocks that the pool has evicted may be found again, an `Offload`; None: nowhere. Set
            it before the first sequence is added. Whoever runs the steps calls its `save` before each.
        num_restored_tokens: tokens whose blocks came back from there so far, those of preempted sequences
            too. Prompt tokens that came back when their sequence was first admitted are hits as well.
        num_preemptions: sequences preempted so far.
        num_drafts, num_draft_tokens, num_accepted_tokens: drafts that were computed, their tokens, and those
            of them that were right.
        num_accepted_at: the right ones by their place in the draft, as many counts as the longest run of
            right ones so far was long.
    """

    def __init__(
        self, *, Py_ssize_t num_blocks, Py_ssize_t block_size, Py_ssize_t max_num_seqs,
        Py_ssize_t max_num_batched_tokens, Py_ssize_t max_model_len, Py_ssize_t vocab_size,
        double priority_interval=10.0, Drafter drafter=None, double target_itl=0.0,
    ):
        for name, value, low in (
            ("max_num_seqs", max_num_seqs, 1), ("max_num_batched_tokens", max_num_batched_tokens, 1),
            ("max_model_len", max_model_len, 2), ("vocab_size", vocab_size, 1),
        ):
            if not low <= value < 2**31:
                raise RequestError(name, value, f"an integer in {low}..2**31-1")
        if not 0.0 <= priority_interval <= 1e9:
            raise RequestError("priority_interval", priority_interval, "seconds in 0..1e9")
        if not 0.0 <= target_itl <= 1e6:
            raise RequestError("target_itl", target_itl, "seconds in 0..1e6")
        self.target_itl = target_itl
        self.pool = BlockPool(num_blocks, block_size)
        self.priority_interval = priority_interval
        self.drafter = drafter
        self.cost = StepCost()
        if drafter is not None:
            drafter.attach(self.pool, self.cost, max_num_seqs, max_num_batched_tokens, vocab_size)
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.admitted = []
        self.preempted = []
        self._running = []
        self._waiting = []
        self._draining = []
        self._batches = (
            StepBatch(max_num_batched_tokens, max_num_seqs), StepBatch(max_num_batched_tokens, max_num_seqs)
        )

    @property
    def num_running(self):
        """Sequences that hold blocks and take part in steps."""
        return len(self._running)

    @property
    def num_waiting(self):
        """Sequences that do not run: those in the queue, preempted ones included, and followers."""
        return len(self._waiting) + self._num_following

    @property
    def num_accepted_at(self):
        """Drafted tokens that were right so far, by their place in the draft, tuple[int, ...]."""
        return tuple(self._accepted_at)

    @property
    def running(self):
        """The running sequences in the order of their deadlines, list[Sequence]."""
        return list(self._running)

    @property
    def waiting(self):
        """The queue in the order of deadlines, and then the followers, list[Sequence]."""
        found = list(self._waiting)
        for item in self._running + self._waiting:
            found += (<Sequence> item).followers
        return found

    def has_unfinished(self):
        """Whether anything runs or waits."""
        return len(self._running) > 0 or len(self._waiting) > 0

    def length_limit(self, Py_ssize_t num_prompt, max_tokens):
        """Tokens, prompt included, at which a sequence ends with "length" at the latest.

        Args:
            num_prompt: tokens of the prompt.
            max_tokens: tokens to generate at most, or None; 0 where it pools.

        Returns:
            min(num_prompt + max_tokens, max_model_len, pool tokens + 1): the newest token of a sequence is
            not in the cache, so a cache of 64 tokens serves 65.

        Raises:
            CapacityError: the prompt leaves no room for a token in the model's length, or does not fit into
                the whole pool.
        """
        cdef Py_ssize_t pool_tokens = self.pool.num_blocks * self.pool.block_size
        cdef Py_ssize_t model_tokens = self.max_model_len - (max_tokens != 0)
        if num_prompt > model_tokens:
            what = "prompt within the model length"
            if max_tokens != 0:
                what = f"prompt within a model length of {self.max_model_len} tokens, one of them to generate"
            raise CapacityError(
                what, asked=num_prompt, had=model_tokens, would_fit=min(model_tokens, pool_tokens),
                unit="prompt tokens",
            )
        if num_prompt > pool_tokens:
            raise CapacityError(
                f"prompt within a KV cache of {self.pool.num_blocks} blocks x {self.pool.block_size} tokens",
                asked=num_prompt, had=pool_tokens, would_fit=pool_tokens, unit="prompt tokens",
            )
        limit = min(self.max_model_len, pool_tokens + 1)
        return limit if max_tokens is None else min(limit, num_prompt + max_tokens)

    cpdef int add(self, Sequence sequence, double now=0.0, list followers=None) except -1:
        """NEW -> WAITING, and its followers NEW -> FOLLOWING.

        Args:
            sequence: a new sequence.
            now: when it arrived, in seconds; from it and the priority comes its deadline.
            followers: new sequences of the same prompt, priority and adapter.

        Raises:
            CapacityError: see `length_limit`. Nothing changed.
            RequestError: one of them is not new, or a follower has another prompt, priority or
                adapter. Nothing changed.
        """
        cdef Sequence item
        cdef list members = [sequence] if followers is None else [sequence, *followers]
        for item in members:
            if item.state_code != SEQUENCE_NEW:
                raise RequestError("sequence", item, "a sequence that was never added")
            if (item.tokens != sequence.tokens or item.priority != sequence.priority
                    or item.adapter != sequence.adapter):
                raise RequestError(
                    "followers", item, "sequences with the leader's prompt, priority and adapter"
                )
        limits = [
            self.length_limit(item.num_prompt, None if item.max_tokens < 0 else item.max_tokens)
            for item in members
        ]
        for item, limit in zip(members, limits):
            item.length_limit = limit
            item.arrival = self._arrivals
            item.deadline = now + self.priority_interval * item.priority
            self._arrivals += 1
            item.state_code = SEQUENCE_WAITING if item is sequence else SEQUENCE_FOLLOWING
        if followers:
            self._lead(sequence, list(followers))
        _insert(self._waiting, sequence)
        return 0

    cdef int _lead(self, Sequence sequence, list followers) except -1:
        cdef Sequence item
        sequence.followers = followers
        self._num_following += len(followers)
        for item in followers:
            item.leader = sequence
        return 0

    cpdef StepBatch schedule(self):
        """Choose the tokens of the next step.

        Returns:
            The batch, valid until the second schedule after this one; None when nothing is unfinished, when
            all that could go on is held (`Sequence.held`), or, with a step assumed, when it would take
            preempting.

        Raises:
            RuntimeError: the step before is still in flight.
        """
        if self.in_flight is not None:
            raise RuntimeError("schedule() needs update(), assume() or rollback() of the step before")
        self.admitted.clear()
        self.preempted.clear()
        if not self._running and not self._waiting:
            return None
        cdef StepBatch batch = <StepBatch> self._batches[self._turn]
        self._turn = 1 - self._turn
        cdef Py_ssize_t budget
        cdef bint room
        batch.begin()
        self.in_flight = batch
        try:
            if self._waiting and self.assumed is None:
                self._make_room()
            room = True
            budget = self._schedule_decodes(batch, self.max_num_batched_tokens, &room)
            if budget >= 0:
                self._schedule_prompts(batch, budget, room, self._seconds_for_prompts(batch))
            if batch.num_tokens == 0 or budget < 0:
                batch.undo_copies(self.pool)
                self._end_step()
                return None
            batch.seal()
        except BaseException:  # out of memory
            self.rollback()
            raise
        return batch

    cpdef bint assume(self) except -1:
        """Count the step in flight before its result is known, so that the next one can be scheduled.

        Returns:
            Whether that was done; else the step is in flight as before, and `update` comes next.

        Raises:
            RuntimeError: no step is in flight, or the one before is still assumed.
        """
        cdef StepBatch batch = self.in_flight
        cdef Sequence sequence
        cdef Py_ssize_t i
        if batch is None or self.assumed is not None:
            raise RuntimeError("assume() needs a step in flight, and none that is assumed")
        if not self._foreseen():
            return False
        for i in range(batch.num_seqs):
            sequence = <Sequence> batch.sequences[i]
            if sequence.state_code != SEQUENCE_RUNNING:
                continue
            batch.recall(i)
            sequence.prompt_rows_done += sequence.num_prompt_rows
            sequence.num_computed += sequence.num_scheduled
            sequence.num_scheduled = 0
            if sequence.num_new:
                sequence.tokens.push_back(-1 - <int32_t> (sequence.first_row + sequence.num_prompt_rows))
                sequence.pending = True
                sequence.held = <Py_ssize_t> sequence.tokens.size() >= sequence.length_limit  # it ends
        self._drop_ended()
        self.assumed = batch
        self.in_flight = None
        return True

    cdef bint _foreseen(self):
        """Whether what follows the step in flight depends on its tokens only by what they are."""
        cdef StepBatch batch = self.in_flight
        cdef Sequence sequence
        cdef Py_ssize_t i
        if self.drafter is not None or batch.num_hidden or batch.num_masks or batch.copies:
            return False
        if self._waiting and self._yields(len(self._running) - 1, <Sequence> self._waiting[0]):
            return False
        for i in range(batch.num_seqs):
            sequence = <Sequence> batch.sequences[i]
            if batch.shares[i].num_new and sequence.state_code == SEQUENCE_RUNNING:
                if sequence.followers or sequence.penalized or not sequence.bad_ends.empty():
                    return False
        return True

    cdef int _make_room(self) except -1:
        """Preempt for sequences at the head of the queue that are more important than running ones; only
        where that makes enough room."""
        cdef Sequence waiting
        cdef Py_ssize_t seats = 0
        cdef Py_ssize_t blocks = 0
        cdef Py_ssize_t hits, left
        cdef bint room
        while seats < len(self._waiting):
            waiting = <Sequence> self._waiting[seats]
            if not self._yields(len(self._running) - 1, waiting):
                return 0
            seats += 1
            room = self._has_room(seats, blocks + self._blocks_to_admit(waiting, &hits))
            if not room or not self._keeps_target(seats, len(self._running)):
                left = self._left_for(
                    waiting, seats, blocks + self.pool.blocks_for(<Py_ssize_t> waiting.tokens.size())
                )
                if left < 0:
                    return 0
                while len(self._running) > left:
                    self._preempt(<Sequence> self._running.pop())
            blocks += self._blocks_to_admit(waiting, &hits)
        return 0

    cdef bint _yields(self, Py_ssize_t place, Sequence waiting):
        """Whether there is a running sequence at a place that is preempted for a waiting one."""
        if place < 0:
            return False
        running = <Sequence> self._running[place]
        return running.priority > waiting.priority and _before(waiting, running)

    cdef Py_ssize_t _left_for(self, Sequence waiting, Py_ssize_t seats, Py_ssize_t blocks) except -2:
        """How many may go on running at most, so that so many sequences with so many blocks have room and
        keep the target; -1 if they do not even then. What others hold as well counts as taken."""
        cdef Sequence victim
        cdef Py_ssize_t left = len(self._running)
        cdef Py_ssize_t free = self.pool.num_free
        cdef Py_ssize_t i
        while (left + seats > self.max_num_seqs or blocks + left + seats - 1 > free
               or not self._keeps_target(seats, left)):
            if not self._yields(left - 1, waiting):
                return -1
            left -= 1
            victim = <Sequence> self._running[left]
            for i in range(<Py_ssize_t> victim.blocks.size()):
                free += self.pool.references[victim.blocks[i]] == 1
        return left

    cdef bint _has_room(self, Py_ssize_t seats, Py_ssize_t blocks):
        """Whether so many sequences with so many blocks can be admitted.

        One block for every running sequence must be free besides: else the next steps of those would soon
        preempt the newcomer, and its prompt would have been computed for nothing.
        """
        cdef Py_ssize_t running = len(self._running)
        return running + seats <= self.max_num_seqs and self.pool.can_allocate(blocks + running + seats - 1)

    cdef Py_ssize_t _blocks_to_admit(self, Sequence sequence, Py_ssize_t* hits) except -1:
        """Of the available blocks, how many admitting the sequence takes: new ones, and those of its known
        prefix that nobody holds. Sets `hits` to the blocks of that prefix.

        The last token is computed in any case, since the next one follows from it. Logprobs and hidden states
        of a prompt are not in the index: what reports them reads only what it has reported already.
        """
        cdef Py_ssize_t idle = 0
        cdef Py_ssize_t most = self._shareable_blocks(sequence)
        hits[0] = 0
        if sequence.root is not None:
            sequence.extend_hashes(most, self.pool.block_size)
            hits[0] = self.pool.find_prefix(sequence.hashes, most, &idle)
        return self.pool.blocks_for(<Py_ssize_t> sequence.tokens.size()) - hits[0] + idle

    cdef Py_ssize_t _shareable_blocks(self, Sequence sequence):
        """How many of its first blocks it need not compute where their contents are known."""
        cdef Py_ssize_t most = (<Py_ssize_t> sequence.tokens.size() - 1) // self.pool.block_size
        if sequence.root is None:
            return 0
        if sequence.reports_prompt():
            most = min(most, sequence.prompt_rows_done // self.pool.block_size)
        return most

    cdef Py_ssize_t _schedule_decodes(self, StepBatch batch, Py_ssize_t budget, bint* room) except -1:
        """Schedule the running sequences that have one token to compute: each gets what it needs for that,
        then drafts are made for all of them together. Returns the budget that is left; -2 if one would have
        to be preempted while a step is assumed, whose end may bring blocks.

        Only sequences behind the one at hand, or itself, are preempted: never one that has what it needs.
        """
        cdef Sequence sequence, victim
        cdef list decodes = []
        cdef Py_ssize_t i = 0
        while i < len(self._running) and len(decodes) < budget:
            sequence = <Sequence> self._running[i]
            i += 1
            if sequence.due() != 1:
                continue
            while not self._grow(batch, sequence, 1):
                if self.assumed is not None:
                    return -2
                room[0] = False
                victim = <Sequence> self._running.pop()
                self._preempt(victim)
                if victim is sequence:
                    break
            if sequence.state_code == SEQUENCE_RUNNING:
                decodes.append(sequence)
        if self.drafter is not None:
            self.drafter.seconds = 0.0
            if decodes:
                self.drafter.propose(
                    decodes, budget - len(self._running), len(self._running),
                    self._seconds_to_catch_up(decodes),
                )
        for item in decodes:
            sequence = <Sequence> item
            if not sequence.draft.empty():
                self.num_drafts += 1
                self.num_draft_tokens += <Py_ssize_t> sequence.draft.size()
            budget -= self._append(batch, sequence, 1 + <Py_ssize_t> sequence.draft.size())
        return budget

    cdef double _seconds_to_catch_up(self, list decodes):
        """What the target leaves beside decodes to a drafter that has to compute a prompt, too."""
        cdef double context = 0.0
        if self.target_itl == 0.0:
            return INFINITY
        for item in decodes:
            context += <double> (<Sequence> item).tokens.size()
        return self._reach() - self.cost.predict(len(decodes), len(decodes), context)

    cdef bint _grow(self, StepBatch batch, Sequence sequence, Py_ssize_t count) except -1:
        """Give a running sequence what it needs to compute `count` tokens: blocks of its own to write to.

        Returns whether there were enough. Only the first block written to may have other holders: those
        after it were never shared.
        """
        cdef Py_ssize_t held = <Py_ssize_t> sequence.blocks.size()
        cdef Py_ssize_t missing = max(self.pool.blocks_for(sequence.num_computed + count) - held, 0)
        cdef Py_ssize_t first = sequence.num_computed // self.pool.block_size
        cdef bint shared = first < held and self.pool.references[sequence.blocks[first]] > 1
        cdef int32_t before
        if not self.pool.can_allocate(missing + shared):
            return False
        if shared:
            before = sequence.blocks[first]
            sequence.blocks[first] = self.pool.take_private(before)
            batch.append_copy(sequence, first, before)
            # Only the executor copies: of such a block, the end of a prompt, a draft model has nothing yet.
            sequence.num_drafted = min(sequence.num_drafted, first * self.pool.block_size)
        self.pool.allocate_into(sequence.blocks, missing)
        return True

    cdef Py_ssize_t _append(self, StepBatch batch, Sequence sequence, Py_ssize_t count) except -1:
        batch.append(sequence, count, self.pool)
        sequence.num_scheduled = count
        return count

    cdef double _seconds_for_prompts(self, StepBatch batch):
        """What the target leaves for prompts beside the decodes in the batch; infinite without either.

        Every now and then prompts get a little even if nothing is left: sequences that decode for long, with
        a target that they alone exceed, hold the others up, but not for ever.
        """
        cdef double left
        if self.target_itl == 0.0 or batch.num_tokens == 0:
            self._steps_without_prompts = 0
            return INFINITY
        left = self._reach() - self.cost.predict(batch.num_tokens, batch.num_rows, batch.context)
        if self.drafter is not None:
            left -= self.drafter.seconds
        self._steps_without_prompts += 1
        if self._steps_without_prompts > STEPS_WITHOUT_PROMPTS:
            left = max(left, LEAST_PROMPT_TOKENS * self.cost.per_token(0.0))
        return left

    cdef double _reach(self):
        """The target, less what predictions are wrong by."""
        return max(self.target_itl - DEVIATIONS * self.cost.deviation, 0.5 * self.target_itl)

    cdef bint _keeps_target(self, Py_ssize_t newcomers, Py_ssize_t running):
        """Whether steps in which the first so many of the queue and of the running sequences decode leave
        something for prompts. A target that the last of the newcomers alone exceeds is no reason to wait.
        Before the first step nothing is known of any, and one sequence begins."""
        cdef Py_ssize_t count = running + newcomers
        cdef double context, most
        if self.target_itl == 0.0 or count == 1:
            return True
        if self.cost.num_steps == 0:
            return False
        most = FOR_DECODES * self._reach()
        context = <double> (<Sequence> self._waiting[newcomers - 1]).tokens.size()
        if self.cost.predict(1.0, 1.0, context) > most:
            return True
        for item in self._waiting[:newcomers - 1] + self._running[:running]:
            context += <double> (<Sequence> item).tokens.size()
        return self.cost.predict(count, count, context) <= most

    cdef int _schedule_prompts(
        self, StepBatch batch, Py_ssize_t budget, bint room, double seconds
    ) except -1:
        """Spend what is left of the budget, in tokens and in seconds, on chunks of prompts (or of what was
        preempted), running and waiting ones, by deadline. Without `room` nothing is admitted; nor is anything
        past a sequence that does not fit."""
        cdef Sequence sequence, head
        cdef list running = [item for item in self._running if (<Sequence> item).due() > 1]
        cdef Py_ssize_t i = 0
        cdef Py_ssize_t count
        cdef double price
        while budget > 0 and seconds > 0.0:
            sequence = <Sequence> running[i] if i < len(running) else None
            head = <Sequence> self._waiting[0] if room and self._waiting else None
            if head is not None and (sequence is None or _before(head, sequence)):
                room = self._admit(head)
                if not room:
                    continue
                sequence = head
            elif sequence is None:
                break
            else:
                i += 1
            count = min(sequence.due(), budget)
            if count <= 0:  # it is held, and all but its newest token was found in the index
                continue
            if seconds != INFINITY:
                price = self.cost.per_token(sequence.num_computed + 0.5 * count)
                if price > 0.0 and count * price > seconds:
                    count = max(<Py_ssize_t> (seconds / price), 1)
                seconds -= count * price
            self._steps_without_prompts = 0
            budget -= self._append(batch, sequence, count)
        return 0

    cdef bint _admit(self, Sequence sequence) except -1:
        """WAITING, PREEMPTED -> RUNNING for the head of the queue. Returns whether there was room."""
        cdef Py_ssize_t hits = 0
        cdef Py_ssize_t restored = 0
        cdef Py_ssize_t most
        if not self._has_room(1, self._blocks_to_admit(sequence, &hits)):
            return False
        if not self._keeps_target(1, len(self._running)):
            return False
        self.pool.take_prefix(sequence.hashes, hits, sequence.blocks)
        self.pool.allocate_into(
            sequence.blocks, self.pool.blocks_for(<Py_ssize_t> sequence.tokens.size()) - hits
        )
        if self.offload is not None:
            most = self._shareable_blocks(sequence)
            try:
                if hits < most:
                    restored = self.offload.restore(sequence.hashes[hits:most], sequence.block_ids[hits:most])
            except BaseException:  # Ctrl-C: it waits on
                self.pool.free_table(sequence.blocks)
                raise
        del self._waiting[0]
        sequence.num_remembered = hits
        sequence.num_computed = (hits + restored) * self.pool.block_size
        if restored:
            self.num_restored_tokens += restored * self.pool.block_size
            self._remember(sequence)
        if sequence.num_preemptions == 0 and sequence.root is not None and sequence.num_output == 0:
            sequence.num_cached = sequence.num_computed
            if sequence.pooling != POOL_MEAN:
                self.num_prefix_queries += sequence.num_prompt
                self.num_prefix_hits += sequence.num_cached
        sequence.state_code = SEQUENCE_RUNNING
        _insert(self._running, sequence)
        self.admitted.append(sequence)
        return True

    cdef int _preempt(self, Sequence sequence) except -1:
        """RUNNING -> PREEMPTED; the caller has taken it off the running ones."""
        self.pool.free_table(sequence.blocks)
        sequence.num_computed = 0
        sequence.num_remembered = 0
        sequence.num_drafted = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        sequence.state_code = SEQUENCE_PREEMPTED
        _insert(self._waiting, sequence)
        self.preempted.append(sequence)
        return 0

    cpdef list update(self, result):
        """Take in what the step in flight yielded; with a step assumed, what that one did.

        Args:
            result: a `StepResult`; tokens int32 (R,) is read here, the rest is the caller's.

        Returns:
            The sequences with rows in the step, list[Sequence], in the order of the rows. Of each, until the
            next schedule: `first_row`, `num_prompt_rows` (logprobs of prompt tokens, the first rows) and
            `num_new` (new tokens, one row each, after those); `finish_reason` and `stop_reason` when it
            ended. A row of token -1 had logits that are not numbers: its sequence ends with "error" and no
            new token. Of one that pools the rows are hidden states, those from line `first_hidden` on.

        Raises:
            RuntimeError: no step is in flight.
            ValueError: the result does not fit the batch. The step is still in flight.
        """
        cdef StepBatch batch = self.in_flight if self.assumed is None else self.assumed
        if batch is None:
            raise RuntimeError("update() needs a step in flight")
        cdef const int32_t[::1] tokens = result.tokens
        cdef Sequence sequence
        cdef FinishReason reason
        cdef Py_ssize_t i, row
        cdef bint ended = False
        cdef bint leads
        if tokens.shape[0] != batch.num_rows:
            raise ValueError(f"a result of {tokens.shape[0]} rows for a batch of {batch.num_rows}")
        if batch.num_hidden and len(result.hidden) != batch.num_hidden:
            raise ValueError(f"{len(result.hidden)} hidden states for a batch of {batch.num_hidden}")
        for row in range(batch.num_rows):
            if tokens[row] < -1 or tokens[row] >= self.vocab_size:
                raise ValueError(f"row {row} yields token {tokens[row]} of a vocabulary of {self.vocab_size}")
        if self.assumed is not None:
            return self._resolve(tokens)
        cdef list moved = []
        cdef list forked = []
        for i in range(batch.num_seqs):
            sequence = <Sequence> batch.sequences[i]
            if sequence.state_code != SEQUENCE_RUNNING:  # it has ended meanwhile
                continue
            batch.recall(i)
            sequence.prompt_rows_done += sequence.num_prompt_rows
            leads = sequence.num_new > 0 and len(sequence.followers) > 0
            if sequence.pooling != POOL_NONE:
                reason = self._take_hidden(sequence, tokens)
            else:
                reason = self._take_tokens(sequence, tokens)
            if sequence.draft.empty():
                sequence.num_computed += sequence.num_scheduled
            else:  # what came after a wrong guess is computed again
                sequence.num_computed = <Py_ssize_t> sequence.tokens.size() - 1
            sequence.num_scheduled = 0
            if sequence.root is not None:
                self._remember(sequence)
            followers = self._release_followers(sequence) if leads else ()
            ended |= self._settle(sequence, reason, moved)
            for item in followers:
                reason = self._take_tokens(<Sequence> item, tokens)
                self._settle(<Sequence> item, reason, moved)
            if leads:
                forked += followers
        if self.drafter is not None and batch.num_prefill_tokens == 0 and self._seconds > 0.0:
            self.drafter.judge(
                batch.num_seqs, batch.num_draft_tokens, self._made_of(batch), batch.context, self._seconds
            )
        self._end_step()
        if ended:
            self._drop_retired()
        for item in forked:
            self._seat(<Sequence> item)
        return moved

    cdef list _resolve(self, const int32_t[::1] tokens):
        """Put the tokens of the assumed step in, where the next one may be in flight."""
        cdef StepBatch batch = self.assumed
        cdef Sequence sequence
        cdef list moved = []
        cdef bint ended = False
        cdef Py_ssize_t i
        self.assumed = None
        for i in range(batch.num_seqs):
            sequence = <Sequence> batch.sequences[i]
            if sequence.pending:
                self._forget_pending(sequence)
            if sequence.state_code != SEQUENCE_RUNNING or sequence.pooling != POOL_NONE:
                continue
            batch.recall(i)
            reason = self._take_tokens(sequence, tokens)
            if sequence.root is not None:
                self._remember(sequence)
            ended |= self._settle(sequence, reason, moved)
        batch.sequences.clear()
        if ended:
            self._drop_retired()
        return moved

    cdef int _forget_pending(self, Sequence sequence) except -1:
        sequence.tokens.pop_back()
        sequence.pending = sequence.held = False
        return 0

    cdef int _drop_retired(self) except -1:
        """Only who runs is among the running ones."""
        self._running = [
            item for item in self._running if (<Sequence> item).state_code == SEQUENCE_RUNNING
        ]
        return 0

    cdef Py_ssize_t _made_of(self, StepBatch batch):
        """New tokens of the sequences of a step."""
        cdef Py_ssize_t made = 0
        for item in batch.sequences:
            made += (<Sequence> item).num_new
        return made

    cdef int _remember(self, Sequence sequence) except -1:
        """Tell the prefix index about the blocks that have become full."""
        cdef Py_ssize_t size = self.pool.block_size
        cdef Py_ssize_t full = sequence.num_computed // size
        cdef Py_ssize_t i, j
        if full == sequence.num_remembered:
            return 0
        sequence.extend_hashes(full, size)
        for i in range(sequence.num_remembered, full):
            is_new = self.pool.remember(sequence.blocks[i], <bytes> sequence.hashes[i])
            if is_new and self.pool.events is not None:
                before = sequence.hashes[i - 1] if i else sequence.root
                tokens = [sequence.tokens[j] for j in range(i * size, (i + 1) * size)]
                self.pool.events.append((sequence.hashes[i], before, tokens))
        sequence.num_remembered = full
        return 0

    cdef list _release_followers(self, Sequence leader):
        """The prompt is computed: the followers are on their own, each with the leader's blocks."""
        cdef Sequence follower
        cdef list followers = leader.followers
        leader.followers = []
        self._num_following -= len(followers)
        for follower in followers:
            follower.leader = None
            follower.state_code = SEQUENCE_RUNNING
            self.pool.fork_table(leader.blocks, follower.blocks)
            follower.hashes = list(leader.hashes)
            follower.num_computed = leader.num_computed
            follower.num_remembered = leader.num_remembered
        return followers

    cdef int _seat(self, Sequence follower) except -1:
        """Put a follower that is on its own among the running ones, or in the queue if there is no seat."""
        if follower.state_code != SEQUENCE_RUNNING:  # its first token ended it
            return 0
        if len(self._running) < self.max_num_seqs:
            _insert(self._running, follower)
            return 0
        self.pool.free_table(follower.blocks)
        follower.num_computed = follower.num_remembered = 0
        follower.state_code = SEQUENCE_WAITING
        _insert(self._waiting, follower)
        return 0

    cdef FinishReason _take_tokens(self, Sequence sequence, const int32_t[::1] tokens):
        """The tokens of its sample rows: the first, and those after drafted ones that were guessed right.
        Sets num_new to their number. Returns whether the last of them ends it."""
        cdef FinishReason reason = FINISH_NONE
        cdef Py_ssize_t drafted = <Py_ssize_t> sequence.draft.size()
        cdef Py_ssize_t first = sequence.first_row + sequence.num_prompt_rows
        cdef Py_ssize_t made = 0
        cdef Py_ssize_t right = 0
        cdef Py_ssize_t place
        cdef int32_t token
        while made < sequence.num_new and reason == FINISH_NONE:
            token = tokens[first + made]
            if token < 0:
                if made == 0:
                    reason = FINISH_ERROR
                break  # else the next step ends it
            sequence.tokens.push_back(token)
            reason = self._finish_of(sequence)
            made += 1
            if made > drafted or token != sequence.draft[made - 1]:
                break
            right += 1
        self.num_accepted_tokens += right
        if <Py_ssize_t> self._accepted_at.size() < right:
            self._accepted_at.resize(right)
        for place in range(right):
            self._accepted_at[place] += 1
        if made and self.drafter is not None:
            if drafted == 0:  # what might have been is held against what came
                self.drafter.learn(sequence, 1, sequence.tokens.back() == sequence.guess)
            else:  # what comes after the end was neither right nor wrong
                self.drafter.learn(sequence, drafted if right < made else right, right)
        sequence.num_new = made
        return reason

    cdef bint _settle(self, Sequence sequence, FinishReason reason, list moved) except -1:
        """After its tokens were taken. Returns whether it ended."""
        if reason != FINISH_NONE:
            self._leave(sequence, SEQUENCE_FINISHED, reason)
        if sequence.num_new or sequence.num_prompt_rows or reason == FINISH_ERROR:
            moved.append(sequence)
        return reason != FINISH_NONE

    cdef FinishReason _take_hidden(self, Sequence sequence, const int32_t[::1] tokens):
        """One that pools has computed a chunk: whether that ends it, and why."""
        cdef Py_ssize_t row
        for row in range(sequence.first_row, sequence.first_row + sequence.num_prompt_rows):
            if tokens[row] < 0:
                return FINISH_ERROR
        if sequence.num_computed + sequence.num_scheduled == sequence.num_prompt:
            return FINISH_STOP
        return FINISH_NONE

    cpdef tuple intervals(self, list moved, double now):
        """How long sequences have waited for the tokens that they have now. Once after an update.

        Args:
            moved: what `update` returned.
            now: when the tokens were known, in seconds.

        Returns:
            The number of new tokens, and a dict of how many sequences have waited how many seconds since
            their tokens before (which for most is the same step). First tokens are in the number alone.
        """
        cdef Sequence sequence
        cdef Py_ssize_t made = 0
        cdef Py_ssize_t alike = 0
        cdef double before = NAN
        cdef dict found = {}
        for item in moved:
            sequence = <Sequence> item
            if sequence.num_new == 0:
                continue
            made += sequence.num_new
            if sequence.last_token_time == before:
                alike += 1
            elif not isnan(sequence.last_token_time):
                if alike:
                    found[now - before] = found.get(now - before, 0) + alike
                before = sequence.last_token_time
                alike = 1
            sequence.last_token_time = now
        if alike:
            found[now - before] = found.get(now - before, 0) + alike
        return made, found

    cpdef int observe(self, double seconds) except -1:
        """Say what the step in flight took to compute, before its update."""
        cdef StepBatch batch = self.in_flight if self.assumed is None else self.assumed
        if batch is not None:
            self._seconds = seconds
            self.cost.observe(batch.num_tokens, batch.num_rows - batch.num_hidden, batch.context, seconds)
        return 0

    cpdef int rollback(self) except -1:
        """Forget the step in flight and the one assumed, if there are any; what they would have computed is
        scheduled again."""
        if self.in_flight is not None:
            self.in_flight.undo_copies(self.pool)
            self._end_step()
        if self.assumed is not None:
            self._withdraw()
        return 0

    cdef int _withdraw(self) except -1:
        """The assumed step is one that never was."""
        cdef StepBatch batch = self.assumed
        cdef Sequence sequence
        cdef Py_ssize_t i
        for i in range(batch.num_seqs):
            sequence = <Sequence> batch.sequences[i]
            if sequence.pending:
                self._forget_pending(sequence)
            if sequence.state_code == SEQUENCE_RUNNING:
                sequence.num_computed -= batch.shares[i].num_tokens
                sequence.prompt_rows_done -= batch.shares[i].num_prompt_rows
                self.pool.truncate_table(
                    sequence.blocks, self.pool.blocks_for(<Py_ssize_t> sequence.tokens.size())
                )
        batch.sequences.clear()
        self.assumed = None
        return 0

    @property
    def moot(self):
        """Whether a step is in flight of which nobody waits for anything any more."""
        if self.in_flight is None:
            return False
        for item in self.in_flight.sequences:
            if (<Sequence> item).state_code == SEQUENCE_RUNNING:
                return False
        return True

    cpdef int finish(self, Sequence sequence, stop_reason=None) except -1:
        """End a sequence for a reason that the scheduler cannot see, such as a stop string.

        RUNNING -> FINISHED with "stop"; one that ended at the same token by itself gets the reason changed.
        Not while a token is pending.
        """
        if self.assumed is not None:
            raise RuntimeError("finish() needs update() of the step that is assumed")
        if sequence.state_code == SEQUENCE_FINISHED:
            sequence.finish_code = FINISH_STOP
        elif sequence.state_code == SEQUENCE_RUNNING:
            self._running.remove(sequence)
            if sequence.followers:
                self._succeed(sequence)
            self._leave(sequence, SEQUENCE_FINISHED, FINISH_STOP)
        elif sequence.state_code == SEQUENCE_WAITING and sequence.num_output:  # it followed, without a seat
            self._waiting.remove(sequence)
            self._retire(sequence, SEQUENCE_FINISHED, FINISH_STOP)
        else:
            raise RequestError("sequence", sequence, "a running sequence, or one that just finished")
        sequence.stop_reason = stop_reason
        return 0

    cpdef int abort(self, Sequence sequence) except -1:
        """End a sequence in any state; one that has ended already stays as it is. If it has followers, the
        first of them leads the others from now on."""
        if sequence.state_code == SEQUENCE_WAITING or sequence.state_code == SEQUENCE_PREEMPTED:
            self._waiting.remove(sequence)
        elif sequence.state_code == SEQUENCE_FOLLOWING:
            sequence.leader.followers.remove(sequence)
            sequence.leader = None
            self._num_following -= 1
        elif sequence.state_code == SEQUENCE_RUNNING:
            self._running.remove(sequence)
        elif sequence.state_code != SEQUENCE_NEW:
            return 0
        if sequence.followers:
            self._succeed(sequence)
        return self._leave(sequence, SEQUENCE_ABORTED, FINISH_ABORT)

    cdef int _succeed(self, Sequence leader) except -1:
        """The first follower takes the place of a leader that goes."""
        cdef list followers = leader.followers
        cdef Sequence heir = <Sequence> followers[0]
        leader.followers = []
        self._num_following -= len(followers)
        heir.leader = None
        heir.state_code = SEQUENCE_WAITING
        self._lead(heir, followers[1:])
        _insert(self._waiting, heir)
        return 0

    cdef FinishReason _finish_of(self, Sequence sequence):
        """Why the newest token ends the sequence, if it does."""
        cdef int32_t token = sequence.tokens.back()
        if <Py_ssize_t> sequence.tokens.size() - 1 - sequence.num_prompt >= sequence.min_tokens:
            if binary_search(sequence.eos_ids.begin(), sequence.eos_ids.end(), token):
                return FINISH_STOP
            if binary_search(sequence.stop_ids.begin(), sequence.stop_ids.end(), token):
                sequence.stop_reason = token
                return FINISH_STOP
        if <Py_ssize_t> sequence.tokens.size() >= sequence.length_limit:
            return FINISH_LENGTH
        return FINISH_NONE

    cdef int _leave(self, Sequence sequence, SequenceState state, FinishReason reason) except -1:
        """End a sequence that is off every list, or will be at once. Where a step in flight writes to its
        blocks they are given up when that is over."""
        if sequence.num_scheduled == 0:
            return self._retire(sequence, state, reason)
        sequence.state_code = state
        sequence.finish_code = reason
        self._draining.append(sequence)
        return 0

    cdef int _retire(self, Sequence sequence, SequenceState state, FinishReason reason) except -1:
        """Give up the blocks of a sequence that is off every list, or will be at once."""
        self.pool.free_table(sequence.blocks)
        sequence.state_code = state
        sequence.finish_code = reason
        sequence.num_scheduled = 0
        return 0

    cdef int _end_step(self) except -1:
        """No step is in flight any more: nothing is scheduled, and what drained is gone."""
        cdef Sequence sequence
        for item in self.in_flight.sequences:
            sequence = <Sequence> item
            sequence.num_scheduled = 0
            if not sequence.draft.empty():
                sequence.draft.clear()
                self.pool.truncate_table(
                    sequence.blocks, self.pool.blocks_for(<Py_ssize_t> sequence.tokens.size())
                )
            # Past the known tokens the draft model's cache holds guesses; the newest is computed again.
            sequence.num_drafted = min(sequence.num_drafted, <Py_ssize_t> sequence.tokens.size() - 1)
        self._drop_ended()
        self.in_flight.sequences.clear()
        self.in_flight = None
        self._seconds = 0.0
        return 0

    cdef int _drop_ended(self) except -1:
        """What drained is gone: no later step is chosen before the one that it was in."""
        cdef Sequence sequence
        for item in self._draining:
            sequence = <Sequence> item
            sequence.num_scheduled = 0
            self.pool.free_table(sequence.blocks)
        self._draining.clear()
        return 0

    def check(self):
        """Recompute the invariants from scratch.

        Raises:
            AssertionError: an invariant is broken; the message begins with its number.
        """
        cdef Sequence sequence, follower, previous
        cdef Py_ssize_t scheduled = 0
        cdef Py_ssize_t following = 0
        cdef Py_ssize_t i
        states = {
            "running": ("running",), "waiting": ("waiting", "preempted"), "draining": ("aborted", "finished"),
        }
        lists = (("running", self._running), ("waiting", self._waiting), ("draining", self._draining))
        seen = set()
        for name, members in lists:
            previous = None
            for sequence in members:
                _require("S1", id(sequence) not in seen, sequence, "is listed twice")
                seen.add(id(sequence))
                _require("S1", sequence.state in states[name], sequence, f"is among the {name}")
                scheduled += sequence.num_scheduled
                if name == "draining":
                    _require("S7", sequence.num_scheduled > 0, sequence, "drains without being in flight")
                    _require("S1", not sequence.followers, sequence, "drains and has followers")
                    continue
                in_order = previous is None or _before(previous, sequence)
                _require("S2", in_order, sequence, "is out of the order of deadlines")
                previous = sequence
                for follower in sequence.followers:
                    following += 1
                    _require("S1", id(follower) not in seen, follower, "is listed twice")
                    seen.add(id(follower))
                    _require("S1", follower.state == "following", follower, "is among the followers")
                    _require("S1", follower.leader is sequence, follower, "has another leader")
                    empty = follower.blocks.empty() and follower.num_computed + follower.num_scheduled == 0
                    _require("S3", empty, follower, "follows, but holds something")
                leads = not sequence.followers or sequence.num_output == 0
                _require("S11", leads, sequence, "has output and followers")
        _require("S1", following == self._num_following, None, f"{self._num_following} followers counted")
        for sequence in self._waiting:
            empty = sequence.blocks.empty() and sequence.num_computed == 0 and sequence.num_scheduled == 0
            _require("S3", empty, sequence, "waits, but holds something")
            _require("S13", sequence.num_drafted == 0, sequence, "waits, but is in the draft model's cache")
        for sequence in self._running:
            known = <Py_ssize_t> sequence.tokens.size()
            held = <Py_ssize_t> sequence.blocks.size()
            _require("S4", sequence.num_computed < known, sequence, "has no next token to compute")
            limit = sequence.length_limit + (sequence.pooling != POOL_NONE)
            _require("S4", known - sequence.pending < limit, sequence, "is at its length limit")
            stands = sequence.tokens.back() < 0
            _require("S14", sequence.pending == stands, sequence, "has a token that is not known")
            assumed = self.assumed is not None and sequence in self.assumed.sequences
            _require("S14", assumed or not stands, sequence, "waits for a token of no step")
            waits = not sequence.held or sequence.num_computed + sequence.num_scheduled < known
            _require("S12", waits, sequence, "is held, but its newest token is scheduled")
            least = self.pool.blocks_for(sequence.num_computed + sequence.num_scheduled)
            fits = least <= held <= max(least, self.pool.blocks_for(known))
            _require("S4", fits, sequence, "has too few or too many blocks")
            first = sequence.num_computed // self.pool.block_size
            for i in range(first, least if sequence.num_scheduled else first):
                own = self.pool.references[sequence.blocks[i]] == 1
                _require("S9", own, sequence, f"writes to block {sequence.blocks[i]}, which is shared")
            _require("S10", sequence.num_remembered <= first, sequence, "has told of blocks not yet full")
            for i in range(held):
                content = self.pool.hash_of(sequence.blocks[i])
                right = content is None or (i < len(sequence.hashes) and sequence.hashes[i] == content)
                _require("S10", right, sequence, f"has block {sequence.blocks[i]}, known by another hash")
            most = known - 1 if sequence.num_scheduled == 0 else known + <Py_ssize_t> sequence.draft.size()
            held = sequence.num_drafted
            _require("S13", held <= most, sequence, f"has {held} tokens in the draft model's cache")
        if self.drafter is not None:
            self.drafter.check(self._running)
        _require("S5", len(self._running) <= self.max_num_seqs, None, f"{len(self._running)} sequences run")
        self.pool.check([sequence.block_ids for sequence in (*self._running, *self._draining)])
        if self.in_flight is None:
            _require("S7", scheduled == 0, None, f"{scheduled} tokens are scheduled, no step is in flight")
        else:
            total = self.in_flight.num_tokens
            _require("S7", scheduled == total, None, f"{scheduled} tokens scheduled, {total} in the batch")
            _require("S7", 0 < total <= self.max_num_batched_tokens, None, f"a step of {total} tokens")
        for sequence in (*self._running, *self._waiting):
            if sequence.reports_prompt():
                due = min(sequence.num_computed, sequence.num_prompt - (sequence.pooling == POOL_NONE))
                done = sequence.prompt_rows_done
                exact = done == due if sequence.num_preemptions == 0 else due <= done < sequence.num_prompt
                _require("S8", exact, sequence, f"has reported {done} of its prompt, {due} are due")


cdef bint _before(Sequence one, Sequence other) noexcept:
    """Whether one is served before the other."""
    if one.deadline != other.deadline:
        return one.deadline < other.deadline
    return one.arrival < other.arrival


cdef int _insert(list sequences, Sequence sequence) except -1:
    """Insert where it belongs in the order of deadlines, most often at the end."""
    cdef Py_ssize_t i = len(sequences)
    while i > 0 and _before(sequence, <Sequence> sequences[i - 1]):
        i -= 1
    sequences.insert(i, sequence)
    return 0


def _require(number, condition, sequence, text):
    if not condition:
        raise AssertionError(f"{number}: {'' if sequence is None else sequence!r} {text}")
