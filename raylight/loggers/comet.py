"""CometLogger: Comet, online or offline."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal

from raylight.contract.kinds import Value
from raylight.loggers.library import ServiceLogger, check_choice, rename, require
from raylight.loggers.parameters import to_mapping, to_numbers, to_plain

NEW_NAMES = {"experiment_name": "name", "project_name": "project", "save_dir": "offline_directory"}


class CometLogger(ServiceLogger):
    """Values and hyperparameters for Comet; the extra `comet`.

    `online=False` keeps everything in `offline_directory`, for `comet upload`. `experiment_key` and `mode` ("get",
    "create", "get_or_create") say which experiment is meant. Further arguments are those of
    `comet_ml.ExperimentConfig`, such as `name`.
    """

    def __init__(
        self,
        *,
        api_key: str | None = None,
        workspace: str | None = None,
        project: str | None = None,
        experiment_key: str | None = None,
        mode: Literal["get_or_create", "get", "create"] | None = None,
        online: bool | None = None,
        prefix: str | None = None,
        **kwargs: Value,
    ):
        require("CometLogger", "comet_ml", "comet")
        check_choice("CometLogger", "mode", mode, (None, "get_or_create", "get", "create"))
        rename("CometLogger", kwargs, NEW_NAMES, lambda text: warnings.warn(text, stacklevel=4))
        if "offline" in kwargs:
            warnings.warn("CometLogger: offline=... is now online=..., its opposite", stacklevel=2)
            offline = kwargs.pop("offline")
            online = not offline if online is None else online
        renamed = kwargs.pop("project", None)
        self._arguments: dict[str, Value] = {
            "api_key": api_key,
            "workspace": workspace,
            "project": project or renamed,
            "experiment_key": experiment_key,
            "mode": mode,
            "online": online,
        }
        self._prefix, self._options = prefix, kwargs

    @property
    def save_dir(self) -> str | None:
        """The folder of an offline experiment."""
        return self._options.get("offline_directory")

    @property
    def name(self) -> str | None:
        """The project."""
        project: str | None = self._arguments["project"]
        return self._experiment.project_name if project is None and self._experiment is not None else project

    @property
    def version(self) -> str | None:
        """The key of the experiment; None until it is opened, unless it was given."""
        key: str | None = self._arguments["experiment_key"]
        return self._experiment.get_key() if self._experiment is not None else key

    def _start(self) -> Value:
        import comet_ml

        config = comet_ml.ExperimentConfig(
            **{"auto_metric_logging": False, "auto_param_logging": False, **self._options}
        )
        experiment = comet_ml.start(**self._arguments, experiment_config=config)
        experiment.log_other("Created from", "raylight")
        return experiment

    def log_metrics(self, metrics: Mapping[str, Value], step: int | None = None) -> None:
        numbers = to_numbers("CometLogger", metrics, "")
        epoch = numbers.pop("epoch", None)
        self.experiment.log_metrics(
            numbers, prefix=self._prefix, step=step, epoch=None if epoch is None else int(epoch)
        )

    def log_hyperparams(self, params: Value, *args: Value, **kwargs: Value) -> None:
        self.experiment.log_parameters(to_plain(to_mapping(params)))

    def log_graph(self, model: Value, input_array: Value = None) -> None:
        self.experiment.set_model_graph(str(model))

    def save(self) -> None:
        if self._experiment is not None:
            self._experiment.flush()

    def finalize(self, status: str) -> None:
        """Sends what is held. The experiment stays open, for what is logged after the run, until the program ends."""
        self.save()
        if self._is_copy and self._experiment is not None:
            experiment, self._experiment = self._experiment, None
            experiment.end()
