from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from raylight.contract.errors import InvalidArguments, StorageError
from raylight.storage.filesystem import Storage
from raylight.storage.versions import claim_version, list_runs, list_versions, open_version

NUM_PROCESSES = 20
ROOT = Path(__file__).parents[2]


# Forks: twenty interpreters of their own would take ten seconds to start here.
CLAIM_TOGETHER = """
import os, sys
import pyarrow.fs
from raylight.storage.filesystem import Storage
from raylight.storage.versions import claim_version

uri, number = sys.argv[1], int(sys.argv[2])
start, go = os.pipe()
ready, is_ready = os.pipe()
for _ in range(number):
    if os.fork() == 0:
        os.close(go)
        root = Storage(uri)
        root.exists("warm")  # connections are made before the start, so that the claims meet
        os.write(is_ready, b".")
        os.read(start, 1)  # returns when the parent closes its end
        version = claim_version(root, "digits")
        version.write_run({"number": version.number})
        os.write(1, b"%d\\n" % version.number)
        os._exit(0)
for _ in range(number):
    os.read(ready, 1)
os.close(go)
sys.exit(any(os.wait()[1] for _ in range(number)))
"""


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_twenty_processes_at_once_get_twenty_versions(kind: str, request: pytest.FixtureRequest) -> None:
    uri = request.getfixturevalue("s3_uri") if kind == "s3" else str(request.getfixturevalue("tmp_path"))
    command = [sys.executable, "-c", CLAIM_TOGETHER, uri, str(NUM_PROCESSES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    numbers = sorted(map(int, done.stdout.split()))
    assert len(numbers) == len(set(numbers)) == NUM_PROCESSES
    if kind == "local":
        assert numbers == list(range(NUM_PROCESSES))  # nothing is left out
    versions = list_versions(Storage(uri), "digits")
    assert [version.number for version in versions] == numbers
    assert [version.read_run()["number"] for version in versions] == numbers


def test_numbers_go_on_after_the_newest(storage: Storage) -> None:
    first = claim_version(storage, "digits")
    assert (first.number, first.name) == (0, "digits")
    assert claim_version(storage, "digits").number == 1  # though nothing was written into the first
    storage.write("digits/version_7/run.json", [b"{}"])
    storage.write("digits/version_x/run.json", [b"{}"])
    assert claim_version(storage, "digits").number == 8
    assert claim_version(storage, "other").number == 0


def test_a_claim_is_never_given_twice_even_if_its_owner_died(storage: Storage) -> None:
    assert storage.child("digits").claim_directory("version_0") == 0
    assert claim_version(storage, "digits").number == 1


def test_runs_and_versions_are_listed(storage: Storage) -> None:
    assert list_runs(storage) == []
    for name, number in (("b", 0), ("a", 2), ("a", 10)):
        storage.write(f"{name}/version_{number}/run.json", [b"{}"])
    storage.write("notes/readme.txt", [b""])
    assert list_runs(storage) == ["a", "b"]
    assert [version.number for version in list_versions(storage, "a")] == [2, 10]
    assert open_version(storage, "a").number == 10
    assert open_version(storage, "a", 2).path == storage.child("a", "version_2").uri


def test_what_is_not_there_is_told_with_what_is(storage: Storage) -> None:
    with pytest.raises(InvalidArguments, match="No run is there"):
        open_version(storage, "a")
    storage.write("digits/version_3/run.json", [b"{}"])
    with pytest.raises(InvalidArguments, match="Runs there: digits"):
        open_version(storage, "digit")
    with pytest.raises(InvalidArguments, match=r"has no version 1\. Versions there: 3"):
        open_version(storage, "digits", 1)


def test_run_json_is_replaced_whole_and_any_tool_reads_it(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    version = claim_version(Storage(tmp_path), "digits")
    assert version.read_run() == {}
    version.write_run({"status": "running"})
    values = {"loss": math.nan, "best": math.inf, "path": tmp_path, "lr": numpy.float32(0.5), "names": {"b", "a"}}
    version.write_run({"status": "finished", **values, "shape": (1, 2), 3: None, "flag": True})
    text = (tmp_path / "digits/version_0/run.json").read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert strict == version.read_run() == {
        "status": "finished", "loss": "nan", "best": "inf", "path": str(tmp_path), "lr": 0.5, "names": ["a", "b"],
        "shape": [1, 2], "3": None, "flag": True,
    }  # fmt: skip


def test_a_damaged_run_json_is_told(tmp_path: Path) -> None:
    version = claim_version(Storage(tmp_path), "digits")
    (tmp_path / "digits/version_0/run.json").write_bytes(b"\xff{")
    with pytest.raises(StorageError, match=r"run\.json is damaged: it is no JSON"):
        version.read_run()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", ".hidden", " a", "a:b", "a\0", "version_1"])
def test_names_that_cannot_be_a_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArguments, match="cannot be the name of a run"):
        claim_version(Storage(tmp_path), name)
    assert list(tmp_path.iterdir()) == []
