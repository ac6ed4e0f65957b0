"""What a run stores and prints holds no secret, wherever one came in."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

from raylight.storage.filesystem import Storage
from tests.faults_storage import BUCKET, CREDENTIALS, uri_at

SECRET = "hunter2-5e1f"

SCRIPT = f"""
import os, sys
import torch
import raylight as pl
from raylight.loggers import CSVLogger, TensorBoardLogger

class Net(pl.Module):
    def __init__(self, api_key, service, width=3):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch):
        loss = self.layer(batch[0]).sum()
        self.log("loss", loss)
        return loss

    def on_fit_start(self):
        self.logger.log_hyperparams({{"wandb_token": "{SECRET}", "depth": 2}})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 2)), batch_size=2)
service = {{"url": "https://me:{SECRET}@example.org/x?access_key={SECRET}", "password": "{SECRET}"}}
result = pl.fit(
    Net("{SECRET}", service), data, num_workers=0, max_epochs=1, storage_path=sys.argv[1], name="safe",
    log_every_n_steps=1, logger=[TensorBoardLogger(), CSVLogger()],
    checkpoint=pl.Checkpointing(save_weights_only=True),
)
print(result.path, result.last_checkpoint.path, result)
try:
    pl.fit(Net("{SECRET}", service), data, num_workers=0, storage_path="s4://me:{SECRET}@bucket/x")
except pl.InvalidArguments as error:
    print(error)
"""


def test_secrets_are_in_nothing_that_a_run_stores_or_prints(s3_port: int, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    plain = uri_at(s3_port, uuid.uuid4().hex)
    place = plain.replace(f"s3://{BUCKET}", f"s3://{CREDENTIALS['AWS_ACCESS_KEY_ID']}:{SECRET}@{BUCKET}")
    assert place != plain
    options = ["--api-key", SECRET, f"--db-password={SECRET}", f"HF_TOKEN={SECRET}"]
    command = [sys.executable, "script.py", place, *options]
    # The server takes any key.
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    version = Storage(plain).child("safe", "version_0")
    stored = [entry.name for entry in version.walk()]
    assert "run.json" in stored
    assert any("events.out" in name for name in stored)
    assert any(name.endswith(".csv") for name in stored), stored
    # Weights are loaded again into the class with the values that it had, so these are in the checkpoint.
    found = [name for name in stored if SECRET.encode() in version.read_bytes(name) and not name.endswith("module.pt")]
    assert found == []
    record = version.read_bytes("run.json").decode()
    assert record.count("***") >= 7
    assert '"width": 3' in record
    assert '"depth": 2' in record
