"""What a request asks of the sampler: `SamplingParams`, with vLLM's names and meanings.

Every value is bounded and checked when the object is made, so that nothing after it has to; an object is
frozen, so that it cannot change under a running request.
"""

from __future__ import annotations

import enum
import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastllm.errors import RequestError
from fastllm.structured_outputs import StructuredOutputsParams

MAX_N = 64
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024  # of one stop string
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024  # entries
MAX_ALLOWED_TOKEN_IDS = 2**20
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARACTERS = 1024  # of one bad word
MAX_BIAS = 1e4  # absolute value; e**1e4 is far beyond any logit
MAX_TEMPERATURE = 1e4
GREEDY_TEMPERATURE = 1e-5  # anything below is greedy
MAX_MARKER_CHARACTERS = 64
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingBudget:
    """How many tokens a model may think before it answers.

    Attributes:
        tokens: of the answer, after which reasoning that has not ended is ended; >= 1. None: never.
        opening, closing: what reasoning stands between, 1..64 characters each. An answer that does not begin
            with the opening marker, spaces aside, does not reason.
        opened: whether the prompt ends within the reasoning.
        end: the text that ends it, with the closing marker in it; None: that marker.
        before_form: `structured_outputs` is the form of what follows the reasoning, which the prompt has
            opened; else of the whole output.

    Raises:
        RequestError: field "thinking_budget".
    """

    tokens: int | None = None
    opening: str = "<think>"
    closing: str = "</think>"
    opened: bool = False
    end: str | None = None
    before_form: bool = False

    def __post_init__(self) -> None:
        if self.tokens is not None:
            object.__setattr__(self, "tokens", _integer("thinking_budget", self.tokens, 1, _INT32_MAX))
        for name in ("opened", "before_form"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError("thinking_budget", getattr(self, name), f"{name}: a bool")
        if self.before_form and not self.opened:
            raise RequestError("thinking_budget", "before_form", "opened with it")
        for marker in (self.opening, self.closing, self.text):
            if not isinstance(marker, str) or not 0 < len(marker) <= MAX_MARKER_CHARACTERS:
                raise RequestError(
                    "thinking_budget", marker, f"markers of 1..{MAX_MARKER_CHARACTERS} characters"
                )
        if self.closing not in self.text:
            raise RequestError("thinking_budget", self.end, f"an end with {self.closing!r} in it")

    @property
    def text(self) -> str:
        """The text that ends the reasoning."""
        return self.closing if self.end is None else self.end


class RequestOutputKind(enum.Enum):
    """What the outputs of one request hold while it runs."""

    CUMULATIVE = 0  # each holds everything so far
    DELTA = 1  # each holds what is new
    FINAL_ONLY = 2  # there is one, at the end


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

    Attributes:
        n: sequences to generate for the prompt, 1..64. Each has a random stream of its own.
        temperature: divides the logits; 0..1e4, below 1e-5 the most likely token is taken (greedy).
        top_p: keep the smallest set of tokens with this much probability; (0, 1].
        top_k: keep the k most likely tokens; 0 or -1 = all.
        min_p: drop tokens less likely than min_p times the most likely one; [0, 1].
        seed: key of the random streams, -2**63..2**64-1, taken modulo 2**64. None: the engine draws one and
            reports it as `RequestOutput.seed`.
        presence_penalty: subtracted from the logit of each token generated so far; [-2, 2].
        frequency_penalty: subtracted once per occurrence among the generated tokens; [-2, 2].
        repetition_penalty: logits of tokens in prompt or output are divided (if > 0) or multiplied (if < 0)
            by it; [0.01, 100], 1 = off.
        max_tokens: tokens to generate at most, >= 1; None: up to the model length.
        min_tokens: tokens to generate before the sequence may end on a stop token or stop string.
        stop: strings (a string or up to 16, each of 1..1024 characters) that end the sequence. The text is
            cut before the one that is complete first.
        stop_token_ids: ids that end the sequence, besides the tokenizer's end-of-sequence ids. Their text is
            left out of the output.
        ignore_eos: go on after an end-of-sequence id (stop_token_ids still end the sequence).
        logprobs: report the chosen token and this many of the most likely ones, 0..20; None: nothing. They
            are taken from the raw logits, before temperature, penalties and bias.
        prompt_logprobs: the same for each token of the prompt but the first.
        logit_bias: added to the logits of these ids; up to 1024 entries, each in [-1e4, 1e4].
        structured_outputs: the form that the output has to have; when it is complete the sequence ends with
            "stop", min_tokens or not. Stop strings and stop_token_ids may end it earlier, and so may
            max_tokens, with "length". Not with ignore_eos. Here as with the next two, a sequence for which
            nothing is left to sample ends with "error".
        allowed_token_ids: the only ids that may be sampled, 1 of them up to all; the end of sequence too is
            allowed only if it is among them. Not with structured_outputs.
        bad_words: up to 256 texts of 1..1024 characters that the output does not contain. Each is tokenized
            as it is and after a space; the last token of either is banned where the ones before it have just
            been generated.
        thinking_budget: tokens after which the reasoning of a model that thinks before it answers is ended,
            by tokens that are put in the place of sampled ones. Where structured_outputs does not allow that
            end, nothing is put in; unless it is the form of what follows (`ThinkingBudget.before_form`).
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string (or the stop token's text) in the text.
        detokenize: produce text. Without it `text` is empty and `stop` is refused.
        output_kind: what the outputs hold while the request runs.

    Raises:
        RequestError: naming the field, its value and what would be accepted.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    thinking_budget: ThinkingBudget | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    # The same as stop and stop_token_ids, as given to whoever reads them.
    stop_strings: tuple[str, ...] = field(init=False, repr=False, compare=False)
    stop_ids: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "n", _integer("n", self.n, 1, MAX_N))
        put(self, "temperature", _real("temperature", self.temperature, 0.0, MAX_TEMPERATURE))
        put(self, "top_p", _real("top_p", self.top_p, 0.0, 1.0, open_low=True))
        put(self, "top_k", _integer("top_k", self.top_k, -1, _INT32_MAX))
        put(self, "min_p", _real("min_p", self.min_p, 0.0, 1.0))
        if self.seed is not None:
            put(self, "seed", _integer("seed", self.seed, -(2**63), 2**64 - 1))
        put(self, "presence_penalty", _real("presence_penalty", self.presence_penalty, -2.0, 2.0))
        put(self, "frequency_penalty", _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0))
        put(self, "repetition_penalty", _real("repetition_penalty", self.repetition_penalty, 0.01, 100.0))
        if self.max_tokens is not None:
            put(self, "max_tokens", _integer("max_tokens", self.max_tokens, 1, _INT32_MAX))
        put(self, "min_tokens", _integer("min_tokens", self.min_tokens, 0, _INT32_MAX))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        if self.logprobs is not None:
            put(self, "logprobs", _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS))
        if self.prompt_logprobs is not None:
            put(self, "prompt_logprobs", _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS))
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(name, getattr(self, name), "a bool")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise RequestError("output_kind", self.output_kind, "a RequestOutputKind")
        self._settle_stops()
        self._settle_bias()
        self._settle_constraints()

    def _settle_stops(self) -> None:
        put = object.__setattr__
        strings = (self.stop,) if isinstance(self.stop, str) else _items("stop", self.stop)
        if len(strings) > MAX_STOP_STRINGS:
            raise RequestError("stop", f"{len(strings)} strings", f"at most {MAX_STOP_STRINGS} strings")
        for string in strings:
            if not isinstance(string, str) or not 0 < len(string) <= MAX_STOP_CHARACTERS:
                raise RequestError("stop", string, f"strings of 1..{MAX_STOP_CHARACTERS} characters")
        if strings and not self.detokenize:
            raise RequestError("stop", self.stop, "no stop strings where detokenize is False")
        put(self, "stop_strings", tuple(strings))
        put(self, "stop", self.stop if self.stop is None or isinstance(self.stop, str) else tuple(strings))

        ids = _items("stop_token_ids", self.stop_token_ids)
        if len(ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError("stop_token_ids", f"{len(ids)} ids", f"at most {MAX_STOP_TOKEN_IDS} ids")
        settled = tuple(_integer("stop_token_ids", item, 0, _INT32_MAX) for item in ids)
        put(self, "stop_ids", settled)
        put(self, "stop_token_ids", None if self.stop_token_ids is None else settled)

    def _settle_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError("logit_bias", self.logit_bias, "a mapping of token ids to numbers")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                "logit_bias", f"{len(self.logit_bias)} entries", f"at most {MAX_LOGIT_BIAS} entries"
            )
        copy = {
            _integer("logit_bias", token, 0, _INT32_MAX): _real("logit_bias", bias, -MAX_BIAS, MAX_BIAS)
            for token, bias in self.logit_bias.items()
        }
        object.__setattr__(self, "logit_bias", copy)

    def _settle_constraints(self) -> None:
        form = self.structured_outputs
        if form is not None:
            if not isinstance(form, StructuredOutputsParams):
                raise RequestError("structured_outputs", form, "StructuredOutputsParams")
            if self.ignore_eos:
                raise RequestError("structured_outputs", form, "None with ignore_eos: nothing would end it")
            if self.allowed_token_ids is not None:
                raise RequestError("structured_outputs", form, "None with allowed_token_ids")
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", _token_ids(self.allowed_token_ids))
        if self.bad_words is not None:
            words = _items("bad_words", self.bad_words)
            if len(words) > MAX_BAD_WORDS:
                raise RequestError("bad_words", f"{len(words)} texts", f"at most {MAX_BAD_WORDS} texts")
            for word in words:
                if not isinstance(word, str) or not 0 < len(word) <= MAX_BAD_WORD_CHARACTERS:
                    raise RequestError("bad_words", word, f"texts of 1..{MAX_BAD_WORD_CHARACTERS} characters")
            object.__setattr__(self, "bad_words", words)
        budget = self.thinking_budget
        if budget is not None and not isinstance(budget, ThinkingBudget):
            raise RequestError("thinking_budget", budget, "a ThinkingBudget")

    @property
    def constrained(self) -> bool:
        """Whether there is something to prepare before the request is queued: see `Constraints`."""
        restricted = self.structured_outputs or self.allowed_token_ids is not None or self.bad_words
        return bool(restricted) or self.thinking_budget is not None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken instead of a random one."""
        return self.temperature < GREEDY_TEMPERATURE

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids outside a model's vocabulary.

        Raises:
            RequestError: naming stop_token_ids, logit_bias or allowed_token_ids, and the id.
        """
        limit = f"token ids below the vocabulary's size ({vocab_size})"
        for token in self.stop_ids:
            if token >= vocab_size:
                raise RequestError("stop_token_ids", token, limit)
        for token in self.logit_bias or ():
            if token >= vocab_size:
                raise RequestError("logit_bias", token, limit)
        if self.allowed_token_ids and max(self.allowed_token_ids) >= vocab_size:
            raise RequestError("allowed_token_ids", max(self.allowed_token_ids), limit)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    """The value as an int within low..high. A bool is no integer here, nor is 1.0."""
    limit = f"an integer in {low}..{high}"
    if isinstance(value, bool):
        raise RequestError(name, value, limit)
    try:
        number = operator.index(value)
    except TypeError:
        raise RequestError(name, value, limit) from None
    if not low <= number <= high:
        raise RequestError(name, value, limit)
    return number


def _token_ids(value: Any) -> tuple[int, ...]:
    """allowed_token_ids, which may be as many as a vocabulary has."""
    ids = _items("allowed_token_ids", value)
    if not 0 < len(ids) <= MAX_ALLOWED_TOKEN_IDS:
        raise RequestError("allowed_token_ids", f"{len(ids)} ids", f"1..{MAX_ALLOWED_TOKEN_IDS} ids")
    if {type(item) for item in ids} == {int} and 0 <= min(ids) <= max(ids) <= _INT32_MAX:
        return ids
    return tuple(_integer("allowed_token_ids", item, 0, _INT32_MAX) for item in ids)


def _real(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> float:
    """The value as a float within [low, high], or (low, high]. NaN, infinities and bools are refused."""
    limit = f"a number in {'(' if open_low else '['}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RequestError(name, value, limit)
    try:
        number = float(value)
    except OverflowError:
        raise RequestError(name, value, limit) from None
    # A float32 must hold it: a positive number that rounds to 0 there would mean something else.
    if not (math.isfinite(number) and low <= number <= high) or (open_low and number < low + 1e-30):
        raise RequestError(name, value, limit)
    return number


def _items(name: str, value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise RequestError(name, value, "a list")
    return tuple(value)
