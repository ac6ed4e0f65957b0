"""Damage to files: bytes lost, changed or foreign; and whole JSON, parquet and torch files of the wrong kind."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import torch
from pyarrow import parquet

from raylight.storage.digests import digest_of

WRONG_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1 << 40, 1 << 70, 10**400, 1e308, -0.5, "", "x" * 5000, "\ud800", "\x1b[31mred", "nan",
    "../../x", [], [1], [[]], {}, {"a": 1}, {"\udcff": []},
)  # fmt: skip
DEEP = b'{"a":' * 200_000
INFINITE = (b"Infinity", b"-Infinity", b"NaN", b"1e999")


def damage_bytes(data: bytes, chance: random.Random) -> bytes:
    """Cut off, with bytes changed, with a hole, or of another kind altogether."""
    kind = chance.randrange(6)
    if kind == 0:
        return data[: chance.randrange(len(data) + 1)]
    if kind == 1:
        changed = bytearray(data)
        for _ in range(chance.choice((1, 8, 200))):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)
    if kind == 2:
        start = chance.randrange(len(data))
        return data[:start] + bytes(len(data) - start)
    if kind == 3:
        return chance.choice((b"", b"\0" * 4096, chance.randbytes(1000), b"\xff\xfe\xfd", data + data))
    if kind == 4:
        start = chance.randrange(len(data))
        return data[:start] + chance.randbytes(chance.randrange(1, 50)) + data[start:]
    return chance.choice((DEEP, b"[" * 200_000, b"{}", b"[]", b"null", b"1", b'"text"'))


def damage_json(data: bytes, chance: random.Random) -> bytes:
    """Whole JSON with a value of the wrong kind, or a key too few or too many; else as `damage_bytes`."""
    if chance.random() < 0.3:
        return damage_bytes(data, chance)
    content = json.loads(data)
    places = list(_places(content))
    for _ in range(chance.choice((1, 1, 3))):
        holder, key = chance.choice(places)
        if chance.random() < 0.15 and isinstance(holder, dict):
            holder.pop(key, None)
        elif not isinstance(holder, list) or key < len(holder):
            holder[key] = chance.choice(WRONG_VALUES)
    text = json.dumps(content)
    if chance.random() < 0.2:
        place = chance.choice([index for index, mark in enumerate(text) if mark == ":"] or [0])
        end = min((index for index in (text.find(mark, place) for mark in ",}") if index > 0), default=len(text))
        text = f"{text[: place + 1]} {chance.choice(INFINITE).decode()}{text[end:]}"
    return text.encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    items: list[tuple[Any, Any]] = list(value.items()) if isinstance(value, dict) else []
    items += enumerate(value) if isinstance(value, list) else []
    return [(value, key) for key, _ in items] + [place for _, item in items for place in _places(item)]


def damage_manifest(data: bytes, chance: random.Random) -> bytes:
    """As `damage_json`, often with a digest that fits."""
    damaged = damage_json(data, chance)
    try:
        content = json.loads(damaged)
    except (ValueError, RecursionError):
        return damaged
    if not isinstance(content, dict) or not isinstance(content.get("digest"), str) or chance.random() < 0.3:
        return damaged
    blank = f"xxh3_128:{'0' * 32}"
    content["digest"] = blank
    text = json.dumps(content).encode()
    return text.replace(blank.encode(), digest_of(text).encode(), 1)


def damage_parquet(data: bytes, chance: random.Random) -> bytes:
    """A whole table of the wrong kind, or as `damage_bytes`."""
    if chance.random() < 0.6:
        return damage_bytes(data, chance)
    table = parquet.read_table(io.BytesIO(data))
    kind = chance.randrange(5)
    if kind == 0:
        table = table.drop_columns([chance.choice(table.column_names)])
    elif kind == 1:
        name = chance.choice(table.column_names)
        wrong = pa.array(chance.choice(([None], ["text"], [1.5], [[1]])) * table.num_rows)
        table = table.set_column(table.column_names.index(name), name, wrong)
    elif kind == 2:
        keys = (b"raylight.drop_after", b"raylight.merged_parts")
        table = table.replace_schema_metadata({chance.choice(keys): chance.choice((b"x", b"", b"1e9", b"\xff"))})
    elif kind == 3:
        table = pa.table({"x": [1]})
    else:
        table = table.select(list(reversed(table.column_names)))
    out = io.BytesIO()
    parquet.write_table(table, out)
    return out.getvalue()


def damage_torch(data: bytes, chance: random.Random) -> bytes:
    """Whole torch files of another structure, one that would run code, or as `damage_bytes`."""
    if chance.random() < 0.5:
        return damage_bytes(data, chance)
    content: Any = torch.load(io.BytesIO(data), weights_only=True)
    kind, places = chance.randrange(6), list(_places(content))
    if kind < 4 and places:
        holder, key = chance.choice(places)
        if kind == 0 and isinstance(holder, dict):
            holder.pop(key)
        else:
            holder[key] = chance.choice((None, 1, "text", [], {}, torch.zeros(3)))
    elif kind == 4:
        content = chance.choice((None, 1, [], {}, {"a": 1}, torch.zeros(2)))
    else:
        content = {"run": _Hostile()}
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


class _Hostile:
    def __reduce__(self) -> tuple:
        return print, ("HOSTILE CODE HAS RUN",)


Damage = Callable[[bytes, random.Random], bytes]
