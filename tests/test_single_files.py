"""Checkpoints of one file: where they come from, what reads them, and what user code puts into them."""

from __future__ import annotations

import io
import logging
import os
import pathlib
import uuid
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import raylight as pl
from raylight import command as cli
from raylight.contract.errors import CheckpointCorrupt, CheckpointMismatch, InvalidArguments, MissingFile
from raylight.user.checkpoint_io import CheckpointIO, TorchCheckpointIO
from raylight.worker.checkpoint.lightning_file import find_left_out, make_from_saved
from tests.faults_storage import uri_at

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
LOADER = DataLoader(torch.arange(16.0).reshape(8, 2), batch_size=2)


class Net(pl.Module):
    def __init__(self, width: int = 1, factor: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(2, width)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.hparams.factor * self.net(batch).square().mean() * 1e-3

    def test_step(self, batch: Tensor) -> None:
        self.log("test_loss", self.net(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.1)


class Theirs(pytorch_lightning.LightningModule):
    def __init__(self, width: int = 1, factor: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(2, width)


def make_trainer(path: Path, **arguments: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return pl.Trainer(**{"num_workers": 0, "use_gpu": False, "max_epochs": 1, "storage_path": path} | quiet | arguments)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[pl.Trainer, Net]:
    trainer, net = make_trainer(tmp_path), Net(3, 2.0)
    trainer.fit(net, LOADER)
    return trainer, net


# ---- written


def test_export_writes_what_lightning_loads(tmp_path: Path, trained: tuple[pl.Trainer, Net]) -> None:
    trainer, net = trained
    assert trainer.result is not None
    assert trainer.result.path is not None
    assert cli.main(["export", trainer.result.path, str(tmp_path / "model.ckpt"), "--which", "last"]) == 0
    loaded = Theirs.load_from_checkpoint(tmp_path / "model.ckpt")
    assert loaded.hparams == {"width": 3, "factor": 2.0}
    assert torch.equal(loaded.net.weight, net.net.weight)
    content = torch.load(tmp_path / "model.ckpt")
    assert content["optimizer_states"][0]["state"][0]["step"] == trainer.global_step


class Failing(io.RawIOBase):
    def __reduce__(self) -> Any:
        raise RuntimeError("this one cannot be saved")


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model.ckpt"
    TorchCheckpointIO().save_checkpoint({"state_dict": {"a": torch.ones(3)}}, path)
    with pytest.raises(RuntimeError, match="cannot be saved"):
        TorchCheckpointIO().save_checkpoint({"state_dict": {"a": torch.zeros(3)}, "b": Failing()}, path)
    assert os.listdir(path.parent) == ["model.ckpt"]
    assert torch.equal(TorchCheckpointIO().load_checkpoint(path)["state_dict"]["a"], torch.ones(3))
    TorchCheckpointIO().remove_checkpoint(path)
    assert os.listdir(path.parent) == []


def test_a_uri_of_storage(s3_port: int, tmp_path: Path, trained: tuple[pl.Trainer, Net]) -> None:
    trainer, net = trained
    uri = uri_at(s3_port, f"{uuid.uuid4().hex}/model.ckpt")
    trainer.save_checkpoint(uri)
    assert torch.equal(Net.load_from_checkpoint(uri).net.weight, net.net.weight)
    further = make_trainer(tmp_path, max_epochs=2)
    further.fit(Net(3, 2.0), LOADER, ckpt_path=uri)
    assert further.global_step == 2 * trainer.global_step


# ---- read


def test_every_kind_of_checkpoint_gives_the_module(tmp_path: Path, trained: tuple[pl.Trainer, Net]) -> None:
    trainer, net = trained
    path = tmp_path / "weights.bin"  # whatever its name
    trainer.save_checkpoint(path)
    assert trainer.result is not None
    native = trainer.result.last_checkpoint
    assert native is not None
    with open(path, "rb") as opened:
        for source in (path, str(path), f"file://{path}", opened, io.BytesIO(path.read_bytes()), native, native.path):
            loaded = Net.load_from_checkpoint(source)
            assert torch.equal(loaded.net.weight, net.net.weight), source
            assert loaded.hparams == {"width": 3, "factor": 2.0}, source
    for source in (path, io.BytesIO(path.read_bytes()), native, native.path):
        further = make_trainer(tmp_path, max_epochs=2)
        further.fit(Net(3, 2.0), LOADER, ckpt_path=source)
        assert further.global_step == 2 * trainer.global_step, source
    with pytest.raises(InvalidArguments, match="opened for reading bytes"):
        Net.load_from_checkpoint(7)
    with pytest.raises(InvalidArguments, match="opened for reading bytes"):
        make_trainer(tmp_path).fit(Net(), LOADER, ckpt_path=io.StringIO("text"))
    with pytest.raises(MissingFile):
        Net.load_from_checkpoint(tmp_path / "nothing.ckpt")


def test_the_hyperparameters_of_a_file(tmp_path: Path, trained: tuple[pl.Trainer, Net]) -> None:
    trained[0].save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "hparams.yaml").write_text("width: 3\nfactor: 5\n")
    (tmp_path / "tags.csv").write_text("key,value\nwidth,3\nfactor,7.5\n")
    for name, factor in (("hparams.yaml", 5), ("tags.csv", 7.5)):
        ours = Net.load_from_checkpoint(tmp_path / "a.ckpt", hparams_file=tmp_path / name)
        theirs = Theirs.load_from_checkpoint(tmp_path / "a.ckpt", hparams_file=tmp_path / name)
        assert ours.hparams == theirs.hparams == {"width": 3, "factor": factor}
    again = Net.load_from_checkpoint(tmp_path / "a.ckpt", hparams_file=tmp_path / "tags.csv", factor=9)
    assert again.hparams.factor == 9
    with pytest.raises(InvalidArguments, match=r"must end in \.yaml, \.yml, \.csv"):
        Net.load_from_checkpoint(tmp_path / "a.ckpt", hparams_file=tmp_path / "a.json")


def test_strict_and_map_location(tmp_path: Path, trained: tuple[pl.Trainer, Net]) -> None:
    class Wider(Net):
        def __init__(self, width: int = 1, factor: float = 1.0) -> None:
            super().__init__(width, factor)
            self.more = nn.Linear(1, 1)

    trained[0].save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointMismatch, match=r"more\.weight"):
        Wider.load_from_checkpoint(tmp_path / "a.ckpt")
    loaded = Wider.load_from_checkpoint(tmp_path / "a.ckpt", strict=False, map_location="cpu")
    assert torch.equal(loaded.net.weight, trained[1].net.weight)
    places: list[str] = []

    def place(storage: Any, location: str) -> Any:
        places.append(location)
        return storage

    Net.load_from_checkpoint(tmp_path / "a.ckpt", map_location=place)
    assert set(places) == {"cpu"}
    Wider.strict_loading = False
    with pytest.raises(InvalidArguments, match="contradict"):
        Wider.load_from_checkpoint(tmp_path / "a.ckpt", strict=True)


def test_weights_alone_are_no_start_of_a_fit(tmp_path: Path, trained: tuple[pl.Trainer, Net]) -> None:
    trained[0].save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    with pytest.raises(CheckpointMismatch, match="holds weights alone"):
        make_trainer(tmp_path).fit(Net(3), LOADER, ckpt_path=tmp_path / "a.ckpt")
    (results,) = make_trainer(tmp_path).test(Net(3), LOADER, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert results.keys() == {"test_loss"}
    (tmp_path / "b.ckpt").write_bytes(b"nonsense")
    with pytest.raises(CheckpointCorrupt, match=r"b\.ckpt"):
        make_trainer(tmp_path).fit(Net(3), LOADER, ckpt_path=tmp_path / "b.ckpt")


# ---- what user code puts into a checkpoint


class Vocabulary:
    """Plain to nobody but its own code."""

    def __init__(self, words: list[str]) -> None:
        self.words = words


class Speaking(Net):
    def __init__(self, width: int = 1) -> None:
        super().__init__(width)
        self.vocabulary = Vocabulary(["a", "b"])
        self.asks = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["vocabulary"] = self.vocabulary
        checkpoint["step_twice"] = 2 * self.global_step
        checkpoint["function"] = lambda: None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["step_twice"] == 2 * checkpoint["global_step"]
        if self.asks:
            self.vocabulary = checkpoint["vocabulary"]


class Keeping(pl.Callback):
    def __init__(self) -> None:
        self.kept: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"kept": Vocabulary(["c"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = state_dict["kept"]


class Silent(Speaking):
    def __init__(self, width: int = 1) -> None:
        super().__init__(width)
        self.asks = False


@pytest.mark.parametrize("kind", ["native", "file", "hook"])
def test_what_needs_code_is_kept_apart(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Saving(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "hook.ckpt")

    trainer = make_trainer(tmp_path, callbacks=[Keeping(), Saving()])
    result = trainer.fit(Speaking(), LOADER)  # and does not die of it
    assert "'function' is not in the checkpoints" in capsys.readouterr().out
    assert result.last_checkpoint is not None
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    path = result.last_checkpoint.path if kind == "native" else tmp_path / f"{kind}.ckpt"
    if kind != "native":
        assert torch.load(path)["step_twice"] == 2 * trainer.global_step  # opens without running anything
    with pytest.raises(CheckpointMismatch, match=r"'vocabulary'.*weights_only=False"):
        Speaking.load_from_checkpoint(path)
    assert Silent.load_from_checkpoint(path).vocabulary.words == ["a", "b"]
    assert Speaking.load_from_checkpoint(path, weights_only=False).vocabulary.words == ["a", "b"]
    with pytest.raises(CheckpointMismatch, match=r"Keeping.*weights_only=False"):
        make_trainer(tmp_path, max_epochs=2, callbacks=[Keeping()]).fit(Silent(), LOADER, ckpt_path=path)
    keeping = Keeping()
    again = make_trainer(tmp_path, max_epochs=2, callbacks=[keeping])
    again.fit(Speaking(), LOADER, ckpt_path=path, weights_only=False)
    assert keeping.kept.words == ["c"]
    assert again.global_step == 2 * trainer.global_step


def test_a_file_of_lightnings_that_runs_code_says_how_to_load_it(tmp_path: Path) -> None:
    content = {
        "state_dict": Net().state_dict(), "epoch": 1, "global_step": 4, "pytorch-lightning_version": "2.6.0",
        "vocabulary": Vocabulary(["x"]), "hyper_parameters": {"width": 1},
    }  # fmt: skip
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointCorrupt, match=r"Vocabulary.*weights_only=False"):
        Net.load_from_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointCorrupt, match=r"weights_only=False"):
        make_trainer(tmp_path).test(Net(), LOADER, ckpt_path=tmp_path / "a.ckpt")
    assert Net.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=False).hparams.width == 1
    make_trainer(tmp_path).test(Net(), LOADER, ckpt_path=tmp_path / "a.ckpt", weights_only=False, verbose=False)


class Rich(pl.Module):
    def __init__(self, folder: pathlib.Path, activation: type = nn.ReLU) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.001)


def test_hyperparameters_with_types_come_back_and_are_plain_for_lightning(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    result = trainer.fit(Rich(pathlib.Path("a/b"), nn.Tanh), LOADER)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Rich.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.hparams == {"folder": pathlib.Path("a/b"), "activation": nn.Tanh}
    assert torch.load(tmp_path / "a.ckpt")["hyper_parameters"] == {"folder": "a/b"}
    assert result.last_checkpoint is not None
    assert find_left_out(make_from_saved(result.last_checkpoint)) == ["activation"]


# ---- plugins


class Recording(CheckpointIO):
    """Holds files in memory, and knows no path of a disk."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Any]] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.files[str(path)] = {**checkpoint, "options": storage_options}

    def load_checkpoint(self, path: Any, map_location: Any = None) -> dict[str, Any]:
        return self.files[str(path)]

    def remove_checkpoint(self, path: Any) -> None:
        del self.files[str(path)]


class TheirRecording(pytorch_lightning.plugins.TorchCheckpointIO):
    """Written for Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.calls.append("save")
        super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        self.calls.append("load")
        return super().load_checkpoint(path, map_location, weights_only)


def test_a_checkpoint_io_of_the_users_writes_and_reads_the_files(tmp_path: Path) -> None:
    class Saving(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
            trainer.save_checkpoint("memory://one", storage_options={"fast": True})

    plugin = Recording()
    trainer = make_trainer(tmp_path, plugins=[plugin], callbacks=[Saving()])
    trainer.fit(Net(), LOADER)
    trainer.save_checkpoint("two.ckpt")
    assert plugin.files.keys() == {"memory://one", "two.ckpt"}
    assert plugin.files["memory://one"]["options"] == {"fast": True}
    assert trainer.strategy.checkpoint_io is plugin
    further = make_trainer(tmp_path, plugins=plugin, max_epochs=2)
    further.fit(Net(), LOADER, ckpt_path="memory://one")
    assert further.global_step == 2 * trainer.global_step
    trainer.strategy.checkpoint_io.remove_checkpoint("two.ckpt")
    assert plugin.files.keys() == {"memory://one"}


def test_a_checkpoint_io_that_was_written_for_lightning(tmp_path: Path) -> None:
    plugin: Any = TheirRecording()
    trainer = make_trainer(tmp_path, plugins=[plugin])
    trainer.fit(Net(), LOADER)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    make_trainer(tmp_path, plugins=[plugin], max_epochs=2).fit(Net(), LOADER, ckpt_path=tmp_path / "a.ckpt")
    assert plugin.calls[0] == "save"
    assert set(plugin.calls[1:]) == {"load"}
    with pytest.raises(InvalidArguments, match="one CheckpointIO is enough"):
        make_trainer(tmp_path, plugins=[plugin, Recording()])


# ---- on workers


@pytest.mark.usefixtures("ray_cluster")
def test_files_of_two_workers(tmp_path: Path) -> None:
    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    two = {"num_workers": 2, "num_standby": 0, "max_epochs": 2}
    trainer, net = make_trainer(tmp_path, callbacks=[Saving()], seed=3, **two), Net(3)
    trainer.fit(net, LOADER)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert torch.equal(torch.load(tmp_path / "end.ckpt")["state_dict"]["net.weight"], net.net.weight)
    middle = torch.load(tmp_path / "middle.ckpt")
    assert middle["global_step"] == 3
    assert len(middle["raylight"]["own"]) == 2
    for num_workers in (2, 0):
        again, further = Net(3), make_trainer(tmp_path, **(two | {"num_workers": num_workers}))
        further.fit(again, LOADER, ckpt_path=tmp_path / "middle.ckpt")
        if num_workers == 2:  # of one worker, what is left of an epoch has more steps
            assert further.global_step == trainer.global_step
            assert torch.equal(again.net.weight, net.net.weight)
    theirs = Theirs.load_from_checkpoint(tmp_path / "end.ckpt")
    assert torch.equal(theirs.net.weight, net.net.weight)
