"""Every form that `configure_optimizers` may return, and what is asked of optimizers afterwards."""

from __future__ import annotations

import re

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, ReduceLROnPlateau

from raylight.contract.errors import InvalidArguments
from raylight.worker.step.optimizers import (
    Optimizers,
    SchedulerConfig,
    SteppingOptimizer,
    check_schedulers,
    make_optimizers,
    needs_closure,
)


def make_sgd() -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)


SGD, OTHER = make_sgd(), make_sgd()
CONSTANT, PLATEAU = ConstantLR(SGD), ReduceLROnPlateau(SGD)
OF_CONSTANT = SchedulerConfig(CONSTANT)


@pytest.mark.parametrize(
    ("returned", "optimizers", "schedulers"),
    [
        (None, [], []),
        (SGD, [SGD], []),
        ([], [], []),
        ([SGD, OTHER], [SGD, OTHER], []),
        ((SGD, OTHER), [SGD, OTHER], []),
        ([SGD], [SGD], []),
        (([SGD], [CONSTANT]), [SGD], [OF_CONSTANT]),
        (([SGD], CONSTANT), [SGD], [OF_CONSTANT]),
        (([SGD], []), [SGD], []),
        ({"optimizer": SGD}, [SGD], []),
        ({"optimizer": SGD, "lr_scheduler": CONSTANT}, [SGD], [OF_CONSTANT]),
        ({"optimizer": SGD, "lr_scheduler": [CONSTANT]}, [SGD], [OF_CONSTANT]),
        ([{"optimizer": SGD, "lr_scheduler": CONSTANT}, {"optimizer": OTHER}], [SGD, OTHER], [OF_CONSTANT]),
        (
            {"optimizer": SGD, "lr_scheduler": PLATEAU, "monitor": "loss"}, [SGD],
            [SchedulerConfig(PLATEAU, monitor="loss", reduce_on_plateau=True)],
        ),
        (
            {"optimizer": SGD, "lr_scheduler": {"scheduler": PLATEAU, "monitor": "mine"}, "monitor": "loss"}, [SGD],
            [SchedulerConfig(PLATEAU, monitor="mine", reduce_on_plateau=True)],
        ),
        (
            {"optimizer": SGD, "lr_scheduler": {"scheduler": PLATEAU}, "monitor": "loss"}, [SGD],
            [SchedulerConfig(PLATEAU, monitor="loss", reduce_on_plateau=True)],
        ),
        (
            {"optimizer": SGD, "lr_scheduler": {"scheduler": CONSTANT}}, [SGD], [OF_CONSTANT],
        ),
        (
            ([SGD], [{"scheduler": CONSTANT, "interval": "step", "frequency": torch.tensor(3), "strict": False}]),
            [SGD],
            [SchedulerConfig(CONSTANT, interval="step", frequency=3, strict=False)],
        ),
    ],
)  # fmt: skip
def test_forms(returned, optimizers, schedulers):
    assert make_optimizers(returned) == (optimizers, schedulers)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (3, "3 (int) is not an optimizer"),
        ([SGD, "sgd"], "'sgd' (str) is not an optimizer"),
        ([SGD, CONSTANT], "ConstantLR is not an optimizer"),
        ({"optimiser": SGD}, "unknown keys ['optimiser']"),
        ({"lr_scheduler": CONSTANT}, 'a dict without "optimizer"'),
        (([SGD], [{"scheduler": CONSTANT, "every": 1}]), "a scheduler has the unknown keys ['every']"),
        (([SGD], [5]), "5 (int) is not a scheduler: it has no step()"),
        (([SGD], [{"scheduler": CONSTANT, "interval": "batch"}]), "interval='batch' of a scheduler"),
        (([SGD], [{"scheduler": CONSTANT, "frequency": 0}]), "frequency=0 of a scheduler"),
        (([SGD], [{"scheduler": CONSTANT, "frequency": 1.5}]), "frequency=1.5 of a scheduler"),
        (([SGD], [PLATEAU]), "ReduceLROnPlateau needs the metric it watches"),
    ],
)
def test_anything_else_is_an_error(returned, said):
    with pytest.raises(InvalidArguments, match=re.escape(said)) as caught:
        make_optimizers(returned)
    assert "It may return an optimizer" in str(caught.value)


