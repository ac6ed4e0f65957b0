"""A run that stops anywhere and goes on is the run that never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

import raylight as pl
from raylight.driver import timetable
from raylight.storage.checkpoints import verify
from raylight.worker.step.precision import Precision

pytestmark = pytest.mark.usefixtures("ray_if_marked")
NUM_SAMPLES = 41


class Net(pl.Module):
    """Dropout and numpy noise in each step: a wrong random state shows at once."""

    def __init__(self, seen: str = ""):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.seen = seen

    def training_step(self, batch, batch_idx):
        noise = float(np.random.uniform(-0.01, 0.01))
        if self.seen:
            line = f"{self.current_epoch} {' '.join(str(int(i)) for i in batch[1])}\n"
            with Path(self.seen, f"{self.trainer.attempt}-{self.global_rank}.txt").open("a") as file:
                file.write(line)
        self.log("seen", batch[1].sum(), on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("mean", batch[1].float().mean(), on_step=False, on_epoch=True)
        return (self.net(batch[0]) + noise).pow(2).mean()

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(module: Net, num_workers: int, path: Path, batch_size: int = 4, **arguments):
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(NUM_SAMPLES, 4, generator=generator), torch.arange(NUM_SAMPLES))
    return pl.fit(
        module, DataLoader(data, batch_size=batch_size, shuffle=True), num_workers=num_workers, use_gpu=False, seed=5,
        storage_path=str(path), enable_progress_bar=False, enable_model_summary=False, **arguments,
    )  # fmt: skip


@pytest.mark.parametrize("stop", [3, 11, 14])
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.ray)])
def test_stopped_in_the_middle_of_an_epoch(num_workers, stop, tmp_path):
    whole, again = Net(), Net()
    never_stopped = fit(whole, num_workers, tmp_path / "whole", max_steps=20)
    fit(Net(), num_workers, tmp_path / "parts", max_steps=stop)
    result = fit(again, num_workers, tmp_path / "parts", max_steps=20, resume="last")
    assert result.num_steps == 20
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    values = epoch_values(result)
    assert all(values[key] == pytest.approx(value, rel=1e-6) for key, value in epoch_values(never_stopped).items())


class Normed(Net):
    """Each rank has running statistics of its own between two steps; only rank 0's are used in the next."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 1))


@pytest.mark.ray
def test_running_statistics_go_on_on_several_workers(tmp_path):
    whole, again = Normed(), Normed()
    fit(whole, 2, tmp_path / "whole", batch_size=3, max_steps=10)
    fit(Normed(), 2, tmp_path / "parts", batch_size=3, max_steps=4)
    fit(again, 2, tmp_path / "parts", batch_size=3, max_steps=10, resume="last")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # after a step that counted for nothing
@pytest.mark.parametrize("stop", [2, 7])
def test_the_gradient_scaler_goes_on(stop, tmp_path):
    """It halves its scale at steps that overflow, which count for nothing, and doubles it after three that do not."""

    def scaled():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=3)
        return {"plugins": [Precision("16-mixed", "cpu", scaler)]}

    whole, again = Net(), Net()
    fit(whole, 0, tmp_path / "whole", max_steps=20, **scaled())
    fit(Net(), 0, tmp_path / "parts", max_steps=stop, **scaled())
    options = scaled()
    fit(again, 0, tmp_path / "parts", max_steps=20, resume="last", **options)
    assert options["plugins"][0].state_dict()["scale"] != 2.0**18
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


