"""Runs and their versions: `<storage>/<name>/version_3`, each claimed by one fit alone."""

from __future__ import annotations

import random
import re
import time
from dataclasses import dataclass
from typing import Any

from raylight.contract.config import RUN_NAMES, is_run_name
from raylight.contract.errors import InvalidArguments, MissingFile, StorageError
from raylight.contract.layout import RUN_FILE
from raylight.storage.damage import set_aside
from raylight.storage.filesystem import Storage
from raylight.storage.json_text import parse_object, to_json
from raylight.storage.record_kinds import find_wrong_field

_FOLDER = re.compile(r"version_(0|[1-9]\d*)")


class DamagedRecord(StorageError):
    """Storage has answered, and run.json cannot be read."""


@dataclass(frozen=True)
class Version:
    """One fit of the run `name`. `storage` is rooted at the version's folder."""

    number: int
    storage: Storage
    name: str

    @property
    def path(self) -> str:
        """The folder as a person would write it."""
        return self.storage.uri

    def read_run(self) -> dict[str, Any]:
        """The content of `run.json`; empty if the fit has not written it yet. Raises StorageError if it is damaged."""
        try:
            content = parse_object(self.storage.read_bytes(RUN_FILE))
            if wrong := find_wrong_field(content):
                raise ValueError(f"{wrong!r} has the wrong type")
        except MissingFile:
            return {}
        except ValueError as error:
            raise DamagedRecord(
                f"{self.storage.uri_of(RUN_FILE)} is damaged: {error}.\n"
                "The checkpoints of the version can still be read, and resume='last' goes on from them."
            ) from error
        return content

    def set_aside_damaged_run(self) -> None:
        """Starts a new record if run.json cannot be read. Call it before the version goes on."""
        try:
            self.read_run()
        except DamagedRecord as error:
            lost = "A new record of the version begins, without the arguments and attempts so far."
            set_aside(self.storage, RUN_FILE, str(error.__cause__), lost)

    def write_run(self, content: dict[str, Any]) -> None:
        """Replaces `run.json`; a reader sees the old or the new one, whole."""
        self.storage.write(RUN_FILE, [to_json(content)])


def claim_version(root: Storage, name: str) -> Version:
    """Takes the next free number. However many processes do so at once, no two get the same; numbers may be left out if
    a store has no exclusive creation."""
    check_name(name)
    run = root.child(name)
    number = _next_number(run)
    while lost_by := run.claim_directory(_folder(number)):
        if not root.is_local:
            time.sleep(random.uniform(0.0, 0.2))  # rivals would otherwise go on in step
        number = max(number + 1, _next_number(run)) + lost_by - 1
    return Version(number, run.child(_folder(number)), name)


def list_versions(root: Storage, name: str) -> list[Version]:
    """All versions of a run, oldest first; empty if there is no such run."""
    return versions_in(root.child(name))


def versions_in(run: Storage) -> list[Version]:
    """`list_versions`, from the storage rooted at the run."""
    numbers = sorted(number for entry in run.list() if entry.is_directory and (number := number_of(entry.name)) >= 0)
    return [Version(number, run.child(_folder(number)), run.name) for number in numbers]


def open_version(root: Storage, name: str, number: int | None = None) -> Version:
    """One version of a run, by default the newest. Raises InvalidArguments with those that are there."""
    versions = list_versions(root, name)
    if not versions:
        there = list_runs(root)
        known = f"Runs there: {', '.join(there)}." if there else "No run is there."
        raise InvalidArguments(f"there is no run {name!r} in {root.uri}. {known}")
    if number is None:
        return versions[-1]
    for version in versions:
        if version.number == number:
            return version
    numbers = ", ".join(str(version.number) for version in versions)
    raise InvalidArguments(f"run {name!r} in {root.uri} has no version {number}. Versions there: {numbers}.")


def list_runs(root: Storage) -> list[str]:
    """Names of the runs in a storage, sorted."""
    folders = [entry.name for entry in root.list() if entry.is_directory and not entry.name.startswith(".")]
    has_versions = root.map(lambda folder: bool(list_versions(root, folder)), folders)
    return [folder for folder, has in zip(folders, has_versions, strict=True) if has]


def number_of(folder: str) -> int:
    """3 for "version_3"; -1 if it is not a version's folder."""
    found = _FOLDER.fullmatch(folder)
    return int(found[1]) if found else -1


def check_name(name: str) -> None:
    """Raises InvalidArguments for a name that cannot be one folder on every kind of storage."""
    if not is_run_name(name):
        raise InvalidArguments(f"name={name!r} cannot be the name of a run, which becomes one folder: {RUN_NAMES}.")


def _next_number(run: Storage) -> int:
    return 1 + max((number_of(folder) for folder in run.claimed_names()), default=-1)


def _folder(number: int) -> str:
    return f"version_{number}"
