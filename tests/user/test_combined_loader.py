"""CombinedLoader by itself: the batches and attributes of Lightning's."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning.utilities.combined_loader import CombinedLoader as TheirLoader
from torch.utils.data import DataLoader, IterableDataset

from raylight.contract.errors import InvalidArguments
from raylight.user.combined_loader import CombinedLoader, is_collection_of_loaders

pytestmark = pytest.mark.filterwarnings("ignore")
MODES = ("min_size", "max_size_cycle", "max_size", "sequential")


def load(length: int, batch_size: int = 2) -> DataLoader[Any]:
    return DataLoader(range(length), batch_size=batch_size)  # type: ignore[arg-type]


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return type(value)(map(plain, value)) if isinstance(value, (list, tuple)) else value


COLLECTIONS: list[Callable[[], Any]] = [
    lambda: {"a": load(6), "b": load(11)}, lambda: [load(6), load(3)], lambda: (load(4), load(4)), lambda: load(5),
    lambda: {"a": [load(4), load(9)], "b": {"x": load(7)}}, lambda: {"a": range(3), "b": [1, 2]}, lambda: [1, 2, 3],
    lambda: [[1, 2, 3], [4, 5]], lambda: [{"a": load(3)}, load(5)], lambda: [],
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", COLLECTIONS, ids=range(len(COLLECTIONS)))
def test_it_gives_what_lightnings_gives(make: Callable[[], Any], mode: Any) -> None:
    ours, theirs = CombinedLoader(make(), mode), TheirLoader(make(), mode)
    for _ in range(2):  # and once more
        assert [plain(item) for item in ours] == [plain(item) for item in theirs]
    assert len(ours) == len(theirs)
    assert len(ours.flattened) == len(theirs.flattened)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limits", [2, [1, 3], None])
def test_limits_hold_for_each_loader(mode: Any, limits: Any) -> None:
    ours, theirs = CombinedLoader([range(4), range(5)], mode), TheirLoader([range(4), range(5)], mode)
    ours.limits = theirs.limits = limits
    assert ours.limits == theirs.limits
    iter(theirs)
    assert len(ours) == len(theirs) == len(list(ours))


def test_attributes_have_the_structure_of_the_loaders() -> None:
    first, second = load(4), load(6)
    combined = CombinedLoader({"a": first, "b": [second, range(3)]})
    assert combined.mode == "min_size"
    assert combined.sampler == {"a": first.sampler, "b": [second.sampler, None]}
    assert combined.batch_sampler == {"a": first.batch_sampler, "b": [second.batch_sampler, None]}
    third = load(8)
    combined.flattened = [third, second, range(9)]
    assert combined.iterables == {"a": third, "b": [second, range(9)]}
    next(iter(combined))
    assert len(list(pickle.loads(pickle.dumps(combined)))) == 3
    combined.reset()
    with pytest.raises(TypeError, match="iter"):
        next(combined)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InvalidArguments, match="mode='longest' must be one of min_size, max_size_cycle"):
        CombinedLoader([], "longest")  # type: ignore[arg-type]
    combined = CombinedLoader([range(2), range(3)])
    with pytest.raises(InvalidArguments, match="has 2 loaders, and 1 limits came"):
        combined.limits = [3]
    with pytest.raises(InvalidArguments, match="has 2 loaders, and 3 loaders came"):
        combined.flattened = [1, 2, 3]


class Endless(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(int, 1)


def test_a_loader_without_a_length() -> None:
    combined = CombinedLoader([DataLoader(Endless()), range(3)], "min_size")
    assert len(combined) == len(list(combined)) == 3
    with pytest.raises(TypeError, match="no length in mode 'max_size'"):
        len(CombinedLoader([DataLoader(Endless()), range(3)], "max_size"))


def test_batches_and_numbers_are_no_loaders() -> None:
    x = torch.zeros(2)
    for loader in ([x, x], [(x, x), (x, x)], [[x], [x]], [{"x": x}], [1, 2], ["a"], [], {}, range(3), load(3)):
        assert not is_collection_of_loaders(loader), loader
    for loader in ([load(3)], (range(2), [x]), [[1, 2], [3]], {"a": [x, x]}, [{"a": load(3)}]):
        assert is_collection_of_loaders(loader) == (loader != (range(2), [x])), loader
