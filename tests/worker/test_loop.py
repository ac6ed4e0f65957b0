"""What the training loop does around the steps."""

from __future__ import annotations

import re
import threading
from datetime import timedelta

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import raylight as pl
from raylight.worker.checkpoint import snapshot as snapshot_module

QUIET = {"num_workers": 0, "use_gpu": False, "enable_progress_bar": False, "enable_model_summary": False}


def make_loader(num_samples: int = 12, batch_size: int = 2, **options) -> DataLoader:
    inputs = torch.arange(float(num_samples)).unsqueeze(1)
    return DataLoader(TensorDataset(inputs), batch_size=batch_size, **options)


AT_ONCE = timedelta(microseconds=1)  # a batch takes longer


class Stream(IterableDataset):
    def __iter__(self):
        return iter([number] for number in torch.arange(12.0).unsqueeze(1))


class Net(pl.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.validated_at: list[int] = []

    def training_step(self, batch):
        return (self.weight * batch[0]).mean()

    def validation_step(self, batch):
        self.log("val_loss", (self.weight * batch[0]).mean())

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.validated_at.append(self.trainer.num_batches_seen)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.001)


def fit(module: pl.Module, path, loader=None, val=None, **arguments):
    loader = make_loader() if loader is None else loader
    return pl.fit(module, loader, val, storage_path=str(path), **{**QUIET, **arguments})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_epochs": 2}, [6, 12]),
        ({"max_epochs": 2, "val_check_interval": 0.5}, [3, 6, 9, 12]),
        ({"max_epochs": 2, "val_check_interval": 4}, [4, 10]),
        ({"max_epochs": 2, "val_check_interval": 4, "check_val_every_n_epoch": None}, [4, 8, 12]),
        ({"max_epochs": 4, "check_val_every_n_epoch": 2}, [12, 24]),
        ({"max_epochs": 1, "limit_val_batches": 0}, []),
    ],
)
def test_when_it_validates(arguments, expected, tmp_path):
    module = Net()
    fit(module, tmp_path, val=make_loader(4), **arguments)
    assert module.validated_at == expected


def test_a_validation_keeps_what_is_accumulated(tmp_path):
    apart, within = Net(), Net()
    for module, arguments in ((apart, {}), (within, {"val_check_interval": 3})):
        options = {"max_epochs": 1, "accumulate_grad_batches": 2, "seed": 1} | arguments
        fit(module, tmp_path, make_loader(), make_loader(4), **options)
    assert (apart.validated_at, within.validated_at) == ([6], [3, 6])
    assert all(torch.equal(one, other) for one, other in zip(apart.parameters(), within.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "least", "most"),
    [
        ({"val_check_interval": AT_ONCE}, {1, 7}, set(range(1, 13))),
        ({"val_check_interval": AT_ONCE, "check_val_every_n_epoch": 2}, {7}, set(range(7, 13))),
        ({"val_check_interval": {"days": 1}}, set(), set()),
        ({"val_check_interval": "01:00:00:00", "check_val_every_n_epoch": None}, set(), set()),
    ],
)
@pytest.mark.parametrize("has_length", [True, False])
def test_when_it_validates_by_the_clock(arguments, least, most, has_length, tmp_path):
    """Lightning 2.6 looks at the clock after each batch, so that it validates at `most`; here it is looked at with each
    message, the first of which comes after an epoch's first batch. No epoch's end makes a validation."""
    module, loader = Net(), make_loader() if has_length else DataLoader(Stream(), batch_size=2)
    fit(module, tmp_path, loader, val=make_loader(4), max_epochs=2, **arguments)
    assert least <= set(module.validated_at) <= most
    assert len(set(module.validated_at)) == len(module.validated_at)


@pytest.mark.parametrize(
    ("arguments", "steps", "epochs"),
    [
        ({"max_epochs": 3}, 18, 3),
        ({"max_steps": 7}, 7, 1),
        ({"max_epochs": 2, "limit_train_batches": 4}, 8, 2),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 6, 2),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, 4, 2),
        ({"fast_dev_run": True}, 1, 1),
        ({"max_epochs": 2, "overfit_batches": 2}, 4, 2),
    ],
)
def test_how_long_it_trains(arguments, steps, epochs, tmp_path):
    result = fit(Net(), tmp_path, **arguments)
    assert (result.num_steps, result.num_epochs) == (steps, epochs)


class Stopping(Net):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.trainer.should_stop = True


def test_should_stop_waits_for_the_minimum(tmp_path):
    assert fit(Stopping(), tmp_path, max_epochs=5).num_steps == 1
    assert fit(Stopping(), tmp_path, max_epochs=5, min_steps=8).num_steps == 8
    assert fit(Stopping(), tmp_path, max_epochs=5, min_epochs=2).num_steps == 12


class Alive(Net):
    def __init__(self):
        super().__init__()
        self.stages: list[str] = []

    def on_train_epoch_start(self):
        self.stages.append(self.trainer._view.worker.control.beat[0])

    on_train_end = on_train_epoch_start


