"""From the death of one of two workers to the next completed step, and from an exception to the caller's traceback."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.figures import Figure, show

HERE = Path(__file__).parent
NUM_REPETITIONS = 3
MAX_FAILED = 10
LIMIT_S = 300
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
SCRIPTS = {
    "raylight": [sys.executable],
    "raylight_cold": [sys.executable],
    "raylight_error": [sys.executable],
    "ray_train": [sys.executable],
    "torchrun": TORCHRUN,
}


class NotRecovered(Exception):
    """Seen of torchrun on two cores: the ranks it starts again now and then meet at addresses of those that ended."""


def time_recovery(name: str) -> tuple[float, int]:
    """Seconds from the failure to the first step, or the traceback, after it; and how many steps were lost."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        marks, output = Path(folder, "marks"), Path(folder, "output")
        command = [*SCRIPTS[name], str(HERE / "recovery_scripts.py"), name, str(marks)]
        with output.open("w") as file:  # no pipe: a daemon of Ray that outlives the script would keep it open
            subprocess.run(command, cwd=folder, env=environment, timeout=LIMIT_S, stdout=file, stderr=subprocess.STDOUT)
        events = {line.split()[0]: line.split()[1:] for line in marks.read_text().splitlines()}
        if "after" not in events:  # how a rival ends after that is its own affair
            raise NotRecovered(f"{name} did not go on:\n{output.read_text()[-4000:]}")
    (killed, at), (after, step) = events["killed"], events["after"]
    return float(after) - float(killed), max(0, int(at) - int(step) + 1)


def measure() -> list[Figure]:
    failed: dict[str, int] = {}
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in SCRIPTS}
    for repetition in range(NUM_REPETITIONS):
        for name, found in runs.items():
            while len(found) <= repetition:
                try:
                    found.append(time_recovery(name))
                    print(f"{repetition + 1} of {NUM_REPETITIONS}: {name} {found[-1][0]:.2f} s", flush=True)
                except NotRecovered:
                    failed[name] = failed.get(name, 0) + 1
                    if name.startswith("raylight") or failed[name] > MAX_FAILED:
                        raise
                    print(f"{repetition + 1} of {NUM_REPETITIONS}: {name} did not go on", flush=True)
    seconds = {name: statistics.median(time for time, _ in found) for name, found in runs.items()}
    lost = {name: statistics.median(steps for _, steps in found) for name, found in runs.items()}
    rival = min(seconds["ray_train"], seconds["torchrun"])
    return [
        Figure("kill -9 to the next completed step: raylight", seconds["raylight"], "s", at_most=0.5),
        Figure("the same, num_standby=0", seconds["raylight_cold"], "s"),
        Figure("the same: Ray Train, FailureConfig", seconds["ray_train"], "s"),
        Figure("the same: torchrun --max-restarts", seconds["torchrun"], "s"),
        Figure("raylight over the faster rival", seconds["raylight"] / rival, "times", at_most=0.2),
        Figure("steps lost: raylight", lost["raylight"], "steps", at_most=0),
        Figure("steps lost: Ray Train, a checkpoint every 10", lost["ray_train"], "steps"),
        Figure("steps lost: torchrun, a checkpoint every 10", lost["torchrun"], "steps"),
        Figure("recoveries that failed: torchrun", failed.get("torchrun", 0), "runs"),
        Figure("exception in training_step to the caller's traceback", seconds["raylight_error"], "s", at_most=2),
    ]


if __name__ == "__main__":
    show("Recovery", measure())
