"""Eight short trials of two workers on eight logical CPUs: raylight.sweep, and Ray Tune over Ray Train.

Both join the same running Ray, in a process of their own each time, and are timed from the call to its return: with
trials as short as these that is the time to start them. Each trial reports a loss and a checkpoint after every epoch.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import ray

from benchmarks.figures import Figure, show

HERE = Path(__file__).parent
NUM_REPETITIONS = 3
NUM_CPUS = 8
LIMIT_S = 600


def time_script(name: str, address: str) -> float:
    """Runs a script of `sweep_scripts` in an empty folder; the seconds that its sweep took."""
    with tempfile.TemporaryDirectory() as folder:
        answer, output = Path(folder, "answer"), Path(folder, "output")
        with output.open("w") as file:
            done = subprocess.run(
                [sys.executable, str(HERE / "sweep_scripts.py"), name, str(answer)], cwd=folder, timeout=LIMIT_S,
                env=os.environ | {"RAY_ADDRESS": address}, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{name} ended with {done.returncode}:\n{output.read_text()[-4000:]}")
        return json.loads(answer.read_text())


def measure() -> list[Figure]:
    os.environ["PYTHONPATH"] = str(HERE.parent)  # for all of Ray's processes: the benchmarked raylight
    seconds: dict[str, list[float]] = {"raylight": [], "ray_train": []}
    with ray.init(address="local", num_cpus=NUM_CPUS, include_dashboard=False, log_to_driver=False) as context:
        for repetition in range(NUM_REPETITIONS):
            for name, times in seconds.items():
                times.append(time_script(name, context.address_info["gcs_address"]))
                print(f"sweep, {repetition + 1} of {NUM_REPETITIONS}: {name} {times[-1]:.1f} s", flush=True)
    ours, theirs = (statistics.median(times) for times in seconds.values())
    return [
        Figure("eight trials of two workers: raylight.sweep", ours, "s"),
        Figure("the same: Ray Tune over Ray Train", theirs, "s"),
        Figure("raylight.sweep over Ray Tune over Ray Train", ours / theirs, "times", at_most=0.5),
    ]


if __name__ == "__main__":
    show("Sweep", measure())
