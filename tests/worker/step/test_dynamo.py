"""The compiler is loaded by what compiles, and shields the optimizers then as torch means it to."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys, torch
from raylight.worker.step.dynamo import postpone_dynamo
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


DDP_CODE = """
import sys, torch
from torch.nn.parallel import DistributedDataParallel
from raylight.worker.step.dynamo import default_compiler_settings, postpone_dynamo
postpone_dynamo()
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
with default_compiler_settings():
    net = DistributedDataParallel(torch.nn.Linear(2, 2))
assert "_dynamo" not in vars(torch)
net(torch.ones(1, 2)).sum().backward()
assert "torch._dynamo" not in sys.modules
import torch._dynamo
assert net._use_python_reducer == (torch._dynamo.utils.get_optimize_ddp_mode() == "python_reducer")
with default_compiler_settings():
    assert torch._dynamo is sys.modules["torch._dynamo"]
net(torch.ones(1, 2)).sum().backward()
method = DistributedDataParallel._inside_ddp_forward.__wrapped__.__wrapped__
shield = getattr(method, "__dynamo_disable")
assert shield._torchdynamo_disable and shield._torchdynamo_orig_callable is method
compiled = torch.compile(net, backend="eager")
assert torch.equal(compiled(torch.ones(1, 2)), net(torch.ones(1, 2)))
torch.distributed.destroy_process_group()
"""


def test_making_an_optimizer_does_not_load_the_compiler():
    run(CODE)


def test_making_a_ddp_and_its_forward_do_not_load_the_compiler():
    run(DDP_CODE)


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
