"""cluster/grafana.json on a real run: Prometheus takes its values from Ray, and answers what the panels ask."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import Script, scripts_in

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(600)]

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana.json"
ARRIVAL_TIMEOUT_S = 120.0
"""Ray hands values on every ten seconds, and Prometheus asks for them as often."""

SCRIPT = """
import os, signal, socket, time

def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])

# As the files of cluster/ have it; and with ports that no other Ray of this machine has.
os.environ |= {
    "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 32, "RAY_USAGE_STATS_ENABLED": "0",
    "AUTOSCALER_METRIC_PORT": free_port(), "DASHBOARD_METRIC_PORT": free_port(),
}

import ray, torch
import raylight as pl

class Net(pl.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch):
        loss = self.layer(batch[0]).pow(2).mean()
        self.log("train_loss", loss)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        time.sleep(0.3)  # the run is to last long enough for a rate

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

ray.init(address="local", num_cpus=2, include_dashboard=True, log_to_driver=False)
print(ray._private.worker.global_worker.node.get_session_dir_path())
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(40, 2)), batch_size=2)
pl.fit(
    Net(), data, num_workers=2, use_gpu=False, max_epochs=1, log_every_n_steps=1, enable_progress_bar=False,
    enable_model_summary=False, storage_path="runs", name="watched", num_standby=0,
)
print("trained")
signal.pause()  # Ray serves the values for as long as this process lives
"""


class Prometheus:
    def __init__(self, config: Path, folder: Path):
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.url = f"http://127.0.0.1:{server.getsockname()[1]}"
        command = [
            "prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stderr=(folder.parent / "prometheus.log").open("w"))

    def ask(self, path: str, **arguments: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(arguments)}") as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, str]]:
        """The labels of the series that it gives now."""
        return [series["metric"] for series in self.ask("query", query=expression)["result"]]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """One that scrapes a local Ray with a run on it, by the configuration that Ray wrote for it."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs Debian's prometheus")
    folder = tmp_path_factory.mktemp("dashboard")
    with scripts_in(folder) as start:
        script = start(SCRIPT)
        session = Path(read(script))
        server = Prometheus(session / "metrics" / "prometheus" / "prometheus.yml", folder / "prometheus")
        try:
            assert read(script) == "trained"
            yield server
        finally:
            server.process.kill()
            server.process.wait()


def read(script: Script) -> str:
    line = script.read_line()
    if not line:
        script.process.kill()
        raise AssertionError(script.process.communicate()[1])
    return line


def panels() -> list[Any]:
    """(title, expression, legend) of all that the dashboard asks, for all runs."""
    asked = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            expression = target["expr"].replace("$run", ".*")
            assert "$" not in expression
            asked.append(pytest.param(expression, target["legendFormat"], id=f"{panel['title']} {target['refId']}"))
    return asked


@pytest.mark.parametrize(("expression", "legend"), panels())
def test_panel_shows_something(expression: str, legend: str, prometheus: Prometheus) -> None:
    if re.search("gpu|gram", expression) and not Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has no GPU")
    deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
    while not (found := prometheus.query(expression)):
        assert time.monotonic() < deadline, prometheus.ask("targets")
        time.sleep(0.5)
    labels = set(re.findall(r"{{(\w+)}}", legend))
    assert all(labels <= series.keys() for series in found), found


def test_runs_to_choose_from(prometheus: Prometheus) -> None:
    [variable] = [v for v in json.loads(DASHBOARD.read_text())["templating"]["list"] if v["name"] == "run"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
    assert prometheus.ask(f"label/{label}/values", **{"match[]": metric}) == ["watched"]
