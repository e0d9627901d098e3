"""What may be given as a prompt or a conversation, and how it becomes token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from fastllm.errors import RequestError
from fastllm.pooling_params import PoolingParams
from fastllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from fastllm.formats.tokenizer import Tokenizer


class _Prompt(TypedDict, total=False):
    cache_salt: str | None  # cached blocks are shared only with prompts of the same one


class TextPrompt(_Prompt):
    """A prompt as text. Control tokens written out in it (`<|im_end|>`) become those tokens."""

    prompt: str


class TokensPrompt(_Prompt):
    """A prompt as token ids, taken as they are: no BOS is added."""

    prompt_token_ids: Sequence[int]


PromptType: TypeAlias = "str | TextPrompt | TokensPrompt"
Message: TypeAlias = Mapping[str, Any]  # role, content, and what else a chat template reads

_ENTRIES = ("prompt", "prompt_token_ids", "cache_salt")
PROMPT_FORMS = 'a text, {"prompt": text} or {"prompt_token_ids": [ids]}'
# Names that the caller of a chat template sets by other means.
_RESERVED = frozenset(
    (
        *("messages", "add_generation_prompt", "tools", "chat_template"),
        *("bos_token", "eos_token", "pad_token", "unk_token"),
    )
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that has been looked at: text, token ids, or ids with the text they were made from."""

    text: str | None
    token_ids: Sequence[int] | None = None
    cache_salt: str | None = None


def parse_prompt(value: object, place: str = "prompt") -> Prompt:
    """One prompt.

    Args:
        value: one of the forms of `PromptType`.
        place: what an error calls it.

    Raises:
        RequestError: something else, or a dict with other entries.
    """
    if isinstance(value, str):
        return Prompt(value)
    if not isinstance(value, Mapping):
        if _is_token_ids(value):
            raise RequestError(place, value, '{"prompt_token_ids": [ids]} for token ids')
        raise RequestError(place, value, PROMPT_FORMS)
    unknown = sorted(str(key) for key in value if key not in _ENTRIES)
    if unknown:
        raise RequestError(f"{place}: {unknown[0]}", value[unknown[0]], "no such entry; " + PROMPT_FORMS)
    text = value.get("prompt")
    ids = value.get("prompt_token_ids")
    salt = value.get("cache_salt")
    if salt is not None and not isinstance(salt, str):
        raise RequestError(f"{place}: cache_salt", salt, "a text")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"{place}: prompt", text, "a text")
    if ids is None:
        if text is None:
            raise RequestError(place, value, PROMPT_FORMS)
        return Prompt(text, None, salt)
    if isinstance(ids, (str, bytes, Mapping)) or not hasattr(ids, "__len__"):
        raise RequestError(f"{place}: prompt_token_ids", ids, "a list of token ids")
    return Prompt(text, ids, salt)


def parse_prompts(value: object, name: str = "prompts") -> list[Prompt]:
    """One prompt or a sequence of them; see `parse_prompt`. An error names the one at fault."""
    if isinstance(value, (str, Mapping)):
        return [parse_prompt(value, name)]
    if isinstance(value, bytes) or not isinstance(value, Sequence):
        raise RequestError(name, value, f"{PROMPT_FORMS}, or a list of those")
    if _is_token_ids(value):
        raise RequestError(name, value, '{"prompt_token_ids": [ids]} for token ids')
    return [parse_prompt(item, f"{name}[{index}]") for index, item in enumerate(value)]


def parse_params(value: object, count: int) -> list[SamplingParams]:
    """Sampling parameters for `count` prompts: one object for all, one for each, or None for the defaults."""
    if value is None:
        value = SamplingParams()
    if isinstance(value, SamplingParams):
        return [value] * count
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise RequestError("sampling_params", value, "SamplingParams, or a list of them")
    for index, item in enumerate(value):
        if not isinstance(item, SamplingParams):
            raise RequestError(f"sampling_params[{index}]", item, "SamplingParams")
    if len(value) != count:
        raise RequestError(
            "sampling_params", f"{len(value)} of them", f"one for all or {count}, one for each prompt"
        )
    return list(value)


