"""The formats of tool calls: which there are, which one a model wants, and a parser for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from fastllm.errors import RequestError
from fastllm.serve.parsers import hermes, llama_json, mistral, pythonic
from fastllm.serve.parsers.lark import Lark
from fastllm.serve.parsers.template_probe import KEY, NAME, probe
from fastllm.serve.parsers.tool_choice import Tool
from fastllm.serve.parsers.tool_parser import ToolParser

GrammarOf = Callable[[Lark, Sequence[Tool], int], str]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One format.

    Attributes:
        name: by which it is asked for.
        parser: reads it.
        markers: texts that belong to it, and may be control tokens of a model.
        special: they are, in the models that the format is from.
        calls: makes the grammar of an answer that is calls, up to so many; what follows `lead`.
        lead: what such an answer begins with where it is a control token, which no grammar can ask for; "":
            nothing. It goes to the end of the prompt.
        free: makes the grammar of text in which calls are obeyed; None: there is none, since calls begin with
            a control token.
        begins: what every call of it begins with; a model that has it as a control token has no `free`.
        written: matches what a chat template writes for a call.
        said: matches the source of a template that asks for the format and shows no call.
    """

    name: str
    parser: type[ToolParser]
    markers: tuple[str, ...]
    special: bool
    calls: GrammarOf
    free: GrammarOf | None
    written: re.Pattern[str]
    said: re.Pattern[str]
    lead: str = ""
    begins: str = ""


def _call(opening: str, key: str = "arguments") -> re.Pattern[str]:
    name = rf'(?:"type":\s*"function",\s*)?"name":\s*"{NAME}",\s*"{key}"'
    return re.compile(opening + r"\s*\[?\s*\{\s*" + name)


_MISTRAL_MARKERS = (mistral.MARKER, mistral.ID, mistral.ARGUMENTS)
_FORMATS = (
    ToolFormat(
        "mistral_args",
        mistral.MistralParser,
        _MISTRAL_MARKERS,
        True,
        mistral.named_calls,
        None,
        re.compile(rf"\[TOOL_CALLS\]\s*{NAME}(?:\[CALL_ID\]\w+)?\[ARGS\]"),
        re.compile(r"\[ARGS\]"),
        mistral.MARKER,
    ),
    ToolFormat(
        "mistral",
        mistral.MistralParser,
        _MISTRAL_MARKERS,
        True,
        mistral.array_calls,
        None,
        _call(r"\[TOOL_CALLS\]"),
        re.compile(r"\[TOOL_CALLS\]"),
        mistral.MARKER,
    ),
    ToolFormat(
        "hermes",
        hermes.HermesParser,
        (hermes.BEGIN, hermes.END),
        False,
        hermes.calls,
        hermes.free,
        _call("<tool_call>"),
        re.compile(r"<tool_call>(?!.*<function=)", re.DOTALL),
        begins=hermes.BEGIN,
    ),
    ToolFormat(
        "llama_pythonic",
        pythonic.PythonicParser,
        (*pythonic.TAGS, pythonic.END),
        True,
        pythonic.calls,
        pythonic.free,
        re.compile(rf"\[\s*{NAME}\(\s*{KEY}\s*="),
        re.compile(r"\[func_name1?\("),
    ),
    ToolFormat(
        "llama3_json",
        llama_json.LlamaJSONParser,
        (llama_json.TAG,),
        True,
        llama_json.calls,
        llama_json.free,
        _call(r"(?:^|[\s>])", "parameters"),
        re.compile(r'\{"name": function name, "parameters":'),
    ),
)
FORMATS = {form.name: form for form in _FORMATS}


def find_format(name: str) -> ToolFormat:
    """The format of this name.

    Raises:
        RequestError: there is none.
    """
    if name not in FORMATS:
        raise RequestError("tool_parser", name, f"one of {', '.join(FORMATS)}")
    return FORMATS[name]


def make(
    name: str,
    tools: Iterable[Tool | str] | None = None,
    *,
    parallel: bool = True,
    stream_arguments: bool = False,
    new_id: Callable[[], str] | None = None,
) -> ToolParser:
    """A parser for one answer.

    Args:
        name: of the format.
        tools: that may be called, or their names; None: any name is a function's.
        parallel, stream_arguments, new_id: see `ToolParser`.

    Raises:
        RequestError: there is no such format.
    """
    form = find_format(name)
    names = None if tools is None else [tool if isinstance(tool, str) else tool.name for tool in tools]
    return form.parser(names, parallel=parallel, stream_arguments=stream_arguments, new_id=new_id)


def detect(template: str) -> str | None:
    """The name of the format in which a chat template writes calls; None: it writes none, or in another way.

    Args:
        template: its jinja2 source; the one for tools, where a model has several.
    """
    text = probe(template).call_text
    for form in _FORMATS:
        if text is not None and form.written.search(text):
            return form.name
        if text is None and form.said.search(template):
            return form.name
    return None


def needs_special_tokens(name: str, special_tokens: Collection[str] | None = None) -> bool:
    """Whether the text of an answer has to be made with `skip_special_tokens=False`.

    Args:
        special_tokens: texts of the model's control tokens; None: what they are in the models that the format
            is from.
    """
    form = find_format(name)
    return form.special if special_tokens is None else any(m in special_tokens for m in form.markers)
