"""The tables of docs/migrating.md that the code makes. `python -m tests.lightning.migration_page` writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from raylight.arguments import resolving
from raylight.lightning.refused import REFUSED, STRATEGIES
from raylight.user import trainer_names

PAGE = Path(__file__).parents[2] / "docs" / "migrating.md"
BEGIN, END = "<!-- begin: {} -->\n", "<!-- end: {} -->\n"


def make_tables() -> dict[str, str]:
    """Each table by its name in the page."""
    names = [(f"{module}.*", row.sentence) for row in REFUSED if row.names == "*" for module in row.modules]
    names += [
        (f"{row.modules[0]}.{name}", row.sentence) for row in REFUSED for name in row.names.split() if name != "*"
    ]
    strategies = [(f'strategy="{name}"', sentence) for name, sentence in STRATEGIES.items()]
    return {
        "names": make_table("Name of Lightning's", names),
        "arguments": make_table("Argument of the trainer", [*strategies, *resolving.INSTEAD.items()]),
        "attributes": make_table("Name of the trainer", trainer_names.INSTEAD.items()),
    }


def make_table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """One row for each sentence, with all that it is said of."""
    said: dict[str, list[str]] = {}
    for name, sentence in rows:
        if name not in said.setdefault(sentence, []):
            said[sentence].append(name)
    lines = [f"| {title} | why, or what to use |", "|---|---|"]
    lines += [f"| {', '.join(f'`{name}`' for name in names)} | {sentence} |" for sentence, names in said.items()]
    return "\n".join(lines) + "\n"


def update(text: str) -> str:
    """The page with the tables as the code makes them; raises ValueError for one that has no place in it."""
    for name, table in make_tables().items():
        begin, end = BEGIN.format(name), END.format(name)
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the page has no place for the table {name!r}")
        text = re.sub(f"(?s){re.escape(begin)}.*?{re.escape(end)}", lambda _: begin + table + end, text)  # noqa: B023
    return text


if __name__ == "__main__":
    PAGE.write_text(update(PAGE.read_text()))
