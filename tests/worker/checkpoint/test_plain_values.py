from __future__ import annotations

import argparse
import enum
import io
import pathlib
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

import numpy
import pytest
import torch

from raylight.contract.errors import InvalidArguments
from raylight.worker.checkpoint.plain_values import check_plain, restore_arrays


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


class Attributes(dict):
    pass


Point = namedtuple("Point", "x y")


def load_again(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return restore_arrays(torch.load(file, weights_only=True))


SAME = [
    None, True, 0, -1, 2**31, 2**63, -(2**70), 2**1999, 1.5, float("inf"), 2j, "", "text", "\N{SNOWMAN}", b"ab\xff",
    bytearray(b"x"), bytearray(), [], [1, "a", None], (1, (2, [3])), {}, {"a": {"b": 1}}, {1: 2, None: 3, (1, "x"): 4},
    {1, 2}, set(), OrderedDict(b=1, a=2), Counter("aab"), torch.float32, torch.bfloat16, torch.device("cuda", 1),
    torch.Size([2, 3]), [2**64, 2**65], list(range(1000)),
]  # fmt: skip


@pytest.mark.parametrize("value", SAME, ids=lambda value: repr(value)[:20])
def test_plain_values_come_back_equal_and_of_the_same_type(value):
    again = load_again(check_plain(value, "value"))
    assert again == value
    assert type(again) is type(value)


CONVERTED = [
    (pathlib.PurePosixPath("a/b"), "a/b"),
    (Colour.RED, "red"),
    (Level.LOW, 1),
    ({Colour.RED: 1}, {"red": 1}),
    (Attributes(a=Attributes(b=1)), {"a": {"b": 1}}),
    (defaultdict(list, a=[1]), {"a": [1]}),
    (argparse.Namespace(a=1, b=[pathlib.PurePosixPath("x")]), {"a": 1, "b": ["x"]}),
    (deque([1, 2]), [1, 2]),
    (Point(1, 2), (1, 2)),
    (frozenset({1}), {1}),
    (b"", bytearray()),
    (numpy.float32(1.5), 1.5),
    (numpy.float64(1.5), 1.5),
    (numpy.int64(3), 3),
    (numpy.bool_(True), True),
    (numpy.str_("a"), "a"),
    ([numpy.int64(3)], [3]),
    ({numpy.int64(3): 1}, {3: 1}),
]


@pytest.mark.parametrize(("value", "plain"), CONVERTED, ids=lambda value: repr(value)[:30])
def test_harmless_types_become_plain_ones(value, plain):
    converted = check_plain(value, "value")
    assert converted == plain
    assert type(converted) is type(plain)
    assert load_again(converted) == plain


@pytest.mark.parametrize("dtype", ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8", "c16"])
def test_numpy_arrays_come_back_as_arrays(dtype):
    array = numpy.arange(6).reshape(2, 3).astype(dtype)
    again = load_again(check_plain({"state": [array, numpy.array(3, dtype)]}, "value"))
    assert isinstance(again["state"][0], numpy.ndarray)
    assert again["state"][0].dtype == array.dtype
    numpy.testing.assert_array_equal(again["state"][0], array)
    assert again["state"][1].shape == ()


def test_numpy_rng_state_comes_back():
    generator = numpy.random.RandomState(3)
    state = load_again(check_plain(generator.get_state(), "rng"))
    expected = generator.random_sample(5)
    other = numpy.random.RandomState(4)
    other.set_state(state)
    numpy.testing.assert_array_equal(other.random_sample(5), expected)


def test_the_copy_shares_no_container_with_the_original_but_its_tensors():
    tensor = torch.ones(2)
    value = {"a": [1, {"b": tensor}]}
    copied = check_plain(value, "value")
    value["a"].append(2)
    value["a"][1]["c"] = 3
    assert copied["a"] == [1, {"b": tensor}]
    assert copied["a"][1]["b"] is tensor


def test_all_mistakes_are_named_at_once_with_their_place():
    looping: list = []
    looping.append(looping)
    value = {
        "loss": torch.nn.MSELoss(),
        "kind": torch.nn.Linear,
        "deep": [0, {"function": load_again}],
        "big": 2**3000,
        "loop": looping,
        "meta": torch.empty(2, device="meta"),
        "words": numpy.array(["a"]),
        "time": numpy.datetime64("2020-01-01"),
        frozenset({1}): 1,
        "tensors": {torch.ones(1)},
        "fine": 1,
    }
    with pytest.raises(InvalidArguments) as raised:
        check_plain(value, "hyper_parameters")
    text = str(raised.value)
    assert len(raised.value.mistakes) == 10
    for part in (
        "hyper_parameters['loss'] is a torch.nn.modules.loss.MSELoss",
        "hyper_parameters['kind'] is the class torch.nn.modules.linear.Linear",
        "hyper_parameters['deep'][1]['function'] is the function",
        "hyper_parameters['big'] is an integer of 3001 bits",
        "hyper_parameters['loop'][0]",
        "hyper_parameters['meta'] is on the meta device",
        "hyper_parameters['words'] is a numpy.ndarray",
        "hyper_parameters['time'] is a datetime.date",
        "hyper_parameters has a frozenset as a key",
        "hyper_parameters['tensors'] is a set of tensors",
    ):
        assert part in text
