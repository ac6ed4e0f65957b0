from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from raylight.contract.errors import CheckpointCorrupt, MissingFile, StorageError, Superseded
from raylight.contract.layout import checkpoint_directory
from raylight.contract.messages import SavedFile
from raylight.storage import checkpoints as store
from raylight.storage.checkpoints import Checkpoint, Manifest
from raylight.storage.digests import ALGORITHM, digest_of
from raylight.storage.fence import claim_attempt
from raylight.storage.filesystem import Storage
from raylight.storage.versions import Version
from tests.faults_storage import Fault, FaultProxy


def save(
    version: Storage, step: int, attempt: int = 0, world_size: int = 2, size: int = 3000, **given: object
) -> Checkpoint:
    """Writes the files of `world_size` ranks and commits them."""
    directory = checkpoint_directory(step, attempt)
    files = []
    for rank in range(world_size):
        for kind in ("model", "training"):
            content = random.Random(f"{step} {rank} {kind}").randbytes(size)
            files.append(version.write(f"{directory}/{kind}-{rank:05d}-of-{world_size:05d}.pt", [content]))
    fields = {"metrics": {"val_loss": 1.0 / step}, "epoch": step // 10, **given}
    manifest = Manifest(step=step, attempt=attempt, world_size=world_size, files=tuple(files), **fields)
    return store.commit(version, directory, manifest)


@pytest.fixture
def version(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "digits" / "version_0")


def names(checkpoints: list[Checkpoint]) -> list[str]:
    return [checkpoint.name for checkpoint in checkpoints]


def test_a_committed_checkpoint_is_found_and_read(storage: Storage) -> None:
    saved = save(storage, 20)
    save(storage, 5)
    listed = store.list_checkpoints(storage)
    assert names(listed) == ["step-00000005", "step-00000020"]
    found = listed[-1]
    assert found.manifest == saved.manifest
    assert (found.step, found.epoch, found.metrics) == (20, 2, {"val_loss": 0.05})
    assert found.path == storage.child("checkpoints/step-00000020").uri
    assert found.file_names == tuple(
        f"{kind}-{rank:05d}-of-00002.pt" for rank in range(2) for kind in ("model", "training")
    )
    assert store.verify(found) == []
    again = pickle.loads(pickle.dumps(found))
    with again.open_read("model-00001-of-00002.pt") as file:
        assert file.read() == random.Random("20 1 model").randbytes(3000)
    assert (again.local_path("model-00001-of-00002.pt") is None) == (not storage.is_local)


def test_without_a_manifest_there_is_no_checkpoint(storage: Storage) -> None:
    storage.write("checkpoints/step-00000010/model-00000-of-00001.pt", [b"weights"])
    assert store.list_checkpoints(storage) == []
    assert store.newest_whole(storage) is None


def test_a_file_that_did_not_arrive_stops_the_commit(version: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ARRIVAL_TIMEOUT_S", 0.2)
    directory = checkpoint_directory(10)
    saved = version.write(f"{directory}/model.pt", [b"weights"])
    manifest = Manifest(step=10, epoch=0, files=(replace(saved, size=9), SavedFile("other.pt", 1, digest_of(b"1"))))
    with pytest.raises(StorageError, match=r"model\.pt has 7 bytes instead of 9, other\.pt is missing"):
        store.commit(version, directory, manifest)
    assert store.list_checkpoints(version) == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault("unanswered", count=100, method="PUT", path=r"manifest\.json"),
        Fault("403", first=2, path=r"fence\.json"),
    ],
    ids=["manifest", "fence"],
)
def test_what_is_on_storage_is_committed_though_no_answer_comes(
    fault: Fault, proxy: FaultProxy, behind_proxy: Storage
) -> None:
    proxy.inject(fault)
    saved = save(behind_proxy, 10, world_size=1)
    assert saved.manifest == store.list_checkpoints(behind_proxy)[0].manifest


def test_a_manifest_without_an_answer_is_no_way_past_the_fence(proxy: FaultProxy, behind_proxy: Storage) -> None:
    def take_over(number: int) -> None:
        if "manifest.json" in proxy.requests[-1][1]:
            proxy.after = None
            store.raise_fence(behind_proxy, 1)

    proxy.inject(Fault("unanswered", count=100, method="PUT", path=r"manifest"))
    proxy.after = take_over
    with pytest.raises(Superseded, match="attempt 1 has taken over"):
        save(behind_proxy, 10, world_size=1)


def test_paths_of_files_may_be_given_relative_to_the_version(version: Storage) -> None:
    directory = checkpoint_directory(10)
    saved = version.write(f"{directory}/model.pt", [b"weights"])
    assert saved.path == f"{directory}/model.pt"
    assert store.commit(version, directory, Manifest(step=10, epoch=0, files=(saved,))).file_names == ("model.pt",)


