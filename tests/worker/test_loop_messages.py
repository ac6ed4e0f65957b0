"""One rank's loop, by what it says and does when it is asked."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from raylight.contract.config import Checkpointing
from raylight.contract.messages import (
    EpochMetrics,
    Finished,
    Message,
    Notice,
    Paused,
    PeerLost,
    Progress,
    Saved,
    StageFinished,
    StageStarted,
)
from raylight.contract.requests import Request
from raylight.contract.task import Place, Rejoin
from raylight.storage.filesystem import Storage
from raylight.user.profilers import SimpleProfiler
from raylight.worker import loop
from raylight.worker.group.control import Control
from tests.worker import nets
from tests.worker.ranks import make_task, run_ranks, run_task

# ---- what the driver may ask for, and what it sees of the rank


class Asked(nets.Line):
    """Is asked for something in a batch of the first epoch, as by a driver."""

    def __init__(self, request: Request | None = None, batch_idx: int = 0):
        super().__init__()
        self.request, self.at, self.control, self.validated_at = request, batch_idx, Control(), []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.request is not None and (self.current_epoch, batch_idx) == (0, self.at):
            self.control.request(self.request)

    def on_validation_end(self):
        if not self.trainer.sanity_checking:
            self.validated_at.append(self.global_step)


def run(module: Asked, control: Control | None = None, **arguments) -> list[Message]:
    module.control = control or module.control
    arguments = {"max_epochs": 1, "loaders": {"validate": nets.make_loader(2)}, **arguments}
    return run_task(make_task(module, nets.make_loader(8), **arguments), control=module.control)


def test_a_checkpoint_that_is_asked_for_is_made_after_that_step(tmp_path):
    options = {"files": Storage(str(tmp_path)), "checkpoint": Checkpointing()}
    assert [it.step for it in run(Asked(Request.SAVE), **options) if isinstance(it, Saved)] == [1, 4]
    assert [it.step for it in run(Asked(), **options) if isinstance(it, Saved)] == [4]


@pytest.mark.parametrize(("request_", "status"), [(Request.STOP, "stopped"), (Request.INTERRUPT, "interrupted")])
def test_a_run_that_is_asked_to_end_does_so_after_its_step(request_, status):
    module = Asked(request_)
    finished = run(module)[-1]
    assert (type(finished), finished.status, finished.step) == (Finished, status, 1)
    assert module.trained == [0.0]


def test_a_stop_waits_for_the_minimum_and_an_interrupt_does_not():
    assert run(Asked(Request.STOP), min_steps=3)[-1].step == 3
    assert run(Asked(Request.INTERRUPT), min_steps=3)[-1].step == 1


def test_what_is_accumulated_is_trained_before_the_end():
    module = Asked(Request.STOP)
    assert run(module, accumulate_grad_batches=2)[-1].step == 1
    assert module.trained == [0.0, 2.0]


def test_a_validation_that_is_asked_for_comes_after_that_step():
    module = Asked(Request.VALIDATE)
    run(module, val_check_interval=timedelta(days=1))
    assert module.validated_at == [1]


def test_a_pause_comes_once_what_was_begun_is_on_storage(tmp_path):
    options = {"files": Storage(str(tmp_path)), "checkpoint": Checkpointing(every_n_steps=1)}
    found = [it for it in run(Asked(Request.PAUSE_IN_PROCESS, 1), **options) if isinstance(it, (Paused, Saved))]
    assert [(type(it), it.step) for it in found[:3]] == [(Saved, 1), (Paused, 2), (Saved, 2)]
    assert sum(isinstance(it, Paused) for it in found) == 1


def test_a_group_that_is_made_anew_breaks_off_at_a_whole_step():
    module = Asked(Request.RESIZE)
    lost = run(module, accumulate_grad_batches=2)[-1]
    assert isinstance(lost, PeerLost)
    assert (lost.step, module.control.kept.global_step, module.control.kept.num_batches_seen) == (1, 1, 2)


class Recorded(Control):
    """Keeps all signs of life, each run of equal ones once."""

    def __init__(self) -> None:
        self.signs: list[tuple[str, int]] = []
        super().__init__()

    def show_life(self, stage: str, step: int) -> None:
        super().show_life(stage, step)
        if self.signs[-1:] != [(stage, step)]:
            self.signs.append((stage, step))


def test_signs_of_life_name_where_the_loop_stands(tmp_path):
    control = Recorded()
    options = {"files": Storage(str(tmp_path)), "checkpoint": Checkpointing(every_n_steps=2)}
    run(Asked(), control, num_sanity_val_steps=0, **options)
    assert control.signs == [
        ("first training batch", 0), ("train", 1), ("save", 2), ("train", 2), ("train", 3),
        ("first batch of validate", 4), ("save", 4), ("train", 4), ("save", 4), ("end", 4),
    ]  # fmt: skip


class Numbers(IterableDataset):
    def __iter__(self):
        return iter([number] for number in torch.arange(8.0).unsqueeze(1))


def test_a_stream_that_is_read_again_shows_life_and_says_how_far():
    class Breaking(Asked):
        def training_step(self, batch):
            if self.global_step == 2 and self.request is not None:
                raise KeyError("broken")
            return super().training_step(batch)

    module, control = Breaking(Request.SAVE), Recorded()
    task = make_task(module, DataLoader(Numbers(), batch_size=2), max_epochs=1)
    run_task(task, control=control)
    module.request, control.signs = None, []
    control.resume()
    found = run_task(replace(task, mode=Rejoin()), Place(generation=1), control)
    assert [it.text for it in found if isinstance(it, Notice) and "again" in it.text] == [
        "read 4 items of the stream again to go on where the run had stopped"
    ]
    assert control.signs[:2] == [("train", 2), ("first training batch", 2)]
    assert module.trained == [0.0, 2.0, 4.0, 6.0]


class BreakingOnce(Asked):
    """Breaks in the first epoch, at its third batch or in its validation."""

    def __init__(self, point: str):
        super().__init__()
        self.point = point

    def reach(self, point: str) -> None:
        if point == self.point and not self.trainer.sanity_checking:
            self.point = ""
            raise KeyError("broken")

    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            self.reach("train")
        return super().training_step(batch)

    def validation_step(self, batch):
        self.reach("validate")
        super().validation_step(batch)


@pytest.mark.parametrize("point", ["train", "validate"])
@pytest.mark.parametrize("interval", [1.0, 4])
def test_a_rank_that_goes_on_validates_once_where_it_was_due(point, interval):
    module, control = BreakingOnce(point), Control()
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, "val_check_interval": interval}
    loaders = {"validate": nets.make_loader(2)}
    task = make_task(module, nets.make_loader(8), loaders=loaders, **options)
    run_task(task, control=control)
    control.resume()
    found = run_task(replace(task, mode=Rejoin()), Place(generation=1), control)
    assert [it.stage for it in found if isinstance(it, StageStarted)] == ["train", "validate"] * 2
    assert module.validated_at == [4, 8]
    assert module.trained == [0.0, 2.0, 4.0, 6.0] * 2


def test_a_scheduler_on_a_plateau_may_follow_single_steps():
    class OnPlateau(Asked):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            given = {"scheduler": scheduler, "interval": "step", "monitor": "loss"}
            return {"optimizer": optimizer, "lr_scheduler": given}

    module = OnPlateau()
    run(module, limit_val_batches=0)  # the loss that it logs rises in each of the four steps
    (optimizer,) = module.control.kept.optimizers
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)


# ---- reports and stages


def test_reports_come_when_their_time_has(monkeypatch):
    monkeypatch.setattr(loop, "REPORT_EVERY_S", 3600.0)
    found = [it for it in run(Asked(), limit_val_batches=0) if isinstance(it, Progress)]
    assert [(it.batch, it.num_samples) for it in found] == [(1, 2), (4, 8)]  # at the first batch, and at the end


def test_an_epoch_may_be_left_out():
    class Skipping(Asked):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 0 and batch_idx == 1 else None

    module = Skipping()
    found = run(module, max_epochs=2, limit_val_batches=0)
    assert module.trained == [0.0, 0.0, 2.0, 4.0, 6.0]
    assert [(it.epoch, it.step) for it in found if isinstance(it, StageStarted)] == [(0, 0), (1, 1)]
    assert [(it.epoch, it.step) for it in found if isinstance(it, StageFinished)] == [(1, 1), (2, 5)]


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [({"num_sanity_val_steps": 0}, 0), ({"limit_val_batches": 0}, 0), ({"num_sanity_val_steps": 1}, 1),
     ({"num_sanity_val_steps": -1}, 4)],
)  # fmt: skip
def test_a_sanity_check_is_as_long_as_asked_for(arguments, stages):
    class Hooked(Asked):
        def on_sanity_check_start(self):
            self.checks = [self.trainer.sanity_checking]

        def on_sanity_check_end(self):
            self.checks.append(self.trainer.sanity_checking)

    module = Hooked()
    found = run(module, loaders={"validate": nets.make_loader(8)}, **arguments)
    counts = [it.batch for it in found if isinstance(it, Progress) and it.stage == "sanity"]
    assert max(counts, default=0) == stages
    assert getattr(module, "checks", None) == ([True, True] if stages else None)
    first = next(it for it in found if isinstance(it, EpochMetrics))
    assert first.stage == ("train" if "limit_val_batches" in arguments else "validate")


def test_what_is_logged_before_the_first_epoch_is_of_that_epoch():
    class Early(Asked):
        def on_train_start(self):
            self.log("early", 3.0)

    found = run(Early(), max_epochs=2, limit_val_batches=0, num_sanity_val_steps=0)
    logged = [it.epoch for it in found if isinstance(it, EpochMetrics) and it.values.get("early") == 3.0]
    assert logged == [0]


class Collecting(Asked):
    """Notes what the end of its epoch is given."""

    collected: list = []

    def training_epoch_end(self, outputs):
        self.collected = [output["loss"].item() for output in outputs]
        assert not any(output["loss"].requires_grad for output in outputs)


def test_an_epoch_end_gets_the_outputs_of_its_own_epoch():
    module = Collecting()
    module.lr = 0.0
    with torch.no_grad():
        module.weight.fill_(1.0)
    run(module, max_epochs=2)
    assert module.collected == [0.5, 2.5, 4.5, 6.5]


def test_an_epoch_end_that_wants_no_outputs_is_called_bare():
    class Bare(Asked):
        ended = 0

        def training_epoch_end(self):
            self.ended += 1

    module = Bare()
    run(module, max_epochs=2)
    assert module.ended == 2


@pytest.mark.parametrize("given", ["dict", "tensor", "none"])
def test_hooks_see_what_a_step_returned_free_of_its_graph(given):
    class Returning(Asked):
        def training_step(self, batch):
            loss = super().training_step(batch)
            return {"dict": {"loss": loss, "extra": "mine"}, "tensor": loss, "none": None}[given]

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.seen = outputs

    module = Returning()
    run(module)
    if given == "none":
        assert module.seen == {}
    else:
        assert not module.seen["loss"].requires_grad
        assert module.seen.get("extra") == ("mine" if given == "dict" else None)


def test_a_loss_that_is_not_finite_is_said_once_and_named_by_its_first_step(monkeypatch):
    class Diverging(Asked):
        def training_step(self, batch):
            return super().training_step(batch) * (float("inf") if self.global_step >= 1 else 1.0)

    monkeypatch.setattr(loop, "REPORT_EVERY_S", 3600.0)
    (said,) = [it for it in run(Diverging(), max_epochs=2) if isinstance(it, Notice) and "finite" in it.text]
    assert "step 2 (epoch 0, batch 1, rank 0, samples [2, 3])" in said.text
    assert said.level == "warning"


def test_what_a_scheduler_step_logs_is_of_the_epoch_that_ended():
    class Scheduled(Asked):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step()
            self.log("lr", scheduler.get_last_lr()[0])

    found = run(Scheduled(), max_epochs=2, limit_val_batches=0)
    logged = [(it.epoch, it.values["lr"]) for it in found if isinstance(it, EpochMetrics) and "lr" in it.values]
    assert logged == [(0, pytest.approx(0.05)), (1, pytest.approx(0.025))]


def test_a_profile_is_told_at_the_end():
    found = run(Asked(), profiler=SimpleProfiler(), limit_val_batches=0)
    assert "training_step" in found[-2].text
    assert isinstance(found[-1], Finished)


def tell_shares(place: Place) -> list[tuple[int, list[tuple[float, float]] | None]]:
    """The batch, and what the rank has logged of the loss so far, at each report."""
    loop.REPORT_EVERY_S = 0.0
    task = make_task(nets.Line(), nets.make_loader(16), max_epochs=1, accumulate_grad_batches=2, limit_val_batches=0)
    told = [it for it in run_task(task, place) if isinstance(it, Progress)]
    return [(it.batch, it.share["loss"][1] if it.share else None) for it in told]


def test_a_rank_of_several_tells_what_it_has_logged_in_whole_steps():
    of_first, of_second = run_ranks(tell_shares)
    assert of_first == [(1, None), (2, [(10.0, 4.0)]), (3, None), (4, [(52.0, 8.0)]), (4, [(52.0, 8.0)])]
    assert of_second[-1] == (4, [(68.0, 8.0)])
