"""How a model is talked with: its chat template, and the formats of calls and reasoning that follow."""

from __future__ import annotations

from dataclasses import dataclass

from fastllm.formats.chat_template import ChatTemplate
from fastllm.formats.tokenizer import Tokenizer
from fastllm.serve.parsers import Formats, special_token_texts


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a model is talked with: known once for each.

    Attributes:
        template: that it is rendered with; None: it has none.
        formats: of calls and reasoning in its answers.
        tool_template: likewise where tools are offered.
        tool_formats: and the formats then.
    """

    template: str | None
    formats: Formats
    tool_template: str | None
    tool_formats: Formats

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        chat_template: str | None,
        tool_parser: str | None,
        reasoning_parser: str | None,
    ) -> ChatFormat:
        """That of a model.

        Args:
            chat_template: instead of the model's.
            tool_parser, reasoning_parser: formats by name; None: as the template tells.

        Raises:
            RequestError: there is no such format, or chat_template is no template.
        """
        if chat_template is not None:
            ChatTemplate(chat_template, None)
        own = tokenizer.chat_templates
        plain = chat_template or own.get("default")
        tools = chat_template or own.get("tool_use") or plain
        special = special_token_texts(tokenizer)

        def formats(template: str | None) -> Formats:
            return Formats.of(template, special, tool_parser=tool_parser, reasoning_parser=reasoning_parser)

        return cls(plain, formats(plain), tools, formats(tools))
