"""What is wrong with a sweep is told before its first trial, all of it at once."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from ray.tune.search.optuna import OptunaSearch
from torch import nn
from torch.utils.data import DataLoader

import raylight
from raylight.arguments.resolving import resolve
from raylight.arguments.scale import Available
from raylight.contract.errors import InvalidArguments
from raylight.tuning.mistakes import Plan, find_metric_mistake, find_mistakes, find_run_mistakes
from raylight.tuning.recipe import Recipe
from raylight.tuning.trial_resources import listed_scales
from raylight.tuning.trial_resources import plan as plan_room

LOADER = DataLoader([torch.ones(2)], batch_size=1)


class Net(raylight.Module):
    def __init__(self, lr: float = 0.1, hidden: int = 8):
        super().__init__()
        self.layer, self.lr = nn.Linear(2, 1), lr

    def training_step(self, batch: Any) -> Any:
        loss = self.layer(batch).mean()
        self.log("_".join(("train", "loss")), loss)
        return loss

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", self.layer(batch).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Needy(Net):
    def __init__(self, depth: int):
        super().__init__()


def make_plan(target: Any = Net, space: Any = None, **changes: Any) -> Plan:
    arguments = changes.pop("arguments", {})
    given: dict[str, Any] = {
        "num_samples": 1, "metric": "val_loss", "mode": "min", "scheduler": None, "search_alg": None,
        "max_concurrent_trials": None, **changes,
    }  # fmt: skip
    space = {"lr": tune.uniform(0, 1)} if space is None else space
    return Plan(Recipe(target, (LOADER, LOADER), arguments), space, **given)


CLONING = PopulationBasedTraining(hyperparam_mutations={"lr": [1, 2]})
CASES = [
    ({"mode": "mim"}, "mode must be 'min' or 'max'; 'mim' was given; did you mean 'min'?"),
    ({"metric": ""}, "metric must be the name of a logged value"),
    ({"num_samples": 0}, "num_samples must be a whole number of at least 1; 0 was given"),
    ({"max_concurrent_trials": 1.5}, "max_concurrent_trials must be a whole number"),
    ({"space": {}}, "space has nothing to search; give at least one"),
    ({"space": {"lr": 0.1}}, "space has nothing to search: lr=0.1 are fixed"),
    ({"space": [1]}, "space must be a dict with names as keys"),
    (
        {"space": {"hiden": tune.choice([1, 2])}},
        "space: nothing takes 'hiden', neither of Net, the trainer; did you mean hidden?",
    ),
    ({"space": {"precison": tune.choice([16, 32])}}, "nothing takes 'precison', neither of Net, the trainer; did you"),
    (
        {"space": {"max_epochs": tune.choice([1, 2])}, "arguments": {"max_epochs": 3}},
        "max_epochs is both in the space and an argument",
    ),
    ({"target": Needy, "space": {"max_epochs": tune.choice([1])}}, "Needy needs 'depth', and the space"),
    ({"target": Net()}, "a Net was given; pass the class"),
    ({"target": nn.Linear}, "Linear is no raylight.Module"),
    ({"target": 3}, "3 is neither a module class nor a function"),
    (
        {"scheduler": ASHAScheduler(metric="val_loss", mode="min")},
        "scheduler AsyncHyperBandScheduler sets metric='val_loss' and mode='min' too: leave metric and mode out there",
    ),
    ({"search_alg": OptunaSearch(metric="loss", mode="max")}, "OptunaSearch sets metric='loss' and mode='max' too"),
    ({"scheduler": ASHAScheduler}, "it is the class AsyncHyperBandScheduler: pass an instance"),
    ({"scheduler": "asha"}, "scheduler must be one of Ray Tune's objects; it is 'asha'"),
    ({"scheduler": CLONING, "search_alg": OptunaSearch()}, "PopulationBasedTraining changes configurations itself"),
]


@pytest.mark.parametrize(("changes", "text"), CASES)
def test_a_mistake_is_told(changes: dict[str, Any], text: str) -> None:
    [mistake] = find_mistakes(make_plan(**changes))
    assert text in mistake


def test_what_is_right_is_not_a_mistake() -> None:
    assert find_mistakes(make_plan(scheduler=ASHAScheduler(), search_alg=OptunaSearch())) == []
    assert find_mistakes(make_plan(space={"lr": 0.1}, scheduler=CLONING)) == []
    assert find_mistakes(make_plan(Needy, {"depth": tune.grid_search([1, 2])})) == []
    assert find_mistakes(make_plan(lambda config: Net(), {"anything": tune.choice([1])})) == []


def test_all_mistakes_come_at_once_and_before_ray_starts() -> None:
    """In a process of its own, which must not start a Ray."""
    program = """
import ray, raylight
from ray import tune
class Net(raylight.Module):
    pass
try:
    raylight.sweep(Net, {"x": tune.choice([1])}, num_samples=0, metric="val_loss", mode="mini", max_epoch=3,
        num_workers=-1)
