"""Containers of OmegaConf, which is never imported here: who has none of them loaded has none to store."""

from __future__ import annotations

import re
import sys

from raylight.contract.errors import RaylightError
from raylight.contract.kinds import StateDict, Value

KINDS = ("DictConfig", "ListConfig")
_INTERPOLATION = re.compile(r"(\\*)\$\{")


class NoOmegaConf(RaylightError):
    """A file holds a container of OmegaConf, and the program has not imported it."""


def config_kind(value: Value) -> str | None:
    """ "DictConfig", "ListConfig", or None for everything else."""
    package = sys.modules.get("omegaconf")
    if package is None:
        return None
    return next((kind for kind in KINDS if isinstance(value, getattr(package, kind))), None)


def write_config(config: Value) -> tuple[Value, StateDict]:
    """The content in plain containers, interpolations resolved, and what `describe_config` says."""
    tools = sys.modules["omegaconf"].OmegaConf
    content = None if config._is_none() else tools.to_container(config, resolve=True, enum_to_str=False)
    return content, describe_config(config)


def describe_config(config: Value) -> StateDict:
    """The flags that were set, and under "class" the dataclass behind a structured one."""
    tools = sys.modules["omegaconf"].OmegaConf
    flags = {name: flag for name in ("readonly", "struct") if (flag := config._get_node_flag(name)) is not None}
    facts: StateDict = {"flags": flags} if flags else {}
    structure = tools.get_type(config)
    if isinstance(structure, type) and structure not in (dict, list) and hasattr(structure, "__dataclass_fields__"):
        facts["class"] = structure
    return facts


def read_config(kind: str, content: Value, structure: type | None, flags: dict[str, bool]) -> Value:
    """Text of a file stays text: an interpolation in it could call a resolver that the program has registered."""
    package = sys.modules.get("omegaconf")
    if package is None:
        raise NoOmegaConf("is a container of OmegaConf, which this program has not imported: import omegaconf first")
    tools, content = package.OmegaConf, _escape(content)
    if content is None:
        config = getattr(package, kind)(None)
    elif structure is None:
        config = tools.create(content)
    else:
        config = tools.merge(tools.structured(structure), content)
    for name, flag in flags.items():
        config._set_flag(name, flag)
    return config


def _escape(content: Value) -> Value:
    if isinstance(content, str):
        return _INTERPOLATION.sub(lambda match: match[1] * 2 + "\\${", content)
    if isinstance(content, dict):
        return {key: _escape(item) for key, item in content.items()}
    return [_escape(item) for item in content] if isinstance(content, list) else content
