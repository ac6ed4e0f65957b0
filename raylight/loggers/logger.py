"""What a logger of one's own is made of, under Lightning's module name."""

from raylight.user.logger import DummyExperiment, DummyLogger, Logger, rank_zero_experiment

__all__ = ["DummyExperiment", "DummyLogger", "Logger", "rank_zero_experiment"]
