"""NeptuneLogger: what an offline run of Neptune's client has kept, read back from its log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raylight.contract.errors import InvalidArguments
from raylight.loggers import NeptuneLogger

neptune = pytest.importorskip("neptune")
QUIET = {"capture_stdout": False, "capture_stderr": False, "capture_hardware_metrics": False, "source_files": []}


def use_run(module) -> None:
    assert isinstance(module.logger, NeptuneLogger)
    module.logger.experiment["own/epochs"].append(module.current_epoch)
    module.logger.experiment["own/rank"] = module.global_rank


def read_log(folder: Path) -> list[dict]:
    (path,) = folder.glob(".neptune/offline/*/data-1.log")
    return [json.loads(line)["obj"] for line in path.read_text().splitlines()]


def test_an_offline_run_keeps_values_parameters_and_checkpoints(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = NeptuneLogger(mode="offline", project="a/b", name="n", **QUIET)
    assert (logger.name, logger.version, logger.save_dir) == ("n", None, str(tmp_path / ".neptune"))
    _, trainer = train(logger, use_run)
    assert logger.run is logger.experiment
    logger.experiment.stop()
    found: dict[str, list] = {}
    for one in read_log(tmp_path):
        found.setdefault("/".join(one["path"]), []).append(one)
    losses = [value["step"] for one in found["training/train/loss"] for value in one["values"]]
    assert losses == [5, 10]
    last = found["training/val_loss"][-1]["values"][-1]["value"]
    assert last == pytest.approx(trainer.callback_metrics["val_loss"].item())
    assert found["training/hyperparams/lr"][0]["value"] == 0.1
    assert found["training/hyperparams/layers/sizes"][0]["value"] == "[3, 1]"
    assert [value["value"] for one in found["own/epochs"] for value in one["values"]] == [0, 1]
    assert found["training/status"][0]["value"] == "success"
    assert found["training/model/best_model_path"][-1]["value"] == trainer.result.best_checkpoint.path
    assert "training/model/checkpoints/step-00000010" in found
    assert "training/model/summary" in found


def test_an_open_run_goes_with_no_other_arguments():
    with pytest.raises(InvalidArguments, match="leave out project, mode"):
        NeptuneLogger(run=object(), project="a/b", mode="debug")
