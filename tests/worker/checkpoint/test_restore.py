from __future__ import annotations

import argparse
import os
import pathlib
import pickle
import random
import shutil
import sys
import zipfile
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from raylight.contract.errors import CheckpointCorrupt, CheckpointMismatch, StorageError
from raylight.storage.filesystem import Storage
from raylight.worker.checkpoint.lightning_state import load_lightning
from raylight.worker.checkpoint.restore import (
    apply_weights,
    compare_weights,
    load_any,
    load_state,
    load_weights,
)
from raylight.worker.checkpoint.snapshot import Snapshots, State


@dataclass
class SavedFolder:
    """A checkpoint in a folder; `remote` reads it as if it lay elsewhere."""

    folder: pathlib.Path
    remote: bool = False

    @property
    def path(self) -> str:
        return str(self.folder)

    @property
    def file_names(self) -> tuple[str, ...]:
        return tuple(sorted(path.name for path in self.folder.iterdir()))

    def open_read(self, name: str):
        return Storage(self.folder).open_read(name)

    def local_path(self, name: str) -> str | None:
        return None if self.remote else str(self.folder / name)


def make_net(width: int = 30) -> nn.Module:
    return nn.Sequential(nn.Linear(10, width), nn.BatchNorm1d(width), nn.Linear(width, 3))


def save(folder: pathlib.Path, world_size: int = 1, weights_only: bool = False, net: nn.Module | None = None) -> State:
    """Save a trained net from `world_size` ranks, and return what it was."""
    net = net or make_net()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(4, 10)).sum().backward()
    optimizer.step()
    owned = [*net.parameters(), *(value for values in optimizer.state.values() for value in values.values())]
    state = State()
    for rank in range(world_size):
        state = State(
            model=net.state_dict(),
            replicated={
                "optimizers": [optimizer.state_dict()],
                "callbacks": {"stop": {"best": torch.tensor(0.25), "waits": (1, 2)}},
                "loop": {"step": 7},
            },
            own={"rank": rank, "rng": torch.full((5,), rank)},
            module={"hyper_parameters": {"width": 30}, "extra": {"note": "x"}},
        )
        snapshots = Snapshots(Storage(folder.parent), rank, world_size)
        snapshots.take(folder.name, 7, 0, state, {}, weights_only, owned, wait=True)
        snapshots.close()
    return state


def assert_loaded(loaded: State, saved: State) -> None:
    assert loaded.model.keys() == saved.model.keys()
    for name in saved.model:
        assert torch.equal(loaded.model[name], saved.model[name]), name
    optimizer, expected = loaded.replicated["optimizers"][0], saved.replicated["optimizers"][0]
    assert optimizer["param_groups"] == expected["param_groups"]
    for index, values in expected["state"].items():
        for name, value in values.items():
            assert torch.equal(optimizer["state"][index][name], value), (index, name)
    assert loaded.replicated["loop"] == {"step": 7}
    assert loaded.replicated["callbacks"]["stop"] == {"best": torch.tensor(0.25), "waits": (1, 2)}
    assert loaded.module == saved.module


# ---- loading


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("saved_by", [1, 2, 3, 4])
def test_any_number_of_workers_reads_what_any_number_saved(tmp_path, saved_by, remote):
    folder = tmp_path / "checkpoint"
    expected = save(folder, saved_by)
    for world_size in (1, 2, 3, 4):
        for rank in range(world_size):
            loaded = load_state(SavedFolder(folder, remote), rank, world_size)
            assert_loaded(loaded, expected)
            if world_size == saved_by:
                assert loaded.own["rank"] == rank
                assert torch.equal(loaded.own["rng"], torch.full((5,), rank))
                assert loaded.others == []
            else:
                assert loaded.own == {}
                assert [own["rank"] for own in loaded.others] == list(range(saved_by))


