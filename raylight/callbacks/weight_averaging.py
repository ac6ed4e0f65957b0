"""WeightAveraging: a running average of the weights, which validation, checkpoints and the result use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from raylight.callbacks.averaged_weights import AveragedWeights, AverageMany, AverageOne, AverageView, unique_state
from raylight.callbacks.mistake_list import Mistakes, is_number
from raylight.contract.kinds import Batch, Output, Value
from raylight.contract.plain_numbers import to_python
from raylight.user.callback import Callback
from raylight.worker.group.collectives import broadcast_tensors

if TYPE_CHECKING:
    from raylight.user.module import Module
    from raylight.user.trainer_names import TrainerNames


class WeightAveraging(Callback):
    """Averages the weights after each optimizer step for which `should_update` says so.

    `avg_fn(averaged, current, num_averaged)` or, in place and for many tensors at once, `multi_avg_fn` computes the
    average, as in `torch.optim.swa_utils.AveragedModel`; without one all updates weigh the same. The first update
    copies the weights. With `use_buffers`, buffers of floating point are averaged too; all others, and without it all
    buffers, are the newest. The average is kept on `device`, by default the module's.

    Validation inside `fit` runs with the average. A checkpoint holds the average as the module's weights, which is
    what `load_from_checkpoint` and `test` read, and what training goes on with beside it. After `fit` the module has
    the averaged weights. Until the first update the average is the module itself. Behaves as in Lightning 2.6, but for
    that last point.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        *,
        avg_fn: AverageOne | None = None,
        multi_avg_fn: AverageMany | None = None,
    ):
        mistakes = Mistakes(type(self).__name__)
        for name, function in (("avg_fn", avg_fn), ("multi_avg_fn", multi_avg_fn)):
            mistakes.require(function is None or callable(function), f"{name}={function!r} must be a function.")
        mistakes.require(avg_fn is None or multi_avg_fn is None, "avg_fn and multi_avg_fn exclude one another.")
        mistakes.raise_any()
        self.average = AveragedWeights(device, use_buffers, avg_fn, multi_avg_fn)
        self._module: Module | None = None
        self._latest_update_step = 0
        self._latest_update_epoch = -1

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to update after this step or epoch, each counted from 0; the other one is None. Override it."""
        return step_idx is not None

    # ---- names of Lightning's that subclasses use

    @property
    def _average_model(self) -> AverageView | None:
        return None if self._module is None else AverageView(self.average, self._module)

    def _swap_models(self, pl_module: Module) -> None:
        """Exchange the module's weights and the average."""
        self.average.swap(pl_module)

    def _copy_average_to_current(self, pl_module: Module) -> None:
        """Give the module the average at the end."""
        self.average.swap(pl_module)

    # ---- updates

    def setup(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        if stage == "fit":
            self._module = module
            self.average.reset()
            self._latest_update_step, self._latest_update_epoch = 0, -1

    def on_train_start(self, trainer: TrainerNames, module: Module) -> None:
        if self.average.is_swapped:  # a peer was lost in the middle of a validation, and training goes on without it
            self.average.swap(module)

    def on_train_batch_end(
        self, trainer: TrainerNames, module: Module, outputs: Output, batch: Batch, batch_idx: int
    ) -> None:
        self._update_after_step(trainer, module)

    def on_train_epoch_end(self, trainer: TrainerNames, module: Module) -> None:
        self._update_after_step(trainer, module)
        epoch = trainer.current_epoch
        if epoch > self._latest_update_epoch and self.should_update(epoch_idx=epoch):
            self._latest_update_epoch = epoch
            self.average.update(module)

    def _update_after_step(self, trainer: TrainerNames, module: Module) -> None:
        """A rank without samples in an epoch's last batch has no end of that batch, so this is asked once more before
        the next thing that happens: all ranks must average the same."""
        step = trainer.global_step
        if step > self._latest_update_step and self.should_update(step_idx=step - 1):
            self._latest_update_step = step
            self.average.update(module)

    # ---- hooks in which the average takes the place of the weights

    def on_validation_epoch_start(self, trainer: TrainerNames, module: Module) -> None:
        if not trainer.fitting:
            return
        self._update_after_step(trainer, module)
        # each rank has averaged buffers of its own, and all must measure the same module
        buffers = {name for name, _ in module.named_buffers()}
        broadcast_tensors([t for name, t in self.average.kept.items() if name in buffers], trainer.world_size)
        trainer.finish_copying()
        self._swap_models(module)

    def on_validation_epoch_end(self, trainer: TrainerNames, module: Module) -> None:
        if trainer.fitting:
            self._swap_models(module)

    def on_train_end(self, trainer: TrainerNames, module: Module) -> None:
        self._copy_average_to_current(module)

    def teardown(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        self._module = None
        self.average.reset()

    # ---- checkpoints

    def state_dict(self) -> dict[str, Value]:
        return {
            "latest_update_step": self._latest_update_step,
            "latest_update_epoch": self._latest_update_epoch,
            **self.average.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Value]) -> None:
        assert self._module is not None, "a state is loaded after setup"
        self._latest_update_step = state_dict["latest_update_step"]
        self._latest_update_epoch = state_dict["latest_update_epoch"]
        self.average.load_state_dict(state_dict, self._module)

    def on_save_checkpoint(self, trainer: TrainerNames, module: Module, checkpoint: dict[str, Value]) -> None:
        """Exchange average and weights in the checkpoint; nothing is copied here, the snapshot copies both."""
        state = checkpoint["callbacks"].get(self.state_key, {})
        if "average" not in state:
            return
        averages, weights = state.pop("average"), checkpoint["state_dict"]
        state["current"] = {name: weights[name] for name in averages}
        first_name = {id(tensor): name for name, tensor in unique_state(module)}
        for name, tensor in module.state_dict(keep_vars=True).items():
            if name in weights and id(tensor) in first_name:
                weights[name] = averages[first_name[id(tensor)]]


class EMAWeightAveraging(WeightAveraging):
    """An exponential moving average: after a step `average = decay * average + (1 - decay) * weights`.

    It is updated every `update_every_n_steps` from step `update_starting_at_step` on, counted from 0, and with
    `update_starting_at_epoch` also at the end of each epoch from that one on.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
    ):
        mistakes = Mistakes(type(self).__name__)
        mistakes.require(is_number(decay) and 0 <= decay <= 1, f"decay={decay!r} must be a number from 0 to 1.")
        mistakes.require_count("update_every_n_steps", update_every_n_steps, 0)
        for name, value in (
            ("update_starting_at_step", update_starting_at_step),
            ("update_starting_at_epoch", update_starting_at_epoch),
        ):
            if value is not None:
                mistakes.require_count(name, value, 0)
        mistakes.raise_any()
        super().__init__(device, use_buffers, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.decay = decay
        self.update_every_n_steps = to_python(update_every_n_steps)
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is not None:
            started = step_idx >= (self.update_starting_at_step or 0)
            return started and self.update_every_n_steps > 0 and step_idx % self.update_every_n_steps == 0
        begin = self.update_starting_at_epoch
        return begin is not None and epoch_idx is not None and epoch_idx >= begin
