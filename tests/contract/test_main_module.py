"""Classes of a script in a process whose `__main__` is another, and in the loader workers of that process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raylight.contract import main_module

SCRIPT = """
import sys
from collections import namedtuple
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from raylight.launch import handover

Batch = namedtuple("Batch", "x")

class Numbers(Dataset):
    def __init__(self): self.numbers = torch.arange(8)
    def __len__(self): return 8
    def __getitem__(self, index): return self.numbers[index]

class Flowing(IterableDataset):
    def __iter__(self): yield from torch.arange(8)

def collate(items): return Batch(torch.stack(items))

def make(method, data):
    return DataLoader(data, batch_size=4, num_workers=1, multiprocessing_context=method, collate_fn=collate)

if __name__ == "__main__":
    loaders = [make("fork", Numbers()), make("spawn", Flowing()), make("forkserver", Numbers())]
    sys.stdout.buffer.write(handover.dump(loaders)[0])
"""

WORKER = """
import sys
from raylight.launch import handover
from raylight.worker.data.batches import TrainBatches

if __name__ == "__main__":
    for loader in handover.load(sys.stdin.buffer.read(), [], adopts=True):
        batches = [batch.data for batch in TrainBatches(loader, rank=0, world_size=1, seed=0).iterate(0)]
        print(type(batches[0]).__name__, [batch.x.tolist() for batch in batches])
    print(Batch)
"""


@pytest.mark.slow
def test_loader_workers_of_every_kind_take_and_give_classes_of_the_script(tmp_path: Path) -> None:
    for name, text in (("script", SCRIPT), ("worker", WORKER)):
        (tmp_path / f"{name}.py").write_text(text)
    command = [sys.executable, "script.py"]
    payload = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout
    command = [sys.executable, "worker.py"]
    done = subprocess.run(command, cwd=tmp_path, input=payload, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    batches = "Batch [[0, 1, 2, 3], [4, 5, 6, 7]]"
    assert done.stdout.decode().splitlines() == [batches] * 3 + ["<class '__main__.Batch'>"]


def test_names_of_the_run_before_are_forgotten_and_those_of_python_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"__name__": "__main__", "args": 1}
    monkeypatch.setattr(main_module, "_adopted", None)
    monkeypatch.setitem(sys.modules, "__main__", type("Main", (), {}))
    monkeypatch.setattr(main_module, "vars", lambda _: known, raising=False)
    main_module.adopt({"Net": int, "args": str})
    assert known == {"__name__": "__main__", "args": 1, "Net": int}
    main_module.adopt({"Other": float})
    assert known == {"__name__": "__main__", "args": 1, "Other": float}


def test_the_scripts_own_process_needs_no_other_context() -> None:
    assert main_module.make_context(None) is None
