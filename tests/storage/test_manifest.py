"""What a manifest must not hold, and what is said of what it holds beyond that."""

from __future__ import annotations

import json
import logging

import pytest

from raylight.contract.errors import CheckpointCorrupt
from raylight.contract.messages import FileWanted, SavedFile
from raylight.storage import manifest as manifest_module
from raylight.storage.digests import digest_of
from raylight.storage.manifest import _BLANK_DIGEST, Manifest

FILE = SavedFile("model.pt", 1, digest_of(b"1"))


def with_digest(text: str) -> bytes:
    digest = json.loads(text)["digest"]
    blank = text.replace(digest, _BLANK_DIGEST, 1).encode()
    return blank.replace(_BLANK_DIGEST.encode(), digest_of(blank).encode(), 1)


def test_a_file_that_is_listed_twice_is_damage():
    data = Manifest(step=1, epoch=0, files=(FILE, FILE)).to_bytes()
    with pytest.raises(CheckpointCorrupt, match=r"'model\.pt' is listed 2 times"):
        Manifest.from_bytes(data)


def test_an_entry_that_is_there_twice_is_damage():
    text = Manifest(step=1, epoch=0, files=(FILE,)).to_bytes().decode()
    with pytest.raises(CheckpointCorrupt, match="the entry 'step' is there more than once"):
        Manifest.from_bytes(with_digest(text.replace('"step": 1,', '"step": 1,\n "step": 1,')))


def test_fields_that_are_not_known_are_named_once_and_passed_over(caplog, monkeypatch):
    monkeypatch.setattr(manifest_module, "_warned", set())
    text = Manifest(step=1, epoch=0, files=(FILE,)).to_bytes().decode()
    data = with_digest(text.replace('"step": 1,', '"step": 1,\n "shards": 2,').replace('"size"', '"zone": 1, "size"'))
    with caplog.at_level(logging.WARNING, "raylight"):
        assert Manifest.from_bytes(data).step == Manifest.from_bytes(data).step == 1
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["files[...].zone, shards"]


def test_it_knows_which_files_were_to_be_made():
    wanted = (FileWanted("s3://bucket/epoch=1.ckpt", False, 1), FileWanted("/runs/é.ckpt", True, 2, ("key", {"a": 1})))
    read = Manifest.from_bytes(Manifest(step=1, epoch=0, files=(FILE,), wanted=wanted).to_bytes())
    assert read.wanted == (wanted[0], FileWanted("/runs/é.ckpt", True, 2))  # the checkpoint has the states
    assert b"wanted" not in Manifest(step=1, epoch=0, files=(FILE,)).to_bytes()
