"""What hooks draw after a script has seeded: as in Lightning in this process, and the same on every worker."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import raylight as pl
from raylight.contract import seeding

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}


def hooks(base: type) -> Any:
    """A module of raylight or of Lightning that draws in each hook up to the first step."""

    class Draws(base):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)
            self.drawn: list[Any] = []

        def draw(self, name: str) -> None:
            self.drawn.append((name, torch.rand(()).item(), random.random(), np.random.rand()))

        def setup(self, stage: str) -> None:
            self.train_set, self.val_set = random_split(TensorDataset(torch.arange(12.0).view(12, 1)), [8, 4])
            self.drawn.append((*self.train_set.indices, *self.val_set.indices))

        def configure_model(self) -> None:
            self.draw("configure_model")

        def configure_optimizers(self) -> Any:
            self.draw("configure_optimizers")
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_fit_start(self) -> None:
            self.draw("on_fit_start")

        def train_dataloader(self) -> Any:
            return DataLoader(self.train_set, batch_size=2, shuffle=True)

        def val_dataloader(self) -> Any:
            return DataLoader(self.val_set, batch_size=2)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            torch.rand(3)  # in the sanity check too, which leaves no trace

        def on_train_start(self) -> None:
            self.draw("on_train_start")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.layer(batch[0]).mean()

    return Draws


class Drawing(hooks(pl.Module)):  # type: ignore[misc]
    def setup(self, stage: str) -> None:
        super().setup(stage)
        torch.save(self.drawn[0], f"{self.folder}/rank-{self.global_rank}.pt")


def run(begin: Any, num_workers: int, folder: Path, **arguments: Any) -> list[Any]:
    begin()
    module = Drawing()
    module.folder = str(folder)
    given = {"checkpoint": False, "use_gpu": False, "storage_path": str(folder), **arguments}
    pl.Trainer(num_workers=num_workers, **QUIET, **given).fit(module)
    drawn: list[Any] = module.drawn
    return drawn


def seed_all() -> None:
    pl.seed_everything(7, verbose=False)


def seed_torch_alone() -> None:
    torch.manual_seed(3)
    random.seed(4)
    np.random.seed(5)


@pytest.fixture(autouse=True)
def no_seed_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeding, "_last_seed", None)


@pytest.mark.parametrize("seed", [seed_all, seed_torch_alone])
@pytest.mark.filterwarnings("ignore")
def test_hooks_draw_in_this_process_what_they_draw_in_lightning(seed: Any, tmp_path: Path) -> None:
    import pytorch_lightning

    seed()
    theirs = hooks(pytorch_lightning.LightningModule)()
    pytorch_lightning.Trainer(
        **QUIET, accelerator="cpu", enable_checkpointing=False, default_root_dir=str(tmp_path)
    ).fit(theirs)
    ours = run(seed, 0, tmp_path)
    assert ours[:-1] == theirs.drawn[:-1]
    # Lightning's loaders have drawn a seed from torch by then; those of raylight draw from streams of their own.
    assert ours[-1][2:] == theirs.drawn[-1][2:]


def test_the_next_run_shuffles_otherwise(tmp_path: Path) -> None:
    class Seen(Drawing):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen = [*getattr(self, "seen", []), *batch[0].flatten().tolist()]
            return super().training_step(batch, batch_idx)

    orders = []
    torch.manual_seed(1)
    for _ in range(2):
        module = Seen()
        module.folder = str(tmp_path)
        state = torch.get_rng_state()
        pl.Trainer(num_workers=0, checkpoint=False, use_gpu=False, storage_path=str(tmp_path), **QUIET).fit(module)
        torch.set_rng_state(state)  # as if the run had drawn nothing itself
        torch.rand(1)
        orders.append(module.seen)
    assert orders[0] != orders[1]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("arguments", [{}, {"seed": 5}])
def test_all_workers_draw_in_setup_what_one_process_draws(arguments: dict[str, Any], tmp_path: Path) -> None:
    here = run(seed_all, 0, tmp_path, **arguments)
    there = run(seed_all, 2, tmp_path, **arguments)
    assert there == here
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]
    assert ranks == [here[0], here[0]]
