"""From the messages of OpenAI's chat API to those that a chat template understands: `normalize_messages`."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from typing import Any

from fastllm.errors import RequestError
from fastllm.serve.parsers.template_probe import TemplateTraits, probe
from fastllm.serve.parsers.tool_choice import NAME

MAX_CALLS = 128  # in one message
_ROLES = ("system", "developer", "user", "assistant", "tool")
_KEYS = {
    "system": ("content", "name"),
    "developer": ("content", "name"),
    "user": ("content", "name"),
    "assistant": ("content", "name", "refusal", "tool_calls", "reasoning_content", "reasoning"),
    "tool": ("content", "name", "tool_call_id"),
}
_ALPHABET = string.digits + string.ascii_letters
_ID_CHARACTERS = 256


def normalize_messages(messages: object, template: str) -> list[dict[str, Any]]:
    """Messages as the template wants them; the given ones stay as they are.

    A list of text parts becomes a text, the parts on lines of their own. The role developer becomes system
    where the template does not know it. The arguments of calls become a mapping, or stay JSON where the
    template puts them into a text; ids of calls become nine letters and digits where it insists on that; a
    tool's message gets the name of its function. `reasoning_content` (or `reasoning`) of earlier answers is
    kept where the template reads it. Entries that are null count as absent.

    Args:
        messages: a list of messages.
        template: jinja2 source of the chat template; the one for tools, where a model has several.

    Raises:
        RequestError: with the path of what is at fault, such as `messages[1].content[0].type`.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError("messages", messages, "a list of messages")
    traits = probe(template)
    called: dict[str, str] = {}  # id -> name of the function
    normal = []
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        entries = _entries(message, place)
        role = entries["role"]
        if role == "assistant":
            normal.append(_assistant(entries, place, traits, called))
        elif role == "tool":
            normal.append(_tool_result(entries, place, traits, called))
        else:
            if role == "developer" and not traits.knows_developer:
                role = "system"
            text = _text(entries.get("content"), f"{place}.content", ("text",))
            normal.append({"role": role, "content": text, **_name(entries, place)})
    return normal


