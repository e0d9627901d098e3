"""The jinja2 environment of chat templates: no access to Python, and an end to every rendering.

jinja2's immutable sandbox keeps templates away from Python's internals. On top of it, every rendering has a budget of
steps (loop rounds, calls and operators), of time, of the length of any one string, and of characters made in all;
operations whose result could be far larger than their operands are checked before they run. Templates come out of
model files, so all of this is meant for a hostile author.

String literals of a template are compiled to `TemplateText`, which is how the text that a template writes is told
from the text that it was given.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from fastllm.formats.template_text import TemplateText, join_text

TEXT_CHARS_MAX = 8 << 20  # one string, the rendered text included
MADE_CHARS_MAX = 512 << 20  # all strings that operators make in one rendering
ITEMS_MAX = 1 << 20  # one list
STEPS_MAX = 2_000_000
TIME_S_MAX = 10.0
INT_BITS_MAX = 4096
WIDTH_MAX = 10_000  # padding, number of slices
INDENT_MAX = 64
CONTAINER_COST_CHARS = 256  # what a list counts for among the characters made


class BudgetError(TemplateError):
    """A rendering took more steps, time or memory than one may."""


class Raised(TemplateError):
    """The template called `raise_exception`: it does not accept the conversation."""


class Budget:
    """What one rendering has used."""

    def __init__(self) -> None:
        self.steps = 0
        self.made_chars = 0
        self.deadline = time.monotonic() + TIME_S_MAX
        self._sizes: dict[int, tuple[Any, int]] = {}  # id of a container -> itself (so the id stays its), size

    def step(self) -> None:
        self.steps += 1
        if self.steps > STEPS_MAX:
            raise BudgetError(f"the template took more than {STEPS_MAX} steps")
        if not self.steps & 63 and time.monotonic() > self.deadline:
            raise BudgetError(f"the template ran for more than {TIME_S_MAX} s")

    def make(self, chars: int) -> None:
        """Called before a string of `chars` characters is made."""
        self.made_chars += chars
        if chars > TEXT_CHARS_MAX:
            raise BudgetError(f"the template made a text of more than {TEXT_CHARS_MAX} characters")
        if self.made_chars > MADE_CHARS_MAX:
            raise BudgetError(f"the template made more than {MADE_CHARS_MAX} characters in all")

    def size(self, value: Any) -> int:
        """About how many characters `str(value)` has.

        A list that holds another one twice, and so on for thirty levels, is small in memory but not when it is
        written out or compared; so every container's full size is known from those of its parts, and bounded.
        """
        if isinstance(value, str):
            return len(value)
        if not isinstance(value, (list, tuple, dict)):
            return 16
        known = self._sizes.get(id(value))
        if known is not None:
            return known[1]
        if isinstance(value, dict):
            total = sum(self.size(key) + self.size(item) + 8 for key, item in value.items())
        else:
            total = sum(self.size(item) + 4 for item in value)
        if total > TEXT_CHARS_MAX or len(value) > ITEMS_MAX:
            raise BudgetError(f"the template made a list of more than {TEXT_CHARS_MAX} characters")
        self.make(CONTAINER_COST_CHARS + 8 * len(value))
        self._sizes[id(value)] = (value, total)
        return total


_budget: ContextVar[Budget] = ContextVar("fastllm_template_budget")


def begin() -> Budget:
    """Start the budget of a rendering in this thread (or task)."""
    budget = Budget()
    _budget.set(budget)
    return budget


def _current() -> Budget:
    budget = _budget.get(None)  # None while a template is compiled
    return begin() if budget is None else budget


def _counted_join(parts: Iterable[str]) -> str:
    pieces = list(parts)
    _current().make(sum(map(len, pieces)))
    return join_text(pieces)


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    step = _current().step
    for item in items:
        step()
        yield item


def _bounded(value: Any) -> Any:
    """`value`, unless it is a container too large to be written out."""
    if isinstance(value, (list, tuple, dict)):
        _current().size(value)
    return value


def _to_text(value: Any) -> str:
    return str(_bounded(value))


class _Generator(CodeGenerator):
    """Compiles string literals to `TemplateText`, and joins that keep its spans."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        if isinstance(node.value, str):
            self.write(f"environment.own_text({node.value!r})")
        else:
            super().visit_Const(node, frame)

    def visit_TemplateData(self, node: nodes.TemplateData, frame: Frame) -> None:
        self.write(f"environment.own_text({node.data!r})")

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.own_text({''.join(map(str, group))!r})"

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self.write("environment.bounded(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "store":
            super().visit_Tuple(node, frame)
            return
        self.write("environment.bounded(")
        super().visit_Tuple(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("environment.bounded(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(map(environment.to_text, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class _Namespace(Namespace):
    """jinja2's namespace, whose `str` would write out all that it holds."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Generation(Extension):
    """`{% generation %}` marks what the model wrote, for training; here it is only its contents."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


# The attributes of Python's own types that a template may use. Everything else of them stays out of reach.
_STR_METHODS = frozenset(
    (
        *("capitalize", "casefold", "center", "count", "endswith", "find", "format", "format_map", "index"),
        *("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric"),
        *("isprintable", "isspace", "istitle", "isupper", "join", "ljust", "lower", "lstrip", "partition"),
        *("removeprefix", "removesuffix", "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit"),
        *("rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper", "zfill"),
    )
)
_METHODS: tuple[tuple[type | tuple[type, ...], frozenset[str]], ...] = (
    (str, _STR_METHODS),
    (dict, frozenset(("get", "items", "keys", "values", "copy"))),
    ((list, tuple), frozenset(("index", "count", "copy"))),
    ((int, float, complex, bytes, range, set, frozenset), frozenset(("is_integer",))),
)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment that all chat templates share; holds no state of a rendering."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "*", "**", "%"))
    concat = staticmethod(_counted_join)  # type: ignore[assignment]
    own_text = staticmethod(TemplateText.own)
    bounded = staticmethod(_bounded)
    to_text = staticmethod(_to_text)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,
            finalize=_bounded,
            optimized=False,
            extensions=[loopcontrols, _Generation],
        )
        del self.globals["lipsum"]
        for name in ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr"):
            del self.filters[name]
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.filters["tojson"] = _tojson
        self.filters["join"] = _join(self.filters["join"])
        for name, function in self.filters.items():
            self.filters[name] = _checked(function, _FILTER_CHECKS.get(name, _check_size))
        self.filters["_counted"] = _counted

    def compile_chat(self, source: str) -> Any:
        """Compile `source`; every loop of it counts its rounds."""
        tree = self.parse(source)
        for loop in tree.find_all(nodes.For):
            counted = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
            loop.iter = counted.set_environment(self)
        return self.from_string(tree)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        return next((attr in names for kinds, names in _METHODS if isinstance(obj, kinds)), True)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        form: str = value.__self__
        _check_format(form)

        def run(*args: Any, **kwargs: Any) -> str:
            budget = _current()
            budget.make(len(form) + form.count("{") * (budget.size(args) + budget.size(kwargs)))
            return wrapped(*args, **kwargs)

        return run

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        budget = _current()
        budget.step()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            name = getattr(__obj, "__name__", "")
            if name == "join" and len(args) == 1:
                args = (list(args[0]),)
            _check_text_call(budget, owner, name, args, kwargs)
        return _bounded(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _current()
        budget.step()
        if operator == "+":
            if isinstance(left, str) and isinstance(right, str):
                budget.make(len(left) + len(right))
        elif operator == "*":
            _check_product(budget, left, right)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int) and right > 0:
                _check_bits(left.bit_length() * right)
        elif isinstance(left, str):
            _check_format(left)
            budget.make(len(left) + left.count("%") * budget.size(right))
        return _bounded(super().call_binop(context, operator, left, right))


def _check_product(budget: Budget, left: Any, right: Any) -> None:
    if isinstance(left, int):
        left, right = right, left
    if not isinstance(right, int):
        return
    if isinstance(left, int):
        _check_bits(left.bit_length() + right.bit_length())
    elif isinstance(left, str):
        budget.make(len(left) * max(right, 0))
    elif isinstance(left, (list, tuple)):
        if len(left) * right > ITEMS_MAX:
            raise BudgetError(f"the template made a list of more than {ITEMS_MAX} items")


def _check_bits(bits: int) -> None:
    if bits > INT_BITS_MAX:
        raise BudgetError(f"the template made an integer of more than {INT_BITS_MAX} bits")


def _check_width(*values: Any) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > WIDTH_MAX:
            raise BudgetError(f"the template asked for a width of more than {WIDTH_MAX}")


def _check_format(text: str) -> None:
    """Refuse format strings that pad to a width which is huge or not there to be read."""
    if re.search(r"\d{5}|%[^%a-zA-Z]*\*|:[^{}]*\{", text):
        raise SecurityError("a format string with a computed or very large width")


def _check_replace(budget: Budget, text: str, old: Any, new: Any) -> None:
    places = text.count(str(old)) if old else len(text) + 1
    budget.make(len(text) + places * len(str(new)))


def _check_text_call(budget: Budget, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if name in ("center", "ljust", "rjust", "zfill"):
        _check_width(*args, *kwargs.values())
    elif name == "replace" and len(args) >= 2:
        _check_replace(budget, text, args[0], args[1])
    elif name == "join" and args:
        budget.make(budget.size(args[0]) + len(text) * len(args[0]))
    else:
        budget.make(len(text))


# -- filters -------------------------------------------------------------------------------------------------------


def _checked(function: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    """A filter that is checked before it runs; keeps jinja2's marks for filters that want the environment."""
    passes = getattr(function, "jinja_pass_arg", None)

    def run(*args: Any, **kwargs: Any) -> Any:
        given = args[1:] if passes is not None else args
        budget = _current()
        budget.step()
        check(budget, *given, **kwargs)
        return _bounded(function(*args, **kwargs))

    if passes is not None:
        run.jinja_pass_arg = passes  # type: ignore[attr-defined]
    return run


def _check_widths(budget: Budget, value: Any = "", *args: Any, **kwargs: Any) -> None:
    _check_width(*args, *kwargs.values())
    budget.make(budget.size(value))


def _check_indent(budget: Budget, value: Any = "", width: Any = 4, *args: Any, **kwargs: Any) -> None:
    step = len(width) if isinstance(width, str) else int(width)
    _check_width(step)
    lines = len(str(_bounded(value)).splitlines()) + 1
    budget.make(budget.size(value) + lines * step)


def _check_json(budget: Budget, value: Any = None, *args: Any, **kwargs: Any) -> None:
    layout = (*args, *kwargs.values())
    texts = [t for item in layout for t in (item if isinstance(item, (list, tuple)) else [item])]
    if any((len(t) if isinstance(t, str) else t or 0) > INDENT_MAX for t in texts):
        raise BudgetError(f"the template asked for JSON with an indentation of more than {INDENT_MAX}")
    budget.make(8 * budget.size(value))


def _check_sum(budget: Budget, value: Any = (), attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, (int, float)):
        raise SecurityError("sum of something other than numbers")


def _check_replace_filter(
    budget: Budget, value: Any = "", old: Any = "", new: Any = "", *args: Any, **kwargs: Any
) -> None:
    _check_replace(budget, str(value), old, new)


def _check_size(budget: Budget, value: Any = "", *args: Any, **kwargs: Any) -> None:
    budget.make(budget.size(value))


def _check_format_filter(budget: Budget, value: Any = "", *args: Any, **kwargs: Any) -> None:
    _check_format(str(value))
    form = str(value)
    budget.make(len(form) + form.count("%") * (budget.size(args) + budget.size(kwargs)))


_FILTER_CHECKS: dict[str, Callable[..., None]] = {
    "batch": _check_widths,
    "center": _check_widths,
    "format": _check_format_filter,
    "indent": _check_indent,
    "replace": _check_replace_filter,
    "round": _check_widths,
    "slice": _check_widths,
    "sum": _check_sum,
    "tojson": _check_json,
    "truncate": _check_widths,
}


def _join(original: Callable[..., Any]) -> Callable[..., str]:
    """jinja2's `join`, whose default separator is a literal of jinja2's and not of the template."""

    def join(eval_ctx: Any, value: Any, d: str = "", attribute: str | int | None = None) -> str:
        items = list(value)
        budget = _current()
        budget.step()
        budget.make(budget.size(items) + len(str(d)) * len(items))
        separator = d if isinstance(d, TemplateText) else TemplateText(d)
        return str(original(eval_ctx, items, separator, attribute))

    join.jinja_pass_arg = original.jinja_pass_arg  # type: ignore[attr-defined]
    return join


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, without HTML escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> None:
    raise Raised(str(message)[:1000])


def _strftime_now(form: str) -> str:
    if len(form) > 1000:
        raise BudgetError("a time format of more than 1000 characters")
    return datetime.now().strftime(str(form))
