"""Which key of the space goes where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

import raylight
from raylight.contract.errors import InvalidArguments
from raylight.tuning.best_trial import write_code
from raylight.tuning.recipe import Recipe, Shape, as_loaders


class Net(raylight.Module):
    def __init__(self, lr: float, hidden: int = 8):
        super().__init__()
        self.given = {"lr": lr, "hidden": hidden}


class Greedy(raylight.Module):
    def __init__(self, **options: Any):
        super().__init__()
        self.given = options


class Digits(raylight.DataModule):
    def __init__(self, batch_size: int = 32):
        self.batch_size = batch_size


def make_loaders(config: dict[str, Any]) -> list[DataLoader]:
    return [DataLoader([1.0], batch_size=config["batch_size"])]


CONFIG = {"lr": 0.1, "precision": "64-true", "batch_size": 4}


def test_each_key_goes_to_who_takes_it() -> None:
    made = Recipe(Net, Digits, {"max_epochs": 3}).make(CONFIG)
    assert made.module.given == {"lr": 0.1, "hidden": 8}
    assert made.loaders.data_module.batch_size == 4
    assert made.arguments == {"max_epochs": 3, "precision": "64-true"}


def test_a_function_as_data_gets_the_whole_configuration() -> None:
    made = Recipe(Net, make_loaders).make(CONFIG)
    assert made.loaders.train.batch_size == 4
    assert Recipe(Net, make_loaders).find_untaken({**CONFIG, "anything": 1}) == []


def test_a_key_that_two_take_goes_to_both() -> None:
    class Scheduled(Net):
        def __init__(self, max_epochs: int):
            super().__init__(lr=0.1)
            self.planned = max_epochs

    made = Recipe(Scheduled).make({"max_epochs": 5})
    assert made.module.planned == made.arguments["max_epochs"] == 5


def test_keyword_arguments_get_what_nobody_else_takes() -> None:
    made = Recipe(Greedy, Digits).make({**CONFIG, "depth": 3})
    assert made.module.given == {"lr": 0.1, "depth": 3}


def test_where_the_run_lies_is_not_a_trials_to_say() -> None:
    made = Recipe(Greedy).make({"name": "inner"})
    assert made.module.given == {"name": "inner"}
    assert "name" not in made.arguments


def test_a_function_returns_module_data_and_arguments() -> None:
    data = Digits(16)
    recipe = Recipe(lambda config: (Net(config["lr"]), data, {"precision": "64-true"}), None, {"max_epochs": 2})
    made = recipe.make(CONFIG)
    assert made.module.given["lr"] == 0.1
    assert made.loaders.data_module is data
    assert made.arguments == {"max_epochs": 2, "precision": "64-true"}
    assert Recipe(lambda config: Net(config["lr"]), make_loaders).make(CONFIG).loaders.train.batch_size == 4


@pytest.mark.parametrize("name", ["num_workers", "storage_path"])
def test_a_function_cannot_say_what_is_reserved_for_it(name: str) -> None:
    with pytest.raises(InvalidArguments, match=f"returned {name}: pass these to raylight.sweep"):
        Recipe(lambda config: (Net(0.1), None, {name: 2})).make({})


def test_what_nothing_takes_and_what_is_missing_is_found() -> None:
    assert Recipe(Net, Digits).find_untaken({**CONFIG, "hiden": 3}) == ["hiden"]
    assert Recipe(Net).find_missing({"hidden": 3}) == ["lr"]


def test_data_as_fit_takes_it() -> None:
    one, two = DataLoader([1.0]), DataLoader([2.0])
    assert as_loaders((one, two)).validate is two
    assert as_loaders(one).train is one
    assert as_loaders(Digits()).data_module.batch_size == 32
    assert as_loaders(None).train is None


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (Digits, "datamodule=Digits(batch_size=4), "),
        (lambda config: Digits(), "function({'lr': 0.1, 'precision': '64-true', 'batch_size': 4}), "),
        (make_loaders, "*make_loaders({'lr': 0.1, 'precision': '64-true', 'batch_size': 4}), "),
        ((DataLoader([1.0]),), "*data, "),
        (None, ""),
    ],
)
def test_the_line_that_trains_it_again(data: Any, shown: str) -> None:
    recipe = Recipe(Net, data)
    code = write_code(recipe, CONFIG, {"max_epochs": 3, "callbacks": [object()]}, recipe.make(CONFIG).shape)
    assert code == f"raylight.fit(Net(lr=0.1), {shown}max_epochs=3, callbacks=[...], precision='64-true')"
    compile(code, "<code>", "eval")


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        ((0, (1,), {}), "module, data, arguments = make({'lr': 0.1}); fit(module, *data, seed=3, **arguments)"),
        ((0, Digits(), None), "module, data, arguments = make({'lr': 0.1}); fit(module, data, seed=3)"),
        ((0, [1]), "module, data = make({'lr': 0.1}); fit(module, *data, seed=3)"),
        ((0, None, {}), "module, data, arguments = make({'lr': 0.1}); fit(module, *data, seed=3, **arguments)"),
        (0, "fit(make({'lr': 0.1}), *data, seed=3)"),
    ],
)  # fmt: skip
def test_the_line_calls_a_function_as_it_returns(returned: Any, shown: str) -> None:
    def make(config: dict[str, Any]) -> Any:
        return returned

    recipe = Recipe(make, (1, 2))
    code = write_code(recipe, {"lr": 0.1}, {"seed": 3}, recipe.make({"lr": 0.1}).shape)
    assert code == shown.replace("fit(", "raylight.fit(")


def test_the_line_shows_numbers_of_numpy_and_paths_as_a_person_writes_them(tmp_path: Path) -> None:
    given = {"storage_path": tmp_path, "seed": np.int64(3)}
    code = write_code(Recipe(Net), {"lr": np.float64(0.1), "hidden": np.int32(4)}, given, Shape())
    assert code == f"raylight.fit(Net(lr=0.1, hidden=4), storage_path={str(tmp_path)!r}, seed=3)"
