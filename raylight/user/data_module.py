"""DataModule: the loaders of all stages, and how their data is prepared, in one object."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Self

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from raylight.contract.config import FilePath
from raylight.contract.kinds import Loader, Value
from raylight.user.checkpoint_reader import CheckpointPath, MapLocation, checkpoint_reader
from raylight.user.data_hooks import DataHooks
from raylight.user.hyperparameters import HyperparametersMixin
from raylight.user.trainer_names import TrainerNames

Datasets = Dataset | Iterable[Dataset] | Mapping[str, Dataset]


class DataModule(HyperparametersMixin, DataHooks):
    """Subclass it and override what you need; hooks carry Lightning's names and meanings.

    `prepare_data` runs on one worker of each node while the others wait: download there, and keep nothing on `self`.
    `setup` runs on every worker. A loader hook returns one loader, or several in a list or dict. A batch hook that
    is overridden here takes the place of the module's.
    """

    trainer: TrainerNames | None
    """The trainer that runs this object; None outside a run."""

    def __new__(cls, *args: Value, **kwargs: Value) -> Self:
        # Not in __init__, which subclasses often forget to call.
        made = super().__new__(cls)
        made.trainer = None
        return made

    def __init__(self, *args: Value, **kwargs: Value) -> None: ...

    def __getstate__(self) -> dict[str, Value]:
        return {**self.__dict__, "trainer": None}

    def __copy__(self) -> Self:
        """Attributes and hyperparameters of its own, over the same data."""
        made, attributes = type(self).__new__(type(self)), self.__getstate__()
        if "_hparams" in attributes:
            attributes["_hparams"] = copy.copy(attributes["_hparams"])
        vars(made).update(attributes)
        return made

    def __str__(self) -> str:
        """The sizes of its loaders' data, stage by stage, for which the loaders are made; None where there is none,
        or none before `setup`."""
        stages = {"Train": "train", "Validation": "val", "Test": "test", "Predict": "predict"}
        sizes = {label: _describe(getattr(self, f"{stage}_dataloader")) for label, stage in stages.items()}
        return "\n".join(f"{{{label} dataloader: {size}}}" for label, size in sizes.items())

    def state_dict(self) -> dict[str, Value]:
        """State for every checkpoint: plain values and tensors only."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Value]) -> None:
        """Restore what `state_dict` returned; called after `setup` if the run continues from a checkpoint."""

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: CheckpointPath,
        map_location: MapLocation = None,
        hparams_file: FilePath | None = None,
        weights_only: bool | None = None,
        **overrides: Value,
    ) -> Self:
        """Rebuild the data module of a run with the hyperparameters that it saved, `overrides` on top.

        The arguments are as for `Module.load_from_checkpoint`. Raises CheckpointCorrupt if it is damaged and
        CheckpointMismatch if `__init__` needs what is not in it.
        """
        return checkpoint_reader().load_data_module(
            cls, checkpoint_path, map_location, hparams_file, weights_only, overrides
        )

    @classmethod
    def from_datasets(
        cls,
        train_dataset: Datasets | None = None,
        val_dataset: Datasets | None = None,
        test_dataset: Datasets | None = None,
        predict_dataset: Datasets | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **arguments: Value,
    ) -> Self:
        """Make a data module whose loaders read these datasets, the training data shuffled.

        Each is a dataset, or a list or dict of them. `arguments` go to `__init__`, which receives `batch_size` and
        `num_workers` too if it takes them.
        """
        taken = inspect.signature(cls.__init__).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        sizes = {"batch_size": batch_size, "num_workers": num_workers}
        made = cls(**arguments, **{name: value for name, value in sizes.items() if takes_all or name in taken})
        given = {"train": train_dataset, "val": val_dataset, "test": test_dataset, "predict": predict_dataset}
        for stage, datasets in given.items():
            if datasets is not None:
                setattr(made, f"{stage}_dataloader", _LoaderHook(datasets, stage == "train", sizes))
        return made


class _LoaderHook:
    """A loader hook that was not written but made; an object, since a closure cannot be pickled."""

    def __init__(self, datasets: Datasets, shuffle: bool, sizes: dict[str, int]):
        self.datasets, self.shuffle, self.sizes = datasets, shuffle, sizes

    def __call__(self) -> Loader:
        datasets = self.datasets
        if isinstance(datasets, Mapping):
            return {name: self._load(dataset) for name, dataset in datasets.items()}
        if isinstance(datasets, Iterable) and not isinstance(datasets, Dataset):
            return [self._load(dataset) for dataset in datasets]
        return self._load(datasets)

    def _load(self, dataset: Dataset) -> DataLoader:
        shuffle = self.shuffle and not isinstance(dataset, IterableDataset)
        return DataLoader(dataset, shuffle=shuffle, pin_memory=torch.cuda.is_available(), **self.sizes)  # type: ignore[arg-type]


def _describe(hook: Callable[[], Loader] | None) -> str:
    try:
        return _say_size(hook() if hook is not None else None)
    except Exception:  # user code that is not ready yet may raise anything, and a text must not
        return "None"


def _say_size(loader: Loader) -> str:
    if loader is None:
        return "None"
    if isinstance(loader, Mapping):
        return " ; ".join(f"{name}. {_say_size(part)}" for name, part in loader.items())
    if isinstance(loader, (list, tuple)) and not all(isinstance(part, (int, float, str)) for part in loader):
        return " ; ".join(f"{number}. {_say_size(part)}" for number, part in enumerate(loader, start=1))
    data: Loader = getattr(loader, "dataset", loader)
    try:
        return f"size={len(data)}"
    except (TypeError, NotImplementedError):
        return "size=NA"
