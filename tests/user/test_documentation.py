"""Every public name that a user subclasses or overrides says what it is."""

from __future__ import annotations

import inspect

import pytest
from torch import nn

import raylight as pl


def own_names(kind: type) -> dict[str, object]:
    """The public methods and properties of `kind`, without those of torch's Module."""
    found = {name: inspect.getattr_static(kind, name) for name in dir(kind) if not name.startswith("_")}
    return {
        name: member for name, member in found.items()
        if (callable(member) or isinstance(member, (property, classmethod, staticmethod)))
        and member is not inspect.getattr_static(nn.Module, name, None)
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "least"), [(pl.Module, 80), (pl.Callback, 37), (pl.DataModule, 15)])
def test_every_public_name_has_a_docstring(kind: type, least: int):
    names = own_names(kind)
    assert len(names) >= least
    bare = [name for name, member in names.items() if not getattr(member, "__doc__", None)]
    assert not bare


@pytest.mark.parametrize("kind", [pl.Module, pl.Callback, pl.DataModule])
def test_a_docstring_begins_with_one_sentence(kind: type):
    for name, member in own_names(kind).items():
        first = inspect.cleandoc(str(member.__doc__)).split("\n\n")[0]
        assert first[0] in "`" or first[0].isupper(), f"{kind.__name__}.{name}: {first}"
        assert first.rstrip().endswith((".", ").")), f"{kind.__name__}.{name}: {first}"
