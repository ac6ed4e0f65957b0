"""A rule on an argument, and the kinds of values that many arguments share: numbers, choices, flags, texts."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real

from raylight.contract.kinds import Value


class Refused(Exception):
    """A value that a rule does not allow; the text, if there is one, is advice."""


@dataclass(frozen=True, slots=True)
class Rule:
    """`allowed` ends the sentence "it must be ..."; `parse` returns the value in its one spelling or raises Refused."""

    allowed: str
    parse: Callable[[object], Value]


def to_int(value: object) -> int:
    if isinstance(value, float) and value.is_integer():
        raise Refused(f"write {int(value)}")
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise Refused
    return int(value)


def to_float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or value != value:
        raise Refused
    return float(value)


def whole(least: int, note: str = "", most: int | None = None) -> Rule:
    def parse(value: object) -> int:
        number = to_int(value)
        if number < least or (most is not None and number > most):
            raise Refused
        return number

    limit = f"from {least} to {most}" if most is not None else f"of at least {least}"
    return Rule(f"a whole number {limit}{note}", parse)


def number(allowed: str, is_allowed: Callable[[float], bool]) -> Rule:
    def parse(value: object) -> float:
        parsed = to_float(value)
        if not is_allowed(parsed):
            raise Refused
        return parsed

    return Rule(allowed, parse)


def choice(spellings: Iterable[str] | Mapping[str | int, str]) -> Rule:
    """One of the given, strings in any case; of a mapping, one of its keys, which stands for its value."""
    known = dict(spellings) if isinstance(spellings, Mapping) else {value: value for value in spellings}
    texts = {text.lower(): text for text in known if isinstance(text, str)}

    def parse(value: object) -> Value:
        if isinstance(value, str):
            if value.lower() in texts:
                return known[texts[value.lower()]]
            near = difflib.get_close_matches(value.lower(), texts, n=1)
            raise Refused(f"did you mean {texts[near[0]]!r}?" if near else "")
        for spelling, meaning in known.items():
            # By type too: True is no 1.
            if type(spelling) is type(value) and spelling == value:
                return meaning
        raise Refused

    return Rule("one of " + ", ".join(repr(value) for value in known), parse)


def either(*rules: Rule) -> Rule:
    def parse(value: object) -> Value:
        advice = ""
        for rule in rules:
            try:
                return rule.parse(value)
            except Refused as refused:
                advice = str(refused) or advice
        raise Refused(advice)

    return Rule(" or ".join(rule.allowed for rule in rules), parse)


def optional(rule: Rule) -> Rule:
    return Rule(f"{rule.allowed}, or None", lambda value: None if value is None else rule.parse(value))


def read_flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise Refused
    return value


def read_text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise Refused
    return value


FLAG = Rule("True or False", read_flag)
TEXT = Rule("a string that is not empty", read_text)
