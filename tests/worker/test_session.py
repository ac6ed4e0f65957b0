"""One rank's part in a run as its trainer sees it, before, in and after its loop."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import raylight as pl
from raylight.contract.errors import InvalidArguments
from raylight.contract.messages import Hyperparameters, Notice
from raylight.contract.task import LoggerView, Place
from raylight.user.logger import DummyLogger
from raylight.user.states import RunningStage, TrainerStatus
from raylight.worker.data.batches import TrainBatch
from raylight.worker.group.control import Control
from raylight.worker.session import STAGES, Session
from tests.worker.nets import Line, make_loader
from tests.worker.ranks import in_group, make_task

PLACE = Place(rank=2, local_rank=1, node_rank=1, world_size=4, num_nodes=2)


def make(train: Any = None, place: Place | None = None, **arguments: Any) -> Session:
    task = make_task(Line(), make_loader() if train is None else train, **arguments)
    return Session(task, place or Place(), Control())


def open_loop(**arguments: Any) -> Session:
    session = make(**arguments)
    session.worker.optimizers.take([session.module.configure_optimizers()], [])
    session.worker.open_training_data()
    session.worker.metrics.enter("train", in_step=True)
    session.open_loop()
    return session


def test_where_it_runs():
    session = make(place=PLACE, task={"attempt": 3, "seed": 11})
    found = session.global_rank, session.local_rank, session.node_rank, session.num_nodes, session.world_size
    assert found == (2, 1, 1, 2, 4)
    assert (session.attempt, session.seed, session.device) == (3, 11, torch.device("cpu"))
    assert session.log_dir == "version_0"
    assert session.ckpt_path is None
    assert make(task={"file": "a.ckpt"}).ckpt_path == "a.ckpt"


@pytest.mark.parametrize("name", list(STAGES))
def test_stage_and_status_end_with_the_run(name):
    session = make()
    assert session.stage == RunningStage.TRAINING
    session.worker.enter(name)
    assert session.stage == STAGES[name]
    assert session.status == TrainerStatus.RUNNING
    assert session.module.trainer.global_rank == 0
    session.end()
    assert session.stage is None
    assert session.status == TrainerStatus.FINISHED
    with pytest.raises(RuntimeError):
        _ = session.module.trainer
    session.worker.end_as(True, "interrupted")
    assert session.interrupted
    assert session.status == TrainerStatus.INTERRUPTED
    session.begin()
    assert session.status == TrainerStatus.RUNNING
    assert session.module.trainer.interrupted


def test_before_its_loop_there_is_neither_step_nor_batch():
    session = make()
    assert session.step is None
    assert (session.batch_size, session.has_batch, session.is_last_batch) == (0, False, False)
    assert session.stepping_optimizers == session.optimizers == session.lr_scheduler_configs == []
    assert session.scaler is None
    session.settle()
    assert (session.num_undone, session.is_torn) == (0, False)
    with pytest.raises(InvalidArguments, match="the training data cannot be gone through"):
        session.forward_training_epoch(False)
    with pytest.raises(RuntimeError, match="manual_backward is for modules"):
        session.manual_backward(torch.ones(1))
    other = make().module.configure_optimizers()
    session.replace_optimizers([other])
    assert session.optimizers == [other]


@pytest.mark.parametrize("last", [False, True])
def test_the_batch_in_hand(last):
    session = open_loop()
    assert (session.batch_size, session.has_batch, session.is_last_batch) == (0, False, False)
    assert session.step is not None
    session.step.begin(TrainBatch([torch.ones(3, 1)], 1, 1.0, 3, False, last))
    assert (session.batch_size, session.has_batch, session.is_last_batch) == (3, True, last)
    assert [stepping.optimizer for stepping in session.stepping_optimizers] == session.optimizers
    with pytest.raises(RuntimeError, match="can be replaced until on_train_start"):
        session.replace_optimizers([])
    with pytest.raises(RuntimeError, match="automatic_optimization = False"):
        session.manual_backward(torch.ones(1))
    session.settle()
    assert (session.num_undone, session.is_torn, session.loop) == (1, False, None)


def test_a_step_that_is_made_is_torn_if_what_follows_it_is_cut_short():
    session = open_loop()
    assert session.step is not None
    batch = TrainBatch([torch.ones(3, 1)], 0, 1.0, 3, False, False)
    session.step.begin(batch)
    session.step.make(batch, batch.data, True)
    session.settle()
    assert (session.num_undone, session.is_torn, session.num_batches_seen) == (0, True, 1)
    assert not session.is_meeting
    with session.meeting():
        assert session.is_meeting
        assert session.is_torn
    assert (session.is_meeting, session.is_torn, session.num_undone) == (False, False, 0)
    session.lose("half of it")
    assert session.lost == "half of it"
    session.lose("")
    assert session.lost == ""


def test_by_hand_a_backward_is_the_sessions():
    session = make()
    session.module.automatic_optimization = False
    session.worker.optimizers.take([session.module.configure_optimizers()], [])
    session.worker.open_training_data()
    session.open_loop()
    session.manual_backward((session.module.weight * 3.0).sum())
    assert session.module.weight.grad.item() == 3.0


def test_where_it_stands():
    session = make()
    session.worker.progress.stand_at(7, 2, 3)
    session.worker.progress.finish_batch(3)
    found = session.global_step, session.current_epoch, session.batch_idx, session.num_batches_seen
    assert found == (7, 2, 4, 1)
    assert not session.should_stop
    session.request_stop(True)
    assert session.should_stop
    assert session.worker.should_stop


def test_a_run_that_goes_on_is_resuming_until_it_trains():
    class Saved:
        path = "checkpoints/1"

    assert not make().is_resuming
    session = make(task={"checkpoint": Saved()})
    assert session.is_resuming
    assert session.ckpt_path == "checkpoints/1"
    session.worker.begin_training()
    assert not session.is_resuming


def test_loaders_and_their_lengths():
    loader, validate = make_loader(6), [make_loader(4), make_loader(2)]
    session = make(loader, loaders={"validate": validate, "test": make_loader(2), "predict": iter([])})
    assert (session.train_dataloader, session.val_dataloaders) == (None, None)
    assert session.num_training_batches == float("inf")
    assert session.num_val_batches == session.num_test_batches == session.num_predict_batches == []
    session.worker.open_training_data()
    for stage in ("validate", "test"):
        session.worker.open_evaluation_data(stage)
    assert session.train_dataloader is loader
    assert session.val_dataloaders is validate
    assert session.num_training_batches == 3
    assert session.num_val_batches == [2, 1]
    assert session.num_test_batches == [1]
    session.worker.enter("validate")
    assert session.find_samples(1, 0) == [0, 1]
    session.set_accumulate_grad_batches(5)
    assert session.accumulate_grad_batches == 5


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_epochs": 3}, 15), ({"max_epochs": 3, "accumulate_grad_batches": 2}, 9), ({"max_epochs": 0}, 5),
        ({"max_epochs": 3, "max_steps": 4}, 4), ({"max_epochs": 3, "max_steps": 40}, 15),
        ({"max_epochs": -1, "max_steps": 4}, 4), ({"max_epochs": -1}, float("inf")), ({}, float("inf")),
        ({"max_steps": 4}, 4),
    ],
)  # fmt: skip
def test_how_many_steps_it_will_be(config, expected):
    session = make(make_loader(10), **config)
    assert session.estimated_stepping_batches == expected
    assert session.train_dataloader is not None
    session.worker.open_training_data()
    assert session.estimated_stepping_batches == expected


def test_of_an_evaluation_or_a_stream_the_steps_are_unknown():
    assert make(stage="test", max_epochs=3).estimated_stepping_batches == float("inf")
    assert make(iter([]), stage="test", max_epochs=3, max_steps=6).estimated_stepping_batches == 6


def test_what_was_logged_is_read_as_tensors():
    session = make()
    session.worker.metrics.restore({"val_loss": 0.5}, {"val_loss": 1})
    assert session.callback_metrics == {"val_loss": torch.tensor(0.5)}
    assert session.logged_metrics == {}
    session.worker.metrics.enter("train", in_step=True)
    session.module.log("loss", 2.0, prog_bar=True)
    assert session.logged_metrics == {"loss": torch.tensor(2.0)}
    assert session.progress_bar_metrics == {"loss": 2.0}


def test_what_hooks_may_ask_for():
    session = make()
    session.add_notice("quiet")
    session.add_notice("loud", "warning")
    session.log_hyperparameters({"lr": 1})
    assert session.worker.outbox.take() == [Notice("quiet"), Notice("loud", "warning"), Hyperparameters({"lr": 1})]
    session.request_checkpoint()
    assert session.worker.saving.is_requested
    session.finish_copying()
    assert session.take_random_numbers() is None
    session.keep_random_numbers({"torch": 1})  # type: ignore[arg-type]
    assert session.take_random_numbers() == {"torch": 1}
    assert session.take_random_numbers() is None


@pytest.mark.parametrize("count", [0, 2])
def test_a_hook_sees_each_logger_of_the_run(count):
    views = tuple(LoggerView(DummyLogger()) for _ in range(count))
    session = make(task={"loggers": views})
    assert len(session.loggers) == count
    assert all(isinstance(logger, DummyLogger) for logger in session.loggers)


def test_the_training_data_is_gone_through_without_a_trace():
    session = open_loop()
    session.worker.metrics.enter("validate")
    session.forward_training_epoch(False)
    assert session.module.trained == [0.0, 2.0, 4.0, 6.0]
    assert session.callback_metrics == {}
    assert (session.global_step, session.num_batches_seen) == (0, 0)


def _speak(place: Place) -> Any:
    session = make(place=place)
    session.barrier()
    own = torch.tensor([1.0 + place.rank])
    return (
        session.broadcast(f"of {place.rank}", 1), session.all_gather(own, None, False).flatten().tolist(),
        session.reduce(own, None, "mean").item(), session.reduce(own, None, "avg").item(),
        session.reduce(1 + place.rank, None, "sum").item(), own.item(),
    )  # fmt: skip


def test_ranks_speak_with_one_another():
    first, second = in_group(_speak)
    assert first[:5] == second[:5] == ("of 1", [1.0, 2.0], 1.5, 1.5, 3)
    assert (first[5], second[5]) == (1.0, 2.0)
    session = make()
    session.barrier()
    assert session.broadcast("mine", 0) == "mine"
    assert session.reduce(torch.ones(1), None, "sum").item() == 1.0


def test_a_module_has_no_trainer_of_its_own():
    with pytest.raises(RuntimeError):
        _ = pl.Module().trainer


def settle_with_ddp(place: Place) -> tuple[bool, bool]:
    gc.disable()  # no cycle may keep it
    session = open_loop(place=place)
    assert session.step is not None
    session.step.follow()
    ddp = weakref.ref(session.step.reduction.ddp)
    was_there = ddp() is not None
    session.settle()
    return was_there, ddp() is not None


def test_ddp_of_a_broken_step_is_gone_at_once():
    """Else it would take part in the backward of the next generation."""
    assert in_group(settle_with_ddp) == [(True, False)] * 2
