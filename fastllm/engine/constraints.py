"""What a request's parameters leave the sampler to choose from, worked out before the request is queued.

`Constraints.prepare` turns `structured_outputs`, `allowed_token_ids`, `bad_words` and `thinking_budget` into
a `Constraint`. That takes a tokenizer and perhaps a compiler, so it is done on threads of its own, never the
engine's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from fastllm.engine.completion import Tokenizer
from fastllm.engine.grammar import Grammar, GrammarCompiler, GrammarVocabulary, Mask, pack_mask
from fastllm.engine.thinking import ThoughtLimit
from fastllm.errors import EngineDeadError, RequestError
from fastllm.sampling_params import SamplingParams
from fastllm.structured_outputs import refusal

_COMPILING_THREADS = 2  # one slow grammar does not hold up all others


@dataclass(frozen=True, slots=True)
class Constraint:
    """What one request may sample.

    Attributes:
        grammar: the form of the output, or None.
        mask: the only tokens that are ever allowed, or None for all.
        bad_words: token ids; the last of each must not follow the others.
        thought: after how many tokens the reasoning is ended, or None.
    """

    grammar: Grammar | None
    mask: Mask | None
    bad_words: tuple[tuple[int, ...], ...]
    thought: ThoughtLimit | None = None


class Constraints:
    """Prepares the constraints of an engine's requests. Any thread may call it.

    Args:
        tokenizer: the engine's.
        vocab_size: of the model.
        eos_token_ids: what ends a sequence.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = [token for token in eos_token_ids if token < vocab_size]
        self._lock = threading.Lock()
        self._workers: ThreadPoolExecutor | None = None
        self._closed = False
        self.compiler = GrammarCompiler(lambda: GrammarVocabulary(tokenizer, vocab_size, self._eos_token_ids))

    def prepare(self, params: SamplingParams) -> Constraint | None:
        """The constraint of these parameters, None if they have none. Waits until it is made.

        Raises:
            RequestError: naming structured_outputs, allowed_token_ids, bad_words or thinking_budget.
            EngineDeadError: the engine is closed.
        """
        return self.submit(params).result() if params.constrained else None

    def submit(self, params: SamplingParams) -> Future[Constraint]:
        """The same for parameters that have a constraint, without waiting."""
        with self._lock:
            if self._closed:
                raise EngineDeadError("the engine is closed")
            if self._workers is None:
                self._workers = ThreadPoolExecutor(_COMPILING_THREADS, thread_name_prefix="fastllm-grammar")
            return self._workers.submit(self._prepare, params)

    def _prepare(self, params: SamplingParams) -> Constraint:
        if self._closed:
            raise EngineDeadError("the engine is closed")
        params.check_vocabulary(self._vocab_size)
        mask = None
        if params.allowed_token_ids is not None:
            mask = pack_mask(params.allowed_token_ids, self._vocab_size)
            mask.flags.writeable = False
        words = self._bad_words(params.bad_words or ())
        grammar = None
        if params.structured_outputs is not None:
            if not self._eos_token_ids:
                raise refusal(params.structured_outputs, "None for a model without an end-of-sequence token")
            grammar = self.compiler.compile(params.structured_outputs.kind, params.structured_outputs.text)
        thought = None
        if params.thinking_budget is not None:
            budget, ends = params.thinking_budget, self._eos_token_ids
            thought = ThoughtLimit(budget, self._tokenizer, self._vocab_size, mask, ends)
        return Constraint(grammar, mask, words, thought)

    def _bad_words(self, texts: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Each as it is written at the beginning of a text and after a space."""
        found: dict[tuple[int, ...], None] = {}
        for text in texts:
            bare = text.lstrip() or text
            for written in (bare, " " + bare):
                try:
                    ids = self._tokenizer.encode(written, add_special_tokens=False, parse_special=False)
                except RequestError as error:
                    raise RequestError("bad_words", error.value, error.limit) from error
                if not ids:
                    raise RequestError("bad_words", text, "texts of at least one token")
                found[tuple(ids)] = None
        return tuple(found)

    def close(self) -> None:
        """Stop the threads. May be called again."""
        with self._lock:
            self._closed = True
            workers, self._workers = self._workers, None
        if workers is not None:
            workers.shutdown(wait=True)  # what has not begun is refused
