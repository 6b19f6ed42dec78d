"""2:4 layers are converted only where a measurement shows that this is faster."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ressa.checkpoints import semi_structured
from ressa.checkpoints.semi_structured import (
    accelerate_24,
    convert_where_faster,
    measured_gain,
)
from ressa.pruning.scores import magnitude


def linear_24(width_in, width_out):
    layer = nn.Linear(width_in, width_out)
    layer.weight.data = magnitude(layer.weight.data, pattern="2:4")
    return layer


def test_gain_is_a_ratio_of_times_of_all_tokens(monkeypatch):
    shapes, linear = [], semi_structured.F.linear

    def watched(x, weight):
        shapes.append(tuple(x.shape))
        return linear(x, weight)

    clock = iter(range(10**4))
    monkeypatch.setattr(semi_structured.F, "linear", watched)
    monkeypatch.setattr(semi_structured.time, "perf_counter", lambda: next(clock))
    assert measured_gain(torch.randn(8, 6), torch.clone, tokens=5, rounds=3) == 1
    assert set(shapes) == {(5, 6)} and len(shapes) == 8


def test_conversion_only_where_it_wins(monkeypatch):
    gains = {(8, 1): 2.0, (8, 9): 3.0, (12, 1): 2.0, (12, 9): 0.9}

    def stored_gain(weight, convert, tokens, rounds):
        return gains[weight.shape[1], tokens]

    monkeypatch.setattr(semi_structured, "measured_gain", stored_gain)
    warnings.filterwarnings("ignore", message="Sparse CSR")
    model = nn.Sequential(linear_24(8, 12), linear_24(12, 4), nn.Linear(4, 4))
    x = torch.randn(5, 8)
    before = model(x)
    found = convert_where_faster(model, torch.Tensor.to_sparse_csr, (1, 9), 3)
    assert found == {"0": {1: 2.0, 9: 3.0}, "1": {1: 2.0, 9: 0.9}}
    layouts = [layer.weight.layout for layer in model]
    assert layouts == [torch.sparse_csr, torch.strided, torch.strided]
    assert torch.allclose(model(x), before, atol=1e-6)


def test_a_layer_that_cannot_be_converted_says_why():
    def refuse(weight):
        raise RuntimeError("only 64 by 64 and more")

    layer = linear_24(8, 8)
    found = convert_where_faster(nn.Sequential(layer), refuse, (1,), 3)
    assert found == {"0": "only 64 by 64 and more"}
    assert layer.weight.layout == torch.strided


def test_wrong_counts_are_refused():
    layer = linear_24(8, 8)
    with pytest.raises(ValueError, match="tokens must be 1 or more, not \\[\\]"):
        convert_where_faster(layer, torch.clone, tokens=())
    with pytest.raises(ValueError, match="tokens must be 1 or more, not \\[4, 0\\]"):
        convert_where_faster(layer, torch.clone, tokens=(4, 0))
    with pytest.raises(ValueError, match="rounds must be 1 or more, not 0"):
        convert_where_faster(layer, torch.clone, rounds=0)
    with pytest.raises(ValueError, match="weight must be a matrix"):
        measured_gain(torch.ones(8), torch.clone, tokens=1)


def test_a_cpu_is_refused():
    with pytest.raises(ValueError, match="the model is on cpu"):
        accelerate_24(nn.Linear(8, 8))


def test_an_old_gpu_is_refused(monkeypatch):
    weight = SimpleNamespace(device=torch.device("cuda", 0))
    model = SimpleNamespace(parameters=lambda: iter([weight]))
    monkeypatch.setattr(
        semi_structured, "convert_where_faster", lambda *args: "converted"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="8.0 or more; the model is on cuda:0"):
        accelerate_24(model)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert accelerate_24(model) == "converted"
