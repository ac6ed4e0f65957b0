"""What user code raises, and what it raises while that is handled: what the caller gets, and what is trained."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import raylight as pl
from raylight.loggers import CSVLogger

pytestmark = pytest.mark.usefixtures("ray_if_marked")


class Mistake(Exception):
    """Its constructor wants other arguments than it keeps, and it holds what cannot be sent."""

    def __init__(self, code: int, detail: Any):
        super().__init__(f"code {code}", detail)
        self.code, self.detail, self.lock = code, detail, threading.Lock()


class Net(pl.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch):
        if self.global_step == 2:
            try:
                Path("/no/such/file").read_text()
            except OSError as error:
                raise Mistake(5, torch.ones(2)) from error
        return self.layer(batch).pow(2).mean()

    def validation_step(self, batch):
        raise KeyError("none")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.ray)])
def test_a_caller_catches_its_own_class(num_workers, tmp_path):
    options = {
        "num_workers": num_workers, "use_gpu": False, "max_restarts": 0, "storage_path": str(tmp_path),
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    loader = DataLoader(torch.randn(16, 4), batch_size=2)
    with pytest.raises(Mistake) as caught:
        pl.fit(Net(), loader, max_epochs=1, **options)
    error = caught.value
    assert isinstance(error, pl.WorkerFailed)
    assert (error.code, error.step, error.args[0]) == (5, 2, "code 5")
    assert torch.equal(error.detail, torch.ones(2))
    assert isinstance(error.__cause__, FileNotFoundError)
    lines = str(error).splitlines()
    assert "test_user_code.py" in lines[2]  # the user's frames first
    if num_workers == 0:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        assert frames[-1] == __file__  # where a debugger stands
        assert not any("raylight/worker" in name for name in frames)
    with pytest.raises(KeyError) as caught:
        pl.validate(Net(), loader, **options)
    assert isinstance(caught.value, pl.WorkerFailed)


class First(RuntimeError):
    """What fails first."""


class Second(RuntimeError):
    """What fails because of it."""


class FailTwice(pl.Callback):
    """Rank `world_size - 1` fails behind step 5, once; from then on `hook` fails, of this callback or the module."""

    def __init__(self, folder: Path, hook: str):
        self.marker, self.hook, self.is_armed = folder / "failed", hook, True

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        is_there = trainer.global_step == 5 and trainer.global_rank == trainer.world_size - 1
        if is_there and self.is_armed and not self.marker.exists():
            self.marker.touch()
            raise First("behind step 5")

    def _fail(self, hook: str) -> None:
        if self.is_armed and hook == self.hook and self.marker.exists():
            raise Second(f"in {hook}")

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        assert isinstance(exception, First | Second)
        self._fail("on_exception")

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        self._fail("on_save_checkpoint")

    def state_dict(self) -> dict[str, Any]:
        self._fail("state_dict")
        return {}


class Counted(pl.Module):
    def __init__(self, fault: FailTwice | None = None) -> None:
        super().__init__()
        self.weight, self.fault = nn.Parameter(torch.ones(1)), fault

    def training_step(self, batch):
        loss = (self.weight * batch).pow(2).mean()
        self.log("loss", loss)
        return loss

    def on_exception(self, exception):
        if self.fault is not None:
            self.fault._fail("module.on_exception")

    def state_dict(self, *arguments, **keywords):
        if self.fault is not None:
            self.fault._fail("module.state_dict")
        return super().state_dict(*arguments, **keywords)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(
    folder: Path, num_workers: int, fault: Any = None, module: Counted | None = None, **arguments: Any
) -> tuple[Counted, Any]:
    module, data = module or Counted(fault), torch.linspace(0.1, 1.0, 16).unsqueeze(1)
    defaults = {"max_epochs": 1, "log_every_n_steps": 1, "checkpoint": {"every_n_steps": 2}, "seed": 3}
    result = pl.fit(
        module, DataLoader(data, batch_size=2 // max(num_workers, 1)), num_workers=num_workers, use_gpu=False,
        storage_path=str(folder), enable_progress_bar=False, enable_model_summary=False,
        **{**defaults, "callbacks": [fault] if fault is not None else [], **arguments},
    )  # fmt: skip
    return module, result


SECOND = ("on_exception", "module.on_exception", "on_save_checkpoint", "state_dict", "module.state_dict")


@pytest.mark.parametrize("hook", SECOND)
def test_the_first_error_stays_the_first_and_its_step_counts_once(hook, tmp_path, capsys):
    expected, whole = train(tmp_path / "whole", 0)
    fault = FailTwice(tmp_path, hook)
    with pytest.raises(First) as caught:
        train(tmp_path, 0, fault)
    told = str(caught.value) + capsys.readouterr().out
    assert f"Second: in {hook}" in told
    run = pl.open_run(str(tmp_path))
    assert run.status == "failed"
    assert run.last.step == 5 or "on_exception" not in hook  # the others make no checkpoint any more
    fault.is_armed = False
    module, result = train(tmp_path, 0, resume="last")
    assert torch.equal(module.weight, expected.weight)
    assert result.num_steps == whole.num_steps
    steps = [row["step"] for row in result.history().to_pylist() if row["name"] == "loss"]
    assert steps == list(range(1, whole.num_steps + 1))


@pytest.mark.ray
@pytest.mark.parametrize("hook", SECOND)
def test_so_it_does_with_workers(hook, tmp_path, capsys):
    expected, whole = train(tmp_path / "whole", 2)
    fault = FailTwice(tmp_path, hook)
    if "on_exception" in hook:
        module, result = train(tmp_path, 2, fault)
        assert torch.equal(module.weight, expected.weight)
        assert (result.num_steps, result.num_restarts) == (whole.num_steps, 1)
    else:  # no rank can give its state to another
        with pytest.raises(First) as caught:
            train(tmp_path, 2, fault)
        assert "While this was handled, rank 0 raised" in str(caught.value)
        assert f"Second: in {hook}" in str(caught.value)
        assert pl.open_run(str(tmp_path)).status == "failed"
        fault.is_armed = False
        module, result = train(tmp_path, 2, resume="last")
        assert torch.equal(module.weight, expected.weight)
    assert f"Second: in {hook}" in capsys.readouterr().out
    steps = [row["step"] for row in result.history().to_pylist() if row["name"] == "loss"]
    assert steps == list(range(1, whole.num_steps + 1))


class Behind(Counted):
    """Fails once on the last rank, behind what `hook` does in its fifth step."""

    def __init__(self, folder: Path, hook: str) -> None:
        super().__init__()
        self.marker, self.hook = folder / "failed", hook

    def _fail(self, hook: str) -> None:
        is_there = self.global_step == 5 and self.global_rank == self.trainer.world_size - 1
        if hook == self.hook and is_there and not self.marker.exists():
            self.marker.touch()
            raise First(hook)

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        optimizer.step(closure)
        self._fail("optimizer_step")

    def lr_scheduler_step(self, scheduler, metric):
        self._fail("lr_scheduler_step")
        scheduler.step()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.ray
def test_a_step_whose_end_fails_counts_once_on_all_ranks(tmp_path):
    expected, _ = train(tmp_path / "whole", 2, module=Behind(tmp_path, ""))
    for hook in ("optimizer_step", "lr_scheduler_step"):
        (tmp_path / hook).mkdir()
        module, result = train(tmp_path / hook, 2, module=Behind(tmp_path / hook, hook))
        assert (result.num_steps, result.num_restarts) == (8, 1)
        assert torch.equal(module.weight, expected.weight), hook


def test_a_step_whose_end_fails_is_in_the_last_checkpoint(tmp_path):
    expected, _ = train(tmp_path / "whole", 0, module=Behind(tmp_path / "whole", ""))
    with pytest.raises(First):
        train(tmp_path, 0, module=Behind(tmp_path, "optimizer_step"))
    assert pl.open_run(str(tmp_path)).last.step == 5
    module, result = train(tmp_path, 0, module=Behind(tmp_path, "optimizer_step"), resume="last")
    assert result.num_steps == 8
    assert module.weight.item() != expected.weight.item()  # the scheduler's step is missing, and is not made up for


class FailingLogger:
    """Of the user's own, in the driver's process; fails in `method` once a failure is being handled."""

    def __init__(self, marker: Path, method: str):
        self.marker, self.method = marker, method

    def _fail(self, method: str) -> None:
        if method == self.method and self.marker.exists():
            raise Second(f"in {method}")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._fail("log_metrics")

    def drop_after(self, step: int) -> None:
        self._fail("drop_after")

    def finalize(self, status: str) -> None:
        self._fail("finalize")


@pytest.mark.parametrize("method", ["log_metrics", "finalize"])
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.ray)])
def test_a_logger_that_fails_takes_nobodys_place(num_workers, method, tmp_path, capsys):
    fault, logger = FailTwice(tmp_path, ""), FailingLogger(tmp_path / "failed", method)
    with pytest.raises(First) as caught:
        train(tmp_path, num_workers, fault, logger=logger, max_restarts=0)
    told = capsys.readouterr().out + "".join(getattr(caught.value, "__notes__", []))
    assert f"Second: in {method}" in told
    assert pl.open_run(str(tmp_path)).status == "failed"


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.ray)])
def test_a_logger_that_always_fails_is_named_once_and_training_goes_on(num_workers, tmp_path, capsys):
    (tmp_path / "failed").touch()
    other = CSVLogger(tmp_path / "csv")
    _, result = train(tmp_path, num_workers, logger=[FailingLogger(tmp_path / "failed", "log_metrics"), other])
    assert (result.status, result.num_steps) == ("finished", 8)
    assert capsys.readouterr().out.count("FailingLogger") == 1
    assert "loss" in Path(other.log_dir, "metrics.csv").read_text()


def test_a_logger_that_fails_at_the_end_leaves_the_result(tmp_path, capsys):
    (tmp_path / "failed").touch()
    _, result = train(tmp_path, 0, logger=FailingLogger(tmp_path / "failed", "finalize"))
    assert (result.status, result.num_steps) == ("finished", 8)
    assert "FailingLogger could not store all that was logged: Second: in finalize" in capsys.readouterr().out


class FailInReplacement(pl.Callback):
    """The last rank is killed behind step 5; the one that takes its place fails in a hook of loading."""

    def __init__(self, folder: Path):
        self.marker = folder / "failed"

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == 5 and trainer.global_rank == 1 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.global_rank == 1:  # the other rank calls this hook too
            raise Second("in on_load_checkpoint")


@pytest.mark.ray
def test_a_killed_worker_stays_the_first_failure_of_one_that_cannot_be_replaced(tmp_path):
    with pytest.raises(Second) as caught:
        train(tmp_path, 2, callbacks=[FailInReplacement(tmp_path)])
    lines = str(caught.value).splitlines()
    assert "The process is gone" in lines[1]
    assert "While this was handled, rank 1 raised" in str(caught.value)


class FailAtTheEnd(Counted):
    def __init__(self, hook: str) -> None:
        super().__init__()
        self.hook = hook

    def on_train_end(self):
        if self.hook == "on_train_end":
            raise First(self.hook)

    def teardown(self, stage):
        if self.hook == "teardown":
            raise First(self.hook)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.ray)])
def test_what_fails_when_training_has_ended_is_said_at_once(num_workers, tmp_path, capsys):
    """With workers it was tried again first."""
    for hook in ("on_train_end", "teardown"):
        with pytest.raises(First, match="training had ended"):
            train(tmp_path / hook, num_workers, module=FailAtTheEnd(hook))
        assert "goes on" not in capsys.readouterr().out
        assert pl.open_run(str(tmp_path / hook)).last.step == 8


class Rows(pl.DataModule):
    """Notes the exception of a run beside its data."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.randn(16, 4), batch_size=2)

    def on_exception(self, exception: BaseException) -> None:
        (self.folder / "heard").write_text(type(exception).__name__)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.ray)])
def test_a_data_module_hears_of_an_exception(num_workers, tmp_path):
    with pytest.raises(Mistake):
        pl.fit(
            Net(), Rows(tmp_path), num_workers=num_workers, use_gpu=False, max_restarts=0,
            storage_path=str(tmp_path), enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
    assert (tmp_path / "heard").read_text() == "Mistake"