def test_a_rank_that_has_saved_does_not_say_that_it_saves(tmp_path):
    module = Alive()
    fit(module, tmp_path, max_epochs=3, checkpoint=pl.Checkpointing(every_n_epochs=1))
    assert module.stages == ["start", "train", "train", "end"]


class NotFinite(Net):
    def training_step(self, batch):
        factor = float("nan") if 6.0 in batch[0] else 1.0
        return super().training_step(batch) * factor


def test_a_loss_that_is_not_finite_is_named(tmp_path, capsys):
    fit(NotFinite(), tmp_path, max_epochs=1)
    printed = capsys.readouterr().out
    assert "not finite at step 4 (epoch 0, batch 3, rank 0, samples [6, 7])" in printed


def test_detect_anomaly_stops_at_it(tmp_path):
    with pytest.raises(pl.WorkerFailed, match=r"nan|not finite"):
        fit(NotFinite(), tmp_path, max_epochs=1, detect_anomaly=True)


class Clipped(Net):
    seen: float = 0.0

    def on_before_zero_grad(self, optimizer):
        if self.weight.grad is not None:
            self.seen = max(self.seen, float(self.weight.grad.norm()))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped(algorithm, tmp_path):
    module = Clipped()
    fit(module, tmp_path, max_epochs=1, gradient_clip_val=0.5, gradient_clip_algorithm=algorithm)
    assert module.seen == pytest.approx(0.5)


def test_simple_profiler_names_its_sections(tmp_path, capsys):
    fit(Net(), tmp_path, max_epochs=1, profiler="simple")
    printed = capsys.readouterr().out
    for section in ("data", "training_step", "backward", "optimizer_step"):
        assert section in printed


class LBFGS(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=3)

    def training_step(self, batch):
        return (self.weight**2 * batch[0]).mean()


def test_an_optimizer_with_a_closure_evaluates_it(tmp_path):
    module = LBFGS()
    result = fit(module, tmp_path, max_epochs=1)
    assert result.num_steps == 6
    assert module.weight.item() < 1.0


def test_the_last_checkpoint_is_tried_again(tmp_path, monkeypatch):
    failures = [OSError("the storage was away")]
    write_file = snapshot_module._Snapshot.write_file

    def write(snapshot, *arguments):
        if snapshot.step == 6 and failures:
            raise failures.pop()
        return write_file(snapshot, *arguments)

    monkeypatch.setattr(snapshot_module._Snapshot, "write_file", write)
    assert fit(Net(), tmp_path, max_epochs=1).last_checkpoint.step == 6


class Requesting(pl.Callback):
    """Asks for a checkpoint after steps 2 and 3, and lets the first be written after step 4."""

    def __init__(self, opened: threading.Event):
        self.opened = opened

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step in (2, 3):
            trainer.request_checkpoint()
        if trainer.global_step == 4:
            self.opened.set()
            for thread in [thread for thread in threading.enumerate() if thread.name == "snapshot"]:
                thread.join()


def test_a_checkpoint_that_was_asked_for_waits_for_the_one_in_flight(tmp_path, monkeypatch):
    opened = threading.Event()
    write_file = snapshot_module._Snapshot.write_file

    def write(snapshot, *arguments):
        assert opened.wait(30)
        return write_file(snapshot, *arguments)

    monkeypatch.setattr(snapshot_module._Snapshot, "write_file", write)
    checkpoint = pl.Checkpointing(keep_last=-1)
    result = fit(Net(), tmp_path, max_epochs=1, callbacks=[Requesting(opened)], checkpoint=checkpoint)
    assert [checkpoint.step for checkpoint in result.checkpoints] == [2, 4, 6]


class Opening(pl.Callback):
    """Lets what is in flight be written when the next checkpoint asks for what it holds."""

    def __init__(self):
        self.opened: dict[int, threading.Event] = {}

    def on_save_checkpoint(self, trainer, module, checkpoint):
        for event in self.opened.values():
            event.set()
        self.opened[trainer.global_step] = threading.Event()


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"checkpoint": pl.Checkpointing(every_n_steps=1, keep_last=-1)}, [1, 2, 3, 4, 5, 6]),
        ({"checkpoint": pl.Checkpointing(every_n_steps=2, keep_best=-1)}, [2, 4, 6]),
        ({"checkpoint": pl.Checkpointing(keep_best=9), "val_check_interval": 1}, [1, 2, 3, 4, 5, 6]),
        ({"checkpoint": pl.Checkpointing(every_n_steps=1, keep_best=9), "val_check_interval": 2}, [2, 4, 6]),
    ],
)
def test_checkpoints_that_no_other_can_stand_for_are_all_made(arguments, steps, tmp_path, monkeypatch, capsys):
    opening = Opening()
    write_file = snapshot_module._Snapshot.write_file

    def write(snapshot, *others):
        if snapshot.step < 6:
            assert opening.opened[snapshot.step].wait(10)
        return write_file(snapshot, *others)

    monkeypatch.setattr(snapshot_module._Snapshot, "write_file", write)
    callbacks = [*arguments.pop("callbacks", []), opening]
    result = fit(Net(), tmp_path, val=make_loader(4), max_epochs=1, callbacks=callbacks, **arguments)
    assert [checkpoint.step for checkpoint in result.checkpoints] == steps
    is_complete = "val_check_interval" not in arguments or steps == [1, 2, 3, 4, 5, 6]
    assert ("the checkpoint of step 3 is left out" in capsys.readouterr().out) != is_complete


