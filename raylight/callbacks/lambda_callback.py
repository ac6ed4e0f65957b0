"""LambdaCallback: a callback made of functions."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from raylight.contract.errors import InvalidArguments
from raylight.user.callback import Callback

HOOKS = tuple(
    name
    for name, value in inspect.getmembers(Callback, inspect.isfunction)
    if name.startswith("on_") or name in ("setup", "teardown")
)


class LambdaCallback(Callback):
    """Calls each function given at the hook of that name, with the hook's arguments.

    `LambdaCallback(on_train_start=lambda trainer, module: print("go"))`; None stands for nothing to call.
    """

    def __init__(self, **hooks: Callable[..., Any] | None):
        mistakes = []
        for name, function in hooks.items():
            if name not in HOOKS:
                near = difflib.get_close_matches(name, HOOKS, n=1)
                hint = f" Did you mean {near[0]}?" if near else f" There are: {', '.join(HOOKS)}."
                mistakes.append(f"LambdaCallback: there is no hook {name!r}.{hint}")
            elif function is not None and not callable(function):
                mistakes.append(f"LambdaCallback: {name}={function!r} must be a function.")
        if mistakes:
            raise InvalidArguments(mistakes)
        for name, function in hooks.items():
            if function is not None:
                setattr(self, name, function)
