"""Keeps making an optimizer from loading `torch._dynamo`: 1.2 s before the first batch.

torch shields a few methods of its optimizers from tracing, and loads the whole compiler at their first call to do so.
While the compiler is not loaded nothing can be traced, and so there is nothing to shield. The first `optimizer.step`
loads it all the same; by then the user's first forward and backward have run, and what is wrong in them is known.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

_SHIELDED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
_SHIELD = "__dynamo_disable"  # where torch keeps the shielded function, on the one it shields


def postpone_dynamo() -> None:
    """Does nothing where the compiler is loaded already, or torch shields its optimizers in another way."""
    if "torch._dynamo" in sys.modules:
        return
    for name in _SHIELDED:
        shield = getattr(torch.optim.Optimizer, name)
        method = getattr(shield, "__wrapped__", None)
        if method is not None and shield.__code__.co_filename.endswith("_compile.py") and not hasattr(method, _SHIELD):
            setattr(method, _SHIELD, _shield_late(method))


def _shield_late(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return method(*arguments, **keywords)
        delattr(method, _SHIELD)
        # torch's own wrapper finds no shield now, and makes the real one
        return getattr(torch.optim.Optimizer, method.__name__)(*arguments, **keywords)

    return call
