"""State has an owner: nobody writes into the attributes of another file's classes, but in the places named here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

PACKAGE = Path(__file__).parents[1] / "raylight"
MOST = 10

ALLOWED = {
    ("launch/handover.py", "view.owner"): "an object of ctypes, which the memory has to outlive",
    ("contract/rank_zero.py", "rank_zero_only.rank"): "Lightning's name, an attribute of a function of that file",
    ("contract/user_error.py", "failed.cause"): "the error is built there, before anybody sees it",
}
"""By file and written attribute, the reason."""
ASKS_THE_TRAINER = ("trainer.should_stop", "trainer.accumulate_grad_batches")
"""Lightning's way for a callback to ask; a setter of the trainer's hands it to the owner."""


def test_nobody_writes_into_the_attributes_of_another_files_classes() -> None:
    written = {(path, text) for path, _, text in find_foreign_writes(read_package())}
    found = {(path, text) for path, text in written if text not in ASKS_THE_TRAINER}
    unknown = [f"{path}: {text}" for path, text in sorted(found - ALLOWED.keys())]
    assert not unknown, "ask the owner by a method, or name the reason in ALLOWED:\n" + "\n".join(unknown)
    assert not ALLOWED.keys() - found, "these are gone: take them out of ALLOWED"
    assert len(ALLOWED) <= MOST


def test_finds_every_form_of_a_write() -> None:
    owner = "class Owner:\n    of_class: int\n    def __init__(self):\n        self.a, self.b = 1, 2\n"
    writes = (
        "x.a = 1", "x.y.a = 1", "self.x.a = 1", "x.a, z = 1, 2", "x.a += 1", "x.a: int = 1", "del x.a",
        "for x.a in y: pass", "with y as x.a: pass", "setattr(x, 'a', 1)", "x.of_class = 1",
    )  # fmt: skip
    for write in writes:
        trees = {"owner.py": ast.parse(owner), "other.py": ast.parse(write)}
        assert [path for path, _, _ in find_foreign_writes(trees)] == ["other.py"], write
    for harmless in ("self.a = 1", "cls.a = 1", "x.unknown = 1", "x.a", "x.a[0] = 1", "setattr(x, name, 1)"):
        trees = {"owner.py": ast.parse(owner + "x.a = 1"), "other.py": ast.parse(harmless)}
        assert not list(find_foreign_writes(trees)), harmless


def read_package() -> dict[str, ast.Module]:
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def find_foreign_writes(trees: dict[str, ast.Module]) -> Iterator[tuple[str, int, str]]:
    """File, line and written attribute. An attribute that no class of raylight's defines belongs to somebody else's
    object, such as `grad` of a parameter, and does not count."""
    defined = {path: set(_attributes_of_classes(tree)) for path, tree in trees.items()}
    known = set().union(*defined.values())
    for path, tree in sorted(trees.items()):
        for node in ast.walk(tree):
            written = _written_attribute(node)
            if written is not None and written[0] in known - defined[path] and not _is_pythons_or_torchs(*written):
                yield path, node.lineno, written[1]  # type: ignore[attr-defined]


def _attributes_of_classes(tree: ast.Module) -> Iterator[str]:
    """Names that class bodies define, and those that methods set on `self`."""
    for kind in ast.walk(tree):
        if not isinstance(kind, ast.ClassDef):
            continue
        for statement in kind.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                yield statement.target.id
            elif isinstance(statement, ast.Assign):
                yield from (target.id for target in statement.targets if isinstance(target, ast.Name))
            elif isinstance(statement, ast.FunctionDef):
                yield from (node.attr for node in ast.walk(statement) if _is_set_on_self(node))


def _is_set_on_self(node: ast.AST) -> TypeGuard[ast.Attribute]:
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value)


def _written_attribute(node: ast.AST) -> tuple[str, str] | None:
    """The attribute's name and the whole expression, if it is written and not that of `self`."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del) and not _is_self(node.value):
        return node.attr, ast.unparse(node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
        target, name, *_ = node.args
        if isinstance(name, ast.Constant) and isinstance(name.value, str) and not _is_self(target):
            return name.value, f"{ast.unparse(target)}.{name.value}"
    return None


def _is_pythons_or_torchs(name: str, text: str) -> bool:
    return name.startswith("__") or text.startswith("torch.")


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")
