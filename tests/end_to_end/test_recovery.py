"""Workers die at every point of a step; training goes on as if they had not."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl
from raylight.storage.checkpoints import verify
from raylight.worker import loop
from raylight.worker.checkpoint.restore import load_state
from tests.faults import FailAt

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
NUM_SAMPLES = 41


class Net(pl.Module):
    """Dropout and numpy noise in each step: lost or repeated random numbers show in the weights."""

    def __init__(self, folder: Path):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1))
        self.folder = str(folder)

    def on_fit_start(self):
        Path(self.folder, f"pid-{self.global_rank}-{os.getpid()}").touch()

    def training_step(self, batch, batch_idx):
        noise = float(np.random.uniform(-0.01, 0.01))
        loss = (self.net(batch[0]) + noise).pow(2).mean()
        self.log("loss", loss)
        self.ids = batch[1].tolist()
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with Path(self.folder, f"ids-{self.global_rank}").open("a") as file:
            file.write(f"{self.current_epoch} {self.global_step} {self.ids}\n")

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]).pow(2).mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(
    folder: Path, num_workers: int | tuple[int, int] = 2, faults: list[FailAt] | None = None, kind: type = Net,
    **arguments,
):  # fmt: skip
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(NUM_SAMPLES, 4, generator=generator), torch.arange(NUM_SAMPLES))
    module = kind(folder)
    defaults = {"max_epochs": 3, "log_every_n_steps": 1, "max_restarts": 5}
    result = pl.fit(
        module, DataLoader(data, batch_size=4, shuffle=True), DataLoader(data, batch_size=8), num_workers=num_workers,
        use_gpu=False, seed=5, storage_path=str(folder), enable_progress_bar=False, enable_model_summary=False,
        callbacks=faults or [], **{**defaults, **arguments},
    )  # fmt: skip
    return module, result


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, tmp_path_factory):
    return fit(tmp_path_factory.mktemp("undisturbed"))


def assert_same(module: Net, expected: Net) -> None:
    for name, tensor in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("rank", "step", "point"),
    [
        (1, 4, "data"), (0, 5, "forward"), (1, 5, "collective"), (0, 7, "backward"), (1, 7, "optimizer"),
        (1, 6, "validation"), (0, 6, "snapshot"), pytest.param(1, 0, "forward", marks=pytest.mark.soak),
        pytest.param(0, 8, "after_step", marks=pytest.mark.soak),
        pytest.param(1, 12, "epoch_end", marks=pytest.mark.soak),
    ],
)  # fmt: skip
def test_a_killed_worker_costs_no_step(rank, step, point, undisturbed, tmp_path):
    expected, whole = undisturbed
    module, result = fit(tmp_path, faults=[FailAt(rank, step, point, "kill", tmp_path)])
    assert result.status == "finished"
    assert result.num_restarts == 1
    assert result.num_steps == whole.num_steps
    assert_same(module, expected)
    steps = [row["step"] for row in result.history().to_pylist() if row["name"] == "loss"]
    assert sorted(steps) == list(range(1, whole.num_steps + 1))
    survivor = [name for name in os.listdir(tmp_path) if name.startswith(f"pid-{1 - rank}-")]
    assert len(survivor) == 1


class AskingNet(Net):
    """Its hooks of checkpoints ask the other ranks."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["steps"] = self.all_gather(torch.tensor(float(self.global_step))).tolist()

    def on_load_checkpoint(self, checkpoint):
        assert len(checkpoint["steps"]) == 2
        self.loaded = self.all_gather(torch.tensor(1.0)).sum().item()


def test_hooks_of_checkpoints_may_ask_the_other_ranks_in_a_recovery_too(undisturbed, tmp_path):
    expected, _ = undisturbed
    module, result = fit(tmp_path, kind=AskingNet, faults=[FailAt(1, 5, "forward", "kill", tmp_path)])
    assert (result.status, result.num_restarts, module.loaded) == ("finished", 1, 2.0)
    assert_same(module, expected)