def test_a_checkpoint_says_which_values_it_carries_on(tmp_path):
    checkpoint = pl.Checkpointing(every_n_steps=1, keep_last=-1, monitor="val_loss")
    result = fit(Net(), tmp_path, val=make_loader(4), max_epochs=1, val_check_interval=2, checkpoint=checkpoint)
    carried = {it.step: it.manifest.carried.get("val_loss") for it in result.checkpoints if "val_loss" in it.metrics}
    assert carried == {2: None, 3: 2, 4: None, 5: 4, 6: None}
    options = {"max_epochs": 1, "checkpoint": checkpoint, "resume": result.checkpoints[2].path}
    again = fit(Net(), tmp_path, val=make_loader(4), limit_val_batches=0, **options)
    assert [it.manifest.carried.get("val_loss") for it in again.checkpoints] == [2, 2, 2]


class FailingAtFive(Net):
    def training_step(self, batch):
        self.log("loss", float(self.global_step + 1))
        if self.global_step == 4:
            raise ArithmeticError("in the fifth step")
        return super().training_step(batch)


def test_the_values_of_the_steps_that_a_rescued_checkpoint_holds_are_in_the_history(tmp_path):
    with pytest.raises(pl.RaylightError, match="in the fifth step"):
        fit(FailingAtFive(), tmp_path, max_epochs=1, log_every_n_steps=1)
    run = pl.open_run(tmp_path)
    rows = [(row["step"], row["value"]) for row in run.metrics.to_pylist() if row["name"] == "loss"]
    assert run.last.step == 4
    assert rows == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


class Sized:
    """An iterable of batches, of a length that is known, or not."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter([[torch.ones(2, 1)] for _ in range(self.count)])


class Counted(Sized):
    def __len__(self):
        return self.count


def test_a_validation_beyond_the_epoch_is_an_error(tmp_path):
    for loader in (make_loader(8), Counted(4)):
        with pytest.raises(pl.InvalidArguments, match="val_check_interval=5 is more than the 4 batches of an epoch,"):
            fit(Net(), tmp_path, loader, loader, val_check_interval=5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"val_check_interval": 5}, "val_check_interval=5, and there were fewer batches in each epoch"),
        ({"val_check_interval": 50, "check_val_every_n_epoch": None}, "val_check_interval=50, and there were fewer"),
        ({"check_val_every_n_epoch": 3}, "check_val_every_n_epoch=3, and 2 whole epochs were trained"),
        ({"max_steps": 2}, "check_val_every_n_epoch=1, and 0 whole epochs were trained"),
        ({"val_check_interval": 4}, None),
        ({"val_check_interval": 5, "limit_val_batches": 0}, None),
    ],
)
def test_where_no_validation_ran_the_end_says_so(arguments, said, tmp_path, capsys):
    train = Counted(4) if "max_steps" in arguments else Sized(4)
    fit(Net(), tmp_path, train, Sized(4), **{"max_epochs": 2, **arguments})
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("validation never ran") == (said is not None)
    assert said is None or f"validation never ran: {said}" in printed


@pytest.mark.parametrize("by_callback", [False, True])
def test_a_monitor_that_is_never_logged_is_an_error_with_what_was(by_callback, tmp_path):
    options = {"every_n_epochs": 1, "monitor": "val_los"}
    given = {"checkpoint": pl.Checkpointing(**options)}
    if by_callback:
        given = {"callbacks": [pl.callbacks.ModelCheckpoint(monitor="val_los", every_n_epochs=1)]}
    who = "ModelCheckpoint" if by_callback else "checkpoint"
    text = f"{who} monitors 'val_los', which was never logged; logged were: val_loss; did you mean 'val_loss'?"
    with pytest.raises(pl.InvalidArguments, match=re.escape(text)):
        fit(Net(), tmp_path, Sized(4), Sized(4), max_epochs=2, **given)


def test_without_a_validation_it_is_told_once_and_later_names_are_waited_for(tmp_path, capsys):
    loader = Sized(4)
    fit(Net(), tmp_path, loader, None, checkpoint=pl.Checkpointing(monitor="x", every_n_steps=1), max_epochs=3)
    assert capsys.readouterr().out.count("checkpoint monitors 'x', and nothing was ever logged") == 1
    options = pl.Checkpointing(monitor="val_loss", every_n_steps=1)
    fit(Net(), tmp_path, loader, loader, checkpoint=options, check_val_every_n_epoch=2, max_epochs=2)
    assert "monitors" not in capsys.readouterr().out
