"""Finetuning: parts of the module are frozen at first and trained later, in parameter groups of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from raylight.callbacks.mistake_list import Mistakes
from raylight.contract.errors import CheckpointMismatch, InvalidArguments
from raylight.contract.kinds import Value
from raylight.contract.plain_numbers import to_python
from raylight.user.callback import Callback

if TYPE_CHECKING:
    from raylight.user.module import Module
    from raylight.user.trainer_names import TrainerNames

Modules = nn.Module | Iterable[Any]  # a module, or modules in nested containers


class BaseFinetuning(Callback):
    """The base class of a schedule of freezing and unfreezing.

    Override `freeze_before_training(module)`, which runs before `configure_optimizers`, and
    `finetune_function(module, epoch, optimizer)`, which runs at the start of each epoch for each optimizer. Give the
    optimizer only parameters with `requires_grad`; `unfreeze_and_add_param_group` adds others later. A run that goes
    on from a checkpoint has the same groups and the same parameters frozen.
    """

    def __init__(self) -> None:
        self._saved: dict[str, Value] | None = None
        self._latest_epoch = -1  # whose start was seen; it starts again when a lost worker has been replaced in it

    def freeze_before_training(self, module: Module) -> None:
        raise NotImplementedError(f"{type(self).__name__} must override freeze_before_training(self, module)")

    def finetune_function(self, module: Module, epoch: int, optimizer: Optimizer) -> None:
        raise NotImplementedError(
            f"{type(self).__name__} must override finetune_function(self, module, epoch, optimizer)"
        )

    # ---- hooks

    def setup(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        self._saved, self._latest_epoch = None, -1
        self.freeze_before_training(module)

    def on_fit_start(self, trainer: TrainerNames, module: Module) -> None:
        saved, self._saved = self._saved, None
        if saved is not None:
            restore_groups(trainer, module, saved)

    def on_train_epoch_start(self, trainer: TrainerNames, module: Module) -> None:
        if trainer.current_epoch <= self._latest_epoch:
            return
        self._latest_epoch = trainer.current_epoch
        for optimizer in trainer.optimizers:
            num_groups = len(optimizer.param_groups)
            self.finetune_function(module, trainer.current_epoch, optimizer)
            if len(optimizer.param_groups) != num_groups:
                extend_schedulers(trainer, optimizer)

    def state_dict(self) -> dict[str, Value]:
        return {"latest_epoch": self._latest_epoch}

    def load_state_dict(self, state_dict: dict[str, Value]) -> None:
        self._latest_epoch = state_dict["latest_epoch"]

    def on_save_checkpoint(self, trainer: TrainerNames, module: Module, checkpoint: dict[str, Value]) -> None:
        checkpoint[f"{self.state_key}.groups"] = describe_groups(trainer, module)

    def on_load_checkpoint(self, trainer: TrainerNames, module: Module, checkpoint: dict[str, Value]) -> None:
        saved = checkpoint.get(f"{self.state_key}.groups") if trainer.fitting else None
        if saved is None:
            return
        # optimizers must have their groups again before their state is loaded; in a fresh worker they do not exist yet
        if trainer.optimizers:
            restore_groups(trainer, module, saved)
        else:
            self._saved = saved

    # ---- what a schedule is made of

    @staticmethod
    def flatten_modules(modules: Modules) -> list[nn.Module]:
        """The modules inside that have parameters themselves or nothing inside."""
        if isinstance(modules, nn.Module):
            found: Iterable[nn.Module] = modules.modules()
        else:
            found = [inner for module in modules for inner in BaseFinetuning.flatten_modules(module)]
        return [module for module in found if not list(module.children()) or module._parameters]

    @staticmethod
    def filter_params(modules: Modules, train_bn: bool = True, requires_grad: bool = True) -> Iterator[nn.Parameter]:
        """The parameters that require gradients, or that do not; without `train_bn` none of batch norm."""
        for module in BaseFinetuning.flatten_modules(modules):
            if train_bn or not isinstance(module, _BatchNorm):
                yield from (p for p in module.parameters(recurse=False) if p.requires_grad == requires_grad)

    @staticmethod
    def make_trainable(modules: Modules) -> None:
        for module in BaseFinetuning.flatten_modules(modules):
            if isinstance(module, _BatchNorm):
                module.track_running_stats = True
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = True

    @staticmethod
    def freeze_module(module: nn.Module) -> None:
        """Freezes the module's own parameters, not those of modules inside it."""
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = False

    @staticmethod
    def freeze(modules: Modules, train_bn: bool = True) -> None:
        """Freezes the modules; with `train_bn`, batch norm goes on training."""
        for module in BaseFinetuning.flatten_modules(modules):
            if isinstance(module, _BatchNorm) and train_bn:
                BaseFinetuning.make_trainable(module)
            else:
                BaseFinetuning.freeze_module(module)

    @staticmethod
    def filter_on_optimizer(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """The parameters among `params` that the optimizer does not have yet."""
        has = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [parameter for parameter in params if id(parameter) not in has]

    @staticmethod
    def unfreeze_and_add_param_group(
        modules: Modules,
        optimizer: Optimizer,
        lr: float | None = None,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
    ) -> None:
        """Unfreezes the modules and gives those parameters that the optimizer lacks to it, as a new group.

        The group's learning rate is `lr`, or that of the first group divided by `initial_denom_lr`.
        """
        BaseFinetuning.make_trainable(modules)
        new = BaseFinetuning.filter_on_optimizer(optimizer, BaseFinetuning.filter_params(modules, train_bn=train_bn))
        if new:
            rate = optimizer.param_groups[0]["lr"] / initial_denom_lr if lr is None else float(lr)
            optimizer.add_param_group({"params": new, "lr": rate})


def multiplicative(epoch: int) -> float:
    """The default schedule of the backbone's learning rate: twice that of the epoch before."""
    return 2.0


class BackboneFinetuning(BaseFinetuning):
    """Trains `module.backbone` from an epoch on, with a learning rate of its own that grows towards the head's.

    At `unfreeze_backbone_at_epoch` its rate is `backbone_initial_lr`, or the first group's times
    `backbone_initial_ratio_lr`. Each epoch after that multiplies it by `lambda_func(epoch + 1)`, with `should_align`
    up to the first group's. `train_bn` says whether batch norm of the backbone is trained then. `verbose` tells both
    rates, with `rounding` digits. `initial_denom_lr` is accepted as in Lightning 2.6, and has no effect there either.
    """

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Callable[[int], float] = multiplicative,
        backbone_initial_ratio_lr: float = 10e-2,
        backbone_initial_lr: float | None = None,
        should_align: bool = True,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
        verbose: bool = False,
        rounding: int = 12,
    ):
        super().__init__()
        mistakes = Mistakes("BackboneFinetuning")
        mistakes.require_count("unfreeze_backbone_at_epoch", unfreeze_backbone_at_epoch, 0)
        mistakes.require(callable(lambda_func), f"lambda_func={lambda_func!r} must be a function of an epoch.")
        mistakes.require_number("backbone_initial_ratio_lr", backbone_initial_ratio_lr)
        if backbone_initial_lr is not None:
            mistakes.require_number("backbone_initial_lr", backbone_initial_lr)
        mistakes.raise_any()
        self.unfreeze_backbone_at_epoch = to_python(unfreeze_backbone_at_epoch)
        self.lambda_func = lambda_func
        self.backbone_initial_ratio_lr = to_python(backbone_initial_ratio_lr)
        self.backbone_initial_lr = to_python(backbone_initial_lr)
        self.should_align = should_align
        self.initial_denom_lr = initial_denom_lr
        self.train_bn = train_bn
        self.verbose = verbose
        self.rounding = rounding
        self.previous_backbone_lr: float | None = None

    def setup(self, trainer: TrainerNames, module: Module, stage: str) -> None:
        self.previous_backbone_lr = None
        super().setup(trainer, module, stage)

    def state_dict(self) -> dict[str, Value]:
        return super().state_dict() | {"previous_backbone_lr": self.previous_backbone_lr}

    def load_state_dict(self, state_dict: dict[str, Value]) -> None:
        super().load_state_dict(state_dict)
        self.previous_backbone_lr = state_dict["previous_backbone_lr"]

    def freeze_before_training(self, module: Module) -> None:
        if not isinstance(getattr(module, "backbone", None), nn.Module):
            raise InvalidArguments(
                f"BackboneFinetuning: {type(module).__name__} has no `backbone`; assign the part that is to be frozen "
                "to self.backbone."
            )
        self.freeze(module.backbone)

    def finetune_function(self, module: Module, epoch: int, optimizer: Optimizer) -> None:
        if epoch < self.unfreeze_backbone_at_epoch:
            return
        rate = float(optimizer.param_groups[0]["lr"])
        if epoch == self.unfreeze_backbone_at_epoch:
            own = self.backbone_initial_lr
            own = rate * self.backbone_initial_ratio_lr if own is None else own
            self.unfreeze_and_add_param_group(module.backbone, optimizer, own, train_bn=self.train_bn)
        else:
            own = self.lambda_func(epoch + 1) * (self.previous_backbone_lr or 0.0)
            own = min(own, rate) if self.should_align else own
            optimizer.param_groups[-1]["lr"] = own
        self.previous_backbone_lr = own
        if self.verbose and module.trainer.is_global_zero:
            rates = f"the head's learning rate is {rate:.{self.rounding}g}, the backbone's {own:.{self.rounding}g}"
            module.trainer.notice(f"BackboneFinetuning: in epoch {epoch} {rates}.")


