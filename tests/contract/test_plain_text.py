"""What a person sees of texts that came from elsewhere, and what is written of those that are no Unicode."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import raylight as pl
from raylight import command as cli
from raylight.contract.errors import InvalidArguments
from raylight.contract.plain_text import has_control, to_utf8, visible
from raylight.report.summary import format_values
from tests.test_runs import make_run

ESCAPE = "\x1b]0;owned\x07\x1b[2J"
HOSTILE = f"{ESCAPE}\r\x9b31m\u202e"
NO_UTF8 = os.fsdecode(b"caf\xe9.csv")


def test_control_characters_are_made_visible() -> None:
    assert visible("größe 5 µs → ok 👩‍🔬") == "größe 5 µs → ok 👩‍🔬"
    assert visible("a\x1b[31m\x07\x7f\x9b\r\nb\t\u202e\u2028\udce9") == (
        r"a\x1b[31m\x07\x7f\x9b\r\nb\t\u202e\u2028\udce9"
    )
    assert visible("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert has_control("a\nb")
    assert not has_control("größe")
    assert to_utf8(NO_UTF8) == r"caf\udce9.csv"
    assert to_utf8("größe") == "größe"


def check_harmless(text: str) -> None:
    assert not [mark for mark in text if has_control(mark) and mark not in "\n"], text


def test_no_command_passes_what_a_terminal_would_obey(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """From a version whose every text, in keys too, was written by somebody else."""
    version = make_run(
        str(tmp_path / "runs"), "digits", status=HOSTILE, hyperparameters={HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]},
        arguments={"given": {HOSTILE: HOSTILE}}, packages={HOSTILE: HOSTILE}, git_commit=HOSTILE, python=HOSTILE,
        command=[HOSTILE], metrics={HOSTILE: 0.5}, goodput={HOSTILE: 1.0}, error=HOSTILE, trial={"name": HOSTILE},
    )  # fmt: skip
    journal = pl.driver.journal.Journal(version.storage)
    journal.add(1, 0, {HOSTILE: 0.5}, 1.7e9)
    journal.close()
    for name in (f"step-{HOSTILE}", "step-00000099"):
        version.storage.write(f"checkpoints/{name}/manifest.json", [f'{{"{HOSTILE}": 1}}'.encode()])
    (tmp_path / "runs" / f"run {ESCAPE}").symlink_to(tmp_path / "runs" / "digits")
    for command in ("runs", "show", "verify", "logs", "export", "replay"):
        cli.main([command, str(tmp_path / "runs"), *(["out.pt"] if command == "export" else [])])
    cli.main(["show", str(tmp_path / "runs" / "digits")])
    cli.main(["verify", version.path])
    printed = capfd.readouterr()
    check_harmless(printed.out)
    check_harmless(printed.err)
    assert r"\x1b[2J" in printed.out
    assert r"\x1b[2J" in printed.err


def test_names_with_control_characters_are_refused() -> None:
    with pytest.raises(InvalidArguments, match="none that controls a terminal"):
        pl.fit(Net(), loader(), name="run\x1b[31m", num_workers=0)
    with pytest.raises(InvalidArguments, match="none that controls a terminal"):
        pl.fit(Net(), loader(), name=NO_UTF8, num_workers=0)
    with pytest.raises(pl.RaylightError, match=r"log\('loss\\x1b\[31m'\): a name holds no characters that control"):
        pl.fit(Net(metric="loss\x1b[31m"), loader(), max_epochs=1, num_workers=0, logger=False, fast_dev_run=1)
    check_harmless(format_values({HOSTILE: 1.0}))


class Net(pl.Module):
    def __init__(self, path: str = NO_UTF8, metric: str = "loss", **options: object):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch):
        loss = self.net(batch).pow(2).mean()
        self.log(self.hparams.metric, loss, prog_bar=True)
        self.log("loss/ü", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def loader() -> DataLoader:
    return DataLoader(torch.ones(4, 4), batch_size=2)


def fit_with_names_that_are_no_utf8(num_workers: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a hyperparameter's name and value, a metric, the command line and, on disk, the path."""
    monkeypatch.setattr(sys, "argv", ["train.py", NO_UTF8, "--lr=1"])
    module = Net(metric=f"loss of {NO_UTF8}", **{NO_UTF8: {NO_UTF8: [NO_UTF8, 1]}})
    result = pl.fit(
        module, loader(), num_workers=num_workers, use_gpu=False, storage_path=str(folder), max_epochs=2,
        log_every_n_steps=1, logger=[pl.loggers.TensorBoardLogger(), pl.loggers.CSVLogger()],
    )  # fmt: skip
    assert result.status == "finished"
    assert f"loss of {NO_UTF8}" in result.metrics
    escaped = to_utf8(NO_UTF8)
    record = json.loads(Path(result.path, "run.json").read_bytes())
    assert record["status"] == "finished"
    assert record["command"] == ["train.py", escaped, "--lr=1"]
    assert record["hyperparameters"]["path"] == escaped
    assert record["metrics"][f"loss of {escaped}"] == result.metrics[f"loss of {NO_UTF8}"]
    assert set(result.history()["name"].to_pylist()) >= {f"loss of {escaped}", "loss/ü"}
    assert f"loss of {escaped}" in Path(result.path, "metrics.csv").read_text("utf-8")
    assert len(result.checkpoints) == 1
    assert Net.load_from_checkpoint(result.last_checkpoint).hparams.path == NO_UTF8
    assert cli.main(["show", result.path]) == 0


