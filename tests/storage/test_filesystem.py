from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from raylight.contract.errors import InvalidArguments, MissingFile, StorageError
from raylight.contract.messages import SavedFile
from raylight.storage.digests import digest_of
from raylight.storage.filesystem import Storage

ROOT = Path(__file__).parents[2]
MB = 1 << 20


def test_what_was_written_is_read_back(storage: Storage) -> None:
    saved = storage.write("a/b.bin", [b"one ", bytearray(b"two "), memoryview(b"three")])
    assert saved == SavedFile("a/b.bin", 13, digest_of(b"one two three"))
    assert storage.read_bytes("a/b.bin") == b"one two three"
    assert storage.exists("a/b.bin")
    assert not storage.exists("a/c.bin")


def test_a_large_file_streams_and_is_digested(storage: Storage) -> None:
    parts = [bytes([number]) * (3 * MB) for number in range(8)]
    with storage.open_write("large.bin") as file:
        for part in parts:
            file.write(part)
    whole = b"".join(parts)
    assert file.saved == SavedFile("large.bin", len(whole), digest_of(whole))
    assert storage.read_bytes("large.bin") == whole


def test_views_of_numbers_are_written_as_their_bytes(storage: Storage) -> None:
    numpy = pytest.importorskip("numpy")
    values = numpy.arange(12, dtype="float64").reshape(3, 4)
    assert storage.write("numbers.bin", [values]).size == values.nbytes
    assert storage.read_bytes("numbers.bin") == values.tobytes()


def test_an_empty_file_is_a_file(storage: Storage) -> None:
    assert storage.write("empty", []).size == 0
    assert storage.read_bytes("empty") == b""


def test_reading_seeks(storage: Storage) -> None:
    content = os.urandom(5 * MB)
    storage.write("file.bin", [content])
    with storage.open_read("file.bin") as file:
        assert file.seek(-10, io.SEEK_END) == len(content) - 10
        assert file.read() == content[-10:]
        file.seek(1234)
        assert file.read(100) == content[1234:1334]
        assert file.tell() == 1334
        file.seek(0)
        assert file.read() == content


def write_half(storage: Storage, name: str, size: int) -> None:
    with storage.open_write(name) as file:
        file.write(bytes(size))
        raise RuntimeError("the state cannot be saved")


@pytest.mark.parametrize("size", [10, 25 * MB])
def test_an_exception_leaves_no_file(storage: Storage, size: int) -> None:
    storage.write("kept", [b"old"])
    for name in ("new", "kept"):
        with pytest.raises(RuntimeError, match="cannot be saved"):
            write_half(storage, name, size)
    assert [entry.name for entry in storage.list()] == ["kept"]
    assert storage.read_bytes("kept") == b"old"


