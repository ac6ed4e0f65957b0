"""What a validation inside a fit may leave behind for the training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl
from raylight.contract.messages import EpochMetrics, Notice, Progress, StageFinished, StageStarted
from raylight.worker import evaluation
from raylight.worker.evaluation import interleave, split_by_loader
from raylight.worker.group.control import Control
from tests.worker import nets
from tests.worker.ranks import make_task, run_task

QUIET = {"num_workers": 0, "use_gpu": False, "enable_progress_bar": False, "enable_model_summary": False}


def make_loader(num_samples: int = 8) -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(float(4 * num_samples)).view(num_samples, 4) / 10), batch_size=2)


class Net(pl.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch):
        return self(batch[0]).pow(2).mean()

    def validation_step(self, batch):
        self.log("val_loss", self(batch[0]).pow(2).mean())

    def forward(self, x):
        return self.layer(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Cached(Net):
    """Makes a table when it is first called, as rotary embeddings do."""

    table = None

    def forward(self, x):
        if self.table is None:
            self.table = torch.linspace(0.5, 1.0, 1)
        return self.layer(x) * self.table


class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.Linear(3, 1))


class WithGradients(Net):
    """Asks for a gradient in its validation, as a physics-informed network or an attack does."""

    slope = 0.0

    def validation_step(self, batch):
        with torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self(x).sum(), x)
        self.slope = gradient[0, 0].item()


class Remembering(Net):
    """Keeps a tensor of its validation, and trains on it."""

    memory = None

    def validation_step(self, batch):
        self.memory = self(batch[0]).mean()

    def training_step(self, batch):
        factor = 1.0 if self.memory is None else self.memory
        return (self(batch[0]) * factor).pow(2).mean()


KINDS = [Cached, Lazy, WithGradients, Remembering]


@pytest.mark.parametrize("num_sanity_val_steps", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_validation_in_a_fit_makes_takes_part_in_training(kind, num_sanity_val_steps, tmp_path):
    module = kind()
    result = pl.fit(
        module, make_loader(), make_loader(4), max_epochs=2, storage_path=str(tmp_path),
        num_sanity_val_steps=num_sanity_val_steps, **QUIET,
    )  # fmt: skip
    assert result.num_steps == 8
    assert not any(tensor.is_inference() for tensor in module.state_dict().values())
    if kind is WithGradients:
        assert module.slope != 0.0


@pytest.mark.parametrize(("inference_mode", "expected"), [(True, [False, True]), (False, [False, False])])
def test_validation_outside_a_fit_keeps_its_inference_mode(inference_mode, expected, tmp_path):
    class Modes(Net):
        def on_fit_start(self):
            self.modes = []

        def validation_step(self, batch):
            self.modes.append(torch.is_inference_mode_enabled())

    module = Modes()
    trainer = pl.Trainer(max_epochs=1, storage_path=str(tmp_path), inference_mode=inference_mode, **QUIET)
    trainer.fit(module, make_loader(2), make_loader(2))
    trainer.validate(module, make_loader(2))
    assert [module.modes[0], module.modes[-1]] == expected


# ---- one pass, batch by batch


class Told(nets.Line):
    """Notes what its hooks and steps are given."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []
        self.beats: list[tuple[str, int]] = []

    def on_test_batch_start(self, batch, *arguments):
        self.told.append(("start", batch[0][0].item(), *arguments))

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.beats.append(self.control.beat[:2])
        self.told.append(("step", batch[0][0].item(), batch_idx, dataloader_idx))
        self.log("mean", batch[0].mean())
        return batch[0].sum()

    def on_test_batch_end(self, outputs, batch, *arguments):
        self.told.append(("end", outputs.item(), *arguments))


class Collecting(Told):
    def test_epoch_end(self, outputs):
        self.told = [[output.item() for output in part] if isinstance(part, list) else part.item() for part in outputs]
        self.log("at_end", 3.0)

    def on_test_epoch_end(self):
        self.log("later", 4.0)


