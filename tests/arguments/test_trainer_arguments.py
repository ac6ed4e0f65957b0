"""The trainer's signature, held against Config, against Lightning's, and read as its readers do."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import pytorch_lightning

import raylight as pl
from raylight.arguments.resolving import INSTEAD, resolve
from raylight.arguments.rules import CHECKPOINTING_RULES, DDP_RULES, RULES
from raylight.arguments.scale import Available
from raylight.arguments.signatures import list_keywords, read_field_docs
from raylight.arguments.trainer_arguments import EvaluationArguments, TrainerArguments
from raylight.contract.config import DDP, Checkpointing, Config
from raylight.contract.errors import InvalidArguments

ROOT = Path(__file__).parents[2]

# Arguments that Config has under another name, or as part of another field.
SPELLINGS = {
    "devices", "gpus", "num_nodes", "accelerator", "max_time", "default_root_dir", "enable_checkpointing", "callbacks"
}  # fmt: skip
NO_ARGUMENTS = {"max_time_s", "given", "gpu_indices"}

# What is not given is told from what is: each contradicts another argument. Lightning's default is None too.
UNSET = {"precision", "checkpoint", "storage_path"}
# Fields that hold something else than what is written.
OTHER_FORMS = {"resources_per_worker": None, "strategy": "auto", "plugins": None, "fast_dev_run": False}

FUNCTIONS: list[tuple[Callable[..., Any], set[str]]] = [
    (pl.fit, set()), (pl.validate, {"checkpoint"}), (pl.test, {"checkpoint"}), (pl.predict, {"checkpoint"}),
    (pl.sweep, set()),
]  # fmt: skip


@pytest.fixture
def keywords() -> dict[str, inspect.Parameter]:
    return list_keywords(pl.Trainer)


# ---- against the rest of raylight


def test_the_signature_is_configs_fields_and_their_other_spellings(keywords: dict[str, inspect.Parameter]) -> None:
    assert set(keywords) == {field.name for field in fields(Config)} - NO_ARGUMENTS | SPELLINGS
    assert set(keywords) == set(RULES)


def test_types_are_written_twice_and_are_the_same() -> None:
    hints = {name: hint for name, hint in get_type_hints(pl.Trainer.__init__).items() if name in RULES}
    assert hints == get_type_hints(TrainerArguments)
    assert hints.keys() - get_type_hints(EvaluationArguments).keys() == {"checkpoint"}


def test_a_default_is_the_one_of_config(keywords: dict[str, inspect.Parameter]) -> None:
    config = Config()
    for name, keyword in keywords.items():
        if name in SPELLINGS | UNSET:
            assert keyword.default in (None, "auto", 1)
        else:
            expected = OTHER_FORMS.get(name, getattr(config, name))
            assert (keyword.default, type(keyword.default)) == (expected, type(expected)), name


def test_each_default_means_that_nothing_was_said(keywords: dict[str, inspect.Parameter]) -> None:
    here = Available(num_gpus_here=0)
    written = {name: keyword.default for name, keyword in keywords.items()}
    assert replace(resolve(written, here), given={}) == resolve({}, here)
    assert pl.Trainer(**written).arguments == {}


def test_each_argument_is_documented_once(keywords: dict[str, inspect.Parameter]) -> None:
    of_config, of_spellings = read_field_docs(Config), read_field_docs(EvaluationArguments)
    assert of_config.keys() == {field.name for field in fields(Config)}
    assert of_spellings.keys() == SPELLINGS
    assert read_field_docs(Checkpointing).keys() == CHECKPOINTING_RULES.keys()
    assert read_field_docs(DDP).keys() == DDP_RULES.keys()


# ---- against Lightning


def test_every_argument_of_lightnings_trainer_is_there_or_refused_with_a_sentence(
    keywords: dict[str, inspect.Parameter],
) -> None:
    theirs = inspect.signature(pytorch_lightning.Trainer).parameters
    hints = get_type_hints(pl.Trainer.__init__)
    for name, parameter in theirs.items():
        assert parameter.kind is parameter.KEYWORD_ONLY
        if name not in keywords:
            assert len(INSTEAD[name].split()) > 2, name
            continue
        assert name not in INSTEAD
        assert parameter.default in (keywords[name].default, None), name  # None: Lightning fills it in later
        if accepts_none(parameter.annotation):
            assert accepts_none(hints[name]), name


def accepts_none(hint: Any) -> bool:
    return hint is Any or (get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint))


@pytest.mark.parametrize("name", ["fit", "validate", "test", "predict"])
def test_what_the_trainer_does_takes_lightnings_arguments_in_lightnings_order(name: str) -> None:
    def describe(trainer: type) -> list[tuple[str, Any, Any]]:
        parameters = inspect.signature(getattr(trainer, name)).parameters.values()
        return [(parameter.name, parameter.kind, parameter.default) for parameter in parameters]

    assert describe(pl.Trainer) == describe(pytorch_lightning.Trainer)


def test_a_data_module_at_the_place_of_the_checkpoint_is_told_where_it_goes() -> None:
    trainer = pl.Trainer(num_workers=0)
    with pytest.raises(InvalidArguments, match=r"validate: ckpt_path is a data module.*datamodule="):
        trainer.validate(pl.Module(), None, pl.DataModule())


# ---- its readers


@pytest.mark.parametrize(("function", "own"), FUNCTIONS)
def test_functions_list_the_trainers_arguments(
    function: Callable[..., Any], own: set[str], keywords: dict[str, inspect.Parameter]
) -> None:
    listed = inspect.signature(function).parameters
    assert {name: listed[name] for name in keywords.keys() - own} == {
        name: keyword for name, keyword in keywords.items() if name not in own
    }
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in listed.values())


def test_help_shows_what_each_argument_means(keywords: dict[str, inspect.Parameter]) -> None:
    text = pydoc.render_doc(pl.Trainer, renderer=pydoc.plaintext)
    for name in keywords:
        assert f"     {name}: " in text, name
    assert "log_every_n_steps: 'int | None' = 50" in text
    assert "log_every_n_steps: " in pydoc.render_doc(pl.fit, renderer=pydoc.plaintext)


@pytest.mark.parametrize(
    "call",
    [
        lambda **wrong: pl.Trainer(**wrong),
        lambda **wrong: pl.fit(pl.Module(), [], **wrong),
        lambda **wrong: pl.validate(pl.Module(), [], **wrong),
        lambda **wrong: pl.test(pl.Module(), [], **wrong),
        lambda **wrong: pl.predict(pl.Module(), [], **wrong),
    ],
)
def test_misspelt_names_are_told_with_all_other_mistakes(call: Callable[..., Any]) -> None:
    with pytest.raises(InvalidArguments) as caught:
        call(max_epoch=3, precison=16, min_epochs=-1, tpu_cores=8)
    told = "\n".join(caught.value.mistakes)
    assert len(caught.value.mistakes) == 4
    for words in ("did you mean max_epochs?", "did you mean precision?", "min_epochs must", "tpu_cores is Lightning's"):
        assert words in told


PROGRAM = """
from datetime import timedelta
import raylight as pl

