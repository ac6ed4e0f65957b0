"""A measured figure, what it should reach, and the table that shows both."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

FILE_VARIABLE = "RAYLIGHT_FIGURES"


@dataclass(frozen=True, slots=True)
class Figure:
    """`value` in `unit`; `at_most` or `at_least` is the target where there is one."""

    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def target(self) -> str:
        if self.at_most is not None:
            return f"at most {self.at_most:g}"
        return "" if self.at_least is None else f"at least {self.at_least:g}"

    @property
    def verdict(self) -> str:
        if not self.target:
            return ""
        met = self.value <= self.at_most if self.at_most is not None else self.value >= (self.at_least or 0.0)
        return "met" if met else "MISSED"


def show(title: str, figures: Iterable[Figure]) -> None:
    """Prints the table of one benchmark, and leaves it for the table at the end where `make bench` asks for that."""
    figures = list(figures)
    print(f"\n{table(title, figures)}\n", flush=True)
    if path := os.environ.get(FILE_VARIABLE):
        with Path(path).open("a") as file:
            file.write(json.dumps({"title": title, "figures": [asdict(figure) for figure in figures]}) + "\n")


def read(path: Path) -> list[tuple[str, list[Figure]]]:
    """What `show` left in the file, in order."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [(entry["title"], [Figure(**figure) for figure in entry["figures"]]) for entry in entries]


def table(title: str, figures: list[Figure]) -> str:
    width = max((len(figure.name) for figure in figures), default=0)
    rows = [
        f"  {it.name:{width}}  {significant(it.value):>9} {it.unit:<10}  {it.target:<14} {it.verdict}" for it in figures
    ]
    return "\n".join([title, *(row.rstrip() for row in rows)])


def significant(value: float) -> str:
    """Three or four significant digits, never an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"
