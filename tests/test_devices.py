"""Names of devices and number formats, and what a step costs."""

import time

import pytest
import torch
from torch import nn

from ressa import devices
from ressa.devices import (
    DTYPES,
    available_bytes,
    copies_fit,
    cost_of,
    is_first_process,
    kept_bytes,
    pick_device,
    pick_dtype,
    to_device,
    training_bytes,
)


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_auto_takes_the_first_that_is_there(monkeypatch, no_accelerator):
    assert pick_device() == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device() == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device() == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")


def test_a_device_is_taken_as_it_is():
    assert pick_device(torch.device("cpu")) == torch.device("cpu")


def test_devices_that_are_not_there_are_refused(no_accelerator):
    with pytest.raises(ValueError, match="'abacus' is unknown: use auto"):
        pick_device("abacus")
    with pytest.raises(ValueError, match="'cuda:0' needs a CUDA GPU"):
        pick_device("cuda:0")


@pytest.mark.parametrize("name", DTYPES)
def test_formats_by_name_and_by_type(name):
    assert pick_dtype(name) is getattr(torch, name)
    assert pick_dtype(getattr(torch, name)) is getattr(torch, name)


@pytest.mark.parametrize("dtype", ["int3", "float64", torch.int8, None, 16])
def test_other_formats_are_refused(dtype):
    with pytest.raises(ValueError, match="dtype must be auto or one of float32"):
        pick_dtype(dtype)


def test_auto_stays_auto():
    assert pick_dtype() == "auto"


def test_only_tensors_move():
    batch = {"ids": torch.zeros(2), "names": ["a", "b"]}
    moved = to_device(batch, "meta")
    assert moved["ids"].device.type == "meta"
    assert moved["names"] is batch["names"]
    assert batch["ids"].device.type == "cpu"


def test_a_step_is_called_once_and_timed():
    calls = []

    def step():
        calls.append(1)
        time.sleep(0.02)

    cost = cost_of(step, torch.device("cpu"))
    assert len(calls) == 1
    assert cost.seconds >= 0.02
    assert cost.mebibytes is None


def test_bytes_of_training():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    model[0].requires_grad_(False)
    assert training_bytes(model) == {"weights": 96, "gradients": 32, "optimizer": 64}
    assert training_bytes(model.bfloat16())["weights"] == 48


def test_bytes_that_autograd_keeps():
    layer = nn.Linear(8, 4)
    inputs = torch.randn(16, 8)
    # the inputs for the weight's gradient; the inputs need none, so no weight is kept
    assert kept_bytes(lambda: layer(inputs), layer) == 16 * 8 * 4
    # two layers on the same inputs: these are kept once
    other = nn.Linear(8, 4)
    both = nn.ModuleList([layer, other])
    assert kept_bytes(lambda: layer(inputs) + other(inputs), both) == 16 * 8 * 4
    # without a model, weights are counted like everything else
    needs_gradient = torch.randn(16, 8, requires_grad=True)
    assert kept_bytes(lambda: layer(needs_gradient)) == 16 * 8 * 4 + 4 * 8 * 4


def test_nothing_is_kept_without_gradients():
    layer = nn.Linear(8, 4)

    def forward():
        with torch.no_grad():
            return layer(torch.randn(2, 8))

    assert kept_bytes(forward, layer) == 0


def test_copies_fit_where_they_are_small_beside_the_free_memory(monkeypatch):
    free = {"cpu": 1000, "cuda:1": 100}
    monkeypatch.setattr(devices, "available_bytes", lambda device: free[str(device)])
    assert copies_fit([torch.zeros(4, 15)])  # 240 bytes of 1,000
    assert not copies_fit([torch.zeros(4, 8), torch.zeros(4, 8)])  # 256
    assert copies_fit([torch.zeros(10**6, device="meta")[:8], torch.zeros(4)])
    assert copies_fit([])
    free["cpu"] = None  # nobody knows
    assert copies_fit([torch.zeros(1000)])


def test_the_free_memory_is_known():
    assert available_bytes(torch.device("cpu")) > 10**8


def test_the_first_of_several_processes(monkeypatch):
    assert is_first_process()
    for rank, first in {"0": True, "1": False}.items():
        monkeypatch.setenv("RANK", rank)
        assert is_first_process() == first
