"""Lightning's strategies: objects for `Trainer(strategy=)`, and the classes that `trainer.strategy` has."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from raylight.contract.config import DDP
from raylight.contract.errors import InvalidArguments
from raylight.user.run_view import Record
from raylight.user.strategy_facade import StrategyFacade

if TYPE_CHECKING:
    from raylight.contract.kinds import Value
    from raylight.user.accelerators import Accelerator
    from raylight.user.checkpoint_io import CheckpointIO
    from raylight.user.run_view import RunView

INSTEAD = {
    "checkpoint_io": "pass it in plugins=[...] of the trainer",
    "cluster_environment": "Ray knows the nodes and places the workers: leave it out",
    "ddp_comm_hook": "gradients are averaged as they are: leave it out",
    "ddp_comm_state": "gradients are averaged as they are: leave it out",
    "ddp_comm_wrapper": "gradients are averaged as they are: leave it out",
    "model_averaging_period": "use callbacks=[raylight.callbacks.WeightAveraging()]",
    "parallel_devices": "say how many by devices=N, or num_workers=N",
    "precision_plugin": "say precision=... to the trainer",
}
"""Arguments of Lightning's strategies that raylight's do not take, and what to use."""


class LightningStrategy(StrategyFacade):
    """What Lightning's strategies have in common. One that is given to a trainer stands for its `settings`."""

    settings: DDP
    _asks: dict[str, Value]
    """What it says of the trainer's other arguments."""

    def __init__(self, **given: Value):
        super().__init__(Record())
        self._asks = {}
        self.settings = DDP()
        name = type(self).__name__
        mistakes = [f"{name}: {each}= is not taken here: {INSTEAD[each]}" for each in given if each in INSTEAD]
        mistakes += [f"{name} has no argument {each!r}" for each in given if each not in INSTEAD]
        own = [key for kind in _kinds_of_users(type(self)) for key in vars(kind) if _is_own(kind, key)]
        mistakes += [f"{name}.{key}: raylight calls no method of a strategy; use a hook of a callback" for key in own]
        if mistakes:
            raise InvalidArguments(mistakes)


class ParallelStrategy(LightningStrategy):
    """Several workers."""


class DDPStrategy(ParallelStrategy):
    """Lightning's way to say `raylight.DDP(...)`; the arguments are those of torch's DistributedDataParallel.

    `start_method` changes nothing: on Ray, workers start in one way.
    """

    strategy_name = "ddp"

    def __init__(
        self,
        accelerator: Accelerator | str | None = None,
        *,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        start_method: str = "popen",
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = True,
        bucket_cap_mb: float | None = None,
        broadcast_buffers: bool = True,
        **other: Value,
    ):
        super().__init__(**{name: value for name, value in other.items() if value is not None})
        self._asks = {} if accelerator is None else {"accelerator": accelerator}
        self._start_method = start_method
        self.settings = DDP(
            find_unused_parameters=find_unused_parameters,
            static_graph=static_graph,
            gradient_as_bucket_view=gradient_as_bucket_view,
            bucket_cap_mb=bucket_cap_mb,
            broadcast_buffers=broadcast_buffers,
            backend=process_group_backend,
            timeout_s=timeout.total_seconds() if timeout is not None else DDP().timeout_s,
        )


class SingleDeviceStrategy(LightningStrategy):
    """One device, in this process: what `num_workers=0` says. `device` is "cpu", "cuda" or "cuda:0"."""

    strategy_name = "single_device"

    def __init__(self, device: object = "cpu", accelerator: Accelerator | str | None = None, **other: Value):
        super().__init__(**{name: value for name, value in other.items() if value is not None})
        self._device = str(device)
        self._asks = {"num_workers": 0, "use_gpu": self._device.partition(":")[0] == "cuda"}
        index = self._device.partition(":")[2]
        if index not in ("", "0"):
            raise InvalidArguments(
                f"SingleDeviceStrategy(device={self._device!r}): for that GPU alone, set CUDA_VISIBLE_DEVICES={index} "
                'and say device="cuda:0"'
            )


def strategy_of(view: RunView, checkpoint_io: CheckpointIO) -> LightningStrategy:
    """The strategy of a run, of the class that Lightning's would have."""
    kind: type[LightningStrategy] = DDPStrategy if view.world_size > 1 else SingleDeviceStrategy
    found = kind.__new__(kind)
    StrategyFacade.__init__(found, view, checkpoint_io)
    return found


def asked_by(strategy: object) -> dict[str, Value]:
    """The trainer's other arguments that a strategy object of Lightning's name stands for."""
    return dict(strategy._asks) if isinstance(strategy, LightningStrategy) else {}


def _kinds_of_users(kind: type) -> list[type]:
    return [each for each in kind.__mro__ if issubclass(each, LightningStrategy) and each.__module__ != __name__]


def _is_own(kind: type, name: str) -> bool:
    return callable(vars(kind)[name]) and not name.startswith("__") and hasattr(StrategyFacade, name)
