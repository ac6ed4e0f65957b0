"""What pickle refuses, or takes only in part, arrives at the workers whole."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import DataLoader

from raylight.launch import handover
from raylight.user.module import Module


def through(value: Any) -> Any:
    payload, buffers = handover.dump(value)
    return handover.load(payload, [bytearray(buffer) for buffer in buffers])


def script(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have us use another of its compilers
        return torch.jit.script(module)


@pytest.mark.parametrize(
    "change", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal, script]
)
@pytest.mark.parametrize("layer", [nn.Linear(3, 3), nn.Conv1d(2, 2, 3)])
def test_the_module_computes_and_trains_as_before(change: Any, layer: nn.Module) -> None:
    inputs = torch.randn(2, 3) if isinstance(layer, nn.Linear) else torch.randn(2, 2, 5)
    module = nn.Sequential(change(copy.deepcopy(layer)))
    arrived = through(through(module))
    for each in (module, arrived):
        each(inputs).square().sum().backward()
    assert list(arrived.state_dict()) == list(module.state_dict())
    for mine, theirs in zip(arrived.parameters(), module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(arrived.eval()(inputs), module.eval()(inputs))


def test_a_parametrized_module_stays_one() -> None:
    layer = through(parametrizations.weight_norm(nn.Linear(2, 2)))
    assert isinstance(layer, nn.Linear)
    with parametrize.cached():
        assert layer.weight is layer.weight
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear


class Rooted(Module):
    """The module itself has a tensor that is computed; and a part that takes leave of the rest in __getstate__."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        parametrize.register_parametrization(self, "scale", nn.Tanh())


def test_what_getstate_leaves_out_stays_out_of_a_parametrized_module() -> None:
    module = Rooted()
    module.trainer = object()  # type: ignore[assignment]
    arrived = through(module)
    assert arrived._trainer is None
    assert isinstance(arrived, Rooted)
    assert torch.equal(arrived.scale, module.scale)


def triple(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad *= 3


@pytest.mark.parametrize("size", [2, handover.MIN_BUFFER_BYTES // 4])
def test_hooks_on_gradients_arrive_and_can_be_taken_away(size: int) -> None:
    layer = nn.Linear(size, 1)
    layer.weight.register_hook(lambda gradient: gradient * layer.weight.shape[0] * 5)
    layer.handle = layer.bias.register_post_accumulate_grad_hook(triple)
    arrived = through(layer)
    for expected in (3.0, 1.0):
        arrived.zero_grad()
        arrived(torch.ones(1, size)).sum().backward()
        assert arrived.weight.grad[0, 0] == 5.0
        assert arrived.bias.grad == expected
        arrived.handle.remove()


def test_a_loader_whose_workers_run_already_arrives_without_them() -> None:
    loader = DataLoader(torch.arange(4), num_workers=1, persistent_workers=True)
    assert len(list(loader)) == 4
    assert torch.cat(list(through(loader))).tolist() == [0, 1, 2, 3]
    assert loader._iterator is not None
