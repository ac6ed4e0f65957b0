"""What user code raises, and what it raises while that is handled: what the caller gets, and what is trained."""

from __future__ import annotations

import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import raylight as pl

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


