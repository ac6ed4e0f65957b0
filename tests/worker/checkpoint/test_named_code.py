"""Which classes and functions a module's code names."""

from __future__ import annotations

import enum
import fractions
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import pytest
import torchmetrics
from torchmetrics import classification

import raylight as pl
from raylight.worker.checkpoint.named_code import NamedCode
from raylight.worker.checkpoint.typed_values import NotStorable

if TYPE_CHECKING:
    from torchmetrics import F1Score  # noqa: F401


class Kind(enum.Enum):
    A = 1


@dataclass
class Options:
    kind: Kind = Kind.A


class Net(pl.Module):
    def __init__(self, options: Options | None = None) -> None:
        super().__init__()
        self.metric = torchmetrics.classification.BinaryAccuracy()

    def forward(self, x):
        return psutil.cpu_count() * fractions.Fraction(1)


class Child(Net):
    pass


@pytest.mark.parametrize("owner", [Net, Child])
@pytest.mark.parametrize("path", [f"{__name__}:Kind", "__main__:Kind", f"{__name__}:Options", f"{__name__}:Net"])
def test_what_its_file_defines_is_named(owner: type, path: str) -> None:
    assert NamedCode(owner).find(path).__name__ == path.partition(":")[2]


def test_what_its_methods_write_out_is_named_and_what_is_only_within_reach_is_not() -> None:
    code = NamedCode(Child)
    assert (
        code.find("torchmetrics.classification.accuracy:BinaryAccuracy") is torchmetrics.classification.BinaryAccuracy
    )
    assert classification.MulticlassAccuracy
    for path in (
        "torchmetrics.classification.accuracy:MulticlassAccuracy",
        "torchmetrics.classification.f_beta:F1Score",
        "psutil:Popen",
        "psutil:Process",
        "fractions:Fraction",  # of the standard library
        "other:Kind",
    ):
        with pytest.raises(NotStorable, match="does not name"):
            code.find(path)


def test_a_function_of_another_package_is_not_called_with_arguments_of_a_file() -> None:
    code = NamedCode(Net)
    assert code.find("psutil:cpu_count") is psutil.cpu_count
    with pytest.raises(NotStorable, match=r"calls the function psutil\.cpu_count of another package"):
        code.find_callable("psutil:cpu_count")


def test_a_class_of_a_function_names_what_is_around_it() -> None:
    class Local(enum.Enum):
        B = 2

    class Inner(pl.Module):
        def __init__(self, local: Local = Local.B) -> None:
            super().__init__()
            self.is_it = local is Local.B

    assert NamedCode(Inner).find(f"{__name__}:{Local.__qualname__}") is Local
