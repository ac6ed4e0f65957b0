"""DepartedValues: what ranks have logged in an epoch that they do not live to end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from raylight.contract.task import EpochValues


class DepartedValues:
    """Keeps, for each rank, the epoch and what the rank has logged in it so far; rank 0 takes over those of ranks
    that leave."""

    def __init__(self) -> None:
        self._of_ranks: dict[int, list[tuple[int, EpochValues]]] = {}
        self._departed: list[tuple[int, EpochValues]] = []

    def note(self, rank: int, epoch: int, values: EpochValues) -> None:
        self._of_ranks[rank] = [(epoch, values)]

    def depart(self, ranks: Iterable[int]) -> None:
        """These ranks are gone; their values wait for the next generation."""
        for rank in ranks:
            self._departed += self._of_ranks.pop(rank, [])

    def renumber(self, left: Sequence[int]) -> None:
        """The ranks that are `left` move up to the ranks 0, 1, …"""
        self._of_ranks = {new: self._of_ranks[old] for new, old in enumerate(left) if old in self._of_ranks}

    def hand_over(self) -> tuple[tuple[int, EpochValues], ...]:
        """The values of departed ranks, which count as those of rank 0 from here on."""
        departed, self._departed = self._departed, []
        if departed:
            self._of_ranks[0] = self._of_ranks.get(0, []) + departed
        return tuple(departed)

    def clear(self) -> None:
        """All ranks begin from a checkpoint, which holds what each had logged."""
        self._of_ranks.clear()
        self._departed.clear()

    def read(self, rank: int) -> list[tuple[int, EpochValues]]:
        return list(self._of_ranks.get(rank, []))