def evaluate(module: Any, *loaders: Any, stage: str = "test", **arguments: Any) -> list[Any]:
    module.control = Control()
    given = list(loaders) if len(loaders) > 1 else loaders[0]
    return run_task(make_task(module, stage=stage, loaders={stage: given}, **arguments), control=module.control)


@pytest.fixture
def _at_once(monkeypatch):
    monkeypatch.setattr(evaluation, "REPORT_EVERY_S", 0.0)


def test_one_loader_has_no_number_and_several_have():
    module = Told()
    evaluate(module, nets.make_loader(4))
    assert module.told == [
        ("start", 0.0, 0), ("step", 0.0, 0, 0), ("end", 1.0, 0), ("start", 2.0, 1), ("step", 2.0, 1, 0), ("end", 5.0, 1)
    ]  # fmt: skip
    module = Told()
    evaluate(module, nets.make_loader(2), nets.make_loader(4))
    assert module.told == [
        ("start", 0.0, 0, 0), ("step", 0.0, 0, 0), ("end", 1.0, 0, 0),
        ("start", 0.0, 0, 1), ("step", 0.0, 0, 1), ("end", 1.0, 0, 1),
        ("start", 2.0, 1, 1), ("step", 2.0, 1, 1), ("end", 5.0, 1, 1),
    ]  # fmt: skip


def test_results_are_those_of_each_loader_and_weigh_by_samples():
    found = evaluate(Told(), nets.make_loader(4), nets.make_loader(5))
    assert found[-1].results == ({"mean/dataloader_idx_0": 1.5}, {"mean/dataloader_idx_1": 2.0})


@pytest.mark.usefixtures("_at_once")
def test_progress_is_told_by_batches_and_samples_of_each_loader():
    found = evaluate(Told(), nets.make_loader(3), nets.make_loader(5), task={"trained": (6, 2)})
    started = next(it for it in found if isinstance(it, StageStarted))
    assert (started.stage, started.epoch, started.step, started.num_batches) == ("test", 2, 6, 5)
    told = [(it.stage, it.epoch, it.step, it.batch, it.num_samples) for it in found if isinstance(it, Progress)]
    expected = [(1, 2), (2, 3), (2, 3), (1, 2), (2, 4), (3, 5), (3, 5)]
    assert told == [("test", 2, 6, *numbers) for numbers in expected]
    finished = next(it for it in found if isinstance(it, StageFinished))
    assert (finished.stage, finished.epoch, finished.step) == ("test", 2, 6)


def test_in_less_time_than_a_report_takes_the_end_alone_is_told():
    found = evaluate(Told(), nets.make_loader(8))
    assert [(it.batch, it.num_samples) for it in found if isinstance(it, Progress)] == [(4, 8)]


def test_signs_of_life_tell_a_first_batch_from_later_ones():
    module = Told()
    evaluate(module, nets.make_loader(6), task={"trained": (6, 2)})
    assert module.beats == [("first batch of test", 6), ("test", 6), ("test", 6)]


def test_an_epoch_end_gets_what_the_steps_returned():
    module = Collecting()
    found = evaluate(module, nets.make_loader(4))
    assert module.told == [1.0, 5.0]
    assert found[-1].results == ({"mean": 1.5, "at_end": 3.0, "later": 4.0},)
    parts = [it.values for it in found if isinstance(it, EpochMetrics)]
    assert parts == [{"mean": 1.5, "at_end": 3.0}, {"later": 4.0}]
    module = Collecting()
    evaluate(module, nets.make_loader(2), nets.make_loader(4))
    assert module.told == [[1.0], [1.0, 5.0]]


def test_an_epoch_end_that_wants_nothing_is_called_bare():
    class Bare(Told):
        def test_epoch_end(self):
            self.told = "ended"

    module = Bare()
    evaluate(module, nets.make_loader(2))
    assert module.told == "ended"


