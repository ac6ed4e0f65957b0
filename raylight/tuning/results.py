"""SweepResults: Ray Tune's ResultGrid, whose best trial is the one that holds the best checkpoint."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping

from ray.tune import Result, ResultGrid


class SweepResults(ResultGrid):
    """The results of `raylight.sweep`."""

    sweep_metric: str
    sweep_mode: str

    @classmethod
    def of(cls, results: ResultGrid, metric: str, mode: str) -> SweepResults:
        made = cls.__new__(cls)
        vars(made).update(vars(results), sweep_metric=metric, sweep_mode=mode)
        return made

    def get_best_result(
        self,
        metric: str | None = None,
        mode: str | None = None,
        scope: str | None = None,
        filter_nan_and_inf: bool = True,
    ) -> Result:
        """The trial whose best checkpoint has the best value of the sweep's metric: what `best_checkpoint` in its
        metrics leads to. With another metric or a `scope`, which trial that is says Ray Tune, whose default is the
        trial's last value."""
        metric, mode = metric or self.sweep_metric, mode or self.sweep_mode
        if scope is not None or metric != self.sweep_metric:
            return super().get_best_result(metric, mode, scope or "last", filter_nan_and_inf)
        sign = -1.0 if mode == "max" else 1.0
        values = [(read_best(result.metrics, metric), result) for result in map(self.__getitem__, range(len(self)))]
        known = [(sign * value, result) for value, result in values if value is not None]
        if not known:
            return super().get_best_result(metric, mode, "last", filter_nan_and_inf)
        return min(known, key=lambda pair: pair[0])[1]


def read_best(last: Mapping[str, object] | None, metric: str) -> float | None:
    """The value of the trial's best checkpoint, in its last result; without checkpoints that of the result itself.
    None if that is no finite number."""
    last = last or {}
    value = last.get(f"best_{metric}", last.get(metric))
    number = as_number(value)
    return number if number is not None and math.isfinite(number) else None


def as_number(value: object) -> float | None:
    """A logged value, which may be numpy's; None if it is no number."""
    return float(value) if isinstance(value, numbers.Real) else None
