"""BatchSizeFinder: finds the largest batch size that fits before a run, and runs with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raylight.contract.config import Config
from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Loader, Value
from raylight.contract.rank_zero import rank_zero_info
from raylight.contract.task import Loaders
from raylight.tuner.attribute_holders import get_attribute, has_attribute, set_attribute
from raylight.tuner.batch_sizes import Mode, bisect, double
from raylight.tuner.rehearsal import Rehearsal, Rehearsing, as_rehearsing
from raylight.user.callback import Callback
from raylight.user.module import Module
from raylight.worker.diagnosis.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from raylight.user.trainer_names import TrainerNames

MODES = ("power", "binsearch")
FIELDS = {"fit": "train", "validate": "validate", "test": "test", "predict": "predict"}
"""The loader whose samples are counted."""


class BatchSizeFinder(Callback):
    """Makes `steps_per_trial` steps with batches of `init_val` samples on copies, then of twice as many, until one
    worker is out of memory; takes everything back, and runs with the largest size that fitted on all.

    `mode`: "power" doubles alone; "binsearch" then looks between the last two sizes, and takes `margin`, a share, off.
    At most `max_trials` sizes, and none above `max_val`. `batch_arg_name` is the attribute or hyperparameter of module
    or data module that its loaders are made with. `optimal_batch_size` is the result. A fit tries validation batches
    too. Processes that the system kills for memory are no error of memory here: the run fails.

    It works before any kind of run, on any number of workers. A hook of a subclass may call `scale_batch_size` in the
    middle of training in one process (`num_workers=0`); the new size counts once the loader is asked for again
    (`reload_dataloaders_every_n_epochs`).
    """

    SUPPORTED_MODES = MODES

    def __init__(
        self,
        mode: Mode = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> None:
        mistakes = []
        if str(mode).lower() not in MODES:
            mistakes.append(f"BatchSizeFinder: mode={mode!r}; allowed are {MODES}")
        for name, value in (
            ("steps_per_trial", steps_per_trial), ("init_val", init_val), ("max_trials", max_trials),
            ("max_val", max_val),
        ):  # fmt: skip
            if value < 1:
                mistakes.append(f"BatchSizeFinder: {name}={value} must be at least 1")
        if not 0 <= margin < 1:
            mistakes.append(f"BatchSizeFinder: margin={margin} must be at least 0 and below 1")
        if mistakes:
            raise InvalidArguments(mistakes)
        self._mode, self._steps_per_trial, self._init_val = str(mode).lower(), steps_per_trial, init_val
        self._max_trials, self._batch_arg_name, self._margin, self._max_val = (
            max_trials, batch_arg_name, margin, max_val,
        )  # fmt: skip
        self.optimal_batch_size: int | None = init_val

    def prepare_run(self, trainer: Rehearsing, stage: str, module: Module, loaders: Loaders) -> None:
        """Called in the caller's process before a run, while no worker has begun."""
        start = {"fit": "on_fit_start", "validate": "on_validation_start"}.get(stage, f"on_{stage}_start")
        if getattr(type(self), start) is getattr(BatchSizeFinder, start):
            self.search(trainer, stage, module, loaders)

    def search(self, trainer: Rehearsing, stage: str, module: Module, loaders: Loaders) -> None:
        """Finds the batch size, and sets it on module and data module."""
        name, rehearsal = self._batch_arg_name, Rehearsal(trainer, stage, module, loaders)
        self._check(stage, module, loaders)
        count = _SampleCount(stage)
        changes = self._limit(stage, trainer.config)

        def fits(size: int) -> bool:
            copied, data_module = rehearsal.copy()
            set_attribute(name, size, copied, data_module)
            try:
                rehearsal.run(copied, data_module, [count], changes)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                return False
            return True

        if self._mode == "power":
            size = double(fits, count.read, self._init_val, self._max_trials, self._max_val, rank_zero_info)
        else:
            size = bisect(
                fits, count.read, self._init_val, self._max_trials, self._max_val, self._margin, rank_zero_info
            )
        self.optimal_batch_size = size
        set_attribute(name, size, module, rehearsal.data_module)
        rank_zero_info(f"{name} is set to {size}")

    def _limit(self, stage: str, config: Config) -> dict[str, Value]:
        steps = self._steps_per_trial
        if stage != "fit":
            return {{"validate": "limit_val_batches"}.get(stage, f"limit_{stage}_batches"): steps}
        validates = bool(config.limit_val_batches)
        sanity = {"num_sanity_val_steps": steps if validates else 0}
        return {"max_steps": steps, "max_epochs": -1, "limit_val_batches": steps if validates else 0, **sanity}

    def _check(self, stage: str, module: Module, loaders: Loaders) -> None:
        name, given = self._batch_arg_name, getattr(loaders, FIELDS[stage])
        mistakes = []
        if given is not None:
            mistakes.append(
                f"scale_batch_size changes {name}, which a loader that was passed to {stage} does not follow: make the "
                "loader in the module or in a data module"
            )
        if not has_attribute(name, module, loaders.data_module):
            mistakes.append(f"scale_batch_size: neither module nor data module has {name}, nor have their hparams")
        elif not isinstance(get_attribute(name, module, loaders.data_module), int):
            mistakes.append(f"scale_batch_size: {name} is no whole number")
        if mistakes:
            raise InvalidArguments(mistakes)

    def scale_batch_size(self, trainer: TrainerNames, pl_module: Module) -> None:
        """Finds the batch size inside a hook of a fit, in one process, and sets it."""
        if trainer.world_size > 1 or not trainer.fitting:
            raise InvalidArguments(
                f"{type(self).__name__}: scale_batch_size in a hook works in a fit in one process; call "
                "Tuner(trainer).scale_batch_size(...) before it"
            )
        self.search(as_rehearsing(trainer), "fit", pl_module, Loaders(data_module=trainer.datamodule))

    def on_fit_start(self, trainer: TrainerNames, module: Module) -> None:
        """Override it, to search at another time."""

    def on_validation_start(self, trainer: TrainerNames, module: Module) -> None:
        """Override it, to search at another time."""

    def on_test_start(self, trainer: TrainerNames, module: Module) -> None:
        """Override it, to search at another time."""

    def on_predict_start(self, trainer: TrainerNames, module: Module) -> None:
        """Override it, to search at another time."""


class _SampleCount(Callback):
    """Counts the samples of the run's loaders on a worker."""

    def __init__(self, stage: str):
        self.stage = stage
        self.num_samples: int | None = None

    def read(self) -> int | None:
        return self.num_samples

    def setup(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        self.num_samples = None

    def on_train_start(self, trainer: TrainerNames, module: Module) -> None:
        self._count(trainer.train_dataloader)

    def on_validation_start(self, trainer: TrainerNames, module: Module) -> None:
        if self.stage == "validate":
            self._count(trainer.val_dataloaders)

    def on_test_start(self, trainer: TrainerNames, module: Module) -> None:
        self._count(trainer.test_dataloaders)

    def on_predict_start(self, trainer: TrainerNames, module: Module) -> None:
        self._count(trainer.predict_dataloaders)

    def _count(self, given: Loader) -> None:
        loaders = list(given.values()) if isinstance(given, dict) else given
        several = loaders if isinstance(loaders, list | tuple) else [loaders]
        data: list[Value] = [getattr(one, "dataset", None) for one in several]
        is_known = all(hasattr(one, "__len__") for one in data)
        self.num_samples = sum(len(one) for one in data) if is_known else None
