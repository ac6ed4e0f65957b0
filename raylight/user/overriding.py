"""The one test for a hook that somebody has written."""

from __future__ import annotations

_DEFAULTS = ("raylight.user.module_hooks", "raylight.user.data_hooks", "raylight.user.callback")
"""Where the hooks that do nothing are defined."""


def overrides(owner: object, name: str) -> bool:
    """Whether this module, data module or callback has a hook of its own; `hook = None` in a subclass is none."""
    hook = getattr(owner, name, None)
    return hook is not None and getattr(hook, "__module__", None) not in _DEFAULTS
