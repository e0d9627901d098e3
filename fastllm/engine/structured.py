"""Grammars and budgets of thought at work: what a sequence may sample next follows from what it has sampled.

A grammar has a matcher per sequence, moved on by worker threads while the engine does other things:

                    schedule, update            a worker                   collect
    its mask is there ──────────────► it is held ────────► result is queued ───────► its mask is there
                                                                           └───────► it failed: "error"

A sequence whose next mask is not known is held (`Sequence.held`): the scheduler leaves it out, and the others
go on. Only the engine's thread touches sequences; a matcher is touched by the one worker that has its job. A
mask depends on the grammar and on the sequence's own tokens and on nothing else, so that neither preemption
nor what else is in the batch makes any difference to it. A budget (`thinking.py`) alone takes no worker.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from fastllm.engine.constraints import Constraint
from fastllm.engine.grammar import Grammar, GrammarError, Mask
from fastllm.engine.sequence import Sequence
from fastllm.engine.thinking import Thought

if TYPE_CHECKING:
    from llguidance import LLMatcher

_MAX_WORKERS = 4


class _Guide:
    """A sequence's place in its grammar and its thought, and what the last job found."""

    __slots__ = ("ends", "failure", "free", "grammar", "mask", "matcher", "sequence", "thought")

    def __init__(self, sequence: Sequence, constraint: Constraint) -> None:
        self.sequence = sequence
        self.grammar = constraint.grammar
        self.thought = None if constraint.thought is None else Thought(constraint.thought)
        self.matcher: LLMatcher | None = None  # made with the first token, by a worker
        self.free = constraint.mask  # what the request allows at all
        self.mask: Mask | None = constraint.mask
        self.ends = False
        self.failure: str | None = None
        if self.thought is not None and (self.grammar is None or self.thought.limit.before_form):
            self.mask = self.thought.mask
        elif self.grammar is not None:
            self.mask, self.ends = self.grammar.mask, self.grammar.ends

    def advance(self, tokens: list[int]) -> None:
        """Move on by these tokens. Whatever goes wrong is this sequence's failure alone."""
        try:
            if self.thought is not None and self.thought.limit.before_form:
                self.thought.take(tokens)
                if not self.thought.over:
                    self.mask = self.thought.mask
                    return
                tokens = self.thought.limit.tokens_of(self.thought.rest)
                self.thought = None
            if self.grammar is not None:
                self._follow(self.grammar, tokens)
            if self.thought is not None:
                self.thought.take(tokens)
                self._limit(self.thought)
        except BaseException as error:  # a panic of the library is no Exception
            self.failure = f"{type(error).__name__}: {error}"

    def _follow(self, grammar: Grammar, tokens: list[int]) -> None:
        if self.matcher is None:
            self.matcher = grammar.matcher()
        for token in tokens:
            if not self.matcher.consume_token(token):
                raise GrammarError(self.matcher.get_error())
        self.mask, self.ends = grammar.vocabulary.next_mask(self.matcher)

    def _limit(self, thought: Thought) -> None:
        """What a budget makes of the mask."""
        token = thought.forced
        if token is not None and self.mask is not None:
            if self.mask[token // 32] >> (token % 32) & 1:
                self.mask, self.ends = thought.mask, False
            else:  # the grammar has no place for the end of a thought
                thought.give_up()


class Guides:
    """The sequences of an engine that follow a grammar, or have a budget for what they think.

    Attributes:
        pending: of those, how many are held until a worker is done.
    """

    def __init__(self) -> None:
        self.pending = 0
        self._guides: dict[Sequence, _Guide] = {}
        self._done: SimpleQueue[_Guide] = SimpleQueue()
        self._workers: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self._guides)

    def add(self, sequence: Sequence, constraint: Constraint) -> None:
        """Let a new sequence follow what a constraint has; its first mask is known already."""
        self._guides[sequence] = guide = _Guide(sequence, constraint)
        sequence.set_mask(guide.mask, ends=guide.ends)

    def discard(self, sequence: Sequence) -> None:
        """The sequence has ended; one that follows none is ignored."""
        self._guides.pop(sequence, None)

    def advance(self, moved: Iterable[Sequence]) -> None:
        """Set the workers on the next masks of sequences that have new tokens, and hold those until then."""
        for sequence in moved:
            guide = self._guides.get(sequence)
            if guide is None:
                continue
            if sequence.finish_reason is not None:
                del self._guides[sequence]
            elif sequence.num_new and guide.grammar is None:
                self._advance_thought(guide)
            elif sequence.num_new:
                if self._workers is None:
                    count = max(min(_MAX_WORKERS, len(os.sched_getaffinity(0))), 1)
                    self._workers = ThreadPoolExecutor(count, thread_name_prefix="fastllm-mask")
                sequence.hold()
                self.pending += 1
                self._workers.submit(self._work, guide, sequence.new_token_ids)

    def _advance_thought(self, guide: _Guide) -> None:
        """A budget alone: from its end on, whatever the request allows."""
        sequence, thought = guide.sequence, guide.thought
        assert thought is not None
        thought.take(sequence.new_token_ids)
        if thought.over:
            del self._guides[sequence]
            sequence.set_mask(guide.free)
        else:
            sequence.set_mask(thought.mask)

    def _work(self, guide: _Guide, tokens: list[int]) -> None:
        guide.advance(tokens)
        self._done.put(guide)

    def collect(self, seconds: float | None) -> list[tuple[Sequence, str]]:
        """Give sequences the masks that are there.

        Args:
            seconds: wait so long for all that are pending; None: until one is there, however long.

        Returns:
            Sequences that cannot go on, which are followed no longer, and why.
        """
        failed = []
        due = 0.0 if seconds is None else time.monotonic() + seconds
        while self.pending:
            try:
                if seconds is None:
                    guide = self._done.get()
                    seconds = 0.0
                else:
                    guide = self._done.get(timeout=max(due - time.monotonic(), 0.0))
            except Empty:
                break
            self.pending -= 1
            sequence = guide.sequence
            if self._guides.get(sequence) is not guide:  # ended meanwhile
                continue
            if guide.failure is not None:
                del self._guides[sequence]
                failed.append((sequence, guide.failure))
            else:
                sequence.set_mask(guide.mask, ends=guide.ends)
        return failed

    def close(self) -> None:
        """Stop the workers, when they are done with what they are at. May be called again."""
        self._guides.clear()
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.shutdown(wait=True, cancel_futures=True)
        self.pending = 0
