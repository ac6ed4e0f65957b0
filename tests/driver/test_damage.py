from __future__ import annotations

import json
from pathlib import Path

import pytest

from raylight.contract.layout import checkpoint_directory
from raylight.driver.damage import set_aside_damaged
from raylight.driver.journal import Journal, read_metrics
from raylight.storage import checkpoints as store
from raylight.storage.fence import claim_attempt, newest_attempt, read_fence
from raylight.storage.filesystem import Storage
from raylight.storage.manifest import Manifest
from raylight.storage.versions import Version


@pytest.fixture
def version(tmp_path: Path) -> Version:
    """In its second attempt, with a journal of an earlier and of the present driver."""
    version = Version(0, Storage(tmp_path), "default")
    version.write_run({"status": "running", "attempts": [{"attempt": 0}], "seed": 5})
    for step in (1, 2):
        journal = Journal(version.storage)
        journal.add(step, 0, {"loss": float(step)}, 1.7e9)
        if step == 1:
            journal.close()
        else:
            journal.flush()
    store.raise_fence(version.storage, claim_attempt(version.storage))
    return version


def aside(version: Version) -> list[str]:
    return sorted(entry.name[17:] for entry in version.storage.list() if entry.name.startswith("damaged-"))


def test_what_is_whole_is_left_alone(version: Version, caplog: pytest.LogCaptureFixture) -> None:
    before = [(entry.name, entry.size) for entry in version.storage.walk()]
    set_aside_damaged(version)
    assert [(entry.name, entry.size) for entry in version.storage.walk()] == before
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["run.json", "fence.json", "metrics.parquet", "metrics-00001.parquet"])
def test_what_is_damaged_is_kept_under_another_name(
    version: Version, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    version.storage.write(name, [b"half"])
    set_aside_damaged(version)
    set_aside_damaged(version)
    assert aside(version) == [name]
    assert len(caplog.messages) == 1
    assert f"{name} is damaged: " in caplog.text
    assert newest_attempt(version.storage) == 1
    assert version.read_run().get("seed") == (None if name == "run.json" else 5)
    steps = read_metrics(version.storage)["step"].to_pylist()
    assert steps == {"metrics.parquet": [2], "metrics-00001.parquet": [1]}.get(name, [1, 2])


def test_an_attempt_that_was_replaced_commits_nothing_though_the_fence_is_damaged(version: Version) -> None:
    version.storage.write("fence.json", [b"[" * 100_000])
    version.storage.write("run.json", [b'{"attempts": Infinity}'])
    assert read_fence(version.storage).attempt == newest_attempt(version.storage) == 1
    with pytest.raises(store.Superseded):
        store.commit(version.storage, checkpoint_directory(8), Manifest(step=8, epoch=0, files=(), attempt=0))


def test_a_part_that_is_damaged_while_the_run_goes_on_costs_only_its_rows(
    version: Version, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(version.storage)
    journal.add(3, 0, {"loss": 3.0}, 1.7e9)
    journal.flush()
    version.storage.write("metrics-00001.parquet", [b"PAR1 and more"])
    assert read_metrics(version.storage)["step"].to_pylist() == [1, 3]
    journal.close()
    assert read_metrics(version.storage)["step"].to_pylist() == [1, 3]
    assert aside(version) == ["metrics-00001.parquet"]
    assert "The values in it are missing in the history" in caplog.text


def test_a_seed_is_found_without_the_record(version: Version) -> None:
    from raylight.loading import find_seed

    directory = checkpoint_directory(8, 1)
    checkpoint = store.commit(version.storage, directory, Manifest(step=8, epoch=0, files=(), attempt=1, seed=7))
    version.storage.write("run.json", [b""])
    assert find_seed(store.read_checkpoint(checkpoint.storage)) == 7
    content = json.loads(version.storage.read_bytes(f"{directory}/manifest.json"))
    assert content["seed"] == 7
