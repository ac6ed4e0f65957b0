"""What a person sees: bars in a terminal, plain lines elsewhere, and nothing twice."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from raylight.contract.messages import Notice, Output, Progress, Saved, StageFinished, StageStarted
from raylight.driver.result import Result
from raylight.report import console as console_module
from raylight.report.console import Console, find_place
from raylight.runs import open_run

RESULT = Result(
    status="finished", metrics={"val_loss": 0.25}, path="/runs/a/version_0", best_checkpoint=None,
    last_checkpoint=None, checkpoints=[], num_steps=20, num_epochs=2,
)  # fmt: skip


class Clock:
    """Stands in for `time` in the console, so that seconds pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(console_module, "time", clock)
    return clock


def train(console: Console, clock: Clock, seconds: int, batches_a_second: int = 8) -> None:
    console.handle(0, StageStarted("train", 0, 0, 1000))
    for batch in range(1, seconds * batches_a_second + 1):
        for rank in range(2):
            console.handle(rank, Progress("train", 0, batch, batch, batch * 32, {"loss": 0.5}))
        clock.now += 1 / batches_a_second


def test_without_a_terminal_there_is_a_line_every_few_seconds(clock):
    stream = io.StringIO()
    console = Console(stream=stream, world_size=2, max_epochs=4)
    train(console, clock, seconds=21)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[1] == "epoch 1/4 81/1,000, step 81, 512 samples/s, 8:10 left, loss 0.5"
    assert "\x1b" not in stream.getvalue()


def test_a_plain_line_tells_of_validation_too(clock):
    stream = io.StringIO()
    console = Console(stream=stream, max_epochs=1)
    train(console, clock, seconds=1)
    console.handle(0, StageStarted("validate", 0, 8, 8))
    console.handle(0, Progress("validate", 0, 8, 1, 32))
    clock.now += 10
    console.handle(0, Progress("validate", 0, 8, 3, 96))
    console.handle(0, StageFinished("validate", 0, 10))
    assert stream.getvalue().startswith("epoch 1/1 8/1,000, step 8, ")
    assert ", validate 3/8, 6.4 samples/s" in stream.getvalue()


def test_the_summary_comes_once_at_the_end():
    stream = io.StringIO()
    console = Console(stream=stream)
    console.handle(0, StageStarted("train", 0, 0, 10))
    console.close(RESULT)
    console.close()
    assert stream.getvalue().count("tensorboard --logdir /runs/a/version_0") == 1
    assert "val_loss" in stream.getvalue()


def test_disabled_it_shows_prints_and_notices_alone(clock):
    stream = io.StringIO()
    console = Console(enabled=False, stream=stream)
    train(console, clock, seconds=20)
    console.handle(0, Output("printed by rank 0\n"))
    console.handle(0, Notice("storage is away", "warning"))
    console.close(RESULT)
    assert stream.getvalue() == "printed by rank 0\nraylight: warning: storage is away\n"


def test_prints_of_rank_0_alone_are_shown_and_what_several_ranks_say_is_said_once():
    stream = io.StringIO()
    console = Console(stream=stream)
    for rank in range(3):
        console.handle(rank, Output(f"from rank {rank}\n"))
        console.handle(rank, Notice("the same of all"))
    console.handle(1, Notice("only of rank 1"))
    console.handle(0, Notice("the same of all"))  # it happened again
    console.handle(2, Notice("layer  params\na      1"))
    assert stream.getvalue() == (
        "from rank 0\nraylight: the same of all\nraylight: only of rank 1\nraylight: the same of all\n"
        "layer  params\na      1\n"
    )


def test_warnings_of_the_driver_go_where_the_bars_are_unless_the_program_has_a_place_for_them(monkeypatch, capfd):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    stream, log = io.StringIO(), logging.getLogger("raylight.storage")
    console = Console(stream=stream)
    log.warning("could not write s3://runs/a: SlowDown; trying again")
    console.close()
    assert stream.getvalue() == "raylight: warning: could not write s3://runs/a: SlowDown; trying again\n"
    assert capfd.readouterr().err == ""

    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    console = Console(stream=stream)
    log.warning("again")
    console.close()
    assert len(stream.getvalue().splitlines()) == 1


