"""docs/migrating.md says what the code says."""

from __future__ import annotations

import re
from typing import Any

import pytest

import raylight as pl
from raylight.contract.errors import InvalidArguments
from tests.lightning.migration_page import PAGE, make_tables, update


def test_the_tables_are_those_of_the_code():
    text = PAGE.read_text()
    assert update(text) == text, "run: python -m tests.lightning.migration_page"
    assert all(len(table.splitlines()) > 5 for table in make_tables().values())


def test_modules_and_names_that_the_page_says_are_there():
    text = PAGE.read_text().partition("## What is not there")[0]
    found = re.findall(r"`(?:raylight|pl)\.([a-z_]+(?:\.[A-Za-z_]+)*)`", text)
    assert len(found) > 8
    for name in found:
        value: Any = pl
        for part in name.split("."):
            value = getattr(value, part)


def test_the_sentences_of_the_page_are_those_of_the_errors():
    text = PAGE.read_text()
    for arguments in ({"tpu_cores": 8}, {"strategy": "deepspeed_stage_2"}):
        with pytest.raises(InvalidArguments) as caught:
            pl.Trainer(num_workers=0, **arguments)  # type: ignore[arg-type]
        sentence = str(caught.value).rpartition("; ")[2].rpartition("does not take it: ")[2]
        assert f"| {sentence} |" in text
