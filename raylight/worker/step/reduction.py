"""How the gradients of one rank become those of all, and what would keep them apart: found before a rank steps."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raylight.contract.errors import DataError, InvalidArguments
from raylight.contract.kinds import Hook, Output
from raylight.worker.group.collectives import average_gradients, broadcast_tensors
from raylight.worker.step.dynamo import default_compiler_settings
from raylight.worker.step.lazy_layers import find_unshaped, shaped, waits_for_shapes
from raylight.worker.worker import Worker

MOST_NAMES = 8
FIND_UNUSED = "strategy=pl.DDP(find_unused_parameters=True)"


class StepModule(nn.Module):
    """Lets DDP, which wraps `forward`, wrap `training_step`."""

    def __init__(self, module: nn.Module, step: Hook):
        super().__init__()
        self.module = module
        self.step = step

    def forward(self, *arguments: Any) -> Output:
        return self.step(*arguments)


class Reduction:
    """Of automatic optimization DDP reduces the gradients, while backward runs; after it, what DDP does not know is
    averaged. In manual optimization, and while layers have no shape yet, all of them are.

    `step` is training_step, within DDP where there is one.
    """

    def __init__(self, worker: Worker, step: Hook):
        self.worker = worker
        self.step: Hook = step
        self.plain_step = step
        self.ddp: DistributedDataParallel | None = None
        self.names: list[str] = []
        """Of the parameters that DDP reduces, in its order."""
        self.waits_for_shapes = False
        self.check_complete: Callable[[], None] | None = None
        """Raises where backward has left a gradient unreduced. It looks at a flag of DDP's, and at no device."""
        self._trained: list[int] | None = None
        self._frozen: list[nn.Parameter] = []
        self._outside: list[nn.Parameter] = []

    def follow(self, parameters: list[nn.Parameter]) -> None:
        """Takes up what requires a gradient now; `parameters` are those of the optimizers."""
        named = list(self.worker.module.named_parameters())
        inside = {id(parameter) for _, parameter in named}
        before, outside = self._outside, [p for p in parameters if id(p) not in inside]
        self._outside, self._frozen = outside, [p for _, p in named if not p.requires_grad]
        if len(outside) > len(before):
            self.worker.outbox.notice(
                f"{len(outside)} of {len(parameters)} tensors that the optimizers hold are no parameters of the module:"
                " they are trained, and no checkpoint has them. Make what they belong to an attribute of the module",
                "warning",
            )  # fmt: skip
        if self.worker.world_size == 1:
            return
        broadcast_tensors(outside[len(before) :], self.worker.world_size)
        trained, self._trained = self._trained, [id(p) for _, p in named if p.requires_grad]
        if self._trained != trained or self.waits_for_shapes:
            self.names = [name for name, parameter in named if parameter.requires_grad]
            self.leave_ddp()
            self._join_ddp(is_first=trained is None)

    def leave_ddp(self) -> None:
        """Lets DDP go at once: while it exists, backward reduces through it, in a group that may have broken."""
        self.step, self.ddp, self.check_complete = self.plain_step, None, None

    def is_outdated(self) -> bool:
        """Whether there is something to follow; asked before each step of several ranks."""
        return self.waits_for_shapes or any(parameter.requires_grad for parameter in self._frozen)

    def finish(self) -> None:
        """After the backward that completes a step. Raises where DDP has left something out."""
        if self.check_complete is not None:
            self.check_complete()
        if self._outside:
            average_gradients(self._outside, self.worker.world_size)

    def average_all(self) -> None:
        """Gradients that were averaged before are equal on all ranks, and their mean leaves them as they are."""
        average_gradients([*self.worker.module.parameters(), *self._outside], self.worker.world_size)

    def _join_ddp(self, is_first: bool) -> None:
        """Equal weights on all ranks, and DDP around training_step where torch drives the optimizer."""
        worker, options = self.worker, self.worker.config.strategy
        module = worker.module
        self.waits_for_shapes = waits_for_shapes(module, worker.world_size)
        is_automatic = module.automatic_optimization
        if self.waits_for_shapes or not is_automatic or not self.names:
            if is_first:
                broadcast_tensors(shaped([*module.parameters(), *module.buffers()]), worker.world_size)
            self.waits_for_shapes &= is_automatic
            return
        # What differs from torch's defaults, some of which torch has begun to rename.
        given: dict[str, Any] = {}
        if worker.config.deterministic:
            # DDP lays its buckets out anew after its first step, and with three ranks or more the place of a value in
            # a bucket decides in which order it is summed. A bucket for each parameter cannot be laid out otherwise.
            given["bucket_cap_mb"] = 1e-6
        elif options.bucket_cap_mb is not None:
            given["bucket_cap_mb"] = options.bucket_cap_mb
        if not options.broadcast_buffers:
            given["broadcast_buffers"] = False
        with default_compiler_settings():
            self.step = self.ddp = DistributedDataParallel(
                StepModule(module, self.plain_step),
                device_ids=[worker.device] if worker.device.type == "cuda" else None,
                find_unused_parameters=options.find_unused_parameters,
                static_graph=options.static_graph,
                gradient_as_bucket_view=options.gradient_as_bucket_view,
                init_sync=is_first,  # later they are equal already, and a snapshot may be copying them
                **given,
            )
        self.check_complete = self.ddp.reducer._check_reducer_finalized

    def check_has_sample(self, uneven: bool) -> None:
        if self.waits_for_shapes and uneven:
            raise DataError(
                f"{_listed(find_unshaped(self.worker.module))} get their shapes from the first batch, and in this one "
                "a rank has no sample; use a smaller batch_size or fewer workers, or give the layers their sizes"
            )


