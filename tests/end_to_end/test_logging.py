"""What `log` makes of a value: the same number in every stage, hook and mode, and the one that Lightning gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset

import raylight as pl

BOTH = [0, pytest.param(2, marks=pytest.mark.ray)]
pytestmark = pytest.mark.usefixtures("ray_if_marked")


class Net(pl.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(torch.ones(4)).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def numbers(count: int = 8, batch_size: int = 2) -> DataLoader:
    return DataLoader(torch.arange(float(count)), batch_size=batch_size)


def make_trainer(path: Path, num_workers: int = 0, **arguments) -> pl.Trainer:
    defaults = {"max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False, "use_gpu": False}
    return pl.Trainer(num_workers=num_workers, storage_path=str(path), **{**defaults, **arguments})


def fit(module: pl.Module, path: Path, train=None, val=None, num_workers: int = 0, **arguments):
    trainer = make_trainer(path, num_workers, **arguments)
    trainer.fit(module, train if train is not None else numbers(), val)
    return trainer


# ---- how many samples a value stands for


class Targets(Dataset):
    """0 to 6; their mean over batches of three, each weighted by its samples, is 3.0."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return float(index)


class Graphs:
    def __init__(self, targets):
        self.nodes, self.targets = torch.zeros(sum(int(t) for t in targets) + 1, 2), targets


def as_lists(items):
    return [[torch.zeros(int(t) + 1) for t in items], list(items)]


def as_graphs(items):
    return Graphs(items), list(items)


def as_packed(items):
    return pack_sequence([torch.zeros(int(t) + 1, 1) for t in items], enforce_sorted=False), list(items)


def as_time_major(items):
    return torch.zeros(5 + len(items) % 2, len(items), 1), list(items)


def as_strings(items):
    return ["a sentence"] * len(items), list(items)


class Mean(Net):
    def training_step(self, batch, batch_idx):
        self.log("train", sum(batch[1]) / len(batch[1]), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val", sum(batch[1]) / len(batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test", sum(batch[1]) / len(batch[1]))


KINDS = [as_lists, as_graphs, as_packed, as_time_major, as_strings]


@pytest.mark.parametrize("collate", KINDS)
def test_a_mean_is_over_the_samples_that_the_sampler_gave(collate, tmp_path, capsys):
    loader = DataLoader(Targets(), batch_size=3, collate_fn=collate)
    trainer = fit(Mean(), tmp_path, loader, loader)
    tested = trainer.test(dataloaders=loader, verbose=False)[0]["test"]
    measured = (trainer.result.metrics["train"], trainer.result.metrics["val"], tested)
    assert measured == (3.0, 3.0, 3.0)
    assert "guessed" not in capsys.readouterr().out


def test_two_workers_weight_as_one_does(ray_cluster, tmp_path):
    loader = DataLoader(Targets(), batch_size=3, collate_fn=as_time_major)
    metrics = fit(Mean(), tmp_path, loader, loader, num_workers=2).result.metrics
    assert (metrics["train"], metrics["val"]) == (3.0, 3.0)


