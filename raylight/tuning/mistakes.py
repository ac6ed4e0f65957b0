"""Mistakes in the arguments of a sweep, found before its first trial."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from ray.tune.schedulers import HyperBandScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import ConcurrencyLimiter, SearchAlgorithm, Searcher
from ray.tune.search.variant_generator import generate_variants, parse_spec_vars

from raylight.arguments import checks
from raylight.arguments.resolving import resolve
from raylight.arguments.rules import RULES, as_list, say_nearest
from raylight.arguments.scale import Available
from raylight.contract.errors import InvalidArguments, NotEnoughResources
from raylight.contract.seeding import isolate_rng
from raylight.trainer import Trainer
from raylight.tuning.recipe import SCALE_ARGUMENTS, Made, Recipe
from raylight.user.module import Module

_EXAMPLE = "{'lr': tune.loguniform(1e-4, 1e-1), 'hidden': tune.choice([32, 64])}"
_ARRIVES_AS = ("_epoch", "_step")
"""Endings of a logged name that the code does not say."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The arguments of a sweep."""

    recipe: Recipe
    space: Mapping[str, object]
    num_samples: int
    metric: str
    mode: str
    scheduler: TrialScheduler | None
    search_alg: Searcher | SearchAlgorithm | None
    max_concurrent_trials: int | None

    @property
    def mutated(self) -> Mapping[str, object]:
        """The keys that the scheduler varies by itself."""
        return getattr(self.scheduler, "_hyperparam_mutations", None) or {}

    @property
    def searcher_brings_space(self) -> bool:
        searcher = getattr(self.search_alg, "searcher", self.search_alg)
        return bool(getattr(searcher, "_space", None))

    def draw(self) -> dict[str, object]:
        """One configuration, without using up random numbers that the sweep would draw."""
        varied = {key: value for key, value in self.mutated.items() if key not in self.space}
        fixed = {key: _first(value) for key, value in varied.items()}
        drawn = next(generate_variants({"config": {**self.space}}, random_state=np.random.RandomState(0)))[1]["config"]
        return {**drawn, **fixed}


def find_mistakes(plan: Plan) -> list[str]:
    """Of the arguments by themselves; nothing of the user's is called but what draws a configuration."""
    mistakes = _find_in_target(plan.recipe.target)
    if plan.mode not in ("min", "max"):
        near = difflib.get_close_matches(str(plan.mode).lower(), ("min", "max"), n=1, cutoff=0.3)
        advice = f"; did you mean {near[0]!r}?" if near else ""
        mistakes.append(f"mode must be 'min' or 'max'; {plan.mode!r} was given{advice}")
    if not isinstance(plan.metric, str) or not plan.metric:
        mistakes.append(f"metric must be the name of a logged value, such as 'val_loss'; {plan.metric!r} was given")
    counts = {"num_samples": plan.num_samples, "max_concurrent_trials": plan.max_concurrent_trials}
    for name, value in counts.items():
        if name == "max_concurrent_trials" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            mistakes.append(f"{name} must be a whole number of at least 1; {value!r} was given")
    mistakes += _find_in_tune_objects(plan)
    if isinstance(plan.space, Mapping) and all(isinstance(key, str) for key in plan.space):
        return mistakes + ([] if _find_in_target(plan.recipe.target) else _find_in_space(plan))
    return [*mistakes, f"space must be a dict with names as keys, such as {_EXAMPLE}; {plan.space!r} was given"]


def _find_in_target(target: object) -> list[str]:
    if isinstance(target, type):
        if issubclass(target, Module):
            return []
        is_lightning = any(kind.__name__ == "LightningModule" for kind in target.__mro__)
        advice = ": change its import to `import raylight as pl`" if is_lightning else ""
        return [f"{target.__qualname__} is no raylight.Module{advice}"]
    if isinstance(target, torch.nn.Module):
        return [f"a {type(target).__qualname__} was given; pass the class, whose arguments the space fills"]
    if not callable(target):
        return [f"{target!r} is neither a module class nor a function config -> (module, data, trainer arguments)"]
    return []


def _find_in_tune_objects(plan: Plan) -> list[str]:
    mistakes = []
    kinds: tuple[tuple[str, object, type | tuple[type, ...]], ...] = (
        ("scheduler", plan.scheduler, TrialScheduler), ("search_alg", plan.search_alg, (Searcher, SearchAlgorithm))
    )  # fmt: skip
    for name, given, kind in kinds:
        if given is None:
            continue
        if not isinstance(given, kind):
            what = f"the class {given.__name__}: pass an instance" if isinstance(given, type) else repr(given)
            mistakes.append(f"{name} must be one of Ray Tune's objects; it is {what}")
            continue
        inner = getattr(given, "searcher", getattr(given, "_base_scheduler", given))
        twice = [word for word in ("metric", "mode") if getattr(inner, f"_{word}", None)]
        if twice:
            words = " and ".join(f"{word}={getattr(inner, f'_{word}')!r}" for word in twice)
            mistakes.append(
                f"{name} {type(inner).__name__} sets {words} too: leave {' and '.join(twice)} out there, "
                f"raylight.sweep(metric={plan.metric!r}, mode={plan.mode!r}) tells it"
            )
    if plan.max_concurrent_trials and isinstance(plan.search_alg, ConcurrencyLimiter):
        mistakes.append("max_concurrent_trials and a ConcurrencyLimiter both limit the trials: pass one of them")
    if plan.search_alg is not None and isinstance(plan.scheduler, PopulationBasedTraining):
        mistakes.append(
            f"{type(plan.scheduler).__name__} changes configurations itself, which {type(plan.search_alg).__name__} "
            "would not know: pass one of them"
        )
    return mistakes


