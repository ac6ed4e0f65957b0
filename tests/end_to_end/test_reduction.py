"""Two workers train what one process trains, or say before a wrong step why they cannot."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
NUM_SAMPLES = 16


class Net(pl.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.other = nn.Linear(4, 3), nn.Linear(3, 3)

    def uses_other(self, batch_idx: int) -> bool:
        return False

    def training_step(self, batch, batch_idx):
        hidden = self.layer(batch[0]).tanh()
        if self.uses_other(batch_idx):
            hidden = self.other(hidden)
        return (hidden.sum(1) - 1).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class InTheMiddle(Net):
    def uses_other(self, batch_idx):
        return batch_idx == 1


class NotAtTheEnd(Net):
    def uses_other(self, batch_idx):
        return batch_idx < 3


class OnOneRank(Net):
    def uses_other(self, batch_idx):
        return self.global_rank == 1


class Frozen(Net):
    def uses_other(self, batch_idx):
        return True

    def on_train_batch_start(self, batch, batch_idx):
        self.other.requires_grad_(batch_idx < 2)


class Unfrozen(Net):
    def __init__(self):
        super().__init__()
        self.other.requires_grad_(False)

    def uses_other(self, batch_idx):
        return True

    def on_train_batch_start(self, batch, batch_idx):
        self.other.requires_grad_(batch_idx >= 2)


class NewGroup(Unfrozen):
    """Gives a part to the optimizer in the middle of an epoch."""

    def __init__(self):
        super().__init__()
        self.other.requires_grad_(True)

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            self.optimizers().add_param_group({"params": list(self.other.parameters())})

    def configure_optimizers(self):
        return torch.optim.SGD(self.layer.parameters(), lr=0.05)


class Outside(Net):
    """Hides a part in a list, so that it is none of the module."""

    def __init__(self):
        super().__init__()
        self.other = None
        self.parts = [nn.Linear(3, 3)]

    def training_step(self, batch, batch_idx):
        return (self.parts[0](self.layer(batch[0]).tanh()).sum(1) - 1).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD([*self.parameters(), *self.parts[0].parameters()], lr=0.05)


class Differing(Net):
    def configure_model(self):
        if self.global_rank == 1:
            self.third = nn.Linear(3, 3)


class Manual(InTheMiddle):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class ManualOnOneRank(Manual):
    """Leaves a part out on one rank, and on the same samples in one process."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        hidden, first = self.layer(batch[0]).tanh(), batch[1] % 4 < 2
        parts = [hidden[first], self.other(hidden[~first])] if (~first).any() else [hidden]
        self.manual_backward((torch.cat(parts).sum(1) - 1).pow(2).mean())
        optimizer.step()


class RawBackward(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        Net.training_step(self, batch, batch_idx).backward()
        optimizer.step()


class LineSearch(Net):
    def uses_other(self, batch_idx):
        return True

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=30, tolerance_change=1e-3)


class ManualLineSearch(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = Net.training_step(self, batch, batch_idx)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.layer.parameters(), max_iter=30, tolerance_change=1e-3)


class Branching(Net):
    """Steps only where the loss is large, which differs between the ranks."""

    def uses_other(self, batch_idx):
        return True

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        if optimizer_closure() > 0.7:
            optimizer.step()


def fit(kind: type[Net], path, num_workers: int, num_samples: int = NUM_SAMPLES, **arguments):
    module = kind()
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(num_samples, 4, generator=generator), torch.arange(num_samples))
    defaults = {"max_epochs": 1, "seed": 1, "enable_progress_bar": False, "enable_model_summary": False}
    loader = DataLoader(data, batch_size=4 // max(num_workers, 1))
    result = pl.fit(
        module, loader, num_workers=num_workers, use_gpu=False, storage_path=str(path), **{**defaults, **arguments}
    )
    return module, result


UNUSED = r"other\.weight, other\.bias got no gradient on rank \d.*find_unused_parameters=True"


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Net, {}, UNUSED),
        (InTheMiddle, {}, UNUSED),
        (NotAtTheEnd, {}, UNUSED),
        (OnOneRank, {}, UNUSED),
        (InTheMiddle, {"strategy": pl.DDP(static_graph=True)}, r"static_graph=True\) says that each step"),
        (Differing, {}, "the ranks have different parameters"),
        (Frozen, {}, r"other\.weight, other\.bias were frozen in the middle of an epoch"),
        (RawBackward, {}, r"Call self\.manual_backward\(loss\)"),
    ],
)
def test_a_gradient_that_would_stay_on_its_rank_ends_the_run_at_once(kind, arguments, message, tmp_path):
    with pytest.raises(pl.InvalidArguments, match=message):
        fit(kind, tmp_path, 2, **arguments)
    record = json.loads((tmp_path / "default" / "version_0" / "run.json").read_text())
    assert record["status"] == "failed"
    assert "restarts" not in record or [it["reason"] for it in record["restarts"]] == ["a last checkpoint"]
    last = pl.open_run(str(tmp_path)).last
    if kind is NotAtTheEnd:
        assert last.step == 3


ANY = pl.DDP(find_unused_parameters=True)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (Net, {"strategy": ANY}),
        (NotAtTheEnd, {"strategy": ANY}),
        (InTheMiddle, {"strategy": ANY, "accumulate_grad_batches": 2}),
        (Unfrozen, {}),
        (NewGroup, {}),
        (Outside, {}),
        (Manual, {}),
        (Manual, {"num_samples": 15}),  # one rank has a sample more than the other in the last step
        (Manual, {"num_samples": 13}),  # one has none
        (ManualOnOneRank, {}),
        (LineSearch, {"precision": "64-true"}),
        (ManualLineSearch, {"precision": "64-true"}),
        (Branching, {}),
    ],
)
def test_two_workers_train_what_one_process_trains(kind, arguments, tmp_path):
    (one, expected), (two, result) = (fit(kind, tmp_path / str(n), n, **arguments) for n in (0, 2))
    assert result.num_steps == expected.num_steps
    assert result.num_restarts == 0
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor.float(), rtol=2e-4, atol=1e-5, msg=f"{name} differs")
