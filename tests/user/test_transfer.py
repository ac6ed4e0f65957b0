from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from raylight.user.transfer import batch_size_of, move_to_device, pin

Pair = namedtuple("Pair", ["x", "y"])
META = torch.device("meta")  # a device that every machine has


@dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    names: list = field(default_factory=list, init=False)


class Labelled(list):
    pass


class Moving:
    def __init__(self, device="cpu"):
        self.device = device

    def to(self, device):
        return Moving(device)


def ones():
    return torch.ones(3, 2)


def test_every_tensor_moves_and_containers_stay_what_they_are():
    with_factory = defaultdict(list, a=ones())
    labelled = Labelled([ones()])
    labelled.label = "kept"
    batch = [
        (ones(), "text"), Pair(ones(), [ones()]), {"a": ones(), "b": {"c": ones(), "d": None}}, OrderedDict(z=ones()),
        with_factory, labelled, Sample(ones()), UserDict(a=ones()), Moving(), 3,
    ]  # fmt: skip
    moved = move_to_device(batch, "meta")
    assert [type(part) for part in moved] == [type(part) for part in batch]
    assert moved[0][0].device == META
    assert moved[0][1] == "text"
    assert moved[1].x.device == moved[1].y[0].device == META
    assert moved[2]["b"]["c"].device == META
    assert moved[2]["b"]["d"] is None
    assert moved[3]["z"].device == META
    assert moved[4]["a"].device == META
    assert moved[4].default_factory is list
    assert moved[5][0].device == META
    assert moved[5].label == "kept"
    assert moved[6].x.device == META
    assert moved[7]["a"].device == META
    assert moved[8].device == META
    assert batch[0][0].device == batch[6].x.device == torch.device("cpu")
    assert batch[4]["a"].device == batch[5][0].device == torch.device("cpu")


def test_a_tensor_that_is_there_already_is_not_copied():
    batch = ones()
    assert move_to_device(batch, torch.device("cpu")) is batch
    packed = move_to_device(pack_sequence([torch.ones(2), torch.ones(1)]), "cpu")
    assert packed.data.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (ones(), 3), (torch.tensor(1.0), 1), ([ones(), torch.ones(7)], 3), ({"name": "x", "x": ones()}, 3),
        (Pair("x", {"y": [ones()]}), 3), (Sample(ones()), 3), (["a", "b"], None), ("text", None), (5, None),
        (MappingProxyType({"x": ones()}), 3), (iter([ones()]), None), ([], None), ([[], ones()], 3),
    ],
)  # fmt: skip
def test_the_batch_size_is_the_first_dimension_of_the_first_tensor(batch, size):
    assert batch_size_of(batch) == size


class Graph:
    """Moves itself and forgets to return itself."""

    def __init__(self) -> None:
        self.x = torch.ones(2)
        self.moves = 0

    def to(self, device: torch.device) -> None:
        self.x = self.x.to(device)
        self.moves += 1

    def pin_memory(self) -> None:
        self.moves += 1


def test_a_batch_whose_to_returns_none_stays() -> None:
    graph = Graph()
    assert move_to_device({"graphs": [graph]}, "cpu")["graphs"][0] is graph
    assert pin(graph) is graph
    assert graph.moves == 2
