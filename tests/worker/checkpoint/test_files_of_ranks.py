"""Files in Lightning's format that several ranks write and go on from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from raylight.contract.messages import Failure, Finished
from raylight.contract.task import Place
from raylight.user.callback import Callback
from raylight.user.module import Module
from raylight.user.trainer_names import TrainerNames
from tests.worker.ranks import make_task, run_ranks, run_task

INPUTS = torch.arange(32.0).reshape(16, 2) / 10


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1))
        self.seen: list[tuple[int, int, list[float]]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch_idx, batch[0][:, 0].tolist()))
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Saving(Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: TrainerNames, module: Module, outputs: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)


def train(place: Place, path: str, file: str | None) -> tuple[dict[str, Any], list[Any], int]:
    net = Net()
    loader = DataLoader(TensorDataset(INPUTS), batch_size=2, shuffle=True)
    callbacks = [] if file else [Saving(path)]
    task = make_task(net, loader, callbacks=callbacks, task={"file": file}, max_epochs=2, num_workers=place.world_size)
    messages = run_task(replace(task, trainer=TrainerNames(task.config, callbacks)), place)
    assert not [message for message in messages if isinstance(message, Failure)], messages
    finished = next(message for message in messages if isinstance(message, Finished))
    return {name: tensor.tolist() for name, tensor in net.state_dict().items()}, net.seen, finished.step


def samples_of_the_first_epoch(seen: list[tuple[int, int, list[float]]]) -> list[float]:
    return sorted(value for epoch, _, values in seen if epoch == 0 for value in values)


def test_two_ranks_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    path = str(tmp_path / "middle.ckpt")
    whole = run_ranks(train, path, None)
    content = torch.load(path)
    assert content["global_step"] == 3
    assert len(content["raylight"]["own"]) == 2  # random numbers of both
    again = run_ranks(train, path, path)
    for (weights, seen, steps), (expected, all_seen, all_steps) in zip(again, whole, strict=True):
        assert steps == all_steps == 8
        assert seen == all_seen[3:]
        assert weights == expected


def test_one_rank_goes_on_with_the_samples_that_two_have_left(tmp_path: Path) -> None:
    path = str(tmp_path / "middle.ckpt")
    whole = run_ranks(train, path, None)
    _, seen, _ = train(Place(), path, path)
    left = sorted(
        value for _, all_seen, _ in whole for epoch, _, values in all_seen[3:] if not epoch for value in values
    )
    assert sorted(value for epoch, _, values in seen if not epoch for value in values) == left
