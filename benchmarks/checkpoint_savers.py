"""Ways to save the state of a training loop: raylight's, and those of the rivals, behind one interface."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raylight.contract.messages import Saved
from raylight.storage.filesystem import Storage
from raylight.worker.checkpoint.snapshot import Snapshots, State

WIDTH, NUM_LAYERS, BATCH_SIZE = 2048, 12, 16


@dataclass
class Run:
    """A net of 201 MB with Adam: 604 MB of training state."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Tensor

    @classmethod
    def make(cls) -> Run:
        torch.manual_seed(0)
        layers = [layer for _ in range(NUM_LAYERS) for layer in (nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU())]
        net = nn.Sequential(*layers)
        run = cls(net, torch.optim.Adam(net.parameters(), lr=1e-4, fused=True), torch.randn(BATCH_SIZE, WIDTH))
        run.step(lambda: None)
        return run

    def step(self, before_optimizer_step: Callable[[], None]) -> None:
        loss = self.net(self.batch).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        before_optimizer_step()
        self.optimizer.step()

    def owned(self) -> list[Tensor]:
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        return [*self.net.parameters(), *state]

    def state(self) -> dict[str, Any]:
        return {"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def raylight_state(self) -> State:
        return State(
            model=self.net.state_dict(),
            replicated={"optimizers": [self.optimizer.state_dict()], "loop": {"step": 1}},
            own={"rng": torch.get_rng_state()},
        )

    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.owned())


class Saver:
    """`save` and `before_step` run inside the loop, `finish` after it: the state is on disk when it returns."""

    def __init__(self, run: Run, folder: Path):
        self.run, self.folder = run, folder

    def save(self) -> None: ...
    def before_step(self) -> None: ...
    def is_writing(self) -> bool:
        return False

    def finish(self) -> None: ...
    def close(self) -> None: ...


class Nothing(Saver):
    """No checkpoint: what the others are compared with."""


class Raylight(Saver):
    """Copy behind forward and backward, write behind the loop; with digests, fsync and rename."""

    def __init__(self, run: Run, folder: Path):
        super().__init__(run, folder)
        self.snapshots = Snapshots(Storage(folder), 0, 1)
        self.snapshots.reserve(run.raylight_state(), False, run.owned())
        self.messages: list[Any] = []

    def save(self) -> None:
        taken = self.snapshots.take("raylight", 1, 0, self.run.raylight_state(), {}, False, self.run.owned())
        assert taken

    def before_step(self) -> None:
        assert self.snapshots.wait()

    def is_writing(self) -> bool:
        self.messages += self.snapshots.poll()
        return not self.messages

    def finish(self) -> None:
        (message,) = self.messages or self.snapshots.close()
        assert isinstance(message, Saved), message
        self.messages = []


class TorchSave(Saver):
    """torch.save to a local file."""

    def save(self) -> None:
        torch.save(self.run.state(), self.folder / "torch.pt")


class Lightning(Saver):
    """Trainer.save_checkpoint, which is what ModelCheckpoint calls."""

    plugins: tuple[Any, ...] = ()

    def __init__(self, run: Run, folder: Path):
        super().__init__(run, folder)
        import pytorch_lightning as lightning

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = run.net

            def training_step(self, batch: Tensor, index: int) -> Tensor:
                return self.net(batch).square().mean()

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return run.optimizer

        self.trainer = lightning.Trainer(
            max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, plugins=list(self.plugins),
        )  # fmt: skip
        self.trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(2, WIDTH), batch_size=2))

    def save(self) -> None:
        self.trainer.save_checkpoint(self.folder / "lightning.ckpt")


class LightningAsync(Lightning):
    """The same with Lightning's AsyncCheckpointIO."""

    def __init__(self, run: Run, folder: Path):
        from pytorch_lightning.plugins.io import AsyncCheckpointIO

        self.plugins = (AsyncCheckpointIO(),)
        self.written: Future | None = None
        super().__init__(run, folder)

    def save(self) -> None:
        super().save()
        self.written = self.plugins[0]._executor.submit(lambda: None)  # its one thread comes to this after the write

    def is_writing(self) -> bool:
        return self.written is not None and not self.written.done()

    def finish(self) -> None:
        assert self.written is not None
        self.written.result()

    def close(self) -> None:
        self.plugins[0].teardown()


class DCPAsync(Saver):
    """torch.distributed.checkpoint.async_save with its defaults: a thread, new buffers for each save."""

    stager: Any = None

    def __init__(self, run: Run, folder: Path):
        super().__init__(run, folder)
        import torch.distributed as dist

        if not dist.is_initialized():
            store = dist.FileStore(tempfile.mktemp(dir=folder), 1)
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        self.written: Future | None = None

    def save(self) -> None:
        import torch.distributed.checkpoint as dcp

        path = self.folder / "dcp"
        self.written = dcp.async_save(self.run.state(), checkpoint_id=path, async_stager=self.stager)

    def is_writing(self) -> bool:
        return self.written is not None and not self.written.done()

    def finish(self) -> None:
        assert self.written is not None
        self.written.result()


class DCPAsyncKeptBuffers(DCPAsync):
    """The same with a stager that keeps its buffers."""

    def __init__(self, run: Run, folder: Path):
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self.stager = DefaultStager(StagingOptions(False, False, False, False))
        super().__init__(run, folder)

    def close(self) -> None:
        self.stager.close()


class RayTrainAsync(Saver):
    """ray.train.report of a folder that torch.save has written, uploaded behind the loop; inside a Ray Train worker."""

    def __init__(self, run: Run, folder: Path):
        super().__init__(run, folder)
        self.local: Path | None = None

    def save(self) -> None:
        import ray.train

        self.local = Path(tempfile.mkdtemp(dir=self.folder))
        torch.save(self.run.state(), self.local / "state.pt")
        ray.train.report(
            {}, checkpoint=ray.train.Checkpoint.from_directory(self.local),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC, delete_local_checkpoint_after_upload=True,
        )  # fmt: skip

    def is_writing(self) -> bool:
        return self.local is not None and self.local.exists()  # deleted after the upload

    def finish(self) -> None:
        while self.is_writing():
            time.sleep(0.005)


def empty(folder: Path) -> None:
    """Deletes what was saved and lets the disk come to rest, so that no saver pays for the one before."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix in (".pt", ".ckpt"):
            path.unlink()
    os.sync()
