"""Signature and documentation of arguments that are declared once and passed on, and which of them were given."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

from raylight.contract.kinds import Value

Function = TypeVar("Function", bound=Callable[..., Any])


@cache
def list_keywords(function: Callable[..., object]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of `function` by name, in the order of its signature."""
    return {name: it for name, it in inspect.signature(function).parameters.items() if it.kind is it.KEYWORD_ONLY}


def find_given(function: Callable[..., object], values: Mapping[str, Value]) -> dict[str, Value]:
    """The keywords of `function` that are not at their default in `values`, the variables of a call of it."""
    return {
        name: values[name] for name, keyword in list_keywords(function).items()
        if not _is_same(values[name], keyword.default)
    }  # fmt: skip


def _is_same(value: object, default: object) -> bool:
    """By type too: 1 is a number of batches, 1.0 a share of them."""
    return value is default or (type(value) is type(default) and value == default)


def passes_on_keywords_of(target: Callable[..., object]) -> Callable[[Function], Function]:
    """For a function that hands its **keywords to `target`: its signature lists them by name, type and default."""

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [it for it in signature.parameters.values() if it.kind is not it.VAR_KEYWORD]
        names = {it.name for it in own}
        passed_on = [it for name, it in list_keywords(target).items() if name not in names]
        vars(function)["__signature__"] = signature.replace(parameters=[*own, *passed_on])
        return function

    return decorate


class KeywordDoc:
    """A docstring with a function's keywords below it, as help and LightningCLI show them: read from the source of the
    classes that have them as documented fields, when somebody asks for it."""

    def __init__(self, text: str | None, function: Callable[..., object], *owners: type):
        self.text, self.function, self.owners = inspect.cleandoc(text or ""), function, owners

    def __get__(self, instance: object, owner: type) -> str:
        docs = {name: text for one in self.owners for name, text in read_field_docs(one).items()}
        described = [f"{name}: {docs[name]}" for name in list_keywords(self.function) if name in docs]
        parts = ["    " + text.replace("\n", "\n        ") for text in described]
        return "\n".join([self.text, "", "Args:", *parts, ""])


def read_field_docs(owner: type) -> dict[str, str]:
    """The docstrings below the fields of a class, by name, in their order; empty if its source cannot be read."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[owner.__module__]))
    except (OSError, TypeError):  # installed without its source
        return {}
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner.__name__)
    docs = {}
    for field, below in pairwise(body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            docs[field.target.id] = inspect.cleandoc(below.value.value)
    return docs
