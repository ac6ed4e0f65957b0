"""The hooks that bring data and move it, which a module and a data module both have."""

from __future__ import annotations

import torch

from raylight.contract.kinds import Batch, Loader, Value
from raylight.user.transfer import move_to_device


class DataHooks:
    """Each may be overridden. If both do, a data module's loaders and batch hooks take the place of the module's."""

    prepare_data_per_node: bool = True
    """Call `prepare_data` on one worker of each node; False: on rank 0 alone, for storage that all nodes share."""
    allow_zero_length_dataloader_with_multiple_devices: bool = False
    """Lightning's; a worker without a batch takes part with nothing here, whatever it says."""

    def prepare_data(self) -> None:
        """Download or write data, on one worker of each node while the others wait (see `prepare_data_per_node`); keep
        nothing on `self`."""

    def setup(self, stage: str) -> None:
        """Build what depends on the data, on every worker; `stage` is "fit", "validate", "test" or "predict"."""

    def teardown(self, stage: str) -> None:
        """Release what `setup` made; the last hook of a run, on every worker. `stage` is as in `setup`."""

    def train_dataloader(self) -> Loader:
        """Make the training loader, or a list or dict of them; not called if loaders were passed."""

    def val_dataloader(self) -> Loader:
        """Make the validation loader, or a list or dict of them; not called if loaders were passed."""

    def test_dataloader(self) -> Loader:
        """Make the test loader, or a list or dict of them; not called if loaders were passed."""

    def predict_dataloader(self) -> Loader:
        """Make the prediction loader, or a list or dict of them; not called if loaders were passed."""

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Change a batch before it goes to the device, as by augmentation on the CPU; return it."""
        return batch

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Return the batch with every tensor on `device`; override it for a batch of a class of your own."""
        return move_to_device(batch, device)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Change a batch on the device, as by augmentation on the GPU; return it."""
        return batch

    def on_exception(self, exception: BaseException) -> None:
        """Called on the worker that raised `exception`; an error in this hook becomes a note to it."""


class CheckpointHooks:
    """The hooks that see a checkpoint as a dict."""

    def on_save_checkpoint(self, checkpoint: dict[str, Value]) -> None:
        """Add to a checkpoint, on every worker alike: plain values and tensors only."""

    def on_load_checkpoint(self, checkpoint: dict[str, Value]) -> None:
        """Read or change a checkpoint before its weights are loaded, for evaluation too."""
