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
from tests.scripts import scripts_in

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


SCRIPT = """
import logging, sys, warnings
from dataclasses import dataclass
import numpy as np, torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
import raylight as pl
from raylight.contract.process_settings import read_settings

class Ours(UserWarning): ...

@dataclass
class Batch:
    x: torch.Tensor

class Numbers(Dataset):
    def __len__(self): return 4
    def __getitem__(self, index): return torch.full((4,), index / 10, dtype=torch.float64)

def collate(items): return Batch(torch.stack(items))

class Net(pl.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
    def training_step(self, batch):
        self.seen = read_settings()
        self.new = torch.ones(1)
        logging.getLogger("net").info("a step")
        return self.layer(batch.x).square().mean()
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.1)

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="<%(name)s> %(message)s")
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.multiprocessing.set_sharing_strategy("file_system")
    torch.serialization.add_safe_globals([Ours])
    np.seterr(divide="raise")
    warnings.filterwarnings("error", category=Ours)
    given, weights = read_settings(), []
    for num_workers in (0, 2):
        net = Net()
        loader = DataLoader(Numbers(), batch_size=2 - num_workers // 2, num_workers=1, collate_fn=collate,
                            multiprocessing_context="spawn")
        pl.fit(net, loader, num_workers=num_workers, max_steps=2, use_gpu=False, logger=False, checkpoint=False,
               storage_path=sys.argv[1] if sys.argv[1:] else "runs", enable_progress_bar=False,
               enable_model_summary=False)
        weights.append(net.layer.weight.detach())
        filters = net.seen.pop("warning filters")  # imports may add some
        assert set(given["warning filters"]) <= set(filters), filters
        levels = net.seen.pop("log levels")  # so it is here: what Ray imports on a worker may set that of its own
        assert given["log levels"].items() <= levels.items(), levels
        print("differ:", [name for name in net.seen if net.seen[name] != given[name]], net.new.dtype)
    print("close:", torch.allclose(*weights))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_settings_and_classes_of_a_script_hold_on_the_workers(tmp_path: Path) -> None:
    with scripts_in(tmp_path) as start:
        out = start(SCRIPT).finish(errors=None)
    assert [line for line in out.splitlines() if line.startswith("differ")] == ["differ: [] torch.float64"] * 2
    assert "close: True" in out
    assert out.count("<net> a step") >= 2