@pytest.mark.parametrize("remote", [False, True])
def test_weights_alone(tmp_path, remote):
    folder = tmp_path / "checkpoint"
    expected = save(folder, 2, weights_only=True)
    saved = SavedFolder(folder, remote)
    state = load_state(saved, 0, 1)
    assert (state.replicated, state.own, state.others) == ({}, {}, [])
    for weights in (state.model, load_weights(saved), load_any(saved).model):
        assert all(torch.equal(weights[name], value) for name, value in expected.model.items())
    assert load_any(saved).module == state.module == expected.module


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("remote", [False, True])
def test_weights_are_mapped_and_training_state_is_memory_of_its_own(tmp_path, remote):
    folder = tmp_path / "checkpoint"
    save(folder, net=nn.Sequential(nn.Linear(10, 1000), nn.Linear(1000, 1000)))
    loaded = load_state(SavedFolder(folder, remote), 0, 1)

    def is_mapped(tensor: torch.Tensor) -> bool:
        for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= tensor.data_ptr() < end:
                return ".pt" in line
        raise AssertionError("not in memory")

    assert is_mapped(loaded.model["1.weight"])
    assert not is_mapped(loaded.replicated["optimizers"][0]["state"][2]["exp_avg"])
    before = {path: path.read_bytes() for path in folder.iterdir()}
    loaded.model["1.weight"].add_(1)  # the mapping is private
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    shutil.rmtree(folder)  # retention may delete what was loaded
    assert loaded.model["1.weight"].sum().isfinite()