def test_tables_of_model_and_results():
    stream = io.StringIO()
    console = Console(stream=stream)
    console.show_model(torch.nn.Sequential(torch.nn.Linear(2, 3)))
    console.show_results("test", [{"acc": 0.5}])
    console.show_results("test", [{}])
    assert "Linear" in stream.getvalue()
    assert stream.getvalue().endswith("acc       0.5\n")
    empty = io.StringIO()
    Console(stream=empty).show_model(torch.nn.Module())
    assert empty.getvalue() == ""


def test_a_stream_without_unicode_still_gets_everything():
    raw = io.BytesIO()
    console = Console(stream=io.TextIOWrapper(raw, encoding="ascii"))
    console.show_model(torch.nn.Sequential(torch.nn.Linear(2, 3)))
    assert b"Linear" in raw.getvalue()
    assert b"-----" in raw.getvalue()


def test_messages_that_are_not_for_a_person_are_passed_over():
    stream = io.StringIO()
    Console(stream=stream).handle(0, Saved("checkpoints/step-00000001", 1, 0, (), {}, False, 0.0, 0.0))
    assert stream.getvalue() == ""


def test_places(monkeypatch):
    assert find_place(io.StringIO()) == "plain"
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setenv("TERM", "xterm")
        assert find_place(terminal) == "terminal"
        monkeypatch.setenv("TERM", "dumb")
        assert find_place(terminal) == "plain"
    os.close(master)


def test_neither_building_a_console_nor_plain_lines_import_rich():
    code = """
import io, sys
from raylight.contract.messages import Progress, StageStarted
from raylight.report.console import Console
console = Console(stream=io.StringIO())
console.handle(0, StageStarted("train", 0, 0, 10))
console.handle(0, Progress("train", 0, 1, 1, 32))
console.close()
assert not [name for name in sys.modules if name.split(".")[0] in ("rich", "torch", "ray", "pyarrow")], sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


SCRIPT = """
import sys, time
from raylight.contract.messages import Notice, Output, Progress, StageFinished, StageStarted
from raylight.report import drawing
from raylight.report.console import Console

mode = sys.argv[1]
before = sys.stdout, sys.stderr
console = Console(max_epochs=1)
assert "rich" not in sys.modules
console.handle(0, StageStarted("train", 0, 0, 10))
console.handle(0, Progress("train", 0, 1, 1, 32, {"loss": 0.5}))
while not console._drawing.printed_above.is_above:
    time.sleep(0.01)
