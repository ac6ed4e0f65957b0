"""When learning rate schedulers step."""

from __future__ import annotations

from raylight.arguments.checks import say_unknown_metric
from raylight.contract.errors import InvalidArguments
from raylight.worker.group.collectives import mean_over_ranks
from raylight.worker.worker import Worker


def step_schedulers(worker: Worker, interval: str, count: int, plateau: bool = False, is_late: bool = False) -> None:
    """Steps the schedulers of an interval, "step" or "epoch"; `count` steps or epochs are done.

    Those on a plateau need the values of a validation and have a turn of their own. In manual optimization
    `training_step` steps them all. `is_late`: a run goes on where they are due; without its value one does not step.
    """
    if not worker.module.automatic_optimization:
        return
    for config in worker.optimizers.schedulers:
        if config.interval != interval or config.reduce_on_plateau != plateau or count % config.frequency:
            continue
        metric = None
        if config.reduce_on_plateau:
            known = worker.metrics.newest()
            if config.monitor not in known:
                if config.strict and not is_late:
                    raise InvalidArguments(say_unknown_metric(str(config.monitor), known, "a scheduler"))
                continue
            metric = known[config.monitor]
            if interval == "step":
                metric = mean_over_ranks(metric, worker.world_size)
        worker.module.lr_scheduler_step(config.scheduler, metric)