def _find_in_space(plan: Plan) -> list[str]:
    recipe, mistakes = plan.recipe, []
    _, domains, grids = parse_spec_vars({"config": dict(plan.space)})
    if not (domains or grids or plan.mutated or plan.searcher_brings_space):
        keys = f": {', '.join(f'{key}={value!r}' for key, value in plan.space.items())} are fixed" if plan.space else ""
        mistakes.append(f"space has nothing to search{keys}; give at least one of Tune's domains, such as {_EXAMPLE}")
    keys_of_all = {**plan.space, **plan.mutated}
    for key in recipe.find_untaken(keys_of_all):
        takers = f"{recipe.name}, the trainer" + (" and the data module" if isinstance(recipe.data, type) else "")
        mistakes.append(f"space: nothing takes {key!r}, neither of {takers}{say_nearest(key, recipe.known_keys())}")
    for key in keys_of_all:
        if key in recipe.arguments and recipe.is_class:
            mistakes.append(f"{key} is both in the space and an argument: leave one out")
    if isinstance(recipe.target, type) and not plan.searcher_brings_space:
        missing = recipe.find_missing(keys_of_all)
        mistakes += [f"{recipe.name} needs {name!r}, and the space does not give it" for name in missing]
    return mistakes


def find_run_mistakes(plan: Plan, made: Made, available: Available) -> list[str]:
    """Of the trial that one configuration gives, as `raylight.fit` would find them."""
    mistakes: list[str] = []
    without_scale = {name: value for name, value in made.arguments.items() if name not in SCALE_ARGUMENTS}
    callbacks = as_list(made.arguments.get("callbacks"))
    if made.arguments.get("fast_dev_run"):
        mistakes.append("fast_dev_run writes no version, and a trial is one: use limit_train_batches and max_epochs")
    try:
        config = resolve({**without_scale, "num_workers": 0, "use_gpu": False}, available)
    except InvalidArguments as error:
        return mistakes + error.mistakes
    mistakes += checks.check_run("fit", made.module, made.loaders, config, callbacks)
    pauses = isinstance(plan.scheduler, (PopulationBasedTraining, HyperBandScheduler))
    if pauses and (config.checkpoint is None or config.checkpoint.save_weights_only):
        mistakes.append(
            f"{type(plan.scheduler).__name__} lets trials go on from checkpoints: checkpoint must not be False, nor "
            "save_weights_only=True"
        )
    return mistakes


def find_metric_mistake(metric: str, made: Made) -> str | None:
    """Whether `metric` is never logged: looked up in the code of the module and the callbacks, and if it is not
    there, because names may be put together, by training and validating on one batch in this process, on the CPU.

    Raises whatever the user's code raises."""
    callbacks = as_list(made.arguments.get("callbacks"))
    spellings = {metric.removesuffix(ending) for ending in ("", *_ARRIVES_AS)}
    spellings.add(metric.partition("/dataloader_idx_")[0])
    if spellings & set(_constants_of([made.module, *callbacks])):
        return None
    logged = _log_one_batch(made, callbacks)
    return None if metric in logged else checks.say_unknown_metric(metric, logged, "raylight.sweep")


def _constants_of(owners: Sequence[object]) -> Iterator[str]:
    for owner in owners:
        for kind in type(owner).__mro__:
            if kind.__module__.split(".")[0] in ("torch", "builtins"):
                continue
            for member in vars(kind).values():
                if isinstance(member, FunctionType):
                    yield from _strings_in(member.__code__)


def _strings_in(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _strings_in(constant)


def _log_one_batch(made: Made, callbacks: Sequence[object]) -> list[str]:
    kept = {name: value for name, value in made.arguments.items() if name in RULES and name not in SCALE_ARGUMENTS}
    quiet = {
        "fast_dev_run": 1, "num_workers": 0, "use_gpu": False, "logger": False, "callbacks": callbacks,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    trainer, loaders = Trainer(**{**kept, **quiet}), made.loaders
    with isolate_rng():
        trainer.fit(made.module, loaders.train, loaders.validate, loaders.data_module)
    return list(trainer.callback_metrics)


def _first(mutation: Any) -> Any:
    """A value of one of PBT's mutations: a list, a function, a domain of Tune or bounds."""
    if isinstance(mutation, Mapping):
        return {key: _first(value) for key, value in mutation.items()}
    if isinstance(mutation, (list, tuple)):
        return mutation[0]
    if callable(mutation):
        return mutation()
    return mutation.sample(random_state=np.random.RandomState(0))


def say_all_failed(errors: list[BaseException]) -> BaseException:
    """The error if not one trial came to an end."""
    cause = next((error for error in errors if isinstance(error, (InvalidArguments, NotEnoughResources))), None)
    return cause or errors[0]
