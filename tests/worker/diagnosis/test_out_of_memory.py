from __future__ import annotations

import pytest
import torch

import raylight as pl
from raylight.worker.diagnosis.out_of_memory import Shortage, _read_asked, is_out_of_memory
from tests.faults import FailAt

GIB = 1 << 30


def test_the_batch_that_would_have_fit():
    # 2 GiB of weights, 6 GiB for 32 samples when 2 more were asked for: 0.25 GiB a sample, 7 GiB of 10 are usable
    shortage = Shortage(asked=2 * GIB, total=10 * GIB, held=8 * GIB, kept=2 * GIB)
    assert shortage.largest_batch(32) == 28


def test_where_weights_alone_fill_the_device_nothing_fits():
    assert Shortage(asked=GIB, total=10 * GIB, held=10 * GIB, kept=10 * GIB).largest_batch(32) == 0


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity", 20 * GIB),
        ("CUDA out of memory. Tried to allocate 512.00 MiB", 512 << 20),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 800000000000 bytes. Error code 12",
         800_000_000_000),
        ("something else", 0),
    ],
)  # fmt: skip
def test_what_was_asked_is_read_from_the_error(text, asked):
    assert _read_asked(text) == asked


def test_real_allocations_that_fail_are_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


class Net(pl.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        torch.empty(1 << 50, dtype=torch.uint8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_error_says_what_was_asked_what_was_there_and_what_to_do(tmp_path):
    loader = torch.utils.data.DataLoader(torch.randn(64, 4), batch_size=16)
    with pytest.raises(pl.WorkerFailed) as caught:
        pl.fit(Net(), loader, num_workers=0, storage_path=str(tmp_path), enable_progress_bar=False)
    text = str(caught.value)
    assert "1048576.00 GiB more were asked for" in text
    assert "No batch would have fit" in text
    assert "training_step" in text


def test_a_batch_that_nearly_fits_gets_advice(tmp_path):
    fault = FailAt(0, 1, "forward", "memory", tmp_path)
    loader = torch.utils.data.DataLoader(torch.randn(64, 4), batch_size=16)
    with pytest.raises(pl.WorkerFailed, match="more were asked for"):
        pl.fit(Quiet(), loader, num_workers=0, storage_path=str(tmp_path), enable_progress_bar=False, callbacks=[fault])


class Quiet(Net):
    def training_step(self, batch, batch_idx):
        return self.net(batch).mean()
