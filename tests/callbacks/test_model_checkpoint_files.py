"""ModelCheckpoint's files in a run: where they lie, when they are there, and what a failure leaves of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

import raylight as pl
from raylight.callbacks import Callback, LambdaCallback, ModelCheckpoint
from raylight.storage import single_file
from raylight.user.checkpoint_io import TorchCheckpointIO
from tests.faults_storage import uri_at


def names_in(folder: str | Path) -> list[str]:
    return sorted(path.name for path in Path(folder).glob("*.ckpt"))


def test_they_lie_beside_raylights_own_checkpoints(fit, make_net):
    callback = ModelCheckpoint(save_top_k=-1, save_last=True)
    trainer = fit(make_net(), callback, max_epochs=2)
    folder = Path(trainer.log_dir, "checkpoints")
    assert callback.dirpath == str(folder)
    assert names_in(folder) == ["epoch=0-step=6.ckpt", "epoch=1-step=12.ckpt", "last.ckpt"]
    assert [checkpoint.step for checkpoint in trainer.result.checkpoints] == [12]  # the best and the last
    assert pl.open_run(trainer.config.storage_path).last.step == 12
    content = torch.load(callback.best_model_path, weights_only=True)
    assert content["state_dict"].keys() == make_net().state_dict().keys()
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_a_second_fit_has_a_directory_of_its_own(fit, make_net):
    callback = ModelCheckpoint()
    first = fit(make_net(), callback, max_epochs=1)
    second = fit(make_net(), callback, max_epochs=1)
    assert first.log_dir != second.log_dir
    assert callback.best_model_path == f"{second.log_dir}/checkpoints/epoch=0-step=6.ckpt"


def test_a_directory_that_is_not_empty_is_told(fit, make_net, tmp_path, capsys):
    for _ in range(2):
        fit(make_net(), ModelCheckpoint(tmp_path / "mine"), max_epochs=1)
    assert names_in(tmp_path / "mine") == ["epoch=0-step=6-v1.ckpt", "epoch=0-step=6.ckpt"]
    assert " ".join(capsys.readouterr().out.split()).count("is not empty") == 1


def test_hooks_at_the_end_find_them(fit, make_net):
    found = []

    def look(trainer: Any, module: Any) -> None:
        found.append(torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["global_step"])

    fit(make_net(), ModelCheckpoint(), LambdaCallback(on_train_end=look, on_fit_end=look), max_epochs=2)
    assert found == [12, 12]


def test_the_best_is_the_file(fit, make_net):
    callback = ModelCheckpoint(monitor="train_loss", mode="max", every_n_train_steps=1)
    trainer = fit(make_net(), callback, max_epochs=1)
    best = torch.load(callback.best_model_path, weights_only=True)
    assert best["global_step"] < trainer.global_step
    loaded: dict[str, Any] = {}
    trainer.callbacks.append(LambdaCallback(on_test_start=lambda trainer, net: loaded.update(net.state_dict())))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 4), torch.ones(4, 1)))
    trainer.test(make_net(), loader, ckpt_path="best", verbose=False)
    assert all(torch.equal(loaded[name], value) for name, value in best["state_dict"].items())


def test_a_run_that_goes_on_knows_the_best_so_far(fit, make_net, tmp_path):
    def make(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / folder, monitor="train_loss", save_top_k=3, save_last=True)

    whole, first, second = make("whole"), make("parts"), make("parts")
    fit(make_net(), whole, max_epochs=5, name="whole")
    fit(make_net(), first, max_epochs=2, name="parts")
    fit(make_net(), second, max_epochs=5, name="parts", resume="last")
    assert names_in(tmp_path / "parts") == names_in(tmp_path / "whole")
    for name, value in whole.state_dict().items():
        assert str(value).replace("/whole", "/parts") == str(second.state_dict()[name]), name


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    made = Gate()
    monkeypatch.setattr("raylight.execution.find_checkpoint_io", lambda plugins: made)
    return made


class Gate(TorchCheckpointIO):
    """Writes no file until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.wrote: list[str] = []
        self.removed: list[str] = []
        self.broken = ""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        assert self.opened.wait(60)
        if self.broken and self.broken in path:
            raise OSError(28, "No space left on device")
        self.wrote.append(Path(path).name)
        super().save_checkpoint(checkpoint, path)

    def remove_checkpoint(self, path: Any) -> None:
        self.removed.append(Path(path).name)
        super().remove_checkpoint(path)


class Opens(Callback):
    def __init__(self, gate: Gate, step: int):
        self.gate, self.step, self.folders = gate, step, 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.folders = len(list(Path(trainer.log_dir, "checkpoints").glob("step-*/manifest.json")))
            self.gate.opened.set()


