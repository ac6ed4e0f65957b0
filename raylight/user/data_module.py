"""DataModule: the loaders of all stages, and how their data is prepared, in one object."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from raylight.user.checkpoint_reader import checkpoint_reader
from raylight.user.module import AttributeDict, Module
from raylight.user.trainer_names import TrainerNames
from raylight.user.transfer import move_to_device


class DataModule:
    """Subclass it and override what you need; hooks carry Lightning's names and meanings.

    `prepare_data` runs on one worker of each node while the others wait: download there, and keep nothing on `self`.
    `setup` runs on every worker. A loader hook returns one loader, or several in a list or dict. Where a batch hook is
    overridden here, it takes the place of the module's.
    """

    trainer: TrainerNames | None
    _hparams: AttributeDict

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Not in __init__, which subclasses often forget to call.
        made = super().__new__(cls)
        made.trainer = None
        made._hparams = AttributeDict()
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainer": None}

    hparams = Module.hparams
    save_hyperparameters = Module.save_hyperparameters

    def prepare_data(self) -> None: ...
    def setup(self, stage: str) -> None: ...
    def teardown(self, stage: str) -> None: ...

    def train_dataloader(self) -> Any: ...
    def val_dataloader(self) -> Any: ...
    def test_dataloader(self) -> Any: ...
    def predict_dataloader(self) -> Any: ...

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return move_to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch

    def on_exception(self, exception: BaseException) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of this object: plain values and tensors only."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **overrides: Any) -> Self:
        """Rebuilds the data module of a run with the hyperparameters that it saved, `overrides` on top.

        `checkpoint_path` is as for `Module.load_from_checkpoint`. Raises CheckpointCorrupt where it is damaged and
        CheckpointMismatch where `__init__` needs what is not in it.
        """
        return checkpoint_reader().load_data_module(cls, checkpoint_path, overrides)

    @classmethod
    def from_datasets(
        cls,
        train_dataset: Dataset | Iterable[Dataset] | None = None,
        val_dataset: Dataset | Iterable[Dataset] | None = None,
        test_dataset: Dataset | Iterable[Dataset] | None = None,
        predict_dataset: Dataset | Iterable[Dataset] | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **arguments: Any,
    ) -> Self:
        """A data module whose loaders read these datasets, the training data shuffled.

        Each is a dataset, or a list or dict of them. `arguments` go to `__init__`, which receives `batch_size` and
        `num_workers` too where it takes them.
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

    def __init__(self, datasets: Any, shuffle: bool, sizes: dict[str, int]):
        self.datasets, self.shuffle, self.sizes = datasets, shuffle, sizes

    def __call__(self) -> Any:
        datasets = self.datasets
        if isinstance(datasets, Mapping):
            return {name: self._load(dataset) for name, dataset in datasets.items()}
        if isinstance(datasets, Iterable) and not isinstance(datasets, Dataset):
            return [self._load(dataset) for dataset in datasets]
        return self._load(datasets)

    def _load(self, dataset: Any) -> DataLoader:
        shuffle = self.shuffle and not isinstance(dataset, IterableDataset)
        return DataLoader(dataset, shuffle=shuffle, pin_memory=torch.cuda.is_available(), **self.sizes)  # type: ignore[arg-type]
