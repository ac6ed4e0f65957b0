"""A whole fit whose storage fails in the middle of it: training goes on, the person is told, what is there is whole."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl
from raylight.driver.journal import Journal
from raylight.storage import checkpoints as store
from raylight.storage import filesystem
from raylight.storage.filesystem import Storage
from raylight.storage.retry import Backoff
from raylight.storage.versions import Version, list_versions
from tests.faults_storage import BUCKET, CREDENTIALS, Fault, FaultProxy, uri_at
from tests.storage.crash_sequence import EFFECTS, hooked_effects

STEPS_PER_EPOCH = 8
NUM_STEPS = 5 * STEPS_PER_EPOCH
EVERY_EPOCH = pl.Checkpointing(every_n_epochs=1, keep_last=-1)
FOR_EVER = 1 << 30


class Net(pl.Module):
    """Dropout and numpy noise in each step: a step that is lost or made twice shows in the weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch[0]) + float(np.random.uniform(-0.01, 0.01))).pow(2).mean()
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.net(batch[0]).pow(2).mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def make_loader() -> DataLoader:
    samples = torch.randn(4 * STEPS_PER_EPOCH, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(samples), batch_size=4, shuffle=True)


def fit(module: pl.Module, storage_path: str | Path, **arguments: Any) -> pl.Result:
    arguments = {"max_steps": NUM_STEPS, "checkpoint": EVERY_EPOCH, **arguments}
    return pl.fit(
        module, make_loader(), num_workers=0, use_gpu=False, seed=5, storage_path=str(storage_path),
        log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False, **arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights after NUM_STEPS steps that nothing has disturbed."""
    module = Net()
    fit(module, tmp_path_factory.mktemp("undisturbed"), checkpoint=False, logger=False)
    return module.state_dict()


def check_weights(module: pl.Module, expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(module.state_dict()[name], tensor), name


def check_whole(version: Storage) -> list[int]:
    """The steps of the checkpoints in a version, each of which must be as it was written."""
    listed = store.list_checkpoints(version)
    assert [store.verify(checkpoint) for checkpoint in listed] == [[]] * len(listed)
    return [checkpoint.step for checkpoint in listed]


def logged_steps(result: pl.Result) -> list[int]:
    return [row["step"] for row in result.history().to_pylist() if row["name"] == "train_loss"]


# ---- S3 that goes away


@pytest.fixture
def prefix() -> str:
    """On S3, of this test alone."""
    return uuid.uuid4().hex


@pytest.fixture
def direct(s3_port: int, prefix: str) -> Storage:
    """What is on S3, past the proxy."""
    return Storage(uri_at(s3_port, f"{prefix}/default/version_0"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage is given up after some milliseconds, not after half a minute."""
    monkeypatch.setattr(filesystem, "Backoff", lambda: Backoff(num_attempts=3, first_s=0.01, longest_s=0.02))


class Outage(pl.Callback):
    """The storage goes away after step `first`, once the run has recorded that the checkpoint before it is committed,
    and comes back after step `last`."""

    def __init__(self, proxy: FaultProxy, version: Storage, kind: str, first: int, last: int = FOR_EVER):
        self.proxy, self.version, self.kind, self.first, self.last = proxy, version, kind, first, last
        self.num_steps_without = 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.first:
            wait_until(self._is_one_committed)
            self.proxy.inject(Fault(self.kind, count=FOR_EVER))
        elif trainer.global_step == self.last:
            self.proxy.inject()
        elif self.first < trainer.global_step < self.last:
            self.num_steps_without += 1

    def _is_one_committed(self) -> bool:
        try:
            return bool(json.loads(self.version.read_bytes("run.json")).get("last_checkpoint"))
        except ValueError:
            return False  # replaced while it was being read


def wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60.0
    while not is_so():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["reset", "503", "403"])
