"""Runs the benchmarks that are named, or all of them, each in a process of its own; the table comes last."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import figures
from benchmarks.machine import describe_machine

BENCHMARKS = (
    "small_step", "large_step", "data_fetch", "start", "checkpoint", "recovery", "sweep", "aggregate_ranks",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all where none is named")
    names = parser.parse_args().names or BENCHMARKS
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")

    machine = describe_machine()
    print(machine, flush=True)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "figures.jsonl")
        path.touch()
        for name in names:
            print(f"\n==> {name}", flush=True)
            command = [sys.executable, "-m", f"benchmarks.{name}"]
            if subprocess.run(command, env=os.environ | {figures.FILE_VARIABLE: str(path)}).returncode:
                failed.append(name)
        tables = [figures.table(title, rows) for title, rows in figures.read(path)]

    print("\n" + "\n\n".join(["=" * 78, machine, *tables]))
    if failed:
        print(f"\nnot measured, see above: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
