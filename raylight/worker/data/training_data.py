"""TrainingData: the training loader of one rank, and the evaluation loaders of each stage."""

from __future__ import annotations

from raylight.contract.config import Config
from raylight.contract.errors import DataError, InvalidArguments
from raylight.contract.kinds import Loader
from raylight.contract.task import Loaders, Place
from raylight.user.combined_loader import CombinedLoader, flatten_loaders, say_wrong_mode
from raylight.worker.data.batches import EvaluationBatches, TrainBatches
from raylight.worker.data.source import Position
from raylight.worker.hooks import Hooks


class TrainingData:
    """The training loader as the user gave it, divided among the ranks; opened when it is first needed."""

    def __init__(self, config: Config, seed: int):
        self.config, self.seed = config, seed
        self.loader: Loader = None
        self.batches: TrainBatches | None = None
        self.accumulate = config.accumulate_grad_batches
        """Batches in one optimizer step."""
        self.opened_in = 0
        """The epoch in which the loader was made."""
        self._position: Position | None = None
        self._batches_done: int | None = None
        self._window = 0

    @property
    def num_batches(self) -> int | None:
        """Batches of this rank in an epoch; None where the data has no length."""
        return self.batches.num_batches if self.batches is not None else None

    def enter_at(self, position: Position) -> None:
        """The next `open` enters the epoch there."""
        self._position = position

    def enter_after(self, num_batches: int | None, window: int) -> None:
        """The next `open` enters the epoch after that many of this rank's batches, unless a position is known; `window`
        of them belong to a step that is not made."""
        self._batches_done, self._window = num_batches or None, window

    def take_window(self) -> int:
        """The batches of an unfinished step before the one that comes next."""
        taken, self._window = self._window, 0
        return taken

    def open(self, loader: Loader, rank: int, world_size: int, epoch: int) -> int | None:
        """Divides the loader, made in this epoch; returns the batch at which a position was entered, if there was
        one."""
        if loader is None:
            raise DataError("fit needs training data: pass train_dataloaders or define train_dataloader()")
        config = self.config
        self.loader, self.opened_in = loader, epoch
        self.batches = TrainBatches(
            loader,
            rank=rank,
            world_size=world_size,
            seed=self.seed,
            limit=config.overfit_batches or config.limit_train_batches,
            use_distributed_sampler=config.use_distributed_sampler,
            global_batch_size=config.global_batch_size,
            overfit=bool(config.overfit_batches),
        )
        if config.global_batch_size is not None:
            self.accumulate = self.batches.accumulate
        if self._batches_done is not None:
            self._position = self.batches.state_dict(0, self._batches_done - 1)
            self._batches_done = None
        if self._position is None:
            return None
        self.batches.load_state_dict(self._position)
        self._position = None
        return self.batches.first_index

    def accumulate_over(self, num_batches: int) -> None:
        self.accumulate = num_batches


class EvaluationData:
    """The loaders of one stage, dealt to the ranks."""

    def __init__(self, given: Loader, place: Place, limit: int | float, seed: int, epoch: int):
        self.opened_in = epoch
        """The epoch in which they were made."""
        self.given = given
        """As the user gave it: one loader, a list or a dict of them; None if there is none."""
        self.batches = [
            EvaluationBatches(loader, rank=place.rank, world_size=place.world_size, limit=limit, seed=seed)
            for loader in _list_loaders(given)
        ]

    @property
    def num_batches(self) -> list[int | None]:
        """Batches of each loader, over all ranks; None for one without a length."""
        return [batches.num_batches for batches in self.batches]

    @property
    def total(self) -> int | None:
        """Batches over all loaders and ranks; None if one has no length."""
        counts = self.num_batches
        return None if None in counts else sum(count for count in counts if count is not None)


def find_loader(given: Loaders, hooks: Hooks, stage: str) -> Loader:
    """What the caller passed for this stage, else the data module's hook, else the module's; None where none."""
    loader = _find_loader(given, hooks, stage)
    if mistake := say_wrong_mode(loader, "fit" if stage == "train" else stage):
        raise InvalidArguments(mistake)
    return loader


def _find_loader(given: Loaders, hooks: Hooks, stage: str) -> Loader:
    passed = getattr(given, stage)
    if passed is not None:
        return passed
    name = f"{'val' if stage == 'validate' else stage}_dataloader"
    for owner in (hooks.data_module, hooks.module):
        hook = getattr(owner, name, None)
        loader = hook() if hook is not None else None
        if loader is not None:
            return loader
    return None


def _list_loaders(given: Loader) -> list[Loader]:
    if given is None or (isinstance(given, (list, tuple, dict)) and not given):
        return []
    if isinstance(given, CombinedLoader):
        return given.flattened if given.mode == "sequential" else [given]
    return flatten_loaders(given)
