"""Imports go one way, and `import raylight` loads only what it needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "raylight"

# From the bottom up: a module imports from its own layer and from those below. The longest matching name counts.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("contract",),
    ("lightning.names", "lightning.refused", "lightning.alias_modules"),
    ("user",),
    ("lightning",),
    ("arguments",),
    ("worker", "storage"),
    ("driver",),
    (
        "launch",
        "report",
        "callbacks",
        "tuner",
        "loading",
        "rebuilding",
        "instantiation",
        "hparams_file",
        "lightning_files",
        "loggers",
    ),
    ("execution", "replay", "runs", "speed"),
    ("trainer",),
    ("sweep", "tuning", "cli", "command", "doctor", "lightning.script", "supervise"),
    ("__main__",),
)

# Neighbours of one layer that must not know each other.
STRANGERS = {("worker", "storage"), ("storage", "worker"), ("launch", "report"), ("report", "launch")}

# What a package may import besides the standard library and raylight; everything where it is not listed here.
THIRD_PARTY = {
    "worker": {"torch", "numpy"},
    "callbacks": {"torch"},
    "storage": {"pyarrow", "xxhash"},
    "driver": {"pyarrow"},
    "report": {"rich", "tensorboard", "torch", "numpy", "pyarrow", "IPython"},
}


@dataclass(frozen=True)
class Import:
    importer: str  # as "worker.loop"
    imported: str  # as "raylight.errors" or "torch.nn"
    when_called: bool

    def __str__(self) -> str:
        return f"raylight.{self.importer} imports {self.imported}"


def read_imports() -> list[Import]:
    paths = sorted(ROOT.rglob("*.py"))
    return [found for path in paths for found in find_imports(name_module(path), ast.parse(path.read_text()), False)]


def name_module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def find_imports(importer: str, node: ast.AST, when_called: bool) -> Iterator[Import]:
    """All imports, those inside functions and those for the type checker alone included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(importer, alias.name, when_called) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{importer}: imports are absolute"
            for alias in child.names:
                whole = f"{child.module}.{alias.name}"
                yield Import(importer, whole if is_module(whole) else str(child.module), when_called)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from find_imports(importer, child, when_called or inside)


def is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return name.startswith("raylight.") and (path.is_dir() or path.with_suffix(".py").is_file())


def find_layer(module: str) -> int:
    matches = [
        (len(name), index)
        for index, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    assert matches, f"raylight.{module} is in no layer: say in tests/test_imports.py where it belongs"
    return max(matches)[1]


IMPORTS = read_imports()
INSIDE = [found for found in IMPORTS if found.importer and found.imported.startswith("raylight.")]


def test_imports_go_down_the_layers() -> None:
    wrong = [str(found) for found in INSIDE if find_layer(found.importer) < find_layer(found.imported[9:])]
    assert not wrong, "\n".join(wrong)


def test_worker_storage_and_callbacks_do_not_know_each_other() -> None:
    wrong = [
        str(found) for found in INSIDE if (found.importer.split(".")[0], found.imported.split(".")[1]) in STRANGERS
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", THIRD_PARTY)
def test_a_package_imports_only_the_libraries_it_is_about(package: str) -> None:
    allowed = THIRD_PARTY[package] | sys.stdlib_module_names | {"raylight"}
    wrong = [
        str(found)
        for found in IMPORTS
        if found.importer.split(".")[0] == package and found.imported.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_ray_is_imported_by_its_launcher_and_by_sweeps_alone() -> None:
    wrong = [
        str(found)
        for found in IMPORTS
        if found.imported.split(".")[0] == "ray" and not found.importer.startswith(("launch.ray_", "sweep", "tuning"))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_chain_of_imports_leads_back_to_where_it_began() -> None:
    edges: dict[str, set[str]] = {}
    for found in INSIDE:
        edges.setdefault(found.importer, set()).add(found.imported[9:])
    done: set[str] = set()

    def visit(module: str, chain: tuple[str, ...]) -> None:
        assert module not in chain, " -> ".join([*chain, module])
        if module not in done:
            for imported in sorted(edges.get(module, ())):
                visit(imported, (*chain, module))
            done.add(module)

    for module in sorted(edges):
        visit(module, ())


@pytest.mark.parametrize("names", ["None", "raylight.Module, raylight.DataModule, raylight.Callback"])
def test_importing_loads_nothing_that_costs_a_user_time(names: str) -> None:
    program = f"import sys, raylight; {names}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"ray", "pyarrow", "rich", "tensorboard", "pandas", "torchvision", "torchmetrics"}
