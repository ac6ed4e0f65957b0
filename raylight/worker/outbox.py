"""Outbox: what hooks and the engine want to send before the loop yields its next message."""

from __future__ import annotations

from raylight.contract.messages import Message, Notice


class Outbox:
    """Messages in the order in which they were put in; the loop sends them when it next may."""

    def __init__(self) -> None:
        self._messages: list[Message] = []

    def put(self, message: Message) -> None:
        self._messages.append(message)

    def notice(self, text: str, level: str = "info") -> None:
        """Shows the person a sentence, once; `level` is "info" or "warning"."""
        self.put(Notice(text, level))

    def take(self) -> list[Message]:
        taken, self._messages = self._messages, []
        return taken
