"""A task on its way to the workers: put into the object store once, its large tensors once a machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray

from raylight.arguments.pickling import find_unpicklable
from raylight.contract.errors import InvalidArguments
from raylight.launch import handover
from raylight.launch.ray_roster import Member
from raylight.launch.shared_memory import Segment, memory_domain


class Delivery:
    """Pickled once, for all ranks and for those that replace them later."""

    def __init__(self, content: Any):
        try:
            payload, self._buffers = handover.dump(content)
        except Exception as error:
            raise InvalidArguments(find_unpicklable({"task": content}) or [str(error)]) from error
        self.payload: Any = ray.put(payload)
        self._in_store: Any = None
        self._by_domain: dict[str, Any] = {}
        self._segment: Segment | None = None

    def buffers_for(self, member: Member, generation: int) -> Any:
        """Where an actor finds the large tensors: in a segment of its machine.

        On the driver's own machine the driver fills it, without the object store; on another the first actor that asks.
        Where a machine has no segments, the actor copies from the object store.
        """
        if not self._buffers:
            return None
        domain = member.site.memory_domain
        if domain is None:
            return self._put()
        if domain not in self._by_domain:
            if domain == memory_domain():
                self._segment = Segment(self._buffers)
                self._by_domain[domain] = self._segment.address
            else:
                self._by_domain[domain] = member.actor.share.remote(generation, self._put())
        return self._by_domain[domain]

    def forget_actor_segments(self) -> None:
        """Of machines whose segment was made by an actor that may be gone: the next that asks makes it anew."""
        here = memory_domain()
        self._by_domain = {domain: source for domain, source in self._by_domain.items() if domain == here}

    def close(self) -> None:
        """What was delivered stays with those who have it."""
        if self._segment is not None:
            self._segment.close()
        self.payload, self._in_store, self._buffers = None, None, []
        self._by_domain.clear()

    def _put(self) -> Any:
        if self._in_store is None:
            self._in_store = ray.put([np.frombuffer(buffer, dtype=np.uint8) for buffer in self._buffers])
        return self._in_store
