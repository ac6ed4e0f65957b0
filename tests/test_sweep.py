"""Sweeps with real trials on a real Ray: reserved together, stopped early, cloned, killed."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest
import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, ResourceChangingScheduler
from ray.util.placement_group import placement_group, remove_placement_group
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import raylight
from raylight.command import main
from raylight.contract.errors import InvalidArguments, NotEnoughResources
from raylight.launch import ray_actors
from raylight.runs import list_summaries
from tests.faults_storage import uri_at

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # also for the fixtures that many tests share
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

NUM_SAMPLES = 192
VARIABLE = "SET_AFTER_RAY_STARTED"
TARGET = torch.tensor([1.0, -2.0, 0.5, 3.0])


def make_data(batch_size: int = 16) -> tuple[DataLoader, DataLoader]:
    inputs = torch.randn(NUM_SAMPLES, 4, generator=torch.Generator().manual_seed(0))
    dataset = TensorDataset(inputs, inputs @ TARGET)
    return DataLoader(dataset, batch_size, shuffle=True), DataLoader(dataset, 24)


class Line(raylight.Module):
    def __init__(self, lr: float = 0.05, momentum: float = 0.0):
        super().__init__()
        self.save_hyperparameters()
        self.weight = nn.Parameter(torch.zeros(4))

    def training_step(self, batch: Any) -> Any:
        inputs, targets = batch
        loss = F.mse_loss(inputs @ self.weight, targets)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any) -> None:
        inputs, targets = batch
        self.log("val_loss", F.mse_loss(inputs @ self.weight, targets))

    def on_train_epoch_start(self) -> None:
        self.print(f"pid {os.getpid()} sees {os.environ.get(VARIABLE)}")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=self.hparams.momentum)


def read_run(version: str | Path) -> dict[str, Any]:
    return json.loads(Path(version, "run.json").read_text())


def versions_of(results: Any) -> list[dict[str, Any]]:
    """The run.json of each trial, in the order of the results."""
    return [read_run(results[index].metrics["version"]) for index in range(len(results))]


def best_loss(result: Any) -> float:
    """In the best checkpoint."""
    return min(
        checkpoint.metrics["val_loss"] for checkpoint in raylight.open_run(result.metrics["version"]).checkpoints
    )


# ---- reserved together, stopped early, kept for the next


@pytest.fixture(scope="module")
def asha(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, str]:
    """Eight trials of two workers while four of the eight CPUs are taken: results, run folder, what was printed."""
    ray_actors.release_all()  # what other files' fits have kept
    taken = placement_group([{"CPU": 4}])
    assert taken.wait(60)
    folder = tmp_path_factory.mktemp("asha")
    printed = pytest.MonkeyPatch()
    lines: list[str] = []
    printed.setenv(VARIABLE, "what the caller has set")
    printed.setattr("builtins.print", lambda *texts, **options: lines.append(" ".join(map(str, texts))))
    results = raylight.sweep(
        Line, {"lr": tune.grid_search([0.2, 0.1, 1e-3, 1e-4, 0.15, 1e-5, 0.05, 1e-6])}, num_samples=1,
        metric="val_loss", mode="min", data=make_data(), num_workers=2, max_epochs=4, seed=7, storage_path=folder,
        name="lines", scheduler=ASHAScheduler(grace_period=1, reduction_factor=2, max_t=4),
    )  # fmt: skip
    printed.undo()
    remove_placement_group(taken)
    return results, folder / "lines", "\n".join(lines)


def test_eight_trials_of_two_workers_end_on_four_cpus(asha: Any) -> None:
    results, _, _ = asha
    assert results.num_errors == 0
    assert results.num_terminated == 8
    assert {record["arguments"]["num_workers"] for record in versions_of(results)} == {2}


def test_workers_are_kept_from_one_trial_to_the_next(asha: Any) -> None:
    results, run, _ = asha
    drivers = {results[index].metrics["pid"] for index in range(8)}
    logs = [log.read_text() for log in run.glob("version_*/logs/rank-*.log")]
    workers = {pid for log in logs for pid in re.findall(r"pid (\d+) sees what the caller has set", log)}
    # Two trials fit at a time. Rank 0 of each group is counted: others do not print.
    assert len(drivers) == len(workers) <= 2


def test_asha_stops_trials_and_their_versions_say_so(asha: Any) -> None:
    results, _, _ = asha
    ended = {record["trial"]["config"]["lr"]: record["status"] for record in versions_of(results)}
    assert ended[0.2] == "finished"
    assert ended[1e-6] == "stopped"
    epochs = {results[index].config["lr"]: results[index].metrics["epoch"] for index in range(8)}
    assert epochs[0.2] == 4
    assert epochs[1e-6] < 4


def test_each_trial_is_a_version_that_names_it(asha: Any) -> None:
    results, run, _ = asha
    assert len(list(run.glob("version_*"))) == 8
    for index, record in enumerate(versions_of(results)):
        assert record["trial"]["name"] == f"Line_{results[index].metrics['trial_id']}"
        assert record["trial"]["config"] == results[index].config
        assert record["hyperparameters"]["lr"] == results[index].config["lr"]
        assert len(record["trial"]["result_steps"]) == results[index].metrics["training_iteration"]


def test_a_result_is_what_one_process_would_have_measured(asha: Any, tmp_path: Path) -> None:
    results, _, _ = asha
    chosen = next(results[index] for index in range(8) if results[index].config["lr"] == 0.2)
    module = Line.load_from_checkpoint(Path(chosen.metrics["version"], "checkpoints", "step-00000024"))
    _, val = make_data()
    [alone] = raylight.validate(module, val, num_workers=0, enable_progress_bar=False, storage_path=tmp_path)
    assert chosen.metrics["step"] == 24
    assert chosen.metrics["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-6)


def test_the_best_result_leads_to_a_checkpoint_that_is_not_copied(asha: Any) -> None:
    results, run, _ = asha
    best = results.get_best_result()
    assert best.config["lr"] in (0.2, 0.15, 0.1)
    by_path = Line.load_from_checkpoint(best.metrics["best_checkpoint"])
    by_tune = Line.load_from_checkpoint(best.checkpoint)
    assert torch.equal(by_path.weight, by_tune.weight)
    assert by_path.hparams.lr == best.config["lr"]
    assert not list(run.glob("sweep_0/**/*.pt"))


def test_runs_are_listed_by_the_metric(asha: Any, capsys: pytest.CaptureFixture) -> None:
    results, run, _ = asha
    listed = list_summaries(run, "val_loss", "min")
    assert listed[0].path == results.get_best_result().metrics["version"]
    assert len(listed) == 8
    assert main(["runs", str(run), "--metric", "val_loss"]) == 0
    table = capsys.readouterr().out
    places = [table.index(f"Line_{result.metrics['trial_id']}") for result in sorted(results, key=best_loss)]
    assert places == sorted(places)


def test_tensorboard_compares_the_trials(asha: Any) -> None:
    results, run, _ = asha
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    for result in results:
        events = EventAccumulator(result.metrics["version"]).Reload()
        assert events.Scalars("val_loss")[-1].value == pytest.approx(result.metrics["val_loss"])
        plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data
        start = HParamsPluginData.FromString(plugin.content).session_start_info
        assert start.hparams["lr"].number_value == result.config["lr"]
    assert not list(run.glob("sweep_0/**/events.out.tfevents*"))


def test_the_end_says_how_to_train_the_best_again(asha: Any) -> None:
    results, run, printed = asha
    best = results.get_best_result()
    assert f"raylight.fit(Line(lr={best.config['lr']}), *data, num_workers=2, max_epochs=4, seed=7" in printed
    assert best.metrics["best_checkpoint"] in printed
    assert "8 done" in printed
    page = (run / "sweep_0" / "sweep.html").read_text()
    assert page.count("<polyline") == 8
    assert str(run / "sweep_0" / "sweep.html") in printed


# ---- clones


class Follower(Line):
    """Logs what its optimizer really does."""

    def on_train_epoch_start(self) -> None:
        optimizer = self.optimizers()
        self.log("lr_used", optimizer.param_groups[0]["lr"], on_step=False, on_epoch=True)
        buffers = [state["momentum_buffer"] for state in optimizer.state.values()]
        self.log("has_momentum", float(bool(buffers)), on_step=False, on_epoch=True)


def test_pbt_clones_weights_and_optimizer_and_its_new_hyperparameters_take_effect(tmp_path: Path) -> None:
    scheduler = PopulationBasedTraining(
        time_attr="training_iteration", perturbation_interval=2, hyperparam_mutations={"lr": [0.02, 0.03, 0.05, 0.08]},
        quantile_fraction=0.5, resample_probability=0.0, synch=True,
    )  # fmt: skip
    results = raylight.sweep(
        Follower, {"lr": tune.grid_search([1e-5, 0.05]), "momentum": 0.5}, num_samples=1, metric="val_loss", mode="min",
        scheduler=scheduler, data=make_data(), max_epochs=6, storage_path=tmp_path, name="pbt",
    )  # fmt: skip
    assert results.num_errors == 0
    records = versions_of(results)
    cloned = next(record for record in records if record["trial"]["clones"])
    donor = next(record for record in records if record is not cloned)
    clone = cloned["trial"]["clones"][0]
    assert clone["trial"] == donor["trial"]["id"]
    assert f"version_{donor['version']}/" in clone["checkpoint"]
    assert cloned["hyperparameters"]["lr"] == cloned["trial"]["config"]["lr"] != 1e-5
    metrics = raylight.open_run(tmp_path, "pbt", cloned["version"])
    steps, used = metrics.curve("lr_used")
    after = dict(zip(steps, used, strict=True))
    assert after[min(s for s in steps if s > clone["step"])] == pytest.approx(clone["config"]["lr"])
    assert min(metrics.curve("has_momentum")[1][1:]) == 1.0
    losses = dict(zip(*metrics.curve("val_loss"), strict=True))
    assert losses[max(losses)] < 1.0  # with lr=1e-5 it would still be above 10
    assert [len(record["trial"]["result_steps"]) for record in records] == [6, 6]


# ---- faults


class Trouble(Line):
    """`behaviour` says what happens in epoch 1, once."""

    def __init__(self, behaviour: str, folder: str, lr: float = 0.05):
        super().__init__(lr)
        self.behaviour, self.folder = behaviour, folder

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.behaviour == "good" or self.current_epoch != 1 or batch_idx != 2:
            return
        if self.behaviour == "raises":
            raise ZeroDivisionError("one bad trial")
        if self.behaviour == "nan":
            self.weight.data.fill_(math.nan)
            return
        flag = Path(self.folder, self.behaviour.replace(" ", "_"))
        if flag.exists():
            return
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)  # the worker's process; with num_workers=0 the trial's own


@pytest.fixture(scope="module")
def troubled(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One sweep in which something happens to most trials: the result of each."""
    folder = tmp_path_factory.mktemp("troubled")
    space = {
        "behaviour": tune.grid_search(["good", "raises", "nan", "worker dies", "driver dies"]), "folder": str(folder),
        "num_workers": tune.sample_from(lambda spec: int(spec.config.behaviour == "worker dies")),
    }  # fmt: skip
    results = raylight.sweep(
        Trouble, space, num_samples=1, metric="val_loss", mode="min", data=make_data(), max_epochs=3,
        storage_path=folder, name="troubled", max_concurrent_trials=2,
    )  # fmt: skip
    return {results[index].config["behaviour"]: results[index] for index in range(len(results))}


