"""What is said of nodes that cannot work together, and of a storage path that they do not share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raylight.contract.errors import ClusterError, StorageError
from raylight.launch import node_checks
from raylight.launch.node_checks import Node, Record, check_nodes, check_storage, find_versions, look_for
from raylight.storage.filesystem import Storage

HERE = {"Python": "3.11", "raylight": "1.2.0", "torch": "2.9.1"}


def node(name: str = "one", clock: float = 105.0, **versions: str) -> Node:
    """Asked at 100 s and answered at 110 s of the driver's clock."""
    return Node(name, HERE | versions, clock, 100.0, 110.0)


def test_nodes_that_are_alike_pass() -> None:
    check_nodes([node(), node("two", clock=129.0), node("three", clock=71.0)], HERE)


def test_every_difference_is_told_at_once() -> None:
    nodes = [node(torch="2.4.0"), node("two", clock=5000.0), node("three", clock=20.0, raylight="none")]
    with pytest.raises(ClusterError) as caught:
        check_nodes(nodes, HERE)
    assert str(caught.value).splitlines()[1:] == [
        "  - one has torch 2.4.0, and the driver 2.9.1: install the same there",
        "  - the clock of three is 80 s behind the driver's: have it set by NTP (`timedatectl set-ntp true`)",
        "  - the clock of two is 4890 s ahead of the driver's: have it set by NTP (`timedatectl set-ntp true`)",
        "  - three has raylight none, and the driver 1.2.0: install the same there",
    ]


def test_versions_are_those_of_this_process_without_what_they_were_built_for() -> None:
    import torch

    import raylight

    found = find_versions()
    assert found["raylight"] == raylight.__version__
    assert torch.__version__.startswith(found["torch"])
    assert "+" not in found["torch"]


def test_the_record_is_found_where_storage_is_shared(tmp_path: Path) -> None:
    files = Storage(str(tmp_path))
    files.write("run.json", [b'{"started_at": 1.5}'])
    assert look_for(Record(files, str(tmp_path), 1.5)) == ""


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no run.json is there"), (b'{"started_at": 1.0}', "another run's"), (b"{", "Expecting property name")],
)
def test_why_the_record_is_not_seen(content: bytes | None, says: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(node_checks, "ARRIVAL_TIMEOUT_S", 0.0)
    files = Storage(str(tmp_path))
    if content is not None:
        files.write("run.json", [content])
    assert says in look_for(Record(files, str(tmp_path), 1.5))


def test_a_record_that_arrives_late_is_waited_for(tmp_path: Path, monkeypatch) -> None:
    files = Storage(str(tmp_path))

    def write_it(seconds: float) -> None:
        (tmp_path / "new").write_text('{"started_at": 1.5}')
        os.replace(tmp_path / "new", tmp_path / "run.json")

    monkeypatch.setattr(node_checks.time, "sleep", write_it)
    assert look_for(Record(files, str(tmp_path), 1.5)) == ""


def test_nodes_without_the_storage_are_named() -> None:
    check_storage({"one": "", "two": ""}, "/runs/x")
    with pytest.raises(StorageError, match=r"(?s)/runs/x/run\.json.*- two: no run\.json is there\nChoose a directory"):
        check_storage({"one": "", "two": "no run.json is there"}, "/runs/x")