def test_an_aborted_upload_stays_away_after_the_process_ends(s3_uri: str) -> None:
    """The destructor of pyarrow's stream would complete it."""
    script = (
        "import sys\nfrom raylight.storage.filesystem import Storage\n"
        "try:\n"
        "    with Storage(sys.argv[1]).open_write('half') as file:\n"
        "        file.write(bytes(25 << 20))\n"
        "        raise RuntimeError\n"
        "except RuntimeError:\n"
        "    print('aborted')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, s3_uri], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "aborted\n", done.stderr
    assert not Storage(s3_uri).exists("half")


def test_listing(storage: Storage) -> None:
    assert storage.list() == []
    assert storage.list("nowhere") == []
    storage.write("b.txt", [b"12"])
    storage.write("a/deep/c.txt", [b"3"])
    entries = {entry.name: entry for entry in storage.list()}
    assert list(entries) == ["a", "b.txt"]
    assert entries["a"].is_directory
    assert (entries["b.txt"].size, entries["b.txt"].is_directory) == (2, False)
    assert entries["b.txt"].modified_at > 1.6e9 or "memory" in storage.uri  # which keeps no times
    assert [(entry.name, entry.size) for entry in storage.walk()] == [("a/deep/c.txt", 1), ("b.txt", 2)]


def test_deleting_twice_is_no_error(storage: Storage) -> None:
    storage.write("a/b", [b"1"])
    storage.write("a/c/d", [b"1"])
    for _ in range(2):
        storage.delete("a/b")
        assert [entry.name for entry in storage.list("a")] == ["c"]
    for _ in range(2):
        assert storage.delete_own("a/c", lambda name: name == "d") == []
        assert not storage.exists("a/c/d")


def test_exclusive_creation(storage: Storage) -> None:
    assert storage.create_exclusive("lock", b"first")
    assert not storage.create_exclusive("lock", b"second")
    assert storage.read_bytes("lock") == b"first"
    assert [entry.name for entry in storage.list()] == ["lock"]


def test_a_missing_file_says_where(storage: Storage) -> None:
    with pytest.raises(MissingFile, match=r"could not read .*nowhere.* it is not there"):
        storage.read_bytes("nowhere")
    with pytest.raises(FileNotFoundError):
        storage.open_read("nowhere")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a//b", "./a", "a/.", "a\0b"])
def test_paths_cannot_leave_the_root(storage: Storage, path: str) -> None:
    with pytest.raises(InvalidArguments):
        storage.read_bytes(path)
    with pytest.raises(InvalidArguments):
        storage.child(path)


def test_a_child_is_rooted_in_its_folder(storage: Storage) -> None:
    child = storage.child("run", "version_0")
    child.write("run.json", [b"{}"])
    assert storage.read_bytes("run/version_0/run.json") == b"{}"
    assert child.name == "version_0"
    assert child.parent().name == "run"
    assert child.parent().read_bytes("version_0/run.json") == b"{}"
    assert "run/version_0" in child.uri


def test_pickles_are_the_same_place(storage: Storage) -> None:
    storage.write("a", [b"1"])
    again = pickle.loads(pickle.dumps(storage.child("b")))
    assert again.parent().read_bytes("a") == b"1"
    assert again.uri == storage.child("b").uri


def test_uris_open_the_same_place(tmp_path: Path, s3_uri: str) -> None:
    for storage in (Storage(tmp_path), Storage(s3_uri)):
        storage.child("x").write("a", [b"1"])
        assert Storage(storage.child("x").uri).read_bytes("a") == b"1"


@pytest.mark.parametrize("name", ["with space", "50%", "50%25", "a+b", "größe", "x=1&y=2", "#1", "q?"])
def test_uris_of_odd_names_open_the_same_place(tmp_path: Path, s3_uri: str, name: str) -> None:
    for storage in (Storage(tmp_path), Storage(s3_uri)):
        child = storage.child(name)
        child.write("a", [b"1"])
        assert Storage(child.uri).read_bytes("a") == b"1"
        assert Storage(child.uri).name == child.name == name
        assert [entry.name for entry in storage.list()] == [name]


@pytest.mark.parametrize(
    "uri",
    ["gs://bucket/a/b", "gs://anonymous@bucket/a", "gcs://bucket/a%20b", "abfs://box@site.dfs.core.windows.net/a/b"],
)
def test_uris_mean_what_they_mean_to_pyarrow(uri: str) -> None:
    from pyarrow.fs import FileSystem

    storage = Storage(uri)
    assert storage._root == FileSystem.from_uri(uri)[1]
    assert storage.uri == uri
    assert Storage(storage.child("c").uri)._root == storage._root + "/c"


def test_a_uri_of_hdfs_connects_only_when_it_is_used() -> None:
    storage = Storage("hdfs://namenode:8020/user/me/runs")
    assert (storage._root, storage.child("x").uri) == ("/user/me/runs", "hdfs://namenode:8020/user/me/runs/x")


def test_local_paths(tmp_path: Path, s3_uri: str) -> None:
    assert Storage(tmp_path).local_path("a") == str(tmp_path / "a")
    assert Storage(f"file://{tmp_path}").local_path() == str(tmp_path)
    assert Storage(s3_uri).local_path("a") is None


def test_a_local_file_system_of_pyarrow_is_local(tmp_path: Path) -> None:
    from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

    assert Storage("a", SubTreeFileSystem(str(tmp_path), LocalFileSystem())).local_path() == str(tmp_path / "a")
    assert Storage(tmp_path, LocalFileSystem()).is_local


def test_a_file_system_of_the_caller(s3_uri: str) -> None:
    from pyarrow.fs import FileSystem

    filesystem, path = FileSystem.from_uri(s3_uri)
    Storage(path, filesystem).write("large", [bytes(12 * MB)])
    assert Storage(s3_uri).info("large").size == 12 * MB


def test_local_storage_needs_no_pyarrow(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom raylight.storage.filesystem import Storage\n"
        "from raylight.storage import checkpoints, versions\n"
        f"versions.claim_version(Storage({str(tmp_path)!r}), 'digits').write_run({{}})\n"
        "print([name for name in ('pyarrow', 'torch', 'ray', 'rich', 'numpy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("s4://bucket/x", r"Did you mean s3://bucket/x\?"),
        ("hfds://x", "Did you mean hdfs://x"),
        ("http://x/y", "Known are plain paths"),
        ("s3:/bucket/x", r"Did you mean s3://bucket/x\?"),
        ("s3:///x", "names no bucket"),
        ("s3://b/x?endpoint_overide=localhost:1", "did you mean 'endpoint_override'"),
        ("gs:///x", "names no bucket"),
        ("abfs://account.dfs.core.windows.net/x", "write abfs://container@account"),
        ("", "is not a path"),
        ("a\0b", "is not a path"),
    ],
)
def test_places_that_are_none(place: str, said: str) -> None:
    with pytest.raises(InvalidArguments, match=said):
        Storage(place)


