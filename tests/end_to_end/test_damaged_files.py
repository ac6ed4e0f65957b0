"""Every file that is read, damaged: an error or a warning of raylight's own, never a traceback or a lost result."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import raylight as pl
from raylight import command as cli
from raylight.contract.errors import RaylightError
from raylight.contract.messages import SavedFile
from raylight.driver.journal import read_metrics
from raylight.loading import Pointer
from raylight.replay import read_evidence
from raylight.storage.digests import digest_of
from raylight.storage.filesystem import Storage
from raylight.storage.manifest import Manifest
from raylight.tuning.trial_notes import Notes
from tests.damage import Damage, damage_bytes, damage_json, damage_manifest, damage_parquet, damage_torch

NUM_STEPS = 6
OVERRIDES = {"width": 4, "fail_at": -1}  # what a module's own __init__ says to a damaged value is its own affair


class Net(pl.Module):
    def __init__(self, width: int = 4, fail_at: int = -1):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(width, 1)

    def training_step(self, batch, batch_idx):
        if self.global_step == self.hparams.fail_at:
            raise ValueError("mine")
        loss = self.net(batch).pow(2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


def fit(storage_path: Path, module: Net, **arguments: Any) -> pl.Result:
    loader = DataLoader(torch.arange(16.0).view(4, 4), batch_size=2, shuffle=True)
    return pl.fit(
        module, loader, num_workers=0, use_gpu=False, storage_path=str(storage_path), max_epochs=3, log_every_n_steps=1,
        logger=pl.loggers.CSVLogger(), checkpoint=pl.Checkpointing(every_n_steps=2, keep_last=-1),
        enable_progress_bar=False, enable_model_summary=False, **arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with one version, resumed once and failed again: it holds every kind of file."""
    root = tmp_path_factory.mktemp("template")
    with pytest.raises(pl.WorkerFailed):
        fit(root, Net(fail_at=3))
    with pytest.raises(pl.WorkerFailed):
        fit(root, Net(fail_at=5), resume="last")
    version = root / "default" / "version_0"
    (version / "metrics-00007.parquet").write_bytes((version / "metrics.parquet").read_bytes())  # as of a killed driver
    (version / "logs").mkdir()
    (version / "logs" / "rank-0.log").write_bytes(b"first line\nsecond line\n")
    return root


@pytest.fixture
def storage(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "runs"))


def version_of(storage: Path) -> Path:
    return storage / "default" / "version_0"


def newest(version: Path) -> Path:
    return max(version.glob("checkpoints/*"), key=lambda path: path.name)


FILES: dict[str, tuple[Callable[[Path], Path], Damage]] = {
    "run.json": (lambda version: version / "run.json", damage_json),
    "fence.json": (lambda version: version / "fence.json", damage_json),
    "metrics.parquet": (lambda version: version / "metrics.parquet", damage_parquet),
    "a part": (lambda version: version / "metrics-00007.parquet", damage_parquet),
    "metrics.csv": (lambda version: version / "metrics.csv", damage_bytes),
    "manifest": (lambda version: newest(version) / "manifest.json", damage_manifest),
    "model": (lambda version: newest(version) / "model-00000-of-00001.pt", damage_torch),
    "training": (lambda version: newest(version) / "training-00000-of-00001.pt", damage_torch),
    "module": (lambda version: newest(version) / "module.pt", damage_torch),
    "evidence": (lambda version: next(version.glob("failures/*.pt")), damage_torch),
    "log": (lambda version: version / "logs" / "rank-0.log", damage_bytes),
}
MAY_END_A_FIT = {"manifest", "model", "training", "module"}  # with the right digest they are what was written


def put(path: Path, data: bytes, chance: random.Random) -> None:
    """Half of the time a checkpoint's manifest says that the damaged bytes are those that were written."""
    path.write_bytes(data)
    manifest = path.parent / "manifest.json"
    if path.suffix == ".pt" and manifest.exists() and chance.random() < 0.5:
        content = json.loads(manifest.read_bytes())
        for file in content["files"]:
            if file["path"] == path.name:
                file |= {"size": len(data), "digest": digest_of(data)}
        content.pop("digest")
        files = tuple(SavedFile(**file) for file in content.pop("files"))
        manifest.write_bytes(Manifest(files=files, **content).to_bytes())


