"""What every kind of vocabulary offers to `Tokenizer`: text to ids, and an id's bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Protocol

from fastllm.formats.template_text import Span

# Where control tokens may be recognised: True everywhere, False nowhere, or in these spans (sorted,
# disjoint).
ControlScope = bool | Sequence[Span]


class Codec(Protocol):
    """One vocabulary with its rules.

    Attributes:
        vocab_size: ids are 0 ... vocab_size - 1.
        special_ids: tokens that stand for no text, such as <s>.
        end_ids: tokens that end a sequence.
        special_tokens: names that chat templates use (`bos_token`, ...) -> texts.
        strips_space: text begins with a space that is not the caller's (SentencePiece's habit).
        chat_adds_bos: a rendered chat begins with `bos_token_id`, whether or not the template writes it.
    """

    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    special_ids: frozenset[int]
    end_ids: frozenset[int]

    @property
    def special_tokens(self) -> Mapping[str, str]: ...

    strips_space: bool
    chat_adds_bos: bool

    def encode(self, text: str, *, add_special_tokens: bool, control: ControlScope) -> list[int]:
        """Token ids of `text`, which is free of lone surrogates.

        With spans as `control`, tokens that look like markup (`<|...|>`) count as control tokens too,
        whatever their type.
        """

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for, 0 <= token < vocab_size."""


def covers(spans: Sequence[Span], start: int, end: int) -> bool:
    """Whether one of `spans` holds all of [start, end)."""
    i = bisect_right(spans, start, key=lambda span: span[0]) - 1
    return i >= 0 and spans[i][1] >= end


def looks_like_markup(text: str) -> bool:
    """Tokens such as <|user|>, which some vocabularies list as ordinary words."""
    return len(text) > 3 and text[:2] in ("<|", "<｜") and text[-2:] in ("|>", "｜>")


def byte_characters() -> dict[str, int]:
    """The 256 printable characters that stand for bytes in byte-level vocabularies, character -> byte.

    A byte that prints (in Latin-1) is its own character, the others follow from U+0100 on in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    table.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return table


CHARACTER_BYTES = byte_characters()


def from_byte_characters(text: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary spells; other characters as their UTF-8."""
    try:
        return bytes([CHARACTER_BYTES[character] for character in text])
    except KeyError:
        return text.encode("utf-8", "surrogateescape")


def byte_of_name(text: str) -> int | None:
    """The byte that a token named like <0x0A> stands for."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            return None
    return None
