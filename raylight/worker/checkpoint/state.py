"""State: all that a run is continued from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from torch import Tensor

from raylight.contract.kinds import StateDict, Value
from raylight.contract.seeding import RNGState
from raylight.worker.data.source import Position
from raylight.worker.metrics.epoch_shares import PackedShare

Configured = dict[str, list[Value]]
"""The options of optimizers and schedulers before the first step, as optimizer_options.describe gives them."""


class ReplicatedState(TypedDict, total=False):
    """Equal on all ranks; empty if a checkpoint holds weights alone."""

    optimizers: list[StateDict]
    schedulers: list[StateDict]
    configured: Configured
    callbacks: dict[str, StateDict]
    loop: dict[str, int]
    precision: StateDict
    metrics: dict[str, float]
    measured_at: dict[str, int]
    data_module: StateDict


class OwnState(TypedDict, total=False):
    """One rank's."""

    rng: RNGState
    data: Position | None
    logged: PackedShare
    saved_at: int
    """When ranks meet: `Saving.saved_at` of the furthest one."""
    ends: tuple[bool, str]
    """When ranks meet: whether it was asked to stop, and its status."""


@dataclass(slots=True)
class State:
    """As live objects when it is saved, and as loaded ones when it is read."""

    model: StateDict = field(default_factory=dict)
    """`module.state_dict()`; what is neither a parameter nor owned by an optimizer is rank 0's."""
    replicated: ReplicatedState = field(default_factory=ReplicatedState)
    own: OwnState = field(default_factory=OwnState)
    module: StateDict = field(default_factory=dict)
    """Hyperparameters and the user's extras; rank 0's."""
    others: list[OwnState] = field(default_factory=list)
    """Read from a checkpoint of another world size: what each rank there had as `own`, which is empty then."""
    parameters: list[Tensor] = field(default_factory=list)
    """The module's own; not read from a checkpoint."""

    def take_from_hooks(self, shown: StateDict) -> None:
        """What `on_load_checkpoint` has made of it is what is gone on from; the keys are Lightning's."""
        self.model = shown["state_dict"]
        if self.replicated:
            self.replicated["callbacks"] = shown.get("callbacks", {})
            self.replicated["optimizers"] = shown.get("optimizer_states", [])
            self.replicated["schedulers"] = shown.get("lr_schedulers", [])