def describe_groups(trainer: TrainerNames, module: Module) -> dict[str, Value]:
    """Which parameters are in which group of which optimizer, and what is frozen, by name."""
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        "groups": [
            [[name_of[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ],
        "frozen": [name for name, parameter in module.named_parameters() if not parameter.requires_grad],
        "untracked": [name for name, layer in _batch_norms(module) if not layer.track_running_stats],
    }


def restore_groups(trainer: TrainerNames, module: Module, saved: dict[str, Value]) -> None:
    """Freezes what was frozen and adds the groups that were added since `configure_optimizers`; what is in them is
    loaded later, with the optimizer's state."""
    parameters = dict(module.named_parameters())
    unknown = sorted({n for groups in saved["groups"] for names in groups for n in names} - parameters.keys())
    if unknown:
        raise CheckpointMismatch(f"the checkpoint's optimizers train {unknown}, which {type(module).__name__} lacks.")
    for name, parameter in parameters.items():
        parameter.requires_grad = name not in saved["frozen"]
    for name, layer in _batch_norms(module):
        layer.track_running_stats = name not in saved["untracked"]
    for optimizer, groups in zip(trainer.optimizers, saved["groups"], strict=True):
        for names in groups[len(optimizer.param_groups) :]:
            optimizer.add_param_group({"params": [parameters[name] for name in names]})
        extend_schedulers(trainer, optimizer)


def extend_schedulers(trainer: TrainerNames, optimizer: Optimizer) -> None:
    """Schedulers hold one value for each group that there was when they were made; a new group follows the first one,
    at its own rate."""
    first, *others = optimizer.param_groups
    for group in others:
        ratio = group["lr"] / first["lr"] if first["lr"] else 1.0
        for key, value in first.items():  # what schedulers keep in the groups, such as initial_lr and max_lr
            if key not in group and key != "name":
                group[key] = value * ratio if key.endswith("_lr") else value
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if getattr(scheduler, "optimizer", None) is not optimizer:
            continue
        for group in optimizer.param_groups[len(getattr(scheduler, "base_lrs", optimizer.param_groups)) :]:
            scheduler.base_lrs.append(group.get("initial_lr", group["lr"]))
            if hasattr(scheduler, "lr_lambdas"):
                scheduler.lr_lambdas.append(scheduler.lr_lambdas[0])


def _batch_norms(module: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, _BatchNorm))
