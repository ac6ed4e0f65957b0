"""What a hook gives to an experiment, packed as it is now, for the driver's process."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

from raylight.contract.kinds import Value
from raylight.worker.returned import Packer


def pack(content: Value) -> bytes:
    """Raises what pickle raises for an object that cannot be sent."""
    file = io.BytesIO()
    _CallPacker(file, protocol=5).dump(content)
    return file.getvalue()


class _CallPacker(Packer):
    """Tensors go by value. An image, sound or page of W&B is a file on this machine: its bytes go along."""

    def reducer_override(self, obj: Value) -> Value:
        kind = type(obj)
        if kind.__module__.startswith("wandb.") and os.path.isfile(path := getattr(obj, "_path", None) or ""):
            return _restore_media, (kind, vars(obj), Path(path).read_bytes(), os.path.splitext(path)[1])
        return super().reducer_override(obj)


def _restore_media(kind: Value, attributes: dict[str, Value], data: bytes, suffix: str) -> Value:
    """The library moves the file to its run, since it is told that it is a temporary one."""
    media = kind.__new__(kind)
    vars(media).update(attributes)
    with tempfile.NamedTemporaryFile(suffix=suffix, delete=False) as file:
        file.write(data)
    vars(media).update(_path=file.name, _is_tmp=True, _image=None)
    return media
