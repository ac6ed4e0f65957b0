"""The one test for a hook that somebody has written."""

from __future__ import annotations

from typing import Any

_DEFAULTS = ("raylight.user.module", "raylight.user.data_module", "raylight.user.callback")
"""Where the hooks that do nothing are defined."""


def overrides(owner: Any, name: str) -> bool:
    """Whether this module, data module or callback has a hook of its own; `hook = None` in a subclass is none."""
    hook = getattr(owner, name, None)
    return hook is not None and getattr(hook, "__module__", None) not in _DEFAULTS
