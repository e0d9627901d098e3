"""From the tokens of one sequence to what its caller sees: text, stop strings, logprobs.

A `Completion` follows one `Sequence` of the scheduler, takes its new tokens after each step and gives a
`CompletionOutput` when asked.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any, Protocol

from fastllm.engine.sequence import Sequence
from fastllm.engine.stop import StopMatcher, StopStrings
from fastllm.executor.base import StepResult
from fastllm.outputs import CompletionOutput, Logprob, SampleLogprobs
from fastllm.sampling_params import RequestOutputKind, SamplingParams


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_token_ids(self) -> frozenset[int]: ...
    def token_bytes(self, id: int, /) -> bytes: ...  # b"" for an id of the model that it does not know

    # For grammars and bad words only.
    def is_special(self, id: int, /) -> bool: ...
    def encode(self, text: str, /, *, add_special_tokens: bool, parse_special: bool) -> list[int]: ...


class Detokenizer(Protocol):
    """One per sequence; the joined pieces are the text of all tokens pushed."""

    def push(self, ids: SequenceOf[int], /) -> str: ...
    def flush(self) -> str: ...


DetokenizerFactory = Callable[[Any, SequenceOf[int], bool], Detokenizer]


def incremental_detokenizer(
    tokenizer: Any, prompt_token_ids: SequenceOf[int], skip_special_tokens: bool
) -> Detokenizer:
    """fastllm's own detokenizer."""
    from fastllm.formats.detokenizer import IncrementalDetokenizer

    return IncrementalDetokenizer(tokenizer, prompt_token_ids, skip_special_tokens=skip_special_tokens)