def test_training_goes_on_while_they_are_written(fit, make_net, gate):
    """The first write waits for a step that comes long after it was asked for."""
    opens = Opens(gate, 20)
    callback = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, monitor="train_loss")
    trainer = fit(make_net(), callback, opens, checkpoint={"every_n_epochs": 9})
    expected = [f"epoch={(step - 1) // 6}-step={step}.ckpt" for step in range(2, 25, 2)]
    assert gate.wrote == expected
    assert sorted(expected) == names_in(callback.dirpath)
    assert opens.folders >= 6, "what a file is still made of is not deleted"
    assert len(trainer.result.checkpoints) <= 2


def test_a_file_that_is_not_needed_any_more_is_not_written(fit, make_net, gate):
    callback = ModelCheckpoint(every_n_train_steps=2, save_last="link")
    fit(make_net(), callback, Opens(gate, 20))
    assert gate.wrote[0] == "epoch=0-step=2.ckpt"
    assert gate.wrote[-1] == "epoch=3-step=24.ckpt"
    assert len(gate.wrote) < 10
    assert names_in(callback.dirpath) == ["epoch=3-step=24.ckpt", "last.ckpt"]
    assert os.readlink(callback.last_model_path) == "epoch=3-step=24.ckpt"


def test_one_that_cannot_be_written_leaves_the_one_before(fit, make_net, gate, capsys):
    gate.opened.set()
    gate.broken = "step=24"
    callback = ModelCheckpoint()
    trainer = fit(make_net(), callback)
    assert trainer.result.status == "finished"
    assert names_in(callback.dirpath) == ["epoch=2-step=18.ckpt"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "epoch=3-step=24.ckpt was not written: " in printed
    assert "No space left on device" in printed
    assert "epoch=2-step=18.ckpt stays, because what takes its place was not written" in printed
    assert gate.removed == ["epoch=0-step=6.ckpt", "epoch=1-step=12.ckpt"]


def test_on_remote_storage(fit, make_net, s3_port):
    s3_uri = uri_at(s3_port, uuid.uuid4().hex)
    callback = ModelCheckpoint(save_last=True, monitor="val_loss")
    trainer = fit(make_net(), callback, max_epochs=2, storage_path=s3_uri)
    assert callback.best_model_path.startswith(trainer.log_dir.partition("?")[0])
    best = torch.load(single_file.open_read(callback.best_model_path), weights_only=True)
    assert best["global_step"] == 12
    other = ModelCheckpoint(save_last=True, monitor="val_loss")
    again = fit(make_net(), other, max_epochs=3, storage_path=s3_uri, resume="last")
    assert again.log_dir == trainer.log_dir
    assert other.last_model_path == callback.last_model_path


KILLED = """
import os, sys, time, torch
import raylight as pl
from raylight.storage import local_files
from tests.callbacks.conftest import Net, make_data

write = local_files.LocalSink.write

def stop_in_the_middle(sink, view):
    write(sink, view)
    if "step=12" in sink._path:
        print("writing", flush=True)
        time.sleep(600)

local_files.LocalSink.write = stop_in_the_middle
loader = torch.utils.data.DataLoader(make_data(), batch_size=8)
callback = pl.callbacks.ModelCheckpoint(save_top_k=-1, save_last=True)
pl.fit(Net(), loader, loader, callbacks=[callback], max_epochs=2, num_workers=0, storage_path=sys.argv[1], seed=3,
       enable_progress_bar=False, enable_model_summary=False)
"""


def test_a_kill_in_the_middle_of_a_file_leaves_none_and_the_run_that_goes_on_makes_it(fit, make_net, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert process.stdout is not None
    assert any(line == "writing\n" for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = tmp_path / "default" / "version_0" / "checkpoints"
    assert names_in(folder) == ["epoch=0-step=6.ckpt", "last.ckpt"]
    assert {torch.load(folder / name)["global_step"] for name in names_in(folder)} == {6}
    callback = ModelCheckpoint(save_top_k=-1, save_last=True)
    fit(make_net(), callback, resume="last", max_epochs=3)
    assert names_in(folder) == ["epoch=0-step=6.ckpt", "epoch=1-step=12.ckpt", "epoch=2-step=18.ckpt", "last.ckpt"]
    assert [torch.load(folder / name)["global_step"] for name in names_in(folder)] == [6, 12, 18, 18]


def test_a_metric_of_later_epochs_is_waited_for(fit, make_net):
    """Another one saves each epoch meanwhile, and it is no mistake that the metric is not there yet."""

    class Net(make_net):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch % 2:
                self.log("rare", float(self.current_epoch))

    rare = ModelCheckpoint(monitor="rare", every_n_epochs=2, filename="{rare:.0f}", save_top_k=-1)
    fit(Net(), ModelCheckpoint(filename="new"), rare)
    assert names_in(rare.dirpath) == ["new.ckpt", "rare=1.ckpt", "rare=3.ckpt"]


def test_a_metric_that_is_never_logged_is_an_error_once_there_was_a_validation(fit, make_net):
    text = "ModelCheckpoint monitors 'val_los', which was never logged; .*did you mean 'val_loss'"
    with pytest.raises(pl.InvalidArguments, match=text):
        fit(make_net(), ModelCheckpoint(monitor="val_los"))
