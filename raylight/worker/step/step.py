"""One optimizer step: forward, backward, averaging over the ranks, clipping, and the step itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from raylight.arguments.checks import check_loss
from raylight.contract.errors import DataError
from raylight.contract.seeding import seed_step
from raylight.user.transfer import size_guess
from raylight.worker.data.batches import TrainBatch
from raylight.worker.diagnosis.sections import Sections
from raylight.worker.group.collectives import average_gradients, broadcast_tensors
from raylight.worker.hooks import bind_step
from raylight.worker.step.dynamo import default_compiler_settings
from raylight.worker.step.moving_buffers import MovingBuffers
from raylight.worker.step.optimizers import SteppingOptimizer
from raylight.worker.worker import Worker

NO_CONTEXT = nullcontext()


class StepModule(nn.Module):
    """Lets DDP, which wraps `forward`, wrap `training_step`."""

    def __init__(self, module: nn.Module, step: Callable[..., Any]):
        super().__init__()
        self.module = module
        self.step = step

    def forward(self, *arguments: Any) -> Any:
        return self.step(*arguments)


class Step:
    """One optimizer step of one rank, made batch by batch, and how it is undone if it breaks.

    What a step needs is looked up once. It ends with its group: DDP holds on to the process group.
    """

    def __init__(self, worker: Worker):
        self.worker, self.config, hooks, module = worker, worker.config, worker.hooks, worker.module
        self.automatic = module.automatic_optimization
        self.optimizer: Any = worker.optimizers.all[0] if worker.optimizers.all else None
        self.step = self.plain_step = bind_step(module.training_step)
        self.ddp: nn.parallel.DistributedDataParallel | None = None
        self.trained: list[int] | None = None
        self.follow()
        self.on_before_zero_grad = hooks.of("on_before_zero_grad")
        self.on_before_backward = hooks.of("on_before_backward")
        self.on_after_backward = hooks.of("on_after_backward")
        self.on_before_optimizer_step = hooks.of("on_before_optimizer_step")
        self.zero_grad = hooks.of_module("optimizer_zero_grad")
        self.backward: Callable[..., Any] | None = module.backward if hooks.overrides("backward") else None
        self.clips = hooks.overrides("configure_gradient_clipping") or bool(self.config.gradient_clip_val)
        self.uses_closure = hooks.overrides("optimizer_step") or isinstance(self.optimizer, torch.optim.LBFGS)
        self.losses: list[Tensor] = []  # since the last report
        self.loss_is_checked = False
        self.window = 0  # batches accumulated since the last optimizer step
        self.uneven = False  # a batch of this window is missing on some rank, so that DDP cannot average
        self.stepping_optimizers = [SteppingOptimizer(o, self.step_optimizer) for o in worker.optimizers.all]
        self.batch: TrainBatch | None = None
        """In hand, from before its first hook to after its last."""
        self.is_done = False
        """The step of the batch in hand is made, and only hooks at the batch's end remain."""
        self._knows_sizes = True
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
        if worker.world_size > 1:
            seed_step(worker.task.seed, worker.rank, worker.progress.num_batches_seen)
        else:
            self.torch_rng = torch.default_generator.get_state()
            if not self.window:
                self._window_rng = self.torch_rng
        if self.buffers and not self.window:
            self.buffers.keep()
        is_known = self._knows_sizes or not batch.size
        worker.metrics.begin_batch(batch.size if is_known else size_guess(batch.data), batch.index)

    def end(self) -> None:
        self.batch = None

    def begin_epoch(self, knows_sizes: bool) -> None:
        """`knows_sizes`: the sampler says how many samples a batch holds; else it is guessed from what is in it."""
        self.window, self._knows_sizes = 0, knows_sizes

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
                every = self.config.log_every_n_steps
                if every and progress.global_step % every == 0:
                    metrics.record(progress.global_step, progress.current_epoch)
                metrics.end_step()
        if self.window or (self.batch is not None and not self.is_done):
            if self._window_rng is not None:
                torch.default_generator.set_state(self._window_rng)
            self.buffers.put_back()
        progress.take_back(self.window)
        self.batch, self.window = None, 0
        return is_torn

    def follow(self) -> None:
        """Looks the parameters up: as an epoch begins, callbacks may unfreeze some or give them to an optimizer."""
        worker = self.worker
        self.parameters = worker.optimizers.parameters
        before, self.trained = self.trained, [id(p) for p in worker.module.parameters() if p.requires_grad]
        if worker.world_size > 1 and self.trained != before:
            self.step, self.ddp = self.plain_step, None  # DDP's hooks on the parameters go with it
            self._join_ddp(is_first=before is None)

    def make(self, batch: TrainBatch, data: Any, complete: bool) -> Any:
        """training_step on one batch and, where it completes an accumulation window, the optimizer step."""
        scale = batch.share / self.worker.data.accumulate
        self.uneven |= batch.uneven
        if not self.automatic:
            outputs = self.forward(data, batch.index)
            self.is_done = True
            return outputs
        if not complete:
            with self.ddp.no_sync() if self.ddp is not None else NO_CONTEXT:
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
        self.window, self.uneven = 0, False
        self.is_done = True
        return outputs

    def forward(self, data: Any, index: int) -> Any:
        # DDP's forward may enter a collective, which a rank without a sample would not join
        step = self.plain_step if self.uneven else self.step
        if self.worker.precision.is_plain:
            return step(data, index, 0)
        with self.worker.precision.forward_context():
            return step(data, index, 0)

    def compute(self, batch: TrainBatch, data: Any, scale: float) -> Any:
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
            average_gradients(self.parameters, self.worker.world_size)
        if not self.clips and not self.on_before_optimizer_step:
            return
        self.worker.precision.unscale(self.optimizer)
        for hook in self.on_before_optimizer_step:
            hook(self.optimizer)
        if self.clips:
            self.worker.module.configure_gradient_clipping(
                self.optimizer, self.config.gradient_clip_val, self.config.gradient_clip_algorithm
            )

    def step_optimizer(self, optimizer: Any, closure: Callable[[], Any] | None = None) -> Any:
        """The one place where parameters change."""
        worker = self.worker
        if not self.automatic and self.on_before_optimizer_step:
            worker.precision.unscale(optimizer)
            for hook in self.on_before_optimizer_step:
                hook(optimizer)
        if not worker.saving.finish_copying() and worker.world_size == 1:
            # User code wrote into what was being copied: again, after this step. With several ranks, which must save
            # at the same step, the driver asks them.
            worker.saving.request()
        if worker.precision.scaler is None:
            result = optimizer.step(closure) if closure is not None else optimizer.step()
        else:
            result = worker.precision.step(optimizer, closure)
            worker.precision.update()
        worker.progress.finish_step()
        if self.automatic:  # whatever fails from here on, as in an optimizer_step of the user's, the step is made
            self.is_done, self.window = True, 0
        return result

    def backward_manually(self, loss: Tensor, *arguments: Any, **keywords: Any) -> None:
        for hook in self.on_before_backward:
            hook(loss)
        self.losses.append(loss.detach())
        self.worker.module.backward(self.worker.precision.scale(loss), *arguments, **keywords)
        # gradients that were averaged before are equal on all ranks, and their mean leaves them as they are
        average_gradients(self.worker.module.parameters(), self.worker.world_size)
        for hook in self.on_after_backward:
            hook()

    def _step_by_closure(self, batch: TrainBatch, data: Any, scale: float) -> Any:
        """For optimizers that evaluate the loss themselves, and for modules that override optimizer_step."""
        worker, last = self.worker, [None]

        def closure() -> Any:
            last[0] = outputs = self.compute(batch, data, scale)
            self.finish()
            return outputs["loss"] if isinstance(outputs, dict) else outputs

        final: Callable[[], Any] = closure
        if worker.precision.scaler is not None:  # a scaler must see the gradients before the step
            loss = closure()
            final = lambda: loss  # noqa: E731
        worker.module.optimizer_step(worker.progress.current_epoch, batch.index, self.stepping_optimizers[0], final)
        return last[0]

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

    def _check(self, loss: Any) -> None:
        if loss is not None:
            check_loss(loss)
            self.loss_is_checked = True
        elif self.worker.world_size > 1:
            raise DataError("training_step returned None: with several workers every rank must return a loss")

    def _join_ddp(self, is_first: bool) -> None:
        """Equal weights on all ranks, and DDP around training_step where torch drives the optimizer."""
        worker, options = self.worker, self.config.strategy
        module = worker.module
        if not self.automatic or not any(p.requires_grad for p in module.parameters()):
            if is_first:
                broadcast_tensors([*module.parameters(), *module.buffers()], worker.world_size)
            return
        given: dict[str, Any] = {}  # what differs from torch's defaults, some of which torch has begun to rename
        if self.config.deterministic:
            # DDP lays its buckets out anew after its first step, and with three ranks or more the place of a value in
            # a bucket decides in which order it is summed. A bucket for each parameter cannot be laid out otherwise.
            given["bucket_cap_mb"] = 1e-6
        elif options.bucket_cap_mb is not None:
            given["bucket_cap_mb"] = options.bucket_cap_mb
        if not options.broadcast_buffers:
            given["broadcast_buffers"] = False
        with default_compiler_settings():
            self.step = self.ddp = nn.parallel.DistributedDataParallel(
                StepModule(module, self.step),
                device_ids=[worker.device] if worker.device.type == "cuda" else None,
                find_unused_parameters=options.find_unused_parameters,
                static_graph=options.static_graph,
                gradient_as_bucket_view=options.gradient_as_bucket_view,
                init_sync=is_first,  # later they are equal already, and a snapshot may be copying them
                **given,
            )