class TokenTexts:
    """The text of single tokens, for logprobs; each is decoded once."""

    __slots__ = ("_texts", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = self._tokenizer.token_bytes(token).decode("utf-8", "replace")
            self._texts[token] = text
        return text


def row_logprobs(
    result: StepResult, row: int, token: int, count: int, texts: TokenTexts | None
) -> dict[int, Logprob]:
    """One row's logprobs: the token itself first, then the `count` most likely ones.

    Args:
        result, row: where they are.
        token: the chosen (or given) token of the row.
        count: how many of the most likely ones, >= 0.
        texts: where decoded_token comes from; None leaves it out.
    """
    table = {
        token: Logprob(
            float(result.logprob[row]), int(result.rank[row]), None if texts is None else texts[token]
        )
    }
    if count:
        likely = zip(
            result.top_ids[row, :count].tolist(), result.top_logprobs[row, :count].tolist(), strict=True
        )
        for place, (other, logprob) in enumerate(likely, start=1):
            if other not in table:
                table[other] = Logprob(logprob, place, None if texts is None else texts[other])
    return table


class Completion:
    """One of the n sequences of a request, as its caller sees it.

    Args:
        sequence: the scheduler's side of it.
        params: the request's parameters.
        detokenizer: makes the text; None leaves it empty.
        stops: the request's stop strings; None = none.
        texts: decodes single tokens for logprobs; None leaves `decoded_token` out.

    Attributes:
        deferred: nothing of it is looked at before its end: its tokens may be taken in all at once then.
    """

    __slots__ = (
        "_armed_after",
        "_count",
        "_cumulative",
        "_detokenizer",
        "_include_stop",
        "_logprobs",
        "_matcher",
        "_sent_characters",
        "_sent_tokens",
        "_text",
        "_texts",
        "_token_ids",
        "deferred",
        "finish_reason",
        "moved",
        "sequence",
        "stop_reason",
    )

    def __init__(
        self,
        sequence: Sequence,
        params: SamplingParams,
        detokenizer: Detokenizer | None,
        stops: StopStrings | None,
        texts: TokenTexts | None,
    ) -> None:
        self.sequence = sequence
        self.moved = False  # since the last output
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._include_stop = params.include_stop_str_in_output
        self._armed_after = params.min_tokens
        self._detokenizer = detokenizer
        self._matcher = None if stops is None else StopMatcher(stops, include=self._include_stop)
        self._texts = texts
        self._text = ""
        self._token_ids: list[int] = []
        self._count = -1 if params.logprobs is None else params.logprobs
        final = params.output_kind is RequestOutputKind.FINAL_ONLY
        self.deferred = final and stops is None and params.logprobs is None
        self._logprobs: SampleLogprobs = []
        self._cumulative = 0.0
        self._sent_tokens = 0
        self._sent_characters = 0

    @property
    def num_tokens(self) -> int:
        """Tokens taken in so far."""
        return len(self._token_ids)

    def advance(self, result: StepResult) -> str | None:
        """Take in what the last step brought for the sequence; if it is deferred, earlier steps too.

        Returns:
            The stop string that is complete now, or None. The text then ends with it; tokens after the one
            that completed it are dropped.
        """
        sequence = self.sequence
        row = sequence.first_row + sequence.num_prompt_rows
        if sequence.num_output - len(self._token_ids) != sequence.num_new:
            self._catch_up(sequence.num_output - sequence.num_new)
        new = sequence.new_token_ids
        left = len(new)
        self.moved = True
        for token in new:
            left -= 1
            self._token_ids.append(token)
            if self._count >= 0:
                table = row_logprobs(result, row, token, self._count, self._texts)
                self._logprobs.append(table)
                self._cumulative += table[token].logprob
            row += 1
            ends = left == 0 and sequence.finish_reason is not None
            stop = self._advance_text(token, ends, ends and sequence.finish_reason == "stop")
            if stop is not None:
                return stop
        return None

    def _catch_up(self, count: int) -> None:
        """Take in the first `count` tokens of the sequence, as far as that has not been done."""
        for token in self.sequence.output_token_ids[len(self._token_ids) : count]:
            self._token_ids.append(token)
            self._advance_text(token, False, False)

    def _advance_text(self, token: int, ends: bool, is_stop_token: bool) -> str | None:
        """The text of one more token, which is the last if `ends`. Returns the stop string found, or None."""
        if self._detokenizer is None:
            return None
        stop = None
        if not is_stop_token or self._include_stop:
            stop = self._append(self._detokenizer.push((token,)))
        if ends and stop is None:
            stop = self._close_text()
        return stop

    def _append(self, text: str) -> str | None:
        if self._matcher is None:
            self._text += text
            return None
        certain, stop = self._matcher.push(text, armed=len(self._token_ids) > self._armed_after)
        self._text += certain
        return stop

    def _close_text(self) -> str | None:
        """No token follows: what was held back, by the detokenizer or for a stop string, comes out."""
        assert self._detokenizer is not None
        stop = self._append(self._detokenizer.flush())
        if stop is None and self._matcher is not None:
            self._text += self._matcher.flush()
        return stop

    def close(self, finish_reason: str, stop_reason: int | str | None) -> None:
        """The sequence has ended, and the text with it."""
        self.finish_reason = finish_reason
        self.stop_reason = stop_reason
        self.sequence.owner = None  # the two refer to each other no longer
        self._detokenizer = None

    def cut(self, finish_reason: str, *, text: bool = True) -> None:
        """Ended from outside ("abort"), or unable to go on ("error"): the text so far is what there is.

        Without `text`, for an engine that ends with nobody left to read it, the detokenizer is left alone.
        """
        if not text:
            self._detokenizer = None
        if self.deferred:
            self._catch_up(self.sequence.num_output)
        if self._detokenizer is not None:
            self._close_text()
        self.moved = True
        self.close(finish_reason, None)

    def output(self, *, delta: bool) -> CompletionOutput:
        """Everything so far, or with `delta` what came since the last call."""
        self.moved = False
        first = 0
        text = self._text
        if delta:
            first = self._sent_tokens
            text = text[self._sent_characters :]
            self._sent_tokens = len(self._token_ids)
            self._sent_characters = len(self._text)
        scored = self._count >= 0
        return CompletionOutput(
            self.sequence.index,
            text,
            self._token_ids[first:],
            self._cumulative if scored else None,
            self._logprobs[first:] if scored else None,
            self.finish_reason,
            self.stop_reason,
        )
