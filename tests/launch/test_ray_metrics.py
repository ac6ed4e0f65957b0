"""The gauges of a run, as Prometheus reads them from Ray."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path

import pytest
import ray
import torch
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl
from raylight.report.gauges import GAUGES

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

ARRIVAL_TIMEOUT_S = 60.0
"""Processes tell Ray's agent every ten seconds; on a machine that is busy it takes longer."""


class Net(pl.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch):
        loss = self.layer(batch[0]).pow(2).mean()
        self.log("train_loss", loss)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        time.sleep(0.3)  # the run is to last long enough for a rate

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def scrape(run: str) -> dict[tuple[str, str], float]:
    """(name, version) -> value of all gauges of a run on this node."""
    [node] = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address) as answer:
        lines = answer.read().decode().splitlines()
    found = {}
    for line in lines:
        match = re.fullmatch(r"ray_(raylight_\w+)\{(.*)\} (\S+)", line)
        labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2])) if match else {}
        if match and labels.get("run") == run:
            found[match[1], labels["version"]] = float(match[3])
    return found


def scrape_until(run: str, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], float]:
    deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
    while not wanted <= (found := scrape(run)).keys():
        assert time.monotonic() < deadline, f"missing: {wanted - found.keys()}"
        time.sleep(0.5)
    return found


@pytest.mark.soak
def test_prometheus_reads_a_run_from_ray(tmp_path: Path) -> None:
    data = DataLoader(TensorDataset(torch.randn(24, 2)), batch_size=2)
    arguments = {"num_workers": 2, "use_gpu": False, "storage_path": str(tmp_path), "name": "watched"}
    results = [
        pl.fit(Net(), data, max_epochs=1, log_every_n_steps=1, enable_progress_bar=False, **arguments) for _ in range(2)
    ]
    found = scrape_until("watched", {(name, version) for name in GAUGES for version in ("0", "1")})
    for version, result in enumerate(results):
        values = {name.removeprefix("raylight_"): found[name, str(version)] for name in GAUGES}
        assert values["step"] == 6
        assert values["loss"] == pytest.approx(result.metrics["train_loss"])
        assert (values["world_size"], values["restarts"]) == (2, 0)
        assert 0 < values["samples_per_s"] < 24 / 1.5
        assert 0 <= values["data_wait_ratio"] < 0.5
        assert values["checkpoint_stall_s"] > 0
