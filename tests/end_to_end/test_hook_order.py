"""Hooks are called in Lightning's order, hook for hook.

hook_order.json was recorded by this file's `record` over pytorch_lightning 2.6 with the same module and data.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl

EXPECTED = json.loads((Path(__file__).parent / "hook_order.json").read_text())
STATE_METHODS = {"state_dict", "load_state_dict"}


def record(base: type, label: str, calls: list[str]) -> type:
    """A subclass of `base` that notes each hook's call before passing it on."""
    named = {name for hooks in EXPECTED.values() for name in (h.split(".")[1] for h in hooks if h.startswith(label))}

    def noted(name):
        def hook(self, *arguments, **keywords):
            calls.append(f"{label}.{name}")
            return getattr(super(recorder, self), name)(*arguments, **keywords)

        return hook

    recorder = type("Recorder", (base,), {name: noted(name) for name in named})
    return recorder


class Net(pl.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).mean()

    def validation_step(self, batch, batch_idx):
        self.log("v", self.layer(batch[0]).mean())

    def test_step(self, batch, batch_idx):
        self.log("t", self.layer(batch[0]).mean())

    def predict_step(self, batch, batch_idx):
        return self.layer(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(4, 4)), batch_size=2)

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(2, 4)), batch_size=2)

    test_dataloader = predict_dataloader = val_dataloader


@pytest.fixture
def recorded(tmp_path):
    calls: list[str] = []
    module = record(Net, "module", calls)()
    callback = record(pl.Callback, "callback", calls)()
    trainer = pl.Trainer(
        num_workers=0, use_gpu=False, max_epochs=2, callbacks=[callback], gradient_clip_val=1.0, logger=False,
        storage_path=str(tmp_path), enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    return module, trainer, calls


def in_lightnings_words(calls: list[str]) -> list[str]:
    """The state_dict of a callback is not a hook, and the last checkpoint's state is read once more at the end."""
    return [call for call in calls if call.split(".")[1] not in STATE_METHODS]


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_order_is_lightnings(recorded, stage):
    module, trainer, calls = recorded
    getattr(trainer, stage)(module)
    assert in_lightnings_words(calls) == in_lightnings_words(EXPECTED[stage])