def test_one_bad_trial_does_not_end_the_sweep(troubled: dict[str, Any]) -> None:
    assert [name for name, result in troubled.items() if result.error] == ["raises"]
    assert "ZeroDivisionError: one bad trial" in str(troubled["raises"].error)
    assert "Resume with: raylight.sweep(..., name='troubled', resume=True)" in str(troubled["raises"].error)
    tries = Path(troubled["raises"].path, "error.txt").read_text()
    assert tries.count("Failure #") == 2  # Tune makes one, before it can be told that none is worth while
    assert troubled["good"].metrics["epoch"] == 3
    assert math.isnan(troubled["nan"].metrics["val_loss"])


def test_a_killed_worker_is_replaced_inside_the_trial(troubled: dict[str, Any]) -> None:
    result = troubled["worker dies"]
    record = read_run(result.metrics["version"])
    assert len(record["restarts"]) == 1
    assert len(record["attempts"]) == 1
    assert result.metrics["training_iteration"] == result.metrics["epoch"] == 3


def test_a_killed_driver_goes_on_from_its_last_checkpoint(troubled: dict[str, Any]) -> None:
    result = troubled["driver dies"]
    record = read_run(result.metrics["version"])
    assert len(record["attempts"]) == 2
    assert record["resumed_from"].endswith("step-00000012")  # the end of epoch 0
    assert record["trial"]["result_steps"] == [12, 24, 36]
    assert result.metrics["training_iteration"] == result.metrics["epoch"] == 3


