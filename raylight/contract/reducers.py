"""Objects that pickle refuses, or takes only in part, and that can be sent to a worker all the same."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

from raylight.contract.kinds import Value

Reduced = tuple[Any, ...]
"""The return value of `__reduce__`: how to make the object, its state, and how to put the state in."""
Hooks = tuple[Any, Any]
"""torch's two dicts of hooks on the gradient of one tensor."""


def reduce_special(obj: object) -> Reduced | None:
    """How to pickle `obj`; None: pickle's own way will do."""
    if isinstance(obj, nn.Module):
        if isinstance(obj, torch.jit.ScriptModule):
            return _load_script, (_save_script(obj),)
        if is_parametrized(obj):
            names = list(vars(obj)["_modules"]["parametrizations"])
            return _make_parametrized, (type_of(obj), names), state_of(obj), None, None, _set_module_state
    elif isinstance(obj, DataLoader) and vars(obj).get("_iterator") is not None:
        # Loader workers that outlive an epoch belong to this process; elsewhere others are started.
        reduced: Any = obj.__reduce_ex__(5)
        made, arguments, state, *rest = reduced
        return made, arguments, {**state, "_iterator": None}, *rest
    return None


def is_parametrized(module: nn.Module) -> bool:
    """Whether torch.nn.utils.parametrize has given the module a class of its own, which refuses to be pickled."""
    return "parametrizations" in vars(module).get("_modules", ()) and parametrize.is_parametrized(module)


def state_of(obj: object) -> Value:
    """The state of `obj` that pickle stores, which may be less than its `__dict__`."""
    if isinstance(obj, nn.Module) and is_parametrized(obj):
        return super(type(obj), obj).__getstate__()
    return obj.__getstate__()


def type_of(obj: Value) -> type:
    """The class that the user knows."""
    is_changed = isinstance(obj, nn.Module) and is_parametrized(obj)
    return parametrize.type_before_parametrizations(obj) if is_changed else type(obj)


def hooks_of(tensor: Tensor) -> Hooks | None:
    """The hooks on a tensor's gradient, which torch's own pickling leaves out; None: there are none."""
    hooks = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    return hooks if any(hooks) else None


def put_hooks(tensor: Tensor, hooks: Hooks) -> None:
    if hooks[0]:
        tensor._backward_hooks = hooks[0]
    if hooks[1]:
        tensor._post_accumulate_grad_hooks = hooks[1]


def _make_parametrized(kind: type[nn.Module], names: list[str]) -> nn.Module:
    """An empty module whose class has a property for each tensor that is computed from others."""
    module = kind.__new__(kind)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    return module


def _set_module_state(module: nn.Module, state: Value) -> None:
    module.__setstate__(state)


def _save_script(module: torch.jit.ScriptModule) -> bytes:
    file = io.BytesIO()
    torch.jit.save(module, file)
    return file.getvalue()


def _load_script(data: bytes) -> torch.jit.ScriptModule:
    return torch.jit.load(io.BytesIO(data), map_location="cpu")
