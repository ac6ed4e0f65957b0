"""The same cases in this process and on two and three Ray workers: same numbers, same files, same hooks."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pyarrow.compute as pc
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import raylight as pl

WORKERS = [0, pytest.param(2, marks=pytest.mark.ray), pytest.param(3, marks=pytest.mark.ray)]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_if_marked")]


def make_data(num_samples: int = 37, num_features: int = 5) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(num_samples, num_features, generator=generator)
    return TensorDataset(inputs, inputs.sum(1, keepdim=True), torch.arange(num_samples))


class Net(pl.Module):
    def __init__(self, lr: float = 0.05, optimizer: str = "SGD"):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        error = (self.net(batch[0]) - batch[1]).abs()
        self.log("val_mean", error.mean())
        self.log("val_max", error.max(), reduce_fx="max")
        self.log("val_min", error.min(), reduce_fx="min")
        self.log("val_count", float(len(error)), reduce_fx="sum")
        return error.mean()

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return batch[2]

    def configure_optimizers(self):
        return getattr(torch.optim, self.hparams.optimizer)(self.parameters(), lr=self.hparams.lr)


def fit(module: pl.Module, num_workers: int, path: Path, batch_size: int = 4, shuffle: bool = True, **arguments):
    """Trains with the same global batch whatever the number of workers."""
    defaults = {"max_epochs": 2, "seed": 11, "log_every_n_steps": 1, "enable_progress_bar": False,
                "enable_model_summary": False, "use_gpu": False}  # fmt: skip
    per_worker = batch_size * 6 // max(num_workers, 1)
    loader = DataLoader(make_data(), batch_size=per_worker, shuffle=shuffle)
    val = DataLoader(make_data(23), batch_size=4)
    result = pl.fit(module, loader, val, num_workers=num_workers, storage_path=str(path), **{**defaults, **arguments})
    return result


def test_a_run_that_fails_before_its_first_step_is_recorded_as_failed(tmp_path):
    class Broken(Net):
        def named_children(self):
            raise RuntimeError("no summary of this one")

    with pytest.raises(RuntimeError, match="no summary"):
        fit(Broken(), 0, tmp_path, enable_model_summary=True)
    record = json.loads((tmp_path / "default" / "version_0" / "run.json").read_text())
    assert record["status"] == "failed"


@pytest.mark.parametrize("num_workers", WORKERS)
def test_files_and_result(num_workers, tmp_path):
    module = Net()
    result = fit(module, num_workers, tmp_path)
    version = Path(result.path)
    assert version == tmp_path / "default" / "version_0"
    assert result.status == "finished"
    assert result.num_epochs == 2
    record = json.loads((version / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["hyperparameters"]["lr"] == 0.05
    assert (version / "metrics.parquet").is_file()
    assert list(version.glob("events.out.tfevents.*"))
    names = set(result.history().column("name").to_pylist())
    assert {"train_loss_step", "train_loss_epoch", "val_mean", "val_max"} <= names
    assert result.last_checkpoint is not None
    again = Net.load_from_checkpoint(result.last_checkpoint.path)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    weights = {}
    for file in sorted(Path(result.last_checkpoint.path).glob("model-*.pt")):
        weights |= torch.load(file, weights_only=True)
    assert weights.keys() == module.state_dict().keys()


class GrowsWorse(Net):
    """Takes its time, so that a checkpoint is on storage before the next step ends."""

    def on_train_batch_start(self, batch, batch_idx):
        time.sleep(0.03)

    def on_validation_epoch_end(self):
        self.log("val_loss", float(self.current_epoch))


@pytest.mark.parametrize("checkpoint", [{}, {"monitor": "val_loss"}])
def test_the_best_checkpoint_is_the_one_that_was_validated(checkpoint, tmp_path):
    options = pl.Checkpointing(every_n_steps=1, **checkpoint)
    result = fit(GrowsWorse(), 0, tmp_path, batch_size=1, checkpoint=options)
    steps_per_epoch = result.num_steps // 2
    assert result.best_checkpoint.step == steps_per_epoch
    assert [kept.step for kept in result.checkpoints] == [steps_per_epoch, result.num_steps]


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize(
    "num_workers", [pytest.param(2, marks=pytest.mark.ray), pytest.param(3, marks=pytest.mark.ray)]
)
def test_weights_follow_one_process(num_workers, optimizer, tmp_path):
    alone, together = Net(optimizer=optimizer, lr=0.01), Net(optimizer=optimizer, lr=0.01)
    fit(alone, 0, tmp_path / "alone", max_epochs=25)
    result = fit(together, num_workers, tmp_path / "together", max_epochs=25)
    assert result.num_steps == 50
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "num_workers", [pytest.param(2, marks=pytest.mark.ray), pytest.param(3, marks=pytest.mark.ray)]
)
def test_accumulation_follows_one_process(num_workers, tmp_path):
    alone, together = Net(), Net()
    one = fit(alone, 0, tmp_path / "alone", batch_size=2, accumulate_grad_batches=2, max_epochs=10)
    many = fit(together, num_workers, tmp_path / "together", batch_size=2, accumulate_grad_batches=2, max_epochs=10)
    assert one.num_steps == many.num_steps
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [2, 3])
def test_epoch_values_are_exact(num_workers, tmp_path):
    module = Net()
    loader = DataLoader(make_data(23), batch_size=4)
    options = {"storage_path": str(tmp_path), "enable_progress_bar": False, "use_gpu": False}
    alone = pl.validate(module, loader, num_workers=0, **options)[0]
    together = pl.validate(module, loader, num_workers=num_workers, **options)[0]
    assert alone.keys() == together.keys()
    assert alone["val_count"] == 23
    for name, value in alone.items():
        assert together[name] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("num_workers", WORKERS)
def test_predictions_in_order(num_workers, tmp_path):
    loader = DataLoader(make_data(23), batch_size=4)
    outputs = pl.predict(
        Net(), loader, num_workers=num_workers, storage_path=str(tmp_path), enable_progress_bar=False, use_gpu=False
    )
    assert torch.cat(outputs).tolist() == list(range(23))


class Seen(Net):
    """Keeps what the epoch-end hooks of one process would see."""

    def __init__(self):
        super().__init__()
        self.validation_ids: list[list[int]] = []
        self.training_ids: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "ids": batch[2]}

    def training_epoch_end(self, outputs):
        self.training_ids.append([int(i) for output in outputs for i in output["ids"]])

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        return batch[2]

    def validation_epoch_end(self, outputs):
        self.validation_ids.append(torch.cat(outputs).tolist())


@pytest.mark.parametrize("num_workers", WORKERS)
def test_epoch_end_sees_all_ranks_in_dataset_order(num_workers, tmp_path):
    module = Seen()
    fit(module, num_workers, tmp_path, shuffle=False, num_sanity_val_steps=0)
    assert module.validation_ids == [list(range(23))] * 2
    assert [sorted(ids) for ids in module.training_ids] == [list(range(37))] * 2


@pytest.mark.parametrize("num_workers", WORKERS)
def test_resume_between_epochs_is_bit_identical(num_workers, tmp_path):
    whole, halves, again = (Net(optimizer="Adam") for _ in range(3))
    options = {"deterministic": num_workers == 3}  # two ranks add up to the same sum in either order, three do not
    fit(whole, num_workers, tmp_path / "whole", max_epochs=4, **options)
    fit(halves, num_workers, tmp_path / "halves", max_epochs=2, **options)
    result = fit(again, num_workers, tmp_path / "halves", max_epochs=4, resume="last", **options)
    assert result.num_epochs == 4
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    steps = result.history().filter(pc.field("name") == "train_loss_step")
    assert steps.column("step").to_pylist() == list(range(1, 9))


@pytest.mark.parametrize("num_workers", WORKERS[:2])
def test_a_test_after_a_fit_is_logged_at_its_step_and_leaves_its_record(num_workers, tmp_path):
    trainer = pl.Trainer(
        num_workers=num_workers, use_gpu=False, max_epochs=2, storage_path=str(tmp_path), enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    loader = DataLoader(make_data(23), batch_size=4)
    fitted = trainer.fit(Net(), loader)
    before = json.loads((Path(fitted.path) / "run.json").read_text())
    [measured] = trainer.test(dataloaders=loader, verbose=False)
    after = json.loads((Path(fitted.path) / "run.json").read_text())
    rows = [row for row in fitted.history().to_pylist() if row["name"] == "test_loss"]
    assert [row["step"] for row in rows] == [fitted.num_steps]
    assert after["metrics"]["test_loss"] == pytest.approx(measured["test_loss"])
    assert {**after, "metrics": None} == {**before, "metrics": None}


class Failing(Net):
    def training_step(self, batch, batch_idx):
        if self.global_step == 1 and self.global_rank == self.trainer.world_size - 1:
            raise KeyError("no such key")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("num_workers", WORKERS)
def test_user_exception_reaches_the_caller(num_workers, tmp_path):
    with pytest.raises(pl.WorkerFailed) as caught:
        fit(Failing(), num_workers, tmp_path, max_restarts=0)
    error = caught.value
    assert error.rank == max(num_workers - 1, 0)
    assert error.step == 1
    assert isinstance(error.cause, KeyError)
    assert "no such key" in str(error)
    assert "test_contract.py" in str(error)
    assert "raylight/worker" not in str(error)
    assert json.loads((tmp_path / "default/version_0/run.json").read_text())["status"] == "failed"


class Numbers(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(0.0, 29.0).unsqueeze(1))


class Counter(pl.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.totals: list[float] = []

    def training_step(self, batch):
        self.log("seen", batch.sum(), reduce_fx="sum", on_epoch=True, on_step=False)
        return (self.weight * batch).mean()

    def validation_step(self, batch):
        self.log("total", batch.sum(), reduce_fx="sum")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("loader_workers", [0, 2])
@pytest.mark.parametrize("num_workers", WORKERS)
def test_iterable_datasets_are_shared_out(num_workers, loader_workers, tmp_path):
    loader = DataLoader(Numbers(), batch_size=3, num_workers=loader_workers)
    result = pl.fit(
        Counter(), loader, loader, num_workers=num_workers, max_epochs=1, storage_path=str(tmp_path), use_gpu=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    assert result.metrics["total"] == sum(range(29))
    assert 0 < result.metrics["seen"] <= sum(range(29))
    if num_workers == 0:
        assert result.metrics["seen"] == sum(range(29))


class GAN(pl.Module):
    """Two optimizers, stepped by hand."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.generator, self.critic = nn.Linear(2, 5), nn.Linear(5, 1)

    def training_step(self, batch, batch_idx):
        real, (generating, judging) = batch[0], self.optimizers()
        noise = real[:, :2]
        self.toggle_optimizer(generating)
        loss = -self.critic(self.generator(noise)).mean()
        generating.zero_grad()
        self.manual_backward(loss)
        generating.step()
        self.untoggle_optimizer(generating)
        self.toggle_optimizer(judging)
        loss = self.critic(self.generator(noise).detach()).mean() - self.critic(real).mean()
        judging.zero_grad()
        self.manual_backward(loss)
        judging.step()
        self.untoggle_optimizer(judging)
        self.log("critic", loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.generator.parameters(), lr=0.1), torch.optim.SGD(self.critic.parameters(), lr=0.1)


