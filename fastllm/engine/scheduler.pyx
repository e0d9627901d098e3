# cython: auto_pickle=False, autotestdict=False, boundscheck=False, wraparound=False
# distutils: language = c++
"""Continuous batching: which tokens of which sequences the next step computes.

`schedule` and `update` take turns. Each step has one budget of max_num_batched_tokens, shared by decodes (one
token each) and chunks of prompts. Running sequences come first, in order of arrival, then waiting ones in
order of arrival for as long as budget, max_num_seqs and blocks last. A sequence gets the blocks for all its
known tokens when it is admitted, then one block at a time as it grows.

When a running sequence needs a block and none is free, the running sequence that arrived last is preempted:
it gives up all its blocks and returns to the head of the queue; later all its tokens, prompt and output, are
computed again as if they were a prompt. Since the executor's arithmetic does not depend on how tokens are
batched, that changes no token that follows.

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

    from       to         function                     when                          blocks
    ---------  ---------  ---------------------------  ----------------------------  -------------------------
    NEW        WAITING    add                          it can fit                    none
    WAITING    RUNNING    schedule, _admit_waiting     seat, budget, blocks free     for all its known tokens
    PREEMPTED  RUNNING    schedule, _admit_waiting     the same                      the same
    RUNNING    RUNNING    schedule, _schedule_running  it grows                      one more where one begins
    RUNNING    PREEMPTED  schedule, _preempt           an earlier one (or itself)    freed; num_computed is 0
                                                       needs a block, none is free
    RUNNING    FINISHED   update                       stop token or length limit    freed
    RUNNING    FINISHED   update                       no number where logits ought  freed
                                                       to be ("error")
    RUNNING    FINISHED   finish                       stop string (the caller's)    freed
    NEW,       ABORTED    abort                        any time                      had none
    WAITING,
    PREEMPTED
    RUNNING    ABORTED    abort                        no step in flight             freed
    RUNNING    ABORTED    abort                        its step is in flight         freed by update, rollback

    A step is in flight between schedule and update (or rollback, which forgets it: nothing was counted yet,
    and the next schedule gives the same tokens again).

Nothing waits for ever, and nothing deadlocks
=============================================

A sequence ends at the latest with length_limit = min(prompt + max_tokens, max_model_len, pool tokens + 1)
tokens; the newest token is never in the cache, so it needs at most length_limit - 1 <= pool tokens. `add`
refuses a prompt that is not below that. So the earliest running sequence, which may preempt all others,
always finds its block, and with nothing running the head of the queue always fits. That the limit is
arithmetic known at admission, rather than what the pool happens to have left, also makes a sequence end at
the same token however it was batched.

Invariants (`check` recomputes every one of them)
=================================================

    S1  Every live sequence is in exactly one of _running (RUNNING), _waiting (WAITING, PREEMPTED) and
        _draining (ABORTED, in flight).
    S2  _running and _waiting are in ascending order of arrival, and every running sequence arrived before
        every waiting one.
    S3  A waiting sequence has no blocks, nothing computed and nothing scheduled.
    S4  A running sequence has computed less than it knows (there is always a next token to compute), is below
        its length limit, and has blocks for what is computed and scheduled, but none beyond its known tokens.
    S5  At most max_num_seqs run.
    S6  The references in the pool are those of the running and the draining sequences.
    S7  The tokens scheduled are those of the step in flight, at most max_num_batched_tokens; with none in
        flight they are zero, and nothing drains.
    S8  A sequence that reports prompt logprobs has reported each computed position, the prompt's last
        excepted, and none twice (prompt_logprobs_done never falls; after a preemption it is ahead).
"""

from collections import deque
from libc.stdint cimport int32_t
from libcpp.algorithm cimport binary_search

from fastllm.errors import CapacityError, RequestError

from fastllm.engine.block_pool cimport BlockPool
from fastllm.engine.sequence cimport (
    FINISH_ABORT, FINISH_ERROR, FINISH_LENGTH, FINISH_NONE, FINISH_STOP, SEQUENCE_ABORTED, SEQUENCE_FINISHED,
    SEQUENCE_NEW, SEQUENCE_PREEMPTED, SEQUENCE_RUNNING, SEQUENCE_WAITING, FinishReason, Sequence,
    SequenceState,
)
from fastllm.engine.step_batch cimport StepBatch


