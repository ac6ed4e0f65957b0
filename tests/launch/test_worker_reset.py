from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from raylight.launch.worker_reset import WorkerReset, is_users_module


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = dict(sys.modules)
    for name, module in before.items():  # other tests have imported modules whose files are gone, which is a change
        if is_users_module(module):
            del sys.modules[name]
    yield tmp_path
    for name in ("user_part", "user_whole"):
        sys.modules.pop(name, None)
    sys.modules.update(before)  # the tests are user code too, and were dropped with the rest


def write(folder: Path, name: str, text: str, seconds_ago: float = 10.0) -> None:
    path = folder / f"{name}.py"
    path.write_text(text)
    moment = path.stat().st_mtime - seconds_ago
    os.utime(path, (moment, moment))


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_torch_is_not_the_users():
    import torch

    assert not is_users_module(torch)
    assert not is_users_module(torch.ops), "its __file__ is no path"


def test_modules_whose_files_are_as_they_were_stay(user_folder: Path):
    write(user_folder, "user_part", "VALUE = 1")
    reset = WorkerReset()
    before = load("user_part")
    reset.note_modules()
    assert reset.drop_changed_modules() is False
    assert load("user_part") is before


def test_one_changed_file_means_that_all_the_users_modules_are_imported_afresh(user_folder: Path):
    write(user_folder, "user_part", "VALUE = 1")
    write(user_folder, "user_whole", "from user_part import VALUE")
    reset = WorkerReset()
    assert load("user_whole").VALUE == 1
    reset.note_modules()
    write(user_folder, "user_part", "VALUE = 2", seconds_ago=5.0)
    assert reset.drop_changed_modules() is True
    assert load("user_whole").VALUE == 2
    assert sys.modules["json"] is json


def test_a_file_that_was_written_while_its_module_was_being_imported_counts_as_changed(user_folder: Path):
    reset = WorkerReset()
    write(user_folder, "user_part", "VALUE = 1", seconds_ago=-10.0)
    load("user_part")
    reset.note_modules()
    assert reset.drop_changed_modules() is True


def test_a_deleted_file_counts_as_changed(user_folder: Path):
    write(user_folder, "user_part", "VALUE = 1")
    reset = WorkerReset()
    load("user_part")
    reset.note_modules()
    (user_folder / "user_part.py").unlink()
    assert reset.drop_changed_modules() is True
    with pytest.raises(ModuleNotFoundError):
        load("user_part")


def test_raylight_and_installed_packages_are_never_dropped(user_folder: Path):
    write(user_folder, "user_part", "VALUE = 1")
    load("user_part")
    reset = WorkerReset()
    reset.note_modules()
    write(user_folder, "user_part", "VALUE = 2")
    names = {"raylight.launch.worker_reset", "torch", "pytest", "pathlib"} & set(sys.modules)
    before = {name: sys.modules[name] for name in names}
    assert reset.drop_changed_modules() is True
    assert {name: sys.modules.get(name) for name in names} == before
