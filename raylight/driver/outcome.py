"""Outcome: the last word of each rank."""

from __future__ import annotations

from dataclasses import replace

from raylight.contract.messages import BatchOutputs, Died, Failure, Finished, PeerLost, Started

Failed = Failure | Died | PeerLost
"""How a rank ends that did not finish."""


class Outcome:
    """The node of each rank, and how the rank ended."""

    def __init__(self) -> None:
        self._finished: dict[int, Finished] = {}
        self._failures: dict[int, Failed] = {}
        self._nodes: dict[int, Started] = {}

    def note(self, rank: int, message: Started | Finished | Failed) -> None:
        if isinstance(message, Started):
            self._nodes[rank] = message
        elif isinstance(message, Finished):
            self._finished[rank] = message
        else:
            self._failures[rank] = message

    def begin_generation(self) -> None:
        """Ranks run again, those that had finished among them."""
        self._finished.clear()

    @property
    def has_failures(self) -> bool:
        return bool(self._failures)

    def take_failures(self) -> dict[int, Failed]:
        """The failures since the last call, by rank."""
        taken, self._failures = self._failures, {}
        return taken

    @property
    def first(self) -> Finished | None:
        """The end of rank 0, which speaks for the run; None while it is running."""
        return self._finished.get(0)

    @property
    def statuses(self) -> set[str]:
        return {message.status for message in self._finished.values()}

    def take_outputs(self) -> list[BatchOutputs]:
        """The predictions of each rank. They are not kept, since the driver lives as long as the trainer."""
        taken = [self._finished[rank].outputs for rank in sorted(self._finished)]
        self._finished = {rank: replace(message, outputs=[]) for rank, message in self._finished.items()}
        return taken

    def node_of(self, rank: int) -> str:
        return self._nodes[rank].node if rank in self._nodes else "unknown node"
