"""What one optimizer step is made of."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import raylight as pl

QUIET = {"num_workers": 0, "use_gpu": False, "enable_progress_bar": False, "enable_model_summary": False}


def make_loader(num_samples: int = 10, batch_size: int = 2) -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(float(num_samples)).unsqueeze(1)), batch_size=batch_size)


def fit(module: pl.Module, path, loader=None, val=None, **arguments):
    arguments = {**QUIET, "max_epochs": 1, **arguments}
    return pl.fit(module, loader if loader is not None else make_loader(), val, storage_path=str(path), **arguments)


class Linear(pl.Module):
    """The gradient of its weight is the mean of the batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.stepped_with: list[float] = []

    def training_step(self, batch):
        return (self.weight * batch[0]).mean()

    def on_before_optimizer_step(self, optimizer):
        self.stepped_with.append(self.weight.grad.item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def generate(length: int):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(torch.arange(float(length)).unsqueeze(1))

    return DataLoader(Stream(), batch_size=2, collate_fn=lambda items: [torch.stack(items)])


@pytest.mark.parametrize(
    ("accumulate", "loader", "expected"),
    [
        (2, make_loader(10), [1.5, 5.5, 8.5]),
        (3, make_loader(10), [2.5, 7.5]),
        (4, make_loader(6), [2.5]),
        (2, make_loader(8), [1.5, 5.5]),
        (2, generate(10), [1.5, 5.5, 8.5]),
    ],
)
@pytest.mark.parametrize("arguments", [{}, {"gradient_clip_val": 100.0}])
def test_a_partial_window_is_the_mean_over_its_batches(accumulate, loader, expected, arguments, tmp_path):
    module = Linear()
    fit(module, tmp_path, loader, accumulate_grad_batches=accumulate, **arguments)
    assert module.stepped_with == pytest.approx(expected)
    assert module.weight.item() == pytest.approx(-sum(expected))


def test_a_partial_window_of_a_global_batch_is_the_mean_over_its_samples(tmp_path):
    module = Linear()
    fit(module, tmp_path, make_loader(10), global_batch_size=4)
    assert module.stepped_with == pytest.approx([1.5, 5.5, 8.5])


def test_a_window_that_is_changed_while_it_fills_stays_a_mean(tmp_path):
    class Changed(Linear):
        def on_train_batch_start(self, batch, batch_idx):
            self.trainer.accumulate_grad_batches = 4 if batch_idx < 2 else 3

    module = Changed()
    fit(module, tmp_path, make_loader(10), accumulate_grad_batches=4)
    assert module.stepped_with == pytest.approx([(0.5 / 4 + 2.5 / 4 + 4.5 / 3 + 6.5 / 3) / (7 / 6), 8.5])


def test_the_closure_of_a_partial_window_is_weighed_in_each_evaluation(tmp_path):
    class Closure(Linear):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            optimizer.step(closure=optimizer_closure)

    module = Closure()
    fit(module, tmp_path, make_loader(10), accumulate_grad_batches=2)
    assert module.stepped_with == pytest.approx([1.5, 5.5, 8.5])
