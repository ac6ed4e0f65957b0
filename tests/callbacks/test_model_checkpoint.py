from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from raylight.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from raylight.contract.config import Checkpointing, Config
from raylight.contract.errors import InvalidArguments
from raylight.storage.checkpoints import Checkpoint, Manifest
from raylight.storage.filesystem import Storage


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, Checkpointing()),
        ({"monitor": "acc", "mode": "max", "save_top_k": 3}, Checkpointing(monitor="acc", mode="max", keep_best=3)),
        ({"save_top_k": -1}, Checkpointing(keep_best=-1)),
        ({"save_top_k": 0}, Checkpointing(keep_best=0)),
        ({"every_n_train_steps": 100}, Checkpointing(every_n_steps=100)),
        ({"every_n_train_steps": 100, "every_n_epochs": 0}, Checkpointing(every_n_steps=100)),
        ({"every_n_epochs": 5, "save_last": "link"}, Checkpointing(every_n_epochs=5)),
        ({"train_time_interval": timedelta(minutes=2)}, Checkpointing(every_s=120.0)),
        ({"train_time_interval": "00:00:02:00"}, Checkpointing(every_s=120.0)),
        ({"train_time_interval": {"minutes": 2}}, Checkpointing(every_s=120.0)),
        ({"save_weights_only": True}, Checkpointing(save_weights_only=True)),
        ({"save_on_exception": False}, Checkpointing(on_exception=False)),
    ],
)
def test_lightnings_arguments_mean_the_same_as_checkpointing(arguments, expected):
    assert ModelCheckpoint(**arguments).checkpointing() == expected


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mode": "maxx"}, "Did you mean 'max'"),
        ({"save_top_k": -2}, "save_top_k=-2"),
        ({"save_top_k": 2}, "needs monitor="),
        ({"every_n_train_steps": 5, "every_n_epochs": 1}, "every_n_train_steps=5 and every_n_epochs=1 exclude"),
        ({"every_n_epochs": 0}, "checkpoint=False"),
        ({"train_time_interval": 60}, 'train_time_interval=60 must be "DD:HH:MM:SS", a timedelta'),
        ({"train_time_interval": timedelta(seconds=-1)}, "must not be negative"),
        ({"train_time_interval": "1:00", "mode": "maxx"}, "train_time_interval='1:00' must read DD:HH(.|\n)*maxx"),
        ({"save_last": "always"}, "save_last"),
    ],
)
def test_what_cannot_work_is_told(arguments, text):
    with pytest.raises(InvalidArguments, match=text):
        ModelCheckpoint(**arguments)


def test_arguments_that_change_nothing_are_told_once_by_rank_0(make_rank):
    callback, rank = ModelCheckpoint(dirpath="elsewhere", filename="{epoch}"), make_rank()
    callback.setup(rank, None, "test")
    callback.setup(make_rank(is_global_zero=False), None, "fit")
    assert not rank.notices
    callback.setup(rank, None, "fit")
    assert [level for _, level in rank.notices] == ["warning", "warning"]
    assert "ModelCheckpoint(dirpath='elsewhere') is not used" in rank.notices[0][0]


def kept(step: int, carried: dict[str, int] | None = None, **metrics: float) -> Checkpoint:
    folder = Storage(f"/run/version_0/checkpoints/step-{step:08d}")
    return Checkpoint(folder, Manifest(step, 0, (), metrics=metrics, carried=carried or {}))


def test_the_trainer_fills_in_what_was_kept():
    callback = ModelCheckpoint(monitor="acc", mode="max", save_top_k=2)
    first, second, third, last = kept(1, acc=0.5), kept(2, acc=0.9), kept(3, acc=0.7), kept(4)
    callback.take_kept([first, second, third, last], second, last)
    assert callback.best_model_path == second.path
    assert callback.best_model_score.item() == pytest.approx(0.9)
    assert callback.last_model_path == last.path
    assert callback.best_k_models == {second.path: torch.tensor(0.9), third.path: torch.tensor(0.7)}
    assert callback.kth_best_model_path == third.path
    assert callback.kth_value == torch.tensor(0.7)
    assert callback.current_score is None
    carries = kept(5, {"acc": 2}, acc=0.9)
    callback.take_kept([first, second, third, carries], second, carries)
    assert list(callback.best_k_models) == [second.path, third.path]
    assert callback.current_score.item() == pytest.approx(0.9)


def test_before_any_checkpoint_there_are_no_paths():
    callback = ModelCheckpoint()
    callback.take_kept([], None, None)
    assert (callback.best_model_path, callback.last_model_path, callback.best_model_score) == ("", "", None)


def test_on_exception_contradicts_no_checkpoints():
    callback = OnExceptionCheckpoint("somewhere")
    assert callback._find_mistakes(Config()) == []
    assert "checkpoint=False" in callback._find_mistakes(Config(checkpoint=None))[0]
    assert "on_exception=False" in callback._find_mistakes(Config(checkpoint=Checkpointing(on_exception=False)))[0]
    with pytest.raises(InvalidArguments):
        OnExceptionCheckpoint(filename="")