def read_all(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By every command and function that reads a version; what they raise is raylight's own."""
    version = version_of(storage)
    for command in (["runs"], ["runs", "--metric=loss"], ["show"], ["verify"], ["logs"]):
        assert cli.main([command[0], str(storage), *command[1:]]) in (0, 1)
    checkpoint = str(newest(version))
    readers: list[Callable[[], object]] = [
        lambda: read_metrics(Storage(version)),
        lambda: pl.open_run(storage).curves(),
        lambda: Net.load_from_checkpoint(checkpoint, **OVERRIDES),
        lambda: read_evidence(str(version)).describe(),
        lambda: cli.main(["export", str(version), str(storage / "out.pt")]),
        lambda: pl.validate(Net(), DataLoader(torch.ones(2, 4)), checkpoint=checkpoint, num_workers=0, logger=False,
                            storage_path=str(storage / "other"), enable_progress_bar=False),
    ]  # fmt: skip
    for reader in readers:
        try:
            reader()
        except RaylightError:
            pass
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert "HOSTILE" not in printed.out + printed.err


def check(kind: str, seed: int, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    find, damage = FILES[kind]
    chance, path = random.Random(f"{kind} {seed}"), find(version_of(storage))
    put(path, damage(path.read_bytes(), chance), chance)
    read_all(storage, capsys)
    try:
        result = fit(storage, Net(), resume="last")
    except RaylightError:
        assert kind in MAY_END_A_FIT
        return
    assert (result.status, result.num_steps) == ("finished", NUM_STEPS)
    assert json.loads((Path(result.path) / "run.json").read_bytes())["status"] == "finished"
    rows = result.history().to_pylist()
    assert {row["step"] for row in rows} >= {6}
    assert cli.main(["show", str(storage)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_damage(kind, template, tmp_path, capsys):
    for seed in range(5):
        check(kind, seed, Path(shutil.copytree(template, tmp_path / str(seed))), capsys)


@pytest.mark.parametrize("seed", [pytest.param(0), pytest.param(1, marks=pytest.mark.soak)])
def test_damage_to_small_files(seed, tmp_path, capsys):
    """A file of Lightning's, what Ray Tune's checkpoint holds, and the note of a trial."""
    lightning, notes = tmp_path / "x.ckpt", Notes(Storage(tmp_path), "trial")
    torch.save({"state_dict": Net().state_dict(), "hyper_parameters": {"width": 4}, "epoch": 1}, lightning)
    Pointer("trial", 0, "step-00000002", str(tmp_path / "nowhere")).write(str(tmp_path))
    notes.write(version=0, error={"kind": "WorkerFailed", "text": "mine", "session": "1"})
    readers: dict[Path, tuple[Damage, Callable[[], object]]] = {
        lightning: (damage_torch, lambda: Net.load_from_checkpoint(lightning, **OVERRIDES)),
        tmp_path / "raylight.json": (damage_json, lambda: Pointer.read(str(tmp_path))),
        tmp_path / "trials" / "trial.json": (damage_json, lambda: notes.raise_again("1")),
    }
    for path, (damage, read) in readers.items():
        whole = path.read_bytes()
        for number in range(50 if seed == 0 else 3000):
            path.write_bytes(damage(whole, random.Random(f"{path.name} {seed} {number}")))
            try:
                read()
            except RaylightError:
                pass
            except BaseException as error:
                error.add_note(f"{path.name}, number {number}")
                raise
    assert "HOSTILE" not in capsys.readouterr().out


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", FILES)
def test_much_damage(kind, template, tmp_path, capsys):
    for seed in range(100, 400):
        storage = Path(shutil.copytree(template, tmp_path / "runs"))
        try:
            check(kind, seed, storage, capsys)
        except BaseException as error:
            error.add_note(f"kind {kind!r}, seed {seed}")
            raise
        shutil.rmtree(storage)
