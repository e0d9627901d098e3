"""Tokenizers from GGUF metadata: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).

Text goes through two stages. First it is cut at control and user-defined tokens, the longest token first over
the whole text (not the leftmost first: that differs where tokens overlap). What lies between is encoded by
the vocabulary's own rule.

Control tokens are not part of the vocabulary that plain text is encoded with. So they come out of that first
stage or not at all, whatever the merges say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Tokenizer as Engine
from tokenizers import models

from fastllm.errors import ModelFileError, UnsupportedModelError
from fastllm.formats.codec import (
    CHARACTER_BYTES,
    ControlScope,
    byte_of_name,
    covers,
    from_byte_characters,
    looks_like_markup,
)
from fastllm.formats.pretokenizers import pre_tokenizer
from fastllm.formats.spm import ScoreMerger
from fastllm.formats.vocabulary import Reader, TokenType, Vocabulary, read_vocabulary

_KEY = "tokenizer.ggml."
_SPACE = "▁"  # how SentencePiece writes a space
_C_SPACES = " \t\n\v\f\r"
_NOT_STRIPPING = ("<unk>", "<s>", "<|endoftext|>")


class GGUFCodec:
    """A `Codec` over the metadata of a GGUF file. See `Codec` for the attributes.

    Args:
        metadata: key -> value; arrays as lists or NumPy arrays; strings that are not UTF-8 as surrogate
            escapes.
        generation_config: contents of a generation_config.json beside the file, or {}.
        source: the file, for error messages.

    Raises:
        ModelFileError: the metadata contradicts itself.
        UnsupportedModelError: a kind of vocabulary or a pre-tokenizer that is not known.
    """

    def __init__(
        self, metadata: Mapping[str, Any], generation_config: Mapping[str, Any], source: str
    ) -> None:
        reader = Reader(metadata, source)
        kind = reader.text(_KEY + "model", "")
        if kind not in ("gpt2", "llama"):
            raise UnsupportedModelError(
                f"{source}: vocabulary {kind!r} ({_KEY}model); supported are gpt2, llama"
            )
        self._is_bpe = kind == "gpt2"
        default_ids = (None, None, None) if self._is_bpe else (1, 2, 0)
        self._vocab = vocab = read_vocabulary(reader, generation_config, default_ids=default_ids)
        self.vocab_size = len(vocab.texts)
        self.bos_token_id = vocab.bos_id
        self.eos_token_id = vocab.eos_id
        self.end_ids = vocab.end_ids
        self.special_ids = vocab.control_ids
        self.special_tokens = _names(vocab)
        self._encode_plain: Callable[[str], list[int]]
        if self._is_bpe:
            pre = pre_tokenizer(reader.text(_KEY + "pre", "default"))
            self._encode_plain = _ByteLevel(reader, vocab, pre).encode
            self.strips_space = False
            self._add_bos = pre.add_bos
        else:
            self._encode_plain = _merger(vocab).encode
            self.strips_space = reader.flag(_KEY + "add_space_prefix", True)
            self._add_bos = True
        self._add_bos = reader.flag(_KEY + "add_bos_token", self._add_bos)
        self._add_eos = reader.flag(_KEY + "add_eos_token", False)
        self.chat_adds_bos = self._add_bos
        self._swallows = _space_swallowing(vocab, reader.text("general.name", ""))
        # Tokens that are looked for in text before anything else, the longest (in bytes) first.
        types = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
        written = [i for i, kind in enumerate(vocab.types) if kind in types]
        length = {i: len(vocab.texts[i].encode("utf-8", "surrogateescape")) for i in written}
        self._written = [(vocab.texts[i], i) for i in sorted(written, key=lambda i: (-length[i], i))]

    def encode(self, text: str, *, add_special_tokens: bool, control: ControlScope) -> list[int]:
        ids: list[int] = []
        if add_special_tokens and self._add_bos and self.bos_token_id is not None:
            ids.append(self.bos_token_id)
        after_special = True
        for part in self._cut(text, control):
            if isinstance(part, int):
                ids.append(part)
                after_special = True
            elif self._is_bpe:
                ids += self._encode_plain(part)
            else:
                spaced = " " + part if self.strips_space and after_special else part
                ids += self._encode_plain(spaced.replace(" ", _SPACE))
                after_special = False
        if add_special_tokens and self._add_eos and self.eos_token_id is not None:
            ids.append(self.eos_token_id)
        return ids

    def _cut(self, text: str, control: ControlScope) -> list[str | int]:
        """`text` as tokens that are written out in it (their ids) and the texts between."""
        if not text:
            return []
        scope = None if isinstance(control, bool) else control
        parts: list[tuple[int, int] | int] = [(0, len(text))]
        for written, token in self._written:
            is_control = token in self.special_ids
            if written not in text or (is_control and control is False):
                continue
            limit = scope if is_control or (scope is not None and looks_like_markup(written)) else None
            parts = self._cut_at(text, parts, written, token, limit)
        return [part if isinstance(part, int) else text[part[0] : part[1]] for part in parts]

    def _cut_at(
        self, text: str, parts: list[tuple[int, int] | int], written: str, token: int, limit: Any
    ) -> list[tuple[int, int] | int]:
        cut: list[tuple[int, int] | int] = []
        for part in parts:
            if isinstance(part, int):
                cut.append(part)
                continue
            start, end = part
            search = start
            while (at := text.find(written, search, end)) >= 0:
                after = at + len(written)
                if limit is not None and not covers(limit, at, after):
                    search = at + 1
                    continue
                if at > start:
                    cut.append((start, at))
                cut.append(token)
                if token in self._swallows:
                    while after < end and text[after] in _C_SPACES:
                        after += 1
                start = search = after
            if start < end:
                cut.append((start, end))
        return cut

    def token_bytes(self, token: int) -> bytes:
        text, kind = self._vocab.texts[token], self._vocab.types[token]
        if kind == TokenType.NORMAL:
            if self._is_bpe:
                return from_byte_characters(text)
            return text.replace(_SPACE, " ").encode("utf-8", "surrogateescape")
        if kind == TokenType.BYTE:
            byte = byte_of_name(text)
            return text.encode("utf-8", "surrogateescape") if byte is None else bytes([byte])
        if kind in (TokenType.UNUSED, TokenType.UNDEFINED):
            return b""
        return text.encode("utf-8", "surrogateescape")


def _names(vocab: Vocabulary) -> dict[str, str]:
    ids = {
        "bos_token": vocab.bos_id,
        "eos_token": vocab.eos_id,
        "unk_token": vocab.unknown_id,
        "pad_token": vocab.pad_id,
    }
    return {name: vocab.texts[i] for name, i in ids.items() if i is not None}


def _space_swallowing(vocab: Vocabulary, model_name: str) -> frozenset[int]:
    """Tokens that swallow the white space after them. No key says so; Phi-3's are known to."""
    if not any(name in model_name.lower() for name in ("phi-3", "phi3")):
        return frozenset()
    types = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    return frozenset(
        i for i, kind in enumerate(vocab.types) if kind in types and vocab.texts[i] not in _NOT_STRIPPING
    )


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _plain(vocab: Vocabulary) -> dict[str, int]:
    """The tokens that plain text may become."""
    plain = vocab.ids.copy()
    for token in vocab.control_ids:
        del plain[vocab.texts[token]]
    if not _is_utf8("".join(vocab.texts)):  # no text is made of such tokens
        plain = {text: token for text, token in plain.items() if _is_utf8(text)}
    return plain


