"""`trainer.accelerator`: the kind of device a run uses, with Lightning's names."""

from __future__ import annotations

import torch

from raylight.contract.errors import InvalidArguments


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

    def __init_subclass__(cls, **kwargs: object):
        super().__init_subclass__(**kwargs)
        if cls.__module__ != __name__:
            raise InvalidArguments(f"{cls.__name__}: raylight trains on GPUs and CPUs; the run calls no accelerator")


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


class MPSAccelerator(Accelerator):
    """Workers compute on the GPU of an Apple computer."""

    @staticmethod
    def name() -> str:
        return "mps"

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return torch.backends.mps.is_available()


def accelerator_of(device: torch.device) -> Accelerator:
    """The accelerator that a device belongs to."""
    return {"cuda": CUDAAccelerator, "mps": MPSAccelerator}.get(device.type, CPUAccelerator)()
