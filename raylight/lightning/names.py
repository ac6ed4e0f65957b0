"""The table of Lightning's public names: where each is here.

`raylight.a.b` carries the names of `lightning.pytorch.a.b`. Where raylight has a module of that name it speaks for
itself; all others are made from this table when they are imported (`alias_modules.py`). The names that are not here,
each with its reason, are in `refused.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Here:
    """Names that one module of raylight has, and the modules of Lightning that have them."""

    place: str
    """A module, below `raylight`."""
    names: str
    """Lightning's names with blanks between; `Theirs=Ours` where the name is another one here."""
    modules: tuple[str, ...]
    """Modules, below `lightning.pytorch`."""


def _here(place: str, names: str, *modules: str) -> Here:
    return Here(place, names, modules)


HERE: tuple[Here, ...] = (
    # what is trained
    _here("user.module", "LightningModule=Module", "core", "core.module"),
    _here("user.data_module", "LightningDataModule=DataModule", "core", "core.datamodule"),
    _here("user.module_hooks", "ModelHooks=ModuleHooks", "core.hooks"),
    _here("user.data_hooks", "DataHooks CheckpointHooks", "core.hooks"),
    _here("user.hyperparameters", "HyperparametersMixin", "core.mixins", "core.mixins.hparams_mixin"),
    _here("worker.step.optimizers", "LightningOptimizer=SteppingOptimizer do_nothing_closure", "core.optimizer"),
    _here("lightning.types", "MODULE_OPTIMIZERS", "core.module"),
    _here("lightning.hyperparameter_files", "load_hparams_from_yaml save_hparams_to_yaml update_hparams",
          "core.saving"),
    # the trainer
    _here("contract.seeding", "seed_everything", "trainer"),
    _here("trainer", "Trainer", "trainer.trainer"),
    _here("user.states", "TrainerStatus TrainerFn RunningStage TrainerState", "trainer.states"),
    # callbacks: those whose module has another name here
    _here("user.callback", "Callback", "callbacks.callback"),
    _here("callbacks.lambda_callback", "LambdaCallback", "callbacks.lambda_function"),
    _here("callbacks.learning_rate_monitor", "LearningRateMonitor", "callbacks.lr_monitor"),
    _here("callbacks.stochastic_weight_averaging", "StochasticWeightAveraging", "callbacks.stochastic_weight_avg"),
    _here("callbacks.model_pruning", "ModelPruning", "callbacks", "callbacks.pruning"),
    _here("callbacks.spike_detection", "SpikeDetection", "callbacks", "callbacks.spike"),
    _here("callbacks.model_summary", "RichModelSummary", "callbacks.rich_model_summary"),
    _here("callbacks.learning_rate_finder", "LearningRateFinder", "callbacks.lr_finder"),
    _here("callbacks.batch_size_finder", "BatchSizeFinder", "callbacks", "callbacks.batch_size_finder"),
    _here("callbacks.learning_rate_finder", "LearningRateFinder", "callbacks"),
    _here("callbacks.progress_bar", "ProgressBar", "callbacks.progress", "callbacks.progress.progress_bar"),
    _here("callbacks.progress_bar", "get_standard_metrics", "callbacks.progress.progress_bar"),
    _here("callbacks.progress_bar", "RichProgressBar", "callbacks.progress", "callbacks.progress.rich_progress"),
    _here("callbacks.progress_bar", "RichProgressBarTheme", "callbacks.progress.rich_progress"),
    _here("callbacks.progress_bar", "TQDMProgressBar", "callbacks.progress", "callbacks.progress.tqdm_progress"),
    _here("tuner.tuner", "Tuner", "tuner", "tuner.tuning"),
    # how workers act together, and on what
    _here("user.strategies", "Strategy=LightningStrategy", "strategies", "strategies.strategy"),
    _here("user.strategies", "ParallelStrategy", "strategies", "strategies.parallel"),
    _here("user.strategies", "DDPStrategy", "strategies", "strategies.ddp"),
    _here("user.strategies", "SingleDeviceStrategy", "strategies", "strategies.single_device"),
    _here("user.accelerators", "Accelerator", "accelerators", "accelerators.accelerator"),
    _here("user.accelerators", "CPUAccelerator", "accelerators", "accelerators.cpu"),
    _here("user.accelerators", "CUDAAccelerator", "accelerators", "accelerators.cuda"),
    _here("user.accelerators", "MPSAccelerator", "accelerators", "accelerators.mps"),
    _here("lightning.machine", "find_usable_cuda_devices", "accelerators"),
    # plugins
    _here("user.checkpoint_io", "CheckpointIO", "plugins", "plugins.io", "plugins.io.checkpoint_plugin"),
    _here("user.checkpoint_io", "TorchCheckpointIO", "plugins", "plugins.io", "plugins.io.torch_plugin"),
    _here("user.precision_plugins", "Precision", "plugins", "plugins.precision", "plugins.precision.precision"),
    _here("user.precision_plugins", "MixedPrecision", "plugins", "plugins.precision", "plugins.precision.amp"),
    _here("user.precision_plugins", "HalfPrecision", "plugins", "plugins.precision", "plugins.precision.half"),
    _here("user.precision_plugins", "DoublePrecision", "plugins", "plugins.precision", "plugins.precision.double"),
    _here("user.precision_plugins", "LayerSync TorchSyncBatchNorm", "plugins", "plugins.layer_sync"),
    # what is written and shown
    _here("loggers.logger", "Logger DummyLogger rank_zero_experiment merge_dicts", "loggers.logger"),
    _here("loggers.tensorboard", "TensorBoardLogger", "loggers.tensorboard"),
    _here("loggers.csv_logs", "CSVLogger ExperimentWriter", "loggers.csv_logs"),
    _here("loggers.wandb", "WandbLogger", "loggers", "loggers.wandb"),
    _here("loggers.mlflow", "MLFlowLogger", "loggers", "loggers.mlflow"),
    _here("loggers.comet", "CometLogger", "loggers", "loggers.comet"),
    _here("loggers.neptune", "NeptuneLogger", "loggers", "loggers.neptune"),
    _here("user.profilers", "Profiler", "profilers", "profilers.profiler"),
    _here("user.profilers", "PassThroughProfiler", "profilers", "profilers.base"),
    _here("user.profilers", "SimpleProfiler", "profilers", "profilers.simple"),
    _here("user.profilers", "AdvancedProfiler", "profilers", "profilers.advanced"),
    _here("user.profilers", "PyTorchProfiler", "profilers", "profilers.pytorch"),
    # the command line
    _here("cli", "LightningCLI LightningArgumentParser SaveConfigCallback ArgsType OptimizerCallable "
          "LRSchedulerCallable ReduceLROnPlateau instantiate_class instantiate_module LRSchedulerTypeTuple "
          "LRSchedulerTypeUnion LRSchedulerType", "cli"),
    # what Lightning keeps in `utilities`
    _here("user.hyperparameters", "AttributeDict", "utilities", "utilities.parsing"),
    _here("user.combined_loader", "CombinedLoader", "utilities", "utilities.combined_loader"),
    _here("lightning.enums", "LightningEnum", "utilities", "utilities.enums"),
    _here("lightning.enums", "GradClipAlgorithmType", "utilities", "utilities.enums"),
    _here("lightning.parameters", "grad_norm", "utilities", "utilities.grads"),
    _here("lightning.parameters", "find_shared_parameters set_shared_parameters", "utilities",
          "utilities.parameter_tying"),
    _here("lightning.machine", "is_shared_filesystem suggested_max_num_workers", "utilities"),
    _here("lightning.memory", "recursive_detach is_oom_error is_cuda_out_of_memory is_cudnn_snafu "
          "is_out_of_cpu_memory garbage_collection_cuda", "utilities.memory"),
    _here("user.transfer", "move_data_to_device=move_to_device", "utilities"),
    _here("lightning.memory", "extract_batch_size", "utilities.data"),
    _here("lightning.machine", "measure_flops", "utilities"),
    _here("contract.rank_zero", "rank_zero_deprecation rank_zero_info rank_zero_only rank_zero_warn", "utilities",
          "utilities.rank_zero"),
    _here("contract.rank_zero", "rank_zero_debug rank_prefixed_message LightningDeprecationWarning WarningCache",
          "utilities.rank_zero"),
    _here("contract.rank_zero", "PossibleUserWarning", "utilities.warnings"),
    _here("contract.rank_zero", "disable_possible_user_warnings", "utilities"),
    _here("contract.errors", "MisconfigurationException SIGTERMException", "utilities.exceptions"),
    _here("contract.seeding", "isolate_rng", "utilities.seed"),
    _here("lightning.attributes", "is_overridden", "utilities.model_helpers"),
    _here("lightning.attributes", "is_picklable", "utilities", "utilities.parsing"),
    _here("lightning.attributes", "clean_namespace lightning_hasattr lightning_getattr lightning_setattr",
          "utilities.parsing"),
    _here("lightning.attributes", "save_hyperparameters", "utilities.parsing"),
    _here("lightning.types", "STEP_OUTPUT TRAIN_DATALOADERS EVAL_DATALOADERS DistributedDataParallel "
          "LRSchedulerTypeTuple LRSchedulerTypeUnion LRSchedulerType LRSchedulerPLType LRSchedulerConfigType "
          "OptimizerConfig OptimizerLRSchedulerConfig OptimizerLRScheduler", "utilities.types"),
    _here("worker.step.optimizers", "LRSchedulerConfig=SchedulerConfig", "utilities.types"),
    _here("callbacks.layer_table", "ModelSummary get_formatted_model_size get_human_readable_count summarize",
          "utilities.model_summary", "utilities.model_summary.model_summary"),
)  # fmt: skip


def read(row: Here) -> dict[str, str]:
    """Lightning's names of a row, each with the one it has here."""
    return dict(name.split("=") if "=" in name else (name, name) for name in row.names.split())  # type: ignore[misc]