def test_storage_that_goes_away_and_comes_back(kind, proxy, prefix, direct, undisturbed, capsys):
    """The checkpoint of step 32 may be saved or lost: the storage comes back while it is being written."""
    module, outage = Net(), Outage(proxy, direct, kind, first=18, last=34)
    result = fit(module, proxy.uri(prefix), callbacks=[outage])
    assert outage.num_steps_without == 15
    check_weights(module, undisturbed)
    said = capsys.readouterr().out
    lost = [line for line in said.splitlines() if "warning: " in line and "checkpoint of step 24" in line]
    assert len(lost) == 1, said
    assert "earlier checkpoints are whole" in said

    steps = check_whole(direct)
    assert {8, 40} <= set(steps) <= {8, 16, 32, 40}
    assert steps == [checkpoint.step for checkpoint in result.checkpoints]
    record = json.loads(direct.read_bytes("run.json"))
    assert (record["status"], result.status) == ("finished", "finished")
    assert "step-00000040" in record["last_checkpoint"]
    assert logged_steps(result) == list(range(1, NUM_STEPS + 1))
    assert not [entry.name for entry in direct.list() if entry.name.startswith("metrics-")]


@pytest.fixture
def temporary(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be copied to storage is kept in a temporary folder, which the test's own takes up."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def find_kept(lines: list[str]) -> store.Checkpoint:
    """The checkpoint on this machine that one line names."""
    [uri] = {found[1] for line in lines if (found := re.search(r"with resume='(file://[^']+)'", line))}
    return store.find_checkpoint(uri)


def check_kept(lines: list[str], undisturbed: dict[str, torch.Tensor], proxy: FaultProxy, prefix: str) -> None:
    """What a run has left on this machine is all of its end: it is loaded, and gone on from while S3 is away."""
    kept = find_kept(lines)
    assert (kept.step, store.verify(kept)) == (NUM_STEPS, [])
    check_weights(Net.load_from_checkpoint(kept.path), undisturbed)
    proxy.inject()
    longer, straight = Net(), Net()
    uri = f"file://{kept.storage.local_path()}"
    assert fit(longer, proxy.uri(f"{prefix}/longer"), resume=uri, max_steps=NUM_STEPS + 4).num_steps == NUM_STEPS + 4
    fit(straight, proxy.uri(f"{prefix}/straight"), max_steps=NUM_STEPS + 4)
    check_weights(longer, straight.state_dict())
    proxy.inject(Fault("reset", count=FOR_EVER))


@pytest.mark.usefixtures("quick", "temporary")
def test_storage_that_stays_away(proxy, prefix, direct, undisturbed, capsys):
    """The run ends with the weights in the caller's hands, and goes on from what was committed before."""
    module = Net()
    started = time.monotonic()
    result = fit(module, proxy.uri(prefix), callbacks=[Outage(proxy, direct, "reset", first=18)])
    assert time.monotonic() - started < 30.0
    check_weights(module, undisturbed)
    assert (result.status, result.num_steps) == ("finished", NUM_STEPS)
    assert result.last_checkpoint.step in (8, 16)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning: " in line]
    assert len(warnings) < 25
    checkpoints = [f"checkpoint of step {step}" for step in (24, 32, 40)]
    for lost in (*checkpoints, "run.json", "what was logged"):
        assert any(lost in line and "NETWORK_CONNECTION" in line for line in warnings), (lost, warnings)
    assert check_whole(direct) == [checkpoint.step for checkpoint in result.checkpoints]
    assert json.loads(direct.read_bytes("run.json"))["status"] == "running"

    check_kept(warnings, undisturbed, proxy, prefix)

    proxy.inject()
    again = Net()
    resumed = fit(again, proxy.uri(prefix), resume="last")
    check_weights(again, undisturbed)
    assert check_whole(direct)[-1] == resumed.last_checkpoint.step == NUM_STEPS
    assert json.loads(direct.read_bytes("run.json"))["status"] == "finished"
    assert set(logged_steps(resumed)) >= set(range(result.last_checkpoint.step + 1, NUM_STEPS + 1))


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_if_marked")
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.ray)])
def test_storage_that_stays_away_is_waited_for_once(num_workers, proxy, prefix, capsys):
    """At the real pace: each process waits for up to 40 s, and all of them at the same time."""

    def is_gone(number: int) -> bool:
        return any(method == "PUT" and "step-00000016" in path for method, path in proxy.requests)

    proxy.before = is_gone
    module = Net()
    began = time.monotonic()
    pl.fit(
        module, make_loader(), num_workers=num_workers, use_gpu=False, seed=5, storage_path=proxy.uri(prefix),
        log_every_n_steps=1, enable_progress_bar=False, max_steps=NUM_STEPS, checkpoint=EVERY_EPOCH,
    )  # fmt: skip
    assert time.monotonic() - began < 150.0
    said = capsys.readouterr().out
    assert said.count("warning: ") < 40
    kept = find_kept(said.splitlines())
    assert kept.step == NUM_STEPS
    check_weights(Net.load_from_checkpoint(kept), module.state_dict())


