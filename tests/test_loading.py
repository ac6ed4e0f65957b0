"""What `resume` and `ckpt_path` lead to."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from pyarrow import fs
from torch.utils.data import DataLoader

import raylight as pl
from raylight.contract.errors import CheckpointCorrupt, CheckpointMismatch, InvalidArguments
from raylight.contract.layout import checkpoint_directory
from raylight.driver.result import Result
from raylight.loading import find_resume
from raylight.storage import checkpoints as store
from raylight.storage.checkpoints import Checkpoint, Manifest
from raylight.storage.filesystem import Storage
from raylight.storage.versions import Version, claim_version
from raylight.worker.checkpoint.restore import load_weights


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


@pytest.fixture
def version(storage: Storage) -> Version:
    version = claim_version(storage, "run")
    version.write_run({"seed": 7, "arguments": {"checkpoint": {"monitor": "val_loss", "mode": "min"}}})
    return version


def save(version: Version, step: int, val_loss: float) -> Checkpoint:
    directory = checkpoint_directory(step)
    files = (version.storage.write(f"{directory}/model-00000-of-00001.pt", [b"weights"]),)
    return store.commit(version.storage, directory, Manifest(step, 0, files, metrics={"val_loss": val_loss}))


def damage(checkpoint: Checkpoint) -> None:
    for path in Path(checkpoint.path).glob("model-*.pt"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1  # of the same size
        path.write_bytes(content)


def make_result(version: Version, checkpoints: list[Checkpoint], best: Checkpoint) -> Result:
    return Result("finished", {}, version.path, best, checkpoints[-1], checkpoints, 30, 1, version=version)


# ---- damage


@pytest.mark.parametrize("after_a_fit", [False, True])
def test_best_is_the_best_that_is_whole(
    storage: Storage, version: Version, after_a_fit: bool, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = [save(version, 10, 3.0), save(version, 20, 1.0), save(version, 30, 2.0)]
    previous = make_result(version, checkpoints, checkpoints[1]) if after_a_fit else None
    assert find_resume("best", storage, "run", previous).checkpoint.step == 20
    damage(checkpoints[1])
    with caplog.at_level(logging.WARNING, "raylight.storage"):
        assert find_resume("best", storage, "run", previous).checkpoint.step == 30
    assert f"{checkpoints[1].path} is damaged" in caplog.text


def test_where_no_checkpoint_of_a_fit_is_whole_another_fits_best_is_not_taken(
    storage: Storage, version: Version
) -> None:
    save(version, 10, 1.0)
    newer = claim_version(storage, "run")
    newest = save(newer, 20, 2.0)
    damage(newest)
    with pytest.raises(CheckpointCorrupt, match=r"none of the checkpoints of .*version_1 is whole"):
        find_resume("best", storage, "run", make_result(newer, [newest], newest))


@pytest.mark.parametrize("as_path", [False, True])
def test_a_damaged_checkpoint_that_was_named_is_an_error(storage: Storage, version: Version, as_path: bool) -> None:
    checkpoint = save(version, 10, 1.0)
    damage(checkpoint)
    with pytest.raises(CheckpointCorrupt, match="has other bytes than were written"):
        find_resume(checkpoint.path if as_path else checkpoint, storage, "run")


class Net(pl.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.net(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def make_trainer(path: object, **arguments: object) -> pl.Trainer:
    options = {"max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False, **arguments}
    return pl.Trainer(num_workers=0, storage_path=str(path), **options)


LOADER = DataLoader(torch.ones(8, 2), batch_size=4)


def test_a_test_after_a_fit_does_not_measure_damaged_weights(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    result = trainer.fit(Net(), LOADER)
    assert trainer.test(dataloaders=LOADER)
    damage(result.best_checkpoint)
    with pytest.raises(CheckpointCorrupt, match="is whole"):
        trainer.test(dataloaders=LOADER)


# ---- what can be gone on from, and what can be evaluated


def test_a_path_is_one_of_the_file_system_that_was_given(tmp_path: Path) -> None:
    filesystem = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    options = {"storage_filesystem": filesystem, "seed": 1}
    first = make_trainer("runs", max_steps=1, **options).fit(Net(), LOADER)
    inside = first.last_checkpoint.path.removeprefix(f"{tmp_path}/")
    assert inside.startswith("runs/")
    second = make_trainer("runs", **options).fit(Net(), LOADER, ckpt_path=inside)
    assert second.num_steps == 2
    net = Net()
    make_trainer("runs", **options).test(net, LOADER, ckpt_path=second.last_checkpoint.path)
    expected = load_weights(second.last_checkpoint)
    assert torch.equal(net.net.weight, expected["net.weight"])
    uri = Path(second.last_checkpoint.path).as_uri()  # of another kind than the file system's paths
    assert find_resume(uri, Storage("runs", filesystem), "default", filesystem=filesystem).checkpoint.step == 2


@pytest.mark.parametrize("how", ["last", "best", "path", "checkpoint"])
def test_weights_alone_are_not_resumed_from_and_that_is_told_before_anything_starts(tmp_path: Path, how: str) -> None:
    first = make_trainer(tmp_path, checkpoint={"save_weights_only": True}).fit(Net(), LOADER)
    given = {"path": first.last_checkpoint.path, "checkpoint": first.last_checkpoint}.get(how, how)
    with pytest.raises(CheckpointMismatch, match=r"holds weights alone .*load_from_checkpoint"):
        make_trainer(tmp_path).fit(Net(), LOADER, ckpt_path=given)
    assert [entry.name for entry in (tmp_path / "default").iterdir()] == ["version_0"]
    assert make_trainer(tmp_path).test(Net(), LOADER, ckpt_path=given)


@pytest.mark.parametrize("manifest", [False, True])
def test_where_all_checkpoints_are_damaged_last_does_not_start_anew(tmp_path: Path, manifest: bool) -> None:
    result = make_trainer(tmp_path).fit(Net(), LOADER)
    if manifest:
        Path(result.last_checkpoint.path, "manifest.json").write_text("{")
    else:
        damage(result.last_checkpoint)
    with pytest.raises(CheckpointCorrupt, match=r"none of the checkpoints of run 'default' is whole: .*step-00000002"):
        make_trainer(tmp_path).fit(Net(), LOADER, ckpt_path="last")


def test_last_is_the_newest_that_can_be_resumed_from(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=1).fit(Net(), LOADER)
    options = {"checkpoint": {"save_weights_only": True}}
    second = make_trainer(tmp_path, max_steps=2, **options).fit(Net(), LOADER, ckpt_path="last")
    assert second.last_checkpoint.manifest.weights_only
    assert make_trainer(tmp_path, max_steps=4, max_epochs=2).fit(Net(), LOADER, ckpt_path="last").num_steps == 4


def test_nothing_is_evaluated_where_the_last_checkpoint_is_asked_for_and_none_is_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidArguments, match=r"'last': run 'default' in .* has no whole checkpoint"):
        make_trainer(tmp_path).test(Net(), LOADER, ckpt_path="last")


def test_the_weights_of_a_lightning_file_are_evaluated_and_not_resumed_from(tmp_path: Path) -> None:
    weights = {"net.weight": torch.full((1, 2), 3.0), "net.bias": torch.zeros(1)}
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": weights, "epoch": 3, "global_step": 70, "pytorch-lightning_version": "2.6.0"}, path)
    (results,) = make_trainer(tmp_path).test(Net(), LOADER, ckpt_path=path)
    assert results["test_loss"] == pytest.approx(36.0)
    with pytest.raises(CheckpointMismatch, match=r"holds weights alone.*Net\.load_from_checkpoint\(path"):
        make_trainer(tmp_path).fit(Net(), LOADER, ckpt_path=path)


class Speaking(Net):
    """Keeps something of its own in its checkpoints."""

    vocabulary: list | None = None

    def on_save_checkpoint(self, checkpoint):
        checkpoint["vocabulary"] = ["a", "b"]

    def on_load_checkpoint(self, checkpoint):
        self.vocabulary = [*checkpoint["vocabulary"], checkpoint["epoch"], checkpoint["global_step"]]


def test_what_a_module_keeps_in_its_checkpoints_comes_back_from_lightnings_too(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    content = {"state_dict": Net().state_dict(), "epoch": 3, "global_step": 70, "vocabulary": ["a", "b"]}
    torch.save({**content, "optimizer_states": [], "pytorch-lightning_version": "2.6.0"}, path)
    assert Speaking.load_from_checkpoint(path).vocabulary == ["a", "b", 3, 70]
    tested = Speaking()
    make_trainer(tmp_path).test(tested, LOADER, ckpt_path=path)
    assert tested.vocabulary == ["a", "b", 3, 70]
    result = make_trainer(tmp_path).fit(Speaking(), LOADER)
    assert Speaking.load_from_checkpoint(result.last_checkpoint.path).vocabulary == ["a", "b", 1, 2]


def test_the_end_of_a_fit_in_one_file(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trained = Net()
    trainer.fit(trained, LOADER)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    whole, weights = (torch.load(tmp_path / name) for name in ("whole.ckpt", "weights.ckpt"))
    assert torch.equal(whole["state_dict"]["net.weight"], trained.net.weight)
    assert whole["global_step"] == weights["global_step"] == trainer.global_step
    assert whole.keys() - weights.keys() == {"optimizer_states", "lr_schedulers", "callbacks"}
    one, two = (Net.load_from_checkpoint(tmp_path / name) for name in ("whole.ckpt", "weights.ckpt"))
    assert torch.equal(one.net.weight, two.net.weight)