def test_ten_thousand_files_in_under_two_seconds(version: Storage) -> None:
    files = tuple(
        SavedFile(f"model-{rank:05d}-of-10000.pt", 1 << 20, digest_of(b"%d" % rank)) for rank in range(10_000)
    )
    manifest = Manifest(step=1, epoch=0, files=files, world_size=10_000)
    started = time.process_time()  # not by the clock: other tests may share the machine
    version.write("checkpoints/step-00000001/manifest.json", [manifest.to_bytes()])
    assert len(store.list_checkpoints(version)[0].file_names) == 10_000
    assert time.process_time() - started < 2.0


def test_manifests_keep_numbers_that_json_does_not_have() -> None:
    metrics = {"a": float("nan"), "b": float("inf"), "c": 0.1 + 0.2}
    data = Manifest(step=1, epoch=0, files=(), metrics=metrics).to_bytes()
    json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    again = Manifest.from_bytes(data).metrics
    assert str(again) == str(metrics)


# ---- damage


def flip_manifest(checkpoint: Checkpoint) -> None:
    flip_bit(Path(checkpoint.path) / "manifest.json", random.Random(1))


def flip_weights(checkpoint: Checkpoint) -> None:
    flip_bit(Path(checkpoint.path) / checkpoint.file_names[0], random.Random(2))


def truncate(checkpoint: Checkpoint) -> None:
    path = Path(checkpoint.path) / checkpoint.file_names[1]
    path.write_bytes(path.read_bytes()[:-1])


def remove(checkpoint: Checkpoint) -> None:
    (Path(checkpoint.path) / checkpoint.file_names[2]).unlink()


def empty_manifest(checkpoint: Checkpoint) -> None:
    (Path(checkpoint.path) / "manifest.json").write_bytes(b"")


def flip_bit(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    position = chance.randrange(8 * len(data))
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


DAMAGES: dict[Callable[[Checkpoint], None], str] = {
    flip_manifest: r"manifest\.json is damaged",
    empty_manifest: r"manifest\.json is damaged: it is no JSON",
    flip_weights: r"model-00000-of-00002\.pt has other bytes than were written",
    truncate: r"training-00000-of-00002\.pt has 2999 bytes instead of 3000",
    remove: r"model-00001-of-00002\.pt is missing",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_passed_over_with_a_warning_and_told_by_path(
    version: Storage, damage: Callable[[Checkpoint], None], caplog: pytest.LogCaptureFixture
) -> None:
    save(version, 10)
    newest = save(version, 20)
    damage(newest)
    with caplog.at_level(logging.WARNING, "raylight.storage"):
        found = store.newest_whole(version)
    assert found is not None
    assert found.step == 10
    assert newest.path in caplog.text
    with pytest.raises(CheckpointCorrupt, match=DAMAGES[damage]) as caught:
        store.find_checkpoint(newest.path)
    assert newest.path in str(caught.value)


def test_flipped_bits_are_always_found(version: Storage) -> None:
    checkpoint = save(version, 10, size=300)
    folder = Path(checkpoint.path)
    chance = random.Random(3)
    files = sorted(folder.iterdir())
    for _ in range(200):
        path = chance.choice(files)
        before = path.read_bytes()
        flip_bit(path, chance)
        with pytest.raises(CheckpointCorrupt):
            store.find_checkpoint(folder)
        path.write_bytes(before)
    assert store.find_checkpoint(folder).manifest == checkpoint.manifest


def test_every_single_bit_of_a_manifest_counts() -> None:
    data = Manifest(step=10, epoch=1, files=(SavedFile("m.pt", 3, digest_of(b"abc")),), metrics={"a": 0.5}).to_bytes()
    for position in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(CheckpointCorrupt):
            Manifest.from_bytes(bytes(damaged))


BLANK = f"{ALGORITHM}:{'0' * 32}"


def forge(**changes: object) -> bytes:
    """A manifest whose digest is right and whose content is not: what an attacker would write."""
    content = json.loads(Manifest(step=1, epoch=0, files=(SavedFile("m.pt", 1, digest_of(b"1")),)).to_bytes())
    blank = json.dumps({**content, **changes, "digest": BLANK}).encode()
    return blank.replace(BLANK.encode(), digest_of(blank).encode())


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "a/../../b", "..\\b", "C:/x", "", ".", "a//b", "x\0y", "checkpoints/../.."]
)
def test_paths_in_a_manifest_cannot_leave_the_folder(version: Storage, path: str) -> None:
    data = forge(files=[{"path": path, "size": 1, "digest": digest_of(b"1")}])
    with pytest.raises(CheckpointCorrupt, match="leaves the checkpoint's folder"):
        Manifest.from_bytes(data)
    with pytest.raises(CheckpointCorrupt, match="leaves the checkpoint's folder"):
        Manifest(step=1, epoch=0, files=(SavedFile(path, 1, digest_of(b"1")),)).to_bytes()


