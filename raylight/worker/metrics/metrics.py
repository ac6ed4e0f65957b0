"""The path of one logged value on its rank: kept as it is on the device, read a few times a second at most."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raylight.contract.errors import InvalidArguments
from raylight.contract.messages import EpochMetrics, StepMetrics, StepRow, StepValue
from raylight.contract.plain_text import has_control, to_utf8
from raylight.worker.group.collectives import gather_objects
from raylight.worker.metrics.epoch_shares import Flags, Pairs, Reduce, Share, fold, make_pairs, merge, reduce_pairs

REDUCTIONS = ("mean", "sum", "min", "max")
# Of a value: stage, name, loader where there are several, and whether a step logged it or a hook around the steps.
Key = tuple[str, str, int | None, bool]
KEEP = 512  # batches whose values are kept before they are folded into one; bounds memory in long epochs


@dataclass(slots=True, eq=False)
class Series:
    """Everything logged under one name in the current epoch."""

    stage: str
    name: str
    on_step: bool
    on_epoch: bool
    reduce: Reduce
    prog_bar: bool
    logger: bool
    metric: Any = None  # a torchmetrics object, which reduces itself
    values: list[Any] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    folded: Pairs = field(default_factory=list)
    fresh: bool = False  # logged since the last row
    touched: bool = False  # the metric was logged since its last reset
    both: bool = False  # asked for per step and per epoch, so that the names carry a suffix

    @property
    def step_reduce(self) -> str:
        return self.reduce if isinstance(self.reduce, str) else "mean"

    @property
    def flags(self) -> Flags:
        reduce = "metric" if self.metric is not None else self.reduce if isinstance(self.reduce, str) else "callable"
        return reduce, self.both, self.on_epoch, self.prog_bar, self.logger

    def fold(self) -> Pairs:
        """Replaces the values by their reduction so far; a callable needs them all, so they only leave the device."""
        if self.values:
            self.folded = fold(self.reduce, self.folded + make_pairs(self.reduce, read(self.values), self.weights))
            self.values, self.weights = [], []
        return self.folded

    def begin_anew(self) -> None:
        self.values, self.weights, self.folded, self.fresh = [], [], [], False
        if self.touched:
            self.metric.reset()
            self.touched = False


class Metrics:
    """What `Module.log` writes to and what the loop reads from."""

    def __init__(self, module: torch.nn.Module, world_size: int):
        self.module = module
        self.world_size = world_size
        self.series: dict[Key, Series] = {}
        self.stage = "train"
        self.hook_is_step = True  # step hooks log per step by default in training; all others per epoch
        self.dataloader_idx: int | None = None  # set where there are several loaders
        self.batch_size: int | Callable[[], int | None] = 1
        self.rows: list[tuple[int, int, float, list[tuple[Series, Any, float]]]] = []
        self.epoch_values: dict[str, float] = {}
        self.measured_at: dict[str, int] = {}  # by name: the step
        self.logged_values: dict[str, float] = {}
        self.shown_values: dict[str, float] = {}
        self.carried: Share = {}  # logged in this epoch of training by ranks that are gone, or before a resume
        self._ending: Share | None = None  # what this rank has logged in an epoch whose end is on its way
        self._whole: dict[Key, int] = {}
        self._computed: list[Any] = []  # torchmetrics objects whose epoch is over, and whose hooks may still read them
        self._num_batches = 0

    # ---- hot path

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool,
        logger: bool | None,
        on_step: bool | None,
        on_epoch: bool | None,
        reduce_fx: Any,
        add_dataloader_idx: bool,
        batch_size: int | None,
        metric_attribute: str | None,
    ) -> None:
        key = (self.stage, name, self.dataloader_idx, self.hook_is_step)
        series = self.series.get(key)
        if series is None:
            series = self._begin(key, value, prog_bar, logger, on_step, on_epoch, reduce_fx, add_dataloader_idx)
        if series.metric is not None:
            series.fresh = series.touched = True
            return
        if isinstance(value, Tensor):
            value = value.detach()
            if value.numel() != 1:
                raise ValueError(f"log({name!r}): one element is needed, the tensor has shape {tuple(value.shape)}")
        if batch_size is None:
            batch_size = self.batch_size if isinstance(self.batch_size, int) else self._find_batch_size()
        series.values.append(value)
        series.weights.append(batch_size)
        series.fresh = True

    def enter(self, stage: str, in_step: bool) -> None:
        """What is logged from here on belongs to this stage; `in_step`: by hooks of a step, not around the steps."""
        self.stage, self.hook_is_step = stage, in_step

    def enter_loader(self, dataloader_idx: int | None) -> None:
        """None: of no loader, or of the only one."""
        self.dataloader_idx = dataloader_idx

    def resize(self, world_size: int) -> None:
        self.world_size = world_size

    def carry(self, share: Share) -> None:
        """What others have logged in this epoch counts too."""
        self.carried = share

    def restore(self, epoch_values: dict[str, float], measured_at: dict[str, int]) -> None:
        """The epoch values of a checkpoint, and the steps at which they were measured."""
        self.epoch_values, self.measured_at = dict(epoch_values), dict(measured_at)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """What is logged inside counts for nothing."""
        series, self.series = self.series, {}
        try:
            yield
        finally:
            self.series = series

    def begin_batch(self, batch_size: int | Callable[[], int | None]) -> None:
        self.batch_size = batch_size
        self._num_batches += 1

    def end_step(self) -> None:
        """What was logged so far counts: its step is whole, or it is of an evaluation."""
        if self._num_batches >= KEEP:
            self._num_batches = 0
            for series in self.series.values():
                if series.stage == self.stage:
                    series.fold() if series.on_epoch else _keep_newest(series)
        if self.stage == "train":
            self._whole = {key: len(series.values) for key, series in self.series.items()}

    def rollback(self) -> None:
        """Forgets what a step, or an evaluation, has logged that did not come to its end.

        A torchmetrics object of a training step keeps it. An epoch whose end failed has not ended.
        """
        ending = self._ending
        if ending is not None:
            for series in self.series.values():
                if series.stage == "train" and any(series.metric is metric for metric in self._computed):
                    self._computed = [metric for metric in self._computed if metric is not series.metric]
                    series.touched = True
                series.values, series.weights, series.folded = [], [], []
            self.carried = ending
        self.end_epoch()
        for key, series in self.series.items():
            if series.stage == "train":
                count = self._whole.get(key, 0)
                del series.values[count:], series.weights[count:]
            else:
                series.begin_anew()

    def record(self, step: int, epoch: int) -> None:
        """Notes the newest step values as the row of this step; nothing is read from the device yet."""
        row = [
            (series, series.metric if series.metric is not None else series.values[-1], series.weights[-1:])
            for series in self.series.values()
            if series.on_step and series.fresh and (series.values or series.metric is not None)
        ]
        if row:
            values = [(s, _last_value(v), w[0] if w else 1.0) for s, v, w in row]
            self.rows.append((step, epoch, time.time(), values))
            for series, _, _ in row:
                series.fresh = False
                if not series.on_epoch:
                    _keep_newest(series)

    # ---- a few times a second

    def drain(self) -> StepMetrics | None:
        """The rows since the last call, in one device sync."""
        if not self.rows:
            return None
        rows, self.rows = self.rows, []
        numbers = iter(read([value for row in rows for _, value, _ in row[3]]))
        drained = []
        for step, epoch, moment, row in rows:
            values = {}
            for series, _, weight in row:
                name = self._step_name(series)
                values[name] = StepValue(next(numbers), weight, series.step_reduce)
                self.logged_values[name] = values[name].value
                if series.prog_bar:
                    self.shown_values[name] = values[name].value
            logged = {self._step_name(s): values[self._step_name(s)] for s, _, _ in row if s.logger}
            drained.append(StepRow(step, epoch, moment, logged))
        return StepMetrics(tuple(drained))

    def shown(self) -> dict[str, float]:
        """Newest values for the progress bar."""
        series = [s for s in self.series.values() if s.prog_bar and s.on_step and s.values]
        for found, number in zip(series, read([s.values[-1] for s in series]), strict=True):
            self.shown_values[self._step_name(found)] = number
        return dict(self.shown_values)

    def newest(self) -> dict[str, float]:
        """Every value known on this rank: reduced epoch values, and this rank's own newest step values."""
        values = dict(self.epoch_values)
        series = [s for s in self.series.values() if s.on_step and s.values]
        for found, number in zip(series, read([s.values[-1] for s in series]), strict=True):
            values[found.name] = number
            values[self._step_name(found)] = number
        return values

    def find_carried(self, step: int) -> dict[str, int]:
        """Of what `newest` gives at `step`, the names of values that an earlier step's weights have, and that step."""
        fresh = {name for s in self.series.values() if s.on_step and s.values for name in (s.name, self._step_name(s))}
        return {name: at for name, at in self.measured_at.items() if at != step and name not in fresh}

    # ---- once an epoch

    def finish_epoch(self, stage: str, epoch: int, step: int) -> EpochMetrics:
        """Reduces what this stage logged over all ranks, in one collective, and begins anew.

        Every rank gets the same values: those that one process would have computed from all batches. torchmetrics
        objects keep theirs for the hooks that follow, until `end_epoch`.
        """
        mine = [s for s in self.series.values() if s.stage == stage and (s.values or s.folded or s.touched)]
        share: Share = {s.name: (s.flags, s.fold()) for s in mine}
        if stage == "train":
            share, self.carried = merge(share, self.carried), {}
        attributes = {series.name: self._attribute_of(series) for series in mine if series.metric is not None}
        gathered = gather_objects((share, attributes), self.world_size)
        names: dict[str, Flags] = {}
        for its, _ in gathered:
            names |= {name: flags for name, (flags, _) in its.items() if name not in names}
        values: dict[str, float] = {}
        logged, shown = set(), set()
        for name, (reduce, both, on_epoch, prog_bar, logger) in names.items():
            pairs = [pair for its, _ in gathered if name in its for pair in its[name][1]]
            number: float | None
            if reduce == "metric":
                number = self._compute(name, gathered)
            elif reduce == "callable":
                number = self._call_reduction(name, pairs, mine)
                if number is None:
                    continue
            else:
                number = reduce_pairs(reduce, pairs)
            values[name] = number
            if on_epoch:
                label = f"{name}_epoch" if both else name
                values[label] = number
                logged |= {label} if logger else set()
                shown |= {label} if prog_bar else set()
        for series in mine:
            series.values, series.weights, series.folded = [], [], []
            series.fresh = series.touched = False
        self._whole = {}
        self.epoch_values |= values
        self.measured_at |= dict.fromkeys(values, step)
        self.logged_values |= {name: values[name] for name in logged}
        self.shown_values |= {name: values[name] for name in shown}
        return EpochMetrics(stage, epoch, step, time.time(), values, frozenset(logged), frozenset(shown))

    def end_epoch(self) -> None:
        """The hooks of the epoch's end are done: torchmetrics objects begin anew."""
        for metric in self._computed:
            metric.reset()
        self._computed, self._ending = [], None

    def epoch_share(self) -> Share:
        """What this rank has logged so far in the running epoch of training; torchmetrics objects left out.

        Call it where the last step is whole.
        """
        mine = [s for s in self.series.values() if s.stage == "train" and s.metric is None and s.on_epoch]
        share: Share = {s.name: (s.flags, s.fold()) for s in mine if s.values or s.folded}
        self._whole = {}
        return merge(share, self.carried)

    def keep_share(self) -> Share:
        """As `epoch_share`, for the epoch that ends now: until `end_epoch`, a rollback brings it back."""
        self._ending = self.epoch_share()
        return self._ending

    def forget(self) -> None:
        """Drops all reduced values, as after sanity validation."""
        self.epoch_values, self.logged_values, self.shown_values, self.measured_at = {}, {}, {}, {}

    # ---- inner

    def _begin(
        self, key: Any, value: Any, prog_bar: bool, logger: bool | None, on_step: bool | None, on_epoch: bool | None,
        reduce_fx: Any, add_dataloader_idx: bool,
    ) -> Series:  # fmt: skip
        stage, name, *_ = key
        if not isinstance(name, str):
            raise InvalidArguments(f"log(name={name!r}): a name is a str, not {type(name).__name__}")
        if has_control(to_utf8(name)):
            raise InvalidArguments(f"log({name!r}): a name holds no characters that control a terminal")
        is_metric = hasattr(value, "compute") and hasattr(value, "update") and hasattr(value, "reset")
        if isinstance(value, dict) or not (
            is_metric or isinstance(value, (Tensor, int, float)) or hasattr(value, "item")
        ):
            raise InvalidArguments(
                f"log({name!r}): a number, a one-element tensor or a torchmetrics metric is needed, not "
                f"{type(value).__name__}" + ("; use log_dict for a dict" if isinstance(value, dict) else "")
            )
        reduce = {torch.mean: "mean", torch.sum: "sum", torch.min: "min", torch.max: "max"}.get(reduce_fx, reduce_fx)
        reduce = {"avg": "mean"}.get(reduce, reduce) if isinstance(reduce, str) else reduce
        if not callable(reduce) and reduce not in REDUCTIONS:
            raise InvalidArguments(
                f"log({name!r}, reduce_fx={reduce_fx!r}): one of {REDUCTIONS} or a function is needed"
            )
        if stage == "predict":
            raise InvalidArguments(f"log({name!r}): predict_step collects outputs and logs nothing")
        in_step = stage == "train" and self.hook_is_step
        on_epoch = not in_step if on_epoch is None else on_epoch or not in_step
        both = on_epoch and bool(on_step)
        on_step = in_step and on_step is not False
        if self.dataloader_idx is not None and add_dataloader_idx:
            name = f"{name}/dataloader_idx_{self.dataloader_idx}"
        metric = value if is_metric else None
        series = Series(stage, name, on_step, on_epoch, reduce, prog_bar, logger is not False, metric)
        series.both = both or (on_step and on_epoch)
        self.series[key] = series
        return series

    def _find_batch_size(self) -> int:
        assert callable(self.batch_size)
        self.batch_size = self.batch_size() or 1
        return self.batch_size

    def _step_name(self, series: Series) -> str:
        return f"{series.name}_step" if series.both else series.name

    def _attribute_of(self, series: Series) -> str | None:
        """Where the metric lies in the module, so that a rank that never saw a batch takes part in its reduction."""
        return next((path for path, found in self.module.named_modules() if found is series.metric), None)

    def _call_reduction(self, name: str, pairs: Pairs, mine: list[Series]) -> float | None:
        """A rank that logged nothing does not have the function, so that those that do tell it the value. None where
        no rank has logged the name since it took over what others had."""
        function = next((s.reduce for s in mine if s.name == name and callable(s.reduce)), None)
        number = None if function is None else reduce_pairs(function, pairs)
        return next((found for found in gather_objects(number, self.world_size) if found is not None), None)

    def _compute(self, name: str, gathered: list[tuple[Share, dict[str, str | None]]]) -> float:
        path = next(attributes[name] for _, attributes in gathered if name in attributes)
        own = next((s.metric for s in self.series.values() if s.name == name and s.metric is not None), None)
        metric: Any = own if own is not None else self.module.get_submodule(path) if path is not None else None
        if metric is None:
            raise InvalidArguments(f"log({name!r}): assign the metric to the module (self.x = Metric()) to log it")
        if all(metric is not found for found in self._computed):
            self._computed.append(metric)
        return float(metric.compute())


def read(values: list[Any]) -> list[float]:
    """Numbers and one-element tensors as floats, in one device sync for all tensors."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return [float(value) for value in values]
    device = tensors[0].device
    stacked = torch.stack([t.reshape(()).to(device=device, dtype=torch.float64) for t in tensors])
    numbers = iter(stacked.tolist())
    return [next(numbers) if isinstance(value, Tensor) else float(value) for value in values]


def _keep_newest(series: Series) -> None:
    del series.values[:-1], series.weights[:-1]


def _last_value(value: Any) -> Any:
    if isinstance(value, (Tensor, int, float)) or not hasattr(value, "compute"):
        return value
    cached = getattr(value, "_forward_cache", None)  # torchmetrics: the value of the last batch alone
    return cached.detach().clone() if isinstance(cached, Tensor) else value.compute()
