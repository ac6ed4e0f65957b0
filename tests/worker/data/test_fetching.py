"""A batch by one indexing call is what the DataLoader gives, and is never taken where it would skip user code."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate
from torch.utils.data._utils import collate

from raylight.worker.data.batches import TrainBatches
from raylight.worker.data.fetching import LoaderFetch, find_rows

IMAGES, LABELS = torch.randn(50, 2, 3), torch.randint(0, 9, (50,))


def read(loader, fast, world_size=1):
    ranks = [TrainBatches(loader, rank=rank, world_size=world_size, seed=3) for rank in range(world_size)]
    for rank in ranks:
        assert rank.source.rows is not None
        if not fast:
            rank.source.rows = None
    return [batch.data for rank in ranks for batch in rank.iterate(1)]


DATASETS = {
    "plain": TensorDataset(IMAGES, LABELS),
    "kinds of numbers": TensorDataset(IMAGES.half(), IMAGES > 0, LABELS.to(torch.uint8), IMAGES.to(torch.complex64)),
    "subset": Subset(TensorDataset(IMAGES, LABELS), [*range(49, 8, -1)]),
    "subset of a subset": Subset(Subset(TensorDataset(IMAGES, LABELS), range(0, 50, 2)), torch.tensor([4, 0, -1, 9])),
    "tensors of other lengths": TensorDataset(torch.randn(50, 0), torch.randn(50, 1, 1, 1)),
}


@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_rows_are_what_the_loader_gives(kind, shuffle, world_size):
    loader = DataLoader(DATASETS[kind], batch_size=4, shuffle=shuffle)
    fast, slow = read(loader, True, world_size), read(loader, False, world_size)
    assert len(fast) == len(slow)
    for quick, plain in zip(fast, slow, strict=True):
        if plain is None:
            assert quick is None
            continue
        assert type(quick) is type(plain) is list
        for a, b in zip(quick, plain, strict=True):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            assert torch.equal(a, b)


def test_negative_indices_count_from_the_end():
    loader = DataLoader(DATASETS["plain"], batch_size=2, sampler=[0, -1, 3, -50])
    for a, b in zip(read(loader, True), read(loader, False), strict=True):
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_batch_changed_in_place_does_not_change_the_dataset(shuffle):
    images = IMAGES.clone()
    for batch in read(DataLoader(TensorDataset(images), batch_size=4, shuffle=shuffle), True):
        batch[0].zero_()
    assert torch.equal(images, IMAGES)


class Augmented(TensorDataset):
    def __getitem__(self, index):
        return tuple(tensor * 2 for tensor in super().__getitem__(index))


class AtOnce(TensorDataset):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Tagged(torch.Tensor):
    pass


def with_getitems(dataset):
    dataset.__getitems__ = lambda indices: [dataset[index] for index in indices]
    return dataset


def own_loader():
    class Own(DataLoader):
        def __iter__(self):
            return super().__iter__()

    return Own(TensorDataset(IMAGES))


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Augmented(IMAGES)),
        DataLoader(AtOnce(IMAGES)),
        DataLoader(with_getitems(TensorDataset(IMAGES))),
        DataLoader(Subset(Augmented(IMAGES), range(10))),
        DataLoader(Subset(TensorDataset(IMAGES), [True] * 10)),
        DataLoader(TensorDataset(IMAGES), collate_fn=lambda items: default_collate(items)),
        DataLoader(TensorDataset(IMAGES), num_workers=1),
        DataLoader(TensorDataset(IMAGES), batch_size=None),
        DataLoader(TensorDataset(IMAGES), batch_sampler=[[0, 1], [2]]),
        DataLoader(TensorDataset(IMAGES.as_subclass(Tagged))),
        DataLoader(TensorDataset(IMAGES.to_sparse())),
        DataLoader(TensorDataset(torch.ones(4, 2, requires_grad=True))),
        DataLoader(TensorDataset(torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last))),
        DataLoader([IMAGES]),
        own_loader(),
    ],
    ids=["__getitem__", "__getitems__", "__getitems__ of the object", "subset of such", "mask", "collate_fn", "workers",
         "no batches", "batch sampler", "tensor subclass", "sparse", "gradient", "memory format", "list", "own loader"],
)  # fmt: skip
def test_never_where_user_code_would_be_skipped(loader):
    assert find_rows(loader) is None


def test_never_where_default_collate_was_changed(monkeypatch):
    loader = DataLoader(TensorDataset(IMAGES))
    assert find_rows(loader) is not None
    monkeypatch.setitem(collate.default_collate_fn_map, torch.Tensor, lambda batch, *, collate_fn_map: len(batch))
    assert find_rows(loader) is None


def test_a_sampler_that_gives_other_keys_takes_the_loader():
    loader = DataLoader(TensorDataset(IMAGES), batch_size=2, sampler=[torch.tensor(0), 1, 2])
    batches = TrainBatches(loader, rank=0, world_size=1, seed=0)
    assert [batch.data[0].shape[0] for batch in batches.iterate(0)] == [2, 1]
    assert isinstance(batches.source.slow, LoaderFetch)


def test_a_subclass_is_trained_on_with_what_it_overrides():
    batches = TrainBatches(DataLoader(Augmented(IMAGES), batch_size=4), rank=0, world_size=1, seed=0)
    assert torch.equal(next(batches.iterate(0)).data[0], IMAGES[:4] * 2)


def test_loader_workers_that_are_spawned():
    loader = DataLoader([*range(10)], batch_size=4, num_workers=1, multiprocessing_context="spawn")
    batches = TrainBatches(loader, rank=0, world_size=1, seed=0)
    assert [batch.data.tolist() for batch in batches.iterate(0)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
