"""Callbacks: ready-made code for the hooks of a run. Each is imported when it is first asked for."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raylight.callbacks.batch_size_finder import BatchSizeFinder
    from raylight.callbacks.checkpoint import Checkpoint
    from raylight.callbacks.device_stats_monitor import DeviceStatsMonitor
    from raylight.callbacks.early_stopping import EarlyStopping, EarlyStoppingReason
    from raylight.callbacks.finetuning import BackboneFinetuning, BaseFinetuning
    from raylight.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
    from raylight.callbacks.lambda_callback import LambdaCallback
    from raylight.callbacks.learning_rate_finder import LearningRateFinder
    from raylight.callbacks.learning_rate_monitor import LearningRateMonitor
    from raylight.callbacks.model_checkpoint import ModelCheckpoint
    from raylight.callbacks.model_pruning import ModelPruning
    from raylight.callbacks.model_summary import ModelSummary, RichModelSummary
    from raylight.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
    from raylight.callbacks.prediction_writer import BasePredictionWriter
    from raylight.callbacks.progress_bar import ProgressBar, RichProgressBar, TQDMProgressBar
    from raylight.callbacks.spike_detection import SpikeDetection
    from raylight.callbacks.stochastic_weight_averaging import StochasticWeightAveraging
    from raylight.callbacks.throughput_monitor import ThroughputMonitor
    from raylight.callbacks.timer import Timer
    from raylight.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging
    from raylight.user.callback import Callback

_FILES = {
    "BackboneFinetuning": "finetuning",
    "BaseFinetuning": "finetuning",
    "BasePredictionWriter": "prediction_writer",
    "BatchSizeFinder": "batch_size_finder",
    "Checkpoint": "checkpoint",
    "DeviceStatsMonitor": "device_stats_monitor",
    "EMAWeightAveraging": "weight_averaging",
    "EarlyStopping": "early_stopping",
    "EarlyStoppingReason": "early_stopping",
    "GradientAccumulationScheduler": "gradient_accumulation_scheduler",
    "LambdaCallback": "lambda_callback",
    "LearningRateFinder": "learning_rate_finder",
    "LearningRateMonitor": "learning_rate_monitor",
    "ModelCheckpoint": "model_checkpoint",
    "ModelPruning": "model_pruning",
    "ModelSummary": "model_summary",
    "OnExceptionCheckpoint": "on_exception_checkpoint",
    "ProgressBar": "progress_bar",
    "RichModelSummary": "model_summary",
    "RichProgressBar": "progress_bar",
    "SpikeDetection": "spike_detection",
    "StochasticWeightAveraging": "stochastic_weight_averaging",
    "TQDMProgressBar": "progress_bar",
    "ThroughputMonitor": "throughput_monitor",
    "Timer": "timer",
    "WeightAveraging": "weight_averaging",
}

__all__ = [
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "BatchSizeFinder",
    "Callback",
    "Checkpoint",
    "DeviceStatsMonitor",
    "EMAWeightAveraging",
    "EarlyStopping",
    "EarlyStoppingReason",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelPruning",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "ProgressBar",
    "RichModelSummary",
    "RichProgressBar",
    "SpikeDetection",
    "StochasticWeightAveraging",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
    "WeightAveraging",
]


def __getattr__(name: str) -> type:
    if name == "Callback":
        from raylight.user.callback import Callback

        return Callback
    if name in _FILES:
        return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    near = difflib.get_close_matches(name, __all__, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise AttributeError(f"raylight has no callback {name!r}.{hint} There are: {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted(__all__)
