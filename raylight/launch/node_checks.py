"""Checks of the nodes of a cluster, made before user code runs on them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from raylight.contract.errors import ClusterError, StorageError
from raylight.contract.layout import RUN_FILE
from raylight.contract.task import Files

PACKAGES = ("raylight", "torch")
MAX_CLOCK_DIFFERENCE_S = 30.0
ARRIVAL_TIMEOUT_S = 5.0
"""A shared file system may show another machine's files a little late."""


@dataclass(frozen=True, slots=True)
class Node:
    """The answer of a worker about its machine, and when, by the driver's clock, it was asked and had answered."""

    name: str
    versions: Mapping[str, str]
    clock: float
    asked_at: float
    answered_at: float


def find_versions() -> dict[str, str]:
    """Of what has to be the same on all machines, as far as it matters: of Python the minor version, of a package not
    for which device it was built."""
    versions = {"Python": ".".join(map(str, sys.version_info[:2]))}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    return versions


def check_nodes(nodes: Sequence[Node], here: Mapping[str, str]) -> None:
    """Raises ClusterError, with everything that is wrong, if versions or clocks differ from the driver's."""
    problems = {problem for node in nodes for problem in [*_find_versions(node, here), *_find_clock(node)]}
    if problems:
        raise ClusterError("the nodes of the Ray cluster cannot work together:\n" + _list(problems))


def _find_versions(node: Node, here: Mapping[str, str]) -> list[str]:
    return [
        f"{node.name} has {name} {node.versions.get(name, 'none')}, and the driver {version}: install the same there"
        for name, version in here.items()
        if node.versions.get(name, "none") != version
    ]


def _find_clock(node: Node) -> list[str]:
    """A node's time can only be bracketed, by those at which it was asked and had answered."""
    ahead, behind = node.clock - node.answered_at, node.asked_at - node.clock
    difference = max(ahead, behind)
    if difference <= MAX_CLOCK_DIFFERENCE_S:
        return []
    where = "ahead of" if ahead > 0 else "behind"
    return [
        f"the clock of {node.name} is {difference:.0f} s {where} the driver's: have it set by NTP "
        "(`timedatectl set-ntp true`)"
    ]


@dataclass(frozen=True, slots=True)
class Record:
    """The run.json that the driver has written in `files`, which a person knows as `path`. `stamp` tells it from any
    other."""

    files: Files
    path: str
    stamp: float


def look_for(record: Record) -> str:
    """On a node: why the record is not to be seen there; empty if it is."""
    deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
    while True:
        try:
            with record.files.open_read(RUN_FILE) as file:
                found = json.load(file).get("started_at")
            problem = "" if found == record.stamp else f"another run's {RUN_FILE} is there"
        except FileNotFoundError:
            problem = f"no {RUN_FILE} is there"
        except (StorageError, ValueError) as error:
            return str(error)
        if not problem or time.monotonic() > deadline:
            return problem
        time.sleep(0.1)


def check_storage(problems: Mapping[str, str], path: str) -> None:
    """`problems`: by node, what `look_for` said. Raises StorageError if a node does not see the storage."""
    wrong = {f"{node}: {problem}" for node, problem in problems.items() if problem}
    if wrong:
        raise StorageError(
            f"storage_path is not one place for all nodes. The driver has written {path}/{RUN_FILE}, and on\n"
            f"{_list(wrong)}\n"
            "Choose a directory that all of them mount, or a URI that all may read and write: s3://, gs://, hdfs://."
        )


def _list(lines: set[str]) -> str:
    return "\n".join(f"  - {line}" for line in sorted(lines))
