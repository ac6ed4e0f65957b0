"""Hyperparameter sweeps with Ray Tune, in which every trial may be distributed.

The module itself can be called: `raylight.sweep(...)` is `raylight.sweep.sweep(...)`.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import types
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

from raylight.arguments.resolving import resolve
from raylight.arguments.rules import as_list
from raylight.arguments.signatures import passes_on_keywords_of
from raylight.arguments.trainer_arguments import TrainerArguments
from raylight.contract.config import Checkpointing, Config
from raylight.contract.errors import InvalidArguments, NotEnoughResources, RaylightError
from raylight.contract.plain_numbers import to_python
from raylight.contract.plain_text import to_utf8
from raylight.contract.seeding import isolate_rng
from raylight.storage.filesystem import Storage
from raylight.storage.location import locate
from raylight.storage.remote_files import RemoteFiles
from raylight.storage.retry import Backoff
from raylight.trainer import Trainer, find_available
from raylight.tuning.recipe import SCALE_ARGUMENTS, Made, Recipe, Shape

if TYPE_CHECKING:
    from ray.tune import ResultGrid, Tuner

    from raylight.tuning.mistakes import Plan
    from raylight.tuning.trial import Trial
    from raylight.tuning.watcher import Watcher

PAGE = "sweep.html"
# A killed sweep loses what came after Tune's newest note: by default up to 10 s.
NOTE_EVERY_S = "2"


@passes_on_keywords_of(Trainer)
def sweep(
    module_or_function: Callable[..., Any], space: Mapping[str, Any] | None = None, *, num_samples: int, metric: str,
    mode: str, data: Any = None, scheduler: Any = None, search_alg: Any = None,
    max_concurrent_trials: int | None = None, resume: bool = False, **trainer_arguments: Unpack[TrainerArguments],
) -> ResultGrid:  # fmt: skip
    """Trains `num_samples` configurations drawn from `space` and returns Ray Tune's ResultGrid, whose
    `get_best_result()` is the trial that holds the best checkpoint.

    `module_or_function`: a module class, whose arguments the space fills, or a function `config -> (module, data,
    trainer arguments)`. Keys of the space that are trainer arguments, or arguments of a DataModule class, go there.
    `data`: a DataModule (class or instance), a tuple of loaders, or a function of the configuration that returns one.
    `scheduler` and `search_alg`: any of Tune's, without metric and mode. `resume`: goes on with the newest sweep of
    this run from where it was killed. Each trial is a version of the run `name`; workers of a trial are reserved
    together with its driver.

    Raises InvalidArguments or NotEnoughResources before the first trial, and the first error if all trials failed.
    """
    from raylight.tuning.mistakes import Plan, find_mistakes
    from raylight.tuning.results import SweepResults

    arguments: dict[str, Any] = {**trainer_arguments}
    recipe = Recipe(module_or_function, data, arguments)
    counts = to_python(num_samples), to_python(max_concurrent_trials)
    plan = Plan(recipe, space or {}, counts[0], metric, mode, scheduler, search_alg, counts[1])
    mistakes = find_mistakes(plan) + _find_argument_mistakes(arguments)
    if mistakes:
        raise InvalidArguments(mistakes)
    trial_class = trainable(
        module_or_function, data=data, metric=metric, mode=mode, space=plan.space, **trainer_arguments
    )
    shape = _check_first_trial(plan, trial_class)
    config, run = resolve(_without_scale(arguments), find_available({})), trial_class.run_storage
    with _tune_environment():
        watcher, tuner, folder = _make_tuner(plan, trial_class, config, run, resume)
        try:
            results = SweepResults.of(tuner.fit(), metric, mode)
        finally:
            watcher.close()
    _raise_if_all_failed(results)
    _report(plan, shape, results, watcher, run, folder)
    return results


@passes_on_keywords_of(Trainer)
def trainable(
    module_or_function: Callable[..., Any], *, data: Any = None, metric: str | None = None, mode: str = "min",
    space: Mapping[str, Any] | None = None, **trainer_arguments: Unpack[TrainerArguments],
) -> type[Trial]:  # fmt: skip
    """The same trials as a class for a `ray.tune.Tuner` of your own, with all of Tune's schedulers and options.

    Give `TuneConfig(reuse_actors=True)`, so that workers are kept from one trial to the next. `metric` and `mode`
    choose the best checkpoint of a trial. Give `space` if trials may differ in `num_workers` or the like.

    Raises InvalidArguments, or NotEnoughResources if one of these trials could never run on this cluster.
    """
    from raylight.tuning.trial import Shipment, Trial

    recipe = Recipe(module_or_function, data, _complete(trainer_arguments, metric, mode))
    scale = {name: recipe.arguments[name] for name in SCALE_ARGUMENTS if name in recipe.arguments}
    _connect(scale, (space or {}) if recipe.is_class else {})
    attributes = {
        "shipment": Shipment(recipe), "run_storage": _find_run(recipe.arguments), "scale": scale, "metric": metric,
        "session": uuid.uuid4().hex, "takes_scale_from_space": recipe.is_class, "__module__": __name__,
    }  # fmt: skip
    return type(recipe.name, (Trial,), attributes)


# ---- before


def _find_argument_mistakes(arguments: dict[str, Any]) -> list[str]:
    from raylight.tuning.trial_resources import plan as plan_room

    mistakes: list[str] = []
    checks: tuple[Callable[[], Any], ...] = (
        lambda: resolve(_without_scale(arguments), find_available({})),
        lambda: plan_room(arguments, find_available(arguments)),
    )
    for check in checks:
        try:
            check()
        except InvalidArguments as error:
            mistakes += error.mistakes
        except NotEnoughResources:  # the cluster that this asks for is not there yet
            continue
    return mistakes


def _without_scale(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Mistakes that can be found before there is a cluster."""
    kept = {name: value for name, value in arguments.items() if name not in SCALE_ARGUMENTS}
    return {**kept, "num_workers": 0, "use_gpu": False}


