"""ModelPruning: sets the least of a module's weights to zero while it trains, by `torch.nn.utils.prune`."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from raylight.callbacks.mistake_list import Mistakes, is_number
from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Value
from raylight.contract.rank_zero import rank_zero_info
from raylight.user.callback import Callback
from raylight.user.module import Module
from raylight.worker.group.collectives import broadcast_tensors

if TYPE_CHECKING:
    from raylight.contract.config import Config
    from raylight.user.trainer_names import TrainerNames

Pairs: TypeAlias = Sequence[tuple[nn.Module, str]]
"""Layers, each with the name of one of its parameters."""
Amount: TypeAlias = int | float
"""A number of weights, or a share from 0.0 to 1.0."""

METHODS: dict[str, type[prune.BasePruningMethod]] = {
    "ln_structured": prune.LnStructured,
    "l1_unstructured": prune.L1Unstructured,
    "random_structured": prune.RandomStructured,
    "random_unstructured": prune.RandomUnstructured,
}
MASKS = "pruning_masks"
"""The key of a checkpoint that holds what was pruned, where its weights are zero already."""
_CONTAINERS = (Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)


class ModelPruning(Callback):
    """Prunes at the end of each epoch of training, or with `prune_on_train_epoch_end=False` of each validation.

    `pruning_fn` is "l1_unstructured", "random_unstructured", "ln_structured", "random_structured" or a class of
    `torch.nn.utils.prune`; structured ones need `pruning_dim`, "ln_structured" `pruning_norm` too. With
    `use_global_unstructured` the least of all weights together are pruned, else the least of each layer. `amount`,
    `apply_pruning` and `use_lottery_ticket_hypothesis` may be functions of the epoch; with the last, the weights that
    are left go back to their first values. `parameters_to_prune` empty: each weight and bias, or `parameter_names`.

    Numbers are those of Lightning 2.6. All workers take rank 0's masks. With `make_pruning_permanent` a checkpoint has
    the pruned weights under their usual names, and the module is an ordinary one again at the end. A run that continues
    from a checkpoint keeps what was pruned, where Lightning begins with nothing pruned; and weights go back to their
    first values each time, where Lightning's on a CPU do so once.
    """

    PARAMETER_NAMES = ("weight", "bias")

    def __init__(
        self,
        pruning_fn: str | type[prune.BasePruningMethod],
        parameters_to_prune: Pairs = (),
        parameter_names: list[str] | None = None,
        use_global_unstructured: bool = True,
        amount: Amount | Callable[[int], Amount] = 0.5,
        apply_pruning: bool | Callable[[int], bool] = True,
        make_pruning_permanent: bool = True,
        use_lottery_ticket_hypothesis: bool | Callable[[int], bool] = True,
        resample_parameters: bool = False,
        pruning_dim: int | None = None,
        pruning_norm: int | None = None,
        verbose: int = 0,
        prune_on_train_epoch_end: bool = True,
    ):
        method = METHODS.get(pruning_fn.lower()) if isinstance(pruning_fn, str) else pruning_fn
        self._options = _find_options(method, pruning_dim, pruning_norm)
        mistakes = Mistakes(type(self).__name__)
        for name in parameter_names or ():
            mistakes.require_choice("parameter_names", name, self.PARAMETER_NAMES)
        if isinstance(pruning_fn, str):
            mistakes.require_choice("pruning_fn", pruning_fn.lower(), METHODS)
        elif not (isinstance(pruning_fn, type) and issubclass(pruning_fn, prune.BasePruningMethod)):
            mistakes.add(f"pruning_fn={pruning_fn!r} is neither a string nor a class of torch.nn.utils.prune.")
        elif not use_global_unstructured:
            mistakes.add("a pruning_fn of your own needs use_global_unstructured=True.")
        for name, value in self._options.items():
            option = {"dim": "pruning_dim", "n": "pruning_norm"}[name]
            mistakes.require(value is not None, f"pruning_fn={pruning_fn!r} needs {option}=.")
        unfit = use_global_unstructured and getattr(method, "PRUNING_TYPE", "unstructured") != "unstructured"
        mistakes.require(
            not unfit, f"pruning_fn={pruning_fn!r} prunes parts of a layer: use_global_unstructured=False."
        )
        mistakes.require(is_number(amount) or callable(amount), f"amount={amount!r} must be a number or a function.")
        mistakes.require_choice("verbose", verbose, (0, 1, 2))
        mistakes.raise_any()
        assert method is not None
        self.pruning_fn: type[prune.BasePruningMethod] = method
        self.amount = amount
        self._use_global_unstructured = use_global_unstructured
        self._parameters_to_prune = parameters_to_prune
        self._parameter_names = tuple(parameter_names or self.PARAMETER_NAMES)
        self._apply_pruning = apply_pruning
        self._make_pruning_permanent = make_pruning_permanent
        self._use_lottery_ticket_hypothesis = use_lottery_ticket_hypothesis
        self._resample_parameters = resample_parameters
        self._verbose = verbose
        self._prune_on_train_epoch_end = prune_on_train_epoch_end
        self._first_layers: list[nn.Module] = []  # of each pair the layer as it was, without copies of one layer

    # ---- what a subclass may override or call

    def filter_parameters_to_prune(self, parameters_to_prune: Pairs = ()) -> Pairs:
        """The pairs that are pruned, of all that could be. Override it."""
        return parameters_to_prune

    def apply_pruning(self, amount: Amount) -> None:
        """Prune now."""
        before = self._count_zeros() if self._verbose else []
        orders = {layer: list(layer._parameters) for layer, _ in self._parameters_to_prune}
        if self._use_global_unstructured:
            takes_amount = "amount" in inspect.signature(self.pruning_fn).parameters
            options = {"amount": amount} if takes_amount else {}
            prune.global_unstructured(self._parameters_to_prune, pruning_method=self.pruning_fn, **options)
        else:
            for layer, name in self._parameters_to_prune:
                self._prune_layer(layer, name, amount)
        for layer, order in orders.items():
            _keep_order(layer, order)
        if self._verbose:
            self._say(before, amount)

    def apply_lottery_ticket_hypothesis(self) -> None:
        """Give the weights their first values, or with `resample_parameters` new ones; masks stay."""
        fresh: dict[int, nn.Module] = {}
        for (layer, name), first in zip(self._parameters_to_prune, self._first_layers, strict=True):
            if id(first) not in fresh:
                resamples = self._resample_parameters and hasattr(first, "reset_parameters")
                fresh[id(first)] = _resample(first) if resamples else first
            target, value = getattr(layer, f"{name}_orig", None), getattr(fresh[id(first)], name)
            if isinstance(target, Tensor) and isinstance(value, Tensor):
                with torch.no_grad():
                    target.copy_(value)

    def make_pruning_permanent(self, module: nn.Module) -> None:
        """Put the pruned weights in the place of weight and mask."""
        for layer in module.modules():
            for key, hook in list(layer._forward_pre_hooks.items()):
                if isinstance(hook, prune.BasePruningMethod):
                    order = list(layer._parameters)
                    hook.remove(layer)
                    del layer._forward_pre_hooks[key]
                    _keep_order(layer, order)

    @staticmethod
    def sanitize_parameters_to_prune(
        pl_module: Module, parameters_to_prune: Pairs = (), parameter_names: Sequence[str] = ()
    ) -> Pairs:
        """The pairs that were given, once they are found in the module; all that it has if none were."""
        layers = [layer for layer in pl_module.modules() if not isinstance(layer, _CONTAINERS)]
        if not parameters_to_prune:
            names = parameter_names or ModelPruning.PARAMETER_NAMES
            return [(layer, n) for n in names for layer in layers if isinstance(getattr(layer, n, None), nn.Parameter)]
        if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in parameters_to_prune):
            raise InvalidArguments("ModelPruning: parameters_to_prune must be pairs of a layer and a name.")
        known = {id(layer) for layer in layers}
        lost = [f"{type(layer).__name__}.{name}" for layer, name in parameters_to_prune
                if id(layer) not in known or not hasattr(layer, name)]  # fmt: skip
        if lost:
            raise InvalidArguments(
                f"ModelPruning: parameters_to_prune that the module does not have: {', '.join(lost)}."
            )
        return parameters_to_prune

    # ---- hooks

    def _find_mistakes(self, config: Config) -> list[str]:
        if self._make_pruning_permanent or config.num_workers == 0:
            return []
        return ["ModelPruning(make_pruning_permanent=False) needs num_workers=0: your own module has no masks to load."]

    def setup(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        if stage != "fit":
            return
        pairs = self.sanitize_parameters_to_prune(module, self._parameters_to_prune, self._parameter_names)
        self._parameters_to_prune = self.filter_parameters_to_prune(pairs)
        copies = {id(layer): deepcopy(layer) for layer, _ in self._parameters_to_prune}
        self._first_layers = [copies[id(layer)] for layer, _ in self._parameters_to_prune]

    def on_train_epoch_end(self, trainer: TrainerNames, module: Module) -> None:
        if self._prune_on_train_epoch_end:
            self._run(trainer)

    def on_validation_epoch_end(self, trainer: TrainerNames, module: Module) -> None:
        if trainer.fitting and not trainer.sanity_checking and not self._prune_on_train_epoch_end:
            self._run(trainer)

    def on_train_end(self, trainer: TrainerNames, module: Module) -> None:
        if self._make_pruning_permanent:
            trainer.finish_copying()
            self.make_pruning_permanent(module)

    def on_save_checkpoint(self, trainer: TrainerNames, module: Module, checkpoint: dict[str, Value]) -> None:
        if not self._make_pruning_permanent:
            return
        weights = checkpoint["state_dict"]
        masks = {name.removesuffix("_mask"): weights[name] for name in weights if _is_mask(name, weights)}
        checkpoint["state_dict"] = _merge(weights, masks)
        if masks:
            checkpoint[MASKS] = masks

    def on_load_checkpoint(self, trainer: TrainerNames, module: Module, checkpoint: dict[str, Value]) -> None:
        """Give the module the masks that the checkpoint has, where training goes on from it."""
        if not trainer.fitting and self._make_pruning_permanent:
            return
        weights = OrderedDict(checkpoint["state_dict"])
        masks = {name.removesuffix("_mask"): weights[name] for name in weights if _is_mask(name, weights)}
        for name, mask in (masks or checkpoint.get(MASKS, {})).items():
            owner, _, parameter = name.rpartition(".")
            layer = module.get_submodule(owner)
            if not hasattr(layer, f"{parameter}_mask"):
                order = list(layer._parameters)
                prune.custom_from_mask(layer, parameter, mask.to(getattr(layer, parameter).device))
                _keep_order(layer, order)
            if name in weights:
                weights |= {f"{name}_orig": weights.pop(name), f"{name}_mask": mask}
        checkpoint["state_dict"] = weights

    # ---- inside

    def _run(self, trainer: TrainerNames) -> None:
        epoch = trainer.current_epoch
        amount = self.amount(epoch) if callable(self.amount) else self.amount
        if not _is_on(self._apply_pruning, epoch) or not amount:
            return
        trainer.finish_copying()
        self.apply_pruning(amount)
        if _is_on(self._use_lottery_ticket_hypothesis, epoch):
            self.apply_lottery_ticket_hypothesis()
        masks = [getattr(layer, f"{name}_mask") for layer, name in self._parameters_to_prune]
        broadcast_tensors(masks, trainer.world_size)
        if self._resample_parameters:
            weights = [getattr(layer, f"{name}_orig") for layer, name in self._parameters_to_prune]
            broadcast_tensors([weight.detach() for weight in weights], trainer.world_size)

    def _prune_layer(self, layer: nn.Module, name: str, amount: Amount) -> None:
        self.pruning_fn.apply(layer, name, amount=amount, **self._options)

    def _count_zeros(self) -> list[tuple[int, int]]:
        masks = [getattr(layer, f"{name}_mask", None) for layer, name in self._parameters_to_prune]
        return [(0, 1) if mask is None else (int((mask == 0).sum()), mask.numel()) for mask in masks]

    def _say(self, before: list[tuple[int, int]], amount: Amount) -> None:
        now = self._count_zeros()
        total = sum(size for _, size in now)
        old, new = sum(zeros for zeros, _ in before), sum(zeros for zeros, _ in now)
        rank_zero_info(
            f"Pruned by {self.pruning_fn.__name__}: {old} of {total} weights before, {new} ({new / total:.2%}) now"
        )
        if self._verbose == 2:
            for (layer, name), (was, _), (zeros, size) in zip(self._parameters_to_prune, before, now, strict=True):
                rank_zero_info(f"  {layer!r}.{name}, amount {amount}: {was} before, {zeros} ({zeros / size:.2%}) now")


def _find_options(method: object, dim: int | None, norm: int | None) -> dict[str, int | None]:
    """The arguments that torch's method takes beside the amount."""
    if method is prune.LnStructured:
        return {"n": norm, "dim": dim}
    return {"dim": dim} if method is prune.RandomStructured else {}