def test_links_cannot_leave_the_folder(version: Storage, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    folder = tmp_path / "digits/version_0/checkpoints/step-00000001"
    (folder / "inner").mkdir(parents=True)
    (folder / "m.pt").symlink_to(tmp_path / "secret")
    (folder / "inner/link").symlink_to(tmp_path)
    files = [{"path": name, "size": 6, "digest": digest_of(b"secret")} for name in ("m.pt", "inner/link/secret")]
    (folder / "manifest.json").write_bytes(forge(files=files))
    checkpoint = store.list_checkpoints(version)[0]
    for name in ("m.pt", "inner/link/secret"):
        with pytest.raises(CheckpointCorrupt, match="is a link that leaves"):
            checkpoint.open_read(name)
        with pytest.raises(CheckpointCorrupt, match="is a link that leaves"):
            checkpoint.local_path(name)
    assert store.verify(checkpoint)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2, "raylight": "9.0"}, r"format 2, written by raylight 9\.0.*Update raylight"),
        ({"step": "many"}, "of the wrong kind"),
        ({"files": [{"path": "m.pt"}]}, "is missing or of the wrong kind"),
        ({"metrics": ["loss"]}, "of the wrong kind"),
    ],
)
def test_manifests_of_another_kind(changes: dict[str, object], said: str) -> None:
    with pytest.raises(CheckpointCorrupt, match=said):
        Manifest.from_bytes(forge(**changes))


def test_an_unknown_digest_is_a_problem_not_a_crash(version: Storage) -> None:
    saved = version.write("checkpoints/step-00000001/m.pt", [b"1"])
    manifest = Manifest(step=1, epoch=0, files=(replace(saved, digest="crc9000:ff"),))
    checkpoint = store.commit(version, "checkpoints/step-00000001", manifest)
    assert store.verify(checkpoint) == ["m.pt has a digest of an unknown kind, 'crc9000'"]


# ---- finding


def test_a_checkpoint_is_found_by_path_uri_and_manifest(storage: Storage) -> None:
    saved = save(storage, 10)
    if "memory" not in storage.uri:
        assert store.find_checkpoint(saved.path).manifest == saved.manifest
        assert store.find_checkpoint(storage.uri_of("checkpoints/step-00000010/manifest.json")).step == 10


def test_what_is_no_checkpoint_is_told_apart(version: Storage) -> None:
    save(version, 10)
    version.write("checkpoints/step-00000020/model.pt", [b"half"])
    with pytest.raises(CheckpointCorrupt, match=r"was never finished: it has no manifest\.json, only model\.pt"):
        store.find_checkpoint(version.uri + "/checkpoints/step-00000020")
    with pytest.raises(MissingFile, match=r"there is no checkpoint at .*step-30\. Beside it: step-00000010"):
        store.find_checkpoint(version.uri + "/checkpoints/step-30")
    with pytest.raises(MissingFile, match=r"(?s)is a version, not a checkpoint.*step-00000010"):
        store.find_checkpoint(version.uri)


def test_checkpoints_that_cannot_be_resumed_from_are_left_out_where_asked(version: Storage) -> None:
    save(version, 10)
    save(version, 20, weights_only=True)
    assert store.newest_whole(version).step == 20
    assert store.newest_whole(version, resumable=True).step == 10


# ---- attempts


def test_an_older_attempt_commits_nothing_once_a_newer_has_begun(version: Storage) -> None:
    save(version, 10, attempt=0)
    store.raise_fence(version, 1)
    with pytest.raises(StorageError, match=r"attempt 0 of .* commits nothing any more: attempt 1 has taken over"):
        save(version, 20, attempt=0)
    save(version, 20, attempt=1)
    assert names(store.list_checkpoints(version)) == ["step-00000010", "step-00000020-attempt-1"]
    with pytest.raises(StorageError, match="attempt 0"):
        store.raise_fence(version, 0)


def test_drivers_that_resume_at_once_begin_attempts_of_their_own(storage: Storage) -> None:
    storage.write("run.json", [b'{"attempts": [{"attempt": 0}, {"attempt": 1}]}'])
    with ThreadPoolExecutor(6) as pool:
        claimed = sorted(pool.map(claim_attempt, [storage] * 6))
    assert claimed[0] >= 2
    assert len(set(claimed)) == 6
    store.raise_fence(storage, claimed[-1])
    with pytest.raises(StorageError, match="has taken over"):
        store.raise_fence(storage, claimed[0])


def test_run_json_is_a_fence_too(version: Storage) -> None:
    Version(0, version, "digits").write_run({"attempts": [{"attempt": 0}, {"attempt": 1}]})
    with pytest.raises(StorageError, match="attempt 1 has taken over"):
        save(version, 10, attempt=0)
    assert save(version, 10, attempt=1).step == 10