def _complete(arguments: Mapping[str, Any], metric: str | None, mode: str) -> dict[str, Any]:
    """The trainer's arguments, adapted to trials: no bars of their own, the best checkpoint by the sweep's metric, and
    an absolute path."""
    config = resolve(_without_scale(arguments), find_available({}))
    given = {name: value for name, value in arguments.items() if name != "default_root_dir"}
    completed = {
        "enable_progress_bar": False, "enable_model_summary": False, "num_standby": 0, **given,
        "storage_path": config.storage_path, "name": config.name,
    }  # fmt: skip
    says_when = any(hasattr(callback, "checkpointing") for callback in as_list(arguments.get("callbacks")))
    if metric is not None and config.checkpoint is not None and config.checkpoint.monitor is None and not says_when:
        completed["checkpoint"] = replace(config.checkpoint or Checkpointing(), monitor=metric, mode=mode)
    return completed


def _connect(scale: dict[str, Any], space: Mapping[str, Any]) -> None:
    """Connects to a Ray that has room for each trial that the space may give, so that none waits forever."""
    from raylight.launch import ray_cluster
    from raylight.tuning.trial_resources import listed_scales
    from raylight.tuning.trial_resources import plan as plan_room

    rooms = [plan_room(asked, find_available(asked)) for asked in (scale | listed for listed in listed_scales(space))]
    largest = max(rooms, key=lambda room: room.num_workers)
    cluster = ray_cluster.connect(Config(num_workers=max(largest.num_workers, 1), resources_per_worker=largest.worker))
    for room in rooms:
        ray_cluster.check_room(cluster, max(room.num_workers, 1), room.worker, room.strategy)


def _find_run(arguments: Mapping[str, Any]) -> Storage:
    return Storage(arguments["storage_path"], arguments.get("storage_filesystem")).child(arguments["name"])


def _check_first_trial(plan: Plan, trial_class: type[Trial]) -> Shape:
    """Makes the trial of one configuration without training it, and checks that there is room for it."""
    from raylight.launch import ray_cluster
    from raylight.tuning.mistakes import find_metric_mistake, find_run_mistakes

    drawn = None if plan.searcher_brings_space else plan.draw()
    room = trial_class.plan_room(drawn or {})
    cluster = ray_cluster.connect()
    ray_cluster.check_room(cluster, max(room.num_workers, 1), room.worker, room.strategy)
    if drawn is None:
        return Shape()
    try:
        with isolate_rng():
            made: Made = trial_class.shipment.open().make(drawn)
    except RaylightError:
        raise
    except Exception as error:
        _say(f"the configuration {drawn} fails ({type(error).__name__}: {error}); the trials show whether others do")
        return Shape()
    mistakes = find_run_mistakes(plan, made, find_available({}))
    if mistakes:
        raise InvalidArguments(mistakes)
    try:
        mistake = find_metric_mistake(plan.metric, made)
    except Exception as error:
        cause = getattr(error, "cause", None) or error
        _say(f"one batch could not be tried here ({type(cause).__name__}: {cause}); the trials show what is wrong")
        return made.shape
    if mistake is not None:
        raise InvalidArguments(mistake)
    return made.shape


def _say(text: str) -> None:
    print(f"raylight: {text}", flush=True)


# ---- Ray Tune


@contextmanager
def _tune_environment() -> Iterator[None]:
    """Sets the variables that Tune reads. raylight writes TensorBoard's files itself, in each trial's version, and
    shows trials and errors in its own table."""
    said_already = lambda record: not str(record.msg).startswith("Trials did not complete")  # noqa: E731
    logging.getLogger("ray.tune.tune").addFilter(said_already)
    wanted = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_GLOBAL_CHECKPOINT_S": NOTE_EVERY_S,
        "RAY_AIR_NEW_OUTPUT": "0", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    }  # fmt: skip
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        logging.getLogger("ray.tune.tune").removeFilter(said_already)
        for name in added:
            os.environ.pop(name, None)


