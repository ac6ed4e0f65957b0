"""Loggers written for Lightning: on raylight's base class, and those of the real package."""

from __future__ import annotations

import csv
import sys
from argparse import Namespace
from pathlib import Path

import cloudpickle
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl
from raylight.loggers import CSVLogger, DummyLogger, TensorBoardLogger
from raylight.loggers.logger import Logger, merge_dicts, rank_zero_experiment

cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Book:
    """The experiment of a logger of one's own."""

    def __init__(self):
        self.title = "mine"
        self.pages: dict[str, list] = {}

    def write(self, page: str, text: object) -> None:
        self.pages.setdefault(page, []).append(text)

    def tear(self) -> None:
        raise OSError("torn")


class BookLogger(Logger):
    """As Lightning's documentation describes one."""

    def __init__(self, prefix: str = "p"):
        super().__init__()
        self.prefix = prefix
        self._experiment: Book | None = None
        self.events: list = []

    @property
    def name(self):
        return "book"

    @property
    def version(self):
        return "0.1"

    @property
    def num_pages(self):
        return 3

    @property
    @rank_zero_experiment
    def experiment(self):
        if self._experiment is None:
            self._experiment = Book()
        return self._experiment

    def log_metrics(self, metrics, step=None):
        self.events.append(("metrics", step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs):
        self.events.append(("hyperparameters", dict(params)))

    def log_graph(self, model, input_array=None):
        self.events.append(("graph", type(model).__name__))

    def log_words(self, words):
        self.events.append(("words", words))

    def after_save_checkpoint(self, checkpoint_callback):
        self.events.append(("saved", Path(checkpoint_callback.last_model_path).name))

    def save(self):
        self.events.append(("save",))

    def finalize(self, status):
        super().finalize(status)
        self.events.append(("finalize", status))


def use_book(module) -> None:
    logger = module.logger
    assert isinstance(logger, BookLogger)
    assert (logger.name, logger.version, logger.prefix, logger.num_pages) == ("book", "0.1", "p", 3)
    assert logger.experiment.title == "mine"
    figure = torch.full((2,), float(module.current_epoch))
    for at in range(3):
        logger.experiment.write(f"rank {module.global_rank}", (at, figure))
        figure += 10  # what was given before stays as it was
    logger.experiment.pages["last"] = module.current_epoch
    logger.log_words(f"epoch {module.current_epoch}")
    if module.global_rank == 0:
        logger.log_metrics({"lr": 0.5}, step=module.global_step)
    with pytest.raises(AttributeError):
        _ = logger.misspelt
    with pytest.raises(AttributeError):
        _ = logger.experiment.wirte
    logger.log_words()  # raises in the logger


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.ray)])
def test_a_logger_of_ones_own_gets_all_that_lightning_gives_it(num_workers, train, request, capsys):
    if num_workers:
        request.getfixturevalue("ray_cluster")
    logger, other = BookLogger(), CSVLogger()
    options = {"log_every_n_steps": 1} if num_workers else {}
    _, trainer = train([logger, other], use_book, num_workers=num_workers, **options)
    num_steps, events = trainer.global_step, logger.events
    assert events[0] == ("graph", "Net")
    assert ("hyperparameters", {"lr": 0.1, "layers": {"sizes": [3, 1]}}) in events
    assert [event for event in events if event[0] == "words"] == [("words", "epoch 0"), ("words", "epoch 1")]
    assert ("saved", f"step-{num_steps:08}") in events
    assert events[-2:] == [("save",), ("finalize", "success")]
    rows = [event[1:] for event in events if event[0] == "metrics"]
    assert [step for step, row in rows if "lr" in row] == [num_steps // 2, num_steps]
    assert next(row for step, row in rows if "train/loss" in row)["epoch"] == 0
    for rank in range(max(1, num_workers)):
        pages = logger.experiment.pages[f"rank {rank}"]
        assert [(at, float(figure[0])) for at, figure in pages] == (
            [(0, 0.0), (1, 10.0), (2, 20.0), (0, 1.0), (1, 11.0), (2, 21.0)] if num_workers
            else [(0, 30.0), (1, 30.0), (2, 30.0), (0, 31.0), (1, 31.0), (2, 31.0)]  # the same object, as in Lightning
        )  # fmt: skip
    if num_workers == 0:
        assert logger.experiment.pages["last"] == 1
    told = capsys.readouterr().out
    assert told.count("warning: BookLogger") == 1
    assert "log_words" in told
    assert trainer.loggers == [logger, other]
    assert "lr" in {row["name"] for row in trainer.result.history().to_pylist()}


def test_in_its_own_process_a_hook_changes_the_logger_itself(train):
    logger = BookLogger()

    def rename(module) -> None:
        module.logger.prefix = "q"
        assert module.logger.experiment is logger.experiment

    train(logger, rename)
    assert logger.prefix == "q"


def test_an_experiment_that_cannot_be_opened_takes_calls_and_does_nothing(train, capsys):
    class Closed(BookLogger):
        @property
        def experiment(self):
            raise ConnectionError("away")

    logger = Closed()
    _, trainer = train(logger, lambda module: module.logger.experiment.write("a", 1))
    assert trainer.global_step == 10
    assert logger.events == []
    assert capsys.readouterr().out.count("Closed could not be opened, and gets nothing of this run") == 1


# ---- of the real package

lightning = pytest.importorskip("pytorch_lightning")


def use_theirs(module) -> None:
    board, table = module.loggers
    assert isinstance(board, lightning.loggers.TensorBoardLogger)
    board.experiment.add_text(f"rank {module.global_rank}", "hello", module.global_step)
    module.print(board.log_dir, table.log_dir)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.ray)])