@pytest.mark.ray
def test_gan_trains_alike_on_two_workers(tmp_path):
    loaders = [DataLoader(make_data(24), batch_size=size) for size in (8, 4)]
    modules = [GAN(), GAN()]
    options = {
        "max_epochs": 2,
        "seed": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_gpu": False,
    }
    for module, loader, workers in zip(modules, loaders, (0, 2), strict=True):
        result = pl.fit(module, loader, num_workers=workers, storage_path=str(tmp_path / str(workers)), **options)
        assert result.num_steps == 12
    for name, tensor in modules[0].state_dict().items():
        torch.testing.assert_close(modules[1].state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_workers", WORKERS)
def test_a_run_that_fails_saves_its_last_step(num_workers, tmp_path):
    with pytest.raises(pl.WorkerFailed):
        fit(Failing(), num_workers, tmp_path, max_restarts=0)
    last = pl.open_run(str(tmp_path)).last
    assert last is not None
    assert last.step == 1


@pytest.mark.ray
def test_a_rank_without_a_sample_in_the_second_step(tmp_path):
    """DDP enters a collective of its own in its second forward pass, which that rank does not make."""
    module = Net()
    loader = DataLoader(TensorDataset(*(tensor[:9] for tensor in make_data().tensors)), batch_size=4)
    result = pl.fit(
        module, loader, num_workers=2, max_epochs=2, use_gpu=False, storage_path=str(tmp_path),
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    assert result.num_steps == 4
