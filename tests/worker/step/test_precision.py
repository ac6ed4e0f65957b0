"""Precision: the dtypes of weights, batches and results, and the scaling of the loss."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raylight.contract.errors import InvalidArguments
from raylight.worker.step.precision import Precision, make_precision

Pair = namedtuple("Pair", ["x", "y"])


@dataclass(frozen=True)
class Sample:
    image: Tensor
    label: Tensor


def cpu_scaler(**arguments: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **arguments)


@pytest.mark.parametrize(
    ("name", "weights", "result"),
    [
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("16-true", torch.float16, torch.float16),
        ("64-true", torch.float64, torch.float64),
    ],
)
def test_dtypes_of_weights_batch_and_result(name: str, weights: torch.dtype, result: torch.dtype) -> None:
    precision = make_precision(name, "cpu")
    module = precision.convert_module(nn.Linear(4, 2))
    batch = precision.convert_batch({"x": torch.ones(3, 4), "y": torch.zeros(3, dtype=torch.int64)})
    with precision.forward_context():
        output = module(batch["x"])
        made = torch.ones(1)
    assert module.weight.dtype == weights
    assert batch["y"].dtype == torch.int64
    assert output.dtype == result
    assert made.dtype == (torch.float32 if "mixed" in name else weights)
    assert torch.ones(1).dtype == torch.float32
    assert precision.is_plain == (name == "32-true")
    assert precision.scaler is None


def test_the_default_dtype_is_put_back_after_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), make_precision("64-true", "cpu").forward_context():
        raise ZeroDivisionError
    assert torch.get_default_dtype() == torch.float32


def test_contexts_may_be_nested() -> None:
    for name in ("bf16-mixed", "64-true", "32-true"):
        precision = make_precision(name, "cpu")
        with precision.forward_context():
            with precision.forward_context():
                pass
            inside = torch.is_autocast_enabled("cpu") or torch.get_default_dtype() == torch.float64
            assert inside == (name != "32-true")
    assert not torch.is_autocast_enabled("cpu")


def test_plain_precision_costs_no_object_a_step() -> None:
    precision = make_precision("32-true", "cpu")
    batch = [torch.ones(1, dtype=torch.float64)]
    assert precision.forward_context() is precision.forward_context()
    assert precision.convert_batch(batch) is batch


def test_weights_used_under_no_grad_first_still_get_gradients() -> None:
    precision = make_precision("bf16-mixed", "cpu")
    layer = nn.Linear(2, 2)
    with precision.forward_context():
        with torch.no_grad():
            layer(torch.ones(1, 2))
        layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad is not None


def test_containers_keep_their_kind_and_are_not_changed() -> None:
    precision = make_precision("bf16-true", "cpu")
    float_, int_ = torch.ones(2), torch.ones(2, dtype=torch.int64)
    batch = {
        "pair": Pair(float_, int_),
        "list": [float_, "text", None, 3],
        "tuple": (float_,),
        "ordered": OrderedDict(b=float_, a=int_),
        "user": UserDict(x=float_),
        "sample": Sample(float_, int_),
    }
    cast = precision.convert_batch(batch)
    half = torch.bfloat16
    assert isinstance(cast["pair"], Pair)
    assert (cast["pair"].x.dtype, cast["pair"].y.dtype) == (half, torch.int64)
    assert (cast["list"][0].dtype, cast["list"][1:]) == (half, ["text", None, 3])
    assert isinstance(cast["tuple"], tuple)
    assert list(cast["ordered"]) == ["b", "a"]
    assert (type(cast["user"]), cast["user"]["x"].dtype) == (UserDict, half)
    assert (type(cast["sample"]), cast["sample"].image.dtype) == (Sample, half)
    assert batch["user"]["x"].dtype == batch["sample"].image.dtype == batch["list"][0].dtype == torch.float32


def test_16_mixed_on_a_cpu_says_what_to_use() -> None:
    with pytest.raises(InvalidArguments, match='needs a GPU; on a CPU use precision="bf16-mixed"'):
        make_precision("16-mixed", "cpu")
    with pytest.raises(InvalidArguments, match="'8-bit' is not one of 32-true"):
        make_precision("8-bit", "cpu")


def test_a_precision_of_the_users_own_is_taken() -> None:
    own = Precision("bf16-mixed", "cpu")
    assert make_precision("32-true", "cpu", plugins=(own,)) is own


def train(precision: Precision, steps: int, clip: float | None = None) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(steps):
        loss = module(torch.ones(2, 3)).square().mean()
        optimizer.zero_grad()
        precision.scale(loss).backward()
        if clip is not None:
            precision.unscale(optimizer)
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        precision.step(optimizer)
        precision.update()
    return module


@pytest.mark.parametrize("clip", [None, 0.01])
def test_scaling_changes_no_step(clip: float | None) -> None:
    # Powers of two scale without rounding, so that the weights are equal bit for bit.
    scaled = train(make_precision("16-mixed", "cpu", scaler=cpu_scaler(init_scale=2.0**10)), 5, clip)
    plain = train(make_precision("32-true", "cpu"), 5, clip)
    assert torch.equal(scaled.weight, plain.weight)  # type: ignore[arg-type]


def test_a_step_with_infinite_gradients_is_left_out_and_the_scale_halved() -> None:
    precision = make_precision("16-mixed", "cpu", scaler=cpu_scaler(init_scale=8.0))
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    precision.scale(weight * torch.tensor(float("inf"))).backward()
    precision.unscale(optimizer)
    precision.step(optimizer)
    precision.update()
    assert weight.item() == 1.0
    assert precision.state_dict()["scale"] == 4.0


def test_a_step_without_gradients_is_no_error_and_the_next_one_counts() -> None:
    precision = make_precision("16-mixed", "cpu", scaler=cpu_scaler(init_scale=8.0))
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for loss in (None, weight.sum()):
        if loss is not None:
            precision.scale(loss).backward()
        precision.unscale(optimizer)
        precision.step(optimizer)
        precision.update()
    assert weight.item() == 0.0


def test_a_closure_is_called_once_before_the_step_and_its_loss_returned() -> None:
    for precision in (make_precision("32-true", "cpu"), make_precision("16-mixed", "cpu", scaler=cpu_scaler())):
        weight = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=0.5)
        calls = []

        def closure(precision: Precision = precision, weight: Tensor = weight, calls: list = calls) -> Tensor:
            calls.append(weight.item())
            loss = weight.sum()
            precision.scale(loss).backward()
            return loss.detach()

        assert precision.step(optimizer, closure) == 1.0
        assert calls == [1.0]
        assert weight.item() == 0.5


def test_lbfgs_works_without_a_scaler_and_is_refused_with_one() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.LBFGS([weight], lr=0.5)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    make_precision("32-true", "cpu").step(optimizer, closure)
    assert weight.item() < 1.0
    with pytest.raises(InvalidArguments, match=r'LBFGS.*use precision="bf16-mixed"'):
        make_precision("16-mixed", "cpu", scaler=cpu_scaler()).step(optimizer, closure)


def test_the_scalers_state_goes_on_where_it_was() -> None:
    first = make_precision("16-mixed", "cpu", scaler=cpu_scaler(init_scale=2.0**4, growth_interval=3))
    train(first, 4)
    second = make_precision("16-mixed", "cpu", scaler=cpu_scaler(init_scale=2.0**4, growth_interval=3))
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert second.state_dict()["scale"] == 2.0**5
    assert second.state_dict()["_growth_tracker"] == 1
    train(second, 2)
    assert second.state_dict()["scale"] == 2.0**6


def test_state_of_another_precision_is_passed_over() -> None:
    plain, scaled = make_precision("32-true", "cpu"), make_precision("16-mixed", "cpu", scaler=cpu_scaler())
    before = scaled.state_dict()
    scaled.load_state_dict(plain.state_dict())
    plain.load_state_dict(before)
    assert scaled.state_dict() == before
    assert plain.state_dict() == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_16_mixed_on_a_gpu() -> None:
    precision = make_precision("16-mixed", "cuda")
    module = precision.convert_module(nn.Linear(8, 8).cuda())
    optimizer = torch.optim.Adam(module.parameters(), fused=True)
    before = module.weight.detach().clone()
    with precision.forward_context():
        output = module(torch.randn(4, 8, device="cuda"))
    assert output.dtype == torch.float16
    precision.scale(output.float().square().mean()).backward()
    precision.unscale(optimizer)
    precision.step(optimizer)
    precision.update()
    assert not torch.equal(module.weight, before)
