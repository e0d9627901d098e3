"""Text out of tokens while they are still being generated.

A character may be spread over several tokens, so bytes that do not make up whole characters yet are held back
until the rest has come. Each token is looked at once, and the prompt not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from encodings.utf_8 import IncrementalDecoder

from fastllm.formats.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Gives the text of one growing sequence, piece by piece.

    The pieces of any split, and `flush` at the end, joined, are `tokenizer.decode` of all ids (without those
    of the prompt). Text of the prompt never appears, also where the prompt ends within a character.

    Args:
        prompt_token_ids: what comes before the first pushed id; decides whether a leading space is the
            vocabulary's own, to be left out, or text.
        skip_special_tokens: leave out control tokens.
    """

    __slots__ = ("_at_start", "_decoder", "_skip", "_tokenizer")

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = IncrementalDecoder("replace")
        self._at_start = tokenizer.strips_space and not any(
            tokenizer.visible_bytes(prompt_token_ids, skip_special_tokens)
        )

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; never part of a character."""
        data = b"".join(self._tokenizer.visible_bytes(ids, self._skip))
        if self._at_start and data:
            self._at_start = False
            data = data.removeprefix(b" ")
        if data.isascii() and not self._decoder.buffer:
            return data.decode("ascii")  # what the decoder would say, in half the time
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is still held back, as U+FFFD: the sequence has ended within a character."""
        return self._decoder.decode(b"", final=True)
