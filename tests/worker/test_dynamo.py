"""The compiler is loaded by what compiles, and shields the optimizers then as torch means it to."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys, torch
from raylight.worker.dynamo import postpone_dynamo
postpone_dynamo()
parameter = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.Adam([parameter], lr=0.1)
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules
import torch._dynamo
optimizer.zero_grad()
method = torch.optim.Optimizer.zero_grad.__wrapped__
shield = getattr(method, "__dynamo_disable")
assert shield.__module__.startswith("torch._dynamo"), shield
assert getattr(shield, "_torchdynamo_disable", False)
parameter.sum().backward()
optimizer.step()
"""


def test_making_an_optimizer_does_not_load_the_compiler():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
