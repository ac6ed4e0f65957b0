"""What is put into the outbox comes out once, in its order."""

from __future__ import annotations

from raylight.contract.messages import Hyperparameters, Notice
from raylight.worker.outbox import Outbox


def test_messages_come_out_once_and_in_order():
    outbox = Outbox()
    assert outbox.take() == []
    outbox.notice("first")
    outbox.put(Hyperparameters({"lr": 0.1}))
    outbox.notice("second", "warning")
    taken = outbox.take()
    assert taken == [Notice("first", "info"), Hyperparameters({"lr": 0.1}), Notice("second", "warning")]
    assert outbox.take() == []
    outbox.notice("third")
    assert taken[-1] == Notice("second", "warning")