class Net(pl.LightningModule):
    def training_step(self, batch: object) -> None: ...

class Data(pl.LightningDataModule): ...

net = Net()
logger = pl.loggers.CSVLogger()
stopping = pl.callbacks.EarlyStopping("val_loss")
trainer = pl.Trainer(max_epochs=3, max_time=timedelta(hours=1), callbacks=(stopping,), logger=[logger])
pl.Trainer(max_epoch=3)  # wrong
pl.Trainer(max_epochs="3")  # wrong
result: pl.Result = pl.fit(net, datamodule=Data(), max_epochs=3, checkpoint=pl.Checkpointing(every_s=60))
pl.fit(net, max_epoch=3)  # wrong
pl.fit(net, precision="17")  # wrong
values: list[dict[str, float]] = pl.validate(net, [], checkpoint="best", precision="16-mixed")
pl.predict(net, [], limit_predict_batches="all")  # wrong
pl.sweep(Net, {}, num_samples=1, metric="x", mode="min", max_epoch=3)  # wrong
number: int = trainer.fit(net)  # wrong
"""
SETTINGS = """
[mypy]
strict = True
[mypy-torch.*,ray.*,pyarrow.*,numpy.*,torchvision.*,rich.*]
follow_imports = skip
[mypy-raylight.*]
ignore_errors = True
"""


def test_a_type_checker_reads_the_names_and_types(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "program.py", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=tmp_path, env={"MYPYPATH": str(ROOT)}, capture_output=True, text=True)
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    expected = {number for number, line in enumerate(PROGRAM.splitlines(), 1) if line.endswith("# wrong")}
    assert found == expected, done.stdout + done.stderr


def test_names_for_type_checkers_are_those_that_can_be_loaded() -> None:
    assert sorted([*pl.__all__, "__version__"]) == dir(pl)
    assert all(hasattr(pl, name) for name in pl.__all__)


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "raylight" / "py.typed").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["raylight"] == ["py.typed"]