class CountingNet(Net):
    """Tells the driver after every step what it has logged in the epoch, not only four times a second."""

    def setup(self, stage):
        self.usual, loop.REPORT_EVERY_S = loop.REPORT_EVERY_S, 0.0

    def teardown(self, stage):
        loop.REPORT_EVERY_S = self.usual

    def training_step(self, batch, batch_idx):
        self.log("seen", batch[1].sum(), on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("mean", batch[1].float().mean(), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


class StopAfterValidation(pl.Callback):
    def on_validation_end(self, trainer, module):
        trainer.should_stop = trainer.should_stop or not trainer.sanity_checking


def test_a_validation_that_its_time_brought_is_made_by_the_next_group(tmp_path):
    """Nothing else ends the run. Both ranks validate at the same batch, or they would wait for each other."""
    _, result = fit(
        tmp_path, faults=[FailAt(1, 1, "validation", "kill", tmp_path), StopAfterValidation()], kind=CountingNet,
        max_epochs=-1, val_check_interval=timedelta(milliseconds=1), log_every_n_steps=0,
    )  # fmt: skip
    assert result.num_restarts == 1
    assert "val_loss" in result.metrics
    assert "loss" not in {row["name"] for row in result.history().to_pylist()}  # a value of steps


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([(1, 4, "data")], marks=pytest.mark.soak),
        pytest.param([(0, 4, "forward")], marks=pytest.mark.soak),
        [(1, 4, "validation")],
        [(1, 6, "epoch_end")],
        [(1, 3, "data"), (0, 4, "data")],
    ],
    ids=lambda faults: "-".join(f"{rank}_{point}" for rank, _, point in faults),
)
def test_the_epoch_values_hold_what_a_killed_worker_had_logged(faults, tmp_path):
    kills = [FailAt(*fault, "kill", tmp_path) for fault in faults]
    _, result = fit(tmp_path, faults=kills, kind=CountingNet, max_epochs=2, val_check_interval=2)
    rows = result.history().to_pylist()
    first, second = (row["value"] for row in rows if row["name"] == "seen")
    first_mean, second_mean = (row["value"] for row in rows if row["name"] == "mean")
    total = sum(range(NUM_SAMPLES))
    assert (second, second_mean) == (total, pytest.approx(total / NUM_SAMPLES))
    # What a process says last may die with it.
    last_words = [ids_of_step(tmp_path, rank, step) for rank, step, _ in faults]
    lost = [ids for ids in unions(last_words) if first == total - sum(ids)]
    assert lost
    assert first_mean == pytest.approx(first / (NUM_SAMPLES - len(lost[0])))


def test_an_exception_at_the_end_of_an_epoch_loses_no_value(tmp_path):
    _, result = fit(tmp_path, faults=[FailAt(1, 6, "epoch_end", "exception", tmp_path)], kind=CountingNet, max_epochs=2)
    rows = result.history().to_pylist()
    assert result.num_restarts == 1
    assert [row["value"] for row in rows if row["name"] == "seen"] == [sum(range(NUM_SAMPLES))] * 2


def ids_of_step(folder: Path, rank: int, step: int) -> list[int]:
    """The samples of the first epoch's step that ended with `step` finished ones."""
    lines = Path(folder, f"ids-{rank}").read_text().splitlines()
    return next(json.loads(line.split(" ", 2)[2]) for line in lines if line.startswith(f"0 {step} "))


def unions(items: list[list[int]]) -> list[list[int]]:
    """Of any number of the items."""
    chosen = (some for size in range(len(items) + 1) for some in itertools.combinations(items, size))
    return [list(itertools.chain(*some)) for some in chosen]


@pytest.mark.parametrize("kind", [pytest.param("exit", marks=pytest.mark.soak), "exception", "memory"])
def test_other_ends_of_a_worker(kind, undisturbed, tmp_path):
    expected, whole = undisturbed
    module, result = fit(tmp_path, faults=[FailAt(1, 5, "forward", kind, tmp_path)])
    assert (result.num_restarts, result.num_steps) == (1, whole.num_steps)
    assert_same(module, expected)


def test_all_workers_die_and_the_last_checkpoint_is_used(undisturbed, tmp_path):
    expected, whole = undisturbed
    faults = [FailAt(rank, 9, "data", "kill", tmp_path) for rank in (0, 1)]
    module, result = fit(tmp_path, faults=faults)
    assert result.num_steps == whole.num_steps
    assert_same(module, expected)
    steps = [row["step"] for row in result.history().to_pylist() if row["name"] == "loss"]
    assert sorted(steps) == list(range(1, whole.num_steps + 1))


def test_where_all_ranks_fail_behind_a_step_it_is_not_made_twice(undisturbed, tmp_path):
    expected, whole = undisturbed
    faults = [FailAt(rank, 5, "after_step", "exception", tmp_path) for rank in range(2)]
    module, result = fit(tmp_path, faults=faults)
    assert (result.num_restarts, result.num_steps) == (1, whole.num_steps)
    assert_same(module, expected)
    steps = [row["step"] for row in result.history().to_pylist() if row["name"] == "loss"]
    assert sorted(steps) == list(range(1, whole.num_steps + 1))