def _make_tuner(
    plan: Plan, trial_class: type[Trial], config: Config, run: Storage, resume: bool
) -> tuple[Watcher, Tuner, str]:
    """A new Tuner with its folder in the run, or the resumed one; and its watcher."""
    from ray import tune
    from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback
    from ray.tune.schedulers import ResourceChangingScheduler
    from ray.tune.search import BasicVariantGenerator

    from raylight.tuning.watcher import Watcher

    location = locate(config.storage_path, config.storage_filesystem, Backoff())
    filesystem = location.files.filesystem(streaming=True) if isinstance(location.files, RemoteFiles) else None
    root = f"{location.root}/{config.name}"
    if resume:
        folder = _find_newest(run)
        if folder is not None:
            tuner = tune.Tuner.restore(
                f"{root}/{folder}", trial_class, resume_errored=True, storage_filesystem=filesystem
            )
            assert tuner._local_tuner is not None
            unpickled = tuner._local_tuner.get_run_config().callbacks or []
            return next(one for one in unpickled if isinstance(one, Watcher)), tuner, folder
        _say(f"resume=True: run {config.name!r} in {config.storage_path} has no sweep yet, so a new one starts")
    folder = _claim_folder(run)
    search_alg, seed = plan.search_alg, plan.recipe.arguments.get("seed")
    if search_alg is None and seed is not None:  # so that the same call draws the same configurations
        search_alg = BasicVariantGenerator(max_concurrent=plan.max_concurrent_trials or 0, random_state=seed)
    watcher = Watcher(plan.metric, plan.mode, plan.num_samples, plan.recipe.arguments.get("enable_progress_bar", True))
    tuner = tune.Tuner(
        trial_class,
        param_space=dict(plan.space),
        tune_config=tune.TuneConfig(
            metric=plan.metric,
            mode=plan.mode,
            num_samples=plan.num_samples,
            scheduler=plan.scheduler,
            search_alg=search_alg,
            max_concurrent_trials=None if search_alg is not plan.search_alg else plan.max_concurrent_trials,
            # Tune does not allow it if actors change their size.
            reuse_actors=not isinstance(plan.scheduler, ResourceChangingScheduler),
            trial_dirname_creator=str,
        ),
        run_config=tune.RunConfig(
            name=folder,
            storage_path=root,
            storage_filesystem=filesystem,
            callbacks=[watcher, CSVLoggerCallback(), JsonLoggerCallback()],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True),
            failure_config=tune.FailureConfig(max_failures=config.max_restarts),
            verbose=0,
        ),
    )
    return watcher, tuner, folder


def _claim_folder(run: Storage) -> str:
    """The folder of Tune's files of this sweep, `sweep_0`, `sweep_1` and so on, beside the versions."""
    taken = [name for name in run.claimed_names() if name.startswith("sweep_")]
    number = len(taken)
    while run.claim_directory(f"sweep_{number}"):
        number += 1
    return f"sweep_{number}"


def _find_newest(run: Storage) -> str | None:
    """The newest sweep that can be resumed."""
    numbers = [int(name[6:]) for name in run.claimed_names() if name.startswith("sweep_") and name[6:].isdigit()]
    return next((f"sweep_{n}" for n in sorted(numbers, reverse=True) if run.exists(f"sweep_{n}/tuner.pkl")), None)


# ---- after


def _raise_if_all_failed(results: ResultGrid) -> None:
    from raylight.tuning.mistakes import say_all_failed

    if results.num_errors and results.num_errors == len(results):
        causes = [getattr(error, "cause", None) or error for error in results.errors]
        raise say_all_failed(causes)


def _report(plan: Plan, shape: Shape, results: ResultGrid, watcher: Watcher, run: Storage, folder: str) -> None:
    """Writes the picture, and prints the results."""
    from raylight.report.sweep_page import make_page
    from raylight.tuning.best_trial import find_best, summarize, write_code

    state = watcher.state
    if state is None:
        return
    run.child(folder).write(PAGE, [to_utf8(make_page(state, f"{run.name}, {folder}")).encode()])
    best = find_best(results, plan.metric)
    code = write_code(plan.recipe, best.config or {}, plan.recipe.arguments, shape) if best is not None else ""
    metrics = best.metrics if best is not None else None
    print("\n" + summarize(state, metrics, code, run.uri, run.uri_of(f"{folder}/{PAGE}")), flush=True)


# ---- raylight.sweep is this module, and can be called


class _CallableModule(types.ModuleType):
    __signature__ = inspect.signature(sweep)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return sweep(*arguments, **keywords)


sys.modules[__name__].__class__ = _CallableModule
