"""A last checkpoint on this machine, for a run whose storage has failed for good."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from raylight.storage.manifest import Manifest

if TYPE_CHECKING:
    from raylight.contract.messages import Saved
    from raylight.storage.filesystem import Storage


class LocalSpare:
    """What `Storage.local_spare` gives: `files` lie in a new folder of this machine."""

    def __init__(self, files: Storage):
        self.files = files

    def commit(self, saved: Saved, seed: int) -> str:
        """Makes the checkpoint exist that one rank has written whole. Returns its URI, which `resume=` takes whatever
        the storage of the run is."""
        manifest = Manifest(
            step=saved.step, epoch=saved.epoch, files=saved.files, metrics=saved.metrics,
            weights_only=saved.weights_only, seed=seed,
        )  # fmt: skip
        self.files.write(f"{saved.directory}/manifest.json", [manifest.to_bytes()])
        path: Any = self.files.local_path(saved.directory)
        return f"file://{quote(path)}"