except raylight.InvalidArguments as error:
    print(ray.is_initialized(), len(error.mistakes), error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts = ("mode must be", "num_samples must be", "nothing takes 'x'", "did you mean max_epochs", "num_workers must")
    for text in ("False 5", *texts):
        assert text in done.stdout


def test_the_first_trial_is_looked_at_as_fit_would() -> None:
    class Stepless(raylight.Module):
        pass

    plan = make_plan(Stepless, {"max_epochs": tune.choice([1])}, arguments={"fast_dev_run": True})
    mistakes = "\n".join(find_run_mistakes(plan, plan.recipe.make({"max_epochs": 1}), Available()))
    assert "Stepless has no training_step" in mistakes
    assert "fast_dev_run writes no version" in mistakes


def test_schedulers_that_clone_need_checkpoints() -> None:
    plan = make_plan(scheduler=CLONING, arguments={"checkpoint": False})
    [mistake] = find_run_mistakes(plan, plan.recipe.make({}), Available())
    assert "lets trials go on from checkpoints: checkpoint must not be False" in mistake


def test_drawing_a_configuration_uses_up_no_random_numbers() -> None:
    import numpy as np

    before = np.random.get_state()[1].tolist()
    mutations = {"momentum": tune.uniform(0, 1), "decay": [0.1, 0.2], "eps": lambda: 3}
    drawn = make_plan(scheduler=PopulationBasedTraining(hyperparam_mutations=mutations)).draw()
    assert np.random.get_state()[1].tolist() == before
    assert 0 <= drawn["lr"] <= 1
    assert 0 <= drawn["momentum"] <= 1
    assert (drawn["decay"], drawn["eps"]) == (0.1, 3)


@pytest.mark.parametrize("metric", ["val_loss", "train_loss", "val_loss/dataloader_idx_0"])
def test_a_metric_that_is_logged_is_found(metric: str) -> None:
    assert find_metric_mistake(metric, Recipe(Net, (LOADER, LOADER)).make({})) is None


def test_a_metric_that_is_never_logged_is_refused_with_those_that_were() -> None:
    made, before = Recipe(Net, (LOADER, LOADER)).make({}), torch.get_rng_state()
    mistake = find_metric_mistake("val_los", made)
    assert mistake is not None
    assert re.search(r"'val_los', which was never logged; logged were: train_loss, val_loss; did you mean", mistake)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_room_of_a_trial() -> None:
    cluster = Available(0, True, 4.0, 16.0)
    assert plan_room({}, cluster).bundles() == [{"CPU": 1.0, "GPU": 1.0}]
    assert plan_room({"use_gpu": False}, cluster).bundles() == [{"CPU": 1.0}]
    two = plan_room({"num_workers": 2, "resources_per_worker": {"CPU": 2}, "use_gpu": False}, cluster)
    assert two.bundles() == [{}, {"CPU": 2.0}, {"CPU": 2.0}]
    assert two.resized([{"CPU": 2.0}] * 3).arguments()["num_workers"] == 3
    assert plan_room({"devices": 2, "accelerator": "cpu"}, cluster).bundles() == [{}, {"CPU": 1.0}, {"CPU": 1.0}]
    assert plan_room({"accelerator": "cpu"}, cluster).bundles() == [{"CPU": 1.0}]
    assert plan_room({"num_workers": "auto"}, Available(0, "10.0.0.1:6379")).num_workers == 1
    asked = {"devices": 2, "accelerator": "cpu"}
    assert resolve(asked | two.arguments(), cluster).num_workers == 2
    with pytest.raises(InvalidArguments, match="one of the same size for each worker"):
        two.resized([{"CPU": 1.0}, {"CPU": 2.0}])
    with pytest.raises(InvalidArguments, match="say one number"):
        plan_room({"num_workers": (1, 2)}, cluster)


def test_all_rooms_that_a_space_may_ask_for_are_known_beforehand() -> None:
    assert listed_scales({"lr": tune.uniform(0, 1)}) == [{}]
    assert listed_scales({"num_workers": tune.choice([1, 4])}) == [{"num_workers": 1}, {"num_workers": 4}]
    assert listed_scales({"num_workers": tune.randint(1, 4)}) == [{"num_workers": 3}]
    grid, drawn = tune.grid_search([1, 2]), tune.sample_from(lambda spec: {"CPU": 2})
    assert listed_scales({"num_workers": grid, "use_gpu": False, "resources_per_worker": drawn}) == [
        {"num_workers": 1, "use_gpu": False}, {"num_workers": 2, "use_gpu": False},
    ]  # fmt: skip


@pytest.mark.parametrize("first", ["import raylight", "import raylight.sweep", "from raylight.sweep import trainable"])
def test_raylight_sweep_can_be_called_whatever_was_imported_first(first: str) -> None:
    program = f"""
{first}
import inspect, raylight
from raylight import sweep
assert raylight.sweep is sweep and callable(raylight.sweep) and callable(raylight.sweep.trainable)
assert "num_samples" in inspect.signature(raylight.sweep).parameters
try:
    raylight.sweep(int, {{}}, num_samples=1, metric="m", mode="min")
except raylight.InvalidArguments as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "int is no raylight.Module" in done.stdout