@pytest.mark.usefixtures("quick")
def test_storage_that_is_away_from_the_start(proxy, prefix):
    proxy.inject(Fault("reset", count=FOR_EVER))
    with pytest.raises(pl.StorageError, match=r"(?s)NETWORK_CONNECTION.*3 tries.*endpoint_override"):
        fit(Net(), proxy.uri(prefix), callbacks=[pl.callbacks.LambdaCallback(on_train_start=pytest.fail)])


def count_requests(proxy: FaultProxy, prefix: str) -> int:
    proxy.inject()
    fit(Net(), proxy.uri(f"{prefix}/undisturbed"))
    return len(proxy.requests)


def lose_storage_at(number: int, proxy: FaultProxy, prefix: str, undisturbed: dict[str, torch.Tensor]) -> int:
    """At this request of a fit the storage goes away for good. Returns the last step that the run has told of as
    committed, after a look at what is there and at a run that goes on from it."""
    module, again, uri = Net(), Net(), proxy.uri(f"{prefix}/{number}")
    proxy.inject(Fault("reset", first=number, count=FOR_EVER))
    told: list[int] = []
    try:
        result = fit(module, uri)
        told = [checkpoint.step for checkpoint in result.checkpoints]
        check_weights(module, undisturbed)
    except pl.StorageError:
        check_weights(module, Net().state_dict())  # that it cannot begin is the only reason not to finish
    proxy.inject()
    versions = list_versions(Storage(uri_at(proxy.upstream, f"{prefix}/{number}")), "default")
    assert {step for version in versions for step in check_whole(version.storage)} >= set(told)
    fit(again, uri, resume="last")
    check_weights(again, undisturbed)
    return max(told, default=0)


@pytest.mark.slow
@pytest.mark.usefixtures("quick", "temporary")
def test_storage_that_goes_away_at_any_request(proxy, prefix, undisturbed):
    """At the start that ends the run; later it never costs a step, nor a checkpoint that the run has told of."""
    num_requests = count_requests(proxy, prefix)
    numbers = [1 + int(num_requests * part) for part in (0.0, 0.2, 0.4, 0.6, 0.8, 0.99)]
    lasts = [lose_storage_at(number, proxy, prefix, undisturbed) for number in numbers]
    assert lasts[0] == 0
    assert len(set(lasts)) > 3, "it went away at other moments than between checkpoints"


@pytest.mark.soak
@pytest.mark.usefixtures("quick", "temporary")
def test_storage_that_goes_away_at_every_request(proxy, prefix, undisturbed):
    num_requests = count_requests(proxy, prefix)
    lasts = {lose_storage_at(number, proxy, prefix, undisturbed) for number in range(1, num_requests)}
    assert lasts == {0, 8, 16, 24, 32, 40}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["reset", "unanswered"])