def test_lightnings_own_loggers_are_taken(num_workers, train, tmp_path, request):
    if num_workers:
        request.getfixturevalue("ray_cluster")
    loggers = [
        lightning.loggers.TensorBoardLogger(str(tmp_path), name="board"),
        lightning.loggers.CSVLogger(str(tmp_path), name="table"),
    ]
    options = {"log_every_n_steps": 1} if num_workers else {}
    _, trainer = train(loggers, use_theirs, num_workers=num_workers, **options)
    events = EventAccumulator(str(tmp_path / "board" / "version_0")).Reload()
    assert events.Scalars("val_loss")[-1].value == pytest.approx(trainer.callback_metrics["val_loss"].item())
    assert sorted(events.Tags()["tensors"]) == [f"rank {rank}/text_summary" for rank in range(max(1, num_workers))]
    for folder in ("board", "table"):
        kept = yaml.safe_load((tmp_path / folder / "version_0" / "hparams.yaml").read_text())
        assert kept == {"lr": 0.1, "layers": {"sizes": [3, 1]}}
    assert "train/loss" in (tmp_path / "table" / "version_0" / "metrics.csv").read_text()


# ---- the files of both

SAME = ("epoch", "train_loss", "val_loss", "both_step", "both_epoch")


def make_fit(base, root: Path) -> None:
    class Net(base.LightningModule):
        def __init__(self, lr=0.1, shape=(3, 1), kind="a", options=None):
            super().__init__()
            self.save_hyperparameters()
            torch.manual_seed(1)
            self.layer = torch.nn.Linear(3, 1)

        def training_step(self, batch, batch_idx):
            loss = (self.layer(batch[0]) - batch[1]).square().mean()
            self.log("train_loss", loss)
            self.log("both", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", (self.layer(batch[0]) - batch[1]).square().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(2))
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)
    loggers = [base.loggers.CSVLogger(root, name="table/of"), base.loggers.TensorBoardLogger(root, name="board")]
    options = {"num_workers": 0, "storage_path": str(root / "runs")} if base is pl else {"default_root_dir": str(root)}
    trainer = base.Trainer(
        max_epochs=2, log_every_n_steps=5, logger=loggers, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(Net(options={"a": [1, None], "b": True}), loader, loader)


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_files_columns_and_values_are_lightnings(tmp_path):
    for base in (lightning, pl):
        make_fit(base, tmp_path / base.__name__)
    theirs, ours = tmp_path / "pytorch_lightning", tmp_path / "raylight"
    for folder in ("table/of/version_0", "board/version_0"):
        names = [
            {path.name.split(".")[0] for path in (root / folder).iterdir() if path.is_file()} for root in (theirs, ours)
        ]
        assert names[0] == names[1]
        assert (theirs / folder / "hparams.yaml").read_text() == (ours / folder / "hparams.yaml").read_text()
    rows = [read_rows(root / "table/of/version_0/metrics.csv") for root in (theirs, ours)]
    assert list(rows[0][0]) == list(rows[1][0]) == sorted(rows[0][0])
    for name in SAME:
        values = [[row[name] for row in each if row[name]] for each in rows]
        assert [float(value) for value in values[0]] == pytest.approx(
            [float(value) for value in values[1]], rel=1e-4
        ) or (name == "epoch")
    assert {row["epoch"] for row in rows[1]} == {row["epoch"] for row in rows[0]} == {"0", "1"}
    # Lightning's step is the number of the step from 0, raylight's the number of steps that were made
    assert {int(row["step"]) + 1 for row in rows[0]} == {int(row["step"]) for row in rows[1]} == {5, 10}
    scalars = [
        EventAccumulator(str(root / "board/version_0"), size_guidance={"scalars": 0}).Reload()
        for root in (theirs, ours)
    ]
    assert set(scalars[0].Tags()["scalars"]) - {"hp_metric"} == set(scalars[1].Tags()["scalars"])


# ---- before, after and without


def test_files_can_be_written_before_and_after_a_run(train, tmp_path):
    table, board = CSVLogger(tmp_path, name="a/b"), TensorBoardLogger(tmp_path, name="board")
    assert Path(table.log_dir) == tmp_path / "a" / "b" / "version_0"
    assert (table.version, table.root_dir, table.save_dir) == (0, str(tmp_path / "a" / "b"), str(tmp_path))
    for logger in (table, board):
        logger.log_hyperparams(Namespace(before=1))
        logger.log_metrics({"early": 1.0}, 0)
    board.experiment.add_text("note", "before")
    assert [row["early"] for row in read_rows(Path(table.log_dir, "metrics.csv"))] == ["1.0"]  # at once
    train([table, board])
    for logger in (table, board):
        logger.log_metrics({"late": 2.0}, 11)
    board.experiment.add_text("note", "after", 1)
    board.save()
    rows = read_rows(Path(table.log_dir, "metrics.csv"))
    assert (rows[0]["early"], rows[-1]["late"]) == ("1.0", "2.0")
    assert sum(bool(row["val_loss"]) for row in rows) == 2
    events = EventAccumulator(board.log_dir).Reload()
    assert {"early", "late", "val_loss"} <= set(events.Tags()["scalars"])
    assert len(events.Tensors("note/text_summary")) == 2
    kept = yaml.safe_load(Path(table.log_dir, "hparams.yaml").read_text())
    assert kept == {"before": 1, "lr": 0.1, "layers": {"sizes": [3, 1]}}


def test_a_graph_is_drawn_on_request(train, tmp_path, make_net):
    net = make_net()
    net.example_input_array = torch.zeros(1, 3)
    board = TensorBoardLogger(tmp_path, log_graph=True)
    train(board, net=net)
    assert EventAccumulator(board.log_dir).Reload().Tags()["graph"]


def test_a_try_out_has_a_logger_that_takes_everything(train, tmp_path):
    seen = []

    def use(module) -> None:
        module.logger.experiment.add_image("a", torch.zeros(3, 2, 2))
        module.logger.log_image("b", [])
        seen.append(module.logger)

    train(CSVLogger(tmp_path / "csv"), use, fast_dev_run=2)
    assert isinstance(seen[0], DummyLogger)
    assert not (tmp_path / "csv").exists()
    assert DummyLogger()[0].experiment["a"].b() is None


def test_without_its_library_a_logger_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for kind, extra in (("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow"), ("CometLogger", "comet"),
                        ("NeptuneLogger", "neptune")):  # fmt: skip
        with pytest.raises(ModuleNotFoundError, match=rf"{kind} needs .*: pip install 'raylight\[{extra}\]'"):
            getattr(pl.loggers, kind)()


@pytest.mark.parametrize("module", ["csv_logs", "tensorboard", "wandb", "mlflow", "comet", "neptune", "logger"])
def test_modules_have_lightnings_names(module):
    ours = __import__(f"raylight.loggers.{module}", fromlist=["_"])
    theirs = __import__(f"pytorch_lightning.loggers.{module}", fromlist=["_"])
    name = next(
        name for name in vars(theirs) if name.endswith("Logger") and vars(theirs)[name].__module__ == theirs.__name__
    )
    assert hasattr(ours, name)


def test_dicts_are_merged_as_lightning_merges_them():
    dicts = [{"a": 1.5, "b": 2.0, "n": {"x": 1, "y": None}}, {"a": 0.5, "n": {"x": 4, "y": 2}}, {"c": 3}]
    functions = {"b": max, "n": {"x": sum}}
    theirs = lightning.loggers.logger.merge_dicts(dicts, functions)
    assert merge_dicts(dicts, functions) == theirs == {"a": 1.0, "b": 2.0, "n": {"x": 5, "y": 2}, "c": 3}
