from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raylight.runs import open_run

ROOT = Path(__file__).parents[1]
SCRIPT = """
import os, signal, sys, threading
with open("lives", "a") as file:
    file.write("x")
lives = os.path.getsize("lives")
if sys.argv[1] == "kill" and lives <= int(sys.argv[2]):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "wait":
    print("waits", flush=True)
    threading.Event().wait()
sys.exit(int(sys.argv[2]) if sys.argv[1] == "exit" else 0)
"""
TRAINING = """
import os, signal, torch
import raylight as pl

class Net(pl.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch):
        if self.global_step == 7 and not os.path.exists("killed"):
            open("killed", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.net(batch).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

loader = torch.utils.data.DataLoader(torch.randn(40, 4), batch_size=4)
result = pl.fit(Net(), loader, num_workers=0, max_epochs=2, storage_path="runs", name="net", resume="last",
                checkpoint={"every_n_steps": 5}, enable_progress_bar=False)
print("steps", result.num_steps)
"""


def run(folder: Path, text: str, *arguments: str, retries: int = 3) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(text)
    command = [sys.executable, "-m", "raylight.command", "run", "--retries", str(retries), "script.py", *arguments]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )


def test_a_script_that_is_killed_starts_again(tmp_path):
    done = run(tmp_path, SCRIPT, "kill", "2")
    assert done.returncode == 0
    assert (tmp_path / "lives").read_text() == "xxx"
    assert "ended by SIGKILL; it starts again (2 left)" in done.stderr


def test_not_for_ever(tmp_path):
    done = run(tmp_path, SCRIPT, "kill", "9", retries=1)
    assert done.returncode == 137
    assert (tmp_path / "lives").read_text() == "xx"
    assert "retries=1 are used up" in done.stderr


@pytest.mark.parametrize("status", [0, 1, 3])
def test_a_script_that_ends_by_itself_does_not_start_again(status, tmp_path):
    assert run(tmp_path, SCRIPT, "exit", str(status)).returncode == status
    assert (tmp_path / "lives").read_text() == "x"


def test_sigterm_ends_both(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "raylight.command", "run", "script.py", "wait"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert (tmp_path / "lives").read_text() == "x"


def test_training_goes_on_from_its_last_checkpoint(tmp_path):
    done = run(tmp_path, TRAINING)
    assert done.returncode == 0, done.stderr
    assert "steps 20" in done.stdout
    assert "the script was ended by SIGKILL" in done.stderr


ON_A_TERMINAL = TRAINING.replace("os.path.exists", "True or os.path.exists").replace(
    "return self.net", 'print("step", self.global_step, flush=True)\n        return self.net'
).replace("max_epochs=2", "max_epochs=100000")  # fmt: skip


@pytest.mark.parametrize(
    ("event", "with_run", "status"),
    [("ctrl-c", True, 0), ("closes", True, 128 + signal.SIGHUP), ("closes", False, -signal.SIGHUP)],
)
def test_a_terminal_interrupts_a_run_once(event, with_run, status, tmp_path):
    """The terminal sends Ctrl-C to every process in its foreground, and tells of its end the first one alone."""
    (tmp_path / "script.py").write_text(ON_A_TERMINAL)
    command = ["-m", "raylight.command", "run", "script.py"] if with_run else ["script.py"]
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execve(sys.executable, [sys.executable, *command], os.environ | {"PYTHONPATH": str(ROOT)})
    said = b""
    while b"step 7" not in said:
        said += os.read(terminal, 4096)
    if event == "ctrl-c":
        os.write(terminal, b"\x03")
        with contextlib.suppress(OSError):  # what is read of a terminal whose process has ended
            while os.read(terminal, 4096):
                continue
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    run = open_run(str(tmp_path / "runs"))
    assert run.status == "interrupted"
    assert run.last.step > 7