def mean_loss(loss: Output, share: float, worker: Worker) -> Output:
    """What a closure returns to an optimizer: the same on all ranks, so that all branch alike. `loss` is None on a rank
    without a sample; where it is None on all ranks, so is what is returned."""
    if worker.world_size == 1:
        return loss
    value = torch.zeros(2, dtype=torch.float64, device=worker.device)
    if loss is not None:
        value[0] = torch.as_tensor(loss).detach().sum() * share
        value[1] = 1.0
    torch.distributed.all_reduce(value)
    if loss is None and not value[1]:
        return None
    return value[0] / worker.world_size


def explain(error: Exception, worker: Worker, reduction: Reduction | None) -> Exception:
    """What torch says of a reduction that cannot be made, as an error that names the parameters and is not tried
    again; any other error as it is."""
    text = str(error)
    if not isinstance(error, RuntimeError) or worker.world_size == 1:
        return error
    if reduction is not None and "Expected to have finished reduction" in text:
        found = _describe_unreduced(text, worker, reduction)
    elif "mark a variable ready only once" in text:
        found = (
            f"a parameter takes part in backward twice ({_first_sentence(text, 'Parameter at index')}): give "
            "torch.utils.checkpoint use_reentrant=False, and do not use DDP within the module"
        )
    elif "training graph has changed in this iteration" in text:
        found = (
            "strategy=pl.DDP(static_graph=True) says that each step trains the same parameters, and this one trains "
            f"others than the first: leave static_graph out, and if some have no gradient, use {FIND_UNUSED}"
        )
    elif "DDP expects same model across all ranks" in text or "appears not to match" in text:
        found = (
            f"the ranks have different parameters ({text.splitlines()[0].rstrip('.')}): __init__, setup and "
            "configure_model must make the same module on each"
        )
    else:
        return error
    explained = InvalidArguments(found).with_traceback(error.__traceback__)
    explained.__cause__ = error
    return explained


def _describe_unreduced(text: str, worker: Worker, reduction: Reduction) -> str:
    listed = re.search(rf"did not receive grad for rank {worker.rank}: ([\d ]+)", text)
    indices = [int(index) for index in listed[1].split()] if listed else []
    names = [reduction.names[index] for index in indices if index < len(reduction.names)]
    parameters = dict(worker.module.named_parameters())
    names = names or [name for name in reduction.names if parameters[name].grad is None]
    frozen = [name for name in names if not parameters[name].requires_grad]
    if frozen:
        return (
            f"{_listed(frozen)} were frozen in the middle of an epoch, and with several workers the gradients of the "
            "others wait for theirs: freeze them in on_train_epoch_start, or before training"
        )
    if worker.config.strategy.find_unused_parameters:
        return (
            f"{_listed(names)} got no gradient on rank {worker.rank}, though training_step returned a tensor that "
            "depends on them: detach what it returns beside the loss"
        )
    return (
        f"{_listed(names)} got no gradient on rank {worker.rank}: the loss does not depend on them, and with "
        f"several workers the ranks would step apart. Remove or freeze them, or, if they are meant to be left out of "
        f"some steps, pass {FIND_UNUSED}"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _first_sentence(text: str, start: str) -> str:
    found = re.search(rf"{start}[^.\n]*", text)
    return found[0] if found else text.splitlines()[0][:120]