# ---- Tune's own objects


def give_two_workers(controller: Any, trial: Any, result: dict[str, Any], scheduler: Any) -> Any:
    return tune.PlacementGroupFactory([{}, {"CPU": 1}, {"CPU": 1}]) if result["training_iteration"] >= 1 else None


@pytest.mark.soak
def test_resource_changing_scheduler_gives_a_trial_more_workers(tmp_path: Path) -> None:
    results = raylight.sweep(
        Line, {"lr": tune.uniform(0.05, 0.1)}, num_samples=1, metric="val_loss", mode="min", data=make_data(8),
        num_workers=1, max_epochs=3, storage_path=tmp_path, name="grows",
        scheduler=ResourceChangingScheduler(resources_allocation_function=give_two_workers),
    )  # fmt: skip
    [record] = versions_of(results)
    assert [attempt["world_size"] for attempt in record["attempts"]] == [1, 2]
    assert results[0].metrics["epoch"] == 3


class Counts(Line):
    def on_validation_epoch_end(self) -> None:
        self.log("threads", float(torch.get_num_threads()))


@pytest.mark.soak
def test_a_tuner_of_ones_own_has_all_of_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    ended: list[str] = []

    class Listener(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            ended.append(str(trial))

    trial_class = raylight.sweep.trainable(
        lambda config: (Counts(config["lr"]), make_data(), {"precision": "64-true"}), metric="val_loss", max_epochs=50,
        num_workers=1, resources_per_worker={"CPU": 3}, val_check_interval=0.5, storage_path=tmp_path / "runs",
        name="own",
    )  # fmt: skip
    tuner = tune.Tuner(
        trial_class,
        param_space={"lr": tune.grid_search([0.05, 0.1])},
        tune_config=tune.TuneConfig(metric="val_loss", mode="min", max_concurrent_trials=1, reuse_actors=True),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path / "tune"), name="mine", stop={"training_iteration": 2}, verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1), callbacks=[Listener()],
        ),
    )  # fmt: skip
    results = tuner.fit()
    assert results.num_errors == 0
    assert [result.metrics["training_iteration"] for result in results] == [2, 2]
    assert [result.metrics["step"] for result in results] == [12, 12]  # the second validation of an epoch
    assert [result.metrics["threads"] for result in results] == [3.0, 3.0]
    assert len(ended) == 2
    assert {record["status"] for record in versions_of(results)} == {"stopped"}
    assert versions_of(results)[0]["arguments"]["precision"] == "64-true"
    assert Line.load_from_checkpoint(results[0].checkpoint).weight.abs().sum() > 0


