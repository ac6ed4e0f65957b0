"""Names of ModelCheckpoint's files: what stands in braces is filled in with epoch, step and metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

_FIELD = re.compile(r"\{([^:}]*)([^}]*\})")


def fill_in(
    template: str, metrics: Mapping[str, Tensor | float], *, with_names: bool = True, equals: str = "="
) -> str:  # fmt: skip
    """`template` with each `{name:format}` replaced by the metric of that name, 0 for one that is not there.

    With `with_names` the name and `equals` go before the value, as in "epoch=3".
    """

    def value_of(field: re.Match[str]) -> str:
        name, rest = field.groups()
        value = metrics.get(name, 0)
        shown = ("{0" + rest).format(value.item() if isinstance(value, Tensor) else value)
        return f"{name}{equals}{shown}" if with_names else shown

    return _FIELD.sub(value_of, template)


def join_path(directory: str, name: str) -> str:
    """The path or URI of a file in a directory; the query of a URI stays at its end."""
    if "://" not in directory:
        return f"{directory.rstrip('/')}/{name}" if directory else name
    place, mark, query = directory.partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{query}"


def find_free(name_of: Callable[[int | None], str], is_taken: Callable[[str], bool], first: int) -> str:
    """The first of the names without a version, with version `first`, and so on, that is not taken."""
    found, version = name_of(None), first
    while is_taken(found):
        found, version = name_of(version), version + 1
    return found
