from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import raylight
from raylight.contract.errors import CheckpointCorrupt, InvalidArguments, MissingFile
from raylight.contract.layout import checkpoint_directory
from raylight.driver.journal import Journal
from raylight.runs import Run, checkpoint_at, export, list_summaries, open_run, verify_path
from raylight.storage import checkpoints as store
from raylight.storage.checkpoints import Checkpoint, Manifest
from raylight.storage.filesystem import Storage
from raylight.storage.versions import Version, claim_version
from tests.faults_storage import uri_at


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage path, empty so far."""
    if request.param == "local":
        return str(tmp_path / "runs")
    return uri_at(request.getfixturevalue("s3_port"), uuid.uuid4().hex)


def save(version: Version, step: int, weights: dict[str, torch.Tensor], metrics: dict[str, float]) -> Checkpoint:
    """A checkpoint of two ranks, each with every second weight."""
    directory = checkpoint_directory(step)
    files = []
    for rank in range(2):
        with version.storage.open_write(f"{directory}/model-{rank:05d}-of-00002.pt") as file:
            torch.save(dict(list(weights.items())[rank::2]), file)
        files.append(file.saved)
    manifest = Manifest(step, step // 10, tuple(files), world_size=2, metrics=metrics)
    return store.commit(version.storage, directory, manifest)


def make_run(place: str, name: str, losses: tuple[float, ...] = (0.5, 0.2, 0.4), **record: object) -> Version:
    version = claim_version(Storage(place), name)
    options = {"checkpoint": {"monitor": "val_loss", "mode": "min"}}
    version.write_run(
        {
            "status": "finished", "name": name, "version": version.number, "started_at": 1.7e9, "duration_s": 75.0,
            "arguments": options, "hyperparameters": {"lr": 0.1}, "attempts": [{"attempt": 0}],
            "metrics": {"val_loss": losses[-1], "accuracy": 1 - losses[-1]}, **record,
        }
    )  # fmt: skip
    journal = Journal(version.storage)
    for number, loss in enumerate(losses, start=1):
        save(version, 10 * number, weights(number), {"val_loss": loss})
        journal.add(10 * number, number, {"val_loss": loss}, 1.7e9 + number)
    journal.close()
    version.storage.write("logs/rank-0.log", [b"first line\nsecond line\n"])
    return version


def weights(number: int) -> dict[str, torch.Tensor]:
    return {f"layer{index}.weight": torch.full((4, 4), float(10 * number + index)) for index in range(3)}


def test_a_run_is_read_back(place: str) -> None:
    version = make_run(place, "digits")
    run = raylight.open_run(place, "digits")
    assert isinstance(run, Run)
    assert (run.name, run.version, run.status, run.path) == ("digits", 0, "finished", version.path)
    assert run.hyperparameters == {"lr": 0.1}
    assert [checkpoint.step for checkpoint in run.checkpoints] == [10, 20, 30]
    assert (run.best.step, run.last.step) == (20, 30)
    assert run.metrics.column_names == ["step", "epoch", "name", "value", "time"]
    assert run.curve("val_loss") == ([10, 20, 30], [0.5, 0.2, 0.4])
    assert run.verify() == {checkpoint.path: [] for checkpoint in run.checkpoints}
    assert run.log_ranks() == [0]
    with run.open_log() as file:
        assert file.read() == b"first line\nsecond line\n"


def test_it_is_found_by_storage_run_and_version(place: str) -> None:
    make_run(place, "digits")
    second = make_run(place, "digits")
    root = Storage(place)
    for path in (place, root.child("digits").uri, second.path):
        assert open_run(path).version == 1
    assert open_run(place, version=0).version == 0
    assert open_run(place, "digits", "version_0").version == 0
    assert open_run(place, "digits", "0").version == 0


def test_what_is_not_there_is_told_with_what_is(tmp_path: Path) -> None:
    place = str(tmp_path)
    with pytest.raises(MissingFile, match=r"no runs in .*: nothing is there"):
        open_run(place)
    (tmp_path / "notes").mkdir()
    with pytest.raises(MissingFile, match="it holds no run"):
        open_run(place)
    make_run(place, "digits")
    make_run(place, "letters")
    with pytest.raises(InvalidArguments, match="holds 2 runs; give name=, one of digits, letters"):
        open_run(place)
    with pytest.raises(InvalidArguments, match=r"no run 'digit' in .*mean 'digits'\? There are: digits, letters"):
        open_run(place, "digit")
    with pytest.raises(InvalidArguments, match="has no version 4; it has 0"):
        open_run(place, "digits", 4)
    with pytest.raises(MissingFile, match="there is no version at"):
        open_run(tmp_path / "digits" / "version_7")
    with pytest.raises(InvalidArguments, match=r"'val_los' was not logged.*Did you mean 'val_loss'\?"):
        open_run(place, "digits").curve("val_los")
    with pytest.raises(MissingFile, match=r"no log of rank 3\. Ranks with a log: 0"):
        open_run(place, "digits").open_log(3)


def test_a_running_version_is_read_too(tmp_path: Path) -> None:
    version = claim_version(Storage(tmp_path), "digits")
    assert open_run(tmp_path).status == "claimed"
    version.write_run({"status": "running", "started_at": 1.7e9})
    journal = Journal(version.storage)
    journal.add(1, 0, {"loss": 3.0}, 1.7e9)
    journal.flush()
    run = open_run(tmp_path)
    assert (run.status, run.best, run.last, run.checkpoints) == ("running", None, None, [])
    assert run.curves() == {"loss": ([1], [3.0])}
    journal.close()


def test_lists_of_versions(place: str) -> None:
    make_run(place, "digits", (0.5, 0.2, 0.4))
    make_run(place, "digits", (0.5, 0.1, 0.3), status="failed")
    claim_version(Storage(place), "letters").write_run({"status": "running"})
    summaries = list_summaries(place)
    assert [(it.name, it.number, it.status) for it in summaries] == [
        ("digits", 0, "finished"), ("digits", 1, "failed"), ("letters", 0, "running"),
    ]  # fmt: skip
    first = summaries[0]
    assert (first.metric, first.value, first.step, first.num_checkpoints) == ("val_loss", 0.2, 30, 3)
    assert first.duration_s == 75.0
    files = [entry.size for entry in Storage(place).walk("digits/version_0")]
    assert first.size == sum(files) > 3000
    assert summaries[2].value is None
    assert [it.number for it in list_summaries(place, "val_loss")] == [1, 0, 0]
    assert [it.value for it in list_summaries(place, "accuracy", "max")] == [0.7, 0.6, None]
    with pytest.raises(InvalidArguments, match=r"no version in .* has logged 'accurac'.*Did you mean 'accuracy'\?"):
        list_summaries(place, "accurac")


def test_an_unreadable_version_does_not_hide_the_others(tmp_path: Path) -> None:
    make_run(str(tmp_path), "digits")
    broken = make_run(str(tmp_path), "digits")
    Path(broken.path, "run.json").write_text("{")
    assert [it.status for it in list_summaries(tmp_path)] == ["finished", "unreadable"]


# ---- verify


def test_verification_finds_what_is_damaged(place: str) -> None:
    version = make_run(place, "digits")
    results = dict(verify_path(place))
    assert len(results) == 3
    assert all(problems == [] for problems in results.values())
    damaged = version.storage.child("checkpoints", "step-00000020")
    data = bytearray(damaged.read_bytes("model-00000-of-00002.pt"))
    data[100] ^= 1
    damaged.write("model-00000-of-00002.pt", [data])
    unreadable = version.storage.child("checkpoints", "step-00000030")
    unreadable.write("manifest.json", [b"{}"])
    version.storage.write("checkpoints/step-00000040/model.pt", [b"never committed"])
    for path in (place, version.path):
        results = dict(verify_path(path))
        assert results[damaged.uri] == ["model-00000-of-00002.pt has other bytes than were written (xxh3_128 differs)"]
        assert "is damaged: it has no format number" in results[unreadable.uri][0]
        assert len(results) == 3
    assert dict(verify_path(version.path, digests=False))[damaged.uri] == []
    assert "has other bytes" in dict(verify_path(damaged.uri))[damaged.uri][0]
    assert "is damaged: it has no format number" in dict(verify_path(unreadable.uri))[unreadable.uri][0]
    assert open_run(place).verify() == dict(verify_path(version.path))


def at_first_verification(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """What a run that goes on does once its checkpoints are listed and before their files are looked at."""
    verify = store.verify

    def act_then_verify(*arguments: object) -> list[str]:
        monkeypatch.undo()
        action()
        return verify(*arguments)

    for module in ("raylight.runs", "raylight.storage.checkpoints"):
        monkeypatch.setattr(f"{module}.verify", act_then_verify)


def test_what_a_running_version_deletes_or_commits_meanwhile_is_not_damaged(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = make_run(place, "digits")
    first, second, third = store.list_checkpoints(version.storage)

    def go_on() -> None:
        store.delete(first)
        save(version, 40, weights(4), {"val_loss": 0.1})

    at_first_verification(monkeypatch, go_on)
    results = dict(verify_path(place))
    fourth = version.storage.uri_of("checkpoints/step-00000040")
    assert results == {second.path: [], third.path: [], fourth: []}
    store.raise_fence(version.storage, 1)
    late = version.storage.child(checkpoint_directory(50))
    late.write("manifest.json", [Manifest(50, 5, ()).to_bytes()])
    assert dict(verify_path(place))[late.uri] == ["it belongs to an attempt that had been replaced"]


@pytest.mark.parametrize("which", ["version", "checkpoint"])
def test_a_checkpoint_that_is_deleted_meanwhile_is_missing_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    version = make_run(str(tmp_path / "runs"), "digits")
    last = store.list_checkpoints(version.storage)[-1]
    at_first_verification(monkeypatch, lambda: store.delete(last))
    with pytest.raises(MissingFile, match=r"step-00000030 has been deleted since"):
        checkpoint_at(version.path if which == "version" else last.path, "last")
    with pytest.raises(MissingFile, match=r"step-00000030 has been deleted since"):
        export(last, tmp_path / "weights.pt")
    assert not (tmp_path / "weights.pt").exists()


# ---- export


def test_weights_are_merged_into_one_file(place: str, tmp_path: Path) -> None:
    version = make_run(place, "digits")
    out = tmp_path / "best.pt"
    assert export(checkpoint_at(version.path), out) == 3
    loaded = torch.load(out, weights_only=True)
    assert list(loaded) == list(dict.fromkeys([*list(weights(2))[0::2], *list(weights(2))[1::2]]))
    assert all(torch.equal(loaded[name], value) for name, value in weights(2).items())
    assert export(checkpoint_at(version.path, "last"), out) == 3
    assert torch.load(out, weights_only=True)["layer0.weight"][0, 0] == 30.0
    assert export(version.storage.uri_of("checkpoints/step-00000010"), out) == 3
    assert torch.load(out, weights_only=True)["layer0.weight"][0, 0] == 10.0
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_safetensors_take_tied_weights_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    version = claim_version(Storage(tmp_path / "runs"), "digits")
    shared = torch.arange(6.0).reshape(2, 3)
    checkpoint = save(version, 10, {"a": shared, "unused": torch.ones(1), "b": shared, "c": shared.T}, {})
    assert export(checkpoint, tmp_path / "weights.safetensors") == 4
    loaded = load_file(tmp_path / "weights.safetensors")
    assert torch.equal(loaded["a"], shared)
    assert torch.equal(loaded["b"], shared)
    assert torch.equal(loaded["c"], shared.T)


def test_what_cannot_be_exported_is_told(tmp_path: Path) -> None:
    version = make_run(str(tmp_path / "runs"), "digits")
    with pytest.raises(InvalidArguments, match=r"must end in \.pt, \.pth, \.safetensors or \.ckpt"):
        export(version.path, tmp_path / "weights.onnx")
    for step in (20, 30):
        path = Path(version.path, f"checkpoints/step-{step:08d}/model-00001-of-00002.pt")
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointCorrupt, match=r"step-00000020 is damaged: model-00001-of-00002\.pt has"):
        export(version.path, tmp_path / "weights.pt")
    with pytest.raises(MissingFile, match="there is no checkpoint at"):
        export(tmp_path / "runs/digits/version_0/checkpoints/step-1", tmp_path / "weights.pt")
    assert not (tmp_path / "weights.pt").exists()


def test_nothing_in_a_model_file_is_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "executed"),)

    version = claim_version(Storage(tmp_path / "runs"), "digits")
    directory = checkpoint_directory(10)
    with version.storage.open_write(f"{directory}/model-00000-of-00001.pt") as file:
        torch.save({"weight": Malicious()}, file)
    checkpoint = store.commit(version.storage, directory, Manifest(10, 0, (file.saved,)))
    with pytest.raises(CheckpointCorrupt):
        export(checkpoint, tmp_path / "weights.pt")
    assert not (tmp_path / "executed").exists()
