"""Grammars, compiled by llguidance: which tokens may come next.

A `GrammarCompiler` belongs to an engine. It is slow and careful (see `grammar_trial.py`), works on the thread
that calls it, never the engine's, and keeps the grammars compiled last. llguidance is imported with the first
grammar.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastllm.engine.completion import Tokenizer
from fastllm.engine.grammar_trial import __file__ as TRIAL
from fastllm.errors import RequestError
from fastllm.formats.codec import looks_like_markup
from fastllm.structured_outputs import refusal

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Mask = npt.NDArray[np.uint32]  # (ceil(V / 32),) token i is allowed if bit i % 32 of word i // 32 is 1

COMPILE_SECONDS = 3  # of a processor that a grammar's trial may take, the start of its process included
_PATIENCE = 10  # times as long on the clock: others may want the processors too
CACHED_GRAMMARS = 32
# llguidance's own: fuel for building the lexer, fuel and items of one step, states (1 to 2 KB each).
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 500_000,
    "verbose_errors": False,
}
_SHOWN = 300  # characters of llguidance's explanation


class GrammarError(Exception):
    """A matcher cannot go on: no token is left, or a step is beyond llguidance's limits."""


def pack_mask(ids: Iterable[int], vocab_size: int) -> Mask:
    """The mask that allows these ids."""
    bits = np.zeros((vocab_size + 31) // 32 * 32, dtype=np.uint8)
    bits[np.fromiter(ids, dtype=np.int64)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


class GrammarVocabulary:
    """A vocabulary as llguidance wants it. Control tokens are not in it: no grammar can ask for one.

    Args:
        tokenizer: token_bytes, is_special and encode are used.
        vocab_size: of the model; ids past the tokenizer's stand for nothing.
        eos_token_ids: at least one, each below vocab_size.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        ends = sorted(eos_token_ids)
        texts = [b""] * vocab_size
        for token in range(min(vocab_size, tokenizer.vocab_size)):
            piece = tokenizer.token_bytes(token)
            # What looks like a control token may be one, whatever the model's file says of it.
            if not tokenizer.is_special(token) and not looks_like_markup(piece.decode("utf-8", "replace")):
                texts[token] = piece
        for token in ends:
            texts[token] = b""
        self._texts = texts
        self._tokenizer = tokenizer
        wrapper = TokenizerWrapper.__new__(TokenizerWrapper)  # its constructor would make a trial call
        wrapper.is_tokenizer_wrapper = True
        wrapper.eos_token_id = ends[0]
        wrapper.bos_token_id = None
        wrapper.tokens = texts
        wrapper.special_token_ids = []
        wrapper._gtokenizer = self._tokenize
        wrapper._accepts_bytes = False
        self._readable = pack_mask((i for i, piece in enumerate(texts) if piece), vocab_size)
        self._ends = pack_mask(ends, vocab_size)
        self.handle: LLTokenizer = LLTokenizer(wrapper, eos_token=ends)

    def _tokenize(self, text: str) -> list[int]:
        """How the model would write what a grammar leaves no choice about. Must not raise."""
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        except RequestError:
            ids = []
        if b"".join(self._texts[token] for token in ids) == text.encode():
            return ids
        return self.handle.greedy_tokenize(text)  # a vocabulary that puts a space before every text

    def next_mask(self, matcher: LLMatcher) -> tuple[Mask, bool]:
        """What may come next, and whether that is only the end.

        Raises:
            GrammarError: nothing may, or finding out took too much.
        """
        words = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint32)
        allowed = (
            words[: self._readable.size] & self._readable
        )  # where they fill the last word there is one more
        if matcher.is_error():
            raise GrammarError(matcher.get_error())
        ends = not allowed.any()
        if matcher.is_accepting():
            allowed |= self._ends
        elif ends:
            raise GrammarError("no token is allowed")
        return allowed, ends


class Grammar:
    """A compiled grammar: a matcher that stays at the beginning, and what may come first.

    Attributes:
        mask, ends: see `GrammarVocabulary.next_mask`.
    """

    __slots__ = ("_matcher", "ends", "mask", "vocabulary")

    def __init__(self, vocabulary: GrammarVocabulary, matcher: LLMatcher) -> None:
        self.vocabulary = vocabulary
        self.mask, self.ends = vocabulary.next_mask(matcher)
        self._matcher = matcher

    def matcher(self) -> LLMatcher:
        """One of its own for a sequence, at the beginning. What others do makes no difference to it."""
        return self._matcher.deep_copy()


class GrammarCompiler:
    """Compiles grammars for one vocabulary; each once, as long as it is remembered. Any thread.

    Args:
        make_vocabulary: called once, with the first grammar.
    """

    def __init__(self, make_vocabulary: Callable[[], GrammarVocabulary]) -> None:
        self._make_vocabulary = make_vocabulary
        self._vocabulary: GrammarVocabulary | None = None
        self._lock = threading.Lock()
        self._turns: dict[tuple[str, str], threading.Lock] = {}  # of what is being compiled
        self._known: OrderedDict[tuple[str, str], Grammar] = OrderedDict()
        self.num_compiled = 0

    def compile(self, kind: str, text: str) -> Grammar:
        """The grammar of `StructuredOutputsParams.kind` and `.text`.

        Raises:
            RequestError: field "structured_outputs", with the reason.
        """
        key = (kind, text)
        with self._lock:
            turn = self._turns.setdefault(key, threading.Lock())
        with turn:
            with self._lock:
                grammar = self._known.get(key)
                if grammar is not None:
                    self._known.move_to_end(key)
            if grammar is None:
                try:
                    grammar = self._compile(kind, text)
                except BaseException:
                    with self._lock:
                        self._turns.pop(key, None)
                    raise
        with self._lock:
            self._turns.pop(key, None)
            self._known[key] = grammar
            while len(self._known) > CACHED_GRAMMARS:
                self._known.popitem(last=False)
        return grammar

    def _compile(self, kind: str, text: str) -> Grammar:
        source = try_grammar(kind, text)
        with self._lock:
            self.num_compiled += 1
            if self._vocabulary is None:
                self._vocabulary = self._make_vocabulary()
            vocabulary = self._vocabulary
        from llguidance import LLMatcher, LLParserLimits

        try:
            matcher = LLMatcher(vocabulary.handle, source, log_level=0, limits=LLParserLimits(**LIMITS))
            if matcher.is_error():
                raise GrammarError(matcher.get_error())
            return Grammar(vocabulary, matcher)
        except BaseException as error:  # a panic of the library is no Exception
            raise _rejected(kind, text, str(error)) from error


def try_grammar(kind: str, text: str) -> str:
    """llguidance's grammar for a form of output, from a process that did nothing but compile it.

    Raises:
        RequestError: it cannot be compiled, or not within COMPILE_SECONDS, a stack of 2 MiB and 2 GiB.
    """
    import llguidance

    folder = os.path.dirname(os.path.dirname(llguidance.__file__))
    order = json.dumps({"kind": kind, "text": text, "limits": LIMITS, "seconds": COMPILE_SECONDS})
    try:
        trial = subprocess.run(
            [sys.executable, "-I", "-S", TRIAL, folder],
            input=order.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_PATIENCE * COMPILE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _too_slow(kind, text) from None
    except OSError as error:
        raise refusal(text, f"{kind}: a system that starts a process to compile it in ({error})") from error
    if trial.returncode == -signal.SIGXCPU:
        raise _too_slow(kind, text)
    if trial.returncode != 0 or not trial.stdout:
        raise refusal(
            text, f"{kind}: something less deep or less large (compiling it took all stack or memory)"
        )
    answer = json.loads(trial.stdout)
    if "error" in answer:
        raise _rejected(kind, text, answer["error"])
    grammar: str = answer["grammar"]
    return grammar


def _too_slow(kind: str, text: str) -> RequestError:
    return refusal(text, f"{kind}: something that compiles within {COMPILE_SECONDS} seconds")


def _rejected(kind: str, text: str, reason: str) -> RequestError:
    words = " ".join(reason.split())
    return refusal(text, f"{kind}: something that llguidance compiles ({words[:_SHOWN]})")
