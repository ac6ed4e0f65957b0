"""Each public name of Lightning is here, or says why not."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from typing import Any

import pytest

import raylight as pl
from raylight.contract.errors import InvalidArguments, NotEnoughResources
from raylight.lightning.alias_modules import NAMES, find_entry
from raylight.lightning.names import HERE, read
from raylight.lightning.refused import REFUSED, STRATEGIES, StandIn, say_why_not
from tests.lightning.lightnings_names import walk

pytest.importorskip("pytorch_lightning")
LIGHTNING = dict(walk())
OF_OLDER_VERSIONS = {"loggers": ["NeptuneLogger"]}


def ours(module: str) -> Any:
    return importlib.import_module(f"raylight.{module}" if module else "raylight")


@pytest.mark.parametrize("module", LIGHTNING)
def test_every_public_name_is_there_or_refused_with_a_reason(module: str):
    found = ours(module)
    for name in LIGHTNING[module]:
        value = getattr(found, name)
        if isinstance(value, StandIn):
            assert len(value.sentence.split()) >= 4, f"{name}: {value.sentence}"
            with pytest.raises(InvalidArguments, match=f"^{name} is not in raylight: "):
                value()


def test_lightning_was_walked():
    assert len(LIGHTNING) > 120
    assert {"Trainer", "LightningModule"} <= set(LIGHTNING[""])
    assert "STEP_OUTPUT" in LIGHTNING["utilities.types"]
    assert "MisconfigurationException" in LIGHTNING["utilities.exceptions"]
    assert sum(map(len, LIGHTNING.values())) > 380


def test_the_table_has_no_name_that_lightning_lacks():
    for module, names in NAMES.items():
        theirs = LIGHTNING.get(module, [])
        extra = [name for name in names if name not in theirs]
        if extra:  # names that a module imports for itself
            real = importlib.import_module(f"pytorch_lightning.{module}")
            assert [name for name in extra if not hasattr(real, name)] in ([], OF_OLDER_VERSIONS.get(module)), module


def test_a_name_stands_once():
    """No row repeats another's, and none is both here and refused."""
    rows = [(module, name) for row in HERE for module in row.modules for name in read(row)]
    rows += [(module, name) for row in REFUSED for module in row.modules for name in row.names.split() if name != "*"]
    assert len(rows) == len(set(rows))


def test_a_name_is_one_object_wherever_it_is_found():
    from raylight.callbacks.lr_monitor import LearningRateMonitor
    from raylight.core.module import LightningModule
    from raylight.trainer.states import TrainerFn
    from raylight.utilities.exceptions import MisconfigurationException
    from raylight.utilities.rank_zero import rank_zero_only

    from raylight.callbacks.early_stopping import EarlyStopping

    assert LightningModule is pl.LightningModule is pl.core.LightningModule
    assert EarlyStopping is pl.callbacks.EarlyStopping
    assert LearningRateMonitor is pl.callbacks.LearningRateMonitor
    assert rank_zero_only is pl.rank_zero_only
    assert TrainerFn.FITTING == "fit"
    assert pl.trainer.Trainer is pl.Trainer is pl.trainer.trainer.Trainer
    assert issubclass(InvalidArguments, MisconfigurationException)
    assert issubclass(NotEnoughResources, MisconfigurationException)
    with pytest.raises(MisconfigurationException, match="max_epochs"):
        pl.Trainer(max_epochs="many")
    assert str(MisconfigurationException("of one's own")) == "of one's own"


def test_a_refused_name_can_be_imported_and_compared_with_alone():
    from raylight.strategies import DDPStrategy, DeepSpeedStrategy

    assert not isinstance(object(), DeepSpeedStrategy)
    assert DeepSpeedStrategy | None
    assert pickle.loads(pickle.dumps(DeepSpeedStrategy)) is DeepSpeedStrategy
    assert not hasattr(DeepSpeedStrategy, "strategy_name")
    with pytest.raises(InvalidArguments, match="DeepSpeedStrategy is not in raylight: raylight does not use DeepSpeed"):
        DeepSpeedStrategy(stage=3)
    with pytest.raises(InvalidArguments, match="DeepSpeed"):
        _ = DeepSpeedStrategy.strategy_name
    with pytest.raises(InvalidArguments, match="DeepSpeed"):
        type("Mine", (DeepSpeedStrategy,), {})
    with pytest.raises(InvalidArguments, match="DeepSpeed"):
        type("Mine", (DDPStrategy, DeepSpeedStrategy), {})


def test_an_unknown_name_is_an_error_that_names_the_nearest():
    with pytest.raises(ImportError):
        from raylight.utilities.types import STEP_OUTPT  # noqa: F401
    with pytest.raises(AttributeError, match="did you mean 'STEP_OUTPUT'"):
        _ = pl.utilities.types.STEP_OUTPT
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("raylight.utilities.nothing")
    with pytest.raises(AttributeError, match="no attribute 'utilitis'"):
        _ = pl.utilitis
    assert find_entry("utilities", "nothing") is None


def test_modules_list_their_names():
    assert "rank_zero_only" in dir(pl.utilities)
    names: dict[str, Any] = {}
    exec("from raylight.strategies import *", names)
    assert "DDPStrategy" in names


def test_making_the_modules_costs_an_import_of_raylight_next_to_nothing():
    program = "import sys, raylight; print([n for n in sys.modules if n in ('torch', 'yaml')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_string_of_lightnings_strategy_is_taken_or_refused_with_its_reason():
    from pytorch_lightning.strategies import StrategyRegistry

    taken = []
    for name in StrategyRegistry.available_strategies():
        why = say_why_not(name)
        if why is None:
            pl.Trainer(strategy=name, num_workers=0, logger=False)
            taken.append(name)
        else:
            with pytest.raises(InvalidArguments) as caught:
                pl.Trainer(strategy=name, num_workers=0)
            assert why in str(caught.value)
    assert set(taken) >= {"ddp", "ddp_spawn", "ddp_notebook", "ddp_find_unused_parameters_false", "single_device"}
    assert not [start for start in STRATEGIES if start in taken]
    found = pl.Trainer(strategy="ddp_notebook_find_unused_parameters_true", num_workers=0)
    assert found.config.strategy.find_unused_parameters