class Terminating(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 13:
            os.kill(os.getpid(), signal.SIGTERM)


def test_stopped_by_sigterm(tmp_path):
    script = (
        "import sys\nfrom pathlib import Path\nfrom tests.end_to_end.test_resume import Net, Terminating, fit\n"
        "fit(Net(), 0, Path(sys.argv[1]), max_steps=20, callbacks=[Terminating()])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "parts")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGTERM, done.stderr
    whole, again = Net(), Net()
    fit(whole, 0, tmp_path / "whole", max_steps=20)
    assert 13 <= pl.open_run(str(tmp_path / "parts")).last.step < 20
    fit(again, 0, tmp_path / "parts", max_steps=20, resume="last")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


class Leaving(pl.Callback):
    """Ends the run once `enough` checkpoints were committed while it went on."""

    def __init__(self, enough: int):
        self.enough = enough

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        found = list(Path(trainer.log_dir, "checkpoints").glob("*/manifest.json"))
        trainer.should_stop |= len(found) >= self.enough


@pytest.mark.parametrize("every_s", [0.05, "auto"])
def test_checkpoints_by_the_clock(every_s, tmp_path, monkeypatch):
    monkeypatch.setattr(timetable, "AUTO_FIRST_S", 0.05)
    monkeypatch.setattr(timetable, "AUTO_LEAST_S", 0.05)
    checkpoint = pl.Checkpointing(every_s=every_s, keep_last=10)
    options = {"max_epochs": 100_000, "max_time": "00:00:01:00", "callbacks": [Leaving(2)]}
    result = fit(Net(), 0, tmp_path, checkpoint=checkpoint, **options)
    assert result.status == "finished"
    assert len(result.checkpoints) >= 2
    assert not {checkpoint.step for checkpoint in result.checkpoints} <= {result.num_steps}
    assert all(verify(checkpoint) == [] for checkpoint in result.checkpoints)


class FailingOnce(pl.Callback):
    """Raises in a step: before a random number is drawn for it, in its middle, or behind it."""

    def __init__(self, step: int, moment: str):
        self.step, self.moment = step, moment

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self._fail(trainer, "start")

    def on_before_backward(self, trainer, module, loss):
        self._fail(trainer, "backward")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self._fail(trainer, "end")

    def _fail(self, trainer, moment):
        if trainer.global_step == self.step and self.moment == moment:
            raise ValueError("once")


class Dropping(Net):
    """Torch's random numbers alone."""

    def training_step(self, batch, batch_idx):
        self.log("seen", batch[1].sum(), on_step=False, on_epoch=True, reduce_fx="sum")
        return self.net(batch[0]).pow(2).mean()


class NormedAndDropping(Dropping):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("kind", "moment"), [(Net, "start"), (Dropping, "backward"), (NormedAndDropping, "backward"), (Net, "end")]
)
def test_stopped_by_an_exception(kind, moment, accumulate, tmp_path):
    whole, again = kind(), kind()
    options = {"max_steps": 14, "accumulate_grad_batches": accumulate, "batch_size": 3}  # 41 leaves two for the last
    never_stopped = fit(whole, 0, tmp_path / "whole", **options)
    with pytest.raises(pl.WorkerFailed, match="once"):
        fit(kind(), 0, tmp_path / "parts", callbacks=[FailingOnce(6, moment)], **options)
    result = fit(again, 0, tmp_path / "parts", resume="last", **options)
    assert result.num_steps == 14
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    values = epoch_values(result)
    assert all(values[key] == pytest.approx(value, rel=1e-6) for key, value in epoch_values(never_stopped).items())


class Drawing(Dropping):
    """Draws before training begins, too."""

    def on_train_start(self):
        torch.rand(3)

    def train_dataloader(self):
        data = TensorDataset(torch.arange(80.0).reshape(20, 4), torch.arange(20))
        kept, _ = torch.utils.data.random_split(data, [12, 8])
        return DataLoader(kept, batch_size=2, shuffle=True)


def test_what_is_drawn_before_the_first_step_does_not_count(tmp_path):
    def run(module, name, **arguments):
        return pl.fit(
            module, num_workers=0, seed=5, storage_path=str(tmp_path / name), enable_progress_bar=False,
            enable_model_summary=False, **arguments,
        )  # fmt: skip

    whole, again = Drawing(), Drawing()
    run(whole, "whole", max_steps=9)
    run(Drawing(), "parts", max_steps=4)
    run(again, "parts", max_steps=9, resume="last")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


class Counting(pl.Callback):
    """Counts ends of epochs, as EarlyStopping and others do."""

    def __init__(self):
        self.ends = 0

    def on_train_epoch_end(self, trainer, module):
        self.ends += 1

    def state_dict(self):
        return {"ends": self.ends}

    def load_state_dict(self, state):
        self.ends = state["ends"]


def test_an_epoch_that_was_stopped_in_its_middle_ends_once(tmp_path):
    first, second = Counting(), Counting()
    stopped = fit(Net(), 0, tmp_path, max_steps=14, callbacks=[first])
    assert "mean" in stopped.last_checkpoint.metrics
    fit(Net(), 0, tmp_path, max_epochs=2, resume="last", callbacks=[second])
    assert first.ends == second.ends == 2


class Stopping(pl.Callback):
    """Stops the run after a batch, as Ctrl-C does."""

    def __init__(self, batch_idx: int):
        self.batch_idx = batch_idx

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop |= batch_idx == self.batch_idx


def test_stopped_where_gradients_are_accumulated(tmp_path):
    """What was accumulated is not thrown away: the run ends after the step that takes it."""
    whole, again = Net(), Net()
    options = {"accumulate_grad_batches": 3, "max_epochs": 2}
    fit(whole, 0, tmp_path / "whole", **options)
    stopped = fit(Net(), 0, tmp_path / "parts", callbacks=[Stopping(3)], **options)
    assert stopped.num_steps == 2
    fit(again, 0, tmp_path / "parts", resume="last", **options)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_resumed_by_path_without_a_seed_it_goes_on_in_the_same_order(tmp_path):
    """The seed of the run that is gone on from decides which samples of the epoch are left."""
    data = TensorDataset(torch.arange(12.0).unsqueeze(1), torch.arange(12))
    loader = DataLoader(data, batch_size=3, shuffle=True)
    options = {"storage_path": str(tmp_path), "enable_progress_bar": False, "enable_model_summary": False}

    class Seeing(Net):
        def training_step(self, batch, batch_idx):
            self.ids.extend(batch[1].tolist())
            return self.net(batch[0].expand(-1, 4)).pow(2).mean()

    first, second = Seeing(), Seeing()
    first.ids, second.ids = [], []
    stopped = pl.fit(first, loader, max_steps=2, **options)
    pl.fit(second, loader, max_epochs=1, resume=stopped.last_checkpoint.path, **options)
    assert sorted(first.ids + second.ids) == list(range(12))


def test_a_finished_run_that_is_begun_once_more_keeps_its_metrics_and_its_duration(tmp_path):
    first = fit(Net(), 0, tmp_path, max_epochs=2)
    duration_s = pl.open_run(str(tmp_path)).record["duration_s"]
    again = fit(Net(), 0, tmp_path, max_epochs=2, resume="last")
    assert again.metrics == first.metrics != {}
    record = pl.open_run(str(tmp_path)).record
    assert record["metrics"] == first.metrics
    assert record["duration_s"] > duration_s


class Onwards(Sampler):
    """Each epoch begins where the one before ended."""

    def __init__(self):
        self.offset = 0

    def __len__(self):
        return 8

    def __iter__(self):
        self.offset += 8
        return iter(range(self.offset - 8, self.offset))

    def state_dict(self):
        return {"offset": self.offset}

    def load_state_dict(self, state):
        self.offset = state["offset"]


@pytest.mark.parametrize("stop", [{"max_steps": 1}, {"max_epochs": 1}, {"max_steps": 3}])
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.ray)])
def test_a_sampler_with_a_state_goes_on(num_workers, stop, tmp_path):
    seen = tmp_path / "seen"
    seen.mkdir()
    data = TensorDataset(torch.randn(NUM_SAMPLES, 4), torch.arange(NUM_SAMPLES))
    options = {
        "num_workers": num_workers, "use_gpu": False, "storage_path": str(tmp_path), "enable_progress_bar": False,
        "enable_model_summary": False,
    }  # fmt: skip
    size = 4 // max(num_workers, 1)
    pl.fit(Net(str(seen)), DataLoader(data, batch_size=size, sampler=Onwards()), **options, **stop)
    loader = DataLoader(data, batch_size=size, sampler=Onwards())
    pl.fit(Net(str(seen)), loader, max_epochs=3, resume="last", **options)
    ids = [int(word) for file in seen.iterdir() for line in file.read_text().splitlines() for word in line.split()[1:]]
    assert sorted(ids) == list(range(24))


