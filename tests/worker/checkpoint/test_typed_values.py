"""Values that are no plain ones go through a checkpoint file and come back with their type, and nothing is run."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import decimal
import enum
import io
import math
import operator
import pathlib
import subprocess
import types
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from functools import partial
from typing import Any

import numpy
import omegaconf
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional

import raylight as pl
from raylight.user.module import AttributeDict
from raylight.worker.checkpoint.named_code import NamedCode
from raylight.worker.checkpoint.plain_values import check_plain, restore_arrays
from raylight.worker.checkpoint.typed_values import TAG, NotStorable, read, write


class Act(enum.Enum):
    TANH = "tanh"
    RELU = ("relu", 1)


class Level(enum.IntEnum):
    LOW = 1


class Flags(enum.Flag):
    A = 1
    B = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Inner:
    act: Act
    width: int = 3


@dataclasses.dataclass
class Config:
    inner: Inner
    where: pathlib.Path
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert not Config.is_closed, "loading must not call it"


Config.is_closed = False


Point = namedtuple("Point", "x y")


class Outer:
    class Mode(enum.Enum):
        FAST = 0


def scale(value: Any, by: float = 1.0) -> Any:
    return value * by


class Net(pl.Module):
    """Names what stands in this file."""


def through_a_file(value: Any, owner: type = Net) -> Any:
    file = io.BytesIO()
    torch.save(check_plain(write(value, "value"), "value"), file)
    file.seek(0)
    return read(restore_arrays(torch.load(file, weights_only=True)), NamedCode(owner))


CONFIG = Config(Inner(Act.TANH), pathlib.Path("a/b"), (0.1, 0.2))
SAME = [
    None, True, 1, -(2**3000), 1.5, 2j, "text", b"", b"ab", bytearray(b"x"), [1, [2]], (1, (2, "a")), {1, 2},
    {Act.TANH}, frozenset({1, 2}), deque([1, 2], 3), {"a": {"b": ()}}, {Act.TANH: 1, (1, Level.LOW): 2, None: 3},
    {TAG: "enum"},
    OrderedDict(b=1, a=2), Counter("aab"), defaultdict(list, a=[1]), AttributeDict(a=AttributeDict(b=1)),
    torch.float16, torch.device("cuda", 1), torch.Size([2, 3]), Act.TANH, Act.RELU, Level.LOW, Flags.A,
    Flags.A | Flags.B, Outer.Mode.FAST, pathlib.Path("a/b"), pathlib.PurePosixPath("a"),
    pathlib.PureWindowsPath("c:/x"), argparse.Namespace(act=Act.TANH, inner=argparse.Namespace(a=1)),
    types.SimpleNamespace(a=(1,)), CONFIG, Point(1, Act.TANH), range(1, 9, 2),
    slice(1, None), datetime.timedelta(1, 2), datetime.date(2020, 1, 2),
    datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC), decimal.Decimal("0.1"), numpy.float32(0.1), numpy.float64(0.1),
    numpy.bool_(True), numpy.dtype("float16"), int, list, nn.GELU, torch.optim.AdamW, Act, Config, Outer.Mode,
    functional.gelu, functional.relu, torch.tanh, math.sqrt, max, scale,
    OmegaConf.create([1, [2]]), OmegaConf.create({"a": {"b": [1, Act.TANH]}, "c": None}), [OmegaConf.create({"x": 1})],
]  # fmt: skip


@pytest.mark.parametrize("value", SAME, ids=lambda value: getattr(value, "__name__", type(value).__name__))
def test_it_comes_back_equal_and_of_the_same_type(value: Any) -> None:
    again = through_a_file(value)
    assert again == value
    assert type(again) is type(value)
    if isinstance(value, type | types.FunctionType | enum.Enum):
        assert again is value


def test_partials_arrays_and_tensors_come_back() -> None:
    given = {
        "norm": partial(nn.LayerNorm, eps=1e-3),
        "own": partial(scale, by=2.0),
        "nested": [partial(partial(max, 1), 2)],
    }
    again = through_a_file(given)
    assert again["norm"](2).eps == 1e-3
    assert again["own"](3) == 6
    assert again["nested"][0](0) == 2
    assert through_a_file(numpy.arange(3.0)).tolist() == [0, 1, 2]
    assert torch.equal(through_a_file((torch.ones(2),))[0], torch.ones(2))


def test_a_dataclass_is_filled_without_running_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = write(CONFIG, "value")
    monkeypatch.setattr(Config, "is_closed", True)
    assert read(stored, NamedCode(Net)) == CONFIG


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (lambda x: x, r"value is the function .*<lambda>"),
        ({"a": [1, open]}, None),
        (nn.ReLU(), r"value is a torch.nn.modules.activation.ReLU"),
        ({"a": [0, object()]}, r"value\['a'\]\[1\] is a object"),
        (torch.ones(2, device="meta"), "meta device"),
        (Point, None),
        (Act.TANH.name.lower, "value is the method"),
        (type("Local", (), {}), None),
    ],
)
def test_what_cannot_be_stored_or_brought_back_says_so(value: Any, reason: str | None) -> None:
    if reason is None and value is Point:
        assert through_a_file(value) is Point
        return
    with pytest.raises(NotStorable, match=reason or "needs .* does not name"):
        through_a_file(value)


def test_what_holds_itself_is_said_to() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(NotStorable, match="holds itself"):
        write(value, "value")


# ---- what a file may not do


@pytest.mark.parametrize(
    "stored",
    [
        {TAG: "name", "path": "os:system"},
        {TAG: "name", "path": "subprocess:Popen"},  # imported by this file
        {TAG: "name", "path": "operator:attrgetter"},
        {TAG: "name", "path": "builtins:eval"},
        {TAG: "name", "path": "torch:load"},
        {TAG: "name", "path": "torch:from_file"},
        {TAG: "name", "path": "omegaconf.omegaconf:OmegaConf.load"},
        {TAG: "name", "path": "raylight.worker.checkpoint.named_code:sys"},
        {TAG: "partial", "function": {TAG: "name", "path": "os:system"}, "arguments": ["true"], "keywords": {}},
        {TAG: "partial", "function": {TAG: "name", "path": "raylight.worker.checkpoint.typed_values:read"},
         "arguments": [], "keywords": {}},
        {TAG: "enum", "type": "torch.nn.modules.linear:Linear", "name": "A"},
        {TAG: "dataclass", "type": "torch.nn.modules.linear:Linear", "items": {}},
        {TAG: "dataclass", "type": f"{__name__}:Inner", "items": {}},
        {TAG: "named tuple", "type": f"{__name__}:Net", "items": []},
        {TAG: "enum", "type": f"{__name__}:Act", "name": "__class__"},
        {TAG: "something new", "value": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_file_brings_back_nothing_that_the_module_does_not_name(stored: dict[str, Any]) -> None:
    assert subprocess
    assert operator
    with pytest.raises(NotStorable):
        read(stored, NamedCode(Net))


def test_text_of_a_file_never_becomes_an_interpolation() -> None:
    called = []
    register = getattr(OmegaConf, "register_resolver", OmegaConf.register_new_resolver)
    register("run_it", lambda text: called.append(text), replace=True)
    for text in ("${run_it:x}", "\\${run_it:x}", "\\\\${run_it:x}", "a ${run_it:${run_it:y}}"):
        again = read({TAG: "DictConfig", "items": {"a": text, "b": [text]}}, NamedCode(Net))
        assert (again.a, again.b[0]) == (text, text)
        nested = {TAG: "DictConfig", "items": {"a": {TAG: "DictConfig", "items": {"b": text}}}}
        assert read(nested, NamedCode(Net)).a.b == text
    assert called == []
    OmegaConf.clear_resolver("run_it")


# ---- OmegaConf


@dataclasses.dataclass
class Structure:
    width: int = 3
    act: Act = Act.RELU


def test_a_configuration_comes_back_with_its_structure_flags_and_resolved_values() -> None:
    whole = OmegaConf.create({"dim": 4, "model": {"width": "${dim}"}, "text": "\\${dim}", "late": "???"})
    again = through_a_file(whole.model)
    assert again == {"width": 4}
    assert through_a_file(whole).text == "${dim}"
    assert OmegaConf.is_missing(through_a_file(whole), "late")
    structured = OmegaConf.structured(Structure(act=Act.TANH))
    OmegaConf.set_readonly(structured, True)
    again = through_a_file(structured)
    assert OmegaConf.get_type(again) is Structure
    assert (again.act, OmegaConf.is_readonly(again)) == (Act.TANH, True)
    assert OmegaConf.is_struct(again) == OmegaConf.is_struct(structured)
    with pytest.raises(NotStorable, match="value cannot be resolved"):
        write(OmegaConf.create({"a": "${nowhere}"}), "value")


def test_omegaconf_is_not_imported_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = write(OmegaConf.create([1]), "value")
    assert omegaconf
    monkeypatch.delitem(__import__("sys").modules, "omegaconf")
    with pytest.raises(pl.RaylightError, match="import omegaconf first"):
        read(stored, NamedCode(Net))
