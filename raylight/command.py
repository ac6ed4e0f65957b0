"""The command `raylight`: looks at runs, checks and exports checkpoints, examines the machine."""

from __future__ import annotations

import argparse
import codecs
import io
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raylight import __version__
from raylight.contract.errors import InvalidArguments, MissingFile, RaylightError
from raylight.contract.plain_text import visible
from raylight.speed.arguments import add_benchmark_arguments

if TYPE_CHECKING:
    from rich.console import Console

    from raylight.runs import Run

PLAIN_WIDTH = 200  # of a pipe or file
LOCAL_INTERVAL_S, REMOTE_INTERVAL_S = 0.3, 2.0  # between looks at a log that is followed


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if something is wrong, 2 for a command that cannot be parsed."""
    for name in ("stdout", "stderr"):  # as after `>&-`
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    logging.basicConfig(handlers=[_log_handler()], level=logging.WARNING)
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except RaylightError as error:
        print(visible(f"raylight {options.name}: {error}", keep="\n"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, as `head` does, has seen enough; nothing more may be flushed to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class _VisibleFormatter(logging.Formatter):
    """Escapes control characters: log records may quote files on storage."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), keep="\n\t")


def _log_handler() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(_VisibleFormatter("%(levelname)s: %(message)s"))
    return handler


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="raylight", description=__doc__)
    parser.add_argument("--version", action="version", version=f"raylight {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    place = "storage_path of a fit, folder of a run or of a version; a path or URI such as s3://bucket/folder"

    runs = commands.add_parser("runs", help="list runs and versions")
    runs.add_argument("path", metavar="PATH", help=place)
    runs.add_argument("--metric", help="show this metric, best first")
    runs.add_argument("--mode", choices=("min", "max"), default="min", help="which of its values is the best (min)")
    runs.set_defaults(command=_runs)

    show = commands.add_parser("show", help="show one version: arguments, environment, metrics, checkpoints")
    _add_version(show, place)
    show.set_defaults(command=_show)

    export = commands.add_parser("export", help="write a checkpoint into one file")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a checkpoint, or of a version")
    export.add_argument("out", metavar="OUT", help="file to write: .pt, .pth, .safetensors (weights), .ckpt (all)")
    export.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of a version (best)")
    export.set_defaults(command=_export)

    verify = commands.add_parser("verify", help="compare every byte of checkpoints with their digests")
    verify.add_argument("path", metavar="PATH", help=f"{place}, or of a checkpoint")
    verify.add_argument("--sizes", action="store_true", help="compare sizes alone, which is quick")
    verify.set_defaults(command=_verify)

    logs = commands.add_parser("logs", help="print what a rank printed")
    _add_version(logs, place)
    logs.add_argument("--rank", type=int, default=0, help="rank of the worker (0)")
    logs.add_argument("--follow", "-f", action="store_true", help="go on until the version has ended")
    logs.add_argument("--lines", "-n", type=int, help="begin with the last LINES lines")
    logs.set_defaults(command=_logs)

    benchmark = commands.add_parser("benchmark", help="measure how fast a checkpoint's module is, or compare two")
    add_benchmark_arguments(benchmark)
    benchmark.set_defaults(command=_benchmark)

    replay = commands.add_parser("replay", help="run one failed training step again, in one process")
    replay.add_argument("path", metavar="PATH", help="file in the folder failures of a version, or the version")
    replay.add_argument("--yes", "-y", action="store_true", help="run the script that run.json names without asking")
    replay.add_argument("--debugger", metavar="MODULE", help="enter it if the step fails: pdb, ipdb, pudb, ...")
    replay.add_argument("script", nargs="*", help="the script and its arguments, after -- (default: those in run.json)")
    replay.set_defaults(command=_replay)

    run = commands.add_parser("run", help="run a script, and start it again if it is killed")
    run.add_argument("--retries", type=int, default=3, help="how often it may be started again (3)")
    run.add_argument("script", nargs=argparse.REMAINDER, help="the script and its arguments")
    run.set_defaults(command=_run)

    doctor = commands.add_parser("doctor", help="examine this machine and, if given, a storage; or a Lightning script")
    doctor.add_argument(
        "script", metavar="FILE", nargs="*", help="a script written for Lightning: what to change in it"
    )
    doctor.add_argument("--storage", metavar="PATH", help="write, read and delete a file there")
    doctor.set_defaults(command=_doctor)
    return parser


def _add_version(parser: argparse.ArgumentParser, place: str) -> None:
    parser.add_argument("path", metavar="PATH", help=place)
    parser.add_argument("--run", help="name of the run, if PATH holds several")
    parser.add_argument("--version", type=int, help="number of the version (the newest)")


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=PLAIN_WIDTH)


