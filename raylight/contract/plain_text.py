"""Text from a run as a terminal and a file can take it: what controls a terminal, or is no Unicode, as escapes."""

from __future__ import annotations

import unicodedata

# Those that turn the direction of text, so that a line reads otherwise than it is.
_TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: str, keep: str = "") -> str:
    r"""The text with control characters as escapes, as "\x1b", all but those in `keep`; and what UTF-8 cannot hold."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(mark if mark in keep or not _is_control(mark) else _escape(mark) for mark in text)


def has_control(text: str) -> bool:
    """Whether `visible` would change it."""
    return not (text.isascii() and text.isprintable()) and any(map(_is_control, text))


def to_utf8(text: str) -> str:
    r"""The text, with what UTF-8 cannot hold as escapes: Python's texts of file names that are no UTF-8 have a "\udcff"
    for a byte."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _is_control(mark: str) -> bool:
    return mark in _TURNS or unicodedata.category(mark) in ("Cc", "Cs", "Zl", "Zp")


def _escape(mark: str) -> str:
    return mark.encode("unicode_escape").decode()