def test_a_manifest_that_never_arrives(kind, proxy, prefix, direct, undisturbed, capsys):
    """All shares are written and the driver cannot commit; or it has, does not hear so, and looks."""
    module = Net()
    proxy.inject(Fault(kind, count=FOR_EVER, method="PUT", path="step-00000016/manifest.json"))
    result = fit(module, proxy.uri(prefix))
    check_weights(module, undisturbed)
    lost = capsys.readouterr().out.count("warning: the checkpoint of step 16 is lost: could not write s3://")
    steps = [8, 24, 32, 40] if kind == "reset" else [8, 16, 24, 32, 40]
    assert lost == (kind == "reset")
    assert check_whole(direct) == [checkpoint.step for checkpoint in result.checkpoints] == steps


@pytest.mark.usefixtures("quick", "temporary")
def test_an_exception_while_storage_is_away(proxy, prefix, direct, undisturbed, capsys):
    """The person reads what their own code did wrong; that it could not be saved is a warning beside it."""

    def fail_at_20(trainer, module, batch, batch_idx):
        if trainer.global_step == 20:
            raise ValueError("mine")

    outage, told = Outage(proxy, direct, "reset", first=18), []
    failing = pl.callbacks.LambdaCallback(
        on_train_batch_start=fail_at_20, on_exception=lambda trainer, module, error: told.append(type(error))
    )
    with pytest.raises(pl.WorkerFailed, match=r"(?s)rank 0 .* failed at step 20.*ValueError: mine") as caught:
        fit(Net(), proxy.uri(prefix), callbacks=[outage, failing])
    assert isinstance(caught.value, ValueError)
    assert told == [ValueError]
    said = capsys.readouterr().out
    assert "checkpoint of step 20" in said
    assert check_whole(direct) in ([8], [8, 16])
    assert find_kept(said.splitlines()).step == 20

    proxy.inject()
    again = Net()
    fit(again, proxy.uri(prefix), resume="last")
    check_weights(again, undisturbed)


@pytest.mark.usefixtures("quick", "temporary")
def test_what_a_test_has_measured_when_storage_goes_away(proxy, prefix, capsys):
    """It comes to the caller, though it cannot be added to the record of the fit."""
    trainer = pl.Trainer(
        num_workers=0, use_gpu=False, max_steps=8, storage_path=proxy.uri(prefix), enable_progress_bar=False,
        enable_model_summary=False, checkpoint=False,
        callbacks=[pl.callbacks.LambdaCallback(on_test_end=lambda *_: proxy.inject(Fault("reset", count=FOR_EVER)))],
    )  # fmt: skip
    module = Net()
    trainer.fit(module, make_loader())
    [measured] = trainer.test(module, make_loader())
    assert measured["test_loss"] > 0.0
    assert "warning: run.json could not be written" in capsys.readouterr().out


KINDS = ("500", "503", "reset", "unanswered", "truncated")


def test_requests_that_fail_all_along(proxy, prefix, direct, undisturbed, capsys, monkeypatch):
    """Every fifth one, each time in another way: no checkpoint is lost and nobody has to know."""
    monkeypatch.setattr(filesystem, "Backoff", lambda: Backoff(num_attempts=8, first_s=0.01, longest_s=0.02))
    module = Net()
    proxy.inject(*(Fault(KINDS[n % len(KINDS)], first=5 * n) for n in range(1, 200)))
    result = fit(module, proxy.uri(prefix))
    assert len(proxy.requests) > 100
    check_weights(module, undisturbed)
    assert "lost" not in capsys.readouterr().out
    assert check_whole(direct) == [checkpoint.step for checkpoint in result.checkpoints] == [8, 16, 24, 32, 40]
    assert logged_steps(result) == list(range(1, NUM_STEPS + 1))


def at_request(proxy: FaultProxy, number: int, action: Callable[[], object]) -> None:
    """Once the server has done the request of that number, and before its answer comes."""
    proxy.inject()
    proxy.after = lambda done: action() if done == number else None


