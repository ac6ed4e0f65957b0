"""The callbacks for which several workers matter, on two Ray workers: as in one process with twice the batch."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader

import raylight as pl
from raylight.callbacks import (
    BackboneFinetuning,
    BasePredictionWriter,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def train(net, data, path, num_workers, callback, **arguments):
    options = {"num_workers": num_workers, "use_gpu": False, "storage_path": str(path / str(num_workers)), "seed": 3}
    options |= {"max_epochs": 4, "enable_progress_bar": False, "enable_model_summary": False} | arguments
    trainer = pl.Trainer(callbacks=callback, **options)
    loader = DataLoader(data, batch_size=8 // max(num_workers, 1))
    trainer.fit(net, loader, DataLoader(data, batch_size=16))
    return trainer


def assert_close(ours, theirs):
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("num_samples", [48, 41])  # with 41 one worker has nothing in an epoch's last step
@pytest.mark.parametrize(
    "make_callback",
    [
        lambda: EMAWeightAveraging(decay=0.8),
        lambda: StochasticWeightAveraging(0.1, swa_epoch_start=2),
        lambda: BackboneFinetuning(1, lambda_func=lambda epoch: 1.5),
    ],
)
def test_weights_are_those_of_one_process(make_net, make_samples, tmp_path, make_callback, num_samples):
    one, two, data = make_net(), make_net(), make_samples(num_samples)
    alone = train(one, data, tmp_path, 0, make_callback())
    together = train(two, data, tmp_path, 2, make_callback())
    assert_close(two, one)
    assert together.callback_metrics["val_loss"] == pytest.approx(alone.callback_metrics["val_loss"].item(), rel=1e-5)
    assert_close(
        make_net.load_from_checkpoint(together.checkpoint_callback.last_model_path),
        make_net.load_from_checkpoint(alone.checkpoint_callback.last_model_path),
    )


def test_an_average_goes_on_exactly(make_net, dataset, tmp_path):
    whole, parts = make_net(norm=True), make_net(norm=True)
    train(whole, dataset, tmp_path / "whole", 2, EMAWeightAveraging(decay=0.8))
    train(make_net(norm=True), dataset, tmp_path, 2, EMAWeightAveraging(decay=0.8), max_epochs=2)
    trainer = pl.Trainer(
        num_workers=2, use_gpu=False, storage_path=str(tmp_path / "2"), max_epochs=4, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[EMAWeightAveraging(decay=0.8)],
    )  # fmt: skip
    trainer.fit(parts, DataLoader(dataset, batch_size=4), DataLoader(dataset, batch_size=16), ckpt_path="last")
    for name, parameter in whole.named_parameters():
        assert torch.equal(dict(parts.named_parameters())[name], parameter), name


def test_batch_norm_after_swa_is_that_of_all_workers_batches(make_net, dataset, tmp_path):
    net = make_net(norm=True)
    train(net, dataset, tmp_path, 2, StochasticWeightAveraging(0.1, swa_epoch_start=2))
    outputs = net.backbone[0](dataset.tensors[0]).detach()
    batches = outputs.split(4)  # whichever worker took it
    norm = net.backbone[1]
    torch.testing.assert_close(norm.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([b.var(0) for b in batches]).mean(0))


@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_all_workers_stop_together(make_net, dataset, tmp_path, interval):
    stopping = EarlyStopping("val_loss", patience=2)
    trainer = train(make_net(lr=0.0), dataset, tmp_path, 2, stopping, max_epochs=20, val_check_interval=interval)
    assert trainer.result.num_steps == (18 if interval == 1.0 else 9)
    assert stopping.wait_count == 2


def test_a_timer_stops_all_workers(make_net, dataset, tmp_path):
    trainer = train(make_net(), dataset, tmp_path, 2, Timer({"seconds": 1}), max_epochs=1_000_000, limit_val_batches=0)
    assert trainer.result.status == "finished"
    assert 1 <= trainer.callbacks[0].time_elapsed() < 30


def test_each_worker_writes_its_predictions(make_net, make_samples, tmp_path):
    class Writer(BasePredictionWriter):
        def write_on_batch_end(self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
            torch.save((trainer.global_rank, prediction, batch_indices), tmp_path / f"{batch_idx}.pt")

        def write_on_epoch_end(self, trainer, module, predictions, batch_indices):
            torch.save((predictions, batch_indices), tmp_path / f"rank-{trainer.global_rank}.pt")

    net, data = make_net(), make_samples(50)
    trainer = pl.Trainer(num_workers=2, use_gpu=False, callbacks=[Writer("batch_and_epoch")], enable_progress_bar=False)
    trainer.predict(net, DataLoader(data, batch_size=12, shuffle=True))
    batches = [torch.load(tmp_path / f"{index}.pt", weights_only=True) for index in range(5)]
    assert [rank for rank, _, _ in batches] == [0, 1, 0, 1, 0]
    samples = [sample for _, _, indices in batches for sample in indices]
    assert sorted(samples) == list(range(50))
    expected = net.head(net.backbone(data.tensors[0][samples]))
    torch.testing.assert_close(torch.cat([prediction for _, prediction, _ in batches]), expected.detach())
    predictions, indices = torch.load(tmp_path / "rank-1.pt", weights_only=True)
    assert indices == [[batches[1][2], batches[3][2]]]
    assert torch.equal(predictions[1], batches[3][1])


class Reads(ModelCheckpoint):
    """Looks at its files where training has ended, on every rank."""

    found: list[int]

    def on_train_end(self, trainer, module):
        super().on_train_end(trainer, module)
        self.found = [torch.load(path, weights_only=True)["global_step"] for path in self.best_k_models]


@pytest.mark.parametrize(
    "options",
    [
        {"monitor": "val_loss", "save_top_k": 2, "save_last": "link"},
        {"monitor": "train_loss", "save_top_k": -1, "every_n_train_steps": 4, "filename": "{step}-{train_loss:.3f}"},
    ],
)
def test_files_are_those_of_one_process(make_net, dataset, tmp_path, options):
    left = []
    for num_workers in (0, 2):
        folder = tmp_path / f"files-{num_workers}"
        callback = Reads(folder, **options)
        trainer = train(make_net(), dataset, tmp_path, num_workers, callback)
        assert trainer.checkpoint_callback is callback
        assert callback.found == [torch.load(path, weights_only=True)["global_step"] for path in callback.best_k_models]
        state = {name: str(value).replace(str(folder), "") for name, value in callback.state_dict().items()}
        names = sorted(path.name for path in folder.iterdir())
        left.append((names, {} if options["monitor"] == "train_loss" else state))
    if options["monitor"] == "val_loss":
        assert left[0] == left[1]
    else:  # a value of a step is rank 0's own
        assert [name.split("-")[0] for name in left[0][0]] == [name.split("-")[0] for name in left[1][0]]


class DiesOnce(Callback):
    """Kills the process of a rank in front of a step, and only the first time."""

    def __init__(self, mark, rank, step):
        self.mark, self.rank, self.step = mark, rank, step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == self.rank and trainer.global_step == self.step and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_worker_changes_no_file(make_net, dataset, tmp_path, rank):
    folders = []
    for dies in (False, True):
        folders.append(tmp_path / f"files-{dies}")
        callbacks = [ModelCheckpoint(folders[-1], monitor="val_loss", save_top_k=-1, save_last=True)]
        callbacks += [DiesOnce(tmp_path / "died", rank, 15)] if dies else []
        train(make_net(), dataset, tmp_path / str(dies), 2, callbacks)
    whole, broken = (sorted(path.name for path in folder.iterdir()) for folder in folders)
    assert whole == broken
    assert len(whole) == 5
    assert (tmp_path / "died").exists()