print("a line of the user", "long " * 40)
print("first half, ", end="")
print("second half")
print("to stderr", file=sys.stderr)
console.handle(0, Output("printed by a worker\\n"))
console.handle(0, Notice("be careful", "warning"))
if mode == "fork":
    import os
    child = os.fork()
    if child == 0:
        print("from a forked process", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
if mode == "interrupt":
    try:
        import os, signal
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
    except KeyboardInterrupt:
        pass
if mode == "exit":
    sys.exit(0)
console.handle(0, StageStarted("validate", 0, 10, 4))
drawn, render = [], console._drawing._render
console._drawing._render = lambda *size: drawn.append(render(*size)) or drawn[-1]
console.handle(0, Progress("validate", 0, 10, 2, 32))
while not any("validate" in text.plain for text in drawn):
    time.sleep(0.01)
console.handle(0, StageFinished("validate", 0, 10))
console.handle(0, Progress("train", 0, 10, 10, 320, {"loss": 0.25}))
print("not finished by a newline", end="")
console.close()
assert (sys.stdout, sys.stderr) == before
print("\\nafter")
"""


def run_in_terminal(tmp_path, mode: str) -> str:
    """Runs the script with a pseudo-terminal of 100 columns; gives all that it wrote there."""
    import fcntl
    import struct
    import termios

    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(script), mode], stdin=slave, stdout=slave, stderr=slave,
        env={**os.environ, "TERM": "xterm", "PYTHONUTF8": "1"},
    )  # fmt: skip
    os.close(slave)
    written = b""
    try:
        while chunk := os.read(master, 65536):
            written += chunk
    except OSError:  # Linux says so when the last writer has closed its end
        pass
    os.close(master)
    assert process.wait(timeout=60) == 0, written.decode()
    return written.decode()


@pytest.mark.parametrize("mode", ["plain", "fork", "interrupt", "exit"])
def test_in_a_terminal_prints_go_above_the_bars_and_it_is_left_as_it_was(tmp_path, mode):
    written = run_in_terminal(tmp_path, mode)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    lines = [line.strip("\r").rpartition("\r")[2] for line in plain.split("\n")]
    for line in (
        "a line of the user " + "long " * 40, "first half, second half", "to stderr", "printed by a worker",
        "raylight: warning: be careful",
    ):  # fmt: skip
        assert sum(shown.strip() == line.strip() for shown in lines) == 1, (line, lines)
    assert any(line.startswith("epoch 1/1  ━━━") for line in lines)
    assert re.findall(r"\x1b\[\?25[lh]", written)[-1] == "\x1b[?25h"
    if mode == "fork":
        assert written.count("from a forked process") == 1
    if mode == "exit":
        return
    assert "validate" in written
    assert "loss 0.25" in written
    assert lines[-2] == "after"
    assert written.count("not finished by a newline") == 1


def test_in_a_notebook_one_output_is_drawn_over_and_over(monkeypatch):
    """With a stand-in for IPython, which is no dependency; Jupyter itself calls the same two functions."""
    shown: list[str] = []

    class Handle:
        def update(self, page: str) -> None:
            shown.append(page)

    class ZMQInteractiveShell:
        pass

    def display(page: str, display_id: bool) -> Handle:
        assert display_id
        return Handle()

    ipython = types.SimpleNamespace(get_ipython=ZMQInteractiveShell)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(HTML=str, display=display))
    stdout, stream = sys.stdout, io.StringIO()
    console = Console(stream=stream, max_epochs=1)
    console.handle(0, StageStarted("train", 0, 0, 10))
    console.handle(0, Progress("train", 0, 10, 10, 320, {"a": 0.5, "b": 0.25, "c": 1.0, "d<&": 2.0}))
    while not shown:
        threading.Event().wait(0.01)
    assert sys.stdout is stdout  # prints go to the cell anyway
    console.close()
    text = re.sub("<[^>]*>", "", shown[-1]).strip()
    assert re.fullmatch("epoch 1/1  ━+  10/10  step 10  a 0.5  b 0.25  c 1  d&lt;&amp; 2", text)
    assert stream.getvalue() == ""


LOST = """
import sys, torch
import raylight as pl

class Net(pl.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch):
        print("step", self.global_step, flush=True)
        print("to stderr", file=sys.stderr, flush=True)
        return self.net(batch).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

loader = torch.utils.data.DataLoader(torch.randn(400, 4), batch_size=4)
result = pl.fit(Net(), loader, num_workers=0, max_epochs=1, storage_path="runs", name="net")
assert result.num_steps == 100
"""


@pytest.mark.parametrize("tail", ["| head -1", "2>&1 | head -1", ">&- 2>&-", "> /dev/full"])
def test_a_run_goes_on_without_its_output(tail, tmp_path):
    (tmp_path / "script.py").write_text(LOST)
    command = f"set -o pipefail; {sys.executable} script.py {tail}"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    run = open_run(str(tmp_path / "runs"))
    assert (run.status, run.last.step) == ("finished", 100)
    assert b"Traceback" not in done.stderr


def test_a_closed_descriptor_is_not_given_to_the_next_file(tmp_path):
    """Else what a library prints to stdout would go into it."""
    code = (
        "from raylight.report.output_streams import lasting_streams\n"
        "import os, sys\n"
        "with lasting_streams():\n"
        "    file = open('opened', 'w')\n"
        "    os.write(1, b'printed')\n"
        "    print(file.fileno() > 2, file=file)\n"
    )
    command = f'{sys.executable} -c "{code}" >&- 2>&- <&-'
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True, timeout=60)
    assert (tmp_path / "opened").read_text() == "True\n"