class Batches(Dataset):
    """Gives whole batches by index, so that no sampler knows how many samples are in one."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        targets = [float(t) for t in range(7)][3 * index : 3 * index + 3]
        return torch.zeros(5, len(targets)), targets


class Iterates:
    def __iter__(self):
        return iter([Batches()[index] for index in range(3)])


@pytest.mark.parametrize("loader", [DataLoader(Batches(), batch_size=None), Iterates()])
def test_a_guessed_size_is_said_once_by_name_and_batch_size_ends_it(loader, tmp_path, capsys):
    class Told(Mean):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("told", sum(batch[1]) / len(batch[1]), batch_size=len(batch[1]))
            self.log("largest", max(batch[1]), reduce_fx="max")

    metrics = fit(Told(), tmp_path, loader, loader, max_epochs=2).result.metrics
    assert metrics["told"] == 3.0
    assert metrics["val"] == metrics["train"] == pytest.approx(11 / 3)  # three batches of five, as far as one can see
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("was guessed") == 2
    assert printed.count("the mean of 'train';") == printed.count("the mean of 'val';") == 1


# ---- the last step's values


class Steps(Net):
    """Nothing here falls on a boundary of log_every_n_steps."""

    def __init__(self):
        super().__init__()
        self.meter, self.both = torchmetrics.MeanMetric(), torchmetrics.MeanMetric()
        self.seen = []

    def training_step(self, batch, batch_idx):
        value = batch.sum() + self.current_epoch
        self.log("step", value)
        self.log("two", value, on_step=True, on_epoch=True)
        self.meter(value)
        self.log("meter", self.meter)
        self.both(value)
        self.log("both", self.both, on_step=True, on_epoch=True)
        if batch_idx == 1:
            self.log("once", value)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("index", float(batch_idx))

    def on_train_epoch_end(self):
        self.seen.append({name: value.item() for name, value in self.trainer.callback_metrics.items()})


@pytest.mark.parametrize("num_workers", BOTH)
def test_the_values_of_the_last_step_are_known_at_the_end_of_the_epoch(num_workers, tmp_path):
    """As Lightning has them; steps of two samples with one process, and of two workers with one sample each."""
    module = Steps()
    loader = numbers(8, 2 // max(num_workers, 1))
    trainer = fit(module, tmp_path, loader, num_workers=num_workers, max_epochs=2, log_every_n_steps=50)
    # the batches are (0, 1), (2, 3), (4, 5), (6, 7), and two workers take the mean of their halves
    scale = max(num_workers, 1)
    first = {"step": 13 / scale, "two_step": 13 / scale, "two": 7 / scale, "two_epoch": 7 / scale,
             "meter": 13 / scale, "both_step": 13 / scale, "both": 7 / scale, "both_epoch": 7 / scale,
             "once": 5 / scale, "index": 3.0}  # fmt: skip
    second = {name: value + (name != "index") for name, value in first.items()}
    assert module.seen == [first, second]
    assert trainer.result.metrics == second
    assert {name: value.item() for name, value in trainer.callback_metrics.items()} == second
    logged = {name: value.item() for name, value in trainer.logged_metrics.items()}
    assert logged == {name: value for name, value in second.items() if name not in ("two", "both")}


def test_a_value_that_is_written_into_after_it_was_logged_counts_as_it_was(tmp_path):
    class Changes(Net):
        def training_step(self, batch, batch_idx):
            self.count = torch.zeros(()) if batch_idx == 0 else self.count
            self.count += 1
            self.log("count", self.count, on_step=True, on_epoch=True)
            loss = super().training_step(batch, batch_idx)
            part = loss * 0 + 1
            self.log("part", part, on_epoch=True)
            part += 5
            return part

    result = fit(Changes(), tmp_path, log_every_n_steps=1).result
    assert (result.metrics["count"], result.metrics["part"]) == (2.5, 1.0)
    rows = [row["value"] for row in result.history().to_pylist() if row["name"] == "count_step"]
    assert rows == [1.0, 2.0, 3.0, 4.0]


# ---- torchmetrics objects


class Evaluates(Net):
    def validation_step(self, batch, batch_idx): ...


@pytest.mark.parametrize("num_workers", BOTH)
def test_a_metric_may_be_another_object_in_each_epoch_and_become_a_number(num_workers, tmp_path):
    """The validation has one batch, so that of two workers one never logs."""

    class Renews(Evaluates):
        def __init__(self):
            super().__init__()
            self.tracker = torchmetrics.MetricTracker(torchmetrics.MeanMetric(), maximize=True)
            self.kept, self.seen = torchmetrics.SumMetric(), []

        def on_validation_epoch_start(self):
            self.new = torchmetrics.MeanMetric()
            self.tracker.increment()

        def validation_step(self, batch, batch_idx):
            value = batch.mean() + self.current_epoch
            self.new.update(value)
            self.tracker[-1].update(value)
            self.log("new", self.new)
            self.log("tracked", self.tracker[-1])
            self.log("turns", self.new if self.current_epoch % 2 else value)
            self.kept.update(value)
            self.log("kept", self.kept)

        def on_validation_epoch_end(self):
            self.seen.append([self.trainer.callback_metrics[name].item() for name in NAMES])

    NAMES = ("new", "tracked", "turns", "kept")
    module = Renews()
    result = fit(module, tmp_path, numbers(), numbers(2), num_workers, max_epochs=4).result
    assert module.seen == [[0.5] * 4, *([epoch + 0.5] * 4 for epoch in range(4))]  # the first is the sanity check's
    assert {name: result.metrics[name] for name in NAMES} == dict.fromkeys(NAMES, 3.5)


CLASSES = {"num_classes": 3, "task": "multiclass"}
PARTS = {
    "classes": (torchmetrics.ClasswiseWrapper(torchmetrics.Accuracy(average=None, **CLASSES)), "a dict with"),
    "range": (torchmetrics.MinMaxMetric(torchmetrics.Accuracy(**CLASSES)), "a dict with 'raw', 'max', 'min'"),
    "matrix": (torchmetrics.ConfusionMatrix(**CLASSES), r"a Tensor of shape \(3, 3\)"),
    "collection": (torchmetrics.MetricCollection([torchmetrics.Accuracy(**CLASSES)]), "use log_dict"),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("stage", ["training_step", "validation_step"])
def test_a_metric_of_several_numbers_is_named(name, stage, tmp_path):
    metric, text = PARTS[name]
    kind = type(metric).__name__

    class Logs(Evaluates):
        def __init__(self):
            super().__init__()
            self.metric = metric.clone()

        def collect(self):
            self.metric(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]))
            self.log(name, self.metric)

    def step(self, batch, batch_idx):
        self.collect()
        return self.layer(torch.ones(4)).mean()

    setattr(Logs, stage, step)
    with pytest.raises(pl.InvalidArguments, match=rf"log\('{name}'\): {kind} .*{text}"):
        fit(Logs(), tmp_path, numbers(), numbers(), log_every_n_steps=1)


def test_a_collection_is_logged_by_log_dict(tmp_path):
    class Logs(Evaluates):
        def __init__(self):
            super().__init__()
            kinds = [torchmetrics.classification.BinaryPrecision(), torchmetrics.classification.BinaryRecall()]
            self.both, self.seen = torchmetrics.MetricCollection(kinds, prefix="val_"), []

        def validation_step(self, batch, batch_idx):
            self.both.update((batch % 3 == 0).float(), (batch % 2 == 0).int())
            self.log_dict(self.both)

    metrics = fit(Logs(), tmp_path, numbers(), numbers(), max_epochs=2).result.metrics
    assert metrics == {"val_BinaryPrecision": pytest.approx(2 / 3), "val_BinaryRecall": 0.5}


def test_a_number_and_a_metric_under_one_name_in_one_epoch_are_refused(tmp_path):
    class Mixes(Evaluates):
        def __init__(self):
            super().__init__()
            self.meter = torchmetrics.MeanMetric()

        def validation_step(self, batch, batch_idx):
            self.meter.update(1.0)
            self.log("value", self.meter if batch_idx else 1.0)

    with pytest.raises(pl.InvalidArguments, match="log\\('value'\\): a torchmetrics metric and a number"):
        fit(Mixes(), tmp_path, numbers(), numbers())


# ---- which epoch a value belongs to

AROUND_STEPS = ["on_train_start", "on_train_epoch_start", "on_train_epoch_end"]
IN_STEPS = [
    "on_train_batch_start", "training_step", "on_before_zero_grad", "optimizer_zero_grad", "on_before_backward",
    "backward", "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step",
    "on_train_batch_end", "lr_scheduler_step", "transfer_batch_to_device",
]  # fmt: skip
IN_VALIDATION = [
    "on_validation_start", "on_validation_epoch_start", "on_validation_batch_start", "validation_step",
    "on_validation_batch_end", "on_validation_epoch_end", "on_validation_model_eval",
]  # fmt: skip
OF_CALLBACKS = [
    "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_backward", "on_train_batch_end",
    "on_train_epoch_end", "on_validation_start", "on_validation_epoch_start", "on_validation_batch_end",
    "on_validation_epoch_end",
]  # fmt: skip
OUTSIDE = [
    "configure_callbacks", "prepare_data", "setup", "configure_model", "configure_optimizers", "on_fit_start",
    "train_dataloader", "val_dataloader", "on_validation_end", "on_validation_model_train", "on_save_checkpoint",
    "on_train_end", "on_fit_end", "teardown", "predict_step", "on_predict_epoch_start", "on_predict_end",
]  # fmt: skip


class Everywhere(Net):
    """Logs the epoch, as the person counts it, in each hook."""

    def training_step(self, batch, batch_idx):
        self.tell("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.tell("validation_step")

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return [optimizer], [{"scheduler": plateau, "monitor": "on_train_epoch_end"}]

    def tell(self, hook):
        self.log(hook, float(self.current_epoch))


def logs_first(hook, name, on_epoch=True):
    """The hook, which logs the epoch before it does what it does."""

    def wrapped(self, *arguments, **keywords):
        module = self if isinstance(self, pl.Module) else arguments[1]
        if not module.trainer.sanity_checking:
            module.log(name, float(module.current_epoch), on_epoch=on_epoch)
        return hook(self, *arguments, **keywords)

    wrapped.__name__ = hook.__name__
    return wrapped


class Callbacks(pl.Callback):
    pass


for hook in [*AROUND_STEPS, *IN_STEPS, *IN_VALIDATION]:
    if not hook.endswith("ing_step") and hook != "validation_step":
        setattr(Everywhere, hook, logs_first(getattr(pl.Module, hook), hook))
for hook in OF_CALLBACKS:
    setattr(Callbacks, hook, logs_first(getattr(pl.Callback, hook), f"callback_{hook}"))


@pytest.mark.parametrize("num_workers", BOTH)
def test_what_a_hook_logs_belongs_to_its_epoch(num_workers, tmp_path):
    """With a sanity check before the first epoch, and a validation in each second one alone."""
    module = Everywhere()
    result = fit(
        module, tmp_path, numbers(), numbers(), num_workers, max_epochs=4, check_val_every_n_epoch=2,
        callbacks=[Callbacks()], gradient_clip_val=1.0, log_every_n_steps=1,
    ).result  # fmt: skip
    rows = [row for row in result.history().to_pylist() if row["name"] != "epoch"]
    wrong = {(row["name"], row["epoch"], row["value"]) for row in rows if row["epoch"] != row["value"]}
    assert not wrong
    names = [*AROUND_STEPS, *IN_STEPS, *IN_VALIDATION, *(f"callback_{hook}" for hook in OF_CALLBACKS)]
    for name in names:
        expected = {1, 3} if "validation" in name else {0} if "on_train_start" in name else {0, 1, 2, 3}
        found = {row["epoch"] for row in rows if row["name"] in (name, f"{name}_step", f"{name}_epoch")}
        assert found == expected, name


def test_so_does_what_a_hook_of_a_test_logs(tmp_path):
    hooks = ["on_test_start", "on_test_epoch_start", "on_test_batch_start", "on_test_batch_end", "on_test_epoch_end"]

    class Tested(Net):
        def test_step(self, batch, batch_idx):
            self.log("test_step", 1.0)

    for hook in hooks:
        setattr(Tested, hook, logs_first(getattr(pl.Module, hook), hook))
    trainer = make_trainer(tmp_path)
    for _ in range(2):
        (metrics,) = trainer.test(Tested(), numbers(), verbose=False)
        assert metrics == {**dict.fromkeys(hooks, 0.0), "test_step": 1.0}


@pytest.mark.parametrize("hook", OUTSIDE)
def test_a_value_that_would_belong_to_no_epoch_is_refused(hook, tmp_path):
    class Logs(Net):
        def validation_step(self, batch, batch_idx):
            return None

        def train_dataloader(self):
            return numbers()

        def val_dataloader(self):
            return numbers()

        def predict_step(self, batch):
            return batch

    before = getattr(Logs, hook)

    def wrapped(self, *arguments, **keywords):
        self.log("lost", 1.0)
        return before(self, *arguments, **keywords)

    wrapped.__code__ = wrapped.__code__.replace(co_name=hook)
    setattr(Logs, hook, wrapped)
    text = f"({hook} is outside of every epoch|prediction collects outputs)"
    trainer = make_trainer(tmp_path)
    with pytest.raises(pl.InvalidArguments, match=rf"log\('lost'\): {text}"):
        trainer.predict(Logs(), numbers()) if "predict" in hook else trainer.fit(Logs())


def test_what_is_asked_for_per_step_outside_of_training_steps_is_said(tmp_path, capsys):
    class Asks(Net):
        def validation_step(self, batch, batch_idx):
            self.log("value", batch.mean(), on_step=True, on_epoch=True)

    metrics = fit(Asks(), tmp_path, numbers(), numbers(), max_epochs=2).result.metrics
    assert metrics == {"value": 3.5, "value_epoch": 3.5}
    assert capsys.readouterr().out.count("log('value', on_step=True)") == 1
