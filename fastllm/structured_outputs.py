"""What a request may ask of the form of its output: `StructuredOutputsParams`, with vLLM's names.

Everything here comes from strangers, so that it is measured before anybody parses it: size, depth, number.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from fastllm.errors import RequestError

MAX_BYTES = 64 * 1024  # of a schema, a regular expression, a grammar, or all choices together
MAX_DEPTH = 64  # objects and arrays of a schema within each other
MAX_NUMBER_BITS = 1024
MAX_CHOICES = 4096
MAX_CHOICE_CHARACTERS = 4096
KINDS = ("json", "json_object", "regex", "choice", "grammar")

# Sampling is fastllm's own: a grammar that sets the temperature of its parts would not be obeyed.
_TEMPERATURE = re.compile(r"\[[^\]\n]*\btemperature\s*=")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """The form that an output has to have: exactly one of the following.

    Attributes:
        json: a JSON schema, as a dict or as text: at most 64 KiB, nested at most 64 deep. Keywords that
            cannot be obeyed are refused when the request is made.
        json_object: True: any JSON object.
        regex: a regular expression that the whole output matches, in the syntax of Rust's `regex` crate
            (without lookaround and backreferences), at most 64 KiB.
        choice: up to 4096 texts of 1..4096 characters, one of which is the output.
        grammar: a context-free grammar of at most 64 KiB: Lark in llguidance's variant, or GBNF (with `::=`).

    Raises:
        RequestError: field "structured_outputs"; none or several are given, or one is beyond its limits.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    # The same as one of KINDS and a text: what is compiled, and equal for equal forms.
    kind: str = field(init=False, repr=False, compare=False)
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise refusal(", ".join(given) or None, f"exactly one of {', '.join(KINDS)}")
        (kind,) = given
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "text", getattr(self, f"_settle_{kind}")())

    def _settle_json(self) -> str:
        schema: Any = self.json
        if isinstance(schema, str):
            check_text("json", schema)
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise refusal(schema, f"json: a JSON schema ({error})") from error
        if not isinstance(schema, Mapping):
            raise refusal(self.json, "json: a JSON schema, as a dict or as text of an object")
        _measure(schema)
        if "x-guidance" in schema:  # it could turn refusals off
            raise refusal("x-guidance", "json: a JSON schema without that key")
        try:
            text = json.dumps(schema, allow_nan=False, separators=(",", ":"), default=dict)
        except (ValueError, TypeError) as error:
            raise refusal(self.json, f"json: a JSON schema ({error})") from error
        return check_text("json", text)

    def _settle_json_object(self) -> str:
        if self.json_object is not True:
            raise refusal(self.json_object, "json_object: True, or nothing")
        return '{"type":"object"}'

    def _settle_regex(self) -> str:
        return check_text("regex", self.regex)

    def _settle_choice(self) -> str:
        value = self.choice
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
            raise refusal(value, "choice: a list of texts")
        texts = tuple(islice(value, MAX_CHOICES + 1))
        if not 0 < len(texts) <= MAX_CHOICES:
            raise refusal("more" if texts else "none", f"choice: 1..{MAX_CHOICES} texts")
        for text in texts:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_CHOICE_CHARACTERS:
                raise refusal(text, f"choice: texts of 1..{MAX_CHOICE_CHARACTERS} characters")
        object.__setattr__(self, "choice", texts)
        check_text("choice", "".join(texts))
        return json.dumps(list(dict.fromkeys(texts)))

    def _settle_grammar(self) -> str:
        text = check_text("grammar", self.grammar)
        if _TEMPERATURE.search(text):
            raise refusal("temperature=", "grammar: rules without a temperature of their own")
        return text


def refusal(value: Any, limit: str) -> RequestError:
    """The error of a form that is not accepted."""
    return RequestError("structured_outputs", value, limit)


def check_text(kind: str, text: object) -> str:
    """Text within its limits; raises RequestError else. Looks no further than the limit."""
    if not isinstance(text, str):
        raise refusal(text, f"{kind}: a text")
    limit = f"{kind}: at most {MAX_BYTES} bytes"
    if len(text) > MAX_BYTES:
        raise refusal(f"{len(text)} characters", limit)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise refusal(text, f"{kind}: a text without lone surrogates") from None
    if size > MAX_BYTES:
        raise refusal(f"{size} bytes", limit)
    return text


def _measure(schema: object) -> None:
    """Refuse what is too deep, too large, or no JSON; without recursion, and no further than the limits."""
    left = MAX_BYTES
    todo = [(schema, 1)]
    while todo:
        value, depth = todo.pop()
        left -= 1
        if isinstance(value, str):
            left -= len(value)
        elif isinstance(value, (Mapping, list, tuple)):
            if depth > MAX_DEPTH:
                raise refusal("a deeper one", f"json: a schema nested at most {MAX_DEPTH} deep")
            left -= len(value)
            if left >= 0 and isinstance(value, Mapping):
                for key in value:
                    if not isinstance(key, str):
                        raise refusal(key, "json: a JSON schema, whose keys are texts")
                    left -= len(key)
                todo += [(item, depth + 1) for item in value.values()]
            elif left >= 0:
                todo += [(item, depth + 1) for item in value]
        elif not (value is None or isinstance(value, (bool, int, float))):
            raise refusal(value, "json: a JSON schema of dicts, lists, texts, numbers, bools and None")
        elif isinstance(value, float) and not math.isfinite(value):
            raise refusal(value, "json: finite numbers")
        elif isinstance(value, int) and value.bit_length() > MAX_NUMBER_BITS:
            raise refusal(f"{value.bit_length()} bits", f"json: numbers of at most {MAX_NUMBER_BITS} bits")
        if left < 0:
            raise refusal("a larger one", f"json: a schema of at most {MAX_BYTES} bytes")
