"""The attributes that subclasses of Lightning's callbacks use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raylight.callbacks import ProgressBar, StochasticWeightAveraging, TQDMProgressBar, WeightAveraging
from raylight.contract.errors import InvalidArguments


def test_a_subclass_of_weight_averaging_reads_and_swaps_the_average(fit: Any, make_net: Any):
    class Watching(WeightAveraging):
        seen: list[Any] = []

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            super().on_train_epoch_end(trainer, module)
            average = self._average_model
            assert average is not None
            self.seen.append((int(average.n_averaged), average.module.head.weight.clone(), module.head.weight.clone()))

        def _swap_models(self, pl_module: Any) -> None:
            before = pl_module.head.weight.clone()
            super()._swap_models(pl_module)
            if self._average_model is not None and self.average.is_swapped and self.average.num_averaged:
                assert torch.equal(self._average_model.module.head.weight, pl_module.head.weight)
                assert not torch.equal(before, pl_module.head.weight)

    callback, net = Watching(), make_net()
    fit(net, callback, max_epochs=2)
    assert [count for count, _, _ in callback.seen] == [6, 12]
    assert not torch.equal(callback.seen[1][1], callback.seen[1][2])
    assert torch.equal(callback.seen[1][1], net.head.weight)
    assert callback._average_model is None


def test_a_subclass_of_swa_has_its_epochs_and_its_own_mean(fit: Any, make_net: Any):
    class Latest(StochasticWeightAveraging):
        epochs: tuple[float, float] = (0, 0)

        @staticmethod
        def avg_fn(averaged_model_parameter: Any, model_parameter: Any, num_averaged: Any) -> Any:
            return model_parameter.clone()

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            self.epochs = (self.swa_start, self.swa_end)
            super().on_train_epoch_start(trainer, module)
            if self.average.num_averaged:
                assert self._average_model is not None
                assert torch.equal(self._average_model.module.head.weight, module.head.weight)

    callback = Latest(0.01, swa_epoch_start=0.5)
    fit(make_net(), callback)
    assert callback.epochs == (1, 3)
    first, second = make_net(), make_net(norm=True)
    assert not StochasticWeightAveraging.pl_module_contains_batch_norm(first)
    assert StochasticWeightAveraging.pl_module_contains_batch_norm(second)
    with torch.no_grad():
        first.head.weight.fill_(7.0)
    other = make_net()
    StochasticWeightAveraging.transfer_weights(first, other)
    assert torch.equal(other.head.weight, first.head.weight)


def test_the_mean_is_lightnings():
    lightning = pytest.importorskip("pytorch_lightning.callbacks")
    values = (torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0]), torch.tensor(3))
    theirs = lightning.StochasticWeightAveraging.avg_fn(*values)
    assert torch.equal(StochasticWeightAveraging.avg_fn(*values), theirs)


def test_a_method_that_is_never_called_is_no_override():
    class Resetting(StochasticWeightAveraging):
        def reset_momenta(self) -> None: ...

    with pytest.raises(InvalidArguments, match="reset_momenta: raylight calls no such method"):
        Resetting(0.1)

    class Drawing(TQDMProgressBar):
        def init_train_tqdm(self) -> Any: ...

    with pytest.raises(InvalidArguments, match="init_train_tqdm: raylight calls no such method; the bar is drawn"):
        Drawing()


def test_a_bar_of_ones_own_knows_how_far_it_goes(fit: Any, make_net: Any):
    class Counting(ProgressBar):
        seen: list[Any] = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert self.trainer is trainer
            self.seen.append((batch_idx, self.total_train_batches, self.total_val_batches))

    bar = Counting()
    fit(make_net(), bar, max_epochs=2, check_val_every_n_epoch=2)
    assert bar.seen == [(index, 6, total) for total in (0, 3) for index in range(6)]
    with pytest.raises(RuntimeError, match="in a run alone"):
        _ = bar.trainer
