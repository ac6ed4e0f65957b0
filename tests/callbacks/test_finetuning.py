from __future__ import annotations

import pytest
import torch
from torch import nn

from raylight.callbacks import BackboneFinetuning, BaseFinetuning, Callback
from raylight.callbacks.finetuning import extend_schedulers
from raylight.contract.errors import InvalidArguments
from raylight.worker.step.optimizers import SchedulerConfig


class Recorder(Callback):
    def __init__(self):
        self.weights, self.rates, self.gradients = [], [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            self.weights.append(module.backbone[0].weight.detach().clone())
            self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradient = module.backbone[0].weight.grad
        self.gradients.append(None if gradient is None else gradient.clone())


def test_the_backbone_is_trained_from_its_epoch_on_at_a_rate_that_grows_to_the_heads(fit, make_net):
    recorder = Recorder()
    callback = BackboneFinetuning(1, lambda_func=lambda epoch: 4.0, backbone_initial_ratio_lr=0.1)
    fit(make_net(), callback, recorder, max_epochs=5)
    assert torch.equal(recorder.weights[0], recorder.weights[1])
    assert not torch.equal(recorder.weights[1], recorder.weights[2])
    assert recorder.rates[0] == [0.05]
    assert recorder.rates[1:] == [pytest.approx([0.05, rate]) for rate in (0.005, 0.02, 0.05, 0.05)]
    assert recorder.gradients[5] is None
    assert recorder.gradients[6] is not None


def test_gradients_of_unfrozen_parameters_are_those_of_one_step(fit, make_net, dataset):
    """They would grow over the steps if nobody freed them."""
    recorder, net = Recorder(), make_net(lr=0.0)
    fit(net, BackboneFinetuning(1, backbone_initial_lr=0.0), recorder, max_epochs=2)
    for step in range(6):
        net.zero_grad()
        net.loss(tuple(tensor[8 * step : 8 * step + 8] for tensor in dataset.tensors)).backward()
        torch.testing.assert_close(recorder.gradients[6 + step], net.backbone[0].weight.grad)


@pytest.mark.parametrize(
    "stop",
    [
        {"max_epochs": 1},
        {"max_epochs": 3},
        {"max_steps": 15},
    ],
)
def test_a_run_that_goes_on_is_one_that_never_stopped(fit, make_net, stop):
    class Scheduled(make_net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)]

    def make_callback():
        return BackboneFinetuning(1, lambda_func=lambda epoch: 1.5)

    whole = Scheduled(norm=True)
    fit(whole, make_callback(), name="whole", max_epochs=5)
    fit(Scheduled(norm=True), make_callback(), name="parts", **stop)
    resumed, recorder = Scheduled(norm=True), Recorder()
    fit(resumed, make_callback(), recorder, name="parts", resume="last", max_epochs=5)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert all(parameter.requires_grad for parameter in resumed.parameters())


def test_a_schedule_of_ones_own(fit, make_net):
    class InTwoParts(BaseFinetuning):
        def freeze_before_training(self, module):
            self.freeze([module.backbone, module.head.children()], train_bn=False)
            module.head.bias.requires_grad = False

        def finetune_function(self, module, epoch, optimizer):
            if epoch == 2:
                self.unfreeze_and_add_param_group([module.backbone[0]], optimizer, initial_denom_lr=5.0)
                module.backbone[0].bias.requires_grad = True

    net, recorder = make_net(norm=True), Recorder()
    norm, bias = net.backbone[1].weight.detach().clone(), net.head.bias.detach().clone()
    fit(net, InTwoParts(), recorder)
    assert recorder.rates == [[0.05], [0.05], [0.05, 0.01], [0.05, 0.01]]
    assert torch.equal(net.backbone[1].weight, norm)
    assert torch.equal(net.head.bias, bias)


