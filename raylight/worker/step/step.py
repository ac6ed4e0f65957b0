"""One optimizer step: forward, backward, averaging over the ranks, clipping, and the step itself."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from raylight.arguments.checks import check_loss
from raylight.contract.errors import DataError, InvalidArguments
from raylight.contract.kinds import Batch, Closure, Hook, Output
from raylight.contract.seeding import seed_step
from raylight.user.transfer import batch_size_of
from raylight.worker.data.batches import TrainBatch
from raylight.worker.diagnosis.sections import Sections
from raylight.worker.hooks import bind_step
from raylight.worker.step.half_steps import Schedules, StepUndo, evaluates_often
from raylight.worker.step.moving_buffers import MovingBuffers
from raylight.worker.step.optimizers import SteppingOptimizer, needs_closure
from raylight.worker.step.reduction import Reduction, mean_loss
from raylight.worker.worker import Worker

NO_CONTEXT = nullcontext()
ROUNDING = 1e-6  # of a sum of weights


class Step:
    """One optimizer step of one rank, made batch by batch, and how it is undone if it breaks.

    What a step needs is looked up once. It ends with its group: DDP holds on to the process group.
    """

    optimizer: Optimizer
    """The one that the loop steps; a module that optimizes manually may have none."""

    def __init__(self, worker: Worker):
        self.worker, self.config, hooks, module = worker, worker.config, worker.hooks, worker.module
        self.automatic, self.several = module.automatic_optimization, worker.world_size > 1
        if worker.optimizers.all:
            self.optimizer = worker.optimizers.all[0]
        self.window = 0  # batches accumulated since the last optimizer step
        self.reduction = Reduction(worker, bind_step(module.training_step))
        self.follow()
        self.on_before_zero_grad = hooks.of("on_before_zero_grad")
        self.on_before_backward = hooks.of("on_before_backward")
        self.on_after_backward = hooks.of("on_after_backward")
        self.on_before_optimizer_step = hooks.of("on_before_optimizer_step")
        self.zero_grad = hooks.of_module("optimizer_zero_grad")
        self.backward: Hook | None = module.backward if hooks.overrides("backward") else None
        self.clips = hooks.overrides("configure_gradient_clipping") or bool(self.config.gradient_clip_val)
        self.uses_closure = hooks.overrides("optimizer_step") or any(map(needs_closure, worker.optimizers.all[:1]))
        self.losses: list[Tensor] = []  # since the last report
        self.loss_is_checked = self._said_none = False
        self._last_data: Batch = None  # of manual optimization with several ranks
        self.filled = 0.0  # what their losses were weighted with, all in all
        self.uneven = False  # a batch of this window is missing on some rank, so that DDP cannot average
        self.stepping_optimizers = [SteppingOptimizer(o, self.step_optimizer) for o in worker.optimizers.all]
        self.raw_backward = worker.optimizers.watch_raw_backward() if self.several and not self.automatic else None
        self.batch: TrainBatch | None = None
        """In hand, from before its first hook to after its last."""
        self.is_done = False
        """The step of the batch in hand is made, and only hooks at the batch's end remain."""
        self._knows_sizes = True
        self._step_at_batch = 0  # global_step before the batch in hand
        self._undo: StepUndo | None = None  # of a step that is under way and changes parameters little by little
        self._schedules: Schedules | None = None  # before the batch in hand, in manual optimization
        self.buffers = MovingBuffers(module)  # as they were before the window
        self.torch_rng: Tensor | None = None  # before the batch in hand; ranks of several have numbers of their own
        self._window_rng: Tensor | None = None  # before the first batch of the window

    def profile(self, sections: Sections) -> None:
        """Puts sections around forward, backward and the optimizer's step."""
        self.forward = sections.around("training_step", self.forward)  # type: ignore[method-assign]
        self.backward = sections.around("backward", self.backward or Tensor.backward)
        self.step_optimizer = sections.around("optimizer_step", self.step_optimizer)  # type: ignore[method-assign]

    # ---- the batch in hand

    def begin(self, batch: TrainBatch) -> None:
        """Keeps what `undo` puts back."""
        worker = self.worker
        self.batch, self.is_done = batch, False
        self._step_at_batch = worker.progress.global_step - worker.progress.steps_ahead
        if self.several:
            seed_step(worker.task.seed, worker.rank, worker.progress.num_batches_seen)
        else:
            self.torch_rng = torch.default_generator.get_state()
            if not self.window:
                self._window_rng = self.torch_rng
        if self.buffers and not self.window:
            self.buffers.keep()
        is_known = self._knows_sizes or not batch.size
        worker.metrics.begin_batch(batch.size if is_known else partial(batch_size_of, batch.data), batch.index)

    def end(self) -> None:
        """Every hook of the batch has run."""
        self.batch = None
        if not self.window:
            self.worker.progress.finish_window(self._step_at_batch)

    def begin_epoch(self, knows_sizes: bool) -> None:
        """`knows_sizes`: the sampler says how many samples a batch holds; else it is guessed from what is in it."""
        self._knows_sizes, self.window, self.uneven = knows_sizes, self.worker.data.take_window(), False
        self.filled = self.window / self.worker.data.accumulate

    def take_losses(self) -> list[Tensor]:
        """Those since the last call, on the device."""
        taken, self.losses = self.losses, []
        return taken

    @property
    def num_broken(self) -> int:
        """Batches that `undo` takes back: those of an unfinished window, and one whose step is not made."""
        return self.window + (self.batch is not None and not self.is_done)

    def undo(self) -> bool:
        """Takes back a step that broke: the batches of its window, logged values, running statistics, and what was
        drawn from torch's random numbers on the CPU. (To note numpy's before each batch would cost as much as a small
        step.) A batch whose step is made counts: only hooks at its end are missing, and True is returned."""
        progress, metrics = self.worker.progress, self.worker.metrics
        is_torn = self.batch is not None and self.is_done
        if self.batch is not None and self.is_done:
            progress.finish_batch(self.batch.index)
            if not self.window:
                progress.finish_window(self._step_at_batch)
                every = self.config.log_every_n_steps
                if every and progress.step_before // every != progress.global_step // every:
                    metrics.record(progress.global_step, progress.current_epoch)
                metrics.end_step()
        elif self.batch is not None:
            self._undo_batch()
        if self.window or (self.batch is not None and not self.is_done):
            if self._window_rng is not None:
                torch.default_generator.set_state(self._window_rng)
            self.buffers.put_back()
        progress.take_back(self.window)
        self.batch, self.window = None, 0
        return is_torn

    def _undo_batch(self) -> None:
        """The batch in hand will be trained again. The optimizer steps that manual optimization has made in it stay, on
        all ranks, and are passed over when it comes again."""
        if self._undo is not None:
            self._undo.put_back()
            self._undo = None
        self.worker.progress.note_steps_ahead(self._step_at_batch)
        if self._schedules is not None:
            self._schedules.put_back()

    def follow(self) -> None:
        """Looks the parameters up: as an epoch begins, callbacks may unfreeze some or give them to an optimizer."""
        groups = [group for optimizer in self.worker.optimizers.all for group in optimizer.param_groups]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.num_groups = len(groups)
        self.reduction.follow(self.parameters)

    def make(self, batch: TrainBatch, data: Batch, complete: bool) -> Output:
        """training_step on one batch and, where it completes an accumulation window, the optimizer step."""
        worker, reduction = self.worker, self.reduction
        if not self.window:
            self.filled, self.uneven = 0.0, False
        self.uneven |= batch.uneven
        if not self.automatic:
            return self._take_manually(batch, data)
        if not self.window and (
            len(self.optimizer.param_groups) != self.num_groups or (self.several and reduction.is_outdated())
        ):
            self.follow()  # user code has unfrozen something in the middle of an epoch, or given it to the optimizer
        if reduction.waits_for_shapes:
            reduction.check_has_sample(batch.uneven)
            self.uneven = True
        scale = batch.share / worker.data.accumulate
        self.filled += 1.0 / worker.data.accumulate
        if not complete:
            with reduction.ddp.no_sync() if reduction.ddp is not None else NO_CONTEXT:
                outputs = self.compute(batch, data, scale)
            self.window += 1
            self.is_done = True
            return outputs
        if self.uses_closure:
            outputs = self._step_by_closure(batch, data, scale)
        else:
            outputs = self.compute(batch, data, scale)
            self.finish()
            self.step_optimizer(self.optimizer)
        self.is_done, self.window = True, 0
        return outputs

    def forward(self, data: Batch, index: int) -> Output:
        # DDP's forward may enter a collective, which a rank without a sample would not join
        step = self.reduction.plain_step if self.uneven else self.reduction.step
        if self.worker.precision.is_plain:
            return step(data, index, 0)
        with self.worker.precision.forward_context():
            return step(data, index, 0)

    def compute(self, batch: TrainBatch, data: Batch, scale: float) -> Output:
        """training_step and backward; the gradients are those of the loss times `scale`."""
        if not batch.size:  # this rank has no sample in the epoch's last batch; the others do
            self._zero(batch.index)
            return None
        outputs = self.forward(data, batch.index)
        loss = outputs["loss"] if isinstance(outputs, dict) and "loss" in outputs else outputs
        if loss is None or not self.loss_is_checked:
            self._check(loss)
        self._zero(batch.index)
        if loss is None:
            return None
        for hook in self.on_before_backward:
            hook(loss)
        scaled = loss if scale == 1.0 else loss * scale
        if self.worker.precision.scaler is not None:
            scaled = self.worker.precision.scale(scaled)
        if self.backward is not None:
            self.backward(scaled)
        else:
            scaled.backward()
        for hook in self.on_after_backward:
            hook()
        self.losses.append(loss.detach())
        return outputs

    def finish(self) -> None:
        """From raw gradients to those that the optimizer takes: averaged, unscaled, clipped."""
        if self.uneven:
            self.reduction.average_all()
        elif self.several:
            self.reduction.finish()
        if abs(self.filled - 1.0) > ROUNDING and self.config.global_batch_size is None:
            self._weigh_anew()
        if not self.clips and not self.on_before_optimizer_step:
            return
        self.worker.precision.unscale(self.optimizer)
        for hook in self.on_before_optimizer_step:
            hook(self.optimizer)
        if self.clips:
            self.worker.module.configure_gradient_clipping(
                self.optimizer, self.config.gradient_clip_val, self.config.gradient_clip_algorithm
            )

    def _weigh_anew(self) -> None:
        """An epoch's last window may have fewer batches: its gradient is the mean over those. With `global_batch_size`
        the shares of its batches see to that."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, 1.0 / self.filled)

    def step_optimizer(self, optimizer: Optimizer, closure: Closure | None = None) -> Output:
        """The one place where parameters change."""
        worker = self.worker
        if not self.automatic:
            if worker.progress.steps_ahead:  # it was made before this batch broke
                worker.progress.skip_step()
                return closure() if closure is not None else None
            if closure is not None:
                closure = self._make_common(closure)
            if self.on_before_optimizer_step:
                worker.precision.unscale(optimizer)
                for hook in self.on_before_optimizer_step:
                    hook(optimizer)
        if not worker.saving.finish_copying() and worker.world_size == 1:
            # User code wrote into what was being copied: again, after this step. With several ranks, which must save
            # at the same step, the driver asks them.
            worker.saving.request()
        if closure is not None and evaluates_often(optimizer):
            self._undo = StepUndo(optimizer)
        if worker.precision.scaler is None:
            result = optimizer.step(closure) if closure is not None else optimizer.step()
        else:
            result = worker.precision.step(optimizer, closure)
            worker.precision.update()
        worker.progress.finish_step()
        self._undo = None
        if self.automatic:  # so that what fails from here on finds this batch done
            self.is_done, self.window = True, 0
        return result

    def backward_manually(self, loss: Tensor, *arguments: Any, **keywords: Any) -> None:
        for hook in self.on_before_backward:
            hook(loss)
        self.losses.append(loss.detach())
        share = self._manual_share()
        if share != 1.0:
            loss = loss * share
        self.worker.module.backward(self.worker.precision.scale(loss), *arguments, **keywords)
        if self.raw_backward is not None:
            self.reduction.average_all()
            self.raw_backward.forgive()
        for hook in self.on_after_backward:
            hook()

    def _step_by_closure(self, batch: TrainBatch, data: Batch, scale: float) -> Output:
        """For optimizers that evaluate the loss themselves, and for modules that override optimizer_step."""
        worker, last, evaluations, num_losses = self.worker, [None], 0, len(self.losses)

        def closure() -> Output:
            nonlocal evaluations
            evaluations += 1
            if evaluations > 1:
                self._evaluate_again(num_losses)
            last[0] = outputs = self.compute(batch, data, scale)
            self.finish()
            return mean_loss(outputs["loss"] if isinstance(outputs, dict) else outputs, batch.share, worker)

        final: Closure = closure
        if worker.precision.scaler is not None:  # a scaler must see the gradients before the step
            loss = closure()
            final = lambda: loss  # noqa: E731
        worker.module.optimizer_step(worker.progress.current_epoch, batch.index, self.stepping_optimizers[0], final)
        return last[0]

    def _evaluate_again(self, num_losses: int) -> None:
        """The optimizer asks for the loss at other weights."""
        if self.window:
            raise InvalidArguments(
                f"{type(self.optimizer).__name__} evaluates the loss more than once a step, and "
                f"accumulate_grad_batches={self.worker.data.accumulate} has only the last batch of a window to do"
                " so; give it batches of that size instead"
            )
        self._show_life()
        del self.losses[num_losses:]

    def _make_common(self, closure: Closure) -> Closure:
        """The closure of manual optimization, whose value is the mean over the ranks."""
        worker = self.worker

        def evaluate() -> Output:
            self._show_life()
            loss = closure()
            if self.raw_backward is not None:
                self.raw_backward.check()
            return mean_loss(loss, self._manual_share(), worker)

        return evaluate if worker.world_size > 1 else closure

    def _manual_share(self) -> float:
        """The last step of an epoch may be uneven: its mean is that over all samples."""
        batch = self.batch
        return batch.share if self.several and batch is not None and self.config.global_batch_size is None else 1.0

    def _show_life(self) -> None:
        self.worker.control.show_life_again()

    def _take_manually(self, batch: TrainBatch, data: Batch) -> Output:
        worker = self.worker
        if worker.optimizers.schedulers:
            self._schedules = Schedules(worker.optimizers)
        outputs = None
        if batch.size:
            self._last_data = data if self.several else None
            outputs = self.forward(data, batch.index)
        else:
            self._take_borrowed(batch)
        worker.progress.forget_steps_ahead()
        self.is_done = True
        return outputs

    def _take_borrowed(self, batch: TrainBatch) -> None:
        """A rank without a sample makes the steps of the others: it trains its last batch with a share of zero, and
        logs nothing of it."""
        if self._last_data is None:
            raise DataError(
                "the first step has fewer samples than workers, and training_step, which steps the optimizers itself, "
                "needs one on each; use fewer workers"
            )
        with self.worker.metrics.set_aside():
            self.forward(self._last_data, batch.index)

    def _zero(self, index: int) -> None:
        """At the start of a window."""
        if self.window:
            return
        for hook in self.on_before_zero_grad:
            hook(self.optimizer)
        if self.zero_grad:
            self.zero_grad[0](self.worker.progress.current_epoch, index, self.optimizer)
            return
        for parameter in self.parameters:  # what optimizer.zero_grad() does, without its bookkeeping
            parameter.grad = None

    def _check(self, loss: Output) -> None:
        if loss is not None:
            check_loss(loss)
            self.loss_is_checked = True
            return
        if self.worker.world_size > 1:
            raise DataError("training_step returned None: with several workers every rank must return a loss")
        if not self._said_none:
            self._said_none = True
            self.worker.warn_once("training_step returned None: such a batch is skipped")
