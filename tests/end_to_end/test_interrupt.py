"""Ctrl-C and SIGTERM: the run stops at a step boundary, and what it had is on storage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl
from raylight.driver.driver import Driver
from raylight.launch import signals

pytestmark = pytest.mark.usefixtures("ray_if_marked")
WORKERS = [0, pytest.param(2, marks=pytest.mark.ray)]


class Signalling(pl.Module):
    """Sends the driver a signal in the middle of step `at`."""

    def __init__(self, at: int, number: int = signal.SIGINT):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.at, self.number, self.driver = at, number, os.getpid()

    def training_step(self, batch):
        if self.global_step == self.at and self.global_rank == 0:
            os.kill(self.driver, self.number)
        return (self.weight * batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def make_loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(4000, 1)), batch_size=2)


@pytest.mark.parametrize("num_workers", WORKERS)
def test_ctrl_c_commits_a_checkpoint(num_workers, tmp_path):
    result = pl.fit(
        Signalling(3), make_loader(), num_workers=num_workers, use_gpu=False, max_epochs=100,
        storage_path=str(tmp_path), enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    assert result.status == "interrupted"
    assert 4 <= result.num_steps < 100_000
    assert result.last_checkpoint.step == result.num_steps
    assert json.loads((Path(result.path) / "run.json").read_text())["status"] == "interrupted"
    again = pl.fit(
        Signalling(-1), make_loader(), num_workers=num_workers, use_gpu=False, max_steps=result.num_steps + 2,
        storage_path=str(tmp_path), enable_progress_bar=False, enable_model_summary=False, resume="last",
    )  # fmt: skip
    assert again.num_steps == result.num_steps + 2


@pytest.mark.parametrize("num_workers", WORKERS)
def test_presses_while_the_run_is_closed_change_nothing(num_workers, tmp_path, monkeypatch):
    """They left it "failed" or "running"."""
    monkeypatch.setattr(signals, "ONE_PRESS_S", -1.0)
    close = Driver.close

    def press(run: Driver, status: str) -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        close(run, status)

    monkeypatch.setattr(Driver, "close", press)
    result = pl.fit(
        Signalling(3), make_loader(), num_workers=num_workers, use_gpu=False, max_epochs=100,
        storage_path=str(tmp_path), enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    assert result.status == pl.open_run(str(tmp_path)).status == "interrupted"
    assert result.last_checkpoint.step == result.num_steps


def test_a_second_press_stops_at_once_and_is_recorded_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "ONE_PRESS_S", -1.0)
    module = Signalling(3)
    module.on_train_epoch_end = lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        pl.fit(
            module, make_loader(), num_workers=0, use_gpu=False, max_epochs=100, storage_path=str(tmp_path),
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
    assert pl.open_run(str(tmp_path)).status == "interrupted"


SCRIPT = textwrap.dedent("""
    import os, signal, sys
    import raylight as pl
    sys.path.insert(0, {folder!r})
    from test_interrupt import Signalling, make_loader
    pl.fit(Signalling(3, signal.SIGTERM), make_loader(), num_workers=0, use_gpu=False, max_epochs=100,
           storage_path={path!r}, enable_progress_bar=False, enable_model_summary=False)
    print("went on")
""")


def test_sigterm_saves_and_ends_the_process(tmp_path):
    script = SCRIPT.format(folder=str(Path(__file__).parent), path=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert "went on" not in done.stdout
    version = pl.open_run(str(tmp_path))
    assert version.status == "interrupted"
    assert version.last.step >= 4
