from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.data import DataLoader

from raylight.callbacks import Callback, EMAWeightAveraging, WeightAveraging
from raylight.contract.errors import InvalidArguments


class Recorder(Callback):
    """The module's state after each step; and what it is in validation."""

    def __init__(self):
        self.steps, self.validated = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps.append(copy.deepcopy(module.state_dict()))

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking and batch_idx == 0:
            self.validated.append(copy.deepcopy(module.state_dict()))


def assert_equal(state, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def assert_close(state, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor)


def average_of(steps, decay):
    average = dict(steps[0])
    for state in steps[1:]:
        average = {name: torch.lerp(average[name], state[name], 1 - decay) for name in state}
    return average


def test_validation_result_and_checkpoint_have_the_average(fit, make_net, dataset):
    net, recorder = make_net(), Recorder()
    trainer = fit(net, EMAWeightAveraging(decay=0.8), recorder)
    validated_loss = trainer.callback_metrics["val_loss"].item()
    assert len(recorder.steps) == 24
    for epoch, validated in enumerate(recorder.validated, start=1):
        assert_close(validated, average_of(recorder.steps[: 6 * epoch], 0.8))
    assert_close(net.state_dict(), average_of(recorder.steps, 0.8))
    loaded = make_net.load_from_checkpoint(trainer.checkpoint_callback.last_model_path)
    assert_equal(loaded.state_dict(), net.state_dict())
    results = trainer.test(make_net(), DataLoader(dataset, batch_size=16), ckpt_path="best", verbose=False)
    assert results[0]["test_loss"] == pytest.approx(validated_loss, rel=1e-6)


def test_training_itself_is_as_without_it(fit, make_net):
    plain, averaged = Recorder(), Recorder()
    fit(make_net(), plain)
    fit(make_net(), EMAWeightAveraging(decay=0.8), averaged)
    for ours, theirs in zip(averaged.steps, plain.steps, strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("norm", [False, True])
def test_a_run_that_goes_on_is_one_that_never_stopped(fit, make_net, norm):
    whole = make_net(norm=norm)
    recorder = Recorder()
    fit(whole, EMAWeightAveraging(decay=0.8), recorder, name="whole")
    fit(make_net(norm=norm), EMAWeightAveraging(decay=0.8), name="parts", max_epochs=2)
    rest = Recorder()
    resumed = make_net(norm=norm)
    fit(resumed, EMAWeightAveraging(decay=0.8), rest, name="parts", resume="last")
    assert len(rest.steps) == 12
    for ours, theirs in zip(rest.steps, recorder.steps[12:], strict=True):
        assert_equal(ours, theirs)
    assert_equal(resumed.state_dict(), whole.state_dict())


def test_goes_on_from_the_middle_of_an_epoch(fit, make_net):
    whole = make_net()
    fit(whole, EMAWeightAveraging(decay=0.8), name="whole")
    fit(make_net(), EMAWeightAveraging(decay=0.8), name="parts", max_steps=9)
    resumed = make_net()
    fit(resumed, EMAWeightAveraging(decay=0.8), name="parts", resume="last")
    assert_equal(resumed.state_dict(), whole.state_dict())


def test_a_run_without_it_goes_on_with_it(fit, make_net):
    fit(make_net(), name="run", max_epochs=2)
    recorder, net = Recorder(), make_net()
    fit(net, EMAWeightAveraging(decay=0.5), recorder, name="run", resume="last")
    assert len(recorder.steps) == 12
    assert_close(net.state_dict(), average_of(recorder.steps, 0.5))


def test_every_step_weighs_the_same_by_default(fit, make_net):
    net, recorder = make_net(), Recorder()
    fit(net, WeightAveraging(), recorder)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, torch.stack([state[name] for state in recorder.steps]).mean(0))


def test_should_update_decides_by_step_or_epoch(fit, make_net):
    class EachEpoch(WeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return epoch_idx is not None and epoch_idx >= 1

    net, recorder = make_net(), Recorder()
    fit(net, EachEpoch(), recorder)
    ends = [recorder.steps[index] for index in (11, 17, 23)]
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, torch.stack([state[name] for state in ends]).mean(0))
    # the epoch's end comes after its validation, so there was nothing to validate with before the third epoch's
    assert_equal(recorder.validated[1], recorder.steps[11])
    assert_equal(recorder.validated[2], recorder.steps[11])


def test_ema_starts_and_skips_as_told():
    average = EMAWeightAveraging(update_every_n_steps=3, update_starting_at_step=4, update_starting_at_epoch=2)
    assert [step for step in range(13) if average.should_update(step_idx=step)] == [6, 9, 12]
    assert [epoch for epoch in range(4) if average.should_update(epoch_idx=epoch)] == [2, 3]
    by_epoch = EMAWeightAveraging(update_every_n_steps=0, update_starting_at_epoch=0)
    assert not any(by_epoch.should_update(step_idx=step) for step in range(5))


def test_accumulation_averages_steps_not_batches(fit, make_net):
    net, recorder = make_net(), Recorder()
    fit(net, EMAWeightAveraging(decay=0.5), recorder, accumulate_grad_batches=2)
    assert_close(net.state_dict(), average_of(recorder.steps[1::2], 0.5))


def test_one_callback_serves_two_fits(fit, make_net):
    callback, first, second = EMAWeightAveraging(decay=0.8), make_net(), make_net()
    fit(first, callback)
    fit(second, callback)
    assert_equal(second.state_dict(), first.state_dict())
    assert callback.average.kept == {}


def test_all_mistakes_are_told_at_once():
    with pytest.raises(InvalidArguments) as caught:
        EMAWeightAveraging(decay=1.5, update_every_n_steps=-1, update_starting_at_epoch=-1)
    assert len(caught.value.mistakes) == 3
    with pytest.raises(InvalidArguments, match="exclude one another"):
        WeightAveraging(avg_fn=print, multi_avg_fn=print)


def test_training_that_starts_again_after_a_loss_in_validation_has_its_own_weights(make_rank, make_net):
    callback, rank, net = EMAWeightAveraging(decay=0.5), make_rank(), make_net()
    callback.setup(rank, net, "fit")
    for rank.global_step in (1, 2):
        with torch.no_grad():
            net.head.weight.add_(1.0)
        callback.on_train_batch_end(rank, net, None, None, 0)
    weight = net.head.weight.detach().clone()
    callback.on_validation_epoch_start(rank, net)
    assert torch.equal(net.head.weight, weight - 0.5)

    replacement, other = EMAWeightAveraging(decay=0.5), make_net()
    replacement.setup(rank, other, "fit")
    other.load_state_dict(net.state_dict())
    replacement.load_state_dict(callback.state_dict())
    for survivor, module in ((callback, net), (replacement, other)):
        survivor.on_train_start(rank, module)
        assert torch.equal(module.head.weight, weight)
        assert torch.equal(survivor.average.kept["head.weight"], weight - 0.5)