def test_a_run_is_read_while_it_writes(proxy, prefix, direct):
    """What is replaced between two requests of a reader comes from before or after that, never from both."""
    version, journal, texts = Version(0, direct, "default"), Journal(direct), ["running", "finished " * 100]

    def write_more(number: int) -> None:
        version.write_run({"status": texts[number % 2]})
        for step in range(1000):
            journal.add(step, number, {"train_loss": step * 1.1 + number}, 1.0)
        journal.flush()

    write_more(0)
    for number in itertools.count(1):
        at_request(proxy, number, lambda number=number: write_more(number))
        run = pl.open_run(proxy.uri(prefix))
        assert run.status in texts
        assert run.metrics.num_rows in (1000 * number, 1000 * (number + 1))
        if len(proxy.requests) < number:
            break
    journal.close()
    assert number > 6


# ---- a file system that the caller made


@pytest.fixture(params=["folder of a folder", "s3", "folder of s3", "fsspec"])
def place(request: pytest.FixtureRequest, tmp_path: Path, s3_port: int, prefix: str) -> dict[str, Any]:
    """`storage_path` and `storage_filesystem`."""
    from pyarrow import fs

    if request.param == "folder of a folder":
        (tmp_path / "outer" / "inner").mkdir(parents=True)
        outer = fs.SubTreeFileSystem(str(tmp_path / "outer"), fs.LocalFileSystem())
        return {"storage_path": "runs", "storage_filesystem": fs.SubTreeFileSystem("inner", outer)}
    if request.param == "fsspec":
        import fsspec

        handler = fs.FSSpecHandler(fsspec.filesystem("file"))
        return {"storage_path": str(tmp_path / "runs"), "storage_filesystem": fs.PyFileSystem(handler)}
    s3 = fs.S3FileSystem(
        endpoint_override=f"127.0.0.1:{s3_port}", scheme="http", region="us-east-1",
        access_key="test", secret_key="test",
    )  # fmt: skip
    if request.param == "s3":
        return {"storage_path": f"{BUCKET}/{prefix}/of mine", "storage_filesystem": s3}
    return {"storage_path": prefix, "storage_filesystem": fs.SubTreeFileSystem(f"{BUCKET}/inner", s3)}