class Validating(Net):
    def validation_step(self, batch, batch_idx):
        self.log("validated", 1.0)


def test_an_epoch_that_others_have_begun_is_validated(tmp_path):
    """It has one batch less than an epoch of as many workers, or of as large batches, all along."""

    def run(batch_size, **arguments):
        data = TensorDataset(torch.randn(43, 4), torch.arange(43))
        loader = DataLoader(data, batch_size=batch_size)
        return pl.fit(
            Validating(), loader, loader, num_workers=0, seed=5, storage_path=str(tmp_path), num_sanity_val_steps=0,
            enable_progress_bar=False, enable_model_summary=False, **arguments,
        )  # fmt: skip

    run(8, max_steps=1)
    result = run(6, max_epochs=1, resume="last")
    assert result.metrics.get("validated") == 1.0


def epoch_values(result: pl.Result) -> dict[tuple[str, int], float]:
    """By name and step."""
    return {(row["name"], row["step"]): row["value"] for row in result.history().to_pylist()}


@pytest.mark.ray
def test_each_sample_once_with_4_2_3_1_workers(tmp_path):
    seen = tmp_path / "seen"
    seen.mkdir()
    steps = 0
    for num_workers, more in ((4, 1), (2, 2), (3, 1), (0, None)):
        steps = -1 if more is None else steps + more
        result = fit(Net(str(seen)), num_workers, tmp_path, batch_size=2, max_epochs=1, max_steps=steps, resume="last")
    ids = [int(word) for file in seen.iterdir() for line in file.read_text().splitlines() for word in line.split()[1:]]
    assert sorted(ids) == list(range(NUM_SAMPLES))
    assert epoch_values(result)["seen", result.num_steps] == sum(range(NUM_SAMPLES))
    assert epoch_values(result)["mean", result.num_steps] == pytest.approx((NUM_SAMPLES - 1) / 2)
