"""A worker is lost between two optimizer steps of a batch, or within one: each step is made once, on all ranks."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl
from tests.faults import FailAt

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


class TwoOptimizers(pl.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 2), nn.Linear(2, 1)
        self.automatic_optimization = False

    def training_step(self, batch):
        for optimizer, sign in zip(self.optimizers(), (1.0, -1.0), strict=True):
            optimizer.zero_grad()
            self.manual_backward((sign * self.second(self.first(batch[0]).tanh()) - 1).pow(2).mean())
            optimizer.step()
            self.lr_schedulers().step()

    def configure_optimizers(self):
        one = torch.optim.Adam(self.first.parameters(), lr=0.1)
        two = torch.optim.SGD(self.second.parameters(), lr=0.1)
        return [one, two], [torch.optim.lr_scheduler.StepLR(one, 1, gamma=0.9)]


class LineSearch(pl.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch):
        return (self.layer(batch[0]) - 1).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4)


class FailInEvaluation(FailAt):
    """In the third evaluation of the loss in a step."""

    def __init__(self, rank, step, folder):
        super().__init__(rank, step, "forward", "kill", folder)
        self.evaluations = 0

    def on_before_backward(self, trainer, module, loss):
        self.evaluations += trainer.global_step >= self.step
        if self.evaluations == 3:
            self._reach("forward", trainer)


def fit(kind, folder, faults=(), **arguments):
    folder.mkdir()
    module = kind()
    data = TensorDataset(torch.randn(12, 4, generator=torch.Generator().manual_seed(1)))
    result = pl.fit(
        module, DataLoader(data, batch_size=1), num_workers=2, use_gpu=False, max_epochs=2, seed=1, max_restarts=3,
        storage_path=str(folder), enable_progress_bar=False, enable_model_summary=False, callbacks=list(faults),
        **arguments,
    )  # fmt: skip
    return module, result


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (TwoOptimizers, lambda folder: FailAt(0, 5, "forward", "kill", folder)),
        (TwoOptimizers, lambda folder: FailAt(1, 5, "forward", "exception", folder)),
        (TwoOptimizers, lambda folder: FailAt(1, 4, "forward", "kill", folder)),
        (LineSearch, lambda folder: FailInEvaluation(1, 3, folder)),
    ],
)
def test_a_batch_that_broke_in_its_middle_counts_once(kind, fault, tmp_path):
    one, expected = fit(kind, tmp_path / "whole")
    two, result = fit(kind, tmp_path / "broken", [fault(tmp_path)])
    assert result.num_restarts == 1
    assert result.num_steps == expected.num_steps
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor, rtol=0, atol=0, msg=f"{name} differs")


def test_a_hang_in_the_first_batch_after_a_hang_is_found_as_soon_as_the_first(tmp_path):
    began = time.monotonic()
    with pytest.raises(pl.WorkerHung, match="hung twice"):
        fit(LineSearch, tmp_path / "hung", [FailAt(1, 3, "forward", "hang", tmp_path, times=2)], hang_timeout_s=5.0)
    assert time.monotonic() - began < 40.0  # ten times the timeout, which the first batch of a run may take, is more