def test_a_file_system_of_the_callers(place, undisturbed, monkeypatch):
    """All that names a checkpoint, its plain path too, is looked up there."""
    for name in CREDENTIALS:  # what the file system holds must do
        monkeypatch.delenv(name, raising=False)
    half, whole, elsewhere = Net(), Net(), Net()
    first = fit(half, max_steps=20, **place)
    assert [checkpoint.step for checkpoint in first.checkpoints] == [8, 16, 20]

    result = fit(whole, resume="last", **place)
    check_weights(whole, undisturbed)
    assert check_whole(Storage(*place.values()).child("default", "version_0")) == [8, 16, 20, 24, 32, 40]
    assert result.last_checkpoint.step == NUM_STEPS
    assert result.path == first.path
    assert logged_steps(result) == list(range(1, NUM_STEPS + 1))

    shown = {"enable_progress_bar": False, "enable_model_summary": False, "num_workers": 0, "use_gpu": False}
    [measured] = pl.test(Net(), make_loader(), checkpoint="best", **shown, **place)
    [expected] = pl.test(whole, make_loader(), **shown, **place)
    assert measured["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-6)

    again = fit(elsewhere, resume=first.last_checkpoint.path, **place)
    check_weights(elsewhere, undisturbed)
    assert again.path != first.path
    assert pl.open_run(**place, version=0).verify().keys() == {checkpoint.path for checkpoint in result.checkpoints}


# ---- a disk that is full


class Wide(Net):
    """A checkpoint takes a part of a small disk: weights and Adam's two averages, 300 kB."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4096), nn.Dropout(0.5), nn.Linear(4096, 1))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small file system needs root: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


class Filling(pl.Callback):
    """Another program takes all room that is left on the disk after step `first`, and gives it back after `last`."""

    def __init__(self, disk: Path, first: int, last: int = FOR_EVER):
        self.ballast, self.first, self.last = disk / "ballast", first, last

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.first:
            self.take_room()
        elif trainer.global_step == self.last:
            self.ballast.unlink()

    def take_room(self) -> None:
        with self.ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1024))


def test_a_disk_that_is_full_for_a_while(small_disk, capsys):
    """As with an outage, the checkpoint of step 32 may be saved or lost."""
    expected, module = Wide(), Wide()
    fit(expected, small_disk / "expected", checkpoint=False, logger=False)
    result = fit(module, small_disk, callbacks=[Filling(small_disk, first=18, last=34)])
    check_weights(module, expected.state_dict())
    said = capsys.readouterr().out
    lost = [line for line in said.splitlines() if "warning: " in line and "checkpoint of step 24" in line]
    assert len(lost) == 1, said
    assert "No space left on device" in lost[0]
    assert "Free some space" in said

    version = Storage(result.path)
    steps = check_whole(version)
    assert {8, 40} <= set(steps) <= {8, 16, 32, 40}
    assert steps == [checkpoint.step for checkpoint in result.checkpoints]
    assert json.loads(version.read_bytes("run.json"))["status"] == "finished"
    assert logged_steps(result) == list(range(1, NUM_STEPS + 1))


def test_a_disk_that_stays_full(small_disk, capsys):
    """Once there is room again, the run goes on from what was committed before."""
    expected, module, again = Wide(), Wide(), Wide()
    fit(expected, small_disk / "expected", checkpoint=False, logger=False)
    filling = Filling(small_disk, first=18)
    result = fit(module, small_disk, callbacks=[filling])
    check_weights(module, expected.state_dict())
    said = capsys.readouterr().out
    for step in (24, 32, 40):
        assert f"checkpoint of step {step}" in said
    version = Storage(result.path)
    before = check_whole(version)
    assert before in ([8], [8, 16])
    assert result.last_checkpoint.step == before[-1]

    filling.ballast.unlink()
    resumed = fit(again, small_disk, resume="last")
    check_weights(again, expected.state_dict())
    assert check_whole(version) == [step for step in (8, 16, 24, 32, 40) if step in before or step > before[-1]]
    assert resumed.path == result.path
    assert sorted(entry.name for entry in version.list("checkpoints")) == sorted(it.name for it in resumed.checkpoints)


def test_a_disk_that_is_full_from_any_write_on(tmp_path, undisturbed, monkeypatch):
    """Also from the first, which is that of run.json: it never costs a step, nor what was committed before."""
    write, most, full = os.write, 0, 0

    def write_until_full(descriptor: int, data: bytes) -> int:
        nonlocal num_writes
        num_writes += 1
        if num_writes < full or not full:
            return write(descriptor, data)
        if num_writes == full:
            write(descriptor, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    lasts = []
    for part in (None, 0.0, 0.2, 0.4, 0.6, 0.8, 0.95):
        module, again, path, num_writes = Net(), Net(), tmp_path / str(part), 0
        full = 0 if part is None else int(most * part) + 1
        monkeypatch.setattr(os, "write", write_until_full)
        result = fit(module, path)
        monkeypatch.undo()
        most = most or num_writes
        check_weights(module, undisturbed)
        assert (result.status, result.num_steps) == ("finished", NUM_STEPS)
        before = check_whole(Storage(result.path))
        assert before == [checkpoint.step for checkpoint in result.checkpoints]
        lasts.append(before[-1] if before else 0)
        resumed = fit(again, path, resume="last")
        check_weights(again, undisturbed)
        assert check_whole(Storage(resumed.path))[-1] == NUM_STEPS
        assert json.loads(Path(resumed.path, "run.json").read_text())["status"] == "finished"
    assert most > 50
    assert lasts[0] == NUM_STEPS
    assert len(set(lasts)) > 3, "it was full at other moments than between checkpoints"


# ---- kill -9

SOME = pl.Checkpointing(every_n_epochs=1, keep_last=1)
"""With retention, so that checkpoints are deleted, too."""


class Forker:
    """Runs the fit in child processes, each of which dies at one of the effects that it has on the disk."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.end_to_end.test_storage_faults"]
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, kind: str, number: int, path: Path) -> tuple[int, dict[str, int]]:
        """The last step that the child reported as committed (0: none), and how many effects it had by their kind
        (none: it was killed)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{kind} {number} {path}\n")
        self._process.stdin.flush()
        reported, effects = 0, {}
        for line in self._process.stdout:
            word, told = line.split(maxsplit=1)
            if word == "committed":
                reported = int(told)
            elif word == "effects":
                effects = json.loads(told)
            else:
                assert int(told) == (0 if effects else signal.SIGKILL)
                return reported, effects
        raise AssertionError(f"the forking process ended with {self._process.wait()}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(30) == 0


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    forker = Forker()
    yield forker
    forker.close()


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: killed processes, unlike power cuts, do not depend on the disk."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm")) if os.access("/dev/shm", os.W_OK) else tmp_path
    yield folder
    shutil.rmtree(folder)


def check_killed(path: Path, reported: int) -> None:
    """All that is listed is whole, and nothing that was reported, by the process or in run.json, is gone."""
    newest = 0
    for version in list_versions(Storage(path), "default"):  # one more for each kill before the first checkpoint
        check_whole(version.storage)
        found = store.newest_whole(version.storage)
        assert step_of(found) >= step_in(version.read_run().get("last_checkpoint")), version.path
        newest = max(newest, step_of(found))
    assert newest >= reported


def step_of(checkpoint: store.Checkpoint | None) -> int:
    return checkpoint.step if checkpoint is not None else 0


def step_in(path: str | None) -> int:
    """The step that the name of a checkpoint tells."""
    return int(re.search(r"step-(\d+)", path)[1]) if path else 0


def check_resumed(path: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    """The run goes on to its end, and leaves no trace of having been killed."""
    module = Net()
    result = fit(module, path, checkpoint=SOME, resume="last")
    check_weights(module, undisturbed)
    version = Storage(result.path)
    record = json.loads(version.read_bytes("run.json"))
    assert record["status"] == "finished"
    resumed_from = step_in(record["resumed_from"])
    if resumed_from < NUM_STEPS:
        assert check_whole(version) == [step for step in (resumed_from, NUM_STEPS) if step]
    assert result.last_checkpoint.step == NUM_STEPS
    assert [entry.name for entry in version.list("checkpoints")] == [it.name for it in result.checkpoints]
    steps = logged_steps(result)
    assert steps == sorted(set(steps)), "steps that were made again are there once"
    assert [step for step in steps if step > resumed_from] == list(range(resumed_from + 1, NUM_STEPS + 1))


def kill_at(kind: str, number: int, forker: Forker, path: Path, undisturbed: dict[str, torch.Tensor]) -> int:
    """Kills one fit at this effect, and returns what it had reported."""
    reported, effects = forker.run(kind, number, path)
    assert not effects, f"it had fewer: {effects}"
    check_killed(path, reported)
    check_resumed(path, undisturbed)
    shutil.rmtree(path)
    return reported


def count_effects(forker: Forker, path: Path) -> dict[str, int]:
    reported, effects = forker.run("none", 0, path / "undisturbed")
    assert reported == NUM_STEPS
    assert effects.keys() == {*EFFECTS, "any"}
    return effects


PARTS = {
    "mkdir": 0.6,
    "open": 0.3,
    "write": 0.5,
    "fsync": 0.7,
    "replace": 0.45,
    "unlink": 0.8,
    "rmdir": 0.6,
    "any": 0.95,
}
"""Of all effects of that kind: which one kills."""


def test_killed_at_effects(forker, memory_path, undisturbed):
    effects = count_effects(forker, memory_path)
    reports = set()
    for kind, part in PARTS.items():
        number = 1 + int(effects[kind] * part)
        reports.add(kill_at(kind, number, forker, memory_path / kind, undisturbed))
    assert len(reports) > 3, "they died at other moments than between checkpoints"


@pytest.mark.soak
@pytest.mark.parametrize("kind", EFFECTS)
def test_killed_at_every_effect(kind, forker, memory_path, undisturbed):
    """Of a write, at its start and in its middle. The last effects of all are left out: threads have them, and
    their number differs by a few from run to run."""
    effects = count_effects(forker, memory_path)
    for number in range(1, effects[kind] - 2, 7 if kind == "write" else 1):
        kill_at(kind, number, forker, memory_path / str(number), undisturbed)


MOST_KILLS = 24
"""As each is at random, a run may by chance need some hundreds of processes to come to its end."""


def kill_repeatedly(numbers: random.Random, forker: Forker, path: Path, most: int) -> int:
    """Until a process survives, or enough have died; returns how many were killed."""
    reported = 0
    for num_killed in range(MOST_KILLS):
        committed, effects = forker.run("any", numbers.randrange(1, most), path)
        reported = max(reported, committed)
        check_killed(path, reported)
        if effects:
            return num_killed
    return MOST_KILLS


def test_killed_again_and_again(forker, memory_path, undisturbed):
    """Also while what the kill before has left is swept and gone on from."""
    effects = count_effects(forker, memory_path)
    num_killed = kill_repeatedly(random.Random(1), forker, memory_path / "run", most=effects["any"] // 2)
    check_resumed(memory_path / "run", undisturbed)
    assert num_killed > 2


@pytest.mark.soak
def test_killed_again_and_again_for_long(forker, memory_path, undisturbed):
    effects = count_effects(forker, memory_path)
    for seed in range(50):
        path = memory_path / str(seed)
        kill_repeatedly(random.Random(seed), forker, path, most=effects["any"] // 2)
        check_resumed(path, undisturbed)
        shutil.rmtree(path)


def die_at(kind: str, number: int, path: str, output: int) -> None:
    """Fits, and is killed ahead of its effect `number` of that kind ("any": of all); at writes also in their middle."""
    write, commit = os.write, store.commit
    counts = {name: itertools.count(1) for name in (*EFFECTS, "any")}

    def before(name: str, arguments: tuple) -> None:
        for half_way in (False, True) if name == "write" else (False,):
            reached = {name: next(counts[name]), "any": next(counts["any"])}
            if reached.get(kind) == number:
                if half_way:
                    write(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)

    def commit_and_report(*arguments: Any) -> store.Checkpoint:
        checkpoint = commit(*arguments)
        write(output, b"committed %d\n" % checkpoint.step)
        return checkpoint

    store.commit = commit_and_report
    with hooked_effects(before):
        fit(Net(), path, checkpoint=SOME, resume="last")
    effects = {name: next(count) - 1 for name, count in counts.items()}
    write(output, f"effects {json.dumps(effects)}\n".encode())


def main() -> None:
    """Forks a child for each line of its input, "KIND NUMBER PATH"; prints what it reports, and what ended it.

    All is imported, and so a child costs only the time of its fit. What fits print goes to stderr.
    """
    from pyarrow import parquet  # noqa: F401

    torch.optim.Adam(Net().parameters())
    output = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        kind, number, path = line.split()
        child = os.fork()
        if child == 0:
            try:
                die_at(kind, int(number), path, output)
            except BaseException:  # in this process nothing may go on that is the parent's
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.write(output, b"ended %d\n" % os.WTERMSIG(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()
