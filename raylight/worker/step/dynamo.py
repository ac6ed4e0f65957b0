"""Keeps making an optimizer or a DDP from loading `torch._dynamo`: 1.2 to 2 s before the first batch.

torch shields a few methods from tracing, and loads the whole compiler at their first call to do so; DDP loads it to
read a setting. While the compiler is not loaded nothing can be traced, and so there is nothing to shield, and its
settings are the defaults. The first `optimizer.step` loads it all the same; by then the user's first forward and
backward have run, and what is wrong in them is known.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from raylight.contract.kinds import Hook, Output

_SHIELDED: dict[type, tuple[str, ...]] = {
    torch.optim.Optimizer: ("add_param_group", "zero_grad", "state_dict", "load_state_dict"),
    DistributedDataParallel: ("_inside_ddp_forward",),
}
_SHIELD = "__dynamo_disable"  # where torch keeps the shielded function, on the one it shields
_DEFAULTS = SimpleNamespace(utils=SimpleNamespace(get_optimize_ddp_mode=lambda: "ddp_optimizer"))


def postpone_dynamo() -> None:
    """Does nothing where the compiler is loaded already, or torch shields its methods in another way."""
    if "torch._dynamo" in sys.modules:
        return
    for owner, names in _SHIELDED.items():
        for name in names:
            shield: Hook | None = getattr(owner, name, None)
            while shield is not None and not shield.__code__.co_filename.endswith("_compile.py"):
                shield = getattr(shield, "__wrapped__", None)
            method = getattr(shield, "__wrapped__", None)
            if shield is not None and method is not None and not hasattr(method, _SHIELD):
                setattr(method, _SHIELD, _shield_late(shield, method))


def _shield_late(shield: Hook, method: Hook) -> Hook:
    def call(*arguments: Any, **keywords: Any) -> Output:
        if "torch._dynamo" not in sys.modules:
            return method(*arguments, **keywords)
        delattr(method, _SHIELD)
        return shield(*arguments, **keywords)  # finds nothing there now, and makes torch's own

    return call


@contextmanager
def default_compiler_settings() -> Iterator[None]:
    """In the block `torch._dynamo`, if it is not loaded, tells its default settings. For the making of a DDP."""
    if "torch._dynamo" in sys.modules or "_dynamo" in vars(torch):
        yield
        return
    vars(torch)["_dynamo"] = _DEFAULTS
    try:
        yield
    finally:
        if vars(torch).get("_dynamo") is _DEFAULTS:  # else what was made in the block has loaded the compiler
            del vars(torch)["_dynamo"]
