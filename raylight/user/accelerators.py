"""`trainer.accelerator`: the kind of device a run uses, with Lightning's names."""

from __future__ import annotations

import torch


class Accelerator:
    """One kind of device. Compare with `isinstance`; it moves and places nothing."""

    @staticmethod
    def name() -> str:
        """The name that `Trainer(accelerator=)` takes."""
        raise NotImplementedError

    @staticmethod
    def auto_device_count() -> int:
        """Number of such devices on this machine."""
        raise NotImplementedError

    @staticmethod
    def is_available() -> bool:
        """Whether this machine has one."""
        raise NotImplementedError


class CPUAccelerator(Accelerator):
    """Workers compute on CPUs."""

    @staticmethod
    def name() -> str:
        return "cpu"

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True


class CUDAAccelerator(Accelerator):
    """Workers compute on NVIDIA or AMD GPUs."""

    @staticmethod
    def name() -> str:
        return "cuda"

    @staticmethod
    def auto_device_count() -> int:
        return torch.cuda.device_count()

    @staticmethod
    def is_available() -> bool:
        return torch.cuda.is_available()


def accelerator_of(device: torch.device) -> Accelerator:
    """The accelerator that a device belongs to."""
    return CUDAAccelerator() if device.type == "cuda" else CPUAccelerator()
