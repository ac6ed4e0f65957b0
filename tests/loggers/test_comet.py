"""CometLogger: what an offline experiment has kept, read back from its archive."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from raylight.loggers import CometLogger

comet_ml = pytest.importorskip("comet_ml")


def read_archive(folder: Path) -> list[dict]:
    (path,) = folder.glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        return [json.loads(line) for line in archive.read("messages.json").decode().splitlines()]


def use_experiment(module) -> None:
    assert isinstance(module.logger, CometLogger)
    module.logger.experiment.log_other("epoch of rank 0", module.current_epoch)


def test_an_offline_experiment_keeps_values_and_parameters(train, tmp_path):
    logger = CometLogger(online=False, offline_directory=str(tmp_path / "comet"), name="n", project="p", prefix="x")
    assert (logger.name, logger.save_dir, logger.version) == ("p", str(tmp_path / "comet"), None)
    _, trainer = train(logger, use_experiment)
    assert logger.version == logger.experiment.get_key()
    logger.log_metrics({"after": 1.0}, 11)
    logger.experiment.end()
    messages = read_archive(tmp_path / "comet")
    metrics = [one["payload"]["metric"] for one in messages if one["type"] == "metric_msg"]
    losses = [(one["step"], one["epoch"]) for one in metrics if one["metricName"] == "x_train/loss"]
    assert losses == [(5, 0), (10, 1)]
    last = [one["metricValue"] for one in metrics if one["metricName"] == "x_val_loss"][-1]
    assert last == pytest.approx(trainer.callback_metrics["val_loss"].item())
    assert [one["metricValue"] for one in metrics if one["metricName"] == "x_after"] == [1.0]
    told = json.dumps([one["payload"] for one in messages])
    for part in ('"layers|sizes"', '"lr"', '"epoch of rank 0"', "Linear(in_features=3"):
        assert part in told


def test_names_of_old_are_taken_and_said():
    with pytest.warns(UserWarning, match=r"project_name is now called project|online=\.\.\., its opposite") as told:
        logger = CometLogger(project_name="p", offline=True)
    assert len(told) == 2
    assert (logger.name, logger._arguments["online"]) == ("p", False)
