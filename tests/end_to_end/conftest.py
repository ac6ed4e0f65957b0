"""Cases that run in this process and on Ray from one list of parameters."""

from __future__ import annotations

import pytest


@pytest.fixture
def ray_if_marked(request: pytest.FixtureRequest) -> None:
    """The session's Ray cluster, for those cases alone that are marked with `ray`."""
    if request.node.get_closest_marker("ray") is not None:
        request.getfixturevalue("ray_cluster")
