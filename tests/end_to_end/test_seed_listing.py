"""A script as a user of PyTorch Lightning has it, with nothing but its import line changed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LISTING = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch):
        x, y = batch
        accuracy = (self(x).argmax(dim=1) == y).float().mean()
        self.log("test_accuracy", accuracy)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


torch.manual_seed(0)
x = torch.randn(640, 20)
y = (x.sum(dim=1) > 0).long()
train_loader = DataLoader(TensorDataset(x[:512], y[:512]), batch_size=16, shuffle=True)
test_loader = DataLoader(TensorDataset(x[512:], y[512:]), batch_size=16)

model = Net()
trainer = pl.Trainer(gpus=4)
trainer.fit(model, train_loader)
trainer.test(model, test_loader)
"""


def run_without_gpus(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(script)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def find_advice(stderr: str) -> str:
    """The arguments that the error offers in place of `gpus=4`."""
    advice = re.search(r"train on CPU workers: ([^\n]*?)\.(?:\s|$)", stderr)
    assert advice is not None, stderr
    return advice[1]


def test_without_gpus_the_error_says_what_was_asked_what_is_there_and_what_runs(tmp_path: Path) -> None:
    failed = run_without_gpus(LISTING, tmp_path)
    assert failed.returncode == 1
    last_line = failed.stderr.strip().splitlines()[-1]
    assert last_line.startswith("raylight.contract.errors.NotEnoughResources: ")
    assert "gpus=4 asks for 4 GPUs" in last_line
    assert "this machine has none" in last_line
    assert "num_workers=" in find_advice(last_line)
    assert "Started a local Ray instance" not in failed.stderr, "the check comes before anything is started"


@pytest.mark.slow
def test_with_the_argument_that_the_error_offers_the_listing_trains(tmp_path: Path) -> None:
    advice = find_advice(run_without_gpus(LISTING, tmp_path).stderr)
    # Like Lightning, raylight trains for a thousand epochs where nothing is said; four are enough to learn this.
    script = LISTING.replace("gpus=4", f"{advice}, max_epochs=4")
    done = run_without_gpus(script, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    accuracy = re.search(r"test_accuracy\W+(\d\.\d+)", done.stdout)
    assert accuracy is not None, done.stdout
    assert float(accuracy[1]) > 0.85
    [version] = tmp_path.glob("*/*/version_0")
    assert json.loads((version / "run.json").read_text())["status"] == "finished"
