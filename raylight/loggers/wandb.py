"""WandbLogger: Weights & Biases."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Literal

from raylight.contract.config import FilePath
from raylight.contract.errors import InvalidArguments
from raylight.contract.kinds import Value
from raylight.loggers.library import ServiceLogger, check_choice, require
from raylight.loggers.model_watch import STEP, watch_model
from raylight.loggers.parameters import to_mapping, to_numbers, to_plain
from raylight.loggers.uploads import LogModel, Upload, Uploads
from raylight.user.logger import on_worker


class WandbLogger(ServiceLogger):
    """Values, hyperparameters, media and checkpoints for Weights & Biases; the extra `wandb`.

    `name` is that of the run, `project` holds runs, `version` or `id` continues one. `offline=True` keeps everything
    below `save_dir`, for `wandb sync`. `log_model`: "all" uploads each checkpoint, True those that are kept at the end.
    Further arguments are those of `wandb.init`.
    """

    def __init__(
        self,
        name: str | None = None,
        save_dir: FilePath = ".",
        version: str | None = None,
        offline: bool = False,
        dir: FilePath | None = None,
        id: str | None = None,
        anonymous: bool | None = None,
        project: str | None = None,
        log_model: LogModel = False,
        experiment: Value = None,
        prefix: str = "",
        checkpoint_name: str | None = None,
        add_file_policy: Literal["mutable", "immutable"] = "mutable",
        **kwargs: Value,
    ):
        require("WandbLogger", "wandb", "wandb")
        check_choice("WandbLogger", "log_model", log_model, (True, False, "all"))
        if offline and log_model:
            raise InvalidArguments(
                f"WandbLogger: log_model={log_model!r} uploads, and offline=True does not; leave one of them out"
            )
        options = {
            "name": name,
            "project": project or os.environ.get("WANDB_PROJECT", "lightning_logs"),
            "dir": os.fspath(save_dir or dir or "."),
            "id": version or id,
            "resume": "allow",
            "mode": "offline" if offline else None,
            "anonymous": "allow" if anonymous else None,
            **kwargs,
        }
        self._wandb_init = {key: value for key, value in options.items() if value is not None}
        self._experiment = experiment
        self._prefix, self._checkpoint_name, self.add_file_policy = prefix, checkpoint_name, add_file_policy
        self._uploads = Uploads(log_model)

    # ---- names

    @property
    def save_dir(self) -> str | None:
        return self._wandb_init.get("dir")

    @property
    def name(self) -> str | None:
        """The project; the name of the run is `experiment.name`."""
        return self._wandb_init.get("project")

    @property
    def version(self) -> str | None:
        """The id of the run; None until it is opened, unless it was given."""
        return self._experiment.id if self._experiment is not None else self._wandb_init.get("id")

    # ---- the run

    def _start(self) -> Value:
        import wandb

        if wandb.run is not None:
            warnings.warn(
                "A W&B run is open in this process already, and WandbLogger goes on with it; call wandb.finish() "
                "before, to get another.",
                stacklevel=3,
            )
            return wandb.run
        os.makedirs(self._wandb_init["dir"], exist_ok=True)
        run = wandb.init(**self._wandb_init)
        if not self._wandb_init.get("sync_tensorboard"):
            run.define_metric(STEP)
            run.define_metric("*", step_metric=STEP, step_sync=True)
        return run

    def log_metrics(self, metrics: Mapping[str, Value], step: int | None = None) -> None:
        self._log(to_numbers("WandbLogger", metrics, self._prefix), step)

    def log_hyperparams(self, params: Value, *args: Value, **kwargs: Value) -> None:
        plain = {name: to_plain(value) for name, value in to_mapping(params).items()}
        self.experiment.config.update(plain, allow_val_change=True)

    def _log(self, values: Mapping[str, Value], step: int | None) -> None:
        if step is not None and not self._wandb_init.get("sync_tensorboard"):
            values = {**values, STEP: step}
        self.experiment.log(dict(values))

    def finalize(self, status: str) -> None:
        if self._experiment is None:
            return
        if status == "success":
            self._upload(self._uploads.take_rest())
        if self._is_copy:
            run, self._experiment = self._experiment, None
            run.finish(exit_code=0 if status == "success" else 1)

    # ---- media: made where they are logged

    @on_worker
    def log_table(
        self,
        key: str,
        columns: list[str | int] | None = None,
        data: list[list[Value]] | None = None,
        dataframe: Value = None,
        step: int | None = None,
    ) -> None:
        """A table of values or media, from `columns` and `data` or from a data frame."""
        import wandb

        _log_media(self, key, wandb.Table(columns=columns, data=data, dataframe=dataframe), step)

    @on_worker
    def log_text(
        self,
        key: str,
        columns: list[str | int] | None = None,
        data: list[list[str]] | None = None,
        dataframe: Value = None,
        step: int | None = None,
    ) -> None:
        """Texts as a table."""
        WandbLogger.log_table(self, key, columns, data, dataframe, step)

    @on_worker
    def log_image(self, key: str, images: list[Value], step: int | None = None, **kwargs: Value) -> None:
        """Tensors, arrays, images of PIL or paths; each further argument, as `caption`, is a list with one for each."""
        _log_list(self, "Image", key, images, step, kwargs)

    @on_worker
    def log_audio(self, key: str, audios: list[Value], step: int | None = None, **kwargs: Value) -> None:
        """Arrays or paths; `sample_rate` and others are lists with one for each."""
        _log_list(self, "Audio", key, audios, step, kwargs)

    @on_worker
    def log_video(self, key: str, videos: list[Value], step: int | None = None, **kwargs: Value) -> None:
        """Arrays or paths; `fps` and others are lists with one for each."""
        _log_list(self, "Video", key, videos, step, kwargs)

    @on_worker
    def watch(self, model: Value, log: str | None = "gradients", log_freq: int = 100, log_graph: bool = True) -> None:
        """Histograms of "gradients", "parameters" or "all" at every `log_freq`-th backward pass of rank 0. They are
        raylight's own, which travel to workers with the model; the graph is not drawn."""
        check_choice("WandbLogger.watch", "log", log, ("gradients", "parameters", "all", None))
        watch_model(model, log, log_freq, WandbLogger, self.experiment)

    # ---- artifacts

    def after_save_checkpoint(self, checkpoint_callback: Value) -> None:
        self._upload(self._uploads.take_saved(checkpoint_callback))

    def _upload(self, uploads: list[Upload]) -> None:
        import wandb

        for upload in uploads:
            self._checkpoint_name = self._checkpoint_name or f"model-{self.experiment.id}"
            artifact = wandb.Artifact(name=self._checkpoint_name, type="model", metadata=to_plain(upload.metadata))
            with upload.local() as path:
                if os.path.isdir(path):
                    artifact.add_dir(path, policy=self.add_file_policy)
                else:
                    artifact.add_file(path, name="model.ckpt", policy=self.add_file_policy)
                self.experiment.log_artifact(artifact, aliases=upload.aliases)

    @staticmethod
    @on_worker
    def download_artifact(
        artifact: str,
        save_dir: FilePath | None = None,
        artifact_type: str | None = None,
        use_artifact: bool | None = True,
    ) -> str:
        """Fetches an artifact from the server and returns its folder; the open run counts as its user."""
        import wandb

        if wandb.run is not None and use_artifact:
            found = wandb.run.use_artifact(artifact)
        else:
            found = wandb.Api().artifact(artifact, type=artifact_type)
        folder: str = found.download(root=None if save_dir is None else os.fspath(save_dir))
        return folder

    def use_artifact(self, artifact: str, artifact_type: str | None = None) -> Value:
        """Notes that the run uses an artifact, and returns it."""
        return self.experiment.use_artifact(artifact, type=artifact_type)


def _log_media(logger: WandbLogger, key: str, media: Value, step: int | None) -> None:
    logger.experiment.log({key: media} if step is None else {key: media, STEP: step})


def _log_list(
    logger: WandbLogger, kind: str, key: str, items: list[Value], step: int | None, options: Mapping[str, Value]
) -> None:
    import wandb

    if not isinstance(items, list):
        raise TypeError(f"{key!r}: a list is expected, and {type(items).__name__} was given")
    for name, values in options.items():
        if len(values) != len(items):
            raise ValueError(f"{key!r}: {name} has {len(values)} items for {len(items)}")
    make = getattr(wandb, kind)
    media = [make(item, **{name: values[at] for name, values in options.items()}) for at, item in enumerate(items)]
    _log_media(logger, key, media, step)
