from __future__ import annotations

import pytest
import torch

from raylight.callbacks import LearningRateMonitor
from raylight.contract.config import Config
from raylight.contract.errors import InvalidArguments
from raylight.worker.step.optimizers import SchedulerConfig


def parameter():
    return torch.nn.Parameter(torch.zeros(1))


def names_of(rank):
    monitor = LearningRateMonitor()
    monitor.on_train_start(rank, None)
    return list(monitor.lrs)


def test_names_are_lightnings(make_rank):
    sgd, other_sgd = torch.optim.SGD([parameter()], lr=0.1), torch.optim.SGD([parameter()], lr=0.2)
    adam = torch.optim.Adam([{"params": [parameter()]}, {"params": [parameter()], "name": "head"}], lr=0.3)
    named = torch.optim.SGD([{"params": [parameter()], "name": "all"}], lr=0.4)
    step = SchedulerConfig(torch.optim.lr_scheduler.StepLR(other_sgd, 1))
    mine = SchedulerConfig(torch.optim.lr_scheduler.StepLR(named, 1), name="mine")
    rank = make_rank(optimizers=[sgd, other_sgd, adam, named], lr_scheduler_configs=[step, mine])
    assert names_of(rank) == ["lr-SGD", "mine/all", "lr-SGD-1", "lr-Adam/pg1", "lr-Adam/head"]


def test_groups_of_one_name_are_refused(make_rank):
    groups = [{"params": [parameter()], "name": "a"}, {"params": [parameter()], "name": "a"}]
    with pytest.raises(InvalidArguments, match=r"share the names \['a'\]"):
        names_of(make_rank(optimizers=[torch.optim.SGD(groups, lr=0.1)]))


def train(rank, monitor, optimizer, config, num_epochs=2, num_steps=3):
    monitor.on_train_start(rank, None)
    for rank.current_epoch in range(num_epochs):
        monitor.on_train_epoch_start(rank, None)
        for _ in range(num_steps):
            monitor.on_train_batch_start(rank, None, None, 0)
            optimizer.step()
            rank.global_step += 1
            if config.interval == "step":
                config.scheduler.step()
        if config.interval == "epoch":
            config.scheduler.step()
    return rank.logged


@pytest.mark.parametrize(
    ("logging_interval", "interval", "expected"),
    [
        (None, "step", [(2, 0.5), (4, 0.125), (6, 0.03125)]),
        (None, "epoch", [(0, 1.0), (3, 0.5)]),
        ("step", "epoch", [(2, 1.0), (4, 0.5), (6, 0.5)]),
        ("epoch", "step", [(0, 1.0), (3, 0.125)]),
    ],
)
def test_a_step_is_logged_with_the_rate_that_it_is_made_with(make_rank, logging_interval, interval, expected):
    optimizer = torch.optim.SGD([parameter()], lr=1.0)
    config = SchedulerConfig(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), interval=interval)
    rank = make_rank({"log_every_n_steps": 2}, optimizers=[optimizer], lr_scheduler_configs=[config])
    monitor = LearningRateMonitor(logging_interval)
    logged = train(rank, monitor, optimizer, config)
    assert logged == [(step, {"lr-SGD": rate}) for step, rate in expected]
    assert monitor.lrs == {"lr-SGD": [rate for _, rate in expected]}


def test_momentum_and_weight_decay_on_request(make_rank):
    adam = torch.optim.AdamW([parameter()], lr=0.1, betas=(0.8, 0.9), weight_decay=0.01)
    sgd = torch.optim.SGD([parameter()], lr=0.2, momentum=0.7)
    rank = make_rank(optimizers=[adam, sgd])
    monitor = LearningRateMonitor("epoch", log_momentum=True, log_weight_decay=True)
    monitor.on_train_start(rank, None)
    monitor.on_train_epoch_start(rank, None)
    assert rank.logged == [
        (
            0,
            {
                "lr-AdamW": 0.1,
                "lr-AdamW-momentum": 0.8,
                "lr-AdamW-weight_decay": 0.01,
                "lr-SGD": 0.2,
                "lr-SGD-momentum": 0.7,
                "lr-SGD-weight_decay": 0.0,
            },
        )
    ]


def test_accumulated_batches_log_their_step_once(make_rank):
    optimizer = torch.optim.SGD([parameter()], lr=1.0)
    rank = make_rank({"log_every_n_steps": 1}, optimizers=[optimizer])
    monitor = LearningRateMonitor("step")
    monitor.on_train_start(rank, None)
    for index in range(4):
        monitor.on_train_batch_start(rank, None, None, index)
    assert [step for step, _ in rank.logged] == [1]


def test_what_cannot_work_is_told():
    with pytest.raises(InvalidArguments, match="Did you mean 'step'"):
        LearningRateMonitor("steps")
    assert "logger=False" in LearningRateMonitor()._find_mistakes(Config(logger=False))[0]
    assert LearningRateMonitor()._find_mistakes(Config(logger=False, fast_dev_run=1)) == []
