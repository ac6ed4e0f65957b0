"""What a person may not expect of a fit that is about to begin; told once, and not refused."""

from __future__ import annotations

from torch.utils.data import DataLoader

from raylight.contract.kinds import Loader
from raylight.user.combined_loader import CombinedLoader, flatten_loaders
from raylight.worker.data.sampling import shuffles
from raylight.worker.worker import Worker


def warn_of_surprises(worker: Worker) -> None:
    """Call it with the training data open, before the first batch."""
    for text in (_say_unused_validation(worker), _say_no_rows(worker), _say_modes(worker), _say_order(worker)):
        if text:
            worker.warn_once(text)


def _say_unused_validation(worker: Worker) -> str:
    hooks, name = worker.hooks, type(worker.module).__qualname__
    has_loader = worker.task.loaders.validate is not None or hooks.owner_of("val_dataloader") is not None
    if has_loader == hooks.overrides("validation_step") or not worker.config.limit_val_batches:
        return ""
    if has_loader:
        return f"there is a validation loader, and {name} has no validation_step: no validation runs"
    return f"{name} has a validation_step, and there is no validation loader: no validation runs"


def _say_no_rows(worker: Worker) -> str:
    every, batches = worker.config.log_every_n_steps, worker.data.num_batches
    if not batches or not every or worker.config.logger is False:
        return ""
    steps = -(-batches // worker.data.accumulate)
    if steps >= every:
        return ""
    return (
        f"an epoch has {steps} optimizer steps, which is less than log_every_n_steps={every}: not every epoch has a "
        f"row of step values; log_every_n_steps={steps} or less gives each one"
    )


def _say_modes(worker: Worker) -> str:
    resting = [name for name, part in worker.module.named_modules() if name and not part.training]
    if not resting:
        return ""
    return (
        f"{len(resting)} parts of the module are in evaluation mode and stay so in training, {resting[0]!r} among them;"
        " call .train() on what is to be trained"
    )


def _say_order(worker: Worker) -> str:
    given: Loader = worker.data.loader
    loaders = flatten_loaders(given.iterables if isinstance(given, CombinedLoader) else given)
    if not worker.config.overfit_batches or not any(isinstance(one, DataLoader) and shuffles(one) for one in loaders):
        return ""
    return "overfit_batches takes the first samples in the order of the dataset: the training loader's sampler rests"
