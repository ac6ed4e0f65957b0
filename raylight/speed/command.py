"""The command `raylight benchmark`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING

import torch

from raylight.contract.errors import InvalidArguments, MissingFile
from raylight.runs import checkpoint_at
from raylight.speed.benchmark import benchmark_all
from raylight.speed.result import Benchmark, comparison_table
from raylight.user.module import Module

if TYPE_CHECKING:
    from rich.table import Table

COMPILE = {"no": [False], "yes": [True], "both": [False, True]}


def run(options: argparse.Namespace) -> list[Table]:
    """The tables to print."""
    places = [options.first] + ([options.second] if options.second else [])
    found = _load(places) if all(place.endswith(".json") for place in places) else _measure(options, places)
    if options.save:
        found[0].save(options.save)
    if options.plot:
        found[0].plot(options.plot)
    tables = [its.table() for its in found]
    return tables + ([comparison_table(places, found[0].compare(found[1]))] if len(found) > 1 else [])


def _load(places: list[str]) -> list[Benchmark]:
    return [Benchmark.load(place) for place in places]


def _measure(options: argparse.Namespace, places: list[str]) -> list[Benchmark]:
    if any(place.endswith(".json") for place in places):
        raise InvalidArguments("two checkpoints can be compared, or two files of --save, but not one of each")
    if options.module is None:
        raise InvalidArguments("--module is needed: the class of the checkpoint's module, as train.py:Net")
    kind = find_class(options.module)
    modules = [(place, kind.load_from_checkpoint(_find(place, options.which))) for place in places]
    batch = None if options.input_shape is None else torch.randn(1, *options.input_shape)
    return benchmark_all(
        modules, batch, batch_sizes=options.batch_sizes, precision=options.precision,
        compile=COMPILE[options.compile], stage=options.stage, device=options.device, spread=options.spread,
        max_s=options.max_s,
    )  # fmt: skip


def _find(place: str, which: str) -> str:
    """A checkpoint file as it is; of a version the checkpoint that was asked for."""
    return place if os.path.isfile(place) else checkpoint_at(place, which).path


def find_class(place: str) -> type[Module]:
    """The module class at "file.py:Name" or "package.module:Name"; its code runs. Raises InvalidArguments."""
    path, _, name = place.rpartition(":")
    if not path or not name:
        raise InvalidArguments(f"--module {place}: the form is file.py:Net or package.module:Net")
    try:
        found = getattr(_import(path), name, None)
    except (ImportError, MissingFile) as error:
        raise InvalidArguments(f"--module {place}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Module)):
        raise InvalidArguments(f"--module {place}: {path} has no raylight.Module of that name")
    return found


def _import(path: str) -> object:
    if not path.endswith(".py"):
        sys.path.insert(0, os.getcwd())
        return importlib.import_module(path)
    if not os.path.isfile(path):
        raise MissingFile(f"there is no file {path}")
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # as Python does for a script
    name = os.path.splitext(os.path.basename(path))[0]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
