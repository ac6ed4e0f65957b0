"""What may be logged: numbers, which are read many at a time, and torchmetrics objects, which reduce themselves."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Output, Value
from raylight.contract.plain_numbers import to_python
from raylight.worker.diagnosis.failure import is_users

_MEETS, _REMEMBERED = "_to_sync", "_computed"
"""torchmetrics' own attributes: whether `compute` gathers over the ranks, and what it returned last."""
Number = float | Tensor
"""A tensor has one element, and stays on its device until numbers are read."""


class Metric(Protocol):
    """A torchmetrics object: it collects, reduces itself over the ranks, and begins anew."""

    def compute(self) -> Output: ...
    def reset(self) -> None: ...


def is_metric(value: Value) -> TypeGuard[Metric]:
    """Whether it is an object as torchmetrics has them: it collects, computes and begins anew."""
    return hasattr(value, "compute") and hasattr(value, "update") and hasattr(value, "reset")


def take(name: str, value: Value) -> Number | Metric:
    """What to keep of a logged value: a float, a tensor of its own on a GPU, or the torchmetrics object.

    User code may write into a tensor after it was logged, so none is kept as it is. Reading one on the CPU is cheaper
    than a copy; on a GPU it would wait for the device.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise InvalidArguments(f"log({name!r}): one element is needed, the tensor has shape {tuple(value.shape)}")
        if not value.is_cpu and not value.is_complex():
            return value.detach().clone()
        number = value.item()
        if isinstance(number, complex):
            raise InvalidArguments(f"log({name!r}): a real number is needed, the tensor is {value.dtype}")
        return float(number)
    if isinstance(value, (int, float)):
        return float(value)
    if is_metric(value):
        if isinstance(value, Mapping) or hasattr(value, "compute_groups"):
            raise InvalidArguments(f"log({name!r}): {type(value).__name__} holds several metrics; use log_dict for it")
        return value
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError):
        raise InvalidArguments(
            f"log({name!r}): a number, a one-element tensor or a torchmetrics metric is needed, not "
            f"{type(value).__name__}" + ("; use log_dict for a dict" if isinstance(value, Mapping) else "")
        ) from None


def take_batch_size(name: str, batch_size: Value) -> Number:
    """The samples that a logged value stands for; a tensor on a GPU stays there."""
    if isinstance(batch_size, Tensor) and batch_size.numel() == 1:
        batch_size = batch_size.reshape(())
        if not batch_size.is_cpu:
            kept: Tensor = batch_size.detach().clone()
            return kept
    number = to_python(batch_size)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise InvalidArguments(f"log({name!r}, batch_size={batch_size!r}): a number of samples is needed")
    return number


def read(values: Sequence[Number]) -> list[float]:
    """Numbers and one-element tensors as floats, in one device sync for all tensors."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return [float(value) for value in values]
    device = tensors[0].device
    stacked = torch.stack([t.reshape(()).to(device=device, dtype=torch.float64) for t in tensors])
    numbers = iter(stacked.tolist())
    return [next(numbers) if isinstance(value, Tensor) else float(value) for value in values]


def newest_of(name: str, metric: Metric) -> Number:
    """What a metric says of the last batch alone, where its `forward` was called; else of this rank's batches so far.

    The ranks do not meet here: one that has no sample in this step would not come.
    """
    cached = getattr(metric, "_forward_cache", None)
    if cached is not None:
        return _as_number(name, metric, cached)
    meets = getattr(metric, _MEETS, False)
    if meets:
        setattr(metric, _MEETS, False)
    try:
        return _as_number(name, metric, metric.compute())
    finally:
        if meets:
            vars(metric).update({_MEETS: True, _REMEMBERED: None})


def compute(name: str, metric: Metric) -> float:
    """The metric over all batches of all ranks; every rank calls it, for torchmetrics gathers in it."""
    try:
        computed = metric.compute()
    except Exception as error:
        error.add_note(f"raised by {type(metric).__name__}.compute(), logged as {name!r}")
        raise
    number = _as_number(name, metric, computed)
    return float(number.item() if isinstance(number, Tensor) else number)


def _as_number(name: str, metric: Metric, computed: Output) -> Number:
    """A number or a one-element tensor of its own."""
    if isinstance(computed, Tensor) and computed.numel() == 1:
        return computed.detach().clone()
    computed = to_python(computed)
    if isinstance(computed, (int, float)):
        return computed
    kind = type(metric).__name__
    if isinstance(computed, Mapping):
        keys = ", ".join(repr(str(key)) for key in computed)
        what, advice = f"a dict with {keys}", "log_dict(metric.compute())"
    else:
        shape = f" of shape {tuple(computed.shape)}" if hasattr(computed, "shape") else ""
        what, advice = f"a {type(computed).__name__}{shape}", "log(name, part) for each part of metric.compute()"
    raise InvalidArguments(
        f"log({name!r}): {kind} computes {what}, and one number is needed; log its parts in the hook at the epoch's "
        f"end: {advice}, then metric.reset()"
    )


_HOOK = re.compile(r"(on|configure)_\w+|\w+_(step|dataloader)|setup|teardown|prepare_data|state_dict|load_state_dict")


def say_no_epoch(name: str, stage: str) -> str:
    """The text for a value that was logged where no epoch could take it."""
    if stage == "predict":
        return f"log({name!r}): prediction collects outputs and logs nothing"
    frame, hook = inspect.currentframe(), ""
    while frame is not None and not hook:
        code = frame.f_code
        hook = code.co_name if _HOOK.fullmatch(code.co_name) and is_users(code.co_filename) else ""
        frame = frame.f_back
    where = f"{hook} is" if hook else "this is"
    return (
        f"log({name!r}): {where} outside of every epoch, and the value would belong to none; log it in a step, in a "
        "hook around a batch, or at the start or end of an epoch; self.logger.log_metrics({...}, step=...) writes it "
        "at once"
    )
