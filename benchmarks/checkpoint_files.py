"""What ModelCheckpoint's file costs the training loop beside the native checkpoint that it is made of.

A fit of 201 MB of weights with Adam (604 MB of state) in this process, with two saves, of which the second is measured:
the first makes raylight's buffers. Blocked is how much longer the step of the save took than the median of those before
any; lost is how much later the steps after it were all done. Modes take turns, so that a drift of the machine falls on
all.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import warnings
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import raylight as pl

WIDTH, NUM_LAYERS, BATCH_SIZE = 2048, 12, 16
FIRST, SAVE_EVERY, NUM_STEPS = 5, 20, 58
MODES = ("nothing", "native", "native and file", "Lightning")


def make_net(base: type) -> Any:
    class Net(base):
        def __init__(self) -> None:
            super().__init__()
            layers = [layer for _ in range(NUM_LAYERS) for layer in (nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU())]
            self.net = nn.Sequential(*layers)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-4, fused=True)

    return Net()


def make_clock(base: type, times: list[float]) -> Any:
    class Clock(base):
        def on_train_batch_start(self, *_: Any) -> None:
            times.append(perf_counter())

    return Clock()


def measure(mode: str, folder: Path) -> dict[str, float]:
    """Seconds of one fit."""
    library: Any = lightning if mode == "Lightning" else pl
    times: list[float] = []
    callbacks = [make_clock(library.Callback, times)]
    if mode in ("native and file", "Lightning"):
        kind = library.callbacks.ModelCheckpoint
        callbacks.append(kind(folder / "files", every_n_train_steps=SAVE_EVERY, save_top_k=-1))
    options: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "max_steps": NUM_STEPS, "max_epochs": -1, "default_root_dir": str(folder), "callbacks": callbacks,
    }  # fmt: skip
    if library is pl:
        options |= {"num_workers": 0, "checkpoint": mode != "nothing" and pl.Checkpointing(every_n_steps=SAVE_EVERY)}
    net = make_net(library.LightningModule)
    loader = DataLoader(torch.randn(NUM_STEPS * BATCH_SIZE, WIDTH), batch_size=BATCH_SIZE)
    library.Trainer(**options).fit(net, loader)
    steps = [after - before for before, after in pairwise(times)]
    usual = statistics.median(steps[FIRST : SAVE_EVERY - 1])
    behind = steps[2 * SAVE_EVERY - 1 :]
    return {"blocked": max(behind[:2]) - usual, "lost": sum(behind) - usual * len(behind), "step": usual}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="on the disk to measure")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for _ in range(arguments.rounds):
        for mode in MODES:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                found[mode].append(measure(mode, Path(folder)))
    for mode, rounds in found.items():
        print(json.dumps({"mode": mode} | {
            name: round(statistics.median(one[name] for one in rounds), 4) for name in rounds[0]
        }))  # fmt: skip


if __name__ == "__main__":
    main()