def _is_on(switch: bool | Callable[[int], bool], epoch: int) -> bool:
    return bool(switch(epoch)) if callable(switch) else switch


def _is_mask(name: str, weights: dict[str, Value]) -> bool:
    return name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in weights


def _merge(weights: dict[str, Value], masks: dict[str, Tensor]) -> dict[str, Value]:
    """The weights under their usual names, zero where they are pruned."""
    merged: OrderedDict[str, Value] = OrderedDict()
    for name, value in weights.items():
        usual = name.removesuffix("_orig")
        if name != usual and usual in masks:
            merged[usual] = value.detach() * masks[usual].to(value.dtype)
        elif name.removesuffix("_mask") not in masks:
            merged[name] = value
    return merged


def _keep_order(layer: nn.Module, before: list[str]) -> None:
    """Puts the parameters back in their order: torch moves a pruned one to the end, and optimizers count them."""
    parameters = dict(layer._parameters)
    for name in before:
        usual = name.removesuffix("_orig")
        found = next((each for each in (name, f"{name}_orig", usual) if each in parameters), None)
        if found is not None:
            del layer._parameters[found]
            layer._parameters[found] = parameters[found]


def _resample(layer: nn.Module) -> nn.Module:
    fresh = deepcopy(layer)
    fresh.reset_parameters()  # type: ignore[operator]
    return fresh