cdef class Scheduler:
    """First-come continuous batching with chunked prefill over a block pool. Not thread-safe.

    Args:
        num_blocks, block_size: size of the KV cache (see `BlockPool`).
        max_num_seqs: most sequences running at once, >= 1.
        max_num_batched_tokens: most tokens in a step, >= 1.
        max_model_len: most tokens of a sequence, prompt included, >= 2.
        vocab_size: sampled ids must be below it.

    Attributes:
        admitted, preempted: sequences that the last `schedule` moved, for whoever reports such things.
    """

    def __init__(
        self, *, Py_ssize_t num_blocks, Py_ssize_t block_size, Py_ssize_t max_num_seqs,
        Py_ssize_t max_num_batched_tokens, Py_ssize_t max_model_len, Py_ssize_t vocab_size,
    ):
        for name, value, low in (
            ("max_num_seqs", max_num_seqs, 1), ("max_num_batched_tokens", max_num_batched_tokens, 1),
            ("max_model_len", max_model_len, 2), ("vocab_size", vocab_size, 1),
        ):
            if not low <= value < 2**31:
                raise RequestError(name, value, f"an integer in {low}..2**31-1")
        self.pool = BlockPool(num_blocks, block_size)
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.admitted = []
        self.preempted = []
        self._running = []
        self._waiting = deque()
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
        """Sequences in the queue, preempted ones included."""
        return len(self._waiting)

    @property
    def running(self):
        """The running sequences in order of arrival, list[Sequence]."""
        return list(self._running)

    @property
    def waiting(self):
        """The queue, list[Sequence]."""
        return list(self._waiting)

    def has_unfinished(self):
        """Whether anything runs or waits."""
        return len(self._running) > 0 or len(self._waiting) > 0

    def length_limit(self, Py_ssize_t num_prompt, max_tokens):
        """Tokens, prompt included, at which a sequence ends with "length" at the latest.

        Args:
            num_prompt: tokens of the prompt.
            max_tokens: tokens to generate at most, or None.

        Returns:
            min(num_prompt + max_tokens, max_model_len, pool tokens + 1): the newest token of a sequence is
            not in the cache, so a cache of 64 tokens serves 65.

        Raises:
            CapacityError: the prompt leaves no room for a token in the model's length, or does not fit into
                the whole pool.
        """
        cdef Py_ssize_t pool_tokens = self.pool.num_blocks * self.pool.block_size
        if num_prompt >= self.max_model_len:
            raise CapacityError(
                f"prompt within a model length of {self.max_model_len} tokens, one of them to generate",
                asked=num_prompt, had=self.max_model_len - 1, would_fit=self.max_model_len - 1,
                unit="prompt tokens",
            )
        if num_prompt > pool_tokens:
            raise CapacityError(
                f"prompt within a KV cache of {self.pool.num_blocks} blocks x {self.pool.block_size} tokens",
                asked=num_prompt, had=pool_tokens, would_fit=pool_tokens, unit="prompt tokens",
            )
        limit = min(self.max_model_len, pool_tokens + 1)
        return limit if max_tokens is None else min(limit, num_prompt + max_tokens)

    cpdef int add(self, Sequence sequence) except -1:
        """NEW -> WAITING. Raises CapacityError (see `length_limit`), and nothing changed."""
        if sequence.state_code != SEQUENCE_NEW:
            raise RequestError("sequence", sequence, "a sequence that was never added")
        sequence.length_limit = self.length_limit(
            sequence.num_prompt, None if sequence.max_tokens < 0 else sequence.max_tokens
        )
        sequence.arrival = self._arrivals
        self._arrivals += 1
        sequence.state_code = SEQUENCE_WAITING
        self._waiting.append(sequence)
        return 0

    cpdef StepBatch schedule(self):
        """Choose the tokens of the next step.

        Returns:
            The batch, valid until the second schedule after this one; None when nothing is unfinished.

        Raises:
            RuntimeError: the step before is still in flight.
        """
        if self.in_flight is not None:
            raise RuntimeError("schedule() needs update() or rollback() of the step before")
        self.admitted.clear()
        self.preempted.clear()
        if not self._running and not self._waiting:
            return None
        cdef StepBatch batch = <StepBatch> self._batches[self._turn]
        self._turn = 1 - self._turn
        cdef Py_ssize_t budget
        batch.begin()
        self.in_flight = batch
        try:
            budget = self._schedule_running(batch, self.max_num_batched_tokens)
            if not self.preempted:
                self._admit_waiting(batch, budget)
            batch.seal()
        except BaseException:  # out of memory
            self.rollback()
            raise
        return batch

    cdef Py_ssize_t _schedule_running(self, StepBatch batch, Py_ssize_t budget) except -1:
        """Schedule the running sequences in order of arrival. Returns the budget that is left.

        Only sequences behind the one at hand, or itself, are preempted: never one in the batch already.
        """
        cdef Sequence sequence, victim
        cdef Py_ssize_t i = 0
        cdef Py_ssize_t count, missing
        while i < len(self._running) and budget > 0:
            sequence = <Sequence> self._running[i]
            count = min(<Py_ssize_t> sequence.tokens.size() - sequence.num_computed, budget)
            missing = (
                self.pool.blocks_for(sequence.num_computed + count) - <Py_ssize_t> sequence.blocks.size()
            )
            if missing > 0:
                while not self.pool.can_allocate(missing):
                    victim = <Sequence> self._running.pop()
                    self._preempt(victim)
                    if victim is sequence:
                        return budget
                self.pool.allocate_into(sequence.blocks, missing)
            batch.append(sequence, count, self.pool)
            sequence.num_scheduled = count
            budget -= count
            i += 1
        return budget

    cdef Py_ssize_t _admit_waiting(self, StepBatch batch, Py_ssize_t budget) except -1:
        """Admit waiting sequences, strictly in order: one that does not fit keeps those behind it waiting.

        Besides the blocks of the sequence, one block for every running sequence must be free: else the next
        steps of those would soon preempt the newcomer, and its prompt would have been computed for nothing.
        """
        cdef Sequence sequence
        cdef Py_ssize_t count, needed
        while budget > 0 and self._waiting and len(self._running) < self.max_num_seqs:
            sequence = <Sequence> self._waiting[0]
            needed = self.pool.blocks_for(<Py_ssize_t> sequence.tokens.size())
            if not self.pool.can_allocate(needed + len(self._running)):
                break
            self._waiting.popleft()
            self.pool.allocate_into(sequence.blocks, needed)
            sequence.state_code = SEQUENCE_RUNNING
            self._running.append(sequence)
            self.admitted.append(sequence)
            count = min(<Py_ssize_t> sequence.tokens.size(), budget)
            batch.append(sequence, count, self.pool)
            sequence.num_scheduled = count
            budget -= count
        return budget

    cdef int _preempt(self, Sequence sequence) except -1:
        """RUNNING -> PREEMPTED; the caller has taken it off the running ones."""
        self.pool.free_table(sequence.blocks)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        sequence.state_code = SEQUENCE_PREEMPTED
        self._waiting.appendleft(sequence)
        self.preempted.append(sequence)
        return 0

    cpdef list update(self, result):
        """Take in what the step in flight yielded.

        Args:
            result: a `StepResult`; tokens int32 (R,) is read here, the rest is the caller's.

        Returns:
            The sequences with rows in the step, list[Sequence], in order of arrival. Of each, until the next
            schedule: `first_row`, `num_prompt_rows` (logprobs of prompt tokens, the first rows) and `num_new`
            (new tokens, one row each, after those); `finish_reason` and `stop_reason` when it ended. A row
            of token -1 had logits that are not numbers: its sequence ends with "error" and no new token.

        Raises:
            RuntimeError: no step is in flight.
            ValueError: the result does not fit the batch. The step is still in flight.
        """
        cdef StepBatch batch = self.in_flight
        if batch is None:
            raise RuntimeError("update() needs a step in flight")
        cdef const int32_t[::1] tokens = result.tokens
        cdef Sequence sequence
        cdef FinishReason reason
        cdef int32_t token
        cdef Py_ssize_t i, row
        cdef bint ended = False
        if tokens.shape[0] != batch.num_rows:
            raise ValueError(f"a result of {tokens.shape[0]} rows for a batch of {batch.num_rows}")
        for row in range(batch.num_rows):
            if tokens[row] < -1 or tokens[row] >= self.vocab_size:
                raise ValueError(f"row {row} yields token {tokens[row]} of a vocabulary of {self.vocab_size}")
        cdef list moved = []
        for i in range(batch.num_seqs):
            sequence = <Sequence> batch.sequences[i]
            if sequence.state_code != SEQUENCE_RUNNING:  # aborted meanwhile
                continue
            sequence.num_computed += sequence.num_scheduled
            sequence.prompt_logprobs_done += sequence.num_prompt_rows
            reason = FINISH_NONE
            if sequence.num_new:
                token = tokens[sequence.first_row + sequence.num_prompt_rows]
                if token < 0:
                    sequence.num_new = 0
                    reason = FINISH_ERROR
                else:
                    sequence.tokens.push_back(token)
                    reason = self._finish_of(sequence)
                if reason != FINISH_NONE:
                    self._retire(sequence, SEQUENCE_FINISHED, reason)
                    ended = True
            if sequence.num_new or sequence.num_prompt_rows or reason == FINISH_ERROR:
                moved.append(sequence)
        self._end_step()
        if ended:
            self._running = [
                sequence for sequence in self._running
                if (<Sequence> sequence).state_code == SEQUENCE_RUNNING
            ]
        return moved

    cpdef int rollback(self) except -1:
        """Forget the step in flight, if there is one; what it would have computed is scheduled again."""
        if self.in_flight is not None:
            self._end_step()
        return 0

    cpdef int finish(self, Sequence sequence, stop_reason=None) except -1:
        """End a sequence for a reason that the scheduler cannot see, such as a stop string.

        RUNNING -> FINISHED with "stop"; one that ended at the same token by itself gets the reason changed.
        Only between update and the next schedule.
        """
        if self.in_flight is not None:
            raise RuntimeError("finish() while a step is in flight")
        if sequence.state_code == SEQUENCE_RUNNING:
            self._running.remove(sequence)
            self._retire(sequence, SEQUENCE_FINISHED, FINISH_STOP)
        elif sequence.state_code == SEQUENCE_FINISHED:
            sequence.finish_code = FINISH_STOP
        else:
            raise RequestError("sequence", sequence, "a running sequence, or one that just finished")
        sequence.stop_reason = stop_reason
        return 0

    cpdef int abort(self, Sequence sequence) except -1:
        """End a sequence in any state; one that has ended already stays as it is."""
        if sequence.state_code == SEQUENCE_WAITING or sequence.state_code == SEQUENCE_PREEMPTED:
            self._waiting.remove(sequence)
        elif sequence.state_code == SEQUENCE_RUNNING:
            self._running.remove(sequence)
            if sequence.num_scheduled:  # the executor may be writing to its blocks
                sequence.state_code = SEQUENCE_ABORTED
                sequence.finish_code = FINISH_ABORT
                self._draining.append(sequence)
                return 0
        elif sequence.state_code != SEQUENCE_NEW:
            return 0
        self._retire(sequence, SEQUENCE_ABORTED, FINISH_ABORT)
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
            (<Sequence> item).num_scheduled = 0
        for item in self._draining:
            sequence = <Sequence> item
            self.pool.free_table(sequence.blocks)
        self._draining.clear()
        self.in_flight.sequences.clear()
        self.in_flight = None
        return 0

    def check(self):
        """Recompute the invariants from scratch.

        Raises:
            AssertionError: an invariant is broken; the message begins with its number.
        """
        cdef Sequence sequence
        cdef Py_ssize_t last = -1
        cdef Py_ssize_t scheduled = 0
        lists = (("running", self._running), ("waiting", self._waiting), ("draining", self._draining))
        seen = set()
        for name, members in lists:
            for sequence in members:
                _require("S1", id(sequence) not in seen, sequence, "is listed twice")
                seen.add(id(sequence))
                allowed = {
                    "running": ("running",), "waiting": ("waiting", "preempted"), "draining": ("aborted",)
                }[name]
                _require("S1", sequence.state in allowed, sequence, f"is among the {name}")
                scheduled += sequence.num_scheduled
                if name == "draining":
                    _require("S7", sequence.num_scheduled > 0, sequence, "drains without being in flight")
                else:
                    _require("S2", sequence.arrival > last, sequence, "is out of the order of arrival")
                    last = sequence.arrival
        for sequence in self._waiting:
            empty = sequence.blocks.empty() and sequence.num_computed == 0 and sequence.num_scheduled == 0
            _require("S3", empty, sequence, "waits, but holds something")
        for sequence in self._running:
            known = <Py_ssize_t> sequence.tokens.size()
            held = <Py_ssize_t> sequence.blocks.size()
            _require("S4", sequence.num_computed < known, sequence, "has no next token to compute")
            _require("S4", known < sequence.length_limit, sequence, "is at its length limit")
            least = self.pool.blocks_for(sequence.num_computed + sequence.num_scheduled)
            fits = least <= held <= self.pool.blocks_for(known)
            _require("S4", fits, sequence, "has too few or too many blocks")
        _require("S5", len(self._running) <= self.max_num_seqs, None, f"{len(self._running)} sequences run")
        self.pool.check([sequence.block_ids for sequence in (*self._running, *self._draining)])
        if self.in_flight is None:
            _require("S7", scheduled == 0, None, f"{scheduled} tokens are scheduled, no step is in flight")
        else:
            total = self.in_flight.num_tokens
            _require("S7", scheduled == total, None, f"{scheduled} tokens scheduled, {total} in the batch")
            _require("S7", 0 < total <= self.max_num_batched_tokens, None, f"a step of {total} tokens")
        for sequence in (*self._running, *self._waiting):
            if sequence.num_prompt_logprobs >= 0:
                due = min(sequence.num_computed, sequence.num_prompt - 1)
                done = sequence.prompt_logprobs_done
                exact = done == due if sequence.num_preemptions == 0 else due <= done < sequence.num_prompt
                _require("S8", exact, sequence, f"has reported {done} prompt logprobs, {due} are due")


def _require(number, condition, sequence, text):
    if not condition:
        raise AssertionError(f"{number}: {'' if sequence is None else sequence!r} {text}")
