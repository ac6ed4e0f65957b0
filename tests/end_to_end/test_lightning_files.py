"""Checkpoints in Lightning's format, in both directions: written here and resumed by the installed Lightning, and the
other way round. Weights are compared after the same further steps."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from pytorch_lightning.callbacks import EarlyStopping as TheirStopping
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import raylight
from raylight.callbacks import EarlyStopping

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

NUM_BATCHES, MAX_EPOCHS = 10, 4
_rng = torch.Generator().manual_seed(5)
INPUTS, TARGETS = torch.randn(2 * NUM_BATCHES, 4, generator=_rng), torch.randn(2 * NUM_BATCHES, 1, generator=_rng)


def make_loader() -> DataLoader:
    return DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=2)


def make_net(base: Any, kind: str) -> Any:
    """The same module over Lightning's class and over raylight's."""

    class Net(base):
        def __init__(self, lr: float = 0.05, width: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
            self.automatic_optimization = kind != "several"
            self.seen: list[tuple[int, int, int]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            self.seen.append((self.current_epoch, batch_idx, self.global_step))
            loss = (self.net(batch[0]) - batch[1]).square().mean()
            self.log("train_loss", loss)
            if self.automatic_optimization:
                return loss
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
            self.lr_schedulers().step()
            return None

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", (self.net(batch[0]) - batch[1]).square().mean())

        def configure_optimizers(self) -> Any:
            lr = self.hparams["lr"]
            if kind == "several":
                one = torch.optim.Adam(self.net[0].parameters(), lr)
                two = torch.optim.SGD(self.net[2].parameters(), lr, momentum=0.9)
                return [one, two], [torch.optim.lr_scheduler.ExponentialLR(one, 0.95)]
            optimizer = torch.optim.Adam(self.parameters(), lr)
            if kind == "plateau":
                scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
                return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss"}
            by_step = {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99), "interval": "step"}
            return [optimizer], [by_step, torch.optim.lr_scheduler.StepLR(optimizer, 2)]

    Net.__qualname__ = "Net"
    torch.manual_seed(1)
    return Net()


class Saves:
    """Saves at every place that hooks can."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx in (5, NUM_BATCHES - 1):
            trainer.save_checkpoint(self.folder / f"batch-{batch_idx}.ckpt")

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking and trainer.current_epoch == 1:
            trainer.save_checkpoint(self.folder / "validated.ckpt")

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.folder / "epoch.ckpt")


PLACES = ("batch-5", "batch-9", "validated", "epoch", "end")


def run(
    package: Any, kind: str, folder: Path, *, max_epochs: int, ckpt_path: Path | None = None, saves: bool = False,
    accumulate: int = 1, **more: Any,
) -> tuple[Any, Any]:  # fmt: skip
    is_ours = package is raylight
    callbacks: list[Any] = [(EarlyStopping if is_ours else TheirStopping)("val_loss", patience=50, strict=False)]
    if saves:
        callbacks.append(type("Saving", (Saves, package.Callback), {})(folder))
    own: dict[str, Any] = {"num_workers": 0, "use_gpu": False, "storage_path": folder} if is_ours else {
        "accelerator": "cpu", "default_root_dir": folder, "enable_checkpointing": False
    }  # fmt: skip
    trainer = package.Trainer(
        max_epochs=max_epochs, callbacks=callbacks, logger=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=accumulate, **own, **more,
    )  # fmt: skip
    module = make_net(package.LightningModule, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, make_loader(), make_loader(), ckpt_path=ckpt_path)
    if saves:
        trainer.save_checkpoint(folder / "end.ckpt")
    return trainer, module


def assert_same_state(one: Any, other: Any, place: str) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), (place, name)


KINDS = ("scheduled", "plateau", "several")


def assert_same_run(one: tuple[Any, Any], other: tuple[Any, Any], place: str, judges: bool = True) -> None:
    (one_trainer, one_net), (other_trainer, other_net) = one, other
    assert one_net.seen == other_net.seen[-len(one_net.seen) :], place
    assert_same_state(one_net, other_net, place)
    for mine, yours in zip(one_trainer.optimizers, other_trainer.optimizers, strict=True):
        assert mine.param_groups[0]["lr"] == yours.param_groups[0]["lr"], place
    assert one_trainer.global_step == other_trainer.global_step
    assert one_trainer.current_epoch == other_trainer.current_epoch
    if not judges:
        return
    stopping = [trainer.early_stopping_callback.state_dict() for trainer in (one_trainer, other_trainer)]
    scores = [state.pop("best_score") for state in stopping]
    assert stopping[0] == stopping[1], place
    torch.testing.assert_close(*scores, rtol=1e-6, atol=0)  # raylight sums in double precision


@pytest.mark.parametrize("kind", KINDS)
def test_lightning_goes_on_from_a_file_as_from_its_own(tmp_path: Path, kind: str) -> None:
    accumulate = 1 if kind == "several" else 2
    for package in (raylight, pytorch_lightning):
        run(package, kind, tmp_path / package.__name__, max_epochs=2, saves=True, accumulate=accumulate)
    for place in PLACES:
        ours, theirs = (
            run(
                pytorch_lightning, kind, tmp_path / "further", max_epochs=MAX_EPOCHS, accumulate=accumulate,
                ckpt_path=tmp_path / writer / f"{place}.ckpt",
            )
            for writer in ("raylight", "pytorch_lightning")
        )  # fmt: skip
        assert len(ours[1].seen) == len(theirs[1].seen), place
        assert_same_run(ours, theirs, place)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_lightnings_file_as_lightning_does(tmp_path: Path, kind: str) -> None:
    accumulate = 1 if kind == "several" else 2
    run(pytorch_lightning, kind, tmp_path, max_epochs=2, saves=True, accumulate=accumulate)
    for place in PLACES:
        if place == "batch-5" or (kind == "plateau" and place == "batch-9"):
            continue  # there Lightning begins the loader from the start, and leaves a turn of the scheduler out
        ours, theirs = (
            run(package, kind, tmp_path / "further", max_epochs=MAX_EPOCHS, accumulate=accumulate,
                ckpt_path=tmp_path / f"{place}.ckpt")
            for package in (raylight, pytorch_lightning)
        )  # fmt: skip
        assert len(ours[1].seen) == len(theirs[1].seen), place
        assert_same_run(ours, theirs, place)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("writer", [raylight, pytorch_lightning], ids=["ours", "theirs"])
def test_the_middle_of_an_epoch_is_gone_on_from_as_if_nothing_had_happened(
    tmp_path: Path, writer: Any, kind: str
) -> None:
    accumulate = 1 if kind == "several" else 2
    whole = run(writer, kind, tmp_path, max_epochs=MAX_EPOCHS, saves=True, accumulate=accumulate)
    for place in PLACES[:-1] if writer is raylight else ("batch-5",):
        path = tmp_path / f"{place}.ckpt"
        again = run(raylight, kind, tmp_path / "again", max_epochs=MAX_EPOCHS, ckpt_path=path, accumulate=accumulate)
        assert_same_run(again, whole, place, judges=place != "epoch")  # whose judge comes after the hook that saves
