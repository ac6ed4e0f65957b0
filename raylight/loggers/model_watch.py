"""Histograms of a model's gradients and parameters, from hooks on its parameters that travel with it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from raylight.contract.kinds import Value

NUM_BINS = 64
STEP = "trainer/global_step"


def watch_model(model: Value, log: str | None, log_freq: int, kind: Value, experiment: Value) -> None:
    """`log`: "gradients", "parameters", "all" or None. They go to the trainer's logger of this `kind`, and to
    `experiment` for a model that no trainer trains."""
    for each in model if isinstance(model, list | tuple) else [model]:
        if log is not None:
            ModelWatch(each, ("gradients", "parameters") if log == "all" else (log,), log_freq, kind, experiment)


class ModelWatch:
    """Logs one row for all parameters at every `log_freq`-th backward pass."""

    def __init__(self, model: nn.Module, kinds: tuple[str, ...], log_freq: int, logger: Value, experiment: Value):
        self.model, self.kinds, self.log_freq, self.logger, self.experiment = model, kinds, log_freq, logger, experiment
        self._counts: dict[str, int] = {}
        self._row: dict[str, Value] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._counts[name] = 0
                parameter.register_hook(partial(self.take, name, parameter))

    def take(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        """The hook of one parameter."""
        self._counts[name] += 1
        if self._counts[name] % self.log_freq:
            return
        if f"{self.kinds[0]}/{name}" in self._row:  # some parameter got no gradient in the pass before
            self._flush()
        for kind in self.kinds:
            self._row[f"{kind}/{name}"] = make_histogram(gradient if kind == "gradients" else parameter)
        if len(self._row) == len(self._counts) * len(self.kinds):
            self._flush()

    def _flush(self) -> None:
        row, self._row = self._row, {}
        experiment, step = self._find_experiment()
        if experiment is not None:
            experiment.log(row if step is None else {**row, STEP: step})

    def _find_experiment(self) -> tuple[Value, int | None]:
        """That of the trainer's on rank 0, and the step; else the one that it was made with."""
        trainer = getattr(self.model, "_trainer", None)
        if trainer is None:
            return self.experiment, None
        if not trainer.is_global_zero:
            return None, None
        found: list[Value] = [each.experiment for each in trainer.loggers if isinstance(each, self.logger)]
        return found[0] if found else None, trainer.global_step

    def __getstate__(self) -> dict[str, Value]:
        return {**vars(self), "experiment": None}


def make_histogram(tensor: Tensor) -> Value:
    """W&B's histogram of the finite values."""
    import wandb

    values = tensor.detach().float()
    values = values[torch.isfinite(values)].cpu()
    low, high = (float(values.min()), float(values.max())) if values.numel() else (0.0, 0.0)
    counts, edges = torch.histogram(values, NUM_BINS, range=(low, high if high > low else low + 1.0))
    return wandb.Histogram(np_histogram=(counts.int().numpy(), edges.numpy()))