def _merger(vocab: Vocabulary) -> ScoreMerger:
    plain = _plain(vocab)
    byte_ids = [
        plain.get(f"<0x{byte:02X}>", plain.get(chr(byte)) if byte < 0x80 else None) for byte in range(256)
    ]
    return ScoreMerger(plain, vocab.scores, byte_ids, vocab.unknown_id)


class _ByteLevel:
    """Byte-level BPE on the `tokenizers` library.

    The library wants every byte and every result of a merge to be a token. Where a file has none, an id past
    the end of the vocabulary stands in, and is taken out of the result.
    """

    def __init__(self, reader: Reader, vocab: Vocabulary, pre: Any) -> None:
        key = _KEY + "merges"
        if key not in reader.metadata:
            raise reader.error(key, "is missing")
        lines = reader.strings(key)
        if len(set(lines)) != len(lines):
            lines = list(dict.fromkeys(lines))  # the first of equal merges counts
        merges = [(line[:1] + a, b) for line in lines for a, _, b in (line[1:].partition(" "),) if b]
        if len(merges) != len(lines):
            bad = next(line for line in lines if not line[1:].partition(" ")[2])
            raise reader.error(key, f"expected two texts and a space between them, got {bad!r}")
        plain = _plain(vocab)
        self._stand_ins: dict[int, list[int]] = {}
        for character in CHARACTER_BYTES:
            self._ensure(plain, vocab, character)
        try:
            model = self._model(plain, merges, pre.ignore_merges)
        except Exception:  # the library says which token it misses; find them all
            merges = [(a, b) for a, b in merges if _is_utf8(a) and _is_utf8(b)]
            for a, b in merges:
                for text in (a, b, a + b):
                    self._ensure(plain, vocab, text)
            try:
                model = self._model(plain, merges, pre.ignore_merges)
            except Exception as error:
                raise ModelFileError(reader.source, str(error), key=key) from error
        self._engine = Engine(model)
        self._engine.pre_tokenizer = pre.build()

    @staticmethod
    def _model(plain: dict[str, int], merges: list[tuple[str, str]], ignore_merges: bool) -> models.BPE:
        return models.BPE(vocab=plain, merges=merges, ignore_merges=ignore_merges)

    def _ensure(self, plain: dict[str, int], vocab: Vocabulary, text: str) -> None:
        if text not in plain:
            token = len(vocab.texts) + len(self._stand_ins)
            spelled = [plain.get(character) for character in text if len(text) > 1 and character.isascii()]
            self._stand_ins[token] = [i for i in spelled if i is not None and i < len(vocab.texts)]
            plain[text] = token

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._engine.encode(text, add_special_tokens=False).ids
        stand_ins = self._stand_ins
        if stand_ins and not stand_ins.keys().isdisjoint(ids):
            return [i for token in ids for i in stand_ins.get(token, (token,))]
        return ids
