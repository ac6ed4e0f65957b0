"""Lightning's names that are not here, each group with the reason and what to use in its place.

Importing such a name works, so that a script that mentions it in one branch alone still runs; `isinstance` with it is
False; calling it, subclassing it or reading from it raises the sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Never

from raylight.contract.errors import InvalidArguments

TPU = 'raylight trains on GPUs and CPUs, not on TPUs: use accelerator="gpu" or "cpu"'
_ONE_DEVICE = (
    'a model that does not fit one device is not supported yet: use strategy="ddp" where the model and its optimizer do'
)
DEEPSPEED = f"raylight does not use DeepSpeed, and {_ONE_DEVICE}"
FSDP = _ONE_DEVICE
ENVIRONMENT = "Ray knows the nodes and places the workers: leave it out, and set RAY_ADDRESS to use a cluster"
PRECISION = 'use precision="bf16-mixed", "16-mixed" or one of the others of raylight.Trainer'
LOOPS = (
    "the loop cannot be replaced: trainer.fit_loop says where it stands, and automatic_optimization=False steps by hand"
)
INSIDE = (
    "a part of the inside of Lightning's Trainer, which raylight builds in another way: use the Trainer's own names"
)
DEMOS = "Lightning's own example: copy what you need of it into your project"
OLD_FILES = "raylight reads .ckpt files of Lightning 2: bring an older one up to date with Lightning's own tool"
MAKE_CACHE = "make one of your own: raylight.utilities.rank_zero.WarningCache()"
CLUSTER_LAUNCH = "Ray starts the workers: raylight.Trainer(num_workers=N)"


@dataclass(frozen=True, slots=True)
class Refused:
    """Names of some modules of Lightning that are not here."""

    sentence: str
    names: str
    """With blanks between; "*" for all that a module has."""
    modules: tuple[str, ...]
    """Modules below `lightning.pytorch`; with "*" those inside them too."""


def _not(sentence: str, names: str, *modules: str) -> Refused:
    return Refused(sentence, names, modules)


REFUSED: tuple[Refused, ...] = (
    # devices that raylight does not train on
    _not(TPU, "XLAAccelerator", "accelerators", "accelerators.xla"),
    _not(TPU, "XLACheckpointIO", "plugins", "plugins.io", "plugins.io.xla_plugin"),
    _not(TPU, "XLAPrecision", "plugins", "plugins.precision", "plugins.precision.xla"),
    _not(TPU, "XLAEnvironment", "plugins.environments"),
    _not(TPU, "XLAProfiler", "profilers", "profilers.xla"),
    _not(TPU, "XLAStrategy", "strategies.xla"),
    _not(TPU, "SingleDeviceXLAStrategy", "strategies.single_xla"),
    # models that do not fit one device
    _not(DEEPSPEED, "DeepSpeedStrategy", "strategies", "strategies.deepspeed"),
    _not(DEEPSPEED, "remove_module_hooks", "strategies.deepspeed"),
    _not(DEEPSPEED, "DeepSpeedPrecision", "plugins", "plugins.precision", "plugins.precision.deepspeed"),
    _not(DEEPSPEED, "DeepSpeedSummary", "utilities.model_summary", "utilities.model_summary.model_summary_deepspeed"),
    _not(DEEPSPEED, "DeepSpeedLayerSummary deepspeed_param_size", "utilities.model_summary.model_summary_deepspeed"),
    _not(DEEPSPEED, "*", "utilities.deepspeed"),
    _not(FSDP, "FSDPStrategy", "strategies", "strategies.fsdp"),
    _not(FSDP, "ModelParallelStrategy", "strategies", "strategies.model_parallel"),
    _not(FSDP, "FSDPPrecision", "plugins", "plugins.precision", "plugins.precision.fsdp"),
    _not(FSDP, "*", "utilities.consolidate_checkpoint"),
    # number formats
    _not('raylight does not quantise while training: ' + PRECISION, "BitsandbytesPrecision", "plugins",
         "plugins.precision", "plugins.precision.bitsandbytes"),
    _not("raylight does not use NVIDIA's Transformer Engine: " + PRECISION, "TransformerEnginePrecision", "plugins",
         "plugins.precision", "plugins.precision.transformer_engine"),
    _not('precision="64-true" converts the module itself: use that', "LightningDoublePrecisionModule",
         "plugins.precision.double"),
    # where workers run
    _not(ENVIRONMENT, "ClusterEnvironment KubeflowEnvironment LightningEnvironment LSFEnvironment MPIEnvironment "
         "SLURMEnvironment TorchElasticEnvironment", "plugins.environments"),
    _not(CLUSTER_LAUNCH, "*", "strategies.launchers"),
    # files and loggers
    _not("every checkpoint is written behind the loop already: leave it out", "AsyncCheckpointIO", "plugins",
         "plugins.io", "plugins.io.async_plugin"),
    _not("it logs to a service of Lightning AI: use raylight.loggers.TensorBoardLogger or CSVLogger", "LitLogger",
         "loggers", "loggers.litlogger"),
    _not("a constant of the inside of a logger: leave it out", "FRAMEWORK_NAME comet_experiment", "loggers.comet"),
    _not("a constant of the inside of a logger: leave it out", "LOCAL_FILE_URI_PREFIX", "loggers.mlflow"),
    _not("checkpoints go to storage_path, and load_from_checkpoint reads them: there is no registry", "*",
         "utilities.model_registry"),
    _not(OLD_FILES, "*", "utilities.migration", "utilities.upgrade_checkpoint"),
    _not("use save_hparams_to_yaml and load_hparams_from_yaml", "load_hparams_from_tags_csv save_hparams_to_tags_csv",
         "core.saving"),
    _not("it reads a Python value from text: use ast.literal_eval", "convert", "core.saving"),
    _not("raylight stores hyperparameters under keys of its own", "CHECKPOINT_PAST_HPARAMS_KEYS", "core.saving"),
    # what is drawn and measured
    _not("the bar is drawn in the driver: subclass raylight.callbacks.ProgressBar for one of your own",
         "Tqdm convert_inf", "callbacks.progress.tqdm_progress"),
    _not("use raylight.callbacks.DeviceStatsMonitor, which measures the device", "get_cpu_stats", "accelerators.cpu"),
    _not("use raylight.callbacks.DeviceStatsMonitor, which measures the device", "get_nvidia_gpu_stats",
         "accelerators.cuda"),
    _not("use raylight.callbacks.DeviceStatsMonitor, which measures the device", "get_device_stats",
         "accelerators.mps"),
    _not('use profiler="pytorch" or raylight.profilers.PyTorchProfiler', "RegisterRecordFunction ScheduleWrapper",
         "profilers.pytorch"),
    _not("the lists of raylight.utilities.model_summary.ModelSummary have one item for each layer",
         "LayerSummary parse_batch_shape", "utilities.model_summary", "utilities.model_summary.model_summary"),
    _not('say interval="step" or "epoch"', "Interval", "callbacks.timer"),
    _not("raylight.callbacks.ModelSummary shows the table", "PARAMETER_NUM_UNITS UNKNOWN_SIZE LEFTOVER_PARAMS_NAME "
         "NOT_APPLICABLE", "utilities.model_summary.model_summary"),
    # the inside of the trainer
    _not(LOOPS, "*", "loops"),
    _not(INSIDE, "*", "overrides", "trainer.call", "trainer.configuration_validator", "trainer.connectors",
         "trainer.setup"),
    _not("raylight does it itself before a step", "is_param_in_hook_signature", "utilities.signature_utils"),
    _not("the loaders are divided over the workers by raylight; ask trainer.num_training_batches",
         "has_len_all_ranks BType", "utilities.data"),
    _not("compile inside the module: self.net = torch.compile(self.net)", "*", "utilities.compile"),
    _not("it holds a logger of Lightning's: use logging.getLogger(...)", "rank_zero_module", "utilities.rank_zero"),
    _not("it lists the arguments of a function: use inspect.signature", "parse_class_init_keys get_init_args "
         "collect_init_args", "utilities.parsing"),
    _not("it is a call of torchvision: use torchvision.models.get_model", "get_torchvision_model",
         "utilities.model_helpers"),
    _not("a type variable of Lightning's inside: use typing.TypeVar", "TBroadcast TReduce", "strategies.strategy"),
    _not("a type variable of Lightning's inside: use typing.TypeVar", "ModuleType", "cli"),
    _not(MAKE_CACHE, "warning_cache", "callbacks.model_checkpoint", "core.module", "plugins.precision.deepspeed",
         "profilers.pytorch", "strategies.deepspeed", "utilities.data", "utilities.model_summary.model_summary"),
    _not(INSIDE, "*", "utilities.testing", "utilities.argparse", "utilities.imports", "loggers.utilities",
         "plugins.io.wrapper", "tuner.batch_size_scaling", "tuner.lr_finder"),
    # other tools of Lightning's
    _not(DEMOS, "*", "demos"),
    _not("raylight trains, and serves nothing: Module.to_torchscript and to_onnx write a file that servers load", "*",
         "serve"),
)  # fmt: skip

STRATEGIES = {
    "deepspeed": DEEPSPEED, "fsdp": FSDP, "model_parallel": FSDP, "xla": TPU, "single_xla": TPU, "single_tpu": TPU,
    "tpu": TPU, "dp": 'strategy="ddp" takes its place: one worker for each device', "ddp2": 'use strategy="ddp"',
    "horovod": 'use strategy="ddp"', "bagua": 'use strategy="ddp"', "colossalai": FSDP, "fairscale": FSDP,
    "ddp_sharded": FSDP, "hpu": "raylight trains on GPUs and CPUs, not on HPUs",
    "ipu": "raylight trains on GPUs and CPUs, not on IPUs",
}  # fmt: skip
"""The beginnings of strings that Lightning's `strategy` takes, or took, and raylight's does not."""


def say_why_not(strategy: str) -> str | None:
    """The sentence for a string of Lightning's `strategy`; None if it is none of those."""
    fitting = [start for start in STRATEGIES if strategy == start or strategy.startswith(f"{start}_")]
    return STRATEGIES[max(fitting, key=len)] if fitting else None


class UnsupportedAttribute(InvalidArguments, AttributeError):
    """A name was read from a stand-in."""


class StandIn(type):
    """The kind of the classes that stand for refused names."""

    sentence: str

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, object]) -> StandIn:
        for base in bases:
            if isinstance(base, StandIn):
                raise InvalidArguments(base.say())
        return super().__new__(cls, name, bases, namespace)

    def __call__(cls, *args: object, **kwargs: object) -> Never:
        raise InvalidArguments(cls.say())

    def __getattr__(cls, name: str) -> Never:
        if name.startswith("__"):  # asked by Python itself
            raise AttributeError(name)
        raise UnsupportedAttribute(cls.say())

    def say(cls) -> str:
        """The reason, with the name."""
        return f"{cls.__name__} is not in raylight: {cls.sentence}"


def stand_in(name: str, module: str, sentence: str) -> StandIn:
    """A class of that name that can be imported and compared with, and nothing else."""
    return StandIn(name, (), {"__module__": module, "sentence": sentence, "__doc__": f"Not in raylight: {sentence}."})
