"""Signatures that list what is passed on, and documentation read from below the fields."""

from __future__ import annotations

import inspect
from typing import Any

from raylight.arguments.signatures import KeywordDoc, find_given, list_keywords, passes_on_keywords_of, read_field_docs


def target(first: int, *, size: int = 1, share: float = 1.0, names: Any = None, **unknown: Any) -> dict[str, Any]:
    return find_given(target, locals()) | unknown


@passes_on_keywords_of(target)
def caller(first: int, *, names: str = "mine", **keywords: Any) -> dict[str, Any]:
    """Call it."""
    return target(first, **keywords)


class Fields:
    size: int = 1
    """How many.

    Never none.
    """
    share: float = 1.0
    names: Any = None
    """Which."""
    other: int = 0
    """Of nobody."""


class Documented:
    """What it is."""


Documented.__doc__ = KeywordDoc(Documented.__doc__, target, Fields)  # type: ignore[assignment]


def test_an_argument_counts_as_given_if_it_is_not_the_default() -> None:
    assert target(3) == {}
    assert target(3, size=1, share=1.0, names=None) == {}
    assert target(3, size=2, share=1, names=[]) == {"size": 2, "share": 1, "names": []}  # 1 is not 1.0
    assert target(3, size=True) == {"size": True}
    assert target(3, sise=2) == {"sise": 2}


def test_a_signature_lists_what_is_passed_on() -> None:
    parameters = inspect.signature(caller).parameters
    assert list(parameters) == ["first", "names", "size", "share"]
    assert parameters["names"].default == "mine"
    assert parameters["size"] == list_keywords(target)["size"]
    assert caller(1, size=5) == {"size": 5}


def test_documentation_lies_below_the_fields() -> None:
    assert read_field_docs(Fields) == {"size": "How many.\n\nNever none.", "names": "Which.", "other": "Of nobody."}
    assert read_field_docs(int) == {}  # written in C


def test_documentation_of_keywords_is_shown_in_their_order() -> None:
    expected = "What it is.\n\nArgs:\n    size: How many.\n        \n        Never none.\n    names: Which.\n"
    assert Documented.__doc__ == expected
    assert Documented().__doc__ == expected
