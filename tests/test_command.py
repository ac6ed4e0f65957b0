from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

import raylight
from raylight import command as cli
from raylight.report import tables
from raylight.storage.filesystem import Storage
from raylight.storage.versions import Version, claim_version
from tests.faults_storage import uri_at
from tests.test_runs import make_run

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "runs")
    return uri_at(request.getfixturevalue("s3_port"), uuid.uuid4().hex)


def test_runs(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(place, "digits")
    make_run(place, "digits", (0.3,), status="failed")
    assert cli.main(["runs", place]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "version", "status", "best", "step", "started", "duration", "checkpoints", "size"]
    assert re.match(r"digits +0 +finished +val_loss 0\.2 +30 +2023-11-1\d \d\d:13 +1 min 15 s +3 +[\d.]+ kB", first)
    assert re.match(r"digits +1 +failed +val_loss 0\.3 +10 ", second)
    assert cli.main(["runs", place, "--metric", "accuracy", "--mode", "max"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]] == ["1", "0"]


def test_show(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    version = make_run(
        place, "digits", packages={"torch": "2.14"}, git_commit="abc123", seed=7, goodput={"compute": 70.0}
    )
    version.storage.write("checkpoints/step-00000099/model.pt", [b"half"])
    assert cli.main(["show", place]) == 0
    out = capsys.readouterr().out
    for said in (
        "digits version 0", "finished", "lr  0.1", "git_commit  abc123", "seed        7", "torch 2.14", "1 min 10 s",
        "monitor=val_loss, mode=min", "never committed: step-00000099",
    ):  # fmt: skip
        assert said in out, said
    assert re.search(r"val_loss +█▁▆ +0\.5 +0\.4 +0\.2 +0\.5 +3", out)
    assert re.search(r"step-00000020 +2 +2 +[\d.]+ kB +0\.2 .* best", out)
    assert re.search(r"step-00000030 .* last", out)


def test_export_and_verify(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version = make_run(place, "digits")
    out = tmp_path / "weights.safetensors"
    assert cli.main(["export", version.path, str(out), "--which", "last"]) == 0
    assert "3 entries" in capsys.readouterr().out
    assert out.stat().st_size > 0
    assert cli.main(["verify", place]) == 0
    assert "3 checkpoints, 0 damaged" in capsys.readouterr().out
    version.storage.write("checkpoints/step-00000010/model-00000-of-00002.pt", [b"short"])
    assert cli.main(["verify", place, "--sizes"]) == 1
    printed = capsys.readouterr().out
    assert "model-00000-of-00002.pt has 5 bytes instead of" in printed
    assert "3 checkpoints, 1 damaged" in printed
    assert cli.main(["export", version.storage.uri_of("checkpoints/step-00000010"), str(out)]) == 1
    assert "raylight export: " in capsys.readouterr().err


def test_logs(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    version = make_run(place, "digits")
    version.storage.write("logs/rank-1.log", ["eins\nzwei\ndrei ü\n".encode()])
    assert cli.main(["logs", place]) == 0
    assert capsys.readouterr().out == "first line\nsecond line\n"
    assert cli.main(["logs", version.path, "--rank", "1", "-n", "2", "--follow"]) == 0  # it has ended already
    assert capsys.readouterr().out == "zwei\ndrei ü\n"
    assert cli.main(["logs", place, "--rank", "2"]) == 1
    assert "Ranks with a log: 0, 1" in capsys.readouterr().err


def test_logs_are_followed_until_the_run_ends(tmp_path: Path) -> None:
    version = claim_version(Storage(tmp_path), "digits")
    version.write_run({"status": "running"})
    command = [sys.executable, "-m", "raylight.command", "logs", str(tmp_path), "--rank", "1", "--follow"]
    follower = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert follower.stdout is not None
    log = Path(version.path, "logs/rank-1.log")
    log.parent.mkdir()
    with log.open("wb", buffering=0) as file:
        file.write("one ü"[:-1].encode() + "ü".encode()[:1])  # in the middle of a character
        assert follower.stdout.read(4) == b"one "
        file.write("ü".encode()[1:] + b"\n")
        assert follower.stdout.readline() == "ü\n".encode()
        file.write(b"last\n")
        version.write_run({"status": "finished"})
    assert follower.communicate(timeout=30)[0] == b"last\n"
    assert follower.returncode == 0


def test_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--storage", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"✓ +torch +\d", out)
    assert "can be written, read and deleted in" in out
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["doctor", "--storage", "/proc/nowhere"]) == 1
    assert "could not write" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "nowhere"], "there are no runs in"),
        (["runs", "s4://x/y"], "Did you mean s3://x/y?"),
        (["export", "nowhere", "x.onnx"], "there is no checkpoint at"),
        (["verify", "nowhere"], "there are no runs in"),
    ],
)
def test_mistakes_are_one_clear_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"raylight {arguments[0]}: ")
    assert said in error
    assert "Traceback" not in error


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    for _ in range(3):
        make_run(str(tmp_path), "digits")
    command = f"{sys.executable} -m raylight.command show {tmp_path} | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "digits version 2" in done.stdout
    assert done.stderr == ""


def test_the_package_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "raylight", "--version"], capture_output=True, text=True)
    assert done.stdout == f"raylight {raylight.__version__}\n"


def test_help_needs_no_heavy_imports() -> None:
    script = (
        "import sys\nfrom raylight import command as cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'pyarrow', 'rich', 'ray') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert "doctor" in done.stdout


# ---- tables


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 8, "▁▂▃▄▅▆▇█"),
        ([0.0, 0.0, 8.0, 8.0], 2, "▁█"),
        ([5.0, 5.0], 8, "▅▅"),
        ([1.0, float("nan"), 2.0], 8, "▁!█"),
        ([float("nan")], 8, "!"),
        ([1.0, float("inf")], 8, "▅!"),
        ([], 8, ""),
    ],
)
def test_curves(values: list[float], width: int, drawn: str) -> None:
    assert tables.curve(values, width) == drawn


def test_numbers_for_people() -> None:
    assert [tables.size_text(size) for size in (0, 999, 1000, 123_456, 5_600_000, 7e9, 8e12)] == [
        "0 B", "999 B", "1.0 kB", "123 kB", "5.6 MB", "7.0 GB", "8.0 TB",
    ]  # fmt: skip
    assert [tables.duration_text(seconds) for seconds in (None, 1.25, 61, 3661, 90_000)] == [
        "-", "1.2 s", "1 min 01 s", "1 h 01 min", "1 d 1 h",
    ]  # fmt: skip


def test_a_silent_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version = claim_version(Storage(tmp_path), "digits")
    version.write_run({"status": "running"})
    set_back(version, 3600)
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert "running (silent for 1 h 00 min)" in capsys.readouterr().out


def set_back(version: Version, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(Path(version.path, "run.json"), (then, then))