def test_one_worker_goes_on_with_its_random_numbers(tmp_path):
    """Of torch alone: numpy's are not noted before each batch."""
    expected, _ = fit(tmp_path / "whole", num_workers=1, kind=QuietNet, max_epochs=1)
    fault = FailAt(0, 5, "backward", "exception", tmp_path)
    module, result = fit(tmp_path / "faulty", num_workers=1, kind=QuietNet, faults=[fault], max_epochs=1)
    assert result.num_restarts == 1
    assert_same(module, expected)


class QuietNet(Net):
    def training_step(self, batch, batch_idx):
        self.ids = batch[1].tolist()
        return self.net(batch[0]).pow(2).mean()


class NormedNet(QuietNet):
    def __init__(self, folder):
        super().__init__(folder)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))


def test_running_statistics_move_once_in_a_step_that_is_made_again(tmp_path):
    """Those of rank 0 are everybody's; a replacement gets them."""
    options = {"kind": NormedNet, "global_batch_size": 7, "max_epochs": 2}
    expected, _ = fit(tmp_path / "whole", **options)
    fault = FailAt(1, 5, "backward", "kill", tmp_path)
    module, result = fit(tmp_path / "faulty", faults=[fault], **options)
    assert result.num_restarts == 1
    assert_same(module, expected)


class FailAfterValidation(pl.Callback):
    """Once, on rank 1, while rank 0 goes on."""

    def __init__(self, step: int, folder: Path):
        self.step, self.marker = step, folder / "failed"

    def on_validation_end(self, trainer, module):
        if trainer.global_rank == 1 and trainer.global_step == self.step and not self.marker.exists():
            self.marker.touch()
            raise OSError("the share is away")


@pytest.mark.parametrize("step", [4, pytest.param(6, marks=pytest.mark.soak)])
def test_ranks_that_stand_before_and_behind_a_validation_meet(step, tmp_path):
    """In the middle of an epoch and at its end: they would enter different collectives."""
    _, result = fit(
        tmp_path, faults=[FailAfterValidation(step, tmp_path)], kind=CountingNet, max_epochs=2, val_check_interval=2,
    )  # fmt: skip
    assert (result.num_restarts, result.num_steps) == (1, 12)
    rows = result.history().to_pylist()
    assert [row["value"] for row in rows if row["name"] == "seen"] == [sum(range(NUM_SAMPLES))] * 2
    assert sorted({row["step"] for row in rows if row["name"] == "val_loss"}) == [2, 4, 6, 8, 10, 12]


class StopAndKill(pl.Callback):
    """The run ends early, and one that stores its end is lost."""

    def __init__(self, folder: Path):
        self.marker = folder / "killed"

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop |= trainer.global_step == 5

    def on_train_end(self, trainer, module):
        if trainer.global_rank == 1 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def test_one_that_dies_after_the_run_was_told_to_stop_does_not_make_it_go_on(tmp_path):
    _, result = fit(tmp_path, faults=[StopAndKill(tmp_path)])
    assert (result.status, result.num_steps) == ("finished", 5)
    assert result.last_checkpoint.step == 5


class KillAtTheEnd(pl.Callback):
    """Once the last checkpoint is committed, its worker is lost."""

    def __init__(self, folder: Path):
        self.found = str(folder / "found")

    def on_train_end(self, trainer, module):
        if not os.path.exists(self.found):
            directory = Path(trainer.log_dir, "checkpoints", f"step-{trainer.global_step:08d}")
            while not (directory / "manifest.json").exists():
                time.sleep(0.01)
            Path(self.found).write_text(json.dumps(inodes_in(directory)))
            os.kill(os.getpid(), signal.SIGKILL)


def inodes_in(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in directory.iterdir()}


def test_a_restart_at_the_last_step_leaves_its_checkpoint_as_it_is(tmp_path):
    """Written again under the manifest that is there, it was damaged until the driver had committed it anew."""
    _, result = fit(tmp_path, num_workers=1, faults=[KillAtTheEnd(tmp_path)], max_epochs=1)
    assert result.num_restarts == 1
    assert inodes_in(Path(result.last_checkpoint.path)) == json.loads((tmp_path / "found").read_text())


def test_the_same_exception_twice_ends_the_run(tmp_path):
    with pytest.raises(pl.WorkerFailed, match="twice at step 5") as caught:
        fit(tmp_path, faults=[FailAt(1, 5, "forward", "exception", tmp_path, times=2)])
    assert caught.value.rank == 1
    assert caught.value.step == 5
    assert pl.open_run(str(tmp_path)).last.step == 5


