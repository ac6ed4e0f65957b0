"""Two fits on the same workers in a Python whose packages do not lie in its own environment."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import pytest

import raylight
from tests.scripts import Script

SCRIPT = """
import pathlib, time
import torch
from torch.utils.data import DataLoader
import raylight as pl
import part

class Net(pl.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)
    def training_step(self, batch):
        import part
        self.log("value", float(part.VALUE))
        return self.net(batch).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

if __name__ == "__main__":
    for value in (1, 2):
        pathlib.Path("part.py").write_text(f"VALUE = {value}\\n" + "#" * value)
        result = pl.fit(
            Net(), DataLoader(torch.ones(4, 2)), max_epochs=1, num_workers=1, use_gpu=False, num_standby=0,
            storage_path="runs", logger=False, enable_progress_bar=False, enable_model_summary=False,
            log_every_n_steps=1,
        )
        print("value", result.metrics["value"])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="this Python has no other below it")
def test_a_second_fit_where_torch_lies_outside_of_the_environment(tmp_path: Path):
    """A changed module of the user's is imported again there, and torch is not."""
    (tmp_path / "part.py").write_text("VALUE = 0\n")
    python = f"{sys.base_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    packages = tmp_path / "elsewhere"  # no name that Python gives to such a folder
    packages.symlink_to(sysconfig.get_paths()["purelib"])
    path = os.pathsep.join([str(Path(raylight.__file__).parents[1]), str(packages)])
    said = Script(tmp_path, SCRIPT, python, path).finish(errors=None)
    assert [line for line in said.splitlines() if line.startswith("value")] == ["value 1.0", "value 2.0"]
