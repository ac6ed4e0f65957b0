"""The path of one logged value on its rank: on a GPU it stays there, and is read a few times a second at most."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Value
from raylight.contract.messages import EpochMetrics, StepMetrics, StepRow, StepValue
from raylight.contract.plain_text import has_control, to_utf8
from raylight.worker.group.collectives import gather_objects
from raylight.worker.metrics.epoch_shares import Flags, NewestValue, Pairs, Share, merge, merge_newest, reduce_pairs
from raylight.worker.metrics.logged_values import (
    Metric,
    Number,
    compute,
    is_metric,
    read,
    say_no_epoch,
    take,
    take_batch_size,
)
from raylight.worker.metrics.series import NewestNumber, Series

STAGES = ("train", "validate", "test")
REDUCTIONS = ("mean", "sum", "min", "max")
# Of a value: stage, name, loader where there are several, and whether a step logged it or a hook around the steps.
Key = tuple[str, str, int | None, bool]
KEEP = 512  # batches whose values are kept before they are folded into one; bounds memory in long epochs


class Metrics:
    """What `Module.log` writes to and what the loop reads from.

    `stage` is "train", "validate" or "test" while an epoch of that kind takes values, and empty where there is none.
    """

    def __init__(self, module: torch.nn.Module, world_size: int, tell: Callable[[str], None] | None = None):
        self.module = module
        self.world_size = world_size
        self.tell = tell  # takes what the person should know
        self.series: dict[Key, Series] = {}
        self.stage = ""
        self.hook_is_step = False  # step hooks log per step by default in training; all others per epoch
        self.dataloader_idx: int | None = None  # set where there are several loaders
        self.batch_size: int | Callable[[], int | None] = 1
        self.at = 0
        self.size_is_guessed = False
        self.rows: list[tuple[int, int, float, list[tuple[Series, Number, Number]]]] = []
        self.epoch_values: dict[str, float] = {}
        self.measured_at: dict[str, int] = {}  # by name: the step
        self.logged_values: dict[str, float] = {}
        self.shown_values: dict[str, float] = {}
        self.carried: Share = {}  # logged in this epoch of training by ranks that are gone, or before a resume
        self._ending: Share | None = None  # what this rank has logged in an epoch whose end is on its way
        self._last_steps: list[tuple[Series, NewestNumber | None, int]] = []  # of that epoch, what steps logged
        self._whole: dict[Key, int] = {}
        self._undone: list[tuple[Series, list[Number], list[Number]]] = []  # what the newest rollback took away
        self._computed: list[Metric] = []  # whose epoch is over, and which hooks may still read
        self._num_batches = 0
        self._said: set[str] = set()  # names whose guessed batch size was told

    # ---- hot path

    def log(
        self,
        name: str,
        value: Value,
        prog_bar: bool,
        logger: bool | None,
        on_step: bool | None,
        on_epoch: bool | None,
        reduce_fx: Value,
        add_dataloader_idx: bool,
        batch_size: Value,
        metric_attribute: str | None,
    ) -> None:
        value = take(name, value)
        key = (self.stage, name, self.dataloader_idx, self.hook_is_step)
        series = self.series.get(key)
        is_number = type(value) is float or isinstance(value, Tensor)
        if series is None or (series.metric is None) is not is_number:
            series = self._begin(key, value, prog_bar, logger, on_step, on_epoch, reduce_fx, add_dataloader_idx)
        if not is_number:
            series.add_metric(value, self.at)
            return
        if batch_size is None:
            batch_size = self.batch_size if isinstance(self.batch_size, int) else self._find_batch_size()
            if self.size_is_guessed and not series.guessed:
                series.note_guess()
        elif type(batch_size) is not int:
            batch_size = take_batch_size(name, batch_size)
        series.add(value, batch_size, self.at)

    def enter(self, stage: str, in_step: bool = False) -> None:
        """What is logged from here on belongs to the epoch of this stage; with an empty one, to none."""
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
            with self.inside("train", in_step=True):
                yield
        finally:
            self.series = series

    @contextmanager
    def inside(self, stage: str, in_step: bool) -> Iterator[None]:
        """What is logged inside belongs to this stage."""
        before = self.stage, self.hook_is_step
        self.stage, self.hook_is_step = stage, in_step
        try:
            yield
        finally:
            self.stage, self.hook_is_step = before

    @contextmanager
    def outside(self) -> Iterator[None]:
        """For hooks that lie between two steps and belong to no epoch."""
        stage, self.stage = self.stage, ""
        try:
            yield
        finally:
            self.stage = stage

    def begin_batch(self, batch_size: int | Callable[[], int | None], at: int = 0) -> None:
        """`batch_size`: the samples in it, or a function that guesses them; `at`: its index in the epoch."""
        self.batch_size, self.at = batch_size, at
        self.size_is_guessed = not isinstance(batch_size, int)
        self._num_batches += 1

    def end_step(self) -> None:
        """What was logged so far counts: its step is whole, or it is of an evaluation."""
        if self._num_batches >= KEEP:
            self._num_batches = 0
            for series in self.series.values():
                if series.stage == self.stage:
                    series.fold()
        if self.stage == "train":
            self._whole = {key: len(series.values) for key, series in self.series.items()}

    def rollback(self) -> None:
        """Forgets what a step, or an evaluation, has logged that did not come to its end; `bring_back` undoes it for
        the step.

        A torchmetrics object of a training step keeps it. An epoch whose end failed has not ended.
        """
        ending = self._ending
        if ending is not None:
            for series in self.series.values():
                is_kept = series.stage == "train" and any(series.metric is metric for metric in self._computed)
                if is_kept:
                    self._computed = [metric for metric in self._computed if metric is not series.metric]
                series.reopen(is_kept)
            for series, last, at in self._last_steps:
                series.stand_at(last, at)
            self.carried = ending
        self.end_epoch()
        self._undone = []
        for key, series in self.series.items():
            if series.stage == "train":
                count = self._whole.get(key, 0)
                if len(series.values) > count:
                    self._undone.append((series, *series.cut(count)))
            else:
                series.begin_anew()

    def bring_back(self) -> None:
        """The step that was rolled back here has come to its end on another rank, and so it counts."""
        undone, self._undone = self._undone, []
        for series, values, weights in undone:
            series.put_back(values, weights)
        self.end_step()

    def record(self, step: int, epoch: int) -> None:
        """Notes the newest step values as the row of this step; nothing is read from the device yet."""
        row = []
        for series in self.series.values():
            newest = series.take_fresh()
            if newest is not None:
                row.append((series, *newest))
        if row:
            self.rows.append((step, epoch, time.time(), row))

    # ---- a few times a second

    def drain(self) -> StepMetrics | None:
        """The rows since the last call, in one device sync."""
        if not self.rows:
            return None
        rows, self.rows = self.rows, []
        numbers = iter(read([number for row in rows for _, *both in row[3] for number in both]))
        drained = []
        for step, epoch, moment, row in rows:
            logged = {}
            for series, _, _ in row:
                name, value = series.step_name, StepValue(next(numbers), next(numbers), series.step_reduce)
                if series.prog_bar:
                    self.shown_values[name] = value.value
                if series.logger:
                    self.logged_values[name] = value.value
                    logged[name] = value
            drained.append(StepRow(step, epoch, moment, logged))
        return StepMetrics(tuple(drained))

    def shown(self) -> dict[str, float]:
        """Newest values for the progress bar."""
        self.shown_values |= {s.step_name: value for s, value in self._read_newest() if s.prog_bar}
        return dict(self.shown_values)

    def logged(self) -> dict[str, float]:
        """The newest of what loggers get, this rank's own newest step values among it."""
        return self.logged_values | {s.step_name: value for s, value in self._read_newest() if s.logger}

    def newest(self) -> dict[str, float]:
        """Every value known on this rank: reduced epoch values, and this rank's own newest step values."""
        values = dict(self.epoch_values)
        for series, value in self._read_newest():
            values[series.name] = values[series.step_name] = value
        return values

    def keep(self, name: str, value: float) -> None:
        """A value that a hook has put into `trainer.callback_metrics`."""
        self.epoch_values[name] = value

    def find_carried(self, step: int) -> dict[str, int]:
        """Of what `newest` gives at `step`, the names of values that an earlier step's weights have, and that step."""
        used = [s for s in self.series.values() if s.on_step and s.newest() is not None]
        fresh = {name for series in used for name in (series.name, series.step_name)}
        return {name: at for name, at in self.measured_at.items() if at != step and name not in fresh}

    def _read_newest(self) -> list[tuple[Series, float]]:
        found = [(s, newest[0]) for s in self.series.values() if s.on_step and (newest := s.newest()) is not None]
        return list(zip([s for s, _ in found], read([value for _, value in found]), strict=True))

    # ---- once an epoch

    def finish_epoch(self, stage: str, epoch: int, step: int) -> EpochMetrics:
        """Reduces what this stage logged over all ranks, in one collective, and begins anew.

        Every rank gets the same values: those that one process would have computed from all batches. torchmetrics
        objects keep theirs for the hooks that follow, until `end_epoch`.
        """
        mine = [s for s in self.series.values() if s.stage == stage and s.is_used]
        of_steps = self._step_share(mine)
        share: Share = {s.name: (s.flags, s.fold()) for s in mine if s.on_epoch}
        if stage == "train":
            share, self.carried = merge(share, self.carried), {}
        attributes = {s.name: self._attribute_of(s) for s in mine if s.metric is not None and s.on_epoch}
        gathered = gather_objects((share, attributes, of_steps), self.world_size)
        names: dict[str, Flags] = {}
        for its, _, _ in gathered:
            names |= {name: flags for name, (flags, _) in its.items() if name not in names}
        values = merge_newest([its for _, _, its in gathered])
        of_last_step = frozenset(name for _, _, its in gathered for name, newest in its.items() if newest[-1])
        logged, shown = set(), set()
        for name, (reduce, both, _, prog_bar, logger) in names.items():
            pairs = [pair for its, _, _ in gathered if name in its for pair in its[name][1]]
            number: float | None
            if reduce == "metric":
                number = self._compute(name, mine, next(paths[name] for _, paths, _ in gathered if name in paths))
            elif reduce == "callable":
                number = self._call_reduction(name, pairs, mine)
                if number is None:
                    continue
            else:
                number = reduce_pairs(reduce, pairs)
            label = f"{name}_epoch" if both else name
            values[name] = values[label] = number
            logged |= {label} if logger else set()
            shown |= {label} if prog_bar else set()
        self._say_guesses(mine)
        for series in mine:
            if series.metric is not None:
                self._retire(series.metric)
            series.forget()
        self._whole = {}
        self.epoch_values |= values
        self.measured_at |= dict.fromkeys(values, step)
        self.logged_values |= {name: values[name] for name in logged | of_last_step}
        self.shown_values |= {name: values[name] for name in shown}
        return EpochMetrics(stage, epoch, step, time.time(), values, frozenset(logged), frozenset(shown), of_last_step)

    def _step_share(self, mine: list[Series]) -> dict[str, NewestValue]:
        """By name: this rank's newest step values, each with the batch that it is of."""
        found = [(s, newest) for s in mine if s.on_step and (newest := s.newest()) is not None]
        numbers = iter(read([number for _, newest in found for number in newest]))
        return {s.step_name: (s.at, s.step_reduce, next(numbers), next(numbers), s.logger) for s, _ in found}

    def _say_guesses(self, mine: list[Series]) -> None:
        """Once for each name: whose mean may be wrong because nobody has said how many samples a batch holds."""
        guessed = {s.name for s in mine if s.guessed and s.on_epoch and s.metric is None and s.reduce == "mean"}
        names = sorted(guessed - self._said)
        if names and self.tell is not None:
            self._said |= guessed
            self.tell(
                f"how many samples a batch holds is not known from the loader, and was guessed from the batch's first "
                f"tensor to weight the mean of {', '.join(map(repr, names))}; to have it exact, pass "
                f"log({names[0]!r}, ..., batch_size=n)"
            )

    def end_epoch(self) -> None:
        """The hooks of the epoch's end are done: torchmetrics objects begin anew."""
        for metric in self._computed:
            metric.reset()
        self._computed, self._ending, self._last_steps = [], None, []

    def epoch_share(self) -> Share:
        """What this rank has logged so far in the running epoch of training; torchmetrics objects left out.

        Call it where the last step is whole.
        """
        mine = [s for s in self.series.values() if s.stage == "train" and s.metric is None and s.on_epoch]
        share: Share = {s.name: (s.flags, s.fold()) for s in mine if s.values or s.folded}
        self._whole = {key: len(series.values) for key, series in self.series.items() if series.values}
        return merge(share, self.carried)

    def keep_share(self) -> Share:
        """As `epoch_share`, for the epoch that ends now: until `end_epoch`, a rollback brings it back."""
        self._last_steps = [
            (s, s.newest(), s.at) for s in self.series.values() if s.stage == "train" and s.on_step and s.metric is None
        ]
        self._ending = self.epoch_share()
        return self._ending

    def forget(self) -> None:
        """Drops all reduced values, as after sanity validation."""
        self.epoch_values, self.logged_values, self.shown_values, self.measured_at = {}, {}, {}, {}

    # ---- inner

    def _begin(
        self, key: Key, value: Value, prog_bar: bool, logger: bool | None, on_step: bool | None, on_epoch: bool | None,
        reduce_fx: Value, add_dataloader_idx: bool,
    ) -> Series:  # fmt: skip
        stage, name, *_ = key
        if not isinstance(name, str):
            raise InvalidArguments(f"log(name={name!r}): a name is a str, not {type(name).__name__}")
        if has_control(to_utf8(name)):
            raise InvalidArguments(f"log({name!r}): a name holds no characters that control a terminal")
        if stage not in STAGES:
            raise InvalidArguments(say_no_epoch(name, stage))
        before = self.series.get(key)
        if before is not None and before.is_used:
            raise InvalidArguments(
                f"log({name!r}): a torchmetrics metric and a number were logged under one name in the same epoch; "
                "give one of them another name"
            )
        reduce = {torch.mean: "mean", torch.sum: "sum", torch.min: "min", torch.max: "max"}.get(reduce_fx, reduce_fx)
        if isinstance(reduce, str):  # in any case, as torchmetrics and Lightning write it
            reduce = {"avg": "mean"}.get(reduce.lower(), reduce.lower())
        if not callable(reduce) and reduce not in REDUCTIONS:
            raise InvalidArguments(
                f"log({name!r}, reduce_fx={reduce_fx!r}): one of {REDUCTIONS} or a function is needed"
            )
        in_step = stage == "train" and self.hook_is_step
        # numpy's True is not Python's
        on_step, on_epoch = (None if flag is None else bool(flag) for flag in (on_step, on_epoch))
        on_epoch = not in_step if on_epoch is None else on_epoch or not in_step
        both = on_epoch and bool(on_step)
        if on_step and not in_step and self.tell is not None and key not in self.series:
            self.tell(
                f"log({name!r}, on_step=True): values of single steps are kept of training alone; here the value of "
                "the whole epoch is"
            )
        on_step = in_step and on_step is not False
        if self.dataloader_idx is not None and add_dataloader_idx:
            name = f"{name}/dataloader_idx_{self.dataloader_idx}"
        series = self.series[key] = Series(
            stage, name, on_step, on_epoch, reduce, bool(prog_bar), logger is None or bool(logger),
            metric=value if is_metric(value) else None, both=both or (on_step and on_epoch),
        )  # fmt: skip
        return series

    def _find_batch_size(self) -> int:
        assert callable(self.batch_size)
        self.batch_size = self.batch_size() or 1
        return self.batch_size

    def _attribute_of(self, series: Series) -> str | None:
        """Where the metric lies in the module, so that a rank that never saw a batch takes part in its reduction."""
        return next((path for path, found in self.module.named_modules() if found is series.metric), None)

    def _call_reduction(self, name: str, pairs: Pairs, mine: list[Series]) -> float | None:
        """A rank that logged nothing does not have the function, so that those that do tell it the value. None where
        no rank has logged the name since it took over what others had."""
        function = next((s.reduce for s in mine if s.name == name and callable(s.reduce)), None)
        number = None if function is None else reduce_pairs(function, pairs)
        return next((found for found in gather_objects(number, self.world_size) if found is not None), None)

    def _compute(self, name: str, mine: list[Series], path: str | None) -> float:
        """A rank that has logged nothing in this epoch finds the metric by its path: it may be a new object."""
        metric = next((s.metric for s in mine if s.name == name and s.metric is not None), None)
        if metric is None and path is not None:
            found = self.module.get_submodule(path)
            metric = found if is_metric(found) else None
        if metric is None:
            raise InvalidArguments(f"log({name!r}): assign the metric to the module (self.x = Metric()) to log it")
        self._retire(metric)
        return compute(name, metric)

    def _retire(self, metric: Metric) -> None:
        """Its epoch is over: it begins anew once the hooks that may still read it are done."""
        if all(metric is not found for found in self._computed):
            self._computed.append(metric)
