"""A failed step runs again in one process, with the weights, samples and random numbers that it had."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

import raylight as pl
from raylight import command as cli
from raylight.replay import read_evidence
from raylight.storage.filesystem import Storage
from raylight.storage.versions import claim_version
from tests.faults_storage import uri_at

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
import torch
import raylight as pl

num_workers, kind, width = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])

class Net(pl.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = torch.nn.Sequential(torch.nn.Linear(width, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).pow(2).mean()
        if 29 in batch[1].tolist():
            if kind == "nan":
                return loss * float("nan")
            raise ValueError(f"loss {loss.item():.9f} of {sorted(batch[1].tolist())}")
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

generator = torch.Generator().manual_seed(1)
data = torch.utils.data.TensorDataset(torch.randn(40, width, generator=generator), torch.arange(40))
loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
pl.fit(
    Net(), loader, num_workers=num_workers, use_gpu=False, seed=5, storage_path="runs", name="net", max_epochs=1,
    max_restarts=0, enable_progress_bar=False, checkpoint={"every_n_steps": 1}, detect_anomaly=kind == "stop",
)
"""


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(SCRIPT)
    return run(folder, "train.py", *arguments)


@pytest.fixture(scope="module")
def raised(tmp_path_factory):
    """The folder of a run that has failed, and what it told."""
    folder = tmp_path_factory.mktemp("raised")
    failed = train(folder, "0", "raise", "8")
    assert failed.returncode == 1
    return folder, failed.stderr


def check_that_it_comes_again(folder: Path, told: str) -> None:
    [what] = set(re.findall(r"ValueError: (loss .*)", told))
    [path] = re.findall(r"raylight replay (\S+)", told)[:1]
    again = run(folder, "-m", "raylight.command", "replay", path, "--yes")
    assert again.returncode == 1
    assert f"ValueError: {what}" in again.stderr  # the same loss in nine digits: weights, samples and dropout
    assert "in training_step" in again.stderr
    assert "samples [" in again.stdout
    assert len(list((folder / "runs" / "net").glob("version_*"))) == 1  # nothing was trained


def test_an_exception_comes_again(raised):
    check_that_it_comes_again(*raised)


@pytest.mark.soak
def test_an_exception_comes_again_where_the_batch_is_too_large_to_be_kept(tmp_path):
    failed = train(tmp_path, "2", "raise", "1200000")
    assert failed.returncode == 1
    check_that_it_comes_again(tmp_path, failed.stderr)


def test_a_loss_that_is_not_finite_comes_again(tmp_path):
    told = train(tmp_path, "0", "nan", "8").stdout
    [path] = re.findall(r"raylight replay (\S+)", told)
    again = run(tmp_path, "-m", "raylight.command", "replay", path, "--yes")
    assert again.returncode == 1
    assert "29" in again.stdout.split("samples [")[1].split("]")[0]
    assert "returned nan values" in again.stderr


class Failing(pl.Module):
    """The loss of the third step is not finite, the fifth raises."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        if batch_idx == 4:
            raise ValueError("mine")
        return self.net(batch).mean() * (float("nan") if batch_idx == 2 else 1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_commands_are_told_that_a_shell_takes_where_storage_is_s3(s3_port, monkeypatch, capsys):
    monkeypatch.setattr("raylight.worker.loop.REPORT_EVERY_S", 0.0)
    with pytest.raises(pl.WorkerFailed) as caught:
        pl.fit(
            Failing(), torch.utils.data.DataLoader(torch.ones(8, 4)), num_workers=0, use_gpu=False, seed=5,
            storage_path=uri_at(s3_port, uuid.uuid4().hex), max_epochs=1, enable_progress_bar=False,
        )  # fmt: skip
    for told, step, kind in ((capsys.readouterr().out, 2, "NaN"), (str(caught.value), 4, "ValueError")):
        [command] = re.findall(r"raylight replay ([^;\n]+)", told)
        [path] = shlex.split(command)
        assert re.search(r"/failures/step-\d+-rank-0\.pt\?scheme=http&", path)
        facts = read_evidence(path).facts
        assert (facts["step"], facts["kind"]) == (step, kind)
    newest = read_evidence(read_evidence(path).run.path).facts
    assert newest["kind"] == "ValueError"
    with pytest.raises(pl.RaylightError, match=r"failures/step-9\.pt\?scheme=.* is not there; there are: step-"):
        read_evidence(re.sub(r"step-\d+-rank-0", "step-9", path))


def test_a_debugger_is_entered_where_the_step_fails(raised):
    folder, _ = raised
    (folder / "watcher.py").write_text(
        "def post_mortem(traceback):\n"
        "    while traceback.tb_next: traceback = traceback.tb_next\n"
        "    print('locals:', sorted(traceback.tb_frame.f_locals))\n"
    )
    again = run(folder, "-m", "raylight.command", "replay", "runs", "--yes", "--debugger", "watcher")
    assert "locals: ['batch', 'batch_idx', 'loss', 'self']" in again.stdout


def test_a_version_without_a_failure_and_a_script_that_is_gone(raised, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(raised[0], folder)
    (folder / "train.py").unlink()
    assert cli.main(["replay", str(folder / "runs")]) == 1
    assert "raylight replay PATH -- train.py" in capsys.readouterr().err
    for file in (folder / "runs" / "net" / "version_0" / "failures").iterdir():
        file.unlink()
    assert cli.main(["replay", str(folder / "runs")]) == 1
    assert "there are: none" in capsys.readouterr().err


class Planted:
    def __init__(self, sign):
        self.sign = sign

    def __reduce__(self):
        return Path.touch, (self.sign,)


def test_what_is_planted_in_the_file_of_a_failure_does_not_run(tmp_path, capsys):
    storage = Storage(tmp_path / "runs")
    version = claim_version(storage, "net")
    version.write_run({"status": "failed", "command": [__file__]})
    failures = Path(version.path, "failures")
    failures.mkdir()
    torch.save({"step": 1, "planted": Planted(tmp_path / "it ran")}, failures / "step-1.pt")
    assert cli.main(["replay", str(failures / "step-1.pt")]) == 1
    told = capsys.readouterr().err
    assert "failures/step-1.pt" in told
    assert "nothing in it was run" in told
    assert "Traceback" not in told
    assert not (tmp_path / "it ran").exists()
    torch.load(failures / "step-1.pt", weights_only=False)
    assert (tmp_path / "it ran").exists()