def _entries(message: object, place: str) -> dict[str, Any]:
    """The entries of a message that are not null, of a known role and known for it."""
    if not isinstance(message, Mapping):
        raise RequestError(place, message, "an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise RequestError(f"{place}.role", role, f"one of {', '.join(_ROLES)}")
    entries = {}
    for key, value in message.items():
        if value is None or key == "role" or (key == "annotations" and value == []):
            continue
        if key not in _KEYS[role]:
            limit = f"no such entry for this role; {', '.join(_KEYS[role])}"
            raise RequestError(f"{place}.{str(key)[:80]}", value, limit)
        entries[key] = value
    return {"role": role, **entries}


def _text(content: object, place: str, kinds: tuple[str, ...]) -> str:
    """The text of a content: a text, or a list of parts of these kinds."""
    if isinstance(content, str):
        return content
    if isinstance(content, (bytes, Mapping)) or not isinstance(content, Sequence):
        raise RequestError(place, content, "a text, or a list of text parts")
    texts = []
    for index, part in enumerate(content):
        here = f"{place}[{index}]"
        if not isinstance(part, Mapping):
            raise RequestError(here, part, '{"type": "text", "text": ...}')
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in kinds:
            raise RequestError(f"{here}.type", kind, f'"{kinds[0]}": this model reads text alone')
        text = part.get(kind)
        if not isinstance(text, str):
            raise RequestError(f"{here}.{kind}", text, "a text")
        texts.append(text)
    return "\n".join(texts)


def _name(entries: Mapping[str, Any], place: str) -> dict[str, str]:
    name = entries.get("name")
    if name is None:
        return {}
    if not isinstance(name, str):
        raise RequestError(f"{place}.name", name, "a text")
    return {"name": name}


def _assistant(
    entries: Mapping[str, Any], place: str, traits: TemplateTraits, called: dict[str, str]
) -> dict[str, Any]:
    calls = entries.get("tool_calls")
    refused = entries.get("refusal")
    if refused is not None and not isinstance(refused, str):
        raise RequestError(f"{place}.refusal", refused, "a text")
    content = entries.get("content")
    if content is None and refused is not None:
        content = refused
    message: dict[str, Any] = {"role": "assistant"}
    if content is not None:
        message["content"] = _text(content, f"{place}.content", ("text", "refusal"))
    message |= _name(entries, place)
    for key in ("reasoning", "reasoning_content"):
        thought = entries.get(key)
        if thought is not None and not isinstance(thought, str):
            raise RequestError(f"{place}.{key}", thought, "a text")
        if thought is not None and traits.knows_reasoning:
            message["reasoning_content"] = thought
    if calls is not None:
        calls = _calls(calls, f"{place}.tool_calls", traits, called)
    if calls:
        message["tool_calls"] = calls
    if not message.get("content"):
        if not calls and "content" not in message:
            raise RequestError(f"{place}.content", None, "a text, where there are no tool_calls")
        message["content"] = traits.empty_content if calls else ""
    return message


def _calls(value: object, place: str, traits: TemplateTraits, called: dict[str, str]) -> list[dict[str, Any]]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        raise RequestError(place, value, "a list of calls")
    if len(value) > MAX_CALLS:
        raise RequestError(place, f"{len(value)} calls", f"at most {MAX_CALLS} calls")
    calls = []
    for index, call in enumerate(value):
        here = f"{place}[{index}]"
        if not isinstance(call, Mapping):
            raise RequestError(here, call, "an object with id, type and function")
        if call.get("type", "function") != "function":
            raise RequestError(f"{here}.type", call["type"], '"function"')
        function = call.get("function")
        if not isinstance(function, Mapping):
            raise RequestError(f"{here}.function", function, "an object with name and arguments")
        name = function.get("name")
        if not isinstance(name, str) or NAME.fullmatch(name) is None:
            raise RequestError(f"{here}.function.name", name, "1..64 characters of a-z, A-Z, 0-9, _ and -")
        call_id = _id(call.get("id"), f"{here}.id")
        if call_id in called:
            raise RequestError(f"{here}.id", call_id, "an id that no other call has")
        called[call_id] = name
        arguments = _arguments(function.get("arguments"), f"{here}.function.arguments", traits)
        calls.append(
            {
                "id": _shown_id(call_id, traits),
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
        )
    return calls


def _arguments(value: object, place: str, traits: TemplateTraits) -> Any:
    """The arguments of a call: a JSON text of an object, or the object; "" counts as {}."""
    parsed = value
    if isinstance(value, str):
        try:
            parsed = json.loads(value, parse_constant=_refuse) if value.strip() else {}
        except (ValueError, RecursionError) as error:
            raise RequestError(place, value, "the JSON text of an object") from error
    if not isinstance(parsed, Mapping):
        raise RequestError(place, value, "the JSON text of an object")
    if not traits.arguments_as_text:
        return parsed
    if isinstance(value, str) and value.strip():
        return value
    try:
        return json.dumps(parsed, ensure_ascii=False, allow_nan=False, default=dict)
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(place, value, "the JSON text of an object") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _tool_result(
    entries: Mapping[str, Any], place: str, traits: TemplateTraits, called: Mapping[str, str]
) -> dict[str, Any]:
    call_id = _id(entries.get("tool_call_id"), f"{place}.tool_call_id")
    if call_id not in called:
        raise RequestError(f"{place}.tool_call_id", call_id, "the id of a call in a message before it")
    text = _text(entries.get("content"), f"{place}.content", ("text",))
    named = _name(entries, place) or {"name": called[call_id]}
    return {"role": "tool", "content": text, "tool_call_id": _shown_id(call_id, traits), **named}


def _id(value: object, place: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _ID_CHARACTERS:
        raise RequestError(place, value, f"a text of 1..{_ID_CHARACTERS} characters")
    return value


def _shown_id(call_id: str, traits: TemplateTraits) -> str:
    """The id itself; where a template insists on nine letters and digits, nine that follow from it."""
    if not traits.short_ids or (len(call_id) == 9 and call_id.isascii() and call_id.isalnum()):
        return call_id
    number = int.from_bytes(hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).digest(), "big")
    digits = []
    for _ in range(9):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(digits)
