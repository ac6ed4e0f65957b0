"""Values of whole epochs, each written once: an epoch's end that fails in its middle comes again."""

from __future__ import annotations

from raylight.contract.messages import EpochMetrics

KEEP = 10_000
"""Rows that are remembered; a group goes back by fewer."""


class EpochRows:
    """Remembers what was written of which step, and in which generation of the group."""

    def __init__(self) -> None:
        self._generation = 0
        self._written: dict[
            tuple[str, int, int, int | None], int
        ] = {}  # by name, step, epoch, logger: the generation, newest last

    def take(self, message: EpochMetrics) -> dict[str, float]:
        """The values of a message that go to loggers, without those that they have from a generation before.

        Within a generation a name may come twice at one step, as of two validations.
        """
        logged = {}
        for name in message.values:
            key = (name, message.step, message.epoch, message.logger)
            if name in message.logged and self._written.get(key, self._generation) == self._generation:
                self._written[key], logged[name] = self._generation, message.values[name]
        while len(self._written) > KEEP:
            del self._written[next(iter(self._written))]
        return logged

    def begin_generation(self) -> None:
        self._generation += 1

    def redo_from(self, step: int) -> None:
        """The steps after this one are made again, and what was written of them was taken back."""
        self._written = {key: generation for key, generation in self._written.items() if key[1] <= step}
