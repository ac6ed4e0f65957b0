"""How long until training runs: importing, the first batch in this process, the first batch on two workers.

Every measurement is a fresh process. Two workers are timed from the start of the process, because Lightning's ddp and
Ray Train do part of their work before and part after their `fit`; each starts its own local Ray where it needs one.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.figures import Figure, show

HERE = Path(__file__).parent
NUM_REPETITIONS = 3
NUM_IMPORTS = 7
LIMIT_S = 300

IMPORT_SCRIPT = """
import time, torch
start = time.perf_counter()
import raylight
imported = time.perf_counter()
raylight.Module, raylight.fit
print(imported - start, time.perf_counter() - start)
"""


def import_ms() -> tuple[float, float]:
    """Milliseconds of `import raylight`, and of that with the names a script uses, which are loaded when first used."""
    done = subprocess.run([sys.executable, "-c", IMPORT_SCRIPT], capture_output=True, text=True, check=True)
    imported, used = map(float, done.stdout.split())
    return imported * 1e3, used * 1e3


def time_script(command: list[str]) -> dict[str, float]:
    """Runs a script of `start_scripts` in an empty folder; seconds from process start to its "call" and "batch"."""
    # Its own Ray, not one that happens to run, and the benchmarked raylight, wherever the folder is.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(HERE.parent)
    with tempfile.TemporaryDirectory() as folder:
        marks, output = Path(folder, "marks"), Path(folder, "output")
        start = time.time()
        with output.open("w") as file:  # no pipe: a daemon of Ray that outlives the script would keep it open
            done = subprocess.run(
                [sys.executable, *command, str(marks)], cwd=folder, env=environment, timeout=LIMIT_S,
                stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{output.read_text()[-4000:]}")
        events = dict(line.split() for line in marks.read_text().splitlines())
    return {event: float(moment) - start for event, moment in events.items()}


def measure_scripts(scripts: dict[str, list[str]], title: str) -> dict[str, dict[str, float]]:
    """Runs the scripts in turn; for each, the medians of seconds from "start" and from "call" to its first batch."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in scripts}
    for repetition in range(NUM_REPETITIONS):
        for name, command in scripts.items():
            runs[name].append(time_script(command))
            print(f"{title}, {repetition + 1} of {NUM_REPETITIONS}: {name} {runs[name][-1]['batch']:.2f} s", flush=True)
    return {
        name: {
            "start": statistics.median(times["batch"] for times in ours),
            "call": statistics.median(times["batch"] - times["call"] for times in ours),
        }
        for name, ours in runs.items()
    }


def measure() -> list[Figure]:
    imported, used = map(statistics.median, zip(*(import_ms() for _ in range(NUM_IMPORTS)), strict=True))
    script = str(HERE / "start_scripts.py")
    alone = {name: [script, name] for name in ("raw", "in_process", "lightning")}
    pairs = {name: [script, name] for name in ("ray", "lightning_ddp", "ray_train")}
    pairs["lean"] = [str(HERE / "ray_start.py")]
    one = measure_scripts(alone, "one process")
    two = measure_scripts(pairs, "two workers")
    lean = two["lean"]["start"]
    rival = min(two["lightning_ddp"]["start"], two["ray_train"]["start"])
    return [
        Figure("import raylight, after import torch", imported, "ms", at_most=50),
        Figure("the same, and raylight.Module and fit named", used, "ms"),
        Figure("fit in this process, call to first batch: raylight", one["in_process"]["call"], "s", at_most=0.3),
        Figure("the same: raw loop", one["raw"]["call"], "s"),
        Figure("the same: Lightning", one["lightning"]["call"], "s"),
        Figure("two workers, process start to first batch: raylight", two["ray"]["start"], "s"),
        Figure("the same: lean script of Ray actors", lean, "s"),
        Figure("the same: Lightning ddp", two["lightning_ddp"]["start"], "s"),
        Figure("the same: Ray Train", two["ray_train"]["start"], "s"),
        Figure("raylight over the lean script", two["ray"]["start"] / lean, "times", at_most=1.15),
        Figure("raylight over the faster rival", two["ray"]["start"] / rival, "times", at_most=1),
        Figure("two workers, call to first batch: raylight", two["ray"]["call"], "s"),
        Figure("the same: lean script of Ray actors", two["lean"]["call"], "s"),
    ]


if __name__ == "__main__":
    show("Start", measure())