def test_optuna_searches_on_s3_and_what_is_printed_trains_the_best_again(
    s3_port: int, capsys: pytest.CaptureFixture
) -> None:
    from ray.tune.search.optuna import OptunaSearch

    results = raylight.sweep(
        Line, {"lr": tune.loguniform(1e-3, 1e-1)}, num_samples=4, metric="val_loss", mode="min", data=make_data(),
        max_epochs=4, seed=5, storage_path=uri_at(s3_port, "optuna"), name="searched",
        search_alg=OptunaSearch(seed=0), scheduler=ASHAScheduler(grace_period=1, reduction_factor=2, max_t=4),
        max_concurrent_trials=1,
    )  # fmt: skip
    printed = dict(re.findall(r"^(\w[\w ]*?)  +(.+)$", capsys.readouterr().out, re.MULTILINE))
    assert results.num_errors == 0
    assert len({result.config["lr"] for result in results}) == 4
    best = results.get_best_result()
    assert printed["best checkpoint"] == best.metrics["best_checkpoint"]
    again = eval(printed["train it again"], {"raylight": raylight, "Line": Line, "data": make_data()})
    assert again.metrics["val_loss"] == best.metrics["val_loss"]
    kept = Line.load_from_checkpoint(best.metrics["best_checkpoint"])
    assert torch.equal(kept.weight, Line.load_from_checkpoint(again.best_checkpoint).weight)


