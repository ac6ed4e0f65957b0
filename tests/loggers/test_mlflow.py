"""MLFlowLogger: what its local store has kept, read back through MLflow's client."""

from __future__ import annotations

import pickle
import socket
import time
from pathlib import Path

import pytest
import torch
import yaml

import raylight as pl
from raylight.contract.errors import InvalidArguments
from raylight.loggers import CSVLogger, MLFlowLogger

mlflow = pytest.importorskip("mlflow")


def use_client(module) -> None:
    logger = module.logger
    assert isinstance(logger, MLFlowLogger)
    name = f"notes/rank-{module.global_rank}-epoch-{module.current_epoch}.txt"
    logger.experiment.log_text(logger.run_id, "hello", name)
    logger.experiment.set_tag(logger.run_id, "place", f"{logger.name}/{logger.version}")


def test_the_store_has_values_parameters_texts_and_checkpoints(train, tmp_path):
    logger = MLFlowLogger("exp", "first", save_dir=str(tmp_path / "ml"), tags={"a": "b"}, log_model="all", prefix="x")
    _, trainer = train(logger, use_client)
    client = logger.experiment
    run = client.get_run(logger.run_id)
    assert (run.info.status, run.info.run_name, run.data.tags["a"]) == ("FINISHED", "first", "b")
    assert client.get_experiment_by_name("exp").experiment_id == logger.experiment_id == logger.name
    assert run.data.tags["place"] == f"{logger.experiment_id}/{logger.run_id}"
    assert run.data.params == {"lr": "0.1", "layers/sizes": "[3, 1]"}
    history = client.get_metric_history(logger.run_id, "x-train/loss")
    assert [metric.step for metric in history] == [5, 10]
    (_, last) = client.get_metric_history(logger.run_id, "x-val_loss")
    assert last.value == pytest.approx(trainer.callback_metrics["val_loss"].item())
    notes = [entry.path for entry in client.list_artifacts(logger.run_id, "notes")]
    assert notes == ["notes/rank-0-epoch-0.txt", "notes/rank-0-epoch-1.txt"]

    (folder,) = [entry.path for entry in client.list_artifacts(logger.run_id) if entry.path == "step-00000010"]
    files = {Path(entry.path).name for entry in client.list_artifacts(logger.run_id, folder)}
    assert {"manifest.json", "metadata.yaml", "aliases.txt"} <= files
    fetched = client.download_artifacts(logger.run_id, folder, str(tmp_path))
    assert yaml.safe_load(Path(fetched, "metadata.yaml").read_text())["score"] == pytest.approx(last.value)
    assert pl.Trainer(num_workers=0, logger=False, storage_path=str(tmp_path / "r")).validate(
        type(trainer.lightning_module).load_from_checkpoint(fetched), trainer.val_dataloaders, verbose=False
    )[0]["val_loss"] == pytest.approx(last.value)

    logger.log_metrics({"after": 1.0}, 11)
    logger.save()
    assert client.get_run(logger.run_id).data.metrics["x-after"] == 1.0


def test_a_run_that_failed_is_failed_there(train, tmp_path):
    def fail(module) -> None:
        raise ValueError("here")

    logger = MLFlowLogger(save_dir=str(tmp_path / "ml"))
    with pytest.raises(ValueError, match="here"):
        train(logger, fail)
    assert logger.experiment.get_run(logger.run_id).info.status == "FAILED"


def test_it_works_before_a_run_goes_on_with_one_and_a_copy_has_its_own(tmp_path):
    uri = f"file:{tmp_path}/ml"
    logger = MLFlowLogger(tracking_uri=uri, synchronous=True)
    assert logger.save_dir == f"{tmp_path}/ml"
    logger.log_hyperparams({"kind": torch.nn.ReLU})
    with pytest.warns(UserWarning, match="'loss@1' is called 'loss_1' in MLflow"):
        logger.log_metrics({"loss@1": torch.tensor(2.0)}, 3)
    again = MLFlowLogger(tracking_uri=uri, run_id=logger.run_id)
    assert again.experiment_id == logger.experiment_id
    assert again.experiment.get_run(again.version).data.metrics == {"loss_1": 2.0}
    assert pickle.loads(pickle.dumps(logger)).run_id != logger.run_id
    assert pickle.loads(pickle.dumps(again)).run_id == logger.run_id


def test_a_server_that_is_away_is_named_once_and_costs_no_time(train, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    away, other = MLFlowLogger(tracking_uri=f"http://127.0.0.1:{port}"), CSVLogger(tmp_path)

    def use(module) -> None:
        module.logger.experiment.log_text("run", "hello", "a.txt")  # takes it and does nothing
        module.logger.log_metrics({"a": 1.0})

    began = time.monotonic()
    _, trainer = train([away, other], use)
    assert trainer.global_step == 10
    assert time.monotonic() - began < 60
    told = capsys.readouterr().out
    assert told.count("MLFlowLogger could not be opened, and gets nothing of this run: ConnectionError") == 1
    assert told.count("MLFlowLogger") == 1
    assert "val_loss" in Path(other.log_dir, "metrics.csv").read_text()


def test_wrong_arguments_say_what_is_right():
    with pytest.raises(InvalidArguments, match="log_model=3; it takes True, False, 'all'"):
        MLFlowLogger(log_model=3)
