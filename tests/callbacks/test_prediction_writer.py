from __future__ import annotations

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

import raylight as pl
from raylight.callbacks import BasePredictionWriter
from raylight.contract.errors import InvalidArguments


class Writer(BasePredictionWriter):
    def __init__(self, write_interval):
        super().__init__(write_interval)
        self.batches, self.epochs = [], []

    def write_on_batch_end(self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        self.batches.append((dataloader_idx, batch_idx, batch_indices, len(prediction), len(batch[0])))

    def write_on_epoch_end(self, trainer, module, predictions, batch_indices):
        self.epochs.append((predictions, batch_indices))


def predict(net, loaders, writer):
    trainer = pl.Trainer(num_workers=0, callbacks=[writer], enable_progress_bar=False, logger=False)
    return trainer.predict(net, loaders)


def test_each_batch_is_written_with_its_samples(make_net, dataset):
    writer = Writer("batch")
    predict(make_net(), DataLoader(dataset, batch_size=20), writer)
    expected = [list(range(0, 20)), list(range(20, 40)), list(range(40, 48))]
    assert writer.batches == [(0, index, s, len(s), len(s)) for index, s in enumerate(expected)]
    assert writer.epochs == []


def test_all_batches_are_written_at_the_end(make_net, dataset):
    writer = Writer("epoch")
    returned = predict(make_net(), DataLoader(dataset, batch_size=20), writer)
    ((predictions, indices),) = writer.epochs
    assert writer.batches == []
    assert indices == [[list(range(0, 20)), list(range(20, 40)), list(range(40, 48))]]
    assert torch.equal(torch.cat(predictions), torch.cat(returned))


def test_several_loaders_are_told_apart(make_net, dataset):
    writer = Writer("batch_and_epoch")
    predict(make_net(), [DataLoader(dataset, batch_size=40), DataLoader(dataset, batch_size=30)], writer)
    assert [(loader, index, len(samples)) for loader, index, samples, _, _ in writer.batches] == [
        (0, 0, 40),
        (0, 1, 8),
        (1, 0, 30),
        (1, 1, 18),
    ]
    ((predictions, indices),) = writer.epochs
    assert [[len(p) for p in loader] for loader in predictions] == [[40, 8], [30, 18]]
    assert [[len(i) for i in loader] for loader in indices] == [[40, 8], [30, 18]]


def test_shuffled_and_batched_by_a_sampler_of_ones_own(make_net, dataset):
    class Reversed(BatchSampler):
        def __iter__(self):
            return iter([list(reversed(batch)) for batch in super().__iter__()])

    sampler = Reversed(SequentialSampler(dataset), 30, drop_last=False)
    writer = Writer("batch")
    predict(make_net(), DataLoader(dataset, batch_sampler=sampler), writer)
    assert [samples for _, _, samples, _, _ in writer.batches] == [list(range(29, -1, -1)), list(range(47, 29, -1))]

    writer = Writer("batch_and_epoch")
    net = make_net()
    predict(net, DataLoader(dataset, batch_size=20, shuffle=True), writer)
    ((predictions, indices),) = writer.epochs
    samples = [sample for batch in indices[0] for sample in batch]
    assert sorted(samples) == list(range(48))
    expected = net.head(net.backbone(dataset.tensors[0][samples]))
    torch.testing.assert_close(torch.cat(predictions), expected)


def test_a_stream_has_no_indices(make_net, dataset):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(dataset)

    writer = Writer("batch_and_epoch")
    predict(make_net(), DataLoader(Stream(), batch_size=30), writer)
    assert [(index, samples, size) for _, index, samples, size, _ in writer.batches] == [(0, None, 30), (1, None, 18)]
    assert writer.epochs[0][1] == [[None, None]]


def test_what_cannot_work_is_told(make_net, dataset):
    with pytest.raises(InvalidArguments, match="Did you mean 'batch'"):
        Writer("batches")
    with pytest.raises(Exception, match="must override write_on_batch_end"):
        predict(make_net(), DataLoader(dataset, batch_size=20), BasePredictionWriter("batch"))
