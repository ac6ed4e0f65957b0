"""Loggers, by Lightning's names. They run in the driver, on values that are merged over all ranks."""

from raylight.loggers.comet import CometLogger
from raylight.loggers.csv_logs import CSVLogger
from raylight.loggers.logger import DummyLogger, Logger
from raylight.loggers.mlflow import MLFlowLogger
from raylight.loggers.neptune import NeptuneLogger
from raylight.loggers.tensorboard import TensorBoardLogger
from raylight.loggers.wandb import WandbLogger

__all__ = [
    "CSVLogger",
    "CometLogger",
    "DummyLogger",
    "Logger",
    "MLFlowLogger",
    "NeptuneLogger",
    "TensorBoardLogger",
    "WandbLogger",
]
