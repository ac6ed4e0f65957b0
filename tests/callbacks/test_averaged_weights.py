from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from raylight.callbacks.averaged_weights import AveragedWeights


def make_module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, dtype=torch.float64))


def change(module):
    with torch.no_grad():
        for tensor in module.state_dict(keep_vars=True).values():
            tensor.add_(torch.randn_like(tensor) if tensor.is_floating_point() else 1)


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize(
    "functions", [{}, {"avg_fn": get_ema_avg_fn(0.9)}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}]
)
def test_the_average_is_that_of_torchs_averaged_model(functions, use_buffers):
    module = make_module()
    ours = AveragedWeights(use_buffers=use_buffers, **functions)
    theirs = AveragedModel(module, use_buffers=use_buffers, **functions)
    for _ in range(5):
        change(module)
        ours.update(module)
        theirs.update_parameters(module)
    assert ours.num_averaged == 5
    for name, tensor in theirs.module.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(ours.kept[name], tensor)
            assert ours.kept[name].dtype == tensor.dtype
        else:
            assert ours.kept[name] == module.state_dict()[name]  # counters are the newest


def test_swap_exchanges_in_place_and_is_its_own_inverse():
    module, average = make_module(), AveragedWeights()
    average.swap(module)  # nothing averaged yet
    average.update(module)
    change(module)
    average.update(module)
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    averages = {name: tensor.clone() for name, tensor in average.kept.items()}
    parameters, versions = list(module.parameters()), [p._version for p in module.parameters()]
    average.swap(module)
    assert average.is_swapped
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, averages[name])
        assert torch.equal(average.kept[name], weights[name])
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    # what copies weights behind the loop's back sees that they were written to
    assert all(p._version > version for p, version in zip(parameters, versions, strict=True))
    average.swap(module)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_tied_weights_are_one():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    average = AveragedWeights()
    average.update(module)
    assert set(average.kept) == {"0.weight", "0.bias", "1.bias"}
    before = module[0].weight.detach().clone()
    change(module)
    changed = module[0].weight.detach().clone()
    average.swap(module)
    assert torch.equal(module[1].weight, before)
    average.swap(module)
    assert torch.equal(module[1].weight, changed)


@pytest.mark.parametrize("is_swapped", [False, True])
def test_state_is_put_back_whichever_of_the_two_the_module_has(is_swapped):
    module, average = make_module(), AveragedWeights()
    average.update(module)
    change(module)
    average.update(module)
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    averages = {name: tensor.clone() for name, tensor in average.kept.items()}
    if is_swapped:
        average.swap(module)
    state = average.state_dict()
    assert ("current" in state) == is_swapped

    fresh, restored = make_module(), AveragedWeights()
    fresh.load_state_dict(module.state_dict())
    restored.load_state_dict(state, fresh)
    assert restored.num_averaged == 2
    assert not restored.is_swapped
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, weights[name])
        assert torch.equal(restored.kept[name], averages[name])
        assert restored.kept[name].data_ptr() != average.kept[name].data_ptr()


def test_buffers_that_are_not_saved_stay_the_modules_own():
    module = nn.Linear(1, 1)
    module.register_buffer("scratch", torch.ones(1), persistent=False)
    average = AveragedWeights()
    average.update(module)
    module.scratch.add_(1)
    average.swap(module)
    assert module.scratch == 2