# ---- killed and resumed


SCRIPT = """
import os, sys, time
from ray import tune
import raylight
from tests.test_sweep import Line, make_data

class Slow(Line):
    def on_train_epoch_end(self):
        while self.hparams.lr < 0.05 and not os.path.exists("{folder}/go"):
            time.sleep(0.05)

if __name__ == "__main__":
    results = raylight.sweep(
        Slow, {{"lr": tune.grid_search([0.1, 0.01])}}, num_samples=1, metric="val_loss", mode="min", data=make_data(),
        max_epochs=2, storage_path="{folder}", name="killed", resume=True, max_concurrent_trials=1,
    )
    print("ended", len(results), results.num_errors, results.num_terminated)
"""


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    script, run = tmp_path / "script.py", tmp_path / "killed"
    script.write_text(SCRIPT.format(folder=tmp_path))
    here = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command: dict[str, Any] = {"args": [sys.executable, script], "env": os.environ | here, "cwd": tmp_path}
    with subprocess.Popen(**command, stdout=subprocess.PIPE) as first:
        wait_until(lambda: any(is_noted(path) for path in run.glob("sweep_0/experiment_state-*.json")))
        first.kill()
    before = {record["trial"]["config"]["lr"]: record for record in map(read_run, run.glob("version_*"))}
    assert before[0.1]["status"] == "finished"
    assert before[0.01]["status"] == "running"
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids_of(run)))  # Ray ends what the sweep has left
    (tmp_path / "go").touch()
    second = subprocess.run(**command, capture_output=True, text=True)
    assert "ended 2 0 2" in second.stdout, second.stdout + second.stderr
    after = {record["trial"]["config"]["lr"]: record for record in map(read_run, run.glob("version_*"))}
    assert len(after) == len(list(run.glob("version_*"))) == 2
    assert after[0.1] == before[0.1]
    assert after[0.01]["status"] == "finished"
    assert len(after[0.01]["attempts"]) == 2


def pids_of(run: Path) -> set[int]:
    """The processes that trained: `Line` prints them."""
    logs = [log.read_text() for log in run.glob("version_*/logs/rank-*.log")]
    return {int(pid) for log in logs for pid in re.findall(r"pid (\d+)", log)}


def is_noted(state: Path) -> bool:
    """Whether Tune has written down that a trial has ended."""
    try:
        trials = json.loads(state.read_text())["trial_data"]
    except ValueError:  # it is being written
        return False
    return any('"TERMINATED"' in trial[0] for trial in trials)


def wait_until(holds: Any, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


# ---- refused at once


@pytest.mark.parametrize("in_space", [False, True])
def test_a_trial_that_can_never_fit_is_refused_with_the_numbers(tmp_path: Path, in_space: bool) -> None:
    """Also where another trial would fit."""
    space = {"lr": tune.uniform(0, 1)} | ({"num_workers": tune.choice([1, 9])} if in_space else {})
    with pytest.raises(NotEnoughResources, match=r"num_workers=9 asks for 9 CPUs, and the Ray cluster has 8 CPUs"):
        raylight.sweep(
            Line, space, num_samples=1, metric="val_loss", mode="min", data=make_data(), storage_path=tmp_path,
            **({} if in_space else {"num_workers": 9}),
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


class Hides(Line):
    """Logs under names that no code holds, and raises on the CPU of the driver."""

    def validation_step(self, batch: Any) -> None:
        if not ray.get_runtime_context().get_actor_id():
            raise RuntimeError("only in a trial")
        self.log("_".join(("some", "loss")), 1.0)


@pytest.mark.soak
def test_where_no_trial_reports_the_metric_its_error_is_raised(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(InvalidArguments, match=r"'other_loss', which was never logged; logged were: some_loss"):
        raylight.sweep(
            Hides, {"lr": tune.uniform(0, 1)}, num_samples=1, metric="other_loss", mode="min", data=make_data(),
            max_epochs=1, max_restarts=0, storage_path=tmp_path,
        )  # fmt: skip
    assert "one batch could not be tried here (RuntimeError: only in a trial)" in capsys.readouterr().out