@pytest.mark.parametrize("point", ["forward", pytest.param("validation", marks=pytest.mark.soak)])
def test_a_rank_that_hangs_is_found_and_replaced(point, undisturbed, tmp_path, capsys):
    expected, whole = undisturbed
    module, result = fit(tmp_path, faults=[FailAt(1, 6, point, "hang", tmp_path)], hang_timeout_s=1.0)
    assert (result.num_restarts, result.num_steps) == (1, whole.num_steps)
    assert_same(module, expected)
    told = capsys.readouterr().out
    assert "rank 1 hangs" in told
    assert "---- rank 0" in told
    assert "faults.py" in told  # the line that waits is in the stack


def test_a_rank_that_hangs_again_ends_the_run_with_the_stacks_of_all(tmp_path):
    fault = FailAt(1, 5, "backward", "hang", tmp_path, times=2)
    with pytest.raises(pl.WorkerHung, match="hung twice at step 5") as caught:
        fit(tmp_path, faults=[fault], hang_timeout_s=1.0)
    assert caught.value.rank == 1
    assert "---- rank 0" in str(caught.value)
    assert "in _fail" in str(caught.value)


class Patient(Net):
    """Takes its time while it is alone, and ends an epoch after it has got company again."""

    began_alone = True  # of one that comes in the middle of an epoch

    def on_train_epoch_start(self):
        self.began_alone = self.trainer.world_size == 1

    def training_step(self, batch, batch_idx):
        if self.trainer.world_size == 1:
            threading.Event().wait(0.1)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self):
        if self.current_epoch and self.trainer.world_size == 2 and not self.began_alone:
            self.trainer.should_stop = True


def read_ids(folder: Path, num_ranks: int, epoch: int) -> list[int]:
    lines = [line for rank in range(num_ranks) for line in Path(folder, f"ids-{rank}").read_text().splitlines()]
    found = [line.split(" ", 2) for line in lines]
    return sorted(sample for epoch_, _, ids in found if int(epoch_) == epoch for sample in json.loads(ids))


def test_an_elastic_group_goes_on_with_fewer_and_takes_on_who_comes(tmp_path):
    _, result = fit(
        tmp_path, kind=Patient, faults=[FailAt(1, 3, "data", "kill", tmp_path)], num_workers=(1, 2), num_standby=0,
        replacement_timeout_s=0.0, global_batch_size=8, max_epochs=200,
    )  # fmt: skip
    assert result.num_steps == 6 * result.num_epochs  # whoever makes them
    restarts = pl.open_run(str(tmp_path)).record["restarts"]
    assert [restart["world_size"] for restart in restarts] == [1, 2]
    assert len({*tmp_path.glob("pid-0-*")}) == 1  # the one that was left did not start again
    for epoch in range(result.num_epochs):
        assert read_ids(tmp_path, 2, epoch) == list(range(NUM_SAMPLES))


@pytest.mark.parametrize("point", ["snapshot", pytest.param("data", marks=pytest.mark.soak)])
def test_a_group_that_shrinks_during_a_checkpoint_commits_no_half_of_it(point, tmp_path):
    """The one that is left has begun its share, or has written it: the other is missing for good."""
    _, result = fit(
        tmp_path, faults=[FailAt(1, 6, point, "kill", tmp_path)], num_workers=(1, 2), num_standby=0,
        replacement_timeout_s=0.0, checkpoint={"every_n_steps": 3, "keep_last": 20},
    )  # fmt: skip
    assert result.status == "finished"
    assert pl.open_run(str(tmp_path)).record["restarts"][0]["world_size"] == 1
    for checkpoint in result.checkpoints:
        assert verify(checkpoint) == []
        load_state(checkpoint, 0, 1)  # which needs the shares of all ranks


def test_where_no_replacement_finds_room_the_last_step_is_saved(tmp_path):
    faults = [FailAt(1, 5, "data", "kill", tmp_path)]
    with pytest.raises(pl.NotEnoughResources, match="replacement_timeout_s=0"):
        fit(tmp_path, faults=faults, replacement_timeout_s=0.0, num_standby=0)
    assert pl.open_run(str(tmp_path)).last.step == 5


@pytest.mark.soak
def test_three_workers_lose_two(tmp_path):
    faults = [FailAt(rank, 3, "data", "kill", tmp_path) for rank in (0, 2)]
    _, result = fit(tmp_path, num_workers=3, faults=faults)
    assert result.status == "finished"
    assert result.num_steps == 12