def _runs(options: argparse.Namespace) -> int:
    from raylight.report.tables import runs_table
    from raylight.runs import list_summaries

    mode = options.mode if options.metric else None
    _console().print(runs_table(list_summaries(options.path, options.metric, mode)))
    return 0


def _show(options: argparse.Namespace) -> int:
    from raylight.report.tables import run_view
    from raylight.runs import open_run

    run = open_run(options.path, options.run, options.version)
    _console().print(run_view(run.summary, run.record, run.curves(), run.checkpoints, run.best, run.leftovers))
    return 0


def _export(options: argparse.Namespace) -> int:
    from raylight.runs import checkpoint_at, export

    checkpoint = checkpoint_at(options.checkpoint, options.which)
    number = export(checkpoint, options.out)
    print(visible(f"{options.out}: {number} entries, the weights of {checkpoint.path} (step {checkpoint.step})"))
    return 0


def _benchmark(options: argparse.Namespace) -> int:
    from raylight.speed.command import run

    for table in run(options):
        _console().print(table)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from raylight.report.tables import count_text, verification_lines
    from raylight.runs import verify_path

    results: list[tuple[str, list[str]]] = []

    def noted() -> Any:
        for result in verify_path(options.path, digests=not options.sizes):
            results.append(result)
            yield result

    console = _console()
    for line in verification_lines(noted()):
        console.print(line)
    damaged = sum(bool(problems) for _, problems in results)
    counted = f"{count_text(len(results), 'checkpoint')}, {damaged} damaged"
    console.print(counted if results else "no checkpoint is there")
    return 1 if damaged else 0


def _logs(options: argparse.Namespace) -> int:
    from raylight.runs import open_run

    run = open_run(options.path, options.run, options.version)
    text = codecs.getincrementaldecoder("utf-8")("replace")
    position, num_lines = 0, options.lines
    while True:
        # The status is read first: what a run wrote before it ended is then printed for certain.
        goes_on = options.follow and run.status in ("claimed", "running")
        data, position = _read_log(run, options.rank, position, may_be_missing=goes_on)
        if num_lines is not None and data:
            data, num_lines = b"".join(data.splitlines(keepends=True)[-num_lines:] if num_lines > 0 else []), None
        sys.stdout.write(text.decode(data, final=not goes_on))
        sys.stdout.flush()
        if not goes_on:
            return 0
        # No event says on every kind of storage that a file has grown.
        time.sleep(LOCAL_INTERVAL_S if run.storage.is_local else REMOTE_INTERVAL_S)
        run = open_run(run.path)


def _read_log(run: Run, rank: int, position: int, may_be_missing: bool) -> tuple[bytes, int]:
    """The log from `position` on, and the position after it."""
    try:
        with run.open_log(rank) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(position if position <= size else 0)  # a shorter file is a new one
            return file.read(), file.tell()
    except MissingFile:
        if not may_be_missing:
            raise
        return b"", position


def _replay(options: argparse.Namespace) -> int:
    from raylight.replay import DEBUGGER_VARIABLE, PATH_VARIABLE, command_of, read_evidence

    command = command_of(read_evidence(options.path), options.script)
    if not options.script:
        _confirm(command, options.path, options.yes)
    environment = os.environ | {PATH_VARIABLE: options.path}
    if options.debugger:
        environment[DEBUGGER_VARIABLE] = options.debugger
    sys.stdout.flush()
    os.execve(command[0], command, environment)  # in its place, so that a debugger has the terminal


def _confirm(command: list[str], path: str, is_agreed: bool) -> None:
    """Asks the user: whoever may write to storage chooses the command that would run here."""
    shown = visible(shlex.join(command))
    print(f"raylight: the record of the run in {visible(path)} names this command, to be run here:\n  {shown}")
    if is_agreed:
        return
    if not sys.stdin.isatty():
        raise InvalidArguments(
            "stdin is no terminal, so nobody can agree to that command: add --yes, or name the script yourself: "
            "raylight replay PATH -- train.py --its-arguments"
        )
    if input("run it? [y/N] ").strip().lower() not in ("y", "yes"):
        raise InvalidArguments("not run. To run another script: raylight replay PATH -- train.py --its-arguments")


def _run(options: argparse.Namespace) -> int:
    from raylight.supervise import supervise

    script = options.script[1:] if options.script[:1] == ["--"] else options.script
    return supervise([sys.executable, *script], options.retries)


def _doctor(options: argparse.Namespace) -> int:
    from raylight.doctor import examine, examine_scripts
    from raylight.report.tables import doctor_table

    checks = list(examine_scripts(options.script) if options.script else examine(options.storage))
    _console().print(doctor_table(checks))
    return 1 if any(state == "bad" for state, _, _ in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
