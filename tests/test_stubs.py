"""fastllm/_core.pyi says what the compiled core takes.

`mypy.stubtest` (.ci/lint) compares names, and the signatures of the Cython modules; of a pybind11 function it sees
only that it exists. Here parameters and defaults are compared with those that pybind11 wrote into the docstring.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastllm
from fastllm import _core

STUB = ast.parse((Path(fastllm.__file__).parent / "_core.pyi").read_text(encoding="utf-8"))


def callables() -> Iterator[tuple[str, Any, ast.FunctionDef]]:
    """Dotted name, what it is at run time, and what the stub says, for all functions and methods of the stub."""
    for node in STUB.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, getattr(_core, node.name), node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and not item.decorator_list:
                    yield f"{node.name}.{item.name}", getattr(getattr(_core, node.name), item.name), item
                elif isinstance(item, ast.FunctionDef) and ast.unparse(item.decorator_list[0]) == "staticmethod":
                    yield f"{node.name}.{item.name}", getattr(getattr(_core, node.name), item.name), item


CALLABLES = {name: (runtime, stub) for name, runtime, stub in callables()}


def parameters(function: ast.FunctionDef) -> dict[str, str]:
    """Name to default, "" where there is none."""
    taken = [*function.args.posonlyargs, *function.args.args]
    assert not function.args.kwonlyargs
    defaults = ["", *[""] * len(taken), *(ast.unparse(value) for value in function.args.defaults)][-len(taken) :]
    return {arg.arg: default for arg, default in zip(taken, defaults if taken else [], strict=True)}


@pytest.mark.parametrize("name", CALLABLES)
def test_parameters_and_defaults(name: str) -> None:
    runtime, stub = CALLABLES[name]
    signature = (inspect.getdoc(runtime) or "").splitlines()[0]
    written = ast.parse(f"def {signature}: ...").body[0]
    assert isinstance(written, ast.FunctionDef)
    assert written.name == stub.name
    actual, declared = parameters(written), parameters(stub)
    assert list(declared) == list(actual)
    for parameter, default in declared.items():
        if default == "...":  # not a literal
            assert actual[parameter]
        else:
            assert default == actual[parameter], parameter


def test_nothing_is_left_out() -> None:
    """Every public name of the module and of its classes is in the stub, and the other way round."""
    nodes = {n.name: n for n in STUB.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"}
    assert set(nodes) == {name for name in vars(_core) if not name.startswith("_")}
    for name, node in nodes.items():
        if isinstance(node, ast.ClassDef):
            members = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            public = {member for member in vars(getattr(_core, name)) if not member.startswith("_")}
            assert {member for member in members if not member.startswith("_")} == public
