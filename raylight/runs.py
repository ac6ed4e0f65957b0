"""Runs read back: `open_run`, and the parts of `raylight runs`, `show`, `verify` and `export`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, BinaryIO

from raylight.contract.errors import CheckpointCorrupt, InvalidArguments, MissingFile, StorageError
from raylight.contract.layout import CHECKPOINTS, LOG_FILE, LOGS, MANIFEST_FILE, log_file
from raylight.driver.journal import read_metrics
from raylight.storage.checkpoints import (
    Checkpoint,
    check_there,
    check_whole,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    verify,
)
from raylight.storage.fence import read_fence
from raylight.storage.filesystem import Storage
from raylight.storage.retention import best
from raylight.storage.summaries import Summary, leftover_folders, monitor_of, read_run_or_status, summarize
from raylight.storage.versions import Version, list_runs, number_of, versions_in

if TYPE_CHECKING:
    import pyarrow as pa


class Run:
    """One version of a run, read back from storage. Each part is read when it is first asked for, then kept: open it
    again to see what a running run has added."""

    def __init__(self, version: Version):
        self._version = version

    def __repr__(self) -> str:
        held = f"{self.status}, {len(self.checkpoints)} checkpoints"
        return f"<Run {self.name} version {self.version}: {held}, {self.path}>"

    @property
    def name(self) -> str:
        return self._version.name

    @property
    def version(self) -> int:
        return self._version.number

    @property
    def path(self) -> str:
        """The version's folder, as a path or URI."""
        return self._version.path

    @property
    def storage(self) -> Storage:
        """The files of the version."""
        return self._version.storage

    @cached_property
    def record(self) -> dict[str, Any]:
        """`run.json`: status, arguments, hyperparameters, attempts, packages, git commit, final metrics, goodput."""
        return read_run_or_status(self._version)

    @property
    def status(self) -> str:
        """ "running", "finished", "stopped", "interrupted", "failed"; "claimed" before the fit has written anything."""
        return str(self.record.get("status", "claimed"))

    @property
    def arguments(self) -> dict[str, Any]:
        return self.record.get("arguments") or {}

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return self.record.get("hyperparameters") or {}

    @cached_property
    def metrics(self) -> pa.Table:
        """Every logged value: step, epoch, name, value, time."""
        return read_metrics(self.storage)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric. Raises InvalidArguments with the metrics that were logged."""
        curves = self.curves()
        if name not in curves:
            raise InvalidArguments(f"{name!r} was not logged by {self.path}.{_nearest(name, list(curves))}")
        return curves[name]

    def curves(self) -> dict[str, tuple[list[int], list[float]]]:
        """Steps and values of every metric, in the order in which they were first logged."""
        columns = (self.metrics[column].to_pylist() for column in ("name", "step", "value"))
        curves: dict[str, tuple[list[int], list[float]]] = {}
        for name, step, value in zip(*columns, strict=True):
            steps, values = curves.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
        return curves

    @cached_property
    def checkpoints(self) -> list[Checkpoint]:
        """Committed checkpoints, oldest first."""
        return list_checkpoints(self.storage)

    @property
    def best(self) -> Checkpoint | None:
        """The best checkpoint by the metric that the run monitored."""
        return best(self.checkpoints, *monitor_of(self.record))

    @property
    def last(self) -> Checkpoint | None:
        return self.checkpoints[-1] if self.checkpoints else None

    @cached_property
    def summary(self) -> Summary:
        return summarize(self._version)

    @cached_property
    def leftovers(self) -> list[str]:
        """Folders of checkpoints that were begun and never committed."""
        return leftover_folders(self._version, self.checkpoints)

    def verify(self, digests: bool = True) -> dict[str, list[str]]:
        """The problems of each checkpoint, by its path; an empty list if there are none."""
        return _verify_version(self._version, digests)

    def log_ranks(self) -> list[int]:
        """Ranks that have a log."""
        found = (LOG_FILE.fullmatch(entry.name) for entry in self.storage.list(LOGS))
        return sorted(int(match[1]) for match in found if match)

    def open_log(self, rank: int = 0) -> BinaryIO:
        """The log of a rank. Raises MissingFile with the ranks that have one."""
        try:
            return self.storage.open_read(log_file(rank))
        except MissingFile:
            ranks = ", ".join(map(str, self.log_ranks()))
            there = f"Ranks with a log: {ranks}." if ranks else "No rank has one: a run in one process keeps none."
            raise MissingFile(f"{self.path} has no log of rank {rank}. {there}") from None


def open_run(
    storage_path: str | os.PathLike[str],
    name: str | None = None,
    version: int | str | None = None,
    *,
    storage_filesystem: Any = None,
) -> Run:
    """Reads one version of a run back, by default the newest.

    `storage_path` is the storage that `fit` was given, the folder of one run, or that of one version (`Result.path`).
    Raises InvalidArguments if name or version are not there, with those that are.
    """
    versions = find_versions(storage_path, storage_filesystem)
    names = list(dict.fromkeys(found.name for found in versions))
    if name is None and len(names) > 1:
        raise InvalidArguments(f"{storage_path} holds {len(names)} runs; give name=, one of {', '.join(names)}.")
    if name is not None and name not in names:
        raise InvalidArguments(f"there is no run {name!r} in {storage_path}.{_nearest(name, names)}")
    chosen = [found for found in versions if name in (None, found.name)]
    if version is None:
        return Run(chosen[-1])
    number = number_of(version) if isinstance(version, str) and not version.isdigit() else int(version)
    for found in chosen:
        if found.number == number:
            return Run(found)
    numbers = ", ".join(str(found.number) for found in chosen)
    raise InvalidArguments(f"run {chosen[0].name!r} in {storage_path} has no version {version!r}; it has {numbers}.")


def list_summaries(
    path: str | os.PathLike[str], metric: str | None = None, mode: str | None = None, filesystem: Any = None
) -> list[Summary]:
    """One line for each version of each run under a path; with `metric`, the best first."""
    versions = find_versions(path, filesystem)
    summaries = versions[0].storage.map(lambda version: summarize(version, metric, mode), versions)
    if metric is None:
        return summaries
    if not any(summary.value is not None for summary in summaries):
        logged = sorted({name for version in versions for name in read_run_or_status(version).get("metrics") or {}})
        raise InvalidArguments(f"no version in {path} has logged {metric!r}.{_nearest(metric, logged)}")
    sign = -1.0 if mode == "max" else 1.0
    return sorted(summaries, key=lambda it: (it.value is None or it.value != it.value, sign * (it.value or 0.0)))


def verify_path(
    path: str | os.PathLike[str], digests: bool = True, filesystem: Any = None
) -> Iterator[tuple[str, list[str]]]:
    """Each checkpoint under a storage, run, version or checkpoint path, and its problems, as it is found."""
    storage = Storage(path, filesystem)
    if storage.exists(MANIFEST_FILE):
        yield storage.uri, _problems_in(storage, digests)
        return
    for version in find_versions(path, filesystem):
        yield from _verify_version(version, digests).items()


def _verify_version(version: Version, digests: bool) -> dict[str, list[str]]:
    """The problems of each checkpoint; without those that a running run deletes at the same time."""
    checkpoints = list_checkpoints(version.storage)
    results = {}
    for checkpoint in checkpoints:
        with suppress(MissingFile):
            results[checkpoint.path] = _problems_of(checkpoint, digests)
    for name in leftover_folders(version, checkpoints):
        folder = version.storage.child(CHECKPOINTS, name)
        with suppress(MissingFile):  # a folder without a manifest never was a checkpoint, which is no damage
            results[folder.uri] = _problems_in(folder, digests) or _attempt_problems(version, folder)
    return results


def _problems_in(folder: Storage, digests: bool) -> list[str]:
    try:
        return _problems_of(read_checkpoint(folder), digests)
    except CheckpointCorrupt as error:
        return [str(error)]


def _problems_of(checkpoint: Checkpoint, digests: bool) -> list[str]:
    if problems := verify(checkpoint, digests):
        check_there(checkpoint)
    return problems


def _attempt_problems(version: Version, folder: Storage) -> list[str]:
    """The problem of a folder; None if it was committed after the others were listed."""
    is_allowed = read_fence(version.storage).allows(read_checkpoint(folder).manifest.attempt, folder.name)
    return [] if is_allowed else ["it belongs to an attempt that had been replaced"]


def find_versions(path: str | os.PathLike[str], filesystem: Any = None) -> list[Version]:
    """All versions under the path of a storage, a run or one version, by run and number. Raises MissingFile."""
    storage = Storage(path, filesystem)
    if number_of(storage.name) >= 0:
        if not storage.list():
            raise MissingFile(f"there is no version at {storage.uri}.")
        return [Version(number_of(storage.name), storage, storage.parent().name)]
    versions = versions_in(storage)
    if not versions:
        versions = [version for name in list_runs(storage) for version in versions_in(storage.child(name))]
    if not versions:
        hint = "it holds no run" if storage.list() else "nothing is there"
        raise MissingFile(
            f"there are no runs in {storage.uri}: {hint}. "
            "Give the storage_path of a fit, or the folder of one run or version."
        )
    return versions


def checkpoint_at(path: str | os.PathLike[str], which: str = "best", filesystem: Any = None) -> Checkpoint:
    """The checkpoint at a path, verified; at the path of a version or run, its `which` ("best" or "last")."""
    storage = Storage(path, filesystem)
    if number_of(storage.name) < 0 and not versions_in(storage):
        return find_checkpoint(path, filesystem)
    run = open_run(path, storage_filesystem=filesystem)
    found = run.best if which == "best" else run.last
    if found is None:
        raise MissingFile(f"{run.path} has no checkpoint.")
    return check_whole(found)


def export(checkpoint: Checkpoint | str | os.PathLike[str], out: str | os.PathLike[str]) -> int:
    """Writes a checkpoint into one file, and returns how many weights it holds.

    The ending of `out` chooses the format: ".pt" or ".pth" the state dict alone, for `torch.load`, or ".safetensors";
    ".ckpt" all of the checkpoint in Lightning's format, to go on from.
    """
    text = os.fspath(out)
    folder, name = os.path.split(text)
    suffix = os.path.splitext(name)[1]
    if suffix not in (".pt", ".pth", ".safetensors", ".ckpt"):
        raise InvalidArguments(
            f"{text!r}: the name must end in .pt, .pth, .safetensors or .ckpt, which chooses the format."
        )
    if suffix == ".safetensors":
        _need_safetensors()
    from raylight.user.checkpoint_io import TorchCheckpointIO
    from raylight.worker.checkpoint.lightning_file import make_from_saved
    from raylight.worker.checkpoint.restore import load_weights

    found = checkpoint if isinstance(checkpoint, Checkpoint) else checkpoint_at(checkpoint)
    try:
        if suffix == ".ckpt":
            content = make_from_saved(found)
            TorchCheckpointIO().save_checkpoint(content, text)
            return len(content["state_dict"])
        weights = load_weights(found)
    except (CheckpointCorrupt, StorageError):
        check_there(found)
        raise
    with Storage(folder or ".").open_write(name) as file:
        if suffix == ".safetensors":
            file.write(_to_safetensors(weights, found))
        else:
            import torch

            torch.save(weights, file)  # type: ignore[arg-type]
    return len(weights)


def _to_safetensors(weights: dict[str, Any], checkpoint: Checkpoint) -> bytes:
    import torch
    from safetensors.torch import save

    others = [name for name, value in weights.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise InvalidArguments(
            f"safetensors holds only tensors; {checkpoint.path} also has {', '.join(map(repr, others))}. Write .pt."
        )
    # It refuses tensors that share memory, as tied weights do: each gets its own.
    whole = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    return save(whole, metadata={"format": "pt", "step": str(checkpoint.step), "epoch": str(checkpoint.epoch)})


def _need_safetensors() -> None:
    try:
        import safetensors  # noqa: F401
    except ImportError:
        raise InvalidArguments(
            "writing .safetensors needs the package safetensors: pip install 'raylight[safetensors]', or write .pt."
        ) from None


def _nearest(name: str, names: list[str]) -> str:
    if not names:
        return " There is none at all."
    close = difflib.get_close_matches(name, names, n=1)
    return (f" Did you mean {close[0]!r}?" if close else "") + f" There are: {', '.join(names)}."
