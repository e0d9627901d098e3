"""The jinja2 environment of chat templates: no access to Python, and an end to every rendering.

jinja2's immutable sandbox keeps templates away from Python's internals. On top of it, every rendering keeps
to a budget (`template_budget`). Templates come out of model files, so all of this is meant for a hostile
author.

String literals of a template are compiled to `TemplateText`, which is how the text that a template writes is
told from the text that it was given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, ClassVar

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from fastllm.formats.template_budget import (
    INDENT_MAX,
    Budget,
    BudgetError,
    bounded,
    check_format,
    check_power,
    check_product,
    check_replace,
    check_text_call,
    check_width,
    counted,
    counted_join,
    current,
    to_text,
)
from fastllm.formats.template_text import TemplateText, format_braces


class Raised(TemplateError):
    """The template called `raise_exception`: it does not accept the conversation."""


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

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

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
    concat = staticmethod(counted_join)
    own_text = staticmethod(TemplateText.own)
    bounded = staticmethod(bounded)
    to_text = staticmethod(to_text)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,
            finalize=bounded,
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
        self.filters["_counted"] = counted

    def compile_chat(self, source: str) -> Any:
        """Compile `source`; every loop of it counts its rounds."""
        tree = self.parse(source)
        for kind in (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends):
            for other in tree.find_all(kind):
                raise TemplateSyntaxError("a chat template cannot load other templates", other.lineno)
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
        check_format(form)

        def run(*args: Any, **kwargs: Any) -> str:
            budget = current()
            budget.make(len(form) + form.count("{") * (budget.size(args) + budget.size(kwargs)))
            made = wrapped(*args, **kwargs)
            if isinstance(form, TemplateText) and value.__name__ == "format":
                return format_braces(form, args, kwargs, made)
            return made

        return run

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = current()
        budget.step()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            name = getattr(__obj, "__name__", "")
            if name == "join" and len(args) == 1:
                args = (list(args[0]),)
            check_text_call(budget, owner, name, args, kwargs)
        return bounded(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = current()
        budget.step()
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            budget.make(len(left) + len(right))
        elif operator == "*":
            check_product(budget, left, right)
        elif operator == "**":
            check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            check_format(left)
            budget.make(len(left) + left.count("%") * budget.size(right))
        return bounded(super().call_binop(context, operator, left, right))


# -- filters -------------------------------------------------------------------------------------------------


def _checked(function: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    """A filter that is checked before it runs; keeps jinja2's marks for filters that want the environment."""
    passes = getattr(function, "jinja_pass_arg", None)

    def run(*args: Any, **kwargs: Any) -> Any:
        given = args[1:] if passes is not None else args
        budget = current()
        budget.step()
        check(budget, *given, **kwargs)
        return bounded(function(*args, **kwargs))

    if passes is not None:
        run.jinja_pass_arg = passes  # type: ignore[attr-defined]
    return run


def _check_widths(budget: Budget, value: Any = "", *args: Any, **kwargs: Any) -> None:
    check_width(*args, *kwargs.values())
    budget.make(budget.size(value))


def _check_indent(budget: Budget, value: Any = "", width: Any = 4, *args: Any, **kwargs: Any) -> None:
    step = len(width) if isinstance(width, str) else int(width)
    check_width(step)
    lines = len(str(bounded(value)).splitlines()) + 1
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
    check_replace(budget, str(bounded(value)), old, new)


def _check_size(budget: Budget, value: Any = "", *args: Any, **kwargs: Any) -> None:
    budget.make(budget.size(value))


def _check_format_filter(budget: Budget, value: Any = "", *args: Any, **kwargs: Any) -> None:
    form = str(bounded(value))
    check_format(form)
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
        budget = current()
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