@pytest.mark.parametrize("folder", ["runs", NO_UTF8])
def test_names_that_are_no_utf8(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit_with_names_that_are_no_utf8(0, tmp_path / folder, monkeypatch)


@pytest.mark.usefixtures("ray_cluster")
def test_names_that_are_no_utf8_on_two_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit_with_names_that_are_no_utf8(2, tmp_path, monkeypatch)


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command that replays a step whose run.json names a script of somebody else's."""
    version = make_run(str(tmp_path / "runs"), "net", command=[str(tmp_path / f"{ESCAPE}.py"), "; rm -rf ~"])
    (tmp_path / f"{ESCAPE}.py").write_text("open('it ran', 'w')")
    facts = {
        "kind": "ValueError", "text": "mine", "rank": 0, "world_size": 1, "seed": 1, "step": 1, "epoch": 0, "index": 0,
        "num_batches_seen": 0, "data": {}, "indices": None, "share": 1.0, "size": 1, "rng": None, "batch": None,
    }  # fmt: skip
    with version.storage.open_write("failures/step-00000001-rank-0.pt") as file:
        torch.save(facts, file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}")
    return [sys.executable, "-m", "raylight.command", "replay", version.path]


def test_a_command_from_storage_is_not_run_unless_a_person_agrees(planted: list[str], tmp_path: Path) -> None:
    alone = subprocess.run(planted, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert alone.returncode == 1
    assert r"\x1b[2J.py' '; rm -rf ~'" in alone.stdout
    assert "add --yes, or name the script yourself: raylight replay PATH -- train.py" in alone.stderr
    check_harmless(alone.stdout + alone.stderr)
    for answer, runs in ((b"\n", False), (b"n\n", False), (b"y\n", True)):
        terminal, its_end = pty.openpty()
        with subprocess.Popen(planted, stdin=its_end, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as asked:
            os.close(its_end)
            os.write(terminal, answer)
            printed = asked.communicate(timeout=60)[0].decode()
        os.close(terminal)
        assert "run it? [y/N]" in printed
        assert (tmp_path / "it ran").exists() is runs


def test_a_command_is_run_where_that_was_said_before(planted: list[str], tmp_path: Path) -> None:
    assert subprocess.run([*planted, "--yes"], stdin=subprocess.DEVNULL).returncode == 0
    (tmp_path / "it ran").unlink()
    (tmp_path / "mine.py").write_text("import sys; print('mine', sys.argv[1:])")
    command = [*planted, "--", "mine.py", "--fast"]
    mine = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert mine.stdout == "mine ['--fast']\n"
    assert not (tmp_path / "it ran").exists()
