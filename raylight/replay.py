"""One failed step, run again in one process: what `raylight replay` makes of the script that it starts.

The script runs as it did; its `fit` of that run finds the variable below, and instead of training makes that one step,
with the weights of the checkpoint before it, the samples and the random numbers that the failed rank had.
"""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any

import torch

from raylight.contract.errors import CheckpointCorrupt, InvalidArguments, MissingFile
from raylight.contract.layout import FAILURES
from raylight.contract.plain_text import visible
from raylight.contract.seeding import seed_process, seed_step, set_rng_state
from raylight.contract.task import Loaders, Place, Task
from raylight.runs import Run, open_run
from raylight.storage.checkpoints import Checkpoint, list_checkpoints, verify
from raylight.user.module import Module
from raylight.user.trainer_names import TrainerNames
from raylight.worker.checkpoint.plain_values import restore_arrays
from raylight.worker.checkpoint.restore import read_file
from raylight.worker.data.batches import TrainBatch
from raylight.worker.data.training_data import find_loader
from raylight.worker.diagnosis.failure import format_user_traceback
from raylight.worker.group.control import Control
from raylight.worker.loop import Loop
from raylight.worker.session import Session
from raylight.worker.task_runner import prepare

PATH_VARIABLE, DEBUGGER_VARIABLE = "RAYLIGHT_REPLAY", "RAYLIGHT_DEBUGGER"

