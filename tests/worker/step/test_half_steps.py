"""A batch that breaks between its optimizer steps, or within one: no step is lost, and none is made twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl
from raylight.worker.step.half_steps import StepUndo, evaluates_often

QUIET = {"num_workers": 0, "use_gpu": False, "enable_progress_bar": False, "enable_model_summary": False}


def make_loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(24.0).view(6, 4) / 10), batch_size=1)


class Interrupted(RuntimeError):
    pass


class TwoOptimizers(pl.Module):
    """Two parts that train each other; `fails_at` is a batch, and breaks between the two steps."""

    def __init__(self, fails_at: int = -1):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 2), nn.Linear(2, 1)
        self.automatic_optimization = False
        self.fails_at = fails_at
        self.rates: list[float] = []

    def training_step(self, batch, batch_idx):
        one, two = self.optimizers()
        for optimizer, sign in ((one, 1.0), (two, -1.0)):
            if optimizer is two and batch_idx == self.fails_at:
                raise Interrupted
            optimizer.zero_grad()
            self.manual_backward((sign * self.second(self.first(batch[0]).tanh()) - 1).pow(2).mean())
            optimizer.step()
            if optimizer is one:
                self.rates.append(one.param_groups[0]["lr"])
                self.lr_schedulers().step()

    def configure_optimizers(self):
        one = torch.optim.Adam(self.first.parameters(), lr=0.1)
        two = torch.optim.SGD(self.second.parameters(), lr=0.1)
        return [one, two], [torch.optim.lr_scheduler.StepLR(one, 1, gamma=0.5)]


class LineSearch(pl.Module):
    """`fails_at` is an evaluation of the loss, in the middle of a step."""

    def __init__(self, fails_at: int = -1):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.fails_at, self.evaluations = fails_at, 0

    def training_step(self, batch):
        self.evaluations += 1
        if self.evaluations == self.fails_at:
            raise Interrupted
        return (self.layer(batch[0]) - 1).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4)


class AfterTheStep(LineSearch):
    """The override of `optimizer_step` fails when the step is made."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)
        if batch_idx == self.fails_at:
            raise Interrupted

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, path, **arguments):
    return pl.fit(module, make_loader(), max_epochs=1, storage_path=str(path), seed=1, **{**QUIET, **arguments})


@pytest.mark.parametrize(
    ("kind", "fails_at"),
    [(TwoOptimizers, 0), (TwoOptimizers, 3), (LineSearch, 2), (LineSearch, 11), (AfterTheStep, 2), (AfterTheStep, 5)],
)
def test_a_run_that_goes_on_from_a_broken_batch_equals_one_that_did_not_break(kind, fails_at, tmp_path):
    whole, broken, again = kind(), kind(fails_at), kind()
    expected = fit(whole, tmp_path / "whole")
    with pytest.raises(pl.WorkerFailed):
        fit(broken, tmp_path / "broken")
    result = fit(again, tmp_path / "broken", resume="last")
    assert result.num_steps == expected.num_steps
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    if kind is TwoOptimizers:
        assert (broken.rates + again.rates)[: fails_at + 1] == whole.rates[: fails_at + 1]
        assert again.rates == whole.rates[fails_at:]


def test_which_optimizers_change_parameters_between_evaluations():
    class Sharpness(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self, closure):
            return closure()

    weight = nn.Parameter(torch.ones(1))
    assert evaluates_often(torch.optim.LBFGS([weight]))
    assert evaluates_often(Sharpness([weight]))
    assert not evaluates_often(torch.optim.Adam([weight]))
    optimizer = torch.optim.SGD([weight])
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps `step`
    assert not evaluates_often(optimizer)


def test_an_undone_step_leaves_the_state_of_the_optimizer():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    weight.grad = torch.ones(2)
    optimizer.step()
    state = optimizer.state[weight]
    before = weight.detach().clone(), state["exp_avg"].clone(), float(state["step"])
    undo = StepUndo(optimizer)
    optimizer.step()
    undo.put_back()
    assert torch.equal(weight, before[0])
    assert torch.equal(optimizer.state[weight]["exp_avg"], before[1])
    assert float(optimizer.state[weight]["step"]) == before[2]
