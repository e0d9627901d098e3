"""`Tokenizer`: text to token ids and back, and conversations to token ids, for every kind of model file.

Decoding is defined by bytes: every token stands for some, a sequence of tokens for their concatenation, and
    text is
that decoded as UTF-8, invalid bytes as U+FFFD. `IncrementalDetokenizer` gives the same text piece by piece.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastllm.errors import RequestError, UnsupportedModelError
from fastllm.formats.chat_template import ChatTemplate
from fastllm.formats.codec import Codec
from fastllm.formats.gguf_tokenizer import GGUFCodec
from fastllm.formats.hf_tokenizer import HFCodec
from fastllm.formats.template_text import spans_of

if TYPE_CHECKING:
    from fastllm.formats.checkpoint import Checkpoint
    from fastllm.formats.keys import KeySource

_TEMPLATE_KEY = "tokenizer.chat_template"


class Tokenizer:
    """A model's vocabulary with its rules and chat templates. Immutable; threads may share one.

    Attributes:
        vocab_size: number of token ids; a model may have more rows than that, which stand for nothing.
        bos_token_id: what sequences begin with, if anything.
        eos_token_id: the one end of sequence that the model file names first, if any.
        eos_token_ids: every id that ends a sequence.
        chat_templates: name -> jinja2 source; the usual one is called "default".
    """

    def __init__(self, codec: Codec, chat_templates: Mapping[str, str], source: str) -> None:
        self.vocab_size = codec.vocab_size
        self.bos_token_id = codec.bos_token_id
        self.eos_token_id = codec.eos_token_id
        self.eos_token_ids = codec.end_ids
        self.chat_templates = dict(chat_templates)
        self.strips_space = codec.strips_space
        self._codec = codec
        self._source = source
        self._special = codec.special_ids
        self._bytes: list[bytes | None] = [None] * codec.vocab_size
        self._compiled: dict[str, ChatTemplate] = {}

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        generation_config: Mapping[str, Any] | None = None,
        *,
        source: str = "GGUF metadata",
    ) -> Tokenizer:
        """The tokenizer that the metadata of a GGUF file describes.

        Args:
            metadata: key -> value; see `GGUFCodec`.
            generation_config: contents of a generation_config.json; its `eos_token_id` counts.
            source: the file, for error messages.

        Raises:
            ModelFileError, UnsupportedModelError
        """
        templates = {}
        for key, value in metadata.items():
            if key.startswith(_TEMPLATE_KEY) and isinstance(value, str):
                suffix = key[len(_TEMPLATE_KEY) :]
                if not suffix or suffix[0] == ".":
                    templates[suffix[1:] or "default"] = value
        return cls(GGUFCodec(metadata, generation_config or {}, source), templates, source)

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str], keys: KeySource | None = None) -> Tokenizer:
        """The tokenizer of a directory with a tokenizer.json (and the files that go with it).

        Args:
            path: the directory.
            keys: where the key of encrypted files is; None: in the environment.

        Raises:
            ModelFileError, UnsupportedModelError
            RequestError: there is no key for what is encrypted.
        """
        codec = HFCodec(path, keys)
        return cls(codec, codec.chat_templates, os.fspath(path))

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        Args:
            add_special_tokens: add what the model wants before and after a text (often one BOS).
            parse_special: make control tokens that are written out in `text` (`<|im_end|>`) those tokens.
                Without it they are ordinary text; text from a stranger should be encoded that way.

        Raises:
            RequestError: `text` is not a `str`, or has lone surrogates.
        """
        self._check_text(text)
        return self._codec.encode(text, add_special_tokens=add_special_tokens, control=parse_special)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text that `ids` stand for; bytes that are not UTF-8 become U+FFFD.

        Where the vocabulary puts a space before every text, the first space is left out.
        """
        data = b"".join(self.visible_bytes(ids, skip_special_tokens))
        if self.strips_space and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", "replace")

    def visible_bytes(self, ids: Iterable[int], skip_special_tokens: bool) -> Iterable[bytes]:
        """The bytes of each id that is shown."""
        special = self._special if skip_special_tokens else ()
        return (self.token_bytes(i) for i in ids if i not in special)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one token stands for; a control token's are its name.

        An id at or past `vocab_size` (models may have such rows) stands for nothing.
        """
        if id < 0:
            raise RequestError("token id", id, "a number that is not negative")
        if id >= self.vocab_size:
            return b""
        known = self._bytes[id]
        if known is None:
            known = self._bytes[id] = self._codec.token_bytes(id)
        return known

    def is_special(self, id: int) -> bool:
        """Whether the token is a control token, which `decode` leaves out by default."""
        return id in self._special

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        tools: Sequence[Any] | None = None,
        parse_special: bool = False,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a conversation, ready for the model to go on.

        Control tokens come from the template alone: whatever a message (or a tool, or any other argument)
            says is
        ordinary text. Where the model wants a BOS there is exactly one, whether or not the template writes
        it.

        Args:
            messages: mappings with `role` and `content` (text, or a list of `{"type": "text", "text": ...}`).
            add_generation_prompt: end with the opening of the assistant's answer.
            chat_template: jinja2 source, or the name of one of `chat_templates`, instead of the model's
                default.
            tools: JSON schemas for templates that offer tools to the model.
            parse_special: let messages write control tokens too; only for messages that the caller wrote.
            kwargs: further names for the template, such as `enable_thinking`.

        Raises:
            UnsupportedModelError: the model has no chat template and none was given.
            RequestError: messages that are malformed or that the template refuses; a bad `chat_template`.
            ModelFileError: the model's template is not usable.
        """
        text = self.render_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            chat_template=chat_template,
            tools=tools,
            **kwargs,
        )
        ids = self._codec.encode(text, add_special_tokens=False, control=parse_special or spans_of(text))
        if self._codec.chat_adds_bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            ids.insert(0, self.bos_token_id)
        return ids

    def render_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        tools: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> str:
        """The text of a conversation; arguments and errors as for `apply_chat_template`."""
        documents = kwargs.pop("documents", None)
        return self._template(chat_template, tools).render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=documents,
            special_tokens=self._codec.special_tokens,
            variables=kwargs,
        )

    def _template(self, chosen: str | None, tools: Sequence[Any] | None) -> ChatTemplate:
        if chosen is not None and not isinstance(chosen, str):
            raise RequestError("chat_template", chosen, "a text")
        if chosen is not None and chosen not in self.chat_templates:
            return ChatTemplate(chosen, origin=None)
        if chosen is None and tools is not None and "tool_use" in self.chat_templates:
            chosen = "tool_use"
        name = chosen or "default"
        if name not in self.chat_templates:
            raise UnsupportedModelError(
                f"{self._source}: the model has no chat template; pass chat_template, or use generate"
            )
        if name not in self._compiled:
            self._compiled[name] = ChatTemplate(self.chat_templates[name], origin=self._source)
        return self._compiled[name]

    @staticmethod
    def _check_text(text: str) -> None:
        if not isinstance(text, str):
            raise RequestError("text", text, "a text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            place = f"{text[error.start]!r} at {error.start}"
            raise RequestError("text", place, "text without lone surrogates") from None


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that comes with a checkpoint."""
    if checkpoint.kind == "gguf":
        return Tokenizer.from_gguf(
            checkpoint.config, checkpoint.generation_config, source=os.fspath(checkpoint.path)
        )
    return Tokenizer.from_directory(checkpoint.path, checkpoint.keys)
