"""Precision: in which number format a module computes, and the loss scaling that 16 bit needs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Batch, Closure, Output, StateDict, Value

_TRUE_DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
_AUTOCAST_DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
_PLAIN = nullcontext()


class Precision:
    """What `precision` of the trainer means in a step.

    "32-true": nothing (`is_plain`, which a loop may test to skip the context). "16-mixed" and "bf16-mixed": forward
    under autocast, with a `scaler` for 16 bit. "16-true", "bf16-true", "64-true": parameters, batches and new tensors
    in that dtype.
    """

    def __init__(self, name: str, device_type: str, scaler: torch.amp.GradScaler | None = None):
        self.name = name
        self.device_type = device_type
        self.dtype = _TRUE_DTYPES.get(name)
        self.autocast_dtype = _AUTOCAST_DTYPES.get(name)
        self.is_plain = name == "32-true"
        self.scaler = scaler
        self._has_stepped = False

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Casts parameters and buffers in place; before the optimizers are made."""
        return module if self.dtype is None else module.to(dtype=self.dtype)

    def convert_batch(self, batch: Batch) -> Batch:
        """Casts floating-point tensors in nested containers; the containers given are not changed."""
        return batch if self.dtype is None else _cast(batch, self.dtype)

    def forward_context(self) -> AbstractContextManager[object]:
        if self.autocast_dtype is not None:
            # Without the cache of cast weights: weights cached under a no_grad (a teacher, a target) would be reused
            # without their gradient by a forward after it.
            return torch.autocast(self.device_type, dtype=self.autocast_dtype, cache_enabled=False)
        return _PLAIN if self.dtype is None else _DefaultDtype(self.dtype)

    def scale(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Gives the gradients their true size; before they are clipped or looked at, once a step."""
        if self.scaler is not None and _has_gradients(optimizer):
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer, closure: Closure | None = None) -> Output:
        """Steps the optimizer; with a scaler not where a gradient is inf or NaN. Returns what `closure` returned."""
        if self.scaler is None:
            return optimizer.step() if closure is None else optimizer.step(closure)
        if isinstance(optimizer, LBFGS):
            raise InvalidArguments(
                'LBFGS evaluates the loss several times a step, and the gradient scaler of precision="16-mixed" cannot '
                'follow that; use precision="bf16-mixed" or "32-true", or another optimizer'
            )
        result = None if closure is None else closure()
        # The scaler refuses an optimizer without gradients, such as one whose batch was skipped.
        if _has_gradients(optimizer):
            self.scaler.step(optimizer)
            self._has_stepped = True
        return result

    def update(self) -> None:
        """Adapts the scale; once after all optimizers of a batch have stepped."""
        if self.scaler is not None and self._has_stepped:
            self.scaler.update()
            self._has_stepped = False

    def state_dict(self) -> StateDict:
        """Plain numbers. With a scaler it costs one device sync."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: StateDict) -> None:
        if self.scaler is not None and state:  # empty: saved under a precision without a scaler
            self.scaler.load_state_dict(state)


def make_precision(
    name: str, device_type: str, *, scaler: torch.amp.GradScaler | None = None, plugins: tuple[Value, ...] = ()
) -> Precision:
    """The precision of that name for "cpu" or "cuda".

    `scaler` takes the place of the one that "16-mixed" makes, and allows that name on a CPU. A Precision among
    `plugins` is returned as it is. Raises InvalidArguments.
    """
    for plugin in plugins:
        if isinstance(plugin, Precision):
            return plugin
    if name == "16-mixed" and scaler is None:
        if device_type != "cuda":
            raise InvalidArguments('precision="16-mixed" needs a GPU; on a CPU use precision="bf16-mixed"')
        scaler = torch.amp.GradScaler("cuda")
    if name not in ("32-true", *_TRUE_DTYPES, *_AUTOCAST_DTYPES):
        names = ", ".join(("32-true", *_TRUE_DTYPES, *_AUTOCAST_DTYPES))
        raise InvalidArguments(f"precision={name!r} is not one of {names}")
    return Precision(name, device_type, scaler)


class _DefaultDtype:
    """Floating-point tensors that are made inside have this dtype."""

    __slots__ = ("before", "dtype")

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])


def _cast(batch: Batch, dtype: torch.dtype) -> Batch:
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        cast = {key: _cast(value, dtype) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return cast
        same_kind = copy.copy(batch)  # keeps what the kind adds: an order, a default, attributes
        same_kind.update(cast)
        return same_kind
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_cast(value, dtype) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_cast(value, dtype) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        same_fields: Batch = copy.copy(batch)
        for field in dataclasses.fields(batch):
            # object.__setattr__: a frozen dataclass too, and this copy is nobody else's yet.
            object.__setattr__(same_fields, field.name, _cast(getattr(batch, field.name), dtype))
        return same_fields
    return batch
