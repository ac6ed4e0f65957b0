"""One rank's whole work for one task: its messages, the hooks in their order, and what it leaves behind."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

import raylight as pl
from raylight.contract import messages
from raylight.contract.config import Checkpointing
from raylight.contract.messages import EpochMetrics, Failure, Finished, Message, Notice, Saved, Started, StepMetrics
from raylight.contract.rank_zero import rank_zero_only
from raylight.contract.seeding import rng_state
from raylight.contract.task import Begin, Place, Rejoin, Rescue
from raylight.storage.filesystem import Storage
from raylight.worker import evaluation, loop
from raylight.worker.group.control import Control
from raylight.worker.session import Session
from tests.worker.nets import Line, make_loader
from tests.worker.ranks import make_task, run_ranks, run_task


@pytest.fixture(autouse=True)
def _report_after_each_batch(monkeypatch):
    monkeypatch.setattr(loop, "REPORT_EVERY_S", 0.0)
    monkeypatch.setattr(evaluation, "REPORT_EVERY_S", 0.0)


def outline(found: list[Message]) -> list[Any]:
    """The messages without the times in them."""
    lines: list[Any] = []
    for message in found:
        name = type(message).__name__
        if isinstance(message, messages.Progress):
            lines.append((name, message.stage, message.epoch, message.step, message.batch, message.num_samples))
        elif isinstance(message, messages.StageStarted):
            lines.append((name, message.stage, message.epoch, message.step, message.num_batches))
        elif isinstance(message, messages.StageFinished):
            lines.append((name, message.stage, message.epoch, message.step))
        elif isinstance(message, StepMetrics):
            rows = [(row.step, row.epoch, {key: tuple(it) for key, it in row.values.items()}) for row in message.rows]
            lines.append((name, rows))
        elif isinstance(message, EpochMetrics):
            lines.append((name, message.stage, message.epoch, message.step, message.values))
        elif isinstance(message, Saved):
            lines.append((name, message.directory, message.step, message.epoch, message.metrics))
        elif isinstance(message, Finished):
            lines.append((name, message.status, message.step, message.epoch))
        else:
            lines.append(name)
    return lines


def only(found: list[Message], kind: type) -> Any:
    (message,) = [message for message in found if isinstance(message, kind)]
    return message


# ---- a fit


def test_the_messages_of_a_fit():
    module = Line()
    found = run_task(
        make_task(
            module, make_loader(6), loaders={"validate": make_loader(4)}, max_epochs=2, log_every_n_steps=2,
            num_sanity_val_steps=1,
        )
    )  # fmt: skip
    value = {"val_loss": 1.5}
    assert outline(found) == [
        "Started",
        ("StageStarted", "sanity", 0, 0, 1),
        ("Progress", "sanity", 0, 0, 1, 2),
        ("Progress", "sanity", 0, 0, 1, 2),
        ("StageFinished", "sanity", 0, 0),
        ("StageStarted", "train", 0, 0, 3),
        ("Progress", "train", 0, 1, 1, 2),
        ("StepMetrics", [(2, 0, {"loss_step": (2.5, 2.0, "mean")})]),
        ("Progress", "train", 0, 2, 2, 4),
        ("Progress", "train", 0, 3, 3, 6),
        ("Progress", "train", 0, 3, 3, 6),
        ("StageStarted", "validate", 0, 3, 2),
        ("Progress", "validate", 0, 3, 1, 2),
        ("Progress", "validate", 0, 3, 2, 4),
        ("Progress", "validate", 0, 3, 2, 4),
        ("EpochMetrics", "validate", 0, 3, value),
        ("StageFinished", "validate", 0, 3),
        ("Progress", "train", 0, 3, 3, 6),
        ("EpochMetrics", "train", 0, 3, {"loss_step": 4.5, "loss": 2.5, "loss_epoch": 2.5}),
        ("StageFinished", "train", 1, 3),
        ("StageStarted", "train", 1, 3, 3),
        ("StepMetrics", [(4, 1, {"loss_step": (0.5, 2.0, "mean")})]),
        ("Progress", "train", 1, 4, 1, 2),
        ("Progress", "train", 1, 5, 2, 4),
        ("StepMetrics", [(6, 1, {"loss_step": (4.5, 2.0, "mean")})]),
        ("Progress", "train", 1, 6, 3, 6),
        ("Progress", "train", 1, 6, 3, 6),
        ("StageStarted", "validate", 1, 6, 2),
        ("Progress", "validate", 1, 6, 1, 2),
        ("Progress", "validate", 1, 6, 2, 4),
        ("Progress", "validate", 1, 6, 2, 4),
        ("EpochMetrics", "validate", 1, 6, value),
        ("StageFinished", "validate", 1, 6),
        ("Progress", "train", 1, 6, 3, 6),
        ("EpochMetrics", "train", 1, 6, {"loss_step": 4.5, "loss": 2.5, "loss_epoch": 2.5}),
        ("StageFinished", "train", 2, 6),
        ("Finished", "finished", 6, 2),
    ]
    assert module.trained == [0.0, 2.0, 4.0] * 2
    assert module.weight.item() == pytest.approx(-0.1 * 2 * (0.5 + 2.5 + 4.5))
    started, finished = only(found, Started), only(found, Finished)
    assert (started.pid, started.device) == (os.getpid(), "cpu")
    assert set(finished.seconds) == {"data", "validation"}
    assert all(0.0 < seconds < 60.0 for seconds in finished.seconds.values())
    assert (finished.trained, finished.results, finished.outputs) == (None, (), [])
    of_training = [message for message in found if isinstance(message, messages.Progress) and message.stage == "train"]
    assert of_training[0].values == {"loss_step": 0.5}
    assert of_training[-1].values == {"loss_step": 4.5, "loss_epoch": 2.5}
    assert of_training[0].share == {}


def test_the_messages_of_a_run_that_saves_accumulates_and_ends_in_an_epoch(tmp_path):
    module = Line()
    options = Checkpointing(every_n_steps=2, keep_last=-1)
    found = run_task(
        make_task(
            module, make_loader(12), files=Storage(str(tmp_path)), checkpoint=options, max_steps=5,
            accumulate_grad_batches=2, log_every_n_steps=0,
        )
    )  # fmt: skip
    steps = [(message.step, message.epoch, message.directory) for message in found if isinstance(message, Saved)]
    assert steps == [
        (2, 0, "checkpoints/step-00000002"), (4, 1, "checkpoints/step-00000004"), (5, 1, "checkpoints/step-00000005")
    ]  # fmt: skip
    assert not any(isinstance(message, StepMetrics) for message in found)
    assert module.trained == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 0.0, 2.0, 4.0, 6.0]
    assert module.weight.item() == pytest.approx(-0.1 * (1.5 + 5.5 + 9.5 + 1.5 + 5.5))
    epochs = [(it.epoch, it.step, it.values["loss"]) for it in found if isinstance(it, EpochMetrics)]
    assert epochs == [(0, 3, 5.5), (1, 5, 3.5)]
    assert outline(found)[-2:] == [("Saved", "checkpoints/step-00000005", 5, 1, found[-2].metrics),
                                   ("Finished", "finished", 5, 1)]  # fmt: skip
    position = [line[3:5] for line in outline(found) if line[0] == "Progress"]
    assert position[:4] == [(0, 1), (1, 2), (1, 3), (2, 4)]


class Noting(Line):
    """Writes down which hooks are called, and what the trainer says meanwhile."""

    def __init__(self):
        super().__init__()
        self.called: list[tuple[Any, ...]] = []

    def note(self, hook: str, *arguments: Any) -> None:
        trainer = self.trainer
        stage = trainer.state.stage
        counts = (trainer.current_epoch, trainer.global_step, trainer.num_batches_seen)
        self.called.append((hook, *arguments, stage.value if stage is not None else None, counts))


def _add_hook(name: str) -> None:
    def hook(self: Noting, *arguments: Any) -> None:
        self.note(name, *(argument for argument in arguments if isinstance(argument, (int, str))))

    hook.__name__ = name
    setattr(Noting, name, hook)


HOOKS = (
    "prepare_data", "setup", "configure_model", "on_fit_start", "on_sanity_check_start", "on_sanity_check_end",
    "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "on_before_backward",
    "on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_validation_start",
    "on_validation_epoch_start", "on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end",
    "on_validation_end", "on_train_epoch_end", "on_train_end", "on_fit_end", "teardown", "on_test_start",
    "on_test_end", "on_predict_start", "on_predict_end",
)  # fmt: skip
for _name in HOOKS:
    _add_hook(_name)


def test_the_hooks_of_a_fit_and_what_the_trainer_says_in_them():
    module = Noting()
    run_task(make_task(module, make_loader(4), loaders={"validate": make_loader(2)}, max_epochs=1))
    start, first, second = (0, 0, 0), (0, 1, 0), (0, 1, 1)
    third, end, over = (0, 2, 1), (0, 2, 2), (1, 2, 2)
    batch = ["on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"]
    checking = ["on_validation_start", "on_validation_epoch_start"]
    assert module.called == [
        ("prepare_data", "train", start), ("setup", "fit", "train", start), ("configure_model", "train", start),
        ("on_fit_start", "train", start), ("on_sanity_check_start", "sanity_check", start),
        *((name, "sanity_check", start) for name in checking),
        ("on_validation_batch_start", 0, "sanity_check", start), ("on_validation_batch_end", 0, "sanity_check", start),
        ("on_validation_epoch_end", "sanity_check", start), ("on_validation_end", "sanity_check", start),
        ("on_sanity_check_end", "sanity_check", start), ("on_train_start", "train", start),
        ("on_train_epoch_start", "train", start), ("on_train_batch_start", 0, "train", start),
        *((name, "train", start) for name in batch), ("on_train_batch_end", 0, "train", first),
        ("on_train_batch_start", 1, "train", second), *((name, "train", second) for name in batch),
        ("on_train_batch_end", 1, "train", third), *((name, "validate", end) for name in checking),
        ("on_validation_batch_start", 0, "validate", end), ("on_validation_batch_end", 0, "validate", end),
        ("on_validation_epoch_end", "validate", end), ("on_validation_end", "validate", end),
        ("on_train_epoch_end", "train", end), ("on_train_end", "train", over), ("on_fit_end", "train", over),
        ("teardown", "fit", "train", over),
    ]  # fmt: skip


@pytest.mark.parametrize(("stage", "prefix"), [("validate", "validation"), ("test", "test"), ("predict", "predict")])
def test_the_messages_and_hooks_of_an_evaluation(stage, prefix):
    module = Noting()
    task = make_task(module, stage=stage, loaders={stage: make_loader(6)}, task={"trained": (9, 3)})
    found = run_task(task)
    name = {"validate": "val_loss", "test": "test_loss"}.get(stage)
    values = [] if name is None else [("EpochMetrics", stage, 3, 9, {name: 2.5})]
    assert outline(found) == [
        "Started", ("StageStarted", stage, 3, 9, 3),
        *(("Progress", stage, 3, 9, count, 2 * count) for count in (1, 2, 3, 3)),
        *values, ("StageFinished", stage, 3, 9), ("Finished", "finished", 9, 3),
    ]  # fmt: skip
    names = [name for name, *_ in module.called]
    assert names[:3] == ["prepare_data", "setup", "configure_model"]
    assert names[3] == f"on_{prefix}_start"
    assert names[-2:] == [f"on_{prefix}_end", "teardown"]
    finished = only(found, Finished)
    if stage == "predict":
        assert finished.outputs == [[(0, 1.0), (1, 5.0), (2, 9.0)]]
        assert finished.results == ()
    else:
        assert finished.results == (values[0][-1],)
        assert finished.outputs == []
    assert module.training is (stage != "predict")
    assert torch.is_grad_enabled()


class Interrupting(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop = True


def test_a_run_that_a_hook_stops_comes_to_a_whole_end():
    found = run_task(make_task(Line(), make_loader(6), callbacks=[Interrupting()], max_epochs=4))
    assert outline(found)[-1] == ("Finished", "finished", 1, 0)


# ---- what goes before


def test_what_prepares_the_data_is_called_by_the_first_rank_of_each_node():
    for local_rank, expected in ((0, ["prepare_data", "setup", "configure_model"]), (1, ["setup", "configure_model"])):
        module = Noting()
        task = make_task(module, stage="test", loaders={"test": make_loader(2)})
        run_task(task, Place(local_rank=local_rank))
        assert [name for name, *_ in module.called][: len(expected)] == expected


class Data(pl.DataModule):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"size": 4, "shared": "data"})
        self.called: list[str] = []

    def prepare_data(self):
        self.called.append("prepare_data")

    def setup(self, stage):
        self.called.append(f"setup {stage}")

    def teardown(self, stage):
        self.called.append(f"teardown {stage}")

    def train_dataloader(self):
        return make_loader(4)


def test_a_data_module_and_the_hyperparameters_of_both():
    data, module = Data(), Line()
    module.save_hyperparameters({"lr": 0.1, "shared": "module"})
    found = run_task(make_task(module, loaders={"data_module": data}, max_epochs=1))
    assert data.called == ["prepare_data", "setup fit", "teardown fit"]
    assert only(found, messages.Hyperparameters).values == {"size": 4, "lr": 0.1, "shared": "module"}
    assert outline(found)[-1] == ("Finished", "finished", 2, 1)
    others = run_task(make_task(module, stage="test", loaders={"test": make_loader(2)}), Place(rank=1))
    assert not any(isinstance(message, messages.Hyperparameters) for message in others)


class Configuring(Line):
    def __init__(self, callbacks: Any):
        super().__init__()
        self.callbacks = callbacks

    def configure_callbacks(self):
        return self.callbacks


@pytest.mark.parametrize("given", [Interrupting(), [Interrupting()]])
def test_callbacks_of_the_module_take_part(given):
    found = run_task(make_task(Configuring(given), make_loader(6), max_epochs=4))
    assert outline(found)[-1] == ("Finished", "finished", 1, 0)


class Returning(Line):
    def __init__(self, num_optimizers: int, automatic: bool = True):
        super().__init__()
        self.num_optimizers, self.automatic_optimization = num_optimizers, automatic

    def training_step(self, batch):
        return None if not self.automatic_optimization else super().training_step(batch)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(self.num_optimizers)]


@pytest.mark.parametrize(
    ("num_optimizers", "automatic", "said"),
    [
        (0, True, "configure_optimizers returned no optimizer: nothing would be trained"),
        (2, True, "configure_optimizers returned 2 optimizers: set automatic_optimization = False"),
        (1, True, None), (0, False, None), (2, False, None),
    ],
)  # fmt: skip
def test_how_many_optimizers_there_may_be(num_optimizers, automatic, said):
    found = run_task(make_task(Returning(num_optimizers, automatic), make_loader(2), max_epochs=1))
    if said is None:
        assert isinstance(found[-1], Finished)
    else:
        failure = only(found, Failure)
        assert (failure.kind, failure.text.startswith(said)) == ("InvalidArguments", True)


# ---- random numbers and switches


class Drawing(Line):
    def setup(self, stage):
        self.drawn = [torch.rand(1).item()]

    def on_fit_start(self):
        self.drawn.append(torch.rand(1).item())
        self.is_deterministic = (
            torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        )  # fmt: skip
        self.benchmark = torch.backends.cudnn.benchmark
        self.detects = torch.is_anomaly_enabled()


def draw(place: Place | None = None, task: dict[str, Any] | None = None, **config: Any) -> Drawing:
    module = Drawing()
    run_task(make_task(module, make_loader(2), max_epochs=1, task=task, **config), place)
    return module


def seeded(seed: int, count: int) -> list[float]:
    torch.manual_seed(seed)
    return [torch.rand(1).item() for _ in range(count)]


def test_in_the_scripts_own_process_random_numbers_go_on_unless_a_seed_is_given():
    expected = seeded(3, 2)
    torch.manual_seed(3)
    assert draw().drawn == expected
    torch.manual_seed(3)
    assert draw(seed=7).drawn == seeded(7, 2)


def test_in_another_process_they_are_those_of_the_caller():
    expected = seeded(5, 2)
    torch.manual_seed(5)
    state = rng_state()
    torch.manual_seed(1)
    assert draw(task={"rng": state}).drawn == expected
    assert draw(task={"rng": state}, seed=7).drawn == seeded(7, 2)


def test_switches_of_torch_are_set_for_the_run_alone():
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    module = draw(deterministic=True, benchmark=True, detect_anomaly=True)
    assert (module.is_deterministic, module.benchmark, module.detects) == ((True, False), True, True)
    assert draw(deterministic="warn").is_deterministic == (True, True)
    module = draw()
    assert (module.is_deterministic, module.benchmark, module.detects) == ((False, False), before[1], False)
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == before
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        draw(deterministic=True)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


class OfFirst(Line):
    said: str | None = None

    def on_test_start(self):
        self.said = rank_zero_only(lambda: "first")()


def test_what_only_the_first_rank_does_follows_the_rank():
    for rank, expected in ((0, "first"), (1, None)):
        module = OfFirst()
        run_task(make_task(module, stage="test", loaders={"test": make_loader(2)}), Place(rank=rank))
        assert module.said == expected
    assert rank_zero_only(lambda: "after")() == "after"


# ---- failures


class Failing(Line):
    """Raises at a hook, and notes that it was told."""

    def __init__(self, at: str, error: Exception | None = None):
        super().__init__()
        self.at, self.error, self.told = at, error or ValueError("by the user"), []

    def reach(self, point: str) -> None:
        if point == self.at:
            raise self.error

    def setup(self, stage):
        self.reach("setup")

    def training_step(self, batch):
        if self.global_step == 1:
            self.reach("train")
        return super().training_step(batch)

    def validation_step(self, batch):
        self.reach("sanity" if self.trainer.sanity_checking else "validate")

    def test_step(self, batch):
        self.reach("test")

    def on_fit_end(self):
        self.reach("ending")

    def on_exception(self, error):
        self.told.append(error)
        self.reach("on_exception")


@pytest.mark.parametrize(
    ("at", "step", "stage"),
    [("setup", 0, "train"), ("sanity", 0, "sanity"), ("train", 1, "train"), ("validate", 4, "validate"),
     ("ending", 4, "ending")],
)  # fmt: skip
def test_an_exception_ends_the_rank_with_a_message(at, step, stage):
    module, control = Failing(at), Control()
    task = make_task(module, make_loader(8), loaders={"validate": make_loader(2)}, max_epochs=1)
    found = run_task(task, control=control)
    failure = found[-1]
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.text, failure.step) == ("ValueError", "by the user", step)
    assert failure.stage == stage
    assert "in reach" in failure.traceback
    assert failure.evidence is None
    assert control.exception is module.error
    assert not any(isinstance(message, Finished) for message in found)
    assert module.told == [module.error]
    with pytest.raises(RuntimeError):
        _ = module.trainer


def test_what_fails_because_of_a_failure_is_told_beside_it():
    module = Failing("on_exception")
    module.at = "train"

    class Complaining(pl.Callback):
        def on_exception(self, trainer, module, error):
            raise KeyError("of the callback")

    task = make_task(module, make_loader(8), callbacks=[Complaining()], max_epochs=1)
    failure = run_task(task)[-1]
    assert failure.kind == "ValueError"
    assert any("of the callback" in note for note in failure.notes)
    assert module.told == [module.error]


def test_a_rank_of_several_keeps_its_exception_to_itself():
    control = Control()
    module = Failing("test")
    task = make_task(module, stage="test", loaders={"test": make_loader(4)}, task={"mode": Rejoin()})
    run_task(task, Place(rank=1, world_size=1), control)
    assert control.exception is module.error


def test_a_broken_step_is_taken_back():
    module, control = Failing("train"), Control()
    found = run_task(make_task(module, make_loader(8), max_epochs=1, log_every_n_steps=1), control=control)
    session = control.kept
    assert isinstance(session, Session)
    assert (session.global_step, session.num_batches_seen, session.num_undone) == (1, 1, 1)
    assert session.lost == ""
    assert session.worker.has_trained
    assert module.weight.grad is None
    rows = [row.step for message in found if isinstance(message, StepMetrics) for row in message.rows]
    assert rows == [1]
    assert session.worker.stage == "train"


def test_a_survivor_of_one_goes_on_where_it_stood():
    module, control = Failing("train"), Control()
    task = make_task(module, make_loader(8), max_epochs=1)
    run_task(task, control=control)
    kept, module.at = control.kept, ""
    control.resume()
    state = torch.random.get_rng_state()
    found = run_task(replace_mode(task, Rejoin()), Place(generation=1), control)
    assert control.kept is kept
    assert outline(found)[-1] == ("Finished", "finished", 4, 1)
    assert module.trained == [0.0, 2.0, 4.0, 6.0]
    assert module.weight.item() == pytest.approx(-0.1 * (0.5 + 2.5 + 4.5 + 6.5))
    assert torch.equal(torch.random.get_rng_state(), state)
    found = run_task(task, control=control)
    assert control.kept is not kept
    assert outline(found)[-1] == ("Finished", "finished", 4, 1)


def test_a_rescue_saves_the_last_whole_step_and_does_nothing_without_one(tmp_path):
    module, control = Failing("train"), Control()
    options: dict[str, Any] = {"files": Storage(str(tmp_path)), "checkpoint": Checkpointing()}
    task = make_task(module, make_loader(8), max_epochs=1, **options)
    assert outline(run_task(replace_mode(task, Rescue()), control=control)) == ["Started"]
    run_task(task, control=control)
    found = run_task(replace_mode(task, Rescue()), control=control)
    assert [line[:4] for line in outline(found)[1:]] == [("Saved", "checkpoints/step-00000001", 1, 0)]


def train_and_save(path: Any) -> Any:
    """The checkpoint of an epoch that was trained in this process."""
    pl.fit(
        Line(), make_loader(8), num_workers=0, use_gpu=False, max_epochs=1, storage_path=str(path), name="run",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    return pl.open_run(str(path / "run")).last


def test_a_run_goes_on_from_a_checkpoint(tmp_path):
    saved, module = train_and_save(tmp_path), Line()
    found = run_task(make_task(module, make_loader(8), max_epochs=2, task={"checkpoint": saved}))
    assert outline(found)[-1] == ("Finished", "finished", 8, 2)
    assert module.weight.item() == pytest.approx(-0.1 * 2 * (0.5 + 2.5 + 4.5 + 6.5))


def test_of_a_checkpoint_the_weights_alone_may_be_taken(tmp_path):
    saved, module = train_and_save(tmp_path), Line(lr=0.0)
    task = make_task(module, make_loader(8), max_epochs=2, task={"checkpoint": saved, "weights_only": True})
    assert outline(run_task(task))[-1] == ("Finished", "finished", 8, 2)
    assert len(module.trained) == 8  # of both epochs
    assert module.weight.item() == pytest.approx(-0.1 * (0.5 + 2.5 + 4.5 + 6.5))


def test_random_numbers_of_a_rank_that_is_kept_go_on_and_a_run_begins_with_its_seed():
    module, control = Drawing(), Control()
    task = make_task(module, make_loader(2), max_epochs=1, seed=3)
    run_task(task, control=control)
    control.resume()
    torch.manual_seed(11)
    run_task(replace_mode(task, Rejoin()), Place(generation=1), control)
    assert torch.rand(1).item() == pytest.approx(seeded(11, 1)[0])
    run_task(task, control=control)  # another run
    after = torch.rand(1).item()
    torch.manual_seed(11)
    run_task(replace_mode(task, Rejoin()), Place(generation=1))  # in a new process
    assert torch.rand(1).item() != pytest.approx(seeded(11, 1)[0])
    run_task(task, control=control)
    assert torch.rand(1).item() == pytest.approx(after)


def test_hooks_of_callbacks_and_data_module_hear_of_beginning_and_exception():
    heard: list[Any] = []

    class Hearing(pl.Callback):
        def setup(self, trainer, module, stage):
            heard.append(("setup", stage))

        def teardown(self, trainer, module, stage):
            heard.append(("teardown", stage))

    class HearingData(pl.DataModule):
        def train_dataloader(self):
            return make_loader(8)

        def on_exception(self, error):
            heard.append(("data module", error))

    module = Failing("train")
    task = make_task(module, callbacks=[Hearing()], loaders={"data_module": HearingData()}, max_epochs=1)
    run_task(task)
    assert heard == [("setup", "fit"), ("data module", module.error)]
    heard.clear()
    module.at = ""
    run_task(task)
    assert heard == [("setup", "fit"), ("teardown", "fit")]


@pytest.mark.parametrize(("at", "is_kept"), [("train", True), ("validate", False)])
def test_evidence_is_kept_of_what_broke_in_training(at, is_kept, tmp_path):
    task = make_task(
        Failing(at), make_loader(8), loaders={"validate": make_loader(2)}, max_epochs=1, num_sanity_val_steps=0,
        files=Storage(str(tmp_path)), checkpoint=Checkpointing(),
    )  # fmt: skip
    failure = run_task(task)[-1]
    assert (failure.evidence is not None) is is_kept
    assert not is_kept or (tmp_path / failure.evidence).exists()


def test_a_rank_that_breaks_before_it_has_a_state_says_so_as_of_its_setup():
    task = make_task(Line(), make_loader(4), max_epochs=1, precision="nonsense")
    failure = run_task(task)[-1]
    assert (type(failure), failure.step, failure.stage) == (Failure, 0, "setup")


def test_a_state_that_cannot_be_taken_back_is_lost(monkeypatch):
    def fail(session):
        raise RuntimeError("device lost")

    monkeypatch.setattr(Session, "settle", fail)
    control = Control()
    failure = run_task(make_task(Failing("train"), make_loader(8), max_epochs=1), control=control)[-1]
    assert "device lost" in control.kept.lost
    assert control.kept.lost in failure.notes


def test_in_an_evaluation_nothing_is_taken_back(monkeypatch):
    monkeypatch.setattr(Session, "settle", lambda session: pytest.fail("there is no step"))
    failure = run_task(make_task(Failing("test"), stage="test", loaders={"test": make_loader(2)}))[-1]
    assert (failure.kind, failure.stage, failure.notes) == ("ValueError", "test", ())


def test_what_was_trained_elsewhere_is_sent_back():
    module = Line()
    task = make_task(module, make_loader(8), max_epochs=1, task={"returns_module": True})
    trained = run_task(task)[-1].trained
    assert trained.weights["weight"].item() == module.weight.item()
    assert not trained.weights["weight"].requires_grad
    assert (trained.facts["global_step"], trained.facts["current_epoch"]) == (4, 1)
    assert trained.objects


def replace_mode(task: Any, mode: Begin | Rejoin | Rescue) -> Any:
    return replace(task, mode=mode)


# ---- two ranks


def _run_two(place: Place, stage: str, path: str | None, config: dict[str, Any]) -> Any:
    module = Line()
    loaders = {"validate": make_loader(10), "test": make_loader(10), "predict": make_loader(10)}
    options: dict[str, Any] = {"files": Storage(path), "checkpoint": Checkpointing()} if path is not None else {}
    task = make_task(module, make_loader(12), stage=stage, loaders=loaders, **options, **config)
    found = run_task(task, place)
    failure = next((it.text for it in found if isinstance(it, (Failure, messages.PeerLost))), None)
    finished = found[-1]
    if isinstance(finished, Finished):  # a tensor would come through a socket of the process that ends
        outputs = [[(index, value.item()) for index, value in of_loader] for of_loader in finished.outputs]
        finished = replace(finished, outputs=outputs)
    return outline(found), module.weight.item(), module.trained, finished, failure


def test_two_ranks_train_as_one_process_with_a_batch_twice_as_large(tmp_path):
    config = {"max_epochs": 2, "log_every_n_steps": 1}
    first, second = run_ranks(_run_two, "fit", str(tmp_path), config)
    alone = _run_two(Place(), "fit", None, {**config, "limit_train_batches": 0})
    assert alone[4] is None
    for lines, weight, _, finished, failure in (first, second):
        assert failure is None
        assert weight == pytest.approx(-0.1 * 2 * (1.5 + 5.5 + 9.5))
        assert lines[-1] == ("Finished", "finished", 6, 2)
        assert finished.trained is None
    assert (first[2], second[2]) == ([0.0, 4.0, 8.0] * 2, [2.0, 6.0, 10.0] * 2)
    epochs = [line for line in first[0] if line[0] == "EpochMetrics"]
    assert [line[1:4] for line in epochs] == [
        ("validate", 0, 3), ("train", 0, 3), ("validate", 1, 6), ("train", 1, 6)
    ]  # fmt: skip
    assert epochs[0][4] == {"val_loss": pytest.approx(4.5)}
    assert epochs[1][4] == {"loss": pytest.approx(5.5), "loss_epoch": pytest.approx(5.5), "loss_step": 9.5}
    assert not any(line[0] == "EpochMetrics" for line in second[0])
    rows = [[row for line in lines if line[0] == "StepMetrics" for row in line[1]] for lines in (first[0], second[0])]
    assert [row[0] for row in rows[0]] == [row[0] for row in rows[1]] == [1, 2, 3, 4, 5, 6]
    assert rows[0][0][2] == {"loss_step": (0.5, 2.0, "mean")}
    assert rows[1][0][2] == {"loss_step": (2.5, 2.0, "mean")}
    saved = [[line[1] for line in lines if line[0] == "Saved"] for lines in (first[0], second[0])]
    assert saved[0] == saved[1] == ["checkpoints/step-00000003", "checkpoints/step-00000006"]


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_two_ranks_evaluate_as_one(stage):
    first, second = run_ranks(_run_two, stage, None, {})
    alone = run_task(make_task(Line(), stage=stage, loaders={stage: make_loader(10)}))[-1]
    assert first[0][1] == second[0][1] == ("StageStarted", stage, 0, 0, 5)
    if stage == "test":
        assert first[3].results == alone.results == ({"test_loss": pytest.approx(4.5)},)
        assert second[3].results == ()
    else:
        ((of_first,), (of_second,)) = first[3].outputs, second[3].outputs
        assert sorted([*of_first, *of_second]) == alone.outputs[0]
        assert [index for index, _ in of_second] == [1, 3]


class Draws(Line):
    def setup(self, stage):
        self.drawn = [torch.rand(1).item()]

    def on_train_start(self):
        self.drawn.append(torch.rand(1).item())


def _draw(place: Place) -> list[float]:
    module = Draws()
    run_task(make_task(module, make_loader(4), max_epochs=1), place)
    return module.drawn


def test_ranks_draw_alike_in_setup_and_apart_after_it():
    first, second = run_ranks(_draw)
    assert first[0] == second[0] == seeded(7, 1)[0]
    assert first[1] == seeded(7, 2)[1]
    assert second[1] != first[1]


class LostPeer(Failing):
    pass


def _lose(place: Place) -> tuple[list[Any], Any, Any, int]:
    module = LostPeer("train" if place.rank else "")
    control = Control()
    found = run_task(make_task(module, make_loader(8), max_epochs=1), place, control)
    session: Any = control.kept
    return [type(it).__name__ for it in found[-2:]], found[-1], control.exception, session.global_step


def test_a_rank_whose_peer_raised_waits_for_a_new_group():
    (_, lost, noted, step), (_, failure, raised, its_step) = run_ranks(_lose)
    assert (type(lost).__name__, lost.step, step) == ("PeerLost", 1, 1)
    assert (type(failure).__name__, failure.kind, its_step) == ("Failure", "ValueError", 1)
    assert noted is raised is None


def test_a_notice_of_a_hook_comes_before_the_end():
    class Saying(pl.Callback):
        def teardown(self, trainer, module, stage):
            trainer.notice("goodbye")

    found = run_task(make_task(Line(), make_loader(2), callbacks=[Saying()], max_epochs=1))
    assert found[-2] == Notice("goodbye", "info")
