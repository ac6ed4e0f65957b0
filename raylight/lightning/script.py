"""Reads a Lightning script without running it, and says which of its lines need attention.

It asks the tables that the errors come from: of names (`alias_modules.py`), of the trainer's arguments and of the
trainer's attributes.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from raylight.arguments.resolving import ELSEWHERE, INSTEAD
from raylight.arguments.rules import RULES, say_nearest
from raylight.arguments.value_kinds import Refused
from raylight.contract.errors import InvalidArguments
from raylight.lightning.alias_modules import is_known, say_what_is_wrong
from raylight.user import trainer_names

State = Literal["ok", "bad"]
PACKAGES = ("pytorch_lightning", "lightning.pytorch", "lightning", "raylight")
"""Where the names of the table may come from."""
FABRIC = ("lightning_fabric", "lightning.fabric")
NO_FABRIC = "raylight has no Fabric: put the loop into a raylight.Module, or keep Lightning for this file"
OLD_HOOKS = {
    "training_step_end": "do that at the end of training_step", "validation_step_end": "do that in validation_step",
    "test_step_end": "do that in test_step", "tbptt_split_batch": "split the sequence in training_step",
    "on_pretrain_routine_start": "use on_fit_start", "on_pretrain_routine_end": "use on_fit_start",
    "on_batch_start": "use on_train_batch_start", "on_batch_end": "use on_train_batch_end",
    "on_epoch_start": "use on_train_epoch_start", "on_epoch_end": "use on_train_epoch_end",
    "configure_sharded_model": "use configure_model",
    "get_progress_bar_dict": "use get_metrics of a ProgressBar", "on_hpc_save": "use on_save_checkpoint",
    "on_hpc_load": "use on_load_checkpoint", "on_keyboard_interrupt": "use on_exception",
}  # fmt: skip
"""Hooks of older versions that nothing calls any more."""
OLD_ARGUMENTS = {"optimizer_idx": "with several optimizers say automatic_optimization=False, and step them yourself"}


@dataclass(frozen=True, slots=True)
class Finding:
    """`state` "ok": nothing but the import changes; "bad": the line would be an error."""

    line: int
    state: State
    text: str


def examine_script(path: str | Path) -> list[Finding]:
    """What is to be said of a Python file, by line. Raises InvalidArguments if it cannot be read."""
    try:
        tree = ast.parse(Path(path).read_text())
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise InvalidArguments(f"{path} cannot be read as a Python script: {error}") from None
    reader = _Reader()
    reader.visit(tree)
    return sorted(set(reader.findings), key=lambda finding: (finding.line, finding.text))


@dataclass
class _Reader(ast.NodeVisitor):
    findings: list[Finding] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    """What a name in the script stands for: a module of Lightning's ("" is the root) or a name in it."""
    trainers: set[str] = field(default_factory=lambda: {"trainer"})

    def say(self, node: ast.AST, state: State, text: str) -> None:
        self.findings.append(Finding(getattr(node, "lineno", 1), state, text))

    # ---- imports

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            below = _below(alias.name)
            if alias.name.startswith(FABRIC):
                self.say(node, "bad", f"{alias.name}: {NO_FABRIC}")
            elif below is not None:
                given = alias.asname or alias.name.partition(".")[0]
                self.places[given] = below if alias.asname else ""
                if below:
                    self._check_name(node, *_split(below))
                if not alias.name.startswith("raylight"):
                    here = ".".join(part for part in ("raylight", below) if part)
                    by_name = alias.asname or not below
                    rest = f" as {given}" if by_name else f", and {here} for {alias.name} in the lines below"
                    self.say(node, "ok", f"write: import {here}{rest}")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if module.startswith(FABRIC):
            self.say(node, "bad", f"{module}: {NO_FABRIC}")
            return
        below = _below(module) if not node.level else None
        if below is None:
            return
        for alias in node.names:
            self.places[alias.asname or alias.name] = f"{below}.{alias.name}".lstrip(".")
            if alias.name == "pytorch" and module == "lightning":
                self.places[alias.asname or alias.name] = ""
            elif alias.name == "fabric" and module == "lightning":
                self.say(node, "bad", f"lightning.fabric: {NO_FABRIC}")
            else:
                self._check_name(node, below, alias.name)
        if not module.startswith("raylight"):
            here = ".".join(part for part in ("raylight", below) if part)
            as_raylight = module == "lightning" and [alias.name for alias in node.names] == ["pytorch"]
            given = node.names[0].asname or "pytorch"
            names = ", ".join(a.name + (f" as {a.asname}" if a.asname else "") for a in node.names)
            self.say(node, "ok", f"write: import raylight as {given}" if as_raylight
                     else f"write: from {here} import {names}")  # fmt: skip

    def _check_name(self, node: ast.AST, module: str, name: str) -> None:
        """A name of a module, or a module of a module."""
        wrong = say_what_is_wrong(module, name) if name != "*" else None
        if wrong is not None:
            self.say(node, "bad", wrong)

    # ---- names, attributes and calls

    def visit_Attribute(self, node: ast.Attribute) -> None:
        place = self._find_place(node.value)
        if place is not None and node.attr != "pytorch" and (not place or is_known(place)):
            self._check_name(node, place, node.attr)
        if self._is_trainer(node.value) and node.attr in trainer_names.INSTEAD:
            self.say(node, "bad", f"trainer.{node.attr} is not in raylight: {trainer_names.INSTEAD[node.attr]}")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.value, ast.Call) and self._find_place(node.value.func) in ("Trainer", "trainer.Trainer"):
            self.trainers |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if self._find_place(node.func) in ("Trainer", "trainer.Trainer", "trainer.trainer.Trainer"):
            if node.args:
                self.say(node, "bad", "the trainer takes its arguments by name")
            for keyword in node.keywords:
                if keyword.arg is not None:
                    self._check_argument(keyword, keyword.arg)
        self.generic_visit(node)

    def _check_argument(self, node: ast.keyword, name: str) -> None:
        if name in ELSEWHERE:
            self.say(node, "bad", f"{name} is not an argument of the trainer: {ELSEWHERE[name]}")
        elif name in INSTEAD:
            self.say(node, "bad", f"{name} is not an argument of raylight's trainer: {INSTEAD[name]}")
        elif name not in RULES:
            self.say(node, "bad", f"{name} is not an argument of the trainer{say_nearest(name, RULES)}")
        else:
            try:
                value = ast.literal_eval(node.value)
            except ValueError:  # known only when the script runs
                return
            if value is not None:
                self._check_value(node, name, value)

    def _check_value(self, node: ast.keyword, name: str, value: object) -> None:
        if name == "strategy" and value == "single_device":
            return
        try:
            RULES[name].parse(value)
        except Refused as refused:
            advice = f": {refused}" if str(refused) else f"; it must be {RULES[name].allowed}"
            self.say(node, "bad", f"{name}={value!r} is not taken{advice}")

    # ---- classes

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if any(self._find_place(base) is not None for base in node.bases):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    self._check_method(method)
        self.generic_visit(node)

    def _check_method(self, method: ast.FunctionDef) -> None:
        if method.name in OLD_HOOKS:
            self.say(method, "bad", f"{method.name} is a hook of an older version, and never called: "
                     f"{OLD_HOOKS[method.name]}")  # fmt: skip
        for argument in method.args.args:
            if argument.arg in OLD_ARGUMENTS:
                self.say(method, "bad", f"{method.name}({argument.arg}): {OLD_ARGUMENTS[argument.arg]}")

    # ---- inside

    def _find_place(self, node: ast.expr) -> str | None:
        """The module or name of Lightning's that an expression stands for; None if it is none."""
        if isinstance(node, ast.Name):
            return self.places.get(node.id)
        if isinstance(node, ast.Attribute):
            place = self._find_place(node.value)
            if place is None:
                return None
            if not place and node.attr == "pytorch":  # lightning.pytorch
                return ""
            return f"{place}.{node.attr}".lstrip(".")
        return None

    def _is_trainer(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self.trainers
        return isinstance(node, ast.Attribute) and node.attr == "trainer" and isinstance(node.value, ast.Name)


def _below(module: str) -> str | None:
    """The module's name below Lightning's root; None if it is none of Lightning's."""
    for package in PACKAGES:
        if module == package:
            return ""
        if module.startswith(f"{package}."):
            return module.removeprefix(f"{package}.")
    return None


def _split(module: str) -> tuple[str, str]:
    parent, _, name = module.rpartition(".")
    return parent, name
