"""Checks of module, loaders and callbacks, made before anything starts, and the texts of the checks made later."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from raylight.arguments.pickling import check_picklable
from raylight.arguments.resolving import check_checkpointing, find_callback_mistakes
from raylight.contract.config import Config
from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Loader, Output
from raylight.contract.task import Loaders
from raylight.user.callback import Callback
from raylight.user.combined_loader import CombinedLoader, is_collection_of_loaders, say_wrong_mode
from raylight.user.data_module import DataModule
from raylight.user.hyperparameters import find_collisions
from raylight.user.module import Module

# Which methods of Module, DataModule and Callback are hooks, as against what they offer to be called.
_HOOK = re.compile(
    r"on_\w+|\w+_step|\w+_dataloader|\w+_epoch_end|configure_\w+|prepare_data|setup|teardown|backward|optimizer_zero_grad"
    r"|transfer_batch_to_device"
)
_STEPS = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}
_LOADER_HOOKS = {
    "train": "train_dataloader",
    "validate": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}


def check_run(stage: str, module: object, loaders: Loaders, config: Config, callbacks: Sequence[object]) -> list[str]:
    """The mistakes in the arguments of `fit`, `validate`, `test` or `predict` (`stage`), one sentence each."""
    mistakes = find_callback_mistakes(callbacks)
    for callback in callbacks:
        if isinstance(callback, Callback):
            mistakes += find_misspelt_hooks(callback, Callback).values()
            mistakes += callback._find_mistakes(config) if stage == "fit" else []
    if config.checkpoint is not None:
        check_checkpointing(config.checkpoint, "checkpoint", mistakes)
    if isinstance(module, Module):
        misspelt = find_misspelt_hooks(module, Module)
        missing = _find_missing_hooks(stage, module)
        mistakes += (missing | misspelt).values()
    else:
        mistakes.append(_say_no_module(module))
    if stage == "fit" and isinstance(module, Module) and not module.automatic_optimization:
        mistakes += _find_manual_mistakes(config)
    mistakes += _find_data_mistakes(stage, module, loaders)
    if isinstance(module, Module) and isinstance(loaders.data_module, DataModule) and config.logger is not False:
        mistakes += [
            f"the hyperparameter {name!r} of {type(module).__qualname__} and that of "
            f"{type(loaders.data_module).__qualname__} have different values, and loggers get one: rename one, or call "
            "save_hyperparameters(logger=False) in one of them"
            for name in find_collisions(module, loaders.data_module)
        ]
    if not mistakes and config.num_workers != 0:
        others = {"plugins": config.plugins, "storage_filesystem": config.storage_filesystem}
        mistakes = check_picklable(module, loaders, callbacks, others)
    return mistakes


def is_overridden(obj: object, name: str, base: type) -> bool:
    """Whether `obj`, or a class between it and `base`, defines `name` itself."""
    mine = getattr(type(obj), name, None)
    return name in vars(obj) or (mine is not None and mine is not getattr(base, name, None))


# ---- the module


def _say_no_module(module: object) -> str:
    name = module.__qualname__ if isinstance(module, type) else type(module).__qualname__
    if isinstance(module, type):
        return f"model is the class {name}: pass an instance, {name}(...)"
    if any(kind.__name__ == "LightningModule" for kind in type(module).__mro__):
        return f"model is {name}, a LightningModule of Lightning: change its import to `import raylight as pl`"
    if hasattr(module, "_orig_mod"):
        return "model is the result of torch.compile: pass the module itself, and compile its parts in configure_model"
    if isinstance(module, torch.nn.Module):
        return (
            f"model is {name}, a plain torch.nn.Module: make it a raylight.Module, with training_step and "
            f"configure_optimizers"
        )
    return f"model is {name}: a raylight.Module is needed"


def _find_manual_mistakes(config: Config) -> list[str]:
    """Arguments that have no effect if training_step steps the optimizers."""
    manual, mistakes = "the module optimizes manually (automatic_optimization = False)", []
    if config.gradient_clip_val:
        mistakes.append(
            f"gradient_clip_val={config.gradient_clip_val}: {manual}; call self.clip_gradients(optimizer, "
            f"gradient_clip_val={config.gradient_clip_val}) before optimizer.step()"
        )
    if config.accumulate_grad_batches != 1:
        mistakes.append(
            f"accumulate_grad_batches={config.accumulate_grad_batches}: {manual}; step the optimizer in every "
            f"{config.accumulate_grad_batches}th call of training_step"
        )
    return mistakes


def _find_missing_hooks(stage: str, module: Module) -> dict[str, str]:
    """The missing hooks that `stage` needs, each with the sentence to show."""

    def has(hook: str) -> bool:
        return is_overridden(module, hook, Module)

    name = type(module).__qualname__
    step = _STEPS[stage]
    missing = {}
    if stage == "predict":
        if not has("predict_step") and not is_overridden(module, "forward", Module):
            missing[step] = f"{name} has no predict_step(self, batch), and no forward(self, x) that it could call"
    elif not has(step):
        missing[step] = f"{name} has no {step}(self, batch): {stage} needs it{_say_similar(module, step)}"
    if stage == "fit" and not has("configure_optimizers"):
        missing["configure_optimizers"] = (
            f"{name} has no configure_optimizers(self): fit needs it, to return an optimizer"
            f"{_say_similar(module, 'configure_optimizers')}"
        )
    return missing


def _say_similar(module: Module, hook: str) -> str:
    names = [name for name, _ in _own_functions(type(module), Module) if not hasattr(Module, name)]
    near = difflib.get_close_matches(hook, names, n=1, cutoff=0.7)
    return f"; there is {near[0]}: is that the one?" if near else ""


def find_misspelt_hooks(obj: object, base: type) -> dict[str, str]:
    """The hooks of `base` (Module, DataModule, Callback) that a method of the user's classes misses by a letter or two,
    each with the sentence to show.

    A method that the user's own code calls, or that stands beside the hook it resembles, is theirs and not a mistake.
    """
    hooks = [name for name in dir(base) if _HOOK.fullmatch(name) and callable(getattr(base, name))]
    own = list(_own_functions(type(obj), base))
    called = {name for _, function in own for name in _names_in(function.__code__)}
    mistakes = {}
    for name, function in own:
        if len(name) < 8 or hasattr(base, name) or name in called:
            continue
        limit = 1 if len(name) < 12 else 2
        edits = {hook: count_edits(name, hook) for hook in hooks if abs(len(name) - len(hook)) <= limit}
        nearest = min(edits, key=edits.__getitem__, default="")
        if nearest and edits[nearest] <= limit and not is_overridden(obj, nearest, base):
            mistakes[nearest] = f"{function.__qualname__} is never called; did you mean {nearest}?"
    return mistakes


def _own_functions(kind: type, base: type) -> Iterator[tuple[str, FunctionType]]:
    """The public methods that the user's classes define."""
    for owner in kind.__mro__:
        if owner in base.__mro__ or owner.__module__.split(".")[0] in ("raylight", "torch"):
            continue
        for name, member in vars(owner).items():
            function = getattr(member, "__func__", member)  # of a classmethod or staticmethod
            if isinstance(function, FunctionType) and not name.startswith("_"):
                yield name, function


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def count_edits(a: str, b: str) -> int:
    """Letters to insert, delete, replace or swap with a neighbour to get from one to the other."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        two_before, before, row = before, row, [i]
        for j, other in enumerate(b, 1):
            edits = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                edits = min(edits, two_before[j - 2] + 1)
            row.append(edits)
    return row[-1]


# ---- the data


def _find_data_mistakes(stage: str, module: object, loaders: Loaders) -> list[str]:
    mistakes: list[str] = []
    data_module = loaders.data_module
    if data_module is not None:
        if isinstance(data_module, DataModule):
            mistakes += find_misspelt_hooks(data_module, DataModule).values()
        else:
            mistakes.append(_say_no_data_module(data_module))
    for kind in ("train", "validate") if stage == "fit" else (stage,):
        label = {"train": "train_dataloaders", "validate": "val_dataloaders"}[kind] if stage == "fit" else "dataloaders"
        loader = getattr(loaders, kind)
        if loader is not None:
            if (stage, kind) == ("fit", "validate") and isinstance(loader, (list, tuple, dict)) and not loader:
                continue  # as if none had been passed
            for path, leaf in _each_loader(label, loader):
                mistakes += _find_loader_mistakes(path, leaf)
            if mistake := say_wrong_mode(loader, "fit" if kind == "train" else kind):
                mistakes.append(f"{label}: {mistake}")
            if data_module is not None:
                mistakes.append(f"{label} and datamodule both bring the data: pass one of them")
            continue
        hook = _LOADER_HOOKS[kind]
        has_hook = (isinstance(module, Module) and is_overridden(module, hook, Module)) or (
            data_module is not None and is_overridden(data_module, hook, DataModule)
        )
        if not has_hook and (stage, kind) != ("fit", "validate"):  # a fit may do without validation
            mistakes.append(
                f"there is no data to {stage}: pass {label}, or a datamodule, or define {hook} in the module"
            )
    return mistakes


def _say_no_data_module(data_module: object) -> str:
    name = data_module.__qualname__ if isinstance(data_module, type) else type(data_module).__qualname__
    if isinstance(data_module, type):
        return f"datamodule is the class {name}: pass an instance, {name}(...)"
    if any(kind.__name__ == "LightningDataModule" for kind in type(data_module).__mro__):
        return f"datamodule is {name}, a LightningDataModule of Lightning: change its import to `import raylight as pl`"
    return f"datamodule is {name}: a raylight.DataModule is needed; loaders are passed as train_dataloaders=..."


def _each_loader(path: str, loader: Loader) -> Iterator[tuple[str, Loader]]:
    if isinstance(loader, CombinedLoader):
        yield from _each_loader(path, loader.iterables)
    elif is_collection_of_loaders(loader) or _holds_loaders(loader):
        for key, item in loader.items() if isinstance(loader, Mapping) else enumerate(loader):
            yield from _each_loader(f"{path}[{key!r}]", item)
    else:
        yield path, loader


def _holds_loaders(loader: Loader) -> bool:
    """Whether a sequence has loaders in it, maybe beside what is none."""
    return isinstance(loader, (list, tuple)) and any(isinstance(item, (DataLoader, Dataset)) for item in loader)


def _find_loader_mistakes(path: str, loader: Loader) -> list[str]:
    name = type(loader).__qualname__
    if isinstance(loader, type):
        return [f"{path} is the class {loader.__qualname__}: pass an instance"]
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        return [f"{path} is a dataset ({name}): pass DataLoader(dataset, batch_size=...), which makes batches of it"]
    if isinstance(loader, (str, bytes)) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        advice = "; a data module is passed as datamodule=..." if hasattr(loader, "train_dataloader") else ""
        return [f"{path} is {name}, which gives no batches: a DataLoader or another iterable is needed{advice}"]
    if _length(loader) != 0:
        return []
    if not isinstance(loader, DataLoader):
        return [f"{path} is empty: {name} has no batches"]
    num_samples = _length(loader.dataset)
    if num_samples and loader.drop_last:
        return [
            f"{path} is empty: drop_last=True drops the {num_samples} samples of its dataset, which are fewer than "
            f"batch_size={loader.batch_size}"
        ]
    return [f"{path} is empty: its {'sampler gives' if num_samples else 'dataset has'} no samples"]


def _length(value: Loader) -> int | None:
    try:
        return len(value)
    except (TypeError, NotImplementedError):  # nothing that counts
        return None


# ---- while training


def check_loss(loss: Output, step: str = "training_step") -> Tensor:
    """The loss, if it can be trained on: a floating-point tensor of one element with a gradient. Costs no device sync.

    Raises InvalidArguments.
    """
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise InvalidArguments(
                f"{step} returned a tensor of shape {tuple(loss.shape)}, and a loss must be a scalar: take its .mean()"
            )
        if loss.requires_grad:
            return loss
        raise InvalidArguments(
            f"{step} returned a loss of dtype {loss.dtype} without a gradient: it was detached, computed under "
            f"torch.no_grad(), made from numbers, or depends on no parameter that requires a gradient"
        )
    if isinstance(loss, Mapping):
        keys = ", ".join(repr(key) for key in loss)
        raise InvalidArguments(f'{step} returned a dict without the key "loss"; its keys are: {keys or "none"}')
    advice = ": return the tensor itself, not its .item()" if isinstance(loss, (int, float)) else ""
    raise InvalidArguments(
        f"{step} returned {type(loss).__qualname__}; it must return the loss, a scalar tensor, or a dict with it as "
        f'"loss"{advice}'
    )


def say_unknown_metric(monitor: str, logged: Iterable[str], who: str = "checkpoint") -> str:
    """The text for a `monitor` that names a metric which was never logged."""
    names = sorted(logged)
    if not names:
        return f'{who} monitors {monitor!r}, and nothing was ever logged: call self.log("{monitor}", ...) in a step'
    near = difflib.get_close_matches(monitor, names, n=1)
    advice = f"; did you mean {near[0]!r}?" if near else ""
    return f"{who} monitors {monitor!r}, which was never logged; logged were: {', '.join(names)}{advice}"