def test_freezing_leaves_batch_norm_alone_unless_told(make_net):
    net = make_net(norm=True)
    BaseFinetuning.freeze(net.backbone)
    assert [p.requires_grad for p in net.backbone.parameters()] == [False, False, True, True]
    assert net.backbone[1].track_running_stats
    BaseFinetuning.freeze(net.backbone, train_bn=False)
    assert not any(p.requires_grad for p in net.backbone.parameters())
    assert not net.backbone[1].track_running_stats
    BaseFinetuning.make_trainable(net.backbone)
    assert all(p.requires_grad for p in net.backbone.parameters())
    assert len(list(BaseFinetuning.filter_params(net.backbone, train_bn=False))) == 2


def test_modules_with_parameters_beside_modules_are_found_at_any_depth():
    class WithOwn(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.ones(1)), nn.Linear(1, 1)

    own, plain = WithOwn(), nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(1, 1)))
    assert BaseFinetuning.flatten_modules([own, [plain]]) == [own, own.inner, plain[0], plain[1][0]]
    assert BaseFinetuning.flatten_modules(nn.ModuleDict({"a": own})) == [own, own.inner]


def test_what_an_optimizer_has_already_is_not_added_again(make_net):
    net = make_net()
    optimizer = torch.optim.SGD(net.backbone.parameters(), lr=0.1)
    BaseFinetuning.unfreeze_and_add_param_group(net.backbone, optimizer)
    assert len(optimizer.param_groups) == 1
    BaseFinetuning.unfreeze_and_add_param_group([net.backbone, net.head], optimizer)
    assert optimizer.param_groups[1]["params"] == [net.head.weight, net.head.bias]
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, 10),
    ],
)
def test_a_new_group_follows_the_first_one(make_rank, make, make_net):
    net = make_net()
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1, momentum=0.9)
    scheduler = make(optimizer)
    rank = make_rank(lr_scheduler_configs=[SchedulerConfig(scheduler)])
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    first = optimizer.param_groups[0]["lr"]
    BaseFinetuning.unfreeze_and_add_param_group(net.backbone, optimizer, lr=first / 4)
    extend_schedulers(rank, optimizer)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(first / 4)


def test_what_cannot_work_is_told(fit, make_net):
    class Without(make_net):
        def __init__(self):
            super().__init__()
            self.body = self.backbone
            del self.backbone

    with pytest.raises(InvalidArguments, match="Without has no `backbone`"):
        fit(Without(), BackboneFinetuning())
    with pytest.raises(InvalidArguments) as caught:
        BackboneFinetuning(-1, lambda_func=2.0, backbone_initial_ratio_lr="tenth")
    assert len(caught.value.mistakes) == 3


def test_an_epoch_that_starts_again_after_a_loss_is_the_same_epoch(make_rank, make_net):
    def begin(net):
        callback = BackboneFinetuning(1, lambda_func=lambda epoch: 1.5)
        callback.setup(rank, net, "fit")
        rank.optimizers = [net.configure_optimizers()]
        callback.on_fit_start(rank, net)
        return callback

    rank, net = make_rank(), make_net()
    survivor = begin(net)
    for rank.current_epoch in (0, 1, 2, 2):
        survivor.on_train_epoch_start(rank, net)
    rates = [group["lr"] for group in rank.optimizers[0].param_groups]
    assert rates == pytest.approx([0.05, 0.0075])

    checkpoint, state = {}, rank.optimizers[0].state_dict()
    survivor.on_save_checkpoint(rank, net, checkpoint)
    other = make_net()
    replacement = begin(other)  # it has made its optimizer before it is told where the others are
    replacement.on_load_checkpoint(rank, other, checkpoint)
    rank.optimizers[0].load_state_dict(state)
    replacement.load_state_dict(survivor.state_dict())
    replacement.on_train_epoch_start(rank, other)
    assert [group["lr"] for group in rank.optimizers[0].param_groups] == rates
    assert all(parameter.requires_grad for parameter in other.parameters())
