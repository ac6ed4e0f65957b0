"""Which part cannot be sent to a worker."""

from __future__ import annotations

import pickle
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from raylight.arguments import pickling
from raylight.arguments.pickling import check_picklable
from raylight.contract.task import Loaders
from raylight.user.callback import Callback

LOCK = threading.Lock()


class Reader:
    def __init__(self, handle: Any = None):
        self.handle = handle


class Closed(Reader):
    def __getstate__(self) -> dict[str, Any]:
        return {}


class Loop:
    """Two objects that hold each other; one of them a lock too."""

    def __init__(self) -> None:
        self.other = Reader(self)
        self.locks = {"a": [threading.Lock()]}


class Stubborn:
    def __reduce__(self) -> Any:
        raise ValueError("not today")


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU())


def with_lock(lock: Any) -> Any:
    return lambda batch: (lock, batch)


def find(value: Any) -> list[str]:
    return [text.split(";")[0] for text in check_picklable(network(), Loaders(), [value])]


def test_what_can_be_pickled_is_let_through() -> None:
    loaders = Loaders(train=DataLoader(TensorDataset(torch.zeros(4))), validate=[1], data_module=Reader(3))
    assert check_picklable(network(), loaders, [Callback(), lambda: 1, Closed(LOCK)]) == []


def test_the_path_of_the_attribute_is_named(tmp_path: Path) -> None:
    module = network()
    module[0].reader = Reader(open(tmp_path / "out", "w"))  # noqa: SIM115
    told = check_picklable(module, Loaders(), [])
    assert len(told) == 1
    assert told[0].startswith("module.0.reader.handle: cannot pickle '_io.TextIOWrapper'")
    assert "__getstate__" in told[0]
    assert "setup()" in told[0]


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (LOCK, "callbacks[0]: cannot pickle '_thread.lock'"),
        (Reader({"x": (1, LOCK)}), "callbacks[0].handle['x'][1]: cannot pickle '_thread.lock'"),
        (Loop(), "callbacks[0].locks['a'][0]: cannot pickle '_thread.lock'"),
        (Reader(iter(x for x in "a")), "callbacks[0].handle: cannot pickle 'generator'"),
        (Reader(partial(print, LOCK)), "callbacks[0].handle['args'][0]: cannot pickle '_thread.lock'"),
        (Reader(Stubborn()), "callbacks[0].handle: cannot pickle '{module}.Stubborn' (not today)"),
    ],
    ids=range(6),
)
def test_each_kind_of_container_is_looked_into(value: Any, path: str) -> None:
    assert find(value) == [path.format(module=__name__)]


def test_the_variable_that_a_function_holds_is_named() -> None:
    told = find(with_lock(LOCK))
    assert told == ["callbacks[0] (function with_lock.<locals>.<lambda>): variable lock: cannot pickle '_thread.lock'"]


def test_every_root_is_looked_at_and_named_as_the_user_knows_it() -> None:
    loaders = Loaders(train=DataLoader(TensorDataset(torch.zeros(4)), collate_fn=with_lock(LOCK)), data_module=LOCK)
    told = check_picklable(network(), loaders, [])
    assert [text.split(" ")[0].rstrip(":") for text in told] == ["train_dataloaders.collate_fn", "datamodule"]
    assert check_picklable(network(), Loaders(test=LOCK), [])[0].startswith("dataloaders: ")


def test_it_agrees_with_pickle() -> None:
    for value in (Reader(LOCK), Loop(), Stubborn()):
        with pytest.raises(Exception, match=r"cannot pickle|not today"):
            pickle.dumps(value)
        assert find(value)


def test_the_bytes_of_tensors_and_arrays_are_not_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(pickling._Nowhere, "write", lambda self, data: sizes.append(len(data)))
    module = nn.Linear(512, 512)
    assert check_picklable(module, Loaders(train=[torch.zeros(2**20), np.zeros(2**20)]), []) == []
    assert 0 < sum(sizes) < 20_000


def test_what_a_parametrized_module_holds_and_a_hook_on_a_gradient_are_looked_into() -> None:
    module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2))
    assert check_picklable(module, Loaders(), []) == []
    module[0].guard = LOCK
    module[1].weight.register_hook(with_lock(threading.RLock()))
    told = check_picklable(module, Loaders(), [])
    assert told[0].startswith("module.0.guard: cannot pickle '_thread.lock'")
    assert told[1].startswith("module.1.weight (hooks)")
    assert "variable lock: cannot pickle '_thread.RLock'" in told[1]


def test_a_long_list_is_no_long_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickling, "_QUICK_BYTES", 1 << 20)
    items: list[Any] = ["x" * 100_000 + str(number) for number in range(20)]
    assert check_picklable(network(), Loaders(train=[*items, LOCK]), []) == []
    told = pickling.find_unpicklable({"train": [*items, LOCK]})
    assert told[0].startswith("train[20]: cannot pickle '_thread.lock'")
