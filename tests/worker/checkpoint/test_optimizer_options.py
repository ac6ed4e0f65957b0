"""A state that was trained with other hyperparameters: the new ones win, all else stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR

from raylight.worker.checkpoint.optimizer_options import describe, renew
from raylight.worker.step.optimizers import make_optimizers


def make(scheduler: Any = None, **options: Any) -> Any:
    """A parameter, its optimizer, and the scheduler that `scheduler(optimizer)` makes."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], **options)
    returned = {"optimizer": optimizer} | ({"lr_scheduler": scheduler(optimizer)} if scheduler else {})
    return weight, *make_optimizers(returned)


def train(weight: Any, optimizers: Any, schedulers: Any, num_steps: int) -> dict[str, Any]:
    """The part of a checkpoint after some steps."""
    configured = describe(optimizers, schedulers)
    for _ in range(num_steps):
        (weight**2).sum().backward()
        optimizers[0].step()
        for config in schedulers:
            config.scheduler.step(1.0) if config.reduce_on_plateau else config.scheduler.step()
    return {
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "schedulers": [config.scheduler.state_dict() for config in schedulers],
        "configured": configured,
    }


def take_over(saved: dict[str, Any], optimizers: Any, schedulers: Any) -> None:
    optimizer_states, scheduler_states = renew(saved, describe(optimizers, schedulers))
    optimizers[0].load_state_dict(optimizer_states[0])
    for config, state in zip(schedulers, scheduler_states, strict=True):
        config.scheduler.load_state_dict(state)


def test_new_options_win_and_momentum_stays() -> None:
    saved = train(*make(lr=0.1, momentum=0.9, weight_decay=0.0), num_steps=3)
    _, optimizers, schedulers = make(lr=0.02, momentum=0.5, weight_decay=0.01)
    take_over(saved, optimizers, schedulers)
    [group] = optimizers[0].param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.02, 0.5, 0.01)
    [state] = optimizers[0].state.values()
    assert torch.equal(state["momentum_buffer"], saved["optimizers"][0]["state"][0]["momentum_buffer"])


def test_the_same_options_change_nothing() -> None:
    saved = train(*make(lambda o: StepLR(o, 2), lr=0.1), num_steps=5)
    _, optimizers, schedulers = make(lambda o: StepLR(o, 2), lr=0.1)
    optimizer_states, scheduler_states = renew(saved, describe(optimizers, schedulers))
    assert optimizer_states == saved["optimizers"]
    assert scheduler_states == saved["schedulers"]


def test_a_new_rate_goes_on_where_the_schedule_stood() -> None:
    saved = train(*make(lambda o: StepLR(o, 2, gamma=0.5), lr=0.1), num_steps=5)
    _, optimizers, schedulers = make(lambda o: StepLR(o, 2, gamma=0.5), lr=0.4)
    take_over(saved, optimizers, schedulers)
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(0.4 * 0.25)
    assert schedulers[0].scheduler.get_last_lr() == pytest.approx([0.4 * 0.25])
    optimizers[0].step()
    schedulers[0].scheduler.step()  # the sixth: halves it once more
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(0.4 * 0.125)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: CosineAnnealingLR(o, 20),
        lambda o: OneCycleLR(o, max_lr=10 * o.param_groups[0]["lr"], total_steps=20),
        lambda o: SequentialLR(o, [StepLR(o, 3), CosineAnnealingLR(o, 20)], [4]),
        lambda o: {"scheduler": ReduceLROnPlateau(o, patience=1), "monitor": "val_loss"},
    ],
    ids=["cosine", "one cycle", "sequential", "plateau"],
)
def test_a_new_rate_follows_the_rest_of_any_schedule(scheduler: Any) -> None:
    """As if it had been there from the start: each schedule is proportional to the rate."""
    saved = train(*make(scheduler, lr=0.1), num_steps=6)
    expected = make(scheduler, lr=0.3)
    train(*expected, num_steps=6)
    taken = make(scheduler, lr=0.3)
    take_over(saved, *taken[1:])
    for _ in range(5):
        assert taken[1][0].param_groups[0]["lr"] == pytest.approx(expected[1][0].param_groups[0]["lr"])
        for _, optimizers, schedulers in (taken, expected):
            optimizers[0].step()
            scheduler = schedulers[0]
            scheduler.scheduler.step(1.0) if scheduler.reduce_on_plateau else scheduler.scheduler.step()


def test_a_new_setting_of_the_schedule_wins() -> None:
    saved = train(*make(lambda o: StepLR(o, 2, gamma=0.5), lr=0.1), num_steps=3)
    _, optimizers, schedulers = make(lambda o: StepLR(o, 2, gamma=0.1), lr=0.1)
    take_over(saved, optimizers, schedulers)
    assert schedulers[0].scheduler.gamma == 0.1
    assert schedulers[0].scheduler.last_epoch == 3


def test_a_state_from_before_this_was_recorded_is_taken_as_it_is() -> None:
    saved = train(*make(lr=0.1), num_steps=1)
    del saved["configured"]
    _, optimizers, schedulers = make(lr=0.2)
    assert renew(saved, describe(optimizers, schedulers))[0] == saved["optimizers"]
