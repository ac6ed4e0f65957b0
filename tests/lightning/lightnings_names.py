"""The public names of the installed Lightning, read from its sources."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

NOT_PUBLIC = {"log"}  # each module's own logger


def walk() -> Iterator[tuple[str, list[str]]]:
    """Each public module below `pytorch_lightning`, with the names of its `__all__`; where it has none, with all that
    it defines or hands on."""
    found = importlib.util.find_spec("pytorch_lightning")
    assert found is not None
    assert found.submodule_search_locations is not None
    root = Path(found.submodule_search_locations[0])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            yield ".".join(parts), [n for n in read_names(path) if not n.startswith("_") and n not in NOT_PUBLIC]


def read_names(path: Path) -> list[str]:
    text = path.read_text()
    lines, names = text.splitlines(), []
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            targets = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if targets == ["__all__"] and isinstance(node.value, ast.List):
                return ast.literal_eval(node.value)
            names += targets
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
        elif isinstance(node, ast.ImportFrom) and is_handed_on(path, node, lines):
            names += [alias.asname or alias.name for alias in node.names]
    return names


def is_handed_on(path: Path, node: ast.ImportFrom, lines: list[str]) -> bool:
    is_lightnings = (node.module or "").startswith(("pytorch_lightning", "lightning_fabric"))
    return "F401" in lines[node.lineno - 1] or (path.name == "__init__.py" and is_lightnings)
