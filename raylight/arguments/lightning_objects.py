"""Objects of Lightning's names among the trainer's arguments, put into raylight's own words."""

from __future__ import annotations

from raylight.arguments.rules import as_list
from raylight.contract.kinds import Value
from raylight.user.accelerators import Accelerator
from raylight.user.precision_plugins import LayerSync, Precision, TorchSyncBatchNorm
from raylight.user.strategies import LightningStrategy, SingleDeviceStrategy, asked_by

_COUNTS = ("num_workers", "devices", "gpus")


def translate(arguments: dict[str, Value], mistakes: list[str]) -> dict[str, Value]:
    """The same arguments without such objects; what contradicts another argument is added to `mistakes`."""
    found = dict(arguments)
    strategy = found.get("strategy")
    if isinstance(strategy, LightningStrategy):
        found["strategy"] = strategy.settings
        _add(found, asked_by(strategy), type(strategy).__name__, mistakes)
    elif isinstance(strategy, str) and strategy.lower() == "single_device":
        found["strategy"] = "auto"
        _add(found, asked_by(SingleDeviceStrategy()) | {"use_gpu": found.get("use_gpu")}, "single_device", mistakes)
    if isinstance(found.get("accelerator"), Accelerator):
        found["accelerator"] = found["accelerator"].name()
    plugins = as_list(found.get("plugins")) if not isinstance(found.get("plugins"), str) else []
    if any(isinstance(plugin, (Precision, LayerSync)) for plugin in plugins):
        found["plugins"] = [plugin for plugin in plugins if not isinstance(plugin, (Precision, LayerSync))]
        for plugin in plugins:
            _add(found, _asked_by_plugin(plugin, mistakes), f"{type(plugin).__name__} among the plugins", mistakes)
    return found


def _asked_by_plugin(plugin: object, mistakes: list[str]) -> dict[str, Value]:
    if isinstance(plugin, Precision):
        if plugin.scaler is not None:
            mistakes.append(
                "MixedPrecision(scaler=...) is not taken: the run makes a scaler on each worker; leave it out"
            )
        return {"precision": plugin.precision}
    if isinstance(plugin, LayerSync):
        if type(plugin) is not TorchSyncBatchNorm:
            mistakes.append(f"{type(plugin).__name__} is not called: change the layers in configure_model")
        return {"sync_batchnorm": True}
    return {}


def _add(arguments: dict[str, Value], asked: dict[str, Value], who: str, mistakes: list[str]) -> None:
    """Adds what `who` says of other arguments."""
    for name, value in asked.items():
        given = arguments.get(name)
        if isinstance(given, Accelerator):
            given = given.name()
        if name == "num_workers" and value == 0:
            many = {
                each: arguments[each] for each in _COUNTS if arguments.get(each) not in (None, "auto", 0, 1, "1", -1)
            }
            mistakes += [f"{who} is one device, and {each}={count!r} asks for others" for each, count in many.items()]
            for each in ("devices", "gpus"):
                arguments.pop(each, None)
        elif given is not None and given not in (value, "auto") and name != "sync_batchnorm":
            mistakes.append(f"{who} means {name}={value!r}, and {name}={given!r} was given: pass one of them")
            continue
        if value is not None:
            arguments[name] = value.name() if isinstance(value, Accelerator) else value
