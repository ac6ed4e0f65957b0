"""The names that Lightning gives to the types in the signatures of hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NotRequired, Protocol, Required, TypeAlias, TypedDict, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from raylight.contract.kinds import Loader
from raylight.user.module_hooks import Stepping

STEP_OUTPUT: TypeAlias = Tensor | Mapping[str, Any] | None
"""The return value of a step."""
TRAIN_DATALOADERS: TypeAlias = Loader
EVAL_DATALOADERS: TypeAlias = Loader

LRSchedulerTypeTuple = (LRScheduler, ReduceLROnPlateau)
"""For `isinstance`."""
LRSchedulerTypeUnion: TypeAlias = LRScheduler | ReduceLROnPlateau
LRSchedulerPLType: TypeAlias = LRScheduler | ReduceLROnPlateau
LRSchedulerType: TypeAlias = type[LRScheduler] | type[ReduceLROnPlateau]
MODULE_OPTIMIZERS: TypeAlias = Stepping
"""The return value of `Module.optimizers()`."""


@runtime_checkable
class DistributedDataParallel(Protocol):
    """A module whose gradients are averaged over the workers."""

    def no_sync(self) -> AbstractContextManager[None]:
        """Collect gradients without averaging them."""
        ...


class LRSchedulerConfigType(TypedDict, total=False):
    """The dict that `configure_optimizers` may return as "lr_scheduler"."""

    scheduler: Required[LRSchedulerTypeUnion]
    name: str | None
    interval: str
    frequency: int
    reduce_on_plateau: bool
    monitor: str | None
    strict: bool


class OptimizerConfig(TypedDict):
    """A dict that `configure_optimizers` may return."""

    optimizer: Optimizer


class OptimizerLRSchedulerConfig(TypedDict):
    """A dict with a scheduler that `configure_optimizers` may return."""

    optimizer: Optimizer
    lr_scheduler: LRSchedulerTypeUnion | LRSchedulerConfigType
    monitor: NotRequired[str]


OptimizerLRScheduler: TypeAlias = (
    Optimizer
    | Sequence[Optimizer]
    | tuple[Sequence[Optimizer], Sequence[LRSchedulerTypeUnion | LRSchedulerConfigType]]
    | OptimizerConfig
    | OptimizerLRSchedulerConfig
    | Sequence[OptimizerConfig]
    | Sequence[OptimizerLRSchedulerConfig]
    | None
)
"""The return value of `configure_optimizers`."""
