"""RunRecord: run.json of one version, from its first writing to its last."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from raylight.contract.config import Config, describe, mask_command, to_plain
from raylight.contract.errors import StorageError, Superseded
from raylight.driver.deletion import describe_deletion, is_deleted
from raylight.driver.provenance import git_commit, package_versions
from raylight.storage.checkpoints import Checkpoint
from raylight.storage.fence import check_attempt
from raylight.storage.versions import Version

JsonObject = dict[str, Any]
"""JSON values by name."""


class RunRecord:
    """Owns what run.json says, and knows whether this driver may still write it.

    `version` is None if nothing is written (fast_dev_run, predict). A follow-up, as a test after a fit, adds its
    metrics to the record and changes nothing else in it.
    """

    def __init__(
        self, version: Version | None, config: Config, attempt: int, warn: Callable[[str], None], is_follow_up: bool
    ):
        self._version, self._config, self._attempt = version, config, attempt
        self._warn, self._is_follow_up = warn, is_follow_up
        self._began = time.time()
        self._content: JsonObject = {}
        self._hyperparameters: JsonObject = {}
        self._superseded: Superseded | None = None
        self._problem = ""  # the newest reason why it could not be written, until it is written

    # ---- reading

    @property
    def has_begun(self) -> bool:
        return bool(self._content)

    @property
    def seed(self) -> int | None:
        return self._content.get("seed")

    @property
    def started_at(self) -> float | None:
        return self._content.get("started_at")

    @property
    def num_restarts(self) -> int:
        return len(self._content.get("restarts", []))

    @property
    def is_of_trial(self) -> bool:
        return bool(self._content.get("trial"))

    @property
    def metrics(self) -> JsonObject:
        """As an earlier attempt of this version, or this one, has recorded them."""
        return dict(self._content.get("metrics", {}))

    @property
    def superseded(self) -> Superseded | None:
        """The error that ends this driver, once another has taken over the version."""
        return self._superseded

    @property
    def hyperparameters(self) -> JsonObject:
        return dict(self._hyperparameters)

    # ---- changing

    def begin(self, world_size: int, given: Mapping[str, object]) -> None:
        """The first content of this attempt; `given` are facts to record beside the arguments."""
        previous = self._version.read_run() if self._version is not None else {}
        if self._is_follow_up:
            self._content = previous
            return
        self._content = {
            **previous,
            "name": self._config.name,
            "version": self._version.number if self._version is not None else None,
            "status": "running",
            "started_at": previous.get("started_at", self._began),
            "finished_at": None,
            "arguments": describe(self._config),
            "hyperparameters": previous.get("hyperparameters", {}),
            "attempts": [
                *previous.get("attempts", []),
                {"attempt": self._attempt, "started_at": self._began, "world_size": world_size},
            ],
            "packages": package_versions(),
            "python": sys.version.split()[0],
            "git_commit": git_commit(),
            "command": mask_command(sys.argv),
            **given,
        }  # fmt: skip

    def add_hyperparameters(self, values: Mapping[str, object]) -> None:
        self._hyperparameters |= values

    def add_restart(self, step: int, world_size: int, reason: str) -> None:
        if self._content:
            restarts = self._content.setdefault("restarts", [])
            restarts.append({"time": time.time(), "step": step, "world_size": world_size, "reason": reason})

    def note_error(self, line: str) -> None:
        """The first line of the error that ends the run; nothing if the run had not begun."""
        if self._content:
            self._content["error"] = line

    def end(self, status: str, goodput: Mapping[str, float]) -> None:
        if self._is_follow_up:
            return
        attempts = self._content.get("attempts") or [{}]
        attempts[-1]["duration_s"] = time.time() - self._began
        self._content |= {
            "status": status,
            "finished_at": time.time(),
            "duration_s": sum(attempt.get("duration_s", 0.0) for attempt in attempts),
            "goodput": dict(goodput),
        }

    # ---- storage

    def write(self, metrics: Mapping[str, float], best: Checkpoint | None, last: Checkpoint | None) -> None:
        """Replaces run.json. If that fails, the person reads why, once for each reason: it is written at every
        checkpoint."""
        if self._version is None or not self._content or self._superseded is not None:
            return
        hyperparameters = dict(self._hyperparameters)  # it may grow meanwhile, since this is done in another thread
        if self._is_follow_up:
            self._content["metrics"] = {**self._content.get("metrics", {}), **to_plain(metrics)}
        else:
            self._content |= {
                "hyperparameters": {**self._content["hyperparameters"], **to_plain(hyperparameters)},
                "best_checkpoint": best.path if best else None,
                "last_checkpoint": last.path if last else None,
                "metrics": to_plain(metrics),
            }
        try:
            self._version.write_run(self._content)
            self._problem = ""
        except Exception as error:
            problem = f"run.json could not be written: {describe_error(error)}"
            if problem != self._problem:
                self._problem = problem
                self._warn(problem)

    def leave(self, error: Superseded) -> None:
        """Another driver has taken over the version, and owns what is on storage."""
        self._superseded = error

    def check_attempt(self) -> None:
        """Raises Superseded if a later attempt has taken over the version."""
        if self._version is not None:
            check_attempt(self._version.storage, self._attempt)

    def is_deleted(self) -> bool:
        """Whether somebody has deleted the version since the run began, which the person is warned of. Raises
        Superseded if another run has claimed the folder."""
        if self._version is None or not self._content:
            return False
        if not is_deleted(self._version, self._content["started_at"]):
            return False
        self._warn(describe_deletion(self._version))
        return True


def describe_error(error: Exception) -> str:
    """A file system that the user made may raise anything."""
    return str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