def test_a_frequency_of_one_is_allowed_and_all_mistakes_are_told_at_once():
    assert make_optimizers(([SGD], [{"scheduler": CONSTANT, "frequency": 1}]))[1][0].frequency == 1
    with pytest.raises(InvalidArguments) as caught:
        make_optimizers(([SGD, 1], [2]))
    assert len(caught.value.mistakes) == 2


def test_without_a_word_a_scheduler_steps_once_an_epoch_and_is_strict():
    assert (OF_CONSTANT.interval, OF_CONSTANT.frequency, OF_CONSTANT.strict) == ("epoch", 1, True)
    assert not OF_CONSTANT.reduce_on_plateau


def test_by_hand_a_scheduler_on_a_plateau_needs_no_monitor():
    _, (config,) = make_optimizers(([SGD], [PLATEAU]), automatic=False)
    assert config.reduce_on_plateau
    assert config.monitor is None
    _, (config,) = make_optimizers(([SGD], [{"scheduler": CONSTANT, "reduce_on_plateau": True}]), automatic=False)
    assert config.reduce_on_plateau


def test_a_scheduler_whose_optimizer_was_not_returned_is_a_mistake():
    class Own:
        optimizer = SGD

        def step(self): ...

    configs = [OF_CONSTANT, SchedulerConfig(Own())]
    assert check_schedulers([OTHER, SGD], configs) == []
    said = "configure_optimizers: ConstantLR belongs to an optimizer that was not returned"
    assert check_schedulers([OTHER], configs) == [said]
    assert check_schedulers([], [SchedulerConfig(ConstantLR(make_sgd()))]) != []


def test_what_optimizers_hold():
    optimizers, first, second = Optimizers(), make_sgd(), make_sgd()
    assert (optimizers.all, optimizers.schedulers, optimizers.parameters, optimizers.configured) == ([], [], [], {})
    optimizers.take([first, second], [SchedulerConfig(CONSTANT, interval="step")])
    optimizers.configure({"optimizers": [1]})
    assert optimizers.configured == {"optimizers": [1]}
    held = [optimizer.param_groups[0]["params"][0] for optimizer in (first, second)]
    assert all(found is its for found, its in zip(optimizers.parameters, held, strict=True))
    assert optimizers.state_tensors == []
    held[0].grad = torch.ones(1)
    first.step()
    (buffer,) = optimizers.state_tensors
    assert buffer is first.state[held[0]]["momentum_buffer"]
    assert optimizers.steps_every("step")
    assert not optimizers.steps_every("epoch")


def test_a_step_on_gradients_of_one_rank_alone_is_an_error_while_it_is_watched():
    optimizers, sgd = Optimizers(), make_sgd()
    optimizers.rest_raw_backward()
    optimizers.take([sgd], [])
    (weight,) = optimizers.parameters
    watch = optimizers.watch_raw_backward()
    assert optimizers.watch_raw_backward() is watch
    (weight * 2).sum().backward()
    with pytest.raises(InvalidArguments):
        sgd.step()
    watch.forgive()
    sgd.step()
    optimizers.rest_raw_backward()
    (weight * 2).sum().backward()
    sgd.step()
    optimizers.watch_raw_backward()
    (weight * 2).sum().backward()
    with pytest.raises(InvalidArguments):
        sgd.step()


def test_which_optimizers_cannot_do_without_a_closure():
    class Keyword(torch.optim.SGD):
        def step(self, *, closure): ...

    class Bare(torch.optim.SGD):
        def step(self): ...

    class Required(torch.optim.SGD):
        def step(self, closure): ...

    weight = torch.nn.Parameter(torch.ones(1))
    assert needs_closure(torch.optim.LBFGS([weight]))
    assert needs_closure(Required([weight]))
    assert not any(needs_closure(kind([weight])) for kind in (torch.optim.SGD, Keyword, Bare))


def test_the_optimizer_of_manual_optimization_steps_through_raylight():
    stepped = []
    stepping = SteppingOptimizer(SGD, lambda optimizer, closure: stepped.append((optimizer, closure)) or "loss")
    assert stepping.step() == "loss"
    assert stepping.step(closure=len, extra=1) == "loss"
    assert stepped == [(SGD, None), (SGD, len)]
    assert stepping.param_groups is SGD.param_groups
    assert stepping.optimizer is SGD
