"""A plain `loss.backward()` in manual optimization of several ranks, found before an optimizer steps on it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from raylight.contract.errors import InvalidArguments


class RawBackward:
    """Notices gradients that are those of one rank alone. Its hooks stay on parameters and optimizers for good, and so
    there is one of it for all generations of a group."""

    def __init__(self, optimizers: Sequence[Optimizer]):
        self.has_run = False
        self.is_watching = True
        parameters = {p: None for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]}
        for parameter in parameters:
            if parameter.requires_grad and not is_lazy(parameter):
                parameter.register_post_accumulate_grad_hook(self._note)
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(lambda *_: self.check())

    def _note(self, _: Tensor) -> None:
        self.has_run = True

    def forgive(self) -> None:
        """The gradients have been averaged."""
        self.has_run = False

    def watch(self, is_watching: bool) -> None:
        """Not while there is one rank alone."""
        self.is_watching, self.has_run = is_watching, False

    def check(self) -> None:
        """Before an optimizer steps, and after a closure of its."""
        if self.has_run and self.is_watching:
            raise InvalidArguments(
                "training_step called loss.backward() and an optimizer was to step on it: with several workers those "
                "are the gradients of one rank alone. Call self.manual_backward(loss), which averages them"
            )
