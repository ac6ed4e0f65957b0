"""One optimizer step, made batch by batch, and how it is undone if it breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raylight.contract.errors import DataError, InvalidArguments
from raylight.contract.task import Place
from raylight.worker.data.batches import TrainBatch
from raylight.worker.group.control import Control
from raylight.worker.session import Session
from raylight.worker.step.step import Step
from tests.worker.nets import Line
from tests.worker.ranks import in_group, make_task


def make_batch(index: int, *values: float, share: float = 1.0, uneven: bool = False, last: bool = False) -> TrainBatch:
    data = [torch.tensor(values).unsqueeze(1)] if values else None
    return TrainBatch(data, index, share, len(values), uneven, last)


def make(module: Line | None = None, place: Place | None = None, **config: Any) -> Step:
    module = module or Line(lr=1.0)
    worker = Session(make_task(module, **config), place or Place(), Control()).worker
    optimizers = module.configure_optimizers()
    worker.optimizers.take(optimizers if isinstance(optimizers, list) else [optimizers], [])
    worker.metrics.enter("train", in_step=True)
    step = Step(worker)
    step.begin_epoch(knows_sizes=True)
    return step


def begin(step: Step, batch: TrainBatch, complete: bool = True) -> Any:
    step.begin(batch)
    return step.make(batch, batch.data, complete)


def train(step: Step, batch: TrainBatch, complete: bool = True) -> Any:
    outputs = begin(step, batch, complete)
    step.end()
    step.worker.progress.finish_batch(batch.index)
    if not step.window:
        step.worker.metrics.end_step()
    return outputs


def weight_of(step: Step) -> float:
    return next(step.worker.module.parameters()).item()


def test_a_batch_makes_a_step():
    step = make()
    assert step.num_broken == 0
    outputs = begin(step, make_batch(0, 2.0, 4.0))
    assert (step.is_done, step.window, step.num_broken) == (True, 0, 0)
    assert step.batch is not None
    step.end()
    assert step.batch is None
    assert outputs.item() == 0.0
    progress = step.worker.progress
    assert (progress.global_step, progress.step_before, progress.has_stepped) == (1, 0, True)
    assert weight_of(step) == -3.0
    assert [loss.item() for loss in step.take_losses()] == [0.0]
    assert step.take_losses() == []


def test_batches_accumulate_and_a_partial_window_is_a_mean():
    step = make(accumulate_grad_batches=4)
    train(step, make_batch(0, 2.0), complete=False)
    assert (step.window, step.is_done, step.filled) == (1, True, 0.25)
    assert step.num_broken == 1
    train(step, make_batch(1, 6.0), complete=True)
    assert (step.window, step.worker.progress.global_step) == (0, 1)
    assert weight_of(step) == pytest.approx(-4.0)
    step.worker.data.accumulate_over(1)
    train(step, make_batch(2, 1.0, share=0.5))
    assert weight_of(step) == pytest.approx(-4.5)


def test_a_step_that_broke_is_undone_with_its_window():
    step = make(accumulate_grad_batches=2)
    train(step, make_batch(0, 2.0), complete=False)
    train(step, make_batch(1, 2.0))
    train(step, make_batch(2, 2.0), complete=False)
    step.begin(make_batch(3, 2.0))
    assert step.num_broken == 2
    torch.rand(3)
    assert step.undo() is False
    progress = step.worker.progress
    assert (progress.global_step, progress.num_batches_seen, progress.batch_idx, step.window) == (1, 2, 2, 0)
    assert step.batch is None
    assert step.undo() is False
    assert progress.num_batches_seen == 2


def test_random_numbers_are_those_of_the_windows_first_batch_again():
    step = make(accumulate_grad_batches=2)
    torch.manual_seed(1)
    expected = torch.random.get_rng_state()
    step.begin(make_batch(0, 2.0))
    torch.rand(1)
    step.make(make_batch(0, 2.0), make_batch(0, 2.0).data, False)
    step.end()
    step.worker.progress.finish_batch(0)
    step.begin(make_batch(1, 2.0))
    torch.rand(1)
    assert step.torch_rng is not None
    assert not torch.equal(step.torch_rng, expected)
    step.undo()
    assert torch.equal(torch.random.get_rng_state(), expected)


@pytest.mark.parametrize("every", [1, 2, 0])
def test_a_batch_whose_step_is_made_counts_though_its_last_hooks_are_missing(every):
    step = make(log_every_n_steps=every)
    train(step, make_batch(0, 2.0))
    begin(step, make_batch(1, 4.0))
    state = torch.random.get_rng_state()
    torch.rand(1)
    moved = torch.random.get_rng_state()
    assert step.undo() is True
    assert not torch.equal(state, moved)
    assert torch.equal(torch.random.get_rng_state(), moved)
    progress = step.worker.progress
    assert (progress.global_step, progress.num_batches_seen, progress.batch_idx, progress.step_before) == (2, 2, 2, 1)
    drained = step.worker.metrics.drain()
    assert (None if drained is None else [row.step for row in drained.rows]) == ([2] if every else None)
    assert step.worker.metrics.epoch_share()["loss"][1] == [(6.0, 2)]


class Norm(Line):
    def __init__(self):
        super().__init__(lr=1.0)
        self.norm = torch.nn.BatchNorm1d(1)

    def training_step(self, batch):
        return (self.norm(batch[0]) * self.weight).sum()


def test_running_statistics_are_taken_back():
    step = make(Norm())
    norm = step.worker.module.norm
    train(step, make_batch(0, 2.0, 4.0))
    before = norm.running_mean.clone(), int(norm.num_batches_tracked)
    batch = make_batch(1, 8.0, 4.0)
    step.begin(batch)
    step.compute(batch, batch.data, 1.0)
    assert norm.running_mean != before[0]
    step.undo()
    assert (norm.running_mean, int(norm.num_batches_tracked)) == before


class Weird(Line):
    def __init__(self, returned: Any):
        super().__init__(lr=1.0)
        self.returned = returned

    def training_step(self, batch):
        return self.returned(self.weight)


def test_what_a_step_may_return():
    train(make(Weird(lambda weight: {"loss": weight.sum(), "more": 1})), make_batch(0, 1.0))
    step = make(Weird(lambda weight: None))
    assert train(step, make_batch(0, 1.0)) is None
    assert step.take_losses() == []
    assert weight_of(step) == 0.0
    with pytest.raises((DataError, InvalidArguments)):
        train(make(Weird(lambda weight: torch.ones(1))), make_batch(0, 1.0))
    with pytest.raises((DataError, InvalidArguments)):
        train(make(Weird(lambda weight: "loss")), make_batch(0, 1.0))


class Evaluating(Line):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=3)

    def training_step(self, batch):
        return ((self.weight - batch[0]) ** 2).mean()


def test_an_optimizer_evaluates_the_loss_again_and_the_first_of_the_step_is_kept():
    step = make(Evaluating())
    train(step, make_batch(0, 1.0))
    assert len(step.take_losses()) == 1
    assert step.worker.progress.global_step == 1
    assert weight_of(step) == pytest.approx(1.0, abs=0.3)
    step = make(Evaluating(), accumulate_grad_batches=2)
    train(step, make_batch(0, 1.0), complete=False)
    with pytest.raises(InvalidArguments, match="LBFGS evaluates the loss more than once a step"):
        train(step, make_batch(1, 1.0))


class Breaking(Evaluating):
    num_evaluations = 0

    def training_step(self, batch):
        self.num_evaluations += 1
        if self.num_evaluations == 6:
            raise KeyError("in the line search")
        return super().training_step(batch)


def test_a_line_search_that_broke_leaves_nothing():
    step = make(Breaking())
    train(step, make_batch(0, 1.0))
    before = weight_of(step)
    with pytest.raises(KeyError):
        train(step, make_batch(1, 5.0))
    assert weight_of(step) != before
    step.undo()
    assert weight_of(step) == before


class ByHand(Line):
    def __init__(self):
        super().__init__(lr=1.0)
        self.automatic_optimization = False
        self.step_with: Any = None
        self.breaks = False

    def training_step(self, batch):
        for optimizer in self.step_with:
            optimizer.zero_grad()
            self.step_with.backward((self.weight * batch[0]).mean())
            optimizer.step()
            if self.breaks:
                raise KeyError("after the first step")

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=1.0) for _ in range(2)]


class Stepping(list):
    """The optimizers of a step as training_step has them."""

    def __init__(self, step: Step):
        super().__init__(step.stepping_optimizers)
        self.backward = step.backward_manually


def test_by_hand_steps_that_were_made_are_not_made_again():
    module = ByHand()
    step = make(module)
    module.step_with = Stepping(step)
    train(step, make_batch(0, 1.0))
    assert (weight_of(step), step.worker.progress.global_step) == (-2.0, 2)
    module.breaks = True
    with pytest.raises(KeyError):
        train(step, make_batch(1, 1.0))
    assert step.num_broken == 1
    step.undo()
    progress = step.worker.progress
    assert (progress.global_step, progress.steps_ahead, progress.num_batches_seen) == (3, 1, 1)
    assert not progress.has_stepped
    module.breaks = False
    train(step, make_batch(1, 1.0))
    assert (weight_of(step), progress.global_step, progress.steps_ahead) == (-4.0, 4, 0)
    assert (progress.step_before, progress.has_stepped) == (2, True)


# ---- two ranks


def _train_on_two(place: Place, kind: type[Line], is_uneven: bool) -> Any:
    module = kind()
    step = make(module, place, global_batch_size=None)
    if isinstance(module, ByHand):
        module.step_with = Stepping(step)
    train(step, make_batch(0, 1.0 + 2.0 * place.rank))
    if is_uneven:  # the second rank has no sample: the first one's share is that of both
        batch = make_batch(1, share=0.0) if place.rank else make_batch(1, 4.0, share=2.0)
        train(step, batch._replace(uneven=True, last=True))
    progress = step.worker.progress
    return weight_of(step), progress.global_step, progress.num_batches_seen, len(step.take_losses())


class Fast(Line):
    def __init__(self):
        super().__init__(lr=1.0)


@pytest.mark.parametrize("is_uneven", [False, True])
def test_two_ranks_step_as_one(is_uneven):
    first, second = in_group(_train_on_two, Fast, is_uneven)
    assert first[:3] == second[:3]
    assert first == (pytest.approx(-6.0 if is_uneven else -2.0), 1 + is_uneven, 1 + is_uneven, 1 + is_uneven)
    assert second[3] == 1


@pytest.mark.parametrize("is_uneven", [False, True])
def test_two_ranks_step_by_hand_as_one(is_uneven):
    first, second = in_group(_train_on_two, ByHand, is_uneven)
    assert first[:3] == second[:3]
    assert first[:2] == (pytest.approx(-12.0 if is_uneven else -4.0), 2 + 2 * is_uneven)


def test_two_ranks_evaluate_a_closure_as_one():
    first, second = in_group(_train_on_two, Evaluating, False)
    alone = make(Evaluating())
    train(alone, make_batch(0, 1.0, 3.0))
    assert first[:2] == second[:2] == (pytest.approx(weight_of(alone)), 1)


def _begin_without_a_sample(place: Place) -> str:
    module = ByHand()
    step = make(module, place)
    try:
        train(step, make_batch(0, share=0.0, uneven=True))
    except DataError as error:
        return str(error)
    return ""


def test_by_hand_each_rank_needs_a_sample_in_the_first_step():
    assert all("fewer samples than workers" in said for said in in_group(_begin_without_a_sample))


def _return_none(place: Place) -> str:
    try:
        train(make(Weird(lambda weight: None), place), make_batch(0, 1.0))
    except DataError as error:
        return str(error)
    return ""


def test_with_several_ranks_each_must_return_a_loss():
    assert all("every rank must return a loss" in said for said in in_group(_return_none))