def parse_pooling_params(value: object) -> PoolingParams:
    """Pooling parameters, or None for the defaults."""
    if value is None:
        return PoolingParams()
    if not isinstance(value, PoolingParams):
        raise RequestError("pooling_params", value, "PoolingParams")
    return value


def parse_priorities(value: object, count: int) -> list[int]:
    """Priorities for `count` prompts: one for all, or one for each. The engine looks at their range."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return [value] * count  # type: ignore[list-item]  # whatever it is: the engine says so
    if len(value) != count:
        limit = f"one for all or {count}, one for each prompt"
        raise RequestError("priority", f"{len(value)} of them", limit)
    return list(value)


def tokenize(tokenizer: Tokenizer, prompt: Prompt, place: str = "") -> Sequence[int]:
    """The token ids of a prompt. Text gets the BOS that the model wants.

    Raises:
        RequestError: the text has lone surrogates, or gives no token at all.
    """
    if prompt.token_ids is not None:
        return prompt.token_ids
    assert prompt.text is not None
    try:
        ids = tokenizer.encode(prompt.text)
    except RequestError as error:
        raise RequestError(place or "prompt", error.value, error.limit) from error
    if not ids:  # an empty text, where the model wants no BOS
        raise RequestError(place or "prompt", prompt.text, "a text of at least one token")
    return ids


def parse_conversations(value: object) -> tuple[list[Sequence[Message]], bool]:
    """One conversation (a list of messages) or several, and whether there were several.

    What is in a message is for the chat template to check.
    """
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        if all(isinstance(item, Mapping) for item in value):
            return ([value] if value else []), False
        if all(isinstance(item, Sequence) and not isinstance(item, (str, bytes)) for item in value):
            return list(value), True
    raise RequestError(
        "messages", value, "a list of messages (dicts with role and content), or a list of such lists"
    )


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """The token ids of a conversation. Control tokens come from the template alone, never from a message.

    Args:
        chat_template_kwargs: further values for the template. Only names that it reads are accepted, and none
            of those that the call itself sets: anything else would be ignored, or would get around what the
            arguments above allow.

    Raises:
        RequestError: a name in chat_template_kwargs that is not accepted, messages that are malformed or that
            the template refuses.
        UnsupportedModelError: the model has no chat template and none was given.
    """
    extra = _allowed(tokenizer, chat_template, chat_template_kwargs or {}, has_tools=tools is not None)
    return tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=add_generation_prompt,
        chat_template=chat_template,
        tools=tools,
        **extra,
    )


def _allowed(
    tokenizer: Tokenizer, chat_template: str | None, given: Mapping[str, Any], *, has_tools: bool
) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise RequestError("chat_template_kwargs", given, "a mapping of names to values")
    if not given or not (chat_template is None or isinstance(chat_template, str)):
        return {}  # what is no template is refused by apply_chat_template
    templates = tokenizer.chat_templates
    name = chat_template or ("tool_use" if has_tools and "tool_use" in templates else "default")
    readable = _names_read(templates.get(name, name)) - _RESERVED
    for key in given:
        if key not in readable:
            known = ", ".join(sorted(readable)) or "none"
            raise RequestError("chat_template_kwargs", key, f"names that the chat template reads ({known})")
    return dict(given)


@lru_cache(maxsize=16)
def _names_read(source: str) -> frozenset[str]:
    """The variables that a template takes from outside; none where it cannot be parsed."""
    from jinja2 import TemplateError, meta

    from fastllm.formats.template_sandbox import ChatEnvironment

    try:
        return frozenset(meta.find_undeclared_variables(ChatEnvironment().parse(source)))
    except (TemplateError, RecursionError):
        return frozenset()  # apply_chat_template says what is wrong with it


def _is_token_ids(value: object) -> bool:
    """Whether this is a bare list of ids (or an array of them)."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return hasattr(value, "dtype")
    return len(value) > 0 and all(isinstance(item, int) for item in value)