def test_reading_from_elsewhere_leaves_no_copy_behind(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    save(folder)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    load_state(SavedFolder(folder, remote=True), 0, 1)
    assert list(scratch.iterdir()) == []


def test_no_room_for_the_copy_says_what_to_do(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    save(folder)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("raylight.worker.checkpoint.restore.shutil.copyfileobj", fail)
    with pytest.raises(StorageError, match="set TMPDIR"):
        load_state(SavedFolder(folder, remote=True), 0, 1)


# ---- damage


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("name", ["model-00001-of-00002.pt", "training-00001-of-00002.pt"])
def test_a_missing_file_is_named(tmp_path, name, remote):
    folder = tmp_path / "checkpoint"
    save(folder, 2)
    (folder / name).unlink()
    with pytest.raises(CheckpointCorrupt, match=name):
        load_state(SavedFolder(folder, remote), 0, 2)


@pytest.mark.parametrize("remote", [False, True])
def test_a_file_that_goes_while_it_is_read_is_named(tmp_path, remote):
    folder = tmp_path / "checkpoint"
    save(folder)

    class Listed(SavedFolder):
        file_names = SavedFolder(folder).file_names

    (folder / "training-00000-of-00001.pt").unlink()
    with pytest.raises(CheckpointCorrupt, match=r"training-00000-of-00001.pt is missing"):
        load_state(Listed(folder, remote), 0, 1)


def test_files_of_two_checkpoints_in_one_are_refused(tmp_path):
    folder = tmp_path / "checkpoint"
    save(folder, 1)
    save(folder, 2)
    with pytest.raises(CheckpointCorrupt, match="of 2 checkpoints"):
        load_state(SavedFolder(folder), 0, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointCorrupt, match="of 0 checkpoints"):
        load_weights(SavedFolder(tmp_path / "empty"))


def test_a_share_that_no_rank_wrote_is_named(tmp_path):
    folder = tmp_path / "checkpoint"
    save(folder)
    path = folder / "training-00000-of-00001.pt"
    content = torch.load(path, weights_only=True)
    lost = next(iter(content["tensors"]))
    del content["tensors"][lost]
    torch.save(content, path)
    with pytest.raises(CheckpointCorrupt) as raised:
        load_state(SavedFolder(folder), 0, 1)
    assert lost in str(raised.value)


def test_damaged_bytes_give_no_other_error(tmp_path):
    """Digests find every flipped bit; this is what happens to those who switch them off."""
    folder = tmp_path / "checkpoint"
    save(folder)
    rng = random.Random(0)
    originals = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    num_found = 0
    for attempt in range(150):
        path = rng.choice(list(originals))
        data = bytearray(originals[path])
        if attempt % 3 == 0:
            data = data[: rng.randrange(len(data))]
        else:
            for _ in range(rng.choice([1, 20])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            load_state(SavedFolder(folder, remote=True), 0, 1)
        except CheckpointCorrupt:
            num_found += 1
        path.write_bytes(originals[path])
    assert num_found > 50  # every cut file, at the least


# ---- nothing in a file is run


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


class Evaluate(Touch):
    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


class System(Touch):
    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def plain_pickle(value, path: pathlib.Path) -> None:
    path.write_bytes(pickle.dumps(value))


def legacy_save(value, path: pathlib.Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def torchscript(value, path: pathlib.Path) -> None:
    """An archive that torch.load would hand to torch.jit."""
    torch.save(value, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{path.stem}/constants.pkl", pickle.dumps(value))


FILES = ["model-00000-of-00001.pt", "training-00000-of-00001.pt", "module.pt"]


@pytest.mark.filterwarnings("ignore:.*TorchScript archive")
@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("write", [torch.save, plain_pickle, legacy_save, torchscript])
@pytest.mark.parametrize("kind", [Touch, Evaluate, System])
@pytest.mark.parametrize("name", FILES)
def test_a_malicious_pickle_in_a_checkpoint_does_not_run(tmp_path, name, kind, write, remote):
    folder, sign = tmp_path / "checkpoint", tmp_path / "it ran"
    save(folder)
    content = torch.load(folder / name, weights_only=True)
    write({**content, "planted": kind(sign)}, folder / name)
    with pytest.raises(CheckpointCorrupt) as raised:
        load_state(SavedFolder(folder, remote), 0, 1)
    assert not sign.exists()
    assert name in str(raised.value)
    assert "trust" not in str(raised.value)  # torch's advice to switch the protection off


@pytest.mark.filterwarnings("ignore:.*TorchScript archive")
@pytest.mark.parametrize("write", [torch.save, plain_pickle, legacy_save, torchscript])
@pytest.mark.parametrize("kind", [Touch, Evaluate, System])
def test_a_malicious_pickle_in_a_lightning_file_does_not_run(tmp_path, kind, write):
    sign, path = tmp_path / "it ran", tmp_path / "model.ckpt"
    write({"state_dict": make_net().state_dict(), "hyper_parameters": {"planted": kind(sign)}}, path)
    with pytest.raises(CheckpointCorrupt, match=r"model\.ckpt"):
        load_lightning(str(path))
    assert not sign.exists()


def test_the_malicious_pickles_of_these_tests_do_run_where_they_are_let(tmp_path):
    for index, kind in enumerate([Touch, Evaluate, System]):
        sign = tmp_path / str(index)
        pickle.loads(pickle.dumps(kind(sign)))
        assert sign.exists()


def test_the_reason_names_what_was_refused(tmp_path):
    folder = tmp_path / "checkpoint"
    save(folder)
    torch.save({"planted": Evaluate(tmp_path / "x")}, folder / "module.pt")
    with pytest.raises(CheckpointCorrupt, match=r"nothing in it was run: .*GLOBAL eval was not an allowed global"):
        load_state(SavedFolder(folder), 0, 1)


# ---- weights into a module


def test_weights_that_fit_are_loaded(tmp_path):
    folder = tmp_path / "checkpoint"
    expected = save(folder, 2)
    net = make_net()
    assert not apply_weights(net, load_weights(SavedFolder(folder)))
    assert all(torch.equal(value, expected.model[name]) for name, value in net.state_dict().items())


class Changed(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(10, 31)
        self.norm = nn.BatchNorm1d(30)
        self.head_of_mine = nn.Linear(30, 3)


def changed_weights() -> dict[str, torch.Tensor]:
    old = nn.ModuleDict({"encoder": nn.Linear(10, 30), "norm": nn.BatchNorm1d(30), "head_of_min": nn.Linear(30, 3)})
    return dict(old.state_dict())


def test_a_changed_module_gets_a_list_of_what_does_not_fit_and_stays_as_it_was():
    net = Changed()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(CheckpointMismatch) as raised:
        apply_weights(net, changed_weights())
    assert str(raised.value) == (
        "the checkpoint does not fit Changed:\n"
        "  missing in the checkpoint (2):\n"
        "    head_of_mine.weight (similar: head_of_min.weight)\n"
        "    head_of_mine.bias (similar: head_of_min.bias)\n"
        "  not in the module (2):\n"
        "    head_of_min.weight (similar: head_of_mine.weight)\n"
        "    head_of_min.bias (similar: head_of_mine.bias)\n"
        "  of another shape (2):\n"
        "    encoder.weight: (30, 10) in the checkpoint, (31, 10) in the module\n"
        "    encoder.bias: (30) in the checkpoint, (31) in the module\n"
        "To load what fits, pass strict=False."
    )
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_what_fits_is_loaded_where_strict_is_off():
    net, weights = Changed(), changed_weights()
    weights["norm.weight"] = torch.full((30,), 3.0)
    before = net.encoder.weight.clone()
    report = apply_weights(net, weights, strict=False)
    assert list(report.missing) == ["head_of_mine.weight", "head_of_mine.bias"]
    assert report.misshapen["encoder.weight"] == ((30, 10), (31, 10))
    assert torch.equal(net.norm.weight, torch.full((30,), 3.0))
    assert torch.equal(net.encoder.weight, before)


def test_a_prefix_too_many_is_recognised():
    weights = {f"model.{name}": value for name, value in make_net().state_dict().items()}
    report = compare_weights(make_net(), weights)
    assert report.missing["0.weight"] == ["model.0.weight"]
    assert report.unexpected["model.2.bias"] == ["2.bias"]


def test_hooks_that_rename_keys_are_asked():
    net = make_net()

    def rename(module, state_dict, prefix, *arguments):
        for name in [name for name in state_dict if name.startswith("old.")]:
            state_dict[name.removeprefix("old.")] = state_dict.pop(name)

    net.register_load_state_dict_pre_hook(rename)
    apply_weights(net, {f"old.{name}": torch.ones_like(value) for name, value in net.state_dict().items()})
    assert torch.equal(net[0].weight, torch.ones_like(net[0].weight))
    with pytest.raises(CheckpointMismatch, match="missing in the checkpoint"):
        apply_weights(net, {"other": torch.ones(1)})


def test_lazy_parameters_take_any_shape():
    net = nn.LazyLinear(3)
    apply_weights(net, nn.Linear(5, 3).state_dict())
    assert net.weight.shape == (3, 5)


# ---- Lightning's files


def test_a_file_that_lightning_wrote_gives_weights_and_hyperparameters(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Net(lightning.LightningModule):
        def __init__(self, width: int, rates: list, options: dict):
            super().__init__()
            self.save_hyperparameters()
            self.layer = nn.Linear(4, width)

        def training_step(self, batch, index):
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    net = Net(3, [0.1, 0.2], {"deep": {"er": 1}})
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(net, torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=2))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    state = load_lightning(str(tmp_path / "model.ckpt"))
    assert state.module["hyper_parameters"] == {"width": 3, "rates": [0.1, 0.2], "options": {"deep": {"er": 1}}}
    assert type(state.module["hyper_parameters"]) is dict
    assert torch.equal(state.model["layer.weight"], net.layer.weight)


@pytest.mark.parametrize("package", ["pytorch_lightning.utilities.parsing", "lightning.fabric.utilities.data"])
def test_hyperparameters_of_types_that_older_lightning_wrote(tmp_path, monkeypatch, package):
    class AttributeDict(dict):
        pass

    AttributeDict.__module__, AttributeDict.__qualname__ = package, "AttributeDict"
    for index in range(package.count(".") + 1):
        name = ".".join(package.split(".")[: index + 1])
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    sys.modules[package].AttributeDict = AttributeDict
    content = {"state_dict": {}, "hyper_parameters": AttributeDict(width=3, inner=AttributeDict(a=1))}
    torch.save(content, tmp_path / "model.ckpt")
    monkeypatch.undo()
    read = load_lightning(str(tmp_path / "model.ckpt")).module
    assert read["hyper_parameters"] == {"width": 3, "inner": {"a": 1}}


def test_hyperparameters_in_a_namespace(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": argparse.Namespace(width=3)}, tmp_path / "model.ckpt")
    assert load_lightning(str(tmp_path / "model.ckpt")).module["hyper_parameters"] == {"width": 3}


def test_what_is_no_lightning_file_is_refused(tmp_path):
    torch.save({"weights": 1}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointCorrupt, match="has no state_dict"):
        load_lightning(str(tmp_path / "a.ckpt"))
    (tmp_path / "b.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointCorrupt, match=r"cannot be read|nothing in it was run"):
        load_lightning(str(tmp_path / "b.ckpt"))
    with pytest.raises(CheckpointCorrupt, match="missing"):
        load_lightning(str(tmp_path / "c.ckpt"))
