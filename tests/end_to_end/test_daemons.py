"""A daemon of the local Ray is killed: the run ends with an error of its own, and goes on from its last checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts import scripts_in

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SCRIPT = """
import os, signal, sys
import ray, torch
import raylight as pl

class KillDaemon(pl.Callback):
    def __init__(self, at, driver):
        self.at, self.driver = at, driver

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.at and trainer.global_rank == 0:
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    command = open(f"/proc/{pid}/cmdline").read().split("\\0")[0]
                    parent = int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
                except OSError:
                    continue
                if parent == self.driver and command.endswith("/DAEMON"):
                    os.kill(int(pid), signal.SIGKILL)

class Net(pl.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch):
        return (self.weight * batch).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def fit(at, max_steps, **arguments):
    loader = torch.utils.data.DataLoader(torch.ones(2_000_000, 1), batch_size=1)
    return pl.fit(Net(), loader, num_workers=2, use_gpu=False, max_steps=max_steps, storage_path="runs", name="net",
                  checkpoint={"every_n_steps": 50}, callbacks=[KillDaemon(at, os.getpid())], num_standby=0,
                  enable_progress_bar=False, enable_model_summary=False, **arguments)

if __name__ == "__main__":
    try:
        fit(301, 1_000_000)
    except pl.RaylightError as error:
        print(type(error).__name__, error, flush=True)
    run = pl.open_run("runs", "net")
    print(run.status, "DAEMON" in run.record["error"], run.last.step > 0, flush=True)
    last = run.last.step
    result = fit(-1, last + 5, resume="last")
    print(result.status, result.num_steps - last, flush=True)
"""


@pytest.mark.parametrize("daemon", ["raylet", "gcs_server"])
def test_a_killed_daemon_ends_the_run_with_an_error_that_names_it(daemon: str, tmp_path: Path) -> None:
    with scripts_in(tmp_path) as start:
        lines = start(SCRIPT.replace("DAEMON", daemon)).finish(errors=None).splitlines()
    [told] = [line for line in lines if line.startswith("ClusterError")]
    assert daemon in told
    assert "ended by SIGKILL" in told
    assert "failed True True" in lines
    assert lines[-1] == "finished 5"