def test_a_file_system_that_is_none() -> None:
    with pytest.raises(InvalidArguments, match=r"not a pyarrow\.fs\.FileSystem"):
        Storage("x", filesystem="s3")


def test_keys_in_a_uri_are_used_and_not_shown(s3_uri: str) -> None:
    storage = Storage(s3_uri.replace("s3://", "s3://someone:hidden@"))
    storage.write("a", [b"1"])
    assert "hidden" not in storage.uri + repr(storage) + storage.child("b").uri
    assert pickle.loads(pickle.dumps(storage)).read_bytes("a") == b"1"


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("hdfs://me:hidden@name:8020/x", "hdfs://me@name:8020/x"),
        ("gs://someone:hidden@bucket/x", "gs://bucket/x"),
        ("hdfs://name:8020/x?access_token=hidden&replication=2", "hdfs://name:8020/x?access_token=***&replication=2"),
    ],
)
def test_passwords_of_other_kinds_of_storage_are_not_shown_either(place: str, shown: str) -> None:
    assert Storage(place).uri == shown
    with pytest.raises(InvalidArguments) as caught:
        Storage(place.replace("hdfs", "hfds").replace("gs:", "gz:"))
    assert "hidden" not in str(caught.value)


def test_writable(storage: Storage) -> None:
    storage.check_writable()
    assert storage.list() == []


def test_a_missing_bucket_is_told_at_once(s3_uri: str) -> None:
    storage = Storage(s3_uri.replace("s3://runs", "s3://no-such-bucket"))
    with pytest.raises(StorageError, match=r"(?s)NO_SUCH_BUCKET.*create it, or correct its name"):
        storage.check_writable()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"(?s)file/run.*is a file, not a folder"):
        Storage(tmp_path / "file" / "run").check_writable()


def test_a_read_only_place_is_told() -> None:
    with pytest.raises(StorageError, match="could not write /proc/raylight"):
        Storage("/proc/raylight").check_writable()
