"""Grammars for tool calls, written in llguidance's variant of Lark.

Names, schemas and descriptions come from strangers. They get into a grammar as JSON only: within quotes, with
every `=` escaped, since the text of a grammar is searched for `temperature=` and `::=` before it is parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from fastllm.engine.grammar_trial import WHITESPACE

if TYPE_CHECKING:
    from fastllm.serve.parsers.tool_choice import Tool

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_MAPS = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))
_DATA = frozenset(("enum", "const", "required", "type"))


class Lark:
    """Collects rules; `grammar` is the whole.

    Args:
        obey_all: the arguments of every tool obey its schema; else those of strict ones, others are objects.
        not_first: no free text begins with this, spaces before it or not; "": it may begin with anything.
    """

    # Keywords of a schema that only describe; they are left out, so that long descriptions cost nothing.
    annotations: ClassVar[frozenset[str]] = frozenset(
        (
            *("description", "title", "examples", "$comment", "default"),
            *("deprecated", "readOnly", "writeOnly"),
        )
    )

    def __init__(self, *, obey_all: bool, not_first: str = "") -> None:
        self._obey_all = obey_all
        self._but = ""
        if not_first:
            self._but = f" & ~(/[ \\t\\r\\n]*/ {self.text(not_first)} /(?s:.*)/)"
        self._rules: list[str] = []
        self._known: dict[str, str] = {}

    def rule(self, name: str, body: str) -> str:
        """A new rule with this body, or the one that there is."""
        return self._add(name, "", body)

    @staticmethod
    def up_to(most: int, body: str) -> str:
        """`body`, not at all up to `most` times."""
        return f"({body}){{0,{most}}}" if most else ""

    def text_until(self, end: str) -> str:
        """A rule: free text up to and with the first `end`."""
        return self._add("head", "[lazy]", f"(/(?s:.*)/ {self.text(end)}){self._but}", terminal=True)

    def thought_until(self, end: str) -> str:
        """A rule: any text up to and with the first `end`."""
        return self._add("thought", "[lazy]", f"/(?s:.*)/ {self.text(end)}", terminal=True)

    def any_text(self) -> str:
        """A rule: free text, none included."""
        return self._add("text", "", f"/(?s:.*)/{self._but}", terminal=True)

    def text_not_beginning(self, character: str, pair: str) -> str:
        """A rule: free text whose first characters but spaces are neither `character` nor `pair`."""
        one, first, second = (re.escape(c) for c in (character, *pair))
        body = rf"/[ \t\r\n]*((?:[^{one}{first} \t\r\n]|{first}[^{second}])(?s:.*))?/"
        return self._add("text", "", f"{body}{self._but}", terminal=True)

    def call_object(self, tool: Tool, key: str) -> str:
        """{"name": "f", KEY: {...}} with the spaces that chat templates put."""
        head = f'{{"name": {json.dumps(tool.name)}, "{key}": '
        return f"{self.text(head)} {self.arguments(tool)} {self.text('}')}"

    def arguments(self, tool: Tool) -> str:
        """A rule: the JSON of a call's arguments."""
        return self.json(tool.schema if self._obey_all or tool.strict else {"type": "object"})

    def json(self, schema: Mapping[str, Any]) -> str:
        """A rule: JSON of this schema. What llguidance cannot obey in it is refused when it is compiled."""
        options = {"lenient": False, "whitespace_pattern": WHITESPACE}
        text = _dump({**_bare(schema), "x-guidance": options})
        return self._add("json", "", f"%json {text}")

    @staticmethod
    def text(text: str) -> str:
        """This text."""
        return _dump(text)

    def grammar(self, start: str) -> str:
        """The grammar whose sentences are `start`."""
        return "\n".join((f"start: {start}", *self._rules, ""))

    def _add(self, name: str, options: str, body: str, *, terminal: bool = False) -> str:
        key = f"{options}{body}"
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = f"{name}_{len(self._rules)}"
            if terminal:  # options are for rules whose body is one terminal
                self._rules.append(f"{known.upper()}: {body}")
                body = known.upper()
            self._rules.append(f"{known}{options}: {body}")
        return known


def _dump(value: Any) -> str:
    text = json.dumps(value, allow_nan=False)
    return _STRING.sub(lambda found: found[0].replace("=", "\\u003d"), text)


def _bare(schema: Any) -> Any:
    """A schema without its annotations. Its depth has been bounded."""
    if isinstance(schema, Mapping):
        bare = {}
        for key, value in schema.items():
            if key in _MAPS and isinstance(value, Mapping):
                bare[key] = {name: _bare(item) for name, item in value.items()}
            elif key in _DATA:
                bare[key] = value
            elif key not in Lark.annotations:
                bare[key] = _bare(value)
        return bare
    if isinstance(schema, (list, tuple)):
        return [_bare(item) for item in schema]
    return schema
