from __future__ import annotations

import copy

import pytest
import torch
from torch.optim.swa_utils import SWALR, update_bn
from torch.utils.data import DataLoader

from raylight.callbacks import Callback, StochasticWeightAveraging
from raylight.contract.config import Config
from raylight.contract.errors import InvalidArguments


class Recorder(Callback):
    """The weights as each epoch begins and the learning rate of each step."""

    def __init__(self):
        self.epochs, self.rates = [], []

    def on_train_epoch_start(self, trainer, module):
        self.epochs.append({name: p.detach().clone() for name, p in module.named_parameters()})

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def expected_rates(initial, num_epochs, first, swa_lr, annealing_epochs, strategy):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=initial)
    rates, scheduler = [], None
    for epoch in range(num_epochs):
        if scheduler is not None:
            scheduler.step()
        elif epoch >= first:
            scheduler = SWALR(optimizer, swa_lr, annealing_epochs, strategy)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
    return rates


@pytest.mark.parametrize(
    ("start", "first", "strategy"), [(2, 1, "cos"), (0.75, 2, "linear"), (0.0, 0, "cos"), (4, 3, "cos")]
)
def test_the_result_is_the_mean_of_the_weights_with_which_epochs_begin(fit, make_net, start, first, strategy):
    net, recorder = make_net(), Recorder()
    swa = StochasticWeightAveraging(0.2, swa_epoch_start=start, annealing_epochs=3, annealing_strategy=strategy)
    fit(net, recorder, swa)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, torch.stack([w[name] for w in recorder.epochs[first:]]).mean(0))
    assert recorder.rates[::6] == pytest.approx(expected_rates(0.05, 4, first, 0.2, 3, strategy))
    assert all(len(set(recorder.rates[6 * epoch : 6 * epoch + 6])) == 1 for epoch in range(4))


def test_batch_norm_is_measured_with_the_averaged_weights(fit, make_net, dataset):
    net = make_net(norm=True)
    fit(net, StochasticWeightAveraging(0.2, swa_epoch_start=2))
    reference = copy.deepcopy(net)
    reference.forward = reference.backbone.forward
    update_bn(DataLoader(dataset, batch_size=8), reference)
    ours, theirs = net.backbone[1], reference.backbone[1]
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert ours.num_batches_tracked == 6
    assert ours.momentum == 0.1


def test_the_pass_over_the_data_logs_nothing_and_leaves_the_modes_alone(fit, make_net):
    class Logs(Callback):
        def teardown(self, trainer, module, stage):
            self.modes = [inner.training for inner in module.modules()]
            self.logged = set(trainer.callback_metrics)

    class Frozen(make_net):
        def on_train_epoch_start(self):
            self.head.eval()

    logs, with_swa, without = Logs(), Frozen(norm=True), make_net(norm=True)
    trainer = fit(with_swa, StochasticWeightAveraging(0.05, swa_epoch_start=4), logs, max_epochs=4)
    history = trainer.result.history()
    other = fit(without).result.history()
    assert history.num_rows == other.num_rows
    assert logs.logged == {"train_loss", "train_loss_step", "train_loss_epoch", "val_loss"}
    assert logs.modes == [True, True, True, True, False]


def test_the_modules_own_scheduler_rests_and_is_saved_on(fit, make_net):
    class Scheduled(make_net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    recorder = Recorder()
    fit(Scheduled(), recorder, StochasticWeightAveraging(0.1, swa_epoch_start=3, annealing_epochs=1))
    assert recorder.rates[::6] == pytest.approx([0.05, 0.025, 0.0125, 0.1])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("stop", [{"max_epochs": 3}, {"max_steps": 15}, {"max_epochs": 1}])
def test_a_run_that_goes_on_is_one_that_never_stopped(fit, make_net, norm, stop):
    def make_swa():
        return StochasticWeightAveraging(0.2, swa_epoch_start=2, annealing_epochs=5)

    class Scheduled(make_net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    whole, before = Scheduled(norm=norm), Recorder()
    fit(whole, make_swa(), before, name="whole", max_epochs=5)
    fit(Scheduled(norm=norm), *([make_swa()] if stop != {"max_epochs": 1} else []), name="parts", **stop)
    resumed, after = Scheduled(norm=norm), Recorder()
    fit(resumed, make_swa(), after, name="parts", resume="last", max_epochs=5)
    assert after.rates == before.rates[-len(after.rates) :]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_without_an_end_of_epochs_the_last_step_is_the_end(fit, make_net):
    net, recorder = make_net(), Recorder()
    fit(net, recorder, StochasticWeightAveraging(0.2, swa_epoch_start=1), max_epochs=-1, max_steps=14)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, torch.stack([w[name] for w in recorder.epochs]).mean(0))


def test_a_run_that_is_stopped_early_keeps_its_weights(fit, make_net):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 2:
                trainer.should_stop = True
                self.weights = copy.deepcopy(module.state_dict())

    net, stop = make_net(), Stop()
    fit(net, StochasticWeightAveraging(0.2, swa_epoch_start=1), stop)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, stop.weights[name])


def test_a_function_of_the_users_own_averages(fit, make_net):
    net, recorder = make_net(), Recorder()
    newest = StochasticWeightAveraging(0.2, swa_epoch_start=1, avg_fn=lambda averaged, current, count: current)
    fit(net, recorder, newest)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, recorder.epochs[-1][name])


def test_all_mistakes_are_told_at_once():
    with pytest.raises(InvalidArguments) as caught:
        StochasticWeightAveraging(-1.0, swa_epoch_start=0, annealing_epochs=-1, annealing_strategy="cosine", avg_fn=1)
    assert len(caught.value.mistakes) == 5
    assert "Did you mean 'cos'?" in str(caught.value)
    with pytest.raises(InvalidArguments, match="swa_lrs"):
        StochasticWeightAveraging([])


def test_epochs_that_never_come_are_told():
    config = Config(max_epochs=4)
    assert StochasticWeightAveraging(0.1, swa_epoch_start=4)._find_mistakes(config) == []
    assert "never reached" in StochasticWeightAveraging(0.1, swa_epoch_start=5)._find_mistakes(config)[0]
    assert "fraction of max_epochs" in StochasticWeightAveraging(0.1)._find_mistakes(Config(max_epochs=-1))[0]


def test_rates_must_fit_the_groups(fit, make_net):
    with pytest.raises(InvalidArguments, match="swa_lrs has 2 rates, and the optimizer has 1 parameter groups"):
        fit(make_net(), StochasticWeightAveraging([0.1, 0.2], swa_epoch_start=2))
