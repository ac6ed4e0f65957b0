"""One call of a module's step on one batch, as it is to be measured: in a precision, compiled or not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Batch, Output
from raylight.user.module import Module
from raylight.user.transfer import move_to_device, take_samples
from raylight.worker.hooks import bind_step
from raylight.worker.step.optimizers import make_optimizers
from raylight.worker.step.precision import make_precision

STEPS = {"predict": "predict_step", "validate": "validation_step", "test": "test_step", "train": "training_step"}

Compile = bool | Mapping[str, Any]
Step = Callable[[Batch, int, int], Output]


@dataclass(frozen=True, slots=True)
class Case:
    """What is varied."""

    batch_size: int
    """Samples a call."""
    precision: str
    compile: Compile = False
    """Whether `torch.compile` is used, or its options."""


@dataclass(slots=True)
class Prepared:
    """A module of its own, on the device, and its call."""

    call: Callable[[], object]
    flops: int


def prepare(module: Module, batch: Batch, case: Case, stage: str, device: torch.device) -> Prepared:
    """The call of `stage`'s step on `case.batch_size` samples; the module given is not touched."""
    precision = make_precision(case.precision, device.type)
    own = copy.deepcopy(module)
    precision.convert_module(own).to(device).train(stage == "train")
    data = precision.convert_batch(move_to_device(take_samples(batch, case.batch_size), device))
    step = bind_step(getattr(own, STEPS[stage]))
    compiled = _compile(step, case.compile)

    def forward(step: Step) -> Output:
        with precision.forward_context():
            return step(data, 0, 0)

    def infer(step: Step) -> None:
        with torch.inference_mode():
            forward(step)

    if stage != "train":
        return Prepared(lambda: infer(compiled), _count_operations(lambda: infer(step)))
    optimizers, _ = make_optimizers(own.configure_optimizers())
    if not own.automatic_optimization or len(optimizers) != 1:
        raise InvalidArguments(
            "stage='train' measures training_step, backward and the step of one optimizer under automatic "
            f"optimization; this module has {len(optimizers)}, automatic_optimization={own.automatic_optimization}: "
            "measure its run with profiler='simple'"
        )
    optimizer = optimizers[0]

    def train(step: Step) -> None:
        outputs = forward(step)
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):
            raise InvalidArguments(f"training_step returned {type(loss).__name__}, and a loss is needed")
        optimizer.zero_grad()
        torch.autograd.backward(precision.scale(loss))
        precision.unscale(optimizer)
        precision.step(optimizer)
        precision.update()

    return Prepared(lambda: train(compiled), _count_operations(lambda: train(step)))


def _compile(step: Step, wanted: Compile) -> Step:
    if not wanted:
        return step
    compiled: Step = torch.compile(step, **(wanted if isinstance(wanted, Mapping) else {}))
    return compiled


def _count_operations(call: Callable[[], object]) -> int:
    """Floating point operations of matrix products, convolutions and attention, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())
