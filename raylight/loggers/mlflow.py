"""MLFlowLogger: MLflow, on a local store or a tracking server."""

from __future__ import annotations

import atexit
import os
import re
import socket
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from raylight.contract.config import FilePath
from raylight.contract.kinds import Value
from raylight.loggers.library import ServiceLogger, check_choice, require
from raylight.loggers.parameters import flatten, to_numbers, to_plain, to_yaml
from raylight.loggers.uploads import LogModel, Upload, Uploads
from raylight.storage.row_writer import RowWriter

SEND_EVERY_S = 1.0
CONNECT_TIMEOUT_S = 5.0
MAX_METRICS, MAX_PARAMS = 1000, 100
"""Of one request, as MLflow's server takes them."""


class MLFlowLogger(ServiceLogger):
    """Values, hyperparameters and checkpoints for MLflow; the extra `mlflow`.

    Without `tracking_uri` (or MLFLOW_TRACKING_URI) runs are kept in files below `save_dir`. `run_id` goes on with a
    run. Values are sent once a second from a thread, so that a slow server does not hold training up, unless
    `synchronous=True`. `log_model`: "all" uploads each checkpoint, True those that are kept at the end.
    """

    _live = ("_experiment", "_rows")

    def __init__(
        self,
        experiment_name: str = "lightning_logs",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: dict[str, Value] | None = None,
        save_dir: FilePath | None = "./mlruns",
        log_model: LogModel = False,
        prefix: str = "",
        artifact_location: str | None = None,
        run_id: str | None = None,
        synchronous: bool | None = None,
    ):
        require("MLFlowLogger", "mlflow", "mlflow")
        check_choice("MLFlowLogger", "log_model", log_model, (True, False, "all"))
        self._tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"file:{save_dir or './mlruns'}"
        self._experiment_name, self._run_name, self._artifact_location = experiment_name, run_name, artifact_location
        self.tags, self._prefix, self._synchronous = tags, prefix, synchronous
        self._given_run_id = self._run_id = run_id
        self._experiment_id: str | None = None
        self._uploads = Uploads(log_model)
        self._rows: RowWriter[Value] | None = None
        self._told: set[str] = set()

    # ---- names

    @property
    def experiment_id(self) -> str | None:
        """Opens the run."""
        _ = self.experiment
        return self._experiment_id

    @property
    def run_id(self) -> str | None:
        """Opens the run."""
        _ = self.experiment
        return self._run_id

    name = experiment_id
    version = run_id

    @property
    def save_dir(self) -> str | None:
        """None for a server."""
        is_file = self._tracking_uri.startswith("file:")
        return self._tracking_uri.removeprefix("file:").removeprefix("//") if is_file else None

    # ---- the run

    def _start(self) -> Value:
        """An MlflowClient with an open run."""
        if self._tracking_uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 asks whether files are meant
        _check_reachable(self._tracking_uri)
        import mlflow
        from mlflow.tracking import MlflowClient

        mlflow.set_tracking_uri(self._tracking_uri)
        client = MlflowClient(self._tracking_uri)
        if self._run_id is not None:
            self._experiment_id = client.get_run(self._run_id).info.experiment_id
            return client
        found = client.get_experiment_by_name(self._experiment_name)
        if found is not None and found.lifecycle_stage != "deleted":
            self._experiment_id = found.experiment_id
        else:
            self._experiment_id = client.create_experiment(self._experiment_name, self._artifact_location)
        self._run_id = client.create_run(self._experiment_id, tags=self._resolve_tags()).info.run_id
        return client

    def _resolve_tags(self) -> dict[str, Value]:
        from mlflow.tracking.context.registry import resolve_tags
        from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

        if self._run_name is not None:
            self.tags = {**(self.tags or {}), MLFLOW_RUN_NAME: self._run_name}
        tags: dict[str, Value] = resolve_tags(self.tags)
        return tags

    def _reach(self) -> Value:
        """The client. Raises at once if its server is away, for which MLflow itself would wait four minutes."""
        _check_reachable(self._tracking_uri)
        return self.experiment

    def log_metrics(self, metrics: Mapping[str, Value], step: int | None = None) -> None:
        from mlflow.entities import Metric

        moment = int(time.time() * 1000)
        numbers = to_numbers("MLFlowLogger", metrics, self._prefix)
        found = [Metric(self._clean(name), value, moment, step or 0) for name, value in numbers.items()]
        if self._synchronous:
            self._send(found)
            return
        if self._rows is None:
            self._rows = RowWriter("MLflow's values", self._send, lambda: None, SEND_EVERY_S)
            atexit.register(self.save)
        for metric in found:
            self._rows.add(metric)

    def _send(self, metrics: list[Value]) -> None:
        client = self._reach()
        for at in range(0, len(metrics), MAX_METRICS):
            client.log_batch(self.run_id, metrics=metrics[at : at + MAX_METRICS])

    def _clean(self, name: str) -> str:
        """A name that MLflow takes."""
        clean = re.sub(r"[^\w/. :-]", "_", name, flags=re.ASCII)
        if clean != name and name not in self._told:
            self._told.add(name)
            allowed = "which takes letters, digits and _-./: alone"
            warnings.warn(f"MLFlowLogger: {name!r} is called {clean!r} in MLflow, {allowed}", stacklevel=4)
        return clean

    def log_hyperparams(self, params: Value, *args: Value, **kwargs: Value) -> None:
        from mlflow.entities import Param
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

        found = [Param(name, str(value)[:MAX_PARAM_VAL_LENGTH]) for name, value in flatten(params).items()]
        client = self._reach()
        for at in range(0, len(found), MAX_PARAMS):
            client.log_batch(self.run_id, params=found[at : at + MAX_PARAMS])

    def save(self) -> None:
        """Returns once all values so far are in the store."""
        if self._rows is not None:
            self._rows.flush()

    def finalize(self, status: str = "success") -> None:
        rows, self._rows = self._rows, None
        atexit.unregister(self.save)
        if rows is not None:
            rows.close()
        if self._experiment is None:
            return
        self._upload(self._uploads.take_rest())
        self._reach().set_terminated(self.run_id, "FAILED" if status == "failed" else "FINISHED")

    # ---- checkpoints

    def after_save_checkpoint(self, checkpoint_callback: Value) -> None:
        self._upload(self._uploads.take_saved(checkpoint_callback))

    def _upload(self, uploads: list[Upload]) -> None:
        """Each below its name, beside what is known of it."""
        for upload in uploads:
            place = Path(upload.name).stem if upload.name.endswith(".ckpt") else upload.name
            with upload.local() as path, tempfile.TemporaryDirectory() as folder:
                Path(folder, "metadata.yaml").write_bytes(to_yaml(to_plain(upload.metadata)))
                Path(folder, "aliases.txt").write_text(str(upload.aliases))
                log = self.experiment.log_artifacts if os.path.isdir(path) else self.experiment.log_artifact
                log(self.run_id, path, place)
                self.experiment.log_artifacts(self.run_id, folder, place)

    def __getstate__(self) -> dict[str, Value]:
        return super().__getstate__() | {"_run_id": self._given_run_id}


def _check_reachable(uri: str) -> None:
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        return
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname):
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConnectionError(f"MLflow's server at {uri} cannot be reached: {error}") from error
