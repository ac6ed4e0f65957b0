from __future__ import annotations

import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from raylight.launch import handover, shared_memory

BIG = handover.MIN_BUFFER_BYTES


def through(value: Any) -> Any:
    """There and back within this process, by way of a segment as a worker would have it."""
    payload, buffers = handover.dump(value)
    if not buffers:
        return handover.load(payload, [])
    segment = shared_memory.Segment(buffers)
    try:
        return handover.load(payload, shared_memory.map_segment(segment.address))
    finally:
        segment.close()


@pytest.mark.parametrize("num_elements", [0, 1, 1000, BIG // 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_values_arrive(num_elements: int, dtype: torch.dtype):
    tensor = (torch.arange(num_elements) % 7).to(dtype)
    arrived = through({"x": tensor})["x"]
    assert arrived.dtype is dtype
    assert torch.equal(arrived, tensor)


def test_small_values_need_no_buffer():
    _, buffers = handover.dump([nn.Linear(10, 10), torch.ones(10), np.ones(10)])
    assert buffers == []


def test_large_values_are_buffers_over_their_own_memory():
    tensor, array = torch.zeros(BIG), np.zeros(BIG)
    payload, buffers = handover.dump([tensor, array])
    assert len(payload) < 2000
    assert [buffer.nbytes for buffer in buffers] == [BIG * 4, BIG * 8]
    tensor[0], array[0] = 1.0, 1.0
    assert [any(buffer[:8]) for buffer in buffers] == [True, True]


@pytest.mark.parametrize("size", [8, BIG])
def test_views_and_tied_parameters_stay_tied(size: int):
    whole = torch.zeros(size)
    encoder, decoder = nn.Linear(size, 1, bias=False), nn.Linear(size, 1, bias=False)
    decoder.weight = encoder.weight
    payload, buffers = handover.dump([whole, whole[2:5], whole.view(2, -1).T, encoder, decoder])
    assert len(buffers) == (2 if size == BIG else 0)
    whole, part, transposed, encoder, decoder = handover.load(payload, [bytearray(buffer) for buffer in buffers])
    whole[2] = 7.0
    assert part[0] == 7.0
    assert transposed[2, 0] == 7.0
    assert transposed.stride() == (1, size // 2)
    assert decoder.weight is encoder.weight


def test_parameters_have_memory_of_their_own_and_can_be_resized():
    arrived = through(nn.Linear(BIG, 1))
    assert isinstance(arrived.weight, nn.Parameter)
    assert arrived.weight.requires_grad
    arrived.weight.untyped_storage().resize_(0)


def test_the_callers_own_tensors_stay_resizable():
    tensor = torch.ones(BIG)
    handover.dump(tensor)
    tensor.untyped_storage().resize_(0)


def test_everything_about_a_tensor_arrives():
    parameter = nn.Parameter(torch.ones(3), requires_grad=False)
    parameter.label = "frozen"
    leaf = torch.ones(2, requires_grad=True)
    arrived_parameter, arrived_leaf = through([parameter, leaf])
    assert arrived_parameter.label == "frozen"
    assert not arrived_parameter.requires_grad
    assert arrived_leaf.requires_grad
    assert type(arrived_leaf) is torch.Tensor


def test_tensors_that_are_more_than_bytes_go_torchs_way():
    sparse = torch.eye(3).to_sparse()
    conjugate = torch.tensor([1 + 2j]).conj()
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    meta = torch.empty(3, device="meta")
    arrived = through([sparse, conjugate, quantized, meta])
    assert torch.equal(arrived[0].to_dense(), sparse.to_dense())
    assert torch.equal(arrived[1], conjugate)
    assert torch.equal(arrived[2].dequantize(), quantized.dequantize())
    assert arrived[3].device.type == "meta"


def test_nothing_is_lost_where_buffers_cannot_be_written_to():
    tensor, array = torch.arange(float(BIG)), np.arange(float(BIG))
    payload, buffers = handover.dump([tensor, array])
    arrived_tensor, arrived_array = handover.load(payload, [bytes(buffer) for buffer in buffers])
    arrived_tensor[0] = 5.0
    assert torch.equal(arrived_tensor[1:], tensor[1:])
    assert np.array_equal(arrived_array, array)


def test_writes_into_what_arrived_stay_there():
    data = TensorDataset(torch.zeros(BIG))
    payload, buffers = handover.dump(data)
    segment = shared_memory.Segment(buffers)
    first, second = (handover.load(payload, shared_memory.map_segment(segment.address)) for _ in range(2))
    segment.close()
    first.tensors[0][0] = 1.0
    assert second.tensors[0][0] == 0.0
    assert data.tensors[0][0] == 0.0


def test_a_missing_module_says_what_to_do():
    payload = b"cno_such_module_here\nThing\n."
    with pytest.raises(ModuleNotFoundError, match="Install it on every node") as caught:
        handover.load(payload, [])
    assert caught.value.name == "no_such_module_here"


def test_classes_of_a_script_go_along(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "from raylight.launch import handover\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x): return SCALE * x\n"
        "SCALE = 3\n"
        "sys.stdout.buffer.write(handover.dump(Net())[0])\n"
    )
    payload = subprocess.run([sys.executable, str(script)], check=True, capture_output=True).stdout
    assert handover.load(payload, [])(2) == 6


def test_code_keeps_its_file_name_for_tracebacks():
    def outer():
        return lambda: 1

    code = handover.load(*handover.dump(outer)).__code__
    inner = next(constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    assert code.co_filename == inner.co_filename == __file__
