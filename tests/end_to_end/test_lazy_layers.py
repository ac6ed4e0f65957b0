"""Layers without a shape train on two workers as in one process, whoever gives them their shape first."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


class LazyRamp(nn.LazyLinear):
    """Its weights differ between the ranks until they meet."""

    def reset_parameters(self):
        if self.bias is not None and not self.has_uninitialized_params():
            shift = int(os.environ.get("RANK", "0"))
            with torch.no_grad():
                self.weight.copy_(torch.linspace(-1, 1, self.weight.numel()).view_as(self.weight) + shift)
                self.bias.fill_(shift)


class Net(pl.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(LazyRamp(3), nn.LazyBatchNorm1d(affine=True), nn.Tanh(), nn.Linear(3, 1))
        self.late = LazyRamp(1)

    def configure_model(self):
        self.net[1].eval()  # its statistics are those of a rank, and are not to differ from one process'
        self.net[1].train = lambda mode=True: self.net[1]

    def loss(self, batch, batch_idx):
        hidden = self.net(batch[0])
        return ((self.late(hidden) if batch_idx >= 2 else hidden) - 1).pow(2).mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch, 0))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class AlwaysLate(Net):
    def loss(self, batch, batch_idx):
        return super().loss(batch, 2)


class Manual(AlwaysLate):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch, batch_idx))
        optimizer.step()


def fit(kind, path, num_workers, num_val_batches=0, **arguments):
    module = kind()
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(16, 4, generator=generator))
    val = DataLoader(TensorDataset(data.tensors[0][: 2 * num_val_batches]), batch_size=2) if num_val_batches else None
    result = pl.fit(
        module, DataLoader(data, batch_size=4 // max(num_workers, 1)), val, num_workers=num_workers, use_gpu=False,
        max_epochs=2, seed=1, storage_path=str(path), enable_progress_bar=False, enable_model_summary=False,
        **arguments,
    )  # fmt: skip
    return module, result


@pytest.mark.parametrize(
    ("kind", "num_val_batches", "arguments"),
    [
        (AlwaysLate, 0, {}),
        (AlwaysLate, 1, {}),  # in the sanity check rank 0 alone sees a batch
        (AlwaysLate, 4, {"accumulate_grad_batches": 2}),
        (Manual, 0, {}),
        (Net, 4, {"strategy": pl.DDP(find_unused_parameters=True)}),  # a layer gets its shape in the third step
    ],
)
def test_two_workers_train_what_one_process_trains(kind, num_val_batches, arguments, tmp_path):
    (one, _), (two, result) = (fit(kind, tmp_path / str(n), n, num_val_batches, **arguments) for n in (0, 2))
    assert result.num_restarts == 0
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor, rtol=2e-4, atol=1e-5, msg=f"{name} differs")


def test_a_layer_that_never_gets_a_shape_is_named(tmp_path):
    class Unused(AlwaysLate):
        def __init__(self):
            super().__init__()
            self.unused = nn.LazyLinear(2)

    for num_workers in (0, 2):
        with pytest.raises(pl.InvalidArguments, match=r"unused\.weight.* has no shape yet"):
            fit(Unused, tmp_path / str(num_workers), num_workers)
