"""Loggers, by Lightning's names. They run in the driver, on values that are merged over all ranks."""

from raylight.loggers.csv_logs import CSVLogger
from raylight.loggers.logger import DummyLogger, Logger
from raylight.loggers.tensorboard import TensorBoardLogger

__all__ = ["CSVLogger", "DummyLogger", "Logger", "TensorBoardLogger"]
