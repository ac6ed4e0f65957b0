from __future__ import annotations

import pickle
import threading
from dataclasses import dataclass

import cloudpickle
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, TensorDataset

from raylight import fit
from raylight.contract.errors import CheckpointMismatch
from raylight.user.data_module import DataModule
from raylight.user.module import Module
from raylight.worker.returned import MAX_BYTES


class Digits(DataModule):
    def __init__(self, folder, batch_size=32, *, augment=False):
        super().__init__()
        self.save_hyperparameters(ignore="folder")
        self.folder = folder

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(10)), batch_size=self.hparams.batch_size)


class Forgetful(DataModule):
    def __init__(self):  # without super().__init__()
        self.save_hyperparameters({"lr": 0.1})


def test_hyperparameters_are_kept():
    data = Digits("/data", 5)
    assert data.hparams == {"batch_size": 5, "augment": False}
    assert data.train_dataloader().batch_size == 5
    assert Forgetful().hparams.lr == 0.1
    assert Digits("/data").hparams is not data.hparams


def test_hooks_that_are_not_overridden_do_nothing():
    data = DataModule()
    assert data.trainer is None
    assert data.prepare_data() is data.setup("fit") is data.teardown("fit") is None
    for stage in ("train", "val", "test", "predict"):
        assert getattr(data, f"{stage}_dataloader")() is None
    assert data.state_dict() == {}
    data.load_state_dict({})
    batch = {"x": torch.ones(2)}
    assert data.on_before_batch_transfer(batch, 0) is batch
    assert data.on_after_batch_transfer(batch, 0) is batch
    assert data.transfer_batch_to_device(batch, torch.device("meta"), 0)["x"].is_meta


def test_what_is_pickled_leaves_the_run_behind():
    data = Digits("/data", 5)
    data.trainer = lambda: None  # cannot be pickled
    copied = pickle.loads(pickle.dumps(data))
    assert copied.trainer is None
    assert copied.hparams == data.hparams
    assert data.trainer is not None


def test_from_datasets_shuffles_what_is_trained_on():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(4))

    dataset = TensorDataset(torch.arange(10))
    data = DataModule.from_datasets(dataset, [dataset, dataset], {"a": dataset}, batch_size=4)
    data = cloudpickle.loads(cloudpickle.dumps(data))
    train = data.train_dataloader()
    assert isinstance(train.sampler, RandomSampler)
    assert train.batch_size == 4
    assert [type(loader.sampler) for loader in data.val_dataloader()] == [SequentialSampler] * 2
    assert list(data.test_dataloader()) == ["a"]
    assert data.predict_dataloader() is None
    assert list(DataModule.from_datasets(Stream()).train_dataloader()) == [0, 1, 2, 3]


def test_from_datasets_gives_init_what_it_takes():
    data = Digits.from_datasets(val_dataset=TensorDataset(torch.arange(3)), batch_size=7, folder="/x", augment=True)
    assert data.hparams == {"batch_size": 7, "augment": True}
    assert data.val_dataloader().batch_size == 7
    with pytest.raises(TypeError, match="folder"):
        Digits.from_datasets()


class Line(Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(1, 1)

    def training_step(self, batch):
        return self.net(batch[0].float()[:, None]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def test_it_is_rebuilt_from_a_checkpoint(tmp_path):
    result = fit(Line(), Digits("/data", 5, augment=True), num_workers=0, max_epochs=1, storage_path=str(tmp_path))
    path = result.last_checkpoint.path
    again = Digits.load_from_checkpoint(path, folder="/other", batch_size=2)
    assert (again.folder, again.hparams) == ("/other", {"batch_size": 2, "augment": True})
    with pytest.raises(CheckpointMismatch, match="needs 'folder'"):
        Digits.load_from_checkpoint(path)


@dataclass
class Note:
    epoch: int


class Counting(Digits):
    """Gets attributes while it trains."""

    def prepare_data(self):
        self.prepared = True

    def setup(self, stage):
        self.stages = [*getattr(self, "stages", []), stage]
        self.made = TensorDataset(torch.arange(10))
        self.large = np.zeros(MAX_BYTES + 1, dtype=np.int8)
        self.notes = []
        self.function = make_note
        self.lock = threading.Lock()

    def train_dataloader(self):
        self.notes.append(Note(self.trainer.current_epoch))
        return super().train_dataloader()


def make_note(epoch):
    return Note(epoch)


class WithHistory(Line):
    def on_train_epoch_end(self):
        self.history = [*getattr(self, "history", []), Note(self.current_epoch)]


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.ray)])
def test_what_it_gets_in_training_comes_back(tmp_path, request, num_workers, capsys):
    if num_workers:
        request.getfixturevalue("ray_cluster")
    given = TensorDataset(torch.arange(3))
    data, module = Counting("/data", 5), WithHistory()
    data.given = given
    fit(module, data, num_workers=num_workers, max_epochs=2, storage_path=str(tmp_path), enable_progress_bar=False)
    assert (data.prepared, data.stages, data.notes) == (True, ["fit"], [Note(0)])
    assert torch.equal(data.made.tensors[0], torch.arange(10))
    assert data.given is given
    assert data.function is make_note
    assert module.history == [Note(0), Note(1)]
    assert type(module.history[0]) is Note
    assert Note(3).epoch == 3
    if num_workers:
        assert not hasattr(data, "large")
        assert "Counting.large (268 MB) is not sent back" in capsys.readouterr().out
