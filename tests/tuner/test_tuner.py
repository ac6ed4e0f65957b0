"""Tuner and its callbacks, against Lightning's on the same module and seed."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import raylight
from raylight.callbacks import BatchSizeFinder, LearningRateFinder
from raylight.contract.errors import InvalidArguments
from raylight.tuner import Tuner
from raylight.tuner.learning_rates import LRFinder

QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def make_samples(count: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 8, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True) + 0.1 * torch.randn(count, 1, generator=generator))


def make_net(library: ModuleType) -> type:
    class Net(library.LightningModule):
        limit = 10**9
        bad_rank = 0

        def __init__(self, lr: float = 0.1, batch_size: int = 4, optimizer: str = "SGD", dropout: float = 0.0) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.lr, self.batch_size = lr, batch_size
            self.layers = nn.Sequential(
                nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1)
            )
            self.num_calls = 0

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.num_calls += 1
            x, y = batch
            if len(x) > self.limit and self.global_rank == self.bad_rank:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (simulated)")
            loss = (self.layers(x) - y).pow(2).mean()
            self.log("loss", loss)
            return loss

        def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if len(batch[0]) > self.limit:
                raise RuntimeError("CUDA out of memory (simulated)")
            return self.layers(batch[0])

        def configure_optimizers(self) -> Any:
            optimizer = getattr(torch.optim, self.hparams.optimizer)(self.parameters(), lr=self.lr)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

        def train_dataloader(self) -> DataLoader:
            return DataLoader(make_samples(), batch_size=self.batch_size, drop_last=False)

        predict_dataloader = train_dataloader

    return Net


Net, LightningNet = make_net(raylight), make_net(pytorch_lightning)


def make(kind: type = Net, **arguments: Any) -> Any:
    torch.manual_seed(3)
    return kind(**arguments)


def make_trainer(folder: Path, library: ModuleType = raylight, **arguments: Any) -> Any:
    where = {"num_workers": 0} if library is raylight else {"devices": 1}
    given = {"accelerator": "cpu", "default_root_dir": str(folder), "max_epochs": 2, **QUIET, **where, **arguments}
    if "devices" in arguments:
        given.pop("num_workers", None)
    return library.Trainer(**given)


def state_of(module: nn.Module) -> dict[str, Any]:
    tensors = {name: value.clone() for name, value in module.state_dict().items()}
    plain = {name: copy.deepcopy(value) for name, value in vars(module).items() if not name.startswith("_")}
    return {"tensors": tensors, "plain": plain, "rng": torch.get_rng_state(), "hparams": dict(module.hparams)}


def assert_same(before: dict[str, Any], after: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    for name, value in before["tensors"].items():
        assert torch.equal(value, after["tensors"][name]), name
    assert torch.equal(before["rng"], after["rng"])
    for part in ("plain", "hparams"):
        ours, theirs = ({k: v for k, v in side[part].items() if k not in but} for side in (before, after))
        assert ours == theirs


@pytest.mark.parametrize(
    ("module_arguments", "arguments", "trainer_arguments"),
    [
        pytest.param({}, {}, {}, id="SGD"),
        pytest.param({"optimizer": "Adam"}, {"max_lr": 10.0, "num_training": 40}, {}, id="Adam"),
        pytest.param({}, {"mode": "linear", "num_training": 40, "early_stop_threshold": None}, {}, id="linear"),
        pytest.param({}, {"num_training": 30}, {"gradient_clip_val": 0.5}, id="clipped"),
    ],
)
def test_the_curve_and_the_suggestion_are_lightnings(
    module_arguments: dict[str, Any], arguments: dict[str, Any], trainer_arguments: dict[str, Any], tmp_path: Path
) -> None:
    found = []
    for library, kind in ((raylight, Net), (pytorch_lightning, LightningNet)):
        module = make(kind, **module_arguments)
        trainer = make_trainer(tmp_path / library.__name__, library, max_epochs=None, **trainer_arguments)
        tuner = Tuner(trainer) if library is raylight else pytorch_lightning.tuner.Tuner(trainer)
        torch.manual_seed(11)
        finder = tuner.lr_find(module, **arguments)
        found.append((finder.results["lr"], finder.results["loss"], finder.suggestion(), module.lr, module.hparams.lr))
    ours, theirs = found
    assert ours[0] == theirs[0]
    assert ours[1] == pytest.approx(theirs[1], rel=1e-5, nan_ok=True)
    assert ours[2] == theirs[2] == ours[3] == theirs[3] == ours[4] == theirs[4]
    assert ours[2] is not None


def test_lr_find_changes_the_attribute_and_nothing_else(tmp_path: Path) -> None:
    module, trainer = make(dropout=0.3), make_trainer(tmp_path)
    before, callbacks = state_of(module), trainer.callbacks
    finder = Tuner(trainer).lr_find(module, num_training=30)
    assert_same(before, state_of(module), but=("lr",))
    assert module.lr == module.hparams.lr == finder.suggestion()
    assert "configure_optimizers" not in vars(module)
    assert (trainer.callbacks, trainer.global_step, trainer.result) == (callbacks, 0, None)
    assert not list(tmp_path.iterdir())  # nothing on storage
    before = state_of(module)
    Tuner(trainer).lr_find(module, num_training=12, update_attr=False)
    assert_same(before, state_of(module))
    trainer.fit(module)
    assert trainer.global_step == 32


def test_training_after_lr_find_is_training_without_it(tmp_path: Path) -> None:
    results = []
    for tunes in (True, False):
        module, trainer = make(dropout=0.3), make_trainer(tmp_path / str(tunes))
        if tunes:
            Tuner(trainer).lr_find(module, num_training=20, update_attr=False)
        trainer.fit(module)
        results.append(module.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_the_loss_diverges_and_the_test_ends_early(tmp_path: Path) -> None:
    finder = Tuner(make_trainer(tmp_path)).lr_find(make(), max_lr=1e6, early_stop_threshold=2.0)
    whole = Tuner(make_trainer(tmp_path)).lr_find(make(), max_lr=1e6, early_stop_threshold=None)
    assert 10 < len(finder.results["loss"]) < 100 == len(whole.results["loss"])
    assert finder.results["loss"] == whole.results["loss"][: len(finder.results["loss"])]


def test_suggestion_and_plot(tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    finder = LRFinder("exponential", 1e-3, 1.0, 20)
    finder.results = {"lr": [0.001 * 1.5**i for i in range(20)], "loss": [float(i) for i in range(20, 0, -1)]}
    assert finder.suggestion() == finder.results["lr"][10]
    assert finder.suggestion(skip_begin=0, skip_end=1) == finder.results["lr"][0]
    assert finder.suggestion(skip_begin=18) is None
    figure = finder.plot(suggest=True)
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert [len(line.get_xdata()) for line in axes.lines] == [20, 1]
    assert finder.plot(ax=axes) is figure


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda tuner: tuner.lr_find(make(), method="validate"), "must be 'fit'"),
        (lambda tuner: tuner.lr_find(make(), mode="cubic", min_lr=2), "mode='cubic'.*\n.*min_lr=2"),
        (lambda tuner: tuner.lr_find(make(), attr_name="rate"), "has no rate"),
        (lambda tuner: tuner.lr_find(make(), dataloaders=[]), "takes train_dataloaders"),
        (lambda tuner: tuner.scale_batch_size(make(), method="tune"), "method='tune'"),
        (lambda tuner: tuner.scale_batch_size(make(), method="test", train_dataloaders=[]), "takes dataloaders"),
        (lambda tuner: tuner.scale_batch_size(make(), train_dataloaders=[1]), "was passed to fit"),
        (lambda tuner: tuner.scale_batch_size(make(), batch_arg_name="size"), "has size"),
        (lambda tuner: tuner.scale_batch_size(make(), init_val=0, margin=1.5), "init_val=0.*\n.*margin=1.5"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_tried(call: Any, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArguments, match=complaint):
        call(Tuner(make_trainer(tmp_path)))


def test_with_several_optimizers_and_with_the_callback_there_already(tmp_path: Path) -> None:
    class Two(Net):  # type: ignore[misc, valid-type]
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]

    with pytest.raises(InvalidArguments, match="one optimizer"):
        Tuner(make_trainer(tmp_path)).lr_find(make(Two))
    trainer = make_trainer(tmp_path, callbacks=[LearningRateFinder(), BatchSizeFinder()])
    with pytest.raises(InvalidArguments, match="has a LearningRateFinder"):
        Tuner(trainer).lr_find(make())
    with pytest.raises(InvalidArguments, match="has a BatchSizeFinder"):
        Tuner(trainer).scale_batch_size(make())
    with pytest.warns(UserWarning, match="does nothing with fast_dev_run"):
        assert Tuner(make_trainer(tmp_path, fast_dev_run=True)).lr_find(make()) is None


def test_learning_rate_finder_trains_on_with_what_it_found(tmp_path: Path) -> None:
    class Fixed(Net):  # type: ignore[misc, valid-type]
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.123)  # as if the attribute were not read

    finder = LearningRateFinder(num_training_steps=30)
    trainer = make_trainer(tmp_path, callbacks=[finder])
    module = make(Fixed)
    trainer.fit(module)
    assert trainer.global_step == 32
    assert finder.optimal_lr is not None
    assert trainer.optimizers[0].param_groups[0]["lr"] == finder.optimal_lr.suggestion() == module.lr


def test_finders_of_ones_own_search_at_their_epochs(tmp_path: Path) -> None:
    class Later(LearningRateFinder):
        rates: list[float]

        def on_fit_start(self, *args: Any, **kwargs: Any) -> None:
            self.rates = []

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                before = state_of(pl_module)
                self.lr_find(trainer, pl_module)
                assert_same(before, state_of(pl_module), but=("lr",))
                assert trainer.lightning_module is pl_module
                assert pl_module.trainer is trainer
                self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    class LaterSize(BatchSizeFinder):
        def on_fit_start(self, *args: Any, **kwargs: Any) -> None: ...

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                self.scale_batch_size(trainer, pl_module)

    finder, sizes = Later(num_training_steps=20), LaterSize(max_val=16)
    trainer = make_trainer(tmp_path, callbacks=[finder, sizes], reload_dataloaders_every_n_epochs=1)
    module = make()
    trainer.fit(module)
    assert finder.rates == [module.lr]
    assert (sizes.optimal_batch_size, module.batch_size) == (16, 16)
    assert trainer.global_step >= 16 + 4


@pytest.mark.parametrize(
    ("mode", "limit", "init_val"),
    [("power", 13, 2), ("power", 10**9, 32), ("binsearch", 13, 8)],
)
def test_the_batch_size_is_lightnings(mode: str, limit: int, init_val: int, tmp_path: Path) -> None:
    sizes = []
    for library, kind in ((raylight, Net), (pytorch_lightning, LightningNet)):
        module = make(kind)
        module.limit = limit
        trainer = make_trainer(tmp_path / library.__name__, library)
        tuner = Tuner(trainer) if library is raylight else pytorch_lightning.tuner.Tuner(trainer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            size = tuner.scale_batch_size(module, mode=mode, init_val=init_val)
        sizes.append((size, module.batch_size))
    assert sizes[0] == sizes[1]
    assert sizes[0][0] <= limit


@pytest.mark.parametrize(("mode", "expected"), [("power", 4), ("binsearch", 5)])
def test_a_first_size_that_does_not_fit_is_not_taken(mode: Any, expected: int, tmp_path: Path) -> None:
    module = make()
    module.limit = 5
    assert Tuner(make_trainer(tmp_path)).scale_batch_size(module, mode=mode, init_val=16, margin=0.0) == expected


def test_scale_batch_size_changes_the_attribute_and_nothing_else(tmp_path: Path) -> None:
    module, trainer = make(dropout=0.2), make_trainer(tmp_path)
    module.limit = 9
    before = state_of(module)
    assert Tuner(trainer).scale_batch_size(module, mode="binsearch", margin=0.0) == 9
    assert_same(before, state_of(module), but=("batch_size",))
    assert module.batch_size == module.hparams.batch_size == 9
    assert not list(tmp_path.iterdir())


def test_the_data_modules_batch_size_and_another_method(tmp_path: Path) -> None:
    class Data(raylight.DataModule):
        def __init__(self, size: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters()

        def setup(self, stage: str) -> None:
            self.samples = make_samples()

        def predict_dataloader(self) -> DataLoader:
            return DataLoader(self.samples, batch_size=self.hparams.size)

    module, data = make(), Data()
    module.limit = 20
    tuner = Tuner(make_trainer(tmp_path))
    size = tuner.scale_batch_size(module, datamodule=data, method="predict", batch_arg_name="size")
    assert size == data.hparams.size == 16
    assert not hasattr(data, "samples")


def test_another_error_is_no_lack_of_memory(tmp_path: Path) -> None:
    class Broken(Net):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("shapes differ")

    module = make(Broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        Tuner(make_trainer(tmp_path)).scale_batch_size(module)
    assert module.batch_size == 4


def test_not_even_one_sample_fits(tmp_path: Path) -> None:
    module = make()
    module.limit = 0
    with pytest.raises(InvalidArguments, match="even a batch of one sample"):
        Tuner(make_trainer(tmp_path)).scale_batch_size(module)


def test_batch_size_finder_before_a_run(tmp_path: Path) -> None:
    module, finder = make(), BatchSizeFinder()
    module.limit = 17
    trainer = make_trainer(tmp_path, callbacks=[finder], max_epochs=1)
    trainer.fit(module)
    assert (finder.optimal_batch_size, module.batch_size, trainer.global_step) == (16, 16, 4)


def test_two_workers_agree_and_one_of_them_is_out_of_memory(tmp_path: Path, ray_cluster: object) -> None:
    class Plain(Net):  # type: ignore[misc, valid-type]
        def __init__(self, batch_size: int = 4) -> None:
            super().__init__(batch_size=batch_size)
            self.layers = nn.Linear(8, 1)  # no batch norm, whose statistics are each rank's own

    alone = Tuner(make_trainer(tmp_path)).lr_find(make(Plain, batch_size=8), num_training=20)
    module = make(Plain)
    trainer = make_trainer(tmp_path, devices=2)
    finder = Tuner(trainer).lr_find(module, num_training=20, update_attr=False)
    assert finder.results["lr"] == alone.results["lr"]
    assert finder.results["loss"] == pytest.approx(alone.results["loss"], rel=1e-5)
    module.limit, module.bad_rank = 5, 1
    before = state_of(module)
    assert Tuner(trainer).scale_batch_size(module, mode="binsearch", margin=0.0) == 5
    assert_same(before, state_of(module), but=("batch_size",))
    trainer.fit(module)  # the workers are fit for another run
    assert trainer.global_step == 2 * 7
    with pytest.raises(InvalidArguments, match="cannot be called in a hook"):
        LearningRateFinder().lr_find(trainer, module)