def test_survivors_may_finish_what_an_earlier_attempt_began(version: Storage) -> None:
    store.raise_fence(version, 2)
    saved = version.write("checkpoints/step-00000010/model.pt", [b"1"])
    manifest = Manifest(step=10, epoch=0, files=(saved,), attempt=1)
    store.commit(version, "checkpoints/step-00000010", manifest, fence=2)
    assert names(store.list_checkpoints(version)) == ["step-00000010"]


def test_a_manifest_that_slips_past_the_fence_counts_for_nothing(
    version: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The stale attempt has looked at the fence, then sleeps while the newer one begins, then writes."""
    save(version, 10, attempt=0)
    looked = store._check_arrived

    def sleep_meanwhile(*arguments: object) -> None:
        looked(*arguments)
        monkeypatch.undo()
        store.raise_fence(version, 1)

    monkeypatch.setattr(store, "_check_arrived", sleep_meanwhile)
    with pytest.raises(StorageError, match="attempt 1 has taken over"):
        save(version, 20, attempt=0)
    assert names(store.list_checkpoints(version)) == ["step-00000010"]
    assert "was written by attempt 0 after attempt 1 had taken over" in caplog.text
    assert store.sweep_leftovers(version) == ["step-00000020"]
    assert not version.exists("checkpoints/step-00000020")


def test_what_an_older_fence_shut_out_stays_out(version: Storage, caplog: pytest.LogCaptureFixture) -> None:
    store.raise_fence(version, 1)
    stale = Manifest(step=30, epoch=0, files=(), attempt=0)
    version.write("checkpoints/step-00000030/manifest.json", [stale.to_bytes()])
    save(version, 40, attempt=1)
    store.raise_fence(version, 2)
    assert names(store.list_checkpoints(version)) == ["step-00000040-attempt-1"]


def test_a_fence_that_was_left_half_raised_is_raised_again(version: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    save(version, 10)
    write, written = store.write_fence, []

    def die_at_the_second(*arguments: object) -> None:
        written.append(arguments)
        if len(written) == 2:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(store, "write_fence", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        store.raise_fence(version, 1)
    monkeypatch.undo()
    assert names(store.list_checkpoints(version)) == ["step-00000010"]
    store.raise_fence(version, 1)
    assert names(store.list_checkpoints(version)) == ["step-00000010"]


# ---- deleting and sweeping


def test_deletion_takes_the_manifest_first(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save(storage, 10)
    monkeypatch.setattr(Storage, "delete_own", lambda storage, path, is_own: [])  # killed before it began
    store.delete(checkpoint)
    assert store.list_checkpoints(storage) == []
    assert storage.exists("checkpoints/step-00000010/model-00000-of-00002.pt")
    monkeypatch.undo()
    store.delete(checkpoint)
    assert storage.list("checkpoints") == []


def test_leftovers_are_swept_and_nothing_else(version: Storage) -> None:
    save(version, 10)
    damaged = save(version, 20)
    empty_manifest(damaged)
    for step in (30, 40, 50):
        version.write(f"{checkpoint_directory(step)}/model.pt", [b"half"])
    partial = Path(version.uri) / "checkpoints/step-00000030/.raylight-1234.partial"
    partial.write_bytes(b"killed in the middle")
    gone = store.sweep_leftovers(version, keep=["step-00000050", "checkpoints/step-00000040"])
    assert gone == ["step-00000030"]
    left = sorted(os.listdir(Path(version.uri) / "checkpoints"))
    assert left == ["step-00000010", "step-00000020", "step-00000040", "step-00000050"]


def test_a_disk_that_cannot_read_a_file_makes_its_checkpoint_a_damaged_one(
    version: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(version, 10)
    newest = save(version, 20)
    digest = store.digest_of_file

    def fail(opened: object, algorithm: str) -> str:
        if newest.name in opened.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return digest(opened, algorithm)

    monkeypatch.setattr(store, "digest_of_file", fail)
    assert store.newest_whole(version).step == 10
    assert "cannot be read ([Errno 5] Input/output error)" in store.verify(newest)[0]


def test_storage_that_does_not_answer_is_no_damage(proxy: FaultProxy, behind_proxy: Storage) -> None:
    """Taken for damage, a resume would have begun at an older checkpoint, and thrown good steps away."""
    version = behind_proxy
    save(version, 10)
    newest = save(version, 20)
    proxy.inject(Fault("403", count=1000, method="GET", path="step-00000020/model"))
    with pytest.raises(StorageError):
        store.newest_whole(version)
    assert any("cannot be read" in problem for problem in store.verify(newest))
    proxy.inject()
    assert store.newest_whole(version).step == 20
