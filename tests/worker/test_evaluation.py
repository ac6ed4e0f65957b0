"""What a validation inside a fit may leave behind for the training."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl

QUIET = {"num_workers": 0, "use_gpu": False, "enable_progress_bar": False, "enable_model_summary": False}


def make_loader(num_samples: int = 8) -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(float(4 * num_samples)).view(num_samples, 4) / 10), batch_size=2)


class Net(pl.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch):
        return self(batch[0]).pow(2).mean()

    def validation_step(self, batch):
        self.log("val_loss", self(batch[0]).pow(2).mean())

    def forward(self, x):
        return self.layer(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Cached(Net):
    """Makes a table when it is first called, as rotary embeddings do."""

    table = None

    def forward(self, x):
        if self.table is None:
            self.table = torch.linspace(0.5, 1.0, 1)
        return self.layer(x) * self.table


class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.Linear(3, 1))


class WithGradients(Net):
    """Asks for a gradient in its validation, as a physics-informed network or an attack does."""

    slope = 0.0

    def validation_step(self, batch):
        with torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self(x).sum(), x)
        self.slope = gradient[0, 0].item()


class Remembering(Net):
    """Keeps a tensor of its validation, and trains on it."""

    memory = None

    def validation_step(self, batch):
        self.memory = self(batch[0]).mean()

    def training_step(self, batch):
        factor = 1.0 if self.memory is None else self.memory
        return (self(batch[0]) * factor).pow(2).mean()


KINDS = [Cached, Lazy, WithGradients, Remembering]


@pytest.mark.parametrize("num_sanity_val_steps", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_validation_in_a_fit_makes_takes_part_in_training(kind, num_sanity_val_steps, tmp_path):
    module = kind()
    result = pl.fit(
        module, make_loader(), make_loader(4), max_epochs=2, storage_path=str(tmp_path),
        num_sanity_val_steps=num_sanity_val_steps, **QUIET,
    )  # fmt: skip
    assert result.num_steps == 8
    assert not any(tensor.is_inference() for tensor in module.state_dict().values())
    if kind is WithGradients:
        assert module.slope != 0.0


@pytest.mark.parametrize(("inference_mode", "expected"), [(True, [False, True]), (False, [False, False])])
def test_validation_outside_a_fit_keeps_its_inference_mode(inference_mode, expected, tmp_path):
    class Modes(Net):
        def on_fit_start(self):
            self.modes = []

        def validation_step(self, batch):
            self.modes.append(torch.is_inference_mode_enabled())

    module = Modes()
    trainer = pl.Trainer(max_epochs=1, storage_path=str(tmp_path), inference_mode=inference_mode, **QUIET)
    trainer.fit(module, make_loader(2), make_loader(2))
    trainer.validate(module, make_loader(2))
    assert [module.modes[0], module.modes[-1]] == expected
