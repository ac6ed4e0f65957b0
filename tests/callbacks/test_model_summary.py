from __future__ import annotations

import pytest
import torch
from torch import nn

from raylight.callbacks import ModelSummary
from raylight.callbacks.model_summary import list_layers, summarize
from raylight.contract.errors import InvalidArguments


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 2)
        self.head.weight.requires_grad = False
        self.example_input_array = torch.ones(3, 4)

    def forward(self, x):
        return self.head(self.body(x))


def test_layers_down_to_a_depth():
    net = Net()
    assert [(layer.name, layer.kind, layer.num_parameters) for layer in list_layers(net, 1)] == [
        ("body", "Sequential", 56),
        ("head", "Linear", 18),
    ]
    assert [layer.name for layer in list_layers(net, -1)] == ["body", "body.0", "body.1", "body.2", "head"]
    assert list_layers(net, 0) == []


def test_shapes_come_from_a_pass_that_leaves_no_trace():
    net = Net().train()
    net.head.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    body, head = list_layers(net, 1)
    assert torch.rand(1) == expected
    assert (body.in_size, body.out_size, head.out_size) == ("[3, 4]", "[3, 8]", "[3, 2]")
    assert (body.mode, head.mode) == ("train", "eval")
    assert net.body.training
    assert not net.head.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not net.head._forward_hooks


@pytest.mark.parametrize("example", [{"x": torch.ones(3, 4)}, (torch.ones(3, 4),)])
def test_an_example_may_be_arguments_or_keywords(example):
    net = Net()
    net.example_input_array = example
    assert list_layers(net)[1].out_size == "[3, 2]"


def test_the_text_counts_what_is_shared_once():
    net = Net()
    net.again = net.head
    lines = summarize(net).splitlines()
    assert lines[0].split() == ["Name", "Type", "Params", "Mode", "In", "sizes", "Out", "sizes"]
    assert lines[2].split()[:4] == ["0", "body", "Sequential", "56"]
    assert [line.split()[0] for line in lines[-3:]] == ["58", "16", "0.000"]


def test_lazy_layers_do_not_know_yet():
    net = nn.Sequential(nn.LazyLinear(3))
    text = summarize(net)
    assert " ? " in text
    assert "not known yet" in text


def test_rank_0_tells_it_at_the_start_of_fit(make_rank):
    rank, other = make_rank(), make_rank(is_global_zero=False)
    ModelSummary(max_depth=2).on_fit_start(rank, Net())
    ModelSummary().on_fit_start(other, Net())
    ModelSummary(max_depth=0).on_fit_start(other, Net())
    assert "body.1" in rank.notices[0][0]
    assert other.notices == []
    with pytest.raises(InvalidArguments, match="max_depth=-2"):
        ModelSummary(max_depth=-2)
