"""A task on its way to the workers: put into the object store once, its large tensors once a machine."""

from __future__ import annotations

import numpy as np
import ray

from raylight.arguments.pickling import find_unpicklable
from raylight.contract.errors import InvalidArguments
from raylight.launch import handover
from raylight.launch.ray_roster import Member
from raylight.launch.shared_memory import Segment, SegmentAddress, memory_domain

Source = ray.ObjectRef
"""Of the buffers, or of the address of the segment that holds them."""


class Delivery:
    """Pickled once, for all ranks and for those that replace them later."""

    def __init__(self, content: object):
        try:
            payload, self._buffers = handover.dump(content)
        except Exception as error:
            raise InvalidArguments(find_unpicklable({"task": content}) or [str(error)]) from error
        self.payload: ray.ObjectRef[bytes] | None = ray.put(payload)
        self._in_store: Source | None = None
        self._by_domain: dict[str, Source | SegmentAddress] = {}
        self._segment: Segment | None = None

    def buffers_for(self, member: Member, generation: int) -> Source | SegmentAddress | None:
        """A segment of the actor's machine, or another source, from which it takes the large tensors.

        On the driver's own machine the driver fills it, without the object store; on another the first actor that asks.
        If a machine has no segments, the actor copies from the object store.
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
        """Forgets segments that an actor has made, because it may be gone: the next actor that asks makes another."""
        here = memory_domain()
        self._by_domain = {domain: source for domain, source in self._by_domain.items() if domain == here}

    def close(self) -> None:
        """Frees the memory of the delivery; whoever has it keeps it."""
        if self._segment is not None:
            self._segment.close()
        self.payload, self._in_store, self._buffers = None, None, []
        self._by_domain.clear()

    def _put(self) -> Source:
        if self._in_store is None:
            self._in_store = ray.put([np.frombuffer(buffer, dtype=np.uint8) for buffer in self._buffers])
        return self._in_store
