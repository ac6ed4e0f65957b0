"""One optimizer step: forward, backward, averaging over the ranks, clipping, and the step itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from raylight.arguments.checks import check_loss
from raylight.contract.errors import DataError
from raylight.worker.data.batches import TrainBatch
from raylight.worker.group.collectives import average_gradients, broadcast_tensors
from raylight.worker.rank import Rank, bind_step
from raylight.worker.step.dynamo import default_compiler_settings
from raylight.worker.step.optimizers import SteppingOptimizer

NO_CONTEXT = nullcontext()


class StepModule(nn.Module):
    """Lets DDP, which wraps `forward`, wrap `training_step`."""

    def __init__(self, module: nn.Module, step: Callable[..., Any]):
        super().__init__()
        self.module = module
        self.step = step

    def forward(self, *arguments: Any) -> Any:
        return self.step(*arguments)


class Gradients:
    """What a step needs, looked up once and not in every step."""

    def __init__(self, rank: Rank):
        self.rank, self.config, module = rank, rank.config, rank.module
        self.automatic = module.automatic_optimization
        self.optimizer: Any = rank.optimizers[0] if rank.optimizers else None
        self.step = self.plain_step = bind_step(module.training_step)
        self.ddp: Any = None
        self.trained: list[int] | None = None
        self.follow()
        self.on_before_zero_grad = rank.hooks("on_before_zero_grad")
        self.on_before_backward = rank.hooks("on_before_backward")
        self.on_after_backward = rank.hooks("on_after_backward")
        self.on_before_optimizer_step = rank.hooks("on_before_optimizer_step")
        self.zero_grad = rank.module_hook("optimizer_zero_grad")
        self.backward = module.backward if rank.overrides("backward") else None
        self.clips = rank.overrides("configure_gradient_clipping") or bool(self.config.gradient_clip_val)
        self.uses_closure = rank.overrides("optimizer_step") or isinstance(self.optimizer, torch.optim.LBFGS)
        self.losses: list[Tensor] = []  # since the last report
        self.loss_is_checked = False
        self.window = 0  # batches accumulated since the last optimizer step
        self.uneven = False  # a batch of this window is missing on some rank, so that DDP cannot average
        rank.stepping_optimizers = [SteppingOptimizer(o, self.step_optimizer) for o in rank.optimizers]
        if not self.automatic:
            rank.backward_manually = self.backward_manually

    def follow(self) -> None:
        """Looks the parameters up: as an epoch begins, callbacks may unfreeze some or give them to an optimizer."""
        rank = self.rank
        self.parameters = [p for optimizer in rank.optimizers for g in optimizer.param_groups for p in g["params"]]
        before, self.trained = self.trained, [id(p) for p in rank.module.parameters() if p.requires_grad]
        if rank.world_size > 1 and self.trained != before:
            self.step, self.ddp = self.plain_step, None  # DDP's hooks on the parameters go with it
            self._join_ddp(is_first=before is None)

    def take(self, batch: TrainBatch, data: Any, complete: bool) -> Any:
        """training_step on one batch and, where it completes an accumulation window, the optimizer step."""
        scale = batch.share / self.rank.accumulate_grad_batches
        self.uneven |= batch.uneven
        if not self.automatic:
            return self.forward(data, batch.index)
        if not complete:
            with self.ddp.no_sync() if self.ddp is not None else NO_CONTEXT:
                outputs = self.compute(batch, data, scale)
            self.window += 1
            return outputs
        if self.uses_closure:
            outputs = self._step_by_closure(batch, data, scale)
        else:
            outputs = self.compute(batch, data, scale)
            self.finish()
            self.step_optimizer(self.optimizer)
        self.window, self.uneven = 0, False
        return outputs

    def forward(self, data: Any, index: int) -> Any:
        # DDP's forward may enter a collective, which a rank without a sample would not join
        step = self.plain_step if self.uneven else self.step
        if self.rank.precision_plugin.is_plain:
            return step(data, index, 0)
        with self.rank.precision_plugin.forward_context():
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
        if self.rank.precision_plugin.scaler is not None:
            scaled = self.rank.precision_plugin.scale(scaled)
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
            average_gradients(self.parameters, self.rank.world_size)
        if not self.clips and not self.on_before_optimizer_step:
            return
        self.rank.precision_plugin.unscale(self.optimizer)
        for hook in self.on_before_optimizer_step:
            hook(self.optimizer)
        if self.clips:
            self.rank.module.configure_gradient_clipping(
                self.optimizer, self.config.gradient_clip_val, self.config.gradient_clip_algorithm
            )

    def step_optimizer(self, optimizer: Any, closure: Callable[[], Any] | None = None) -> Any:
        """The one place where parameters change."""
        rank = self.rank
        if not self.automatic and self.on_before_optimizer_step:
            rank.precision_plugin.unscale(optimizer)
            for hook in self.on_before_optimizer_step:
                hook(optimizer)
        if rank.snapshots is not None and not rank.snapshots.wait() and rank.world_size == 1:
            # User code wrote into what was being copied: again, after this step. With several ranks, which must save
            # at the same step, the driver asks them.
            rank.checkpoint_requested = True
        if rank.precision_plugin.scaler is None:
            result = optimizer.step(closure) if closure is not None else optimizer.step()
        else:
            result = rank.precision_plugin.step(optimizer, closure)
            rank.precision_plugin.update()
        rank.global_step += 1
        return result

    def backward_manually(self, loss: Tensor, *arguments: Any, **keywords: Any) -> None:
        for hook in self.on_before_backward:
            hook(loss)
        self.losses.append(loss.detach())
        self.rank.module.backward(self.rank.precision_plugin.scale(loss), *arguments, **keywords)
        # gradients that were averaged before are equal on all ranks, and their mean leaves them as they are
        average_gradients(self.rank.module.parameters(), self.rank.world_size)
        for hook in self.on_after_backward:
            hook()

    def _step_by_closure(self, batch: TrainBatch, data: Any, scale: float) -> Any:
        """For optimizers that evaluate the loss themselves, and for modules that override optimizer_step."""
        rank, last = self.rank, [None]

        def closure() -> Any:
            last[0] = outputs = self.compute(batch, data, scale)
            self.finish()
            return outputs["loss"] if isinstance(outputs, dict) else outputs

        final: Callable[[], Any] = closure
        if rank.precision_plugin.scaler is not None:  # a scaler must see the gradients before the step
            loss = closure()
            final = lambda: loss  # noqa: E731
        rank.module.optimizer_step(rank.current_epoch, batch.index, rank.stepping_optimizers[0], final)
        return last[0]

    def _zero(self, index: int) -> None:
        """At the start of a window."""
        if self.window:
            return
        for hook in self.on_before_zero_grad:
            hook(self.optimizer)
        if self.zero_grad:
            self.zero_grad[0](self.rank.current_epoch, index, self.optimizer)
            return
        for parameter in self.parameters:  # what optimizer.zero_grad() does, without its bookkeeping
            parameter.grad = None

    def _check(self, loss: Any) -> None:
        if loss is not None:
            check_loss(loss)
            self.loss_is_checked = True
        elif self.rank.world_size > 1:
            raise DataError("training_step returned None: with several workers every rank must return a loss")

    def _join_ddp(self, is_first: bool) -> None:
        """Equal weights on all ranks, and DDP around training_step where torch drives the optimizer."""
        rank, options = self.rank, self.config.strategy
        module = rank.module
        if not self.automatic or not any(p.requires_grad for p in module.parameters()):
            if is_first:
                broadcast_tensors([*module.parameters(), *module.buffers()], rank.world_size)
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
                device_ids=[rank.device] if rank.device.type == "cuda" else None,
                find_unused_parameters=options.find_unused_parameters,
                static_graph=options.static_graph,
                gradient_as_bucket_view=options.gradient_as_bucket_view,
                init_sync=is_first,  # later they are equal already, and a snapshot may be copying them
                **given,
            )
