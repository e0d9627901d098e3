"""Chat templates: a conversation becomes the text that a model was trained to continue.

`ChatTemplate.render` returns a `TemplateText`: the spans that the template wrote are known in it, so that the
tokenizer makes control tokens of those and never of what a message says. The name of a role that is in common
use counts as the template's, since templates put it inside of control tokens (`<|user|>`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

from fastllm.errors import FastLLMError, ModelFileError, RequestError
from fastllm.formats.template_budget import BudgetError, begin
from fastllm.formats.template_sandbox import ChatEnvironment, Raised
from fastllm.formats.template_text import TemplateText

TEMPLATE_CHARS_MAX = 256 << 10
NODES_MAX = 1 << 20  # values in messages, tools and other arguments together
DEPTH_MAX = 64
ROLES = frozenset(
    (
        *("system", "developer", "user", "assistant", "tool", "function", "ipython", "model"),
        *("human", "gpt", "observation", "context", "documents", "environment"),
    )
)
_RESERVED = frozenset(("messages", "add_generation_prompt", "tools", "documents", "self", "loop", "caller"))

_PROBE = "part of a content"

_environment = ChatEnvironment()


class ChatTemplate:
    """A compiled template.

    Args:
        source: the jinja2 text.
        origin: the model file it was found in; None where a request brought it along, which makes its faults
            the request's.

    Raises:
        ModelFileError, RequestError: `source` is too long or not a template.
    """

    def __init__(self, source: str, origin: str | None) -> None:
        self.source = source
        self._origin = origin
        if len(source) > TEMPLATE_CHARS_MAX:
            raise self._fault(f"is longer than {TEMPLATE_CHARS_MAX} characters")
        begin()
        try:
            self._compiled = _compile(source)
        except TemplateSyntaxError as error:
            raise self._fault(f"line {error.lineno}: {error.message}") from error
        except (TemplateError, SyntaxError, RecursionError, MemoryError, ValueError, TypeError) as error:
            raise self._fault(f"cannot be compiled: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        special_tokens: Mapping[str, str] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of the conversation.

        Args:
            messages: mappings with a `role` and `content` (text, or a list of `{"type": "text", "text":
                ...}`); further entries such as `tool_calls` are the template's business.
            special_tokens: names (`bos_token`, ...) -> texts; the template's own text.
            variables: further names for the template.

        Raises:
            RequestError: the messages are malformed or the template refuses them.
            ModelFileError: the template tries what the sandbox forbids, or does not come to an end.
        """
        context: dict[str, Any] = {k: TemplateText.own(v) for k, v in (special_tokens or {}).items()}
        copy = _Copier()
        context["messages"] = copied = _messages(messages, copy)
        if any(isinstance(message.get("content"), list) for message in copied) and not self._takes_parts:
            for message in copied:
                if isinstance(message.get("content"), list):
                    message["content"] = "\n".join(part["text"] for part in message["content"])
        for name, value in (variables or {}).items():
            if name in _RESERVED or name.startswith("_"):
                raise RequestError("chat_template_kwargs", name, "names that a template does not reserve")
            context[name] = copy(value, name)
        context["tools"] = _listed(tools, "tools", copy)
        context["documents"] = _listed(documents, "documents", copy)
        context["add_generation_prompt"] = bool(add_generation_prompt)
        return self._run(context)

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template goes through a content's parts; one that does not would print the list."""
        content = [{"type": "text", "text": _PROBE}]
        try:
            text = self._run(
                {"messages": [{"role": "user", "content": content}], "add_generation_prompt": False}
            )
        except FastLLMError:
            return False
        return _PROBE in text and "'type'" not in text and '"type"' not in text

    def _run(self, context: Mapping[str, Any]) -> str:
        budget = begin()
        compiled = self._compiled
        try:
            pieces = []
            for piece in compiled.root_render_func(compiled.new_context(dict(context))):
                budget.step()
                pieces.append(piece)
            return str(_environment.concat(pieces))
        except Raised as error:
            raise RequestError(
                "messages", str(error), "a conversation that the chat template accepts"
            ) from error
        except (SecurityError, BudgetError, RecursionError, MemoryError) as error:
            raise self._fault(f"was stopped: {error}") from error
        except FastLLMError:
            raise
        except Exception as error:  # a template can fail in any way that Python can
            reason = f"{type(error).__name__}: {error}"
            raise RequestError(
                "messages", reason[:500], "a conversation that the chat template accepts"
            ) from error
        finally:
            budget.end()

    def _fault(self, reason: str) -> FastLLMError:
        if self._origin is None:
            return RequestError("chat_template", self.source, f"a usable template; this one {reason}")
        return ModelFileError(self._origin, reason, key="chat_template")


@lru_cache(maxsize=16)
def _compile(source: str) -> Any:
    return _environment.compile_chat(source)


def _listed(value: object, name: str, copy: _Copier) -> Any:
    """A copy of a list, or None. A text or a mapping would fall apart into characters or keys."""
    if value is None:
        return None
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        raise RequestError(name, value, "a list, or None")
    return copy(list(value), name)


class _Copier:
    """Plain copies of what a request gives: texts, numbers, lists and dicts, and nothing else."""

    def __init__(self) -> None:
        self._nodes = 0

    def __call__(self, value: Any, place: str, depth: int = 0) -> Any:
        self._nodes += 1
        if self._nodes > NODES_MAX:
            raise RequestError(place, "...", f"at most {NODES_MAX} values in all")
        if depth > DEPTH_MAX:
            raise RequestError(place, "...", f"at most {DEPTH_MAX} levels of nesting")
        if isinstance(value, str):
            return _text(value, place)
        if value is None or isinstance(value, (bool, float)):
            return value
        if isinstance(value, int):
            if value.bit_length() > 1024:
                raise RequestError(place, "...", "an integer of at most 1024 bits")
            return int(value)
        if isinstance(value, Mapping):
            copied = {}
            for key, item in value.items():
                if not isinstance(key, str):
                    raise RequestError(place, key, "names that are text")
                copied[_text(key, place)] = self(item, f"{place}.{key[:80]}", depth + 1)
            return copied
        if isinstance(value, (list, tuple)):
            return [self(item, f"{place}[{i}]", depth + 1) for i, item in enumerate(value)]
        raise RequestError(place, value, "text, numbers, booleans, null, lists and mappings")


def _text(value: str, place: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(place, value, "text without lone surrogates") from None
    return str.__str__(value)


def _messages(messages: Any, copy: _Copier) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise RequestError("messages", messages, "a list of mappings with role and content")
    if not messages:
        raise RequestError("messages", messages, "at least one message")
    copied = []
    for i, message in enumerate(messages):
        place = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise RequestError(place, message, "a mapping with role and content")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise RequestError(f"{place}.role", role, "a text such as 'user'")
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            for j, part in enumerate(content):
                if not (
                    isinstance(part, Mapping)
                    and part.get("type") == "text"
                    and isinstance(part.get("text"), str)
                ):
                    raise RequestError(f"{place}.content[{j}]", part, '{"type": "text", "text": ...}')
        elif not isinstance(content, str) and (content is not None or not set(message) - {"role", "content"}):
            raise RequestError(f"{place}.content", content, "a text or a list of text parts")
        plain = copy(message, place)
        if role in ROLES:
            plain["role"] = TemplateText.own(plain["role"])
        copied.append(plain)
    return copied
