"""raylight deletes what it has made, and nothing else."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
import torch

import raylight as pl
from raylight.contract.errors import StorageError
from raylight.contract.layout import CHECKPOINT_FOLDER, checkpoint_directory
from raylight.storage import checkpoints as store
from raylight.storage.filesystem import Storage
from raylight.storage.manifest import Manifest
from raylight.worker.checkpoint.staging import MODULE_FILE, model_file, training_file

PACKAGE = Path(__file__).parent.parent.parent / "raylight"
DELETING = {
    "unlink", "rmdir", "removedirs", "rmtree", "delete", "delete_own", "delete_file", "delete_dir",
    "delete_dir_contents", "delete_root_dir_contents", "rm", "rm_file",
}  # fmt: skip
# Every place that deletes a file or folder, and why it can only be one of raylight's own.
KNOWN = {
    "storage/local_files.py LocalFiles.delete unlink",  # what the callers of Storage.delete name, all below
    "storage/local_files.py LocalSink.finish_exclusively unlink",  # a temporary name with a random part
    "storage/local_files.py LocalSink.abort unlink",  # the same
    "storage/local_files.py delete_own unlink",  # what Storage.delete_own's callers say is raylight's
    "storage/local_files.py delete_own rmdir",  # an empty folder alone
    "storage/local_files.py LocalFiles.delete_own delete_own",
    "storage/remote_files.py RemoteFiles.delete delete_file",  # as LocalFiles.delete
    "storage/remote_files.py RemoteFiles.delete_own delete",  # as local_files.delete_own
    "storage/remote_files.py RemoteFiles.delete_own delete_dir",  # after a look that all in it is raylight's
    "storage/remote_files.py RemoteFiles.claim delete",  # a token with a random name
    "storage/remote_files.py RemoteSink.abort delete",  # a temporary name with a random part
    "storage/filesystem.py Storage.delete delete",  # after a look that no link leads there
    "storage/filesystem.py Storage.delete_own delete_own",  # the same
    "storage/filesystem.py Storage.check_writable delete",  # a probe with a random name
    "storage/local_directory.py LocalDirectory.close rmtree",  # a folder that mkdtemp has made
    "storage/checkpoints.py _delete_folder delete",  # the manifest, in a folder of an exact name
    "storage/checkpoints.py _delete_folder delete_own",  # files of exact names in it
    "storage/damage.py set_aside delete",  # a file of raylight's that is damaged, once it has another name
    "driver/journal.py merge_metrics delete",  # metrics-00000.parquet and so on
    "driver/shelf.py Shelf.retain delete",  # a checkpoint that the run has committed or listed
    "tuning/trial_run.py TrialRun.begin delete",  # a checkpoint of the trial's own version
    "storage/single_file.py remove delete",  # a file that user code names
    "loggers/uploads.py Upload.local rmtree",  # a folder that mkdtemp has made
    "lightning/machine.py is_shared_filesystem unlink",  # a probe with a random name
    "doctor.py _storage delete",  # a probe with a random name
    "report/csv_file.py CsvFile._rewrite unlink",  # a temporary name with a random part
}


def find_deletions(path: Path) -> set[str]:
    found = set()

    def visit(node: ast.AST, owner: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            is_scope = isinstance(child, ast.FunctionDef | ast.ClassDef)
            inner = (*owner, child.name) if is_scope and len(owner) < 2 and not _is_nested(owner) else owner
            name = child.attr if isinstance(child, ast.Attribute) else child.id if isinstance(child, ast.Name) else ""
            is_os_remove = isinstance(child, ast.Attribute) and ast.unparse(child) == "os.remove"
            if (name in DELETING or is_os_remove) and isinstance(getattr(child, "ctx", None), ast.Load):
                found.add(f"{path.relative_to(PACKAGE)} {'.'.join(inner)} {name}")
            visit(child, inner)

    visit(ast.parse(path.read_text()), ())
    return found


def _is_nested(owner: tuple[str, ...]) -> bool:
    """In a function of a module already: one inside it has no name of its own here."""
    return bool(owner) and owner[-1][0].islower()


def test_every_deletion_of_the_package_is_known() -> None:
    """One that is new gets a line above, which says why it can only be of a file that raylight has made."""
    assert set().union(*(find_deletions(path) for path in PACKAGE.rglob("*.py"))) == KNOWN


def test_what_ranks_write_may_be_deleted() -> None:
    names = [MODULE_FILE, model_file(0, 2), training_file(11, 12), "manifest.json", ".raylight-1f.partial"]
    assert all(store.OWN_FILE.fullmatch(name) for name in names)
    assert CHECKPOINT_FOLDER.fullmatch(checkpoint_directory(8).rpartition("/")[2])
    assert CHECKPOINT_FOLDER.fullmatch(checkpoint_directory(123456789, 3).rpartition("/")[2])
    assert not CHECKPOINT_FOLDER.fullmatch("step-00000008-mine")


def commit(version: Storage, step: int) -> store.Checkpoint:
    directory = checkpoint_directory(step)
    file = version.write(f"{directory}/model-00000-of-00001.pt", [b"weights"])
    return store.commit(version, directory, Manifest(step=step, epoch=0, files=(file,)))


def test_folders_of_a_persons_own_stay(storage: Storage) -> None:
    commit(storage, 8)
    mine = ["checkpoints/mine/data.bin", "checkpoints/step-8/data.bin", "checkpoints/step-00000009-old/manifest.json"]
    for path in mine:
        storage.write(path, [b"mine"])
    storage.write(f"{checkpoint_directory(16)}/model-00000-of-00001.pt", [b"half"])
    assert store.sweep_leftovers(storage) == ["step-00000016"]
    assert all(storage.read_bytes(path) == b"mine" for path in mine)


def test_a_copy_of_a_checkpoint_that_a_person_has_made_stays(storage: Storage) -> None:
    for entry in commit(storage, 8).storage.walk():
        content = storage.read_bytes(f"{checkpoint_directory(8)}/{entry.name}")
        storage.write(f"checkpoints/best so far/{entry.name}", [content])
    copy, original = sorted(store.list_checkpoints(storage), key=lambda checkpoint: checkpoint.name)
    store.delete(copy)
    store.delete(original)
    assert [checkpoint.name for checkpoint in store.list_checkpoints(storage)] == ["best so far"]


def test_a_file_of_a_persons_own_in_a_checkpoint_stays(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint, mine = commit(storage, 8), f"{checkpoint_directory(8)}/notes.txt"
    storage.write(mine, [b"mine"])
    storage.write(f"{checkpoint_directory(8)}/plots/loss.png", [b"mine"])
    store.delete(checkpoint)
    assert [entry.name for entry in storage.walk(checkpoint_directory(8))] == ["notes.txt", "plots/loss.png"]
    assert "notes.txt" in caplog.text
    assert store.list_checkpoints(storage) == []
    assert store.sweep_leftovers(storage) == []
    assert storage.read_bytes(mine) == b"mine"


@pytest.fixture(params=["local", "fsspec"])
def on_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(tmp_path / "version_0")
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return Storage(str(tmp_path / "version_0"), PyFileSystem(FSSpecHandler(fsspec.filesystem("file"))))


@pytest.mark.parametrize("name", ["x", "step-00000016", "step-00000016-attempt-2"])
def test_nothing_is_deleted_through_a_link(on_disk: Storage, tmp_path: Path, name: str) -> None:
    commit(on_disk, 8)
    elsewhere = tmp_path / "data"
    (elsewhere / "deep").mkdir(parents=True)
    kept = [elsewhere / "deep" / "a.bin", elsewhere / "manifest.json", elsewhere / "model-00000-of-00001.pt"]
    for path in kept:
        path.write_bytes(b"mine")
    (tmp_path / "version_0" / "checkpoints" / name).symlink_to(elsewhere)
    kept[1].unlink()  # without a manifest it looks like what a dead attempt has left
    assert store.sweep_leftovers(on_disk) == []
    assert kept[0].read_bytes() == kept[2].read_bytes() == b"mine"


def test_a_checkpoint_that_is_a_link_is_not_deleted(on_disk: Storage, tmp_path: Path) -> None:
    """Nor one in a folder of checkpoints that is a link."""
    checkpoint = commit(on_disk, 8)
    folder = tmp_path / "version_0" / "checkpoints" / "step-00000008"
    folder.rename(tmp_path / "aside")
    folder.symlink_to(tmp_path / "aside")
    with pytest.raises(StorageError, match=r"checkpoints/step-00000008 is a link, through which nothing is deleted"):
        store.delete(checkpoint)
    folder.unlink()
    (tmp_path / "aside").rename(folder)
    folder.parent.rename(tmp_path / "all")
    folder.parent.symlink_to(tmp_path / "all")
    with pytest.raises(StorageError, match=r"version_0/checkpoints is a link"):
        store.delete(checkpoint)
    assert sorted(os.listdir(folder)) == ["manifest.json", "model-00000-of-00001.pt"]


def test_a_resumed_fit_leaves_links_and_folders_of_a_persons_own(tmp_path: Path) -> None:
    class Net(pl.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(4, 1)

        def training_step(self, batch):
            return self.net(batch).pow(2).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    def fit(**arguments: object) -> pl.Result:
        loader = torch.utils.data.DataLoader(torch.ones(4, 4), batch_size=2)
        return pl.fit(
            Net(), loader, num_workers=0, use_gpu=False, storage_path=str(tmp_path / "runs"), logger=False,
            enable_progress_bar=False, enable_model_summary=False, **arguments,
        )  # fmt: skip

    version = Path(fit(max_epochs=1).path)
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "deep" / "a.bin").write_bytes(b"mine")
    (version / "checkpoints" / "x").symlink_to(tmp_path / "data")
    (version / "checkpoints" / "mine").mkdir()
    (version / "checkpoints" / "mine" / "b.bin").write_bytes(b"mine")
    assert fit(max_epochs=3, resume="last").num_steps == 6
    assert (tmp_path / "data" / "deep" / "a.bin").read_bytes() == b"mine"
    assert (version / "checkpoints" / "x").is_symlink()
    assert (version / "checkpoints" / "mine" / "b.bin").read_bytes() == b"mine"
    names = {"mine", "x", "step-00000002", "step-00000006-attempt-1"}
    assert {path.name for path in (version / "checkpoints").iterdir()} == names