def test_a_notice_is_told_while_it_evaluates(monkeypatch):
    class Saying(nets.Line):
        def test_step(self, batch, batch_idx):
            self.trainer.notice(f"batch {batch_idx}")

    monkeypatch.setattr(evaluation, "REPORT_EVERY_S", 0.0)
    found = evaluate(Saying(), nets.make_loader(4))
    kinds = [type(it) for it in found if isinstance(it, (Notice, Progress, StageFinished))]
    assert kinds == [Progress, Notice, Progress, Notice, Progress, StageFinished]


def test_predictions_are_kept_if_the_caller_wants_them():
    found = evaluate(nets.Line(), nets.make_loader(4), stage="predict")
    assert [[(index, value.item()) for index, value in part] for part in found[-1].outputs] == [[(0, 1.0), (1, 5.0)]]
    found = evaluate(nets.Line(), nets.make_loader(4), stage="predict", task={"returns_predictions": False})
    assert found[-1].outputs == [[]]
    assert not any(isinstance(it, EpochMetrics) for it in found)


class Modes(nets.Line):
    """Has a part that stays in evaluation, and notes modes and gradients around a validation."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Dropout().eval()
        self.modes: list[Any] = []

    def note(self) -> None:
        gradient = None if self.weight.grad is None else self.weight.grad.item()
        self.modes.append((self.training, self.part.training, torch.is_grad_enabled(), gradient))

    def on_validation_start(self):
        self.note()

    def validation_step(self, batch):
        self.note()

    def on_validation_end(self):
        self.note()

    def on_train_epoch_end(self):
        self.note()


def validate_in_fit(module: Any) -> None:
    loaders = {"validate": nets.make_loader(2)}
    run_task(make_task(module, nets.make_loader(2), loaders=loaders, max_epochs=1, num_sanity_val_steps=0))


def test_a_validation_in_a_fit_drops_gradients_and_gives_modes_back():
    module = Modes()
    validate_in_fit(module)
    inside = (False, False, False, None)
    assert module.modes[:2] == [(False, False, True, None), inside]
    assert module.modes[-1] == (True, False, True, None)


def test_a_hook_decides_what_becomes_of_gradients_before_a_validation():
    class Keeping(Modes):
        def on_validation_model_zero_grad(self):
            pass

    module = Keeping()
    validate_in_fit(module)
    assert module.modes[-1] == (True, False, True, 0.5)


def test_a_sanity_check_takes_so_many_batches_of_each_loader():
    module = nets.Line()
    loaders = {"validate": [nets.make_loader(8), nets.make_loader(2)]}
    found = run_task(make_task(module, nets.make_loader(2), loaders=loaders, max_epochs=1, num_sanity_val_steps=2))
    started = next(it for it in found if isinstance(it, StageStarted))
    assert (started.stage, started.num_batches) == ("sanity", 4)
    told = [(it.batch, it.num_samples) for it in found if isinstance(it, Progress) and it.stage == "sanity"]
    assert told == [(2, 4), (1, 2)]
    assert [it.stage for it in found if isinstance(it, EpochMetrics)] == ["validate", "train"]  # it measures nothing


@pytest.mark.parametrize(
    ("num_loaders", "expected"),
    [(0, [{"a": 1.0}]), (1, [{"a": 1.0}]), (2, [{"a": 1.0}, {"a": 1.0}])],
)
def test_a_value_without_a_loader_is_that_of_each(num_loaders, expected):
    assert split_by_loader({"a": 1.0}, num_loaders) == expected


def test_a_value_with_a_loader_is_that_of_this_one():
    values = {"a/dataloader_idx_0": 1.0, "b/dataloader_idx_1": 2.0, "c": 3.0}
    assert split_by_loader(values, 2) == [{"a/dataloader_idx_0": 1.0, "c": 3.0}, {"b/dataloader_idx_1": 2.0, "c": 3.0}]


def test_items_of_all_ranks_come_in_turns():
    assert interleave([[0, 3, 6], [1, 4], [2, None]]) == [0, 1, 2, 3, 4, None, 6]
