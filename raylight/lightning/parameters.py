"""What can be said of a module's parameters: the norms of their gradients, and which of them are one."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def grad_norm(module: nn.Module, norm_type: float | str, group_separator: str = "/") -> dict[str, Tensor]:
    """The norm of each parameter's gradient, and of all of them as one vector.

    Names are `grad_2.0_norm/layer.weight` and `grad_2.0_norm_total`. `norm_type` is above 0, or "inf"; else raises
    ValueError.
    """
    kind = float(norm_type)
    if kind <= 0:
        raise ValueError(f"norm_type={norm_type!r} must be a number above 0, or 'inf'")
    found = {
        f"grad_{kind}_norm{group_separator}{name}": parameter.grad.detach().norm(kind)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    if found:
        found[f"grad_{kind}_norm_total"] = torch.stack([norm.float() for norm in found.values()]).norm(kind)
    return found


def find_shared_parameters(module: nn.Module) -> list[list[str]]:
    """The names of each parameter that a module has under more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [each for each in names.values() if len(each) > 1]


def set_shared_parameters(module: nn.Module, shared_params: list[list[str]]) -> nn.Module:
    """Puts the parameter of the first name in the place of the others of each list."""
    for first, *others in shared_params:
        parameter = module.get_parameter(first)
        for other in others:
            owner, _, name = other.rpartition(".")
            setattr(module.get_submodule(owner), name, parameter)
    return module
