"""Global settings that a script has made, read and applied elsewhere."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator

import cloudpickle
import numpy as np
import pytest
import torch

from raylight.contract.process_settings import apply_settings, read_settings


class Ours(UserWarning):
    pass


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = read_settings()
    yield
    assert apply_settings(before) == []
    assert read_settings() == before


def set_much() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_anomaly_enabled(True, check_nan=False)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.enable_flash_sdp(False)
    torch.multiprocessing.set_sharing_strategy("file_system")
    torch.set_warn_always(True)
    torch.serialization.add_safe_globals([Ours])
    torch.set_printoptions(precision=9)
    np.set_printoptions(precision=3)
    np.seterr(divide="raise")
    sys.setrecursionlimit(2345)
    warnings.filterwarnings("error", "never again", Ours)
    logging.getLogger("ours.part").setLevel(logging.DEBUG)
    logging.disable(logging.INFO)


def test_every_setting_arrives() -> None:
    before = read_settings()
    set_much()
    changed = read_settings()
    names = {name for name in changed if changed[name] != before[name]}
    sent = cloudpickle.loads(cloudpickle.dumps(changed))
    logging.getLogger("ours.part").setLevel(logging.NOTSET)  # as in a process that has never heard of it
    apply_settings(before)
    assert read_settings() == before
    assert apply_settings(sent) == []
    assert read_settings() == changed
    with pytest.raises(Ours):
        warnings.warn("never again", Ours, stacklevel=1)
    assert names >= {
        "default dtype", "default device", "deterministic algorithms", "filling of uninitialized memory",
        "anomaly mode", "float32 matmul precision", "cudnn enabled", "cudnn benchmark", "cudnn deterministic",
        "matmul allow_bf16_reduced_precision_reduction", "flash attention", "sharing strategy", "warnings each time",
        "classes that may be loaded", "printing of tensors", "printing of arrays", "errors of arrays",
        "recursion limit", "warning filters", "log levels", "disabled log levels",
    }  # fmt: skip


def test_torchs_new_names_for_the_precision_of_float32_arrive_too() -> None:
    before = read_settings()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    changed = read_settings()
    apply_settings(before)
    assert torch.backends.cuda.matmul.fp32_precision == "none"
    apply_settings(changed)
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_what_this_process_refuses_is_named() -> None:
    assert apply_settings({"sharing strategy": "by pigeon", "unknown": 1}) == ["sharing strategy"]


def test_log_records_are_printed_as_in_the_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    logging.basicConfig(format="<%(name)s> %(message)s", level=logging.INFO)
    sent = read_settings()
    monkeypatch.setattr(logging.root, "handlers", [])
    for _ in range(2):  # a worker is used for several runs
        apply_settings({"log records on the console": None, "log levels": {"": (logging.WARNING, False, True)}})
        apply_settings(sent)
        logging.getLogger("part").info("now")
    assert capsys.readouterr().err == "<part> now\n" * 2