# What `worker.evidence` writes; the batch may be anything.
KINDS: dict[str, tuple[type, ...]] = {
    "kind": (str,), "text": (str,), "rank": (int,), "world_size": (int,), "seed": (int,), "step": (int,),
    "epoch": (int,), "index": (int,), "num_batches_seen": (int,), "data": (dict,), "indices": (list, NoneType),
    "share": (int, float), "size": (int,), "rng": (dict, NoneType),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Evidence:
    """The facts that a rank has kept of a step that failed."""

    run: Run
    facts: dict[str, Any]

    def describe(self) -> str:
        facts = self.facts
        samples = f", samples {facts['indices']}" if facts["indices"] is not None else ""
        return (
            f"step {facts['step']} of rank {facts['rank']} (epoch {facts['epoch']}, batch {facts['index']}{samples}), "
            f"which ended with {facts['kind']}: {facts['text']}"
        )


def read_evidence(path: str) -> Evidence:
    """`path` is a file of a version's folder `failures`, or a version, whose newest is taken. Raises MissingFile or
    CheckpointCorrupt."""
    place, mark, query = path.partition("?") if "://" in path else (path, "", "")
    folder, _, name = place.rstrip("/").rpartition("/")
    if not name.endswith(".pt"):
        folder, name = place, ""
    run = open_run(folder.removesuffix(f"/{FAILURES}") + mark + query)
    names = sorted(entry.name for entry in run.storage.list(FAILURES)) if run.storage.exists(FAILURES) else []
    name = name or (names[-1] if names else "")
    if name not in names:
        where = run.storage.uri_of(f"{FAILURES}/{name}")
        raise MissingFile(f"{where} is not there; there are: {', '.join(names) or 'none'}")
    with run.storage.open_read(f"{FAILURES}/{name}") as file:
        where = run.storage.uri_of(f"{FAILURES}/{name}")
        facts = restore_arrays(read_file(file, where))
    if not isinstance(facts, dict) or (wrong := _find_wrong(facts)):
        what = f" ({', '.join(wrong)})" if isinstance(facts, dict) else ""
        raise CheckpointCorrupt(f"{where} does not hold the facts of a failed step{what}")
    return Evidence(run, facts)


def _find_wrong(facts: dict[str, Any]) -> list[str]:
    missing = [key for key in (*KINDS, "batch") if key not in facts]
    return missing or [key for key, kinds in KINDS.items() if not isinstance(facts[key], kinds)]


def command_of(evidence: Evidence, given: list[str]) -> list[str]:
    """How the script is started again: as run.json tells, unless a command was `given`."""
    command = given or evidence.run.record.get("command") or []
    if not command or not os.path.isfile(command[0]):
        raise InvalidArguments(
            f"the script that made this run, {shlex.join(command) or 'unknown'}, is not here; go to its folder, or "
            "name it: raylight replay PATH -- train.py --its-arguments"
        )
    return [sys.executable, *command]


def is_wanted(name: str) -> bool:
    """Whether this process replays a step of the run `name`, instead of training it."""
    path = os.environ.get(PATH_VARIABLE)
    return bool(path) and read_evidence(str(path)).run.name == name


def replay(module: Module, loaders: Loaders, trainer: TrainerNames) -> None:
    """Makes the step and ends the process: with 1 if it fails again, else with 0."""
    evidence = read_evidence(os.environ[PATH_VARIABLE])
    facts, config = evidence.facts, trainer.config
    checkpoint = _checkpoint_before(evidence)
    print(visible(f"raylight: replaying {evidence.describe()}", keep="\n"))
    at = f"checkpoint {checkpoint.path} (step {checkpoint.step})" if checkpoint else "the script, before training"
    print(f"raylight: weights of {at}", flush=True)
    use_gpu = torch.cuda.is_available() and config.use_gpu is not False
    task = Task(
        stage="fit",
        module=module,
        loaders=loaders,
        config=replace(config, num_workers=0, checkpoint=None, logger=False, detect_anomaly=True),
        callbacks=trainer.callbacks,
        trainer=trainer,
        version_path=evidence.run.path,
        files=None,
        seed=facts["seed"],
        checkpoint=checkpoint,
    )
    place = Place(device=f"cuda:{torch.cuda.current_device()}" if use_gpu else "cpu")
    session = Session(task, place, Control())
    if config.seed is not None:
        seed_process(facts["seed"])
    for _ in prepare(session):
        continue
    loop, batch = _open(session, facts)
    _set_random_numbers(facts)
    try:
        with torch.autograd.set_detect_anomaly(True):
            loop.train_batch(batch)
    except Exception as error:
        print(format_user_traceback(error), file=sys.stderr, flush=True)
        debugger = os.environ.get(DEBUGGER_VARIABLE)
        if debugger:
            importlib.import_module(debugger).post_mortem(error.__traceback__)
        raise SystemExit(1) from None
    losses = [float(loss) for loss in loop.step.take_losses()]
    bad = [name for name, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    verdict = f"gradients that are not finite: {', '.join(bad)}" if bad else "all gradients are finite"
    print(f"raylight: the step did not raise; loss {losses}, {verdict}", flush=True)
    raise SystemExit(0)


def _checkpoint_before(evidence: Evidence) -> Checkpoint | None:
    """The newest whole one that is not of a later step."""
    step = evidence.facts["step"]
    found = sorted(list_checkpoints(evidence.run.storage), key=lambda checkpoint: checkpoint.step)
    usable = [one for one in found if one.step <= step and not one.manifest.weights_only]
    return next((one for one in reversed(usable) if not verify(one)), None)


def _open(session: Session, facts: dict[str, Any]) -> tuple[Loop, TrainBatch]:
    """The loop at the batch in question, divided as it was among the ranks."""
    worker, data = session.worker, session.worker.data
    loader = find_loader(worker.task.loaders, worker.hooks, "train")
    data.open(loader, facts["rank"], facts["world_size"], facts["epoch"])
    batches = data.batches
    assert batches is not None
    worker.progress.stand_at(facts["step"], facts["epoch"], facts["index"])
    loop = session.open_loop()
    if facts["batch"] is not None:
        return loop, TrainBatch(facts["batch"], facts["index"], facts["share"], facts["size"], False, False)
    batches.load_state_dict(facts["data"])
    for batch in batches.iterate(facts["epoch"], batches.position):
        if batch.index == facts["index"]:
            return loop, batch._replace(uneven=False)
    raise InvalidArguments(f"the training loader has no batch {facts['index']} any more in epoch {facts['epoch']}")


def _set_random_numbers(facts: dict[str, Any]) -> None:
    if facts["rng"] is not None:
        set_rng_state(facts["rng"])
    else:
        seed_step(facts["seed"], facts["rank"], facts["num_batches_seen"])
