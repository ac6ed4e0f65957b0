"""How gradients of two ranks become those of both, and what torch says of those that do not, in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import raylight as pl
from raylight.contract.config import DDP
from raylight.contract.errors import DataError, InvalidArguments
from raylight.contract.messages import Notice
from raylight.contract.task import Place
from raylight.worker.step.reduction import FIND_UNUSED, Reduction, explain, mean_loss
from tests.worker.ranks import in_group, make_worker

TWO = Place(world_size=2)


class Two(pl.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 1), nn.Linear(2, 1)

    def training_step(self, batch, *_):
        return self.first(batch).sum()


def make(place: Place | None = None, module: Any = None, **config: Any) -> Reduction:
    module = module or Two()
    return Reduction(make_worker(module, place=place, **config), module.training_step)


# ---- one rank


def test_one_rank_reduces_nothing():
    reduction = make()
    parameters = list(reduction.worker.module.parameters())
    reduction.follow(parameters)
    assert reduction.ddp is None
    assert reduction.step is reduction.plain_step
    assert not reduction.is_outdated()
    reduction.finish()
    reduction.average_all()
    assert reduction.worker.outbox.take() == []


def test_what_is_frozen_may_be_unfrozen_and_then_has_to_be_followed():
    reduction = make()
    weight = reduction.worker.module.second.weight
    weight.requires_grad_(False)
    reduction.follow([])
    assert not reduction.is_outdated()
    weight.requires_grad_(True)
    assert reduction.is_outdated()


def test_tensors_that_no_checkpoint_holds_are_named_once():
    reduction, outside = make(), nn.Parameter(torch.ones(1))
    parameters = [*reduction.worker.module.parameters(), outside]
    reduction.follow(parameters)
    reduction.follow(parameters)
    (notice,) = reduction.worker.outbox.take()
    assert isinstance(notice, Notice)
    assert notice.level == "warning"
    assert notice.text.startswith("1 of 5 tensors that the optimizers hold are no parameters of the module")
    reduction.follow([*parameters, nn.Parameter(torch.ones(1))])
    (notice,) = reduction.worker.outbox.take()
    assert notice.text.startswith("2 of 6 tensors")


def test_layers_without_a_shape_need_a_sample_on_each_rank():
    reduction = make(module=Lazy())
    reduction.check_has_sample(uneven=True)
    reduction.waits_for_shapes = True
    reduction.check_has_sample(uneven=False)
    with pytest.raises(DataError, match="get their shapes from the first batch"):
        reduction.check_has_sample(uneven=True)


def test_of_one_rank_the_loss_is_the_mean():
    worker = make().worker
    assert mean_loss(5.0, 0.5, worker) == 5.0
    assert mean_loss(None, 0.5, worker) is None


# ---- errors of torch, in words

UNREDUCED = "Expected to have finished reduction in the prior iteration before starting a new one. "


def explained(text: str, place: Place = TWO, names: tuple[str, ...] = ("first.weight", "second.weight"), **config: Any):
    reduction = make(place, **config)
    reduction.names = list(names)
    error = RuntimeError(text)
    found = explain(error, reduction.worker, reduction)
    if found is not error:
        assert isinstance(found, InvalidArguments)
        assert found.__cause__ is error
    return str(found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (UNREDUCED + "did not receive grad for rank 0: 1\n", "second.weight got no gradient on rank 0: the loss does"),
        (UNREDUCED + "did not receive grad for rank 0: 0 1 7", "first.weight, second.weight got no gradient on rank 0"),
        (UNREDUCED + "did not receive grad for rank 1: 1", "first.weight, second.weight got no gradient on rank 0"),
        (
            "Expected to mark a variable ready only once. Parameter at index 3 with name a.b has been marked as ready "
            "twice. This means", "a parameter takes part in backward twice (Parameter at index 3 with name a):",
        ),
        ("mark a variable ready only once and no more", "twice (mark a variable"),
        ("Your training graph has changed in this iteration", "strategy=pl.DDP(static_graph=True) says that"),
        ("DDP expects same model across all ranks, but\nmore.", "different parameters (DDP expects same model across"),
        ("params[0] appears not to match.", "(params[0] appears not to match): __init__"),
    ],
)  # fmt: skip
def test_what_torch_says_of_a_reduction(text, said):
    assert said in explained(text)


def test_parameters_without_a_gradient_and_those_that_were_frozen():
    assert FIND_UNUSED in explained(UNREDUCED + "did not receive grad for rank 0: 1")
    assert "detach what it returns" in explained(
        UNREDUCED + "did not receive grad for rank 0: 1", strategy=DDP(find_unused_parameters=True)
    )
    reduction = make(TWO)
    reduction.names = ["first.weight", "second.weight"]
    module = reduction.worker.module
    module.first.weight.grad = torch.ones(1, 2)
    text = str(explain(RuntimeError(UNREDUCED), reduction.worker, reduction))
    assert text.startswith("second.weight got no gradient")
    module.second.weight.requires_grad_(False)
    text = str(explain(RuntimeError(UNREDUCED), reduction.worker, reduction))
    assert text.startswith("second.weight were frozen in the middle of an epoch")


@pytest.mark.parametrize(("count", "listed", "more"), [(8, 8, None), (9, 8, "and 1 more"), (12, 8, "and 4 more")])
def test_of_many_names_the_first_are_listed(count, listed, more):
    class Many(pl.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(count)])

        def training_step(self, batch, *_): ...

    reduction = make(TWO, Many())
    reduction.names = [f"layers.{number}" for number in range(count)]
    text = str(explain(RuntimeError(UNREDUCED), reduction.worker, reduction))
    assert text.count("layers.") == listed
    assert (" more got" in text) is (more is not None)
    assert more is None or f"layers.7 {more} got no gradient" in text


def test_any_other_error_stays_as_it_is():
    reduction = make(TWO)
    for error in (ValueError(UNREDUCED), RuntimeError("mat1 and mat2")):
        assert explain(error, reduction.worker, reduction) is error
    error = RuntimeError(UNREDUCED)
    assert explain(error, reduction.worker, None) is error
    assert explain(error, make().worker, reduction) is error


# ---- two ranks


def _reduce(place: Place, kind: type[Two], config: dict[str, Any]) -> Any:
    torch.manual_seed(place.rank)
    module = kind()
    module.second.weight.requires_grad_(False)
    outside = nn.Parameter(torch.full((1,), float(place.rank)))
    reduction = make(place, module, strategy=DDP(bucket_cap_mb=1.0, broadcast_buffers=False), **config)
    reduction.follow([*module.parameters(), outside])
    found: dict[str, Any] = {
        "weights": module.first.weight.tolist() + module.second.weight.tolist(), "outside": outside.item(),
        "names": list(reduction.names), "is_ddp": reduction.step is reduction.ddp and reduction.ddp is not None,
    }  # fmt: skip
    (reduction.step(torch.ones(3, 2) * (1 + place.rank)) + outside.sum() * (1 + place.rank)).backward()
    try:
        reduction.finish()
    except RuntimeError as error:
        found["error"] = str(explain(error, reduction.worker, reduction))
        return found
    found["gradients"] = module.first.weight.grad.tolist(), outside.grad.item()
    wrapped = reduction.ddp
    reduction.follow([*module.parameters(), outside])
    found["is_kept"] = reduction.ddp is wrapped
    module.second.weight.requires_grad_(True)
    found["is_outdated"] = reduction.is_outdated()
    return found


class Whole(Two):
    """All but what is frozen takes part."""

    def training_step(self, batch, *_):
        return (self.first(batch) + self.second(batch)).sum()


@pytest.mark.parametrize("config", [{}, {"deterministic": True}])
def test_two_ranks_begin_alike_and_average(config):
    first, second = in_group(_reduce, Whole, config)
    assert first == second
    assert first["outside"] == 0.0
    assert first["names"] == ["first.weight", "first.bias", "second.bias"]
    assert first["is_ddp"]
    assert first["gradients"] == ([[4.5, 4.5]], 1.5)
    assert first["is_kept"]
    assert first["is_outdated"]


def test_a_parameter_that_the_loss_does_not_depend_on_is_named_before_a_step():
    for found in in_group(_reduce, Two, {}):
        assert found["error"].startswith("second.bias got no gradient on rank")


def _average_by_hand(place: Place) -> Any:
    torch.manual_seed(place.rank)
    module = Two()
    module.automatic_optimization = False
    reduction = make(place, module)
    reduction.follow(list(module.parameters()))
    weights = module.first.weight.tolist()
    (module.first(torch.ones(1, 2)).sum() * (1 + place.rank)).backward()
    reduction.average_all()
    unused = module.second.weight.grad
    losses = [
        mean_loss(torch.tensor(4.0 * place.rank), 0.5, reduction.worker), mean_loss(None, 1.0, reduction.worker),
        mean_loss(3.0 if place.rank else None, 1.0, reduction.worker),
    ]  # fmt: skip
    return (
        weights, reduction.ddp, reduction.waits_for_shapes, module.first.weight.grad.tolist(), unused,
        [None if loss is None else float(loss) for loss in losses],
    )  # fmt: skip


def test_by_hand_gradients_are_averaged_after_backward():
    first, second = in_group(_average_by_hand)
    assert first == second
    assert first[1:] == (None, False, [[1.5, 1.5]], None, [1.0, None, 1.5])


class Lazy(pl.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LazyLinear(1)

    def training_step(self, batch, *_):
        return self.layer(batch).sum()


def _wait_for_shapes(place: Place) -> Any:
    torch.manual_seed(place.rank)
    module = Lazy()
    reduction = make(replace(place), module)
    reduction.follow(list(module.parameters()))
    waits = reduction.waits_for_shapes, reduction.ddp, reduction.is_outdated()
    reduction.step(torch.ones(1, 2)).backward()
    reduction.average_all()
    reduction.follow(list(module.parameters()))
    return waits, reduction.waits_for_shapes, reduction.ddp is not None, reduction.is_outdated()


def test_ddp_comes_once_all_layers_have_their_shapes():
    assert in_group(_wait_for_shapes) == [((True, None, True), False, True, False)] * 2
