"""What a chat template makes of tool calls, found out by letting it write one.

Templates agree on no names and few habits; but what they write for an assistant's message with a call is what
their model was trained to write itself. `probe` renders such a conversation in the sandbox that all templates
run in, in the forms that are in use, until the call appears.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fastllm.errors import FastLLMError, RequestError
from fastllm.formats.chat_template import ChatTemplate

NAME, KEY, VALUE = "probe_function", "probe_key", "probe_value"
SHORT_ID = "probe0001"  # nine letters and digits, as Mistral's templates insist on
_LONG_ID = "call_0123456789abcdefghijklmn"
_TOKENS = {"bos_token": "", "eos_token": "", "pad_token": "", "unk_token": ""}


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """How a template wants its messages, and how it writes a call.

    Attributes:
        call_text: the text of a conversation with a call to NAME; None: the template writes no calls.
        arguments_as_text: arguments are a JSON text, not a mapping.
        empty_content: the content of a message that is calls alone: "" or None.
        short_ids: ids of calls have exactly nine letters and digits.
        knows_developer: it has a role "developer".
        knows_reasoning: it reads `reasoning_content`.
    """

    call_text: str | None
    arguments_as_text: bool
    empty_content: str | None
    short_ids: bool
    knows_developer: bool
    knows_reasoning: bool


@lru_cache(maxsize=32)
def probe(source: str) -> TemplateTraits:
    """The traits of a template. One that cannot be used at all has those of a template without calls."""
    knows = ("developer" in source, "reasoning_content" in source)
    try:
        template = ChatTemplate(source, origin=None)
    except FastLLMError:
        return TemplateTraits(None, False, "", False, *knows)
    try:
        for as_text in (False, True):
            for content in ("", None):
                text = _render(template, as_text, content, SHORT_ID)
                if text is not None:
                    short = _render(template, as_text, content, _LONG_ID) is None
                    return TemplateTraits(text, as_text, content, short, *knows)
    except _StoppedError:
        pass
    return TemplateTraits(None, False, "", False, *knows)


class _StoppedError(Exception):
    """The template tries what the sandbox forbids, or does not come to an end; it would do so again."""


def _render(template: ChatTemplate, as_text: bool, content: str | None, call_id: str) -> str | None:
    """The text of a conversation with a call, if the call is in it."""
    arguments: Any = f'{{"{KEY}": "{VALUE}"}}' if as_text else {KEY: VALUE}
    call = {"id": call_id, "type": "function", "function": {"name": NAME, "arguments": arguments}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a question"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "a result", "tool_call_id": call_id, "name": "another_name"},
    ]
    try:
        text = template.render(messages, add_generation_prompt=False, special_tokens=_TOKENS)
    except RequestError as error:
        if error.field == "chat_template":
            raise _StoppedError from error
        return None
    return text if NAME in text and VALUE in text else None
