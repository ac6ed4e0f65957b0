"""What the caller's objects are like on a worker: the same fit in this process and with two workers."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "use_gpu": False, "logger": False}


def data(num_samples: int = 8) -> TensorDataset:
    return TensorDataset(torch.arange(num_samples * 4.0).view(num_samples, 4) / 10)


class Normed(pl.Module):
    """Parts that plain pickle refuses, and a hook on a gradient that it loses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = parametrizations.weight_norm(nn.Linear(4, 4))
        self.second = parametrizations.orthogonal(nn.Linear(4, 4))
        self.third = parametrizations.spectral_norm(nn.Linear(4, 1))
        self.third.bias.register_hook(lambda gradient: gradient * 0)

    def training_step(self, batch: Any) -> Tensor:
        return self.third(self.second(self.first(batch[0]))).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(module: pl.Module, num_workers: int, path: Path, **arguments: Any) -> Any:
    loader = DataLoader(data(), batch_size=4 // max(num_workers, 1))
    defaults = {"max_epochs": 2, "checkpoint": False}
    return pl.fit(module, loader, num_workers=num_workers, storage_path=str(path), **QUIET, **{**defaults, **arguments})


@pytest.mark.usefixtures("ray_cluster")
def test_parametrizations_train_with_two_workers_as_in_one_process(tmp_path: Path) -> None:
    here, there = Normed(), Normed()
    before = {name: tensor.clone() for name, tensor in here.state_dict().items()}
    fit(here, 0, tmp_path)
    fit(there, 2, tmp_path, checkpoint=True)
    for name, tensor in here.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name], tensor, msg=name)
    assert not torch.equal(here.first.weight, before["first.parametrizations.weight.original1"])
    assert torch.equal(there.third.bias, before["third.bias"])


def test_what_cannot_be_sent_is_named_before_anything_starts(tmp_path: Path) -> None:
    module = Normed()
    module.first.guard = threading.Lock()
    with pytest.raises(pl.InvalidArguments, match=r"module\.first\.guard: cannot pickle '_thread\.lock'"):
        fit(module, 2, tmp_path)
    assert not any(tmp_path.iterdir())
    fit(module, 0, tmp_path)
    assert json.loads((tmp_path / "default" / "version_0" / "run.json").read_text())["status"] == "finished"
