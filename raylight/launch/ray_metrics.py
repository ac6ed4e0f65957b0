"""Values for Prometheus by way of Ray, whose agent on each node serves what the node's processes tell it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ray.util.metrics import Gauge


def open_gauges(descriptions: Mapping[str, str], tags: Mapping[str, str]) -> Callable[[Mapping[str, float]], None]:
    """Returns a function that sets the gauges, by name, under these tags. Ray puts `ray_` in front of the names, and
    hands the values on every ten seconds, for as long as this process lives."""
    labels = dict(tags)
    gauges = {name: Gauge(name, text, tag_keys=tuple(labels)) for name, text in descriptions.items()}

    def publish(values: Mapping[str, float]) -> None:
        for name, value in values.items():
            gauges[name].set(value, labels)

    return publish
