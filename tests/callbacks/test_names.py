"""The folder as a whole: names, laziness, hooks."""

from __future__ import annotations

import subprocess
import sys

import pytest

import raylight.callbacks as callbacks
from raylight.callbacks import Callback, GradientAccumulationScheduler, LambdaCallback, RichProgressBar, TQDMProgressBar
from raylight.contract.config import Config
from raylight.contract.errors import InvalidArguments


def test_every_name_leads_to_a_callback():
    for name in callbacks.__all__:
        found = getattr(callbacks, name)
        assert found.__name__ == name
        if name != "EarlyStoppingReason":
            assert issubclass(found, Callback)
    assert dir(callbacks) == sorted(callbacks.__all__)


def test_importing_the_folder_imports_no_callback():
    code = (
        "import sys, raylight.callbacks;"
        "print([n for n in sys.modules if n == 'torch' or n.startswith('raylight.callbacks.')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(AttributeError, match="Did you mean EarlyStopping"):
        _ = callbacks.EarlyStoping


def test_lambda_callback_calls_what_it_was_given():
    calls = []
    callback = LambdaCallback(on_train_start=lambda trainer, module: calls.append(trainer), on_train_end=None)
    callback.on_train_start("rank", None)
    callback.on_train_end("rank", None)
    assert calls == ["rank"]
    with pytest.raises(InvalidArguments) as caught:
        LambdaCallback(on_trian_start=print, setup=3)
    assert caught.value.mistakes == [
        "LambdaCallback: there is no hook 'on_trian_start'. Did you mean on_train_start?",
        "LambdaCallback: setup=3 must be a function.",
    ]


def test_accumulation_follows_the_epoch(make_rank):
    class Automatic:
        automatic_optimization = True

    scheduler, rank = GradientAccumulationScheduler({2: 4, 5: 8}), make_rank()
    factors = []
    for rank.current_epoch in range(7):
        scheduler.on_train_epoch_start(rank, None)
        factors.append(rank.accumulate_grad_batches)
    assert factors == [1, 1, 4, 4, 4, 8, 8]
    resumed = make_rank(current_epoch=3)
    scheduler.on_train_start(resumed, Automatic)
    assert resumed.accumulate_grad_batches == 4
    Automatic.automatic_optimization = False
    with pytest.raises(InvalidArguments, match="optimizes manually"):
        scheduler.on_train_start(resumed, Automatic)
    assert scheduler._find_mistakes(Config()) == []
    assert "keep one" in scheduler._find_mistakes(Config(accumulate_grad_batches=2))[0]


@pytest.mark.parametrize("scheduling", [{}, {-1: 2}, {0: 0}, {"a": 2}, {True: 2}, None])
def test_accumulation_that_cannot_be_is_refused(scheduling):
    with pytest.raises(InvalidArguments, match="GradientAccumulationScheduler"):
        GradientAccumulationScheduler(scheduling)


def test_accumulation_is_not_set_in_two_places():
    scheduler = GradientAccumulationScheduler({2: 4})
    assert scheduler._find_mistakes(Config()) == []
    for given in ({"accumulate_grad_batches": 2}, {"global_batch_size": 64}):
        (mistake,) = scheduler._find_mistakes(Config(**given))
        [(name, value)] = given.items()
        assert f"{name}={value} and GradientAccumulationScheduler both set the accumulation" in mistake


def test_a_progress_bar_says_whether_it_is_wanted():
    assert RichProgressBar(leave=True, theme=object()).is_enabled
    assert TQDMProgressBar(refresh_rate=0).is_disabled
    bar = RichProgressBar()
    bar.disable()
    assert bar.is_disabled
    with pytest.raises(InvalidArguments, match="RichProgressBar: refresh_rate=-1"):
        RichProgressBar(refresh_rate=-1)
