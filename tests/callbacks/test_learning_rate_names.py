"""The names of learning rates are Lightning's, however many optimizers, schedulers and groups there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

import raylight as pl
from raylight.callbacks import LearningRateMonitor
from raylight.contract.errors import InvalidArguments


def two(kind: type, parameters: list[nn.Parameter], **names: str) -> Any:
    groups: list[Any] = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    for group, name in zip(groups, names.values(), strict=False):
        group["name"] = name
    return kind(groups, lr=0.1)


def step(optimizer: Any, **options: Any) -> Any:
    return {"scheduler": StepLR(optimizer, 1), **options}


def several_schedulers(p: list[nn.Parameter]) -> Any:
    first, second = Adam(p, lr=0.1), Adam(p, lr=0.2)
    return [first, second], [step(first), step(second, interval="step")]


def mixed(p: list[nn.Parameter]) -> Any:
    first, second, third = two(SGD, p), Adam(p, lr=0.1), Adam(p, lr=0.3)
    return [first, second, third], [step(second, name="mine")]


def named_groups(p: list[nn.Parameter]) -> Any:
    optimizer = two(SGD, p, first="head", second="body")
    return [optimizer], [step(optimizer)]


def named_and_groups(p: list[nn.Parameter]) -> Any:
    optimizer = two(SGD, p)
    return [optimizer], [step(optimizer, name="mine")]


def one_named_group(p: list[nn.Parameter]) -> Any:
    return SGD([{"params": p, "name": "all"}], lr=0.1)


CASES: list[Callable[[list[nn.Parameter]], Any]] = [
    lambda p: Adam(p, lr=0.1), lambda p: [Adam(p), SGD(p, lr=0.1), Adam(p)], lambda p: two(Adam, p),
    several_schedulers, mixed, named_groups, named_and_groups, one_named_group,
]  # fmt: skip


def make_net(base: type, configure: Callable[[list[nn.Parameter]], Any]) -> Any:
    class Net(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizers = self.optimizers()
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                self.manual_backward(self.layer(batch).sum())
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return configure(list(self.parameters()))

    return Net()


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_names_are_lightnings(case: int, interval: str, tmp_path: Path):
    lightning = pytest.importorskip("pytorch_lightning")
    loader, options = DataLoader(torch.ones(4, 2)), {"max_epochs": 2, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "enable_checkpointing": False, "log_every_n_steps": 1}
    theirs = lightning.callbacks.LearningRateMonitor(interval, log_momentum=True, log_weight_decay=True)
    lightning.Trainer(
        callbacks=[theirs], accelerator="cpu", default_root_dir=tmp_path / "theirs", **options,
        logger=lightning.loggers.CSVLogger(tmp_path),
    ).fit(make_net(lightning.LightningModule, CASES[case]), loader)  # fmt: skip
    ours = LearningRateMonitor(interval, log_momentum=True, log_weight_decay=True)
    pl.Trainer(callbacks=[ours], num_workers=0, storage_path=tmp_path / "ours", **options).fit(
        make_net(pl.Module, CASES[case]), loader
    )
    assert list(ours.lrs) == list(theirs.lrs)
    assert ours.last_momentum_values.keys() == theirs.last_momentum_values.keys()
    assert ours.last_weight_decay_values.keys() == theirs.last_weight_decay_values.keys()


def test_a_prefix_stands_in_the_log_alone(make_rank: Any):
    rank = make_rank(optimizers=[SGD(nn.Linear(1, 1).parameters(), lr=0.5)])
    monitor = LearningRateMonitor("epoch", log_momentum=True, log_key_prefix="train/")
    monitor.on_train_start(rank, None)  # type: ignore[arg-type]
    monitor.on_train_epoch_start(rank, None)  # type: ignore[arg-type]
    assert rank.logged == [(0, {"train/lr-SGD": 0.5, "train/lr-SGD-momentum": 0.0})]
    assert set(rank.callback_metrics) == {"train/lr-SGD", "train/lr-SGD-momentum"}
    assert monitor.lrs == {"lr-SGD": [0.5]}
    with pytest.raises(InvalidArguments, match="log_key_prefix=3 must be a string"):
        LearningRateMonitor(log_key_prefix=3)  # type: ignore[arg-type]
