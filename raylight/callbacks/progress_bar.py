"""The names of Lightning's progress bars. The bar itself is drawn by the driver's console."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raylight.callbacks.mistake_list import Mistakes
from raylight.contract.kinds import Value
from raylight.contract.plain_numbers import to_python
from raylight.user.callback import Callback

if TYPE_CHECKING:
    from raylight.user.module import Module
    from raylight.user.trainer_names import TrainerNames


UNCALLED = (
    "init_sanity_tqdm", "init_train_tqdm", "init_validation_tqdm", "init_test_tqdm", "init_predict_tqdm",
    "configure_columns", "refresh",
)  # fmt: skip
"""Methods by which Lightning's bars are drawn."""


class ProgressBar(Callback):
    """The base class of a progress bar of your own; its hooks run on every worker like those of any callback.

    raylight's console draws its bar on the driver whether or not one of these is given: `refresh_rate=0` and
    `disable()` before the run turn it off, as `enable_progress_bar=False` does.
    """

    def __init__(self, refresh_rate: int = 1):
        mistakes = Mistakes(type(self).__name__)
        mistakes.require_count("refresh_rate", refresh_rate, 0)
        mistakes.refuse_overrides(
            self, UNCALLED, "the bar is drawn in the driver; subclass ProgressBar to draw your own"
        )
        mistakes.raise_any()
        self.refresh_rate = to_python(refresh_rate)
        self._enabled = True
        self._trainer: TrainerNames | None = None

    def setup(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        self._trainer = trainer

    def teardown(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        self._trainer = None

    @property
    def trainer(self) -> TrainerNames:
        """The trainer of the run that is on; raises RuntimeError outside of one."""
        if self._trainer is None:
            raise RuntimeError(f"{type(self).__name__}.trainer is there in a run alone")
        return self._trainer

    @property
    def total_train_batches(self) -> int | float:
        """Batches of an epoch of training."""
        return self.trainer.num_training_batches

    @property
    def total_val_batches(self) -> int | float:
        """Batches of all validation loaders together; 0 in an epoch without validation."""
        every = self.trainer.check_val_every_n_epoch
        if self.trainer.fitting and every is not None and (self.trainer.current_epoch + 1) % every:
            return 0
        return sum(self.trainer.num_val_batches)

    @property
    def is_enabled(self) -> bool:
        return self._enabled and self.refresh_rate > 0

    @property
    def is_disabled(self) -> bool:
        return not self.is_enabled

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def print(self, *args: object, **options: Value) -> None:
        """Print above the bar: what a worker prints reaches the console that draws it."""
        print(*args, **options)

    def get_metrics(self, trainer: TrainerNames, module: Module) -> dict[str, int | str | float]:
        """The values logged with `prog_bar=True`. Reads them from the device."""
        return {name: float(value) for name, value in trainer.progress_bar_metrics.items()}


def get_standard_metrics(trainer: TrainerNames) -> dict[str, int | str]:
    """The number of the version among the runs of this name, as the bar shows it."""
    version = getattr(trainer.logger, "version", None)
    return {} if version is None else {"v_num": version[-4:] if isinstance(version, str) else version}


class TQDMProgressBar(ProgressBar):
    """raylight's bar under Lightning's name; `process_position` and `leave` change nothing."""

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False):
        super().__init__(refresh_rate)
        self.process_position = process_position
        self.leave = leave


@dataclass
class RichProgressBarTheme:
    """Lightning's colours of the bar; raylight draws with those of the terminal."""

    description: str = ""
    progress_bar: str = ""
    progress_bar_finished: str = ""
    progress_bar_pulse: str = ""
    batch_progress: str = ""
    time: str = ""
    processing_speed: str = ""
    metrics: str = ""
    metrics_text_delimiter: str = " "
    metrics_format: str = ".3f"


class RichProgressBar(ProgressBar):
    """raylight's bar under Lightning's name; `leave`, `theme` and `console_kwargs` change nothing."""

    def __init__(
        self,
        refresh_rate: int = 1,
        leave: bool = False,
        theme: object = None,
        console_kwargs: dict[str, Value] | None = None,
    ):
        super().__init__(refresh_rate)
        self.leave = leave
        self.theme = theme
        self.console_kwargs = console_kwargs
