"""Which weights each adapter trains; masks read, zeros put back and counted."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ressa.adaptation.adapters import (
    ADAPTERS,
    adapt,
    remask,
    trainable_weights,
    zero_masks,
    zeros_filled,
)
from ressa.adaptation.sparse_lora import DEFAULT_RANKS, SparseLoraConfig, peft_targets


def test_masks_are_those_of_layers_with_zeros(case):
    masks = zero_masks(case.pruned)
    assert masks and zero_masks(case.dense) == {}
    for name, mask in masks.items():
        weight = case.pruned.get_submodule(name).weight
        assert mask.dtype == torch.bool
        assert torch.equal(mask, weight != 0)


def test_remask_restores_zeros_and_nothing_else(case):
    masks = zero_masks(case.pruned)
    name, mask = next(iter(masks.items()))
    weight = case.pruned.get_submodule(name).weight
    nn.init.ones_(weight)
    assert zeros_filled(masks, case.pruned) == int((~mask).sum())
    remask(case.pruned, masks)
    assert zeros_filled(masks, case.pruned) == 0
    assert torch.equal(case.pruned.get_submodule(name).weight, mask.float())


def test_plain_lora_fills_the_zeros(case):
    masks = zero_masks(case.pruned)
    config = LoraConfig(**peft_targets(case.pruned, 4))
    student = get_peft_model(case.pruned, config)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    filled = zeros_filled(masks, student.merge_and_unload())
    assert filled > 0.99 * sum(int((~mask).sum()) for mask in masks.values())


def test_what_each_adapter_trains(case):
    counts = {
        name: trainable_weights(adapt(copy.deepcopy(case.pruned), name))
        for name in ADAPTERS
    }
    for parts in counts.values():
        assert all(trained > 0 for trained, _ in parts.values())
    assert counts["sparselora"] == counts["lora"]
    total = sum(weight.numel() for weight in case.pruned.parameters())
    for name in ("full", "bias"):
        assert sum(weights for _, weights in counts[name].values()) == total
    language = adapt(copy.deepcopy(case.pruned), "full", r={"language": 8})
    counts = trainable_weights(language)
    assert counts["vision"][0] == counts["interface"][0] == 0 < counts["language"][0]


@pytest.mark.parametrize("adapter", ["full", "bias"])
def test_gradients_of_pruned_weights_are_masked(case, adapter):
    student = adapt(case.pruned, adapter)
    for weight in student.parameters():
        if weight.requires_grad:
            weight.sum().backward()
    masks = zero_masks(student)
    for name, mask in masks.items():
        gradient = student.get_submodule(name).weight.grad
        if gradient is not None:
            assert torch.equal(gradient, mask.float())


def test_one_set_of_default_ranks(case):
    assert SparseLoraConfig().r == DEFAULT_RANKS
    by_default = trainable_weights(adapt(copy.deepcopy(case.pruned)))
    asked_for = trainable_weights(adapt(case.pruned, r=DEFAULT_RANKS, lora_alpha=16))
    assert by_default == asked_for


def test_what_fits_no_layer_is_refused(case):
    with pytest.raises(ValueError, match="adapter must be one of"):
        adapt(case.pruned, "dora")
    with pytest.raises(ValueError, match="visoin"):
        adapt(case.pruned, r={"visoin": 4})
    with pytest.raises(ValueError, match="gives no layer a rank"):
        adapt(case.pruned, r={})
