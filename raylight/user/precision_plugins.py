"""Lightning's plugins for number formats and batch norm: objects for `Trainer(plugins=)`, and what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from raylight.contract.errors import InvalidArguments

if TYPE_CHECKING:
    from raylight.contract.kinds import Value


class Precision:
    """32 bits. `precision` is the trainer's argument of that name; the run computes by it, and calls nothing here."""

    precision: str = "32-true"
    scaler: torch.amp.GradScaler | None = None
    """The one that the run scales losses by; None without 16-bit gradients, and outside of a run."""

    def __init_subclass__(cls, **kwargs: Value):
        super().__init_subclass__(**kwargs)
        if cls.__module__ != __name__:
            raise InvalidArguments(
                f"{cls.__name__}: the run calls no method of Lightning's precision plugins; subclass "
                "raylight.worker.step.precision.Precision, and pass an object of it in plugins=[...]"
            )


class MixedPrecision(Precision):
    """Forward under autocast: "16-mixed" or "bf16-mixed"."""

    def __init__(self, precision: str, device: str = "cuda", scaler: torch.amp.GradScaler | None = None):
        if precision not in ("16-mixed", "bf16-mixed"):
            raise InvalidArguments(f"MixedPrecision: precision={precision!r} must be '16-mixed' or 'bf16-mixed'")
        if scaler is not None and precision == "bf16-mixed":
            raise InvalidArguments("MixedPrecision: bf16 needs no scaler; leave it out")
        self.precision, self.device, self.scaler = precision, device, scaler


class HalfPrecision(Precision):
    """Parameters and batches in 16 bits: "16-true" or "bf16-true"."""

    def __init__(self, precision: str = "16-true"):
        if precision not in ("16-true", "bf16-true"):
            raise InvalidArguments(f"HalfPrecision: precision={precision!r} must be '16-true' or 'bf16-true'")
        self.precision = precision


class DoublePrecision(Precision):
    """Parameters and batches in 64 bits."""

    precision = "64-true"


class LayerSync:
    """Layers that compute over the batches of all workers."""

    def apply(self, model: nn.Module) -> nn.Module:
        """The module with such layers."""
        raise NotImplementedError

    def revert(self, model: nn.Module) -> nn.Module:
        """The module with the layers that it had before."""
        raise NotImplementedError


class TorchSyncBatchNorm(LayerSync):
    """torch's SyncBatchNorm: what `sync_batchnorm=True` says."""

    def apply(self, model: nn.Module) -> nn.Module:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def plugin_of(precision: str, scaler: torch.amp.GradScaler | None) -> Precision:
    """The plugin that Lightning would have for a precision."""
    if precision.endswith("-mixed"):
        found: Precision = MixedPrecision(precision)
    else:
        found = (
            {"32-true": Precision, "64-true": DoublePrecision}[precision]()
            if precision[:2] in ("32", "64")
            else (HalfPrecision(precision))
        )
    found.scaler = scaler
    return found
