"""`raylight doctor FILE`: which lines of a Lightning script need attention."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylight import command as cli
from raylight.contract.errors import InvalidArguments
from raylight.lightning.script import examine_script

SCRIPT = """\
import torch
import pytorch_lightning as pl
import lightning as L
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from pytorch_lightning.callbacks import EarlyStopping, ModelChekpoint
from pytorch_lightning.utilities.types import STEP_OUTPUT as OUT
from lightning.fabric import Fabric
import pytorch_lightning.loops.fit_loop


class Net(pl.LightningModule):
    def training_step(self, batch, batch_idx, optimizer_idx):
        return self.trainer.init_module

    def training_step_end(self, outputs):
        return outputs

    def print(self, optimizer):
        pass


class Other:
    def training_step_end(self, optimizer_idx):
        pass


trainer = pl.Trainer(gpus=2, strategy="deepspeed_stage_2", precision=17, terminate_on_nan=True, max_epochs=torch.e)
runner = L.Trainer(max_epoch=3, profiler=None, **{})
runner.received_sigterm
other = Trainer(True, ckpt_path="last", strategy="ddp")
pl.plugins.BitsandbytesPrecision("nf4")
L.pytorch.seed_everything(1)
pl.seed_evrything(1)
torch.init_module
"""


def findings(tmp_path: Path, text: str) -> dict[int, list[tuple[str, str]]]:
    path = tmp_path / "train.py"
    path.write_text(text)
    found: dict[int, list[tuple[str, str]]] = {}
    for finding in examine_script(path):
        found.setdefault(finding.line, []).append((finding.state, finding.text))
    return found


def test_each_line_that_needs_attention_is_named(tmp_path: Path):
    found = findings(tmp_path, SCRIPT)
    bad = {line: " ".join(text for state, text in told if state == "bad") for line, told in found.items()}
    bad = {line: text for line, text in bad.items() if text}
    expected = {
        5: "DeepSpeedStrategy is not in raylight: raylight does not use DeepSpeed",
        6: "no callback 'ModelChekpoint'. Did you mean ModelCheckpoint?",
        8: "lightning.fabric: raylight has no Fabric",
        9: "fit_loop is not in raylight: the loop cannot be replaced",
        13: "optimizer_idx",
        14: "trainer.init_module is not in raylight: build large modules in configure_model",
        16: "training_step_end is a hook of an older version, and never called",
        28: "strategy='deepspeed_stage_2' is not taken: raylight does not use DeepSpeed",
        29: "max_epoch is not an argument of the trainer; did you mean max_epochs?",
        30: "trainer.received_sigterm is not in raylight: trainer.interrupted",
        31: "ckpt_path is not an argument of the trainer: it goes to trainer.fit",
        32: "BitsandbytesPrecision is not in raylight: raylight does not quantise",
        34: "no attribute 'seed_evrything'",
    }
    assert bad.keys() == expected.keys()
    for line, text in expected.items():
        assert text in bad[line], line
    assert "precision=17 is not taken; it must be one of" in bad[28]
    assert "terminate_on_nan is not an argument of raylight's trainer: use detect_anomaly" in bad[28]
    assert "takes its arguments by name" in bad[31]


def test_each_import_is_written_out_as_it_will_be(tmp_path: Path):
    found = findings(tmp_path, SCRIPT + "import lightning.pytorch as plt\nfrom lightning import pytorch as p\n")
    told = {line: text for line, all_of in found.items() for state, text in all_of if state == "ok"}
    assert told == {
        2: "write: import raylight as pl",
        3: "write: import raylight as L",
        4: "write: from raylight import LightningModule, Trainer",
        5: "write: from raylight.strategies import DDPStrategy, DeepSpeedStrategy",
        6: "write: from raylight.callbacks import EarlyStopping, ModelChekpoint",
        7: "write: from raylight.utilities.types import STEP_OUTPUT as OUT",
        9: (
            "write: import raylight.loops.fit_loop, and raylight.loops.fit_loop for pytorch_lightning.loops.fit_loop "
            "in the lines below"
        ),
        36: "write: import raylight as plt",
        37: "write: import raylight as p",
    }


def test_a_script_that_is_moved_already_has_nothing_to_change(tmp_path: Path):
    text = "import raylight as pl\nfrom raylight.utilities import rank_zero_only\npl.Trainer(max_epochs=3)\n"
    assert findings(tmp_path, text) == {}
    assert findings(tmp_path, "import raylight as pl\npl.Trainer(max_epochs='x')\n")[2][0][0] == "bad"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text("from pytorch_lightning import Trainer\n")
    bad.write_text("\nfrom pytorch_lightning.accelerators import XLAAccelerator\n")
    assert cli.main(["doctor", str(good)]) == 0
    assert "write: from raylight import Trainer" in capsys.readouterr().out
    assert cli.main(["doctor", str(good), str(bad)]) == 1
    told = capsys.readouterr().out
    assert f"{bad}:2" in told
    assert "XLAAccelerator is not in raylight: raylight trains on GPUs and CPUs" in told
    bad.write_text("import (")
    assert cli.main(["doctor", str(bad)]) == 1
    assert "cannot be read as a Python script" in capsys.readouterr().err
    with pytest.raises(InvalidArguments, match="cannot be read"):
        examine_script(tmp_path / "nowhere.py")
    good.write_text("import os\n")
    assert cli.main(["doctor", str(good)]) == 0
    assert "uses nothing of Lightning's" in capsys.readouterr().out
