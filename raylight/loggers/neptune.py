"""NeptuneLogger: Neptune's client, which can still keep runs offline; its service has been shut down."""

from __future__ import annotations

import os
from collections.abc import Mapping

from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Value
from raylight.loggers.library import ServiceLogger, require
from raylight.loggers.parameters import flatten, to_numbers, to_plain
from raylight.loggers.uploads import Upload, Uploads


class NeptuneLogger(ServiceLogger):
    """Values, hyperparameters and checkpoints for Neptune's client 1; the extra `neptune`.

    The arguments are those of Lightning 2.5, since 2.6 refuses to make one. Values go below `prefix`. `run` is an open
    run of `neptune.init_run`; otherwise one is opened with the further arguments, such as `mode="offline"`.
    """

    def __init__(
        self,
        *,
        api_key: str | None = None,
        project: str | None = None,
        name: str | None = None,
        run: Value = None,
        log_model_checkpoints: bool = True,
        prefix: str = "training",
        **neptune_run_kwargs: Value,
    ):
        require("NeptuneLogger", "neptune", "neptune")
        given = {"api_key": api_key, "project": project, "name": name, **neptune_run_kwargs}
        both = [key for key, value in given.items() if value is not None]
        if run is not None and both:
            raise InvalidArguments(f"NeptuneLogger: run is open already, so leave out {', '.join(both)}")
        options = {"api_token": api_key, "project": project, "name": name, **neptune_run_kwargs}
        self._options = {key: value for key, value in options.items() if value is not None}
        self._experiment, self._prefix = run, prefix
        self._uploads = Uploads("all" if log_model_checkpoints else False)

    @property
    def run(self) -> Value:
        """The same as `experiment`."""
        return self.experiment

    @property
    def save_dir(self) -> str:
        return os.path.join(os.getcwd(), ".neptune")

    @property
    def name(self) -> str | None:
        return self._options.get("name")

    @property
    def version(self) -> str | None:
        """The id of the run; None until it is opened."""
        return getattr(self._experiment, "_sys_id", None) if self._experiment is not None else None

    def _start(self) -> Value:
        import neptune

        return neptune.init_run(**self._options)

    def _place(self, *parts: str) -> str:
        return "/".join(part for part in (self._prefix, *parts) if part)

    def log_metrics(self, metrics: Mapping[str, Value], step: int | None = None) -> None:
        for name, value in to_numbers("NeptuneLogger", metrics, self._prefix, "/").items():
            self.experiment[name].append(value, step=step)

    def log_hyperparams(self, params: Value, *args: Value, **kwargs: Value) -> None:
        for name, value in flatten(params).items():
            plain = to_plain(value)
            known = value is not None and type(plain) in (bool, int, float, str)
            self.experiment[self._place("hyperparams", name)] = plain if known else str(plain)

    def log_graph(self, model: Value, input_array: Value = None) -> None:
        self.log_model_summary(model)

    def log_model_summary(self, model: Value, max_depth: int = -1) -> None:
        """The layers of the module as a text; `max_depth` has no effect."""
        from neptune.types import File

        self.experiment[self._place("model/summary")] = File.from_content(str(model), extension="txt")

    def save(self) -> None:
        if self._experiment is not None:
            self._experiment.wait()

    def finalize(self, status: str) -> None:
        if self._experiment is None:
            return
        self._upload(self._uploads.take_rest())
        self.experiment[self._place("status")] = status
        if self._is_copy:
            run, self._experiment = self._experiment, None
            run.stop()

    def after_save_checkpoint(self, checkpoint_callback: Value) -> None:
        self._upload(self._uploads.take_saved(checkpoint_callback))
        if self._uploads.log_model and checkpoint_callback.best_model_path:
            self.experiment[self._place("model/best_model_path")] = checkpoint_callback.best_model_path
            score = checkpoint_callback.best_model_score
            if score is not None:
                self.experiment[self._place("model/best_model_score")] = float(score)

    def _upload(self, uploads: list[Upload]) -> None:
        for upload in uploads:
            with upload.local() as path:
                place = self.experiment[self._place("model/checkpoints", upload.name)]
                if os.path.isdir(path):
                    place.upload_files(os.path.join(path, "*"), wait=True)
                else:
                    place.upload(path, wait=True)
