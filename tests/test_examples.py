"""Each example runs as a user runs it: a process of its own, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name: str, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def read_status(version: Path) -> str:
    return json.loads((version / "run.json").read_text())["status"]


IN_PROCESS, ON_RAY = pytest.param(0, marks=pytest.mark.soak), pytest.param(2, marks=pytest.mark.slow)


@pytest.mark.parametrize("num_workers", [IN_PROCESS, ON_RAY])
def test_digits_reaches_97_percent_and_says_where_it_is_stored(tmp_path: Path, num_workers: int) -> None:
    done = run_example("digits.py", "--num-workers", str(num_workers), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    accuracy = re.search(r"Test accuracy: ([\d.]+)%", done.stdout)
    assert accuracy is not None, done.stdout
    assert float(accuracy[1]) >= 97.0
    version = tmp_path / "runs" / "digits" / "version_0"
    assert re.search(rf"Stored in:\s+{version}", done.stdout)
    assert re.search(rf"tensorboard --logdir {version}", done.stdout)
    assert read_status(version) == "finished"
    assert list(version.glob("events.out.tfevents.*"))
    assert list(version.glob("checkpoints/step-*/manifest.json"))


@pytest.mark.soak
def test_digits_takes_its_arguments_and_resumes(tmp_path: Path) -> None:
    arguments = ["--num-workers", "0", "--precision", "bf16-mixed", "--storage-path", "elsewhere", "--name", "mine"]
    first = run_example("digits.py", *arguments, "--max-epochs", "2", cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    steps_before = newest_step(tmp_path)
    resumed = run_example("digits.py", *arguments, "--max-epochs", "4", "--resume", "last", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert newest_step(tmp_path) == 2 * steps_before


def newest_step(folder: Path) -> int:
    manifests = folder.glob("elsewhere/mine/version_*/checkpoints/step-*/manifest.json")
    return max(json.loads(manifest.read_text())["step"] for manifest in manifests)


def write_mnist_files(folder: Path) -> None:
    """scikit-learn's digits, enlarged to 28 x 28, in MNIST's own file format."""
    images, labels = load_digits(return_X_y=True)
    small = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) * (255 / 16)
    large = F.interpolate(small, size=(28, 28), mode="bilinear").round().to(torch.uint8).squeeze(1)
    folder.mkdir(parents=True)
    for part, chosen in (("train", slice(0, 1500)), ("t10k", slice(1500, None))):
        pixels, answers = large[chosen], torch.tensor(labels[chosen]).to(torch.uint8)
        header = struct.pack(">IIII", 0x803, len(pixels), 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.numpy().tobytes())
        header = struct.pack(">II", 0x801, len(answers))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + answers.numpy().tobytes())


def test_mnist_trains_from_files_that_are_there(tmp_path: Path) -> None:
    write_mnist_files(tmp_path / "data" / "MNIST" / "raw")
    done = run_example("mnist.py", "--num-workers", "0", "--max-epochs", "8", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    accuracy = re.search(r"Test accuracy ([\d.]+)%, stored in .*mnist/version_0", done.stdout)
    assert accuracy is not None, done.stdout
    assert float(accuracy[1]) > 85.0


def test_mnist_says_what_to_do_where_it_cannot_be_downloaded(tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:9"  # the discard port: nothing listens there
    done = run_example("mnist.py", "--num-workers", "0", cwd=tmp_path, http_proxy=nobody, https_proxy=nobody)
    assert done.returncode == 1
    assert "MNIST cannot be downloaded from here." in done.stderr
    assert f"{tmp_path}/data/MNIST/raw" in done.stderr
    assert "examples/digits.py" in done.stderr


@pytest.mark.slow
def test_resnet_trains_in_bfloat16_on_fake_data(tmp_path: Path) -> None:
    done = run_example("resnet_cifar.py", "--fake-data", "--num-workers", "0", cwd=tmp_path, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Validation accuracy [\d.]+%, stored in .*cifar/version_0", done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("goes_on", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_sweep_digits_finds_a_good_network_and_goes_on_where_it_was(tmp_path: Path, goes_on: bool) -> None:
    arguments = ["--num-samples", "3", "--num-workers", "0", "--max-epochs", "3"]
    done = run_example("sweep_digits.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    accuracy = re.search(r"Validation accuracy: ([\d.]+)%", done.stdout)
    assert accuracy is not None, done.stdout
    assert float(accuracy[1]) > 90.0
    run = tmp_path / "runs" / "sweep_digits"
    assert re.search(rf"^picture +{run}/sweep_0/sweep.html$", done.stdout, re.MULTILINE)
    assert (run / "sweep_0" / "sweep.html").exists()
    assert sorted(read_status(version) for version in run.glob("version_*"))[0] == "finished"
    if not goes_on:
        return
    again = run_example("sweep_digits.py", *arguments, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.endswith(done.stdout.splitlines()[-1] + "\n")
    assert len(list(run.glob("version_*"))) == 3


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_at_most_80_lines(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= 80
