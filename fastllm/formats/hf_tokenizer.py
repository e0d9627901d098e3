"""Tokenizers from a directory with tokenizer.json, which the `tokenizers` library reads itself.

The files beside it count as well: tokenizer_config.json (special tokens, chat template),
special_tokens_map.json, chat_template.jinja, and generation_config.json or config.json for the ends of
sequence.

The library finds control tokens in any text that it encodes. To encode text in which some of them are only
text, there is a second copy of the tokenizer, made when first needed, whose control tokens have unguessable
names; the places that do count are renamed in the text, everything else is plain text to that copy.
"""

from __future__ import annotations

import io
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Engine

from fastllm.errors import FastLLMError, ModelFileError, RequestError, UnsupportedModelError
from fastllm.formats.codec import ControlScope, byte_of_name, covers, from_byte_characters, looks_like_markup
from fastllm.formats.encryption import decrypt_small, is_encrypted
from fastllm.formats.keys import KeySource
from fastllm.formats.vocabulary import END_TEXTS, listed_ends

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SPACE = "▁"
_MAX_ENCRYPTED_BYTES = 1 << 30  # far more than any vocabulary; it is decrypted as one piece


class HFCodec:
    """A `Codec` over a directory. See `Codec` for the attributes.

    Raises:
        ModelFileError: a file is missing or damaged.
        UnsupportedModelError: a kind of vocabulary whose tokens are not bytes of the text.
    """

    chat_adds_bos = False  # these templates write it themselves

    def __init__(self, path: str | os.PathLike[str], keys: KeySource | None = None) -> None:
        self._path = Path(path)
        self._keys = KeySource() if keys is None else keys
        file = self._path / "tokenizer.json"
        try:
            content = self._text(file)
            description = json.loads(content)
        except FastLLMError:
            raise
        except FileNotFoundError:
            raise ModelFileError(str(file), "is missing") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ModelFileError(str(file), str(error)) from error
        try:
            self._engine = Engine.from_str(content)
        except Exception as error:  # the library raises bare Exception
            raise ModelFileError(str(file), str(error)) from error
        self._engine.no_truncation()
        self._engine.no_padding()
        config = self._json("tokenizer_config.json")
        self.special_tokens = self._complete(config)
        self.chat_templates = self._templates(config)

        contents = {i: text for text, i in self._engine.get_vocab(with_added_tokens=True).items()}
        self.vocab_size = max(contents, default=-1) + 1
        if self.vocab_size == 0:
            raise ModelFileError(str(file), "the vocabulary is empty")
        added = self._engine.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added = {i: token.content for i, token in added.items()}
        self._contents = contents
        self._is_byte_level, self.strips_space = self._piece_rules(description)
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self.end_ids = frozenset(self._ends())
        # Control tokens, and tokens that look like markup whatever their type.
        self._guarded = self.special_ids | {i for i, t in self._added.items() if looks_like_markup(t)}
        self._quoted: dict[frozenset[int], _Quoted] = {}
        # Other text may become such a token when the library normalizes text before it looks for them.
        self._has_hidden_spellings = self._engine.normalizer is not None and any(
            added[i].normalized for i in self._guarded & added.keys()
        )

    # -- reading ---------------------------------------------------------------------------------------------

    def _text(self, file: Path) -> str:
        """The text of a file, decrypted if need be. Raises OSError and UnicodeDecodeError, too."""
        if not is_encrypted(file):
            return file.read_text(encoding="utf-8")
        plain = decrypt_small(file, self._keys, _MAX_ENCRYPTED_BYTES)
        return io.TextIOWrapper(io.BytesIO(plain), encoding="utf-8").read()

    def _json(self, name: str) -> dict[str, Any]:
        file = self._path / name
        try:
            value = json.loads(self._text(file))
        except FastLLMError:
            raise
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise ModelFileError(str(file), str(error)) from error
        if not isinstance(value, dict):
            raise ModelFileError(str(file), f"expected an object, got {type(value).__name__}")
        return value

    def _complete(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Add what only tokenizer_config.json knows; returns the named special tokens.

        `add_bos_token` and `add_eos_token` in there do not count: tokenizer.json's post-processor decides.
        """
        known = {token.content for token in self._engine.get_added_tokens_decoder().values()}
        listed = config.get("added_tokens_decoder")
        flagged: dict[str, AddedToken] = {}
        for key in sorted(listed or {}, key=lambda k: int(k) if str(k).isdecimal() else 0):
            token = _added_token((listed or {})[key])
            if token is not None:
                flagged[token.content] = token
                if token.content not in known:
                    (self._engine.add_special_tokens if token.special else self._engine.add_tokens)([token])
        older = self._json("special_tokens_map.json") if listed is None else {}
        names: dict[str, str] = {}
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        named: list[tuple[str | None, Any]] = [(name, older.get(name, config.get(name))) for name in _NAMES]
        named += [(None, value) for value in (extra.values() if isinstance(extra, dict) else extra)]
        for name, value in named:
            token = _added_token(value)
            if token is not None:
                plain = AddedToken(token.content, special=True, normalized=False)
                self._engine.add_special_tokens([flagged.get(token.content, plain)])
                if name is not None:
                    names[name] = token.content
        return names

    def _templates(self, config: Mapping[str, Any]) -> dict[str, str]:
        templates: dict[str, str] = {}
        given = config.get("chat_template")
        if isinstance(given, str):
            templates["default"] = given
        elif isinstance(given, list):
            for entry in given:
                if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                    templates[str(entry.get("name"))] = entry["template"]
        files = {"default": self._path / "chat_template.jinja"}
        for file in sorted((self._path / "additional_chat_templates").glob("*.jinja")):
            files[file.stem] = file
        for name, file in files.items():
            if file.is_file():
                try:
                    templates[name] = self._text(file)
                except FastLLMError:
                    raise
                except (OSError, ValueError) as error:
                    raise ModelFileError(str(file), str(error)) from error
        return templates

    def _piece_rules(self, description: Mapping[str, Any]) -> tuple[bool, bool]:
        """From the decoder: (tokens are byte-level, the first space of a text is not the text's)."""
        steps = list(_steps(description.get("decoder")))
        kinds = {step.get("type") for step in steps}
        if "ByteLevel" in kinds:
            return True, False
        if not kinds and "ByteLevel" in {
            step.get("type") for step in _steps(description.get("pre_tokenizer"))
        }:
            return True, False
        strips = any(step.get("type") == "Strip" and step.get("start", 0) > 0 for step in steps)
        for step in steps:
            if step.get("type") == "Metaspace":
                strips |= step.get("prepend_scheme", "always") != "never"
        if kinds & {"Metaspace", "Replace", "ByteFallback"} and not kinds & {
            "WordPiece",
            "CTC",
            "BPEDecoder",
        }:
            return False, strips
        raise UnsupportedModelError(
            f"{self._path / 'tokenizer.json'}: decoder {sorted(map(str, kinds))}; supported are byte-level "
            "vocabularies and those that write a space as U+2581"
        )

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        token = None if text is None else self._engine.token_to_id(text)
        return token

    def _ends(self) -> Iterable[int]:
        if self.eos_token_id is not None:
            yield self.eos_token_id
        yield from (i for i in self.special_ids if self._contents[i] in END_TEXTS)
        for name in ("generation_config.json", "config.json"):
            listed = self._json(name)
            if listed:
                yield from listed_ends(listed, self.vocab_size)
                return

    # -- encoding --------------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool, control: ControlScope) -> list[int]:
        if control is True:
            return list(self._engine.encode(text, add_special_tokens=add_special_tokens).ids)
        spans = () if control is False else control
        if control is not False and not self._has_foreign_control(text, spans):
            return list(self._engine.encode(text, add_special_tokens=add_special_tokens).ids)
        hidden = self.special_ids if control is False else self._guarded
        if hidden not in self._quoted:
            self._quoted[hidden] = _Quoted(self._engine, hidden)
        return self._quoted[hidden].encode(text, spans, add_special_tokens)

    def _has_foreign_control(self, text: str, spans: Sequence[tuple[int, int]]) -> bool:
        """Whether a control token is, or may be, written in `text` elsewhere than within `spans`."""
        if self._has_hidden_spellings:
            return True
        for token in self._guarded:
            written = self._contents[token]
            at = text.find(written)
            while at >= 0:
                if not covers(spans, at, at + len(written)):
                    return True
                at = text.find(written, at + 1)
        return False

    def token_bytes(self, token: int) -> bytes:
        text = self._added.get(token)
        if text is not None:
            return text.encode("utf-8")
        text = self._contents.get(token)
        if text is None:
            return b""
        if self._is_byte_level:
            return from_byte_characters(text)
        byte = byte_of_name(text)
        return text.replace(_SPACE, " ").encode("utf-8") if byte is None else bytes([byte])


class _Quoted:
    """A copy of a tokenizer that knows its control tokens by other names only."""

    def __init__(self, engine: Engine, control_ids: frozenset[int]) -> None:
        description = json.loads(engine.to_str())
        nonce = secrets.token_hex(16)
        self._nonce = f"\ue000{nonce}"
        names = {}
        for token in description["added_tokens"]:
            if token["id"] in control_ids:
                names[token["content"]] = f"{self._nonce}{token['id']}\ue001"
                token["content"] = names[token["content"]]
        vocab = description["model"].get("vocab")
        if isinstance(vocab, dict):
            description["model"]["vocab"] = {names.get(text, text): i for text, i in vocab.items()}
        elif isinstance(vocab, list):
            description["model"]["vocab"] = [[names.get(text, text), score] for text, score in vocab]
        if "merges" in description["model"]:
            pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in description["model"]["merges"]]
            kept = [pair for pair in pairs if not names.keys() & {*pair, "".join(pair)}]
            description["model"]["merges"] = kept
        if description["model"].get("unk_token") in names:
            description["model"]["unk_token"] = names[description["model"]["unk_token"]]
        self._engine = Engine.from_str(json.dumps(description))
        # The longest first: of two tokens that begin at one place the library takes the longer.
        self._names = sorted(names.items(), key=lambda item: -len(item[0]))

    def encode(self, text: str, spans: Sequence[tuple[int, int]], add_special_tokens: bool) -> list[int]:
        if self._nonce in text:
            raise RequestError("text", "...", "another text")
        pieces: list[str] = []
        done = 0
        for start, end in spans:
            at = start
            while at < end:
                found = next((item for item in self._names if text.startswith(item[0], at, end)), None)
                if found is None:
                    at += 1
                    continue
                pieces += [text[done:at], found[1]]
                at = done = at + len(found[0])
        pieces.append(text[done:])
        return list(self._engine.encode("".join(pieces), add_special_tokens=add_special_tokens).ids)


def _steps(node: Any) -> Iterable[Mapping[str, Any]]:
    """The steps of a decoder or pre-tokenizer, sequences taken apart."""
    if isinstance(node, dict):
        inner = node.get("decoders") or node.get("pretokenizers")
        if isinstance(inner, list):
            for step in inner:
                yield from _steps(step)
        else:
            yield node


def _added_token(value: Any) -> AddedToken | None:
    """A token as the configuration files write it: a text, or an object with flags."""
    if isinstance(value, str) and value:
        return AddedToken(value, special=True, normalized=False)
    if isinstance(value, dict) and isinstance(value.get("content"), str) and value["content"]:
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return AddedToken(value["content"], **{flag: bool(value[flag]) for flag in flags if flag in value})
    return None
