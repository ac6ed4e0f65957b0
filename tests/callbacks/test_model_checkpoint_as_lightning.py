"""The same fit under Lightning and raylight leaves the same files, paths, scores and tables of the best."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl

Options = dict[str, Any]
ROUNDED = 5


def make_net(base: type) -> Any:
    class Net(base):
        """Logs a score that goes up and down, whatever it learns."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layer = nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = nn.functional.mse_loss(self.layer(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", torch.sin(torch.tensor(1.7 * self.trainer.global_step)))
            self.log("val/acc", torch.tensor(float(self.trainer.global_step % 7)))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return Net()


def make_loader(batch_size: int) -> DataLoader:
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=batch_size)


def make_callback(kind: type, root: Path, options: Options) -> Any:
    names = {name: value for name, value in options.items() if name.isupper() or callable(value)}
    arguments = {name: value for name, value in options.items() if name not in names}
    return type("ModelCheckpoint", (kind,), names)(root / "files", **arguments)


def run(library: Any, root: Path, callbacks: list[Options], trainer: Options, fails_at: int | None = None) -> Options:
    """What is left of a fit. `fails_at`: a batch in front of which user code raises."""
    made = [make_callback(library.callbacks.ModelCheckpoint, root, options) for options in callbacks]

    class Failing(library.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == fails_at:
                raise ValueError("on purpose")

    options: Options = {
        "max_epochs": 3,
        "default_root_dir": str(root / "runs"),
        "logger": False,
        "log_every_n_steps": 1,
    }
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    options |= {"num_workers": 0} if library is pl else {"accelerator": "cpu"}
    fitting = library.Trainer(callbacks=[Failing(), *made], **options | trainer)
    net = make_net(pl.Module if library is pl else lightning.LightningModule)
    try:
        fitting.fit(net, make_loader(8), make_loader(16))
    except ValueError:
        assert fails_at is not None
    return {"files": read_files(root), "callbacks": [read_callback(callback, root) for callback in made]}


def read_files(root: Path) -> Options:
    """Of each file: epoch, step, whether it is a link, weights, and the state of the callback that wanted it.

    The states of the others are those after the step; Lightning's file has those before, of callbacks that come later.
    """
    found = {}
    for path in sorted((root / "files").rglob("*")):
        if path.is_file():
            content = torch.load(path, weights_only=False)
            states = [relative(state, root) for state in content.get("callbacks", {}).values()]
            own = [state for state in states if relative(str(path), root) in str(state)][:1]
            weights = [round(value, ROUNDED) for value in content["state_dict"]["layer.weight"].flatten().tolist()]
            place = content["epoch"], content["global_step"], path.is_symlink()
            found[str(path.relative_to(root))] = *place, weights, own
    return found


def read_callback(callback: Any, root: Path) -> Options:
    return {"key": callback.state_key, **relative(callback.state_dict(), root)}


def relative(value: Any, root: Path) -> Any:
    if isinstance(value, dict):
        return {relative(key, root): relative(item, root) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return round(value.item(), ROUNDED)
    return os.path.relpath(value, root) if isinstance(value, str) and value.startswith(str(root)) else value


def compare(tmp_path: Path, callbacks: list[Options], trainer: Options, fails_at: int | None = None) -> Options:
    theirs = run(lightning, tmp_path / "theirs", callbacks, trainer, fails_at)
    ours = run(pl, tmp_path / "ours", callbacks, trainer, fails_at)
    assert ours == theirs
    return ours


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pytorch_lightning", "lightning.pytorch"):
        monkeypatch.setattr(logging.getLogger(name), "disabled", True)


pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, of loaders and directories

BEST: Options = {"monitor": "val_loss"}
ALL: Options = {**BEST, "save_top_k": -1}


@pytest.mark.parametrize(
    ("options", "trainer"),
    [
        ({}, {}),
        (BEST, {}),
        ({**BEST, "save_top_k": 2}, {"max_epochs": 6}),
        (ALL, {"num_sanity_val_steps": 0}),
        ({**BEST, "save_top_k": 0}, {}),
        ({**BEST, "save_top_k": 3, "mode": "max", "save_last": True}, {"max_epochs": 7}),
        ({**BEST, "save_top_k": 2, "save_last": "link"}, {"max_epochs": 5}),
        ({"save_last": True}, {}),
        ({"save_top_k": -1, "save_last": "link"}, {}),
        ({"save_top_k": 0, "save_last": True}, {}),
        ({"save_weights_only": True}, {}),
        (BEST, {"fast_dev_run": True}),
        ({"save_top_k": -1}, {"limit_val_batches": 0}),
    ],
)
def test_which_are_kept(tmp_path, options, trainer):
    compare(tmp_path, [options], trainer)


@pytest.mark.parametrize(
    ("options", "trainer"),
    [
        ({"every_n_train_steps": 4}, {}),
        ({"every_n_train_steps": 4, "save_top_k": -1}, {}),
        ({"every_n_train_steps": 6, "save_top_k": -1, "save_last": True}, {}),
        ({"every_n_train_steps": 4, "monitor": "train_loss", "save_top_k": 2}, {}),
        ({"every_n_train_steps": 4, **BEST, "save_top_k": 2}, {}),
        ({"every_n_train_steps": 3, **ALL, "save_on_train_epoch_end": False}, {"max_epochs": 4}),
        ({"every_n_train_steps": 4, "save_top_k": -1}, {"max_steps": 8, "max_epochs": -1}),
        ({"every_n_train_steps": 2, "save_top_k": -1}, {"accumulate_grad_batches": 2}),
        ({"every_n_epochs": 2, "save_top_k": -1}, {"max_epochs": 5}),
        ({"every_n_epochs": 2, **BEST, "save_top_k": 2}, {"max_epochs": 6}),
        ({"every_n_epochs": 0, "save_last": True}, {}),
        ({"train_time_interval": timedelta(0), "save_top_k": -1}, {}),
        ({"train_time_interval": timedelta(0), "save_top_k": -1}, {"accumulate_grad_batches": 2, "max_epochs": 1}),
        ({"train_time_interval": timedelta(days=1), "save_last": True}, {}),
        ({}, {"max_steps": 8, "max_epochs": -1}),
        ({"save_last": True, "save_top_k": -1}, {"max_steps": 8, "max_epochs": -1}),
        ({**ALL, "save_on_train_epoch_end": True}, {}),
        ({**ALL, "save_on_train_epoch_end": False}, {}),
        (ALL, {"val_check_interval": 2}),
        (ALL, {"val_check_interval": 0.5, "max_epochs": 2}),
        (ALL, {"val_check_interval": 3, "accumulate_grad_batches": 2, "max_epochs": 2}),
        (ALL, {"check_val_every_n_epoch": 2, "max_epochs": 5}),
        ({"save_top_k": -1}, {"check_val_every_n_epoch": 2, "max_epochs": 5}),
    ],
)
def test_when_they_are_made(tmp_path, options, trainer):
    compare(tmp_path, [options], trainer)


@pytest.mark.parametrize(
    ("options", "trainer"),
    [
        ({**BEST, "filename": "{epoch:02d}-{val_loss:.2f}", "save_top_k": 2}, {"max_epochs": 4}),
        ({"monitor": "val/acc", "filename": "e{epoch}-{val/acc:.1f}", "save_top_k": -1}, {}),
        ({"monitor": "val/acc", "filename": "{val/acc:.1f}", "auto_insert_metric_name": False, "save_top_k": -1}, {}),
        ({"filename": "same", "save_top_k": -1}, {}),
        ({"filename": "same", "save_top_k": -1, "enable_version_counter": False}, {}),
        ({**BEST, "filename": "same", "save_top_k": 2}, {"max_epochs": 6}),
        ({**BEST, "filename": "same", "save_top_k": 2, "enable_version_counter": False}, {"max_epochs": 6}),
        ({**BEST, "filename": "x", "save_top_k": 2, "save_last": True}, {"val_check_interval": 2, "max_epochs": 2}),
        (
            {
                "CHECKPOINT_NAME_LAST": "{epoch}-final", "FILE_EXTENSION": ".ck", "CHECKPOINT_EQUALS_CHAR": ":",
                "STARTING_VERSION": 5, "CHECKPOINT_JOIN_CHAR": "_", "save_last": True, "save_top_k": -1,
            },
            {},
        ),
        ({"format_checkpoint_name": lambda self, *_, **__: f"{self.dirpath}/mine.ckpt"}, {}),
    ],
)  # fmt: skip
def test_what_they_are_called(tmp_path, options, trainer):
    compare(tmp_path, [options], trainer)


@pytest.mark.parametrize(
    "callbacks",
    [
        [{**BEST, "save_top_k": 2}, {"every_n_train_steps": 5, "save_top_k": -1, "filename": "s{step}"}],
        [{**BEST, "save_top_k": 2, "save_last": True}, {"monitor": "val/acc", "mode": "max", "save_last": True}],
        [BEST, {"monitor": "train_loss", "filename": "t{step}"}, {"every_n_epochs": 2, "filename": "e{epoch}"}],
    ],
)
def test_several_in_a_run(tmp_path, callbacks):
    compare(tmp_path, callbacks, {"max_epochs": 4})


@pytest.mark.parametrize(
    ("options", "fails_at"),
    [
        ({"save_on_exception": True}, 9),
        ({**BEST, "save_on_exception": True, "save_last": True}, 9),
        ({"save_on_exception": True}, 2),
        ({**BEST, "save_on_exception": True}, 12),
        ({"save_top_k": -1}, 9),
    ],
)
def test_an_exception(tmp_path, options, fails_at):
    compare(tmp_path, [options], {}, fails_at)


def save_twice(callback: Any, trainer: Any, filepath: str) -> None:
    """What a subclass does that wants the file at once."""
    super(type(callback), callback)._save_checkpoint(trainer, filepath)
    content = torch.load(filepath, weights_only=False)
    torch.save(content | {"mine": True}, f"{filepath[:-5]}.more")


def skip_first_epoch(callback: Any, trainer: Any, module: Any) -> None:
    if trainer.current_epoch:
        super(type(callback), callback).on_train_epoch_end(trainer, module)


@pytest.mark.parametrize(
    "methods",
    [
        {"_save_checkpoint": save_twice},
        {"on_train_epoch_end": skip_first_epoch},
        {"_should_remove_checkpoint": lambda *_: False},
        {"check_monitor_top_k": lambda self, trainer, current=None: trainer.current_epoch == 1},
    ],
    ids=lambda methods: next(iter(methods)),
)
def test_a_subclass(tmp_path, methods: dict[str, Callable[..., Any]]):
    left = compare(tmp_path, [{**BEST, **methods}], {})
    assert len([name for name in left["files"] if name.endswith(".more")]) == ("_save_checkpoint" in methods) * 2
