"""GPT-2's linear layers, stored as (in, out), are adapted, trained and merged as the same nn.Linear layers."""

import copy

import pytest
import torch
from odd_models import odd
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from ressa.adaptation.adapters import adapt, remask, zero_masks, zeros_filled
from ressa.adaptation.sparse_lora import SparseLoraConfig, SparseLoraLinear
from ressa.parts import modality_map
from ressa.pruning.engine import prune


class Two(nn.Module):
    "A layer of each kind; no model of transformers."

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def twins(out=6, width=10):
    "The same pruned layer as a Conv1D and as an nn.Linear."
    conv, linear = Conv1D(out, width), nn.Linear(width, out)
    weight = torch.randn(out, width)
    weight[weight.abs() < 0.7] = 0
    bias = torch.randn(out)
    for layer, values in ((conv, weight.t()), (linear, weight)):
        layer.weight.data = values.clone()
        layer.bias.data = bias.clone()
    return conv, linear


@pytest.mark.parametrize("width", [10, 6])  # a square weight may hide a transposition
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_conv1d_is_adapted_as_the_same_linear_layer(width, dropout):
    models = []
    for layer in twins(width=width):
        torch.manual_seed(1)
        config = SparseLoraConfig(
            r=3, lora_alpha=4, target_modules=["layer"], lora_dropout=dropout
        )
        student = get_peft_model(Two(layer), config)
        for module in student.modules():
            if isinstance(module, SparseLoraLinear):
                nn.init.normal_(module.lora_B["default"].weight)
        models.append(student)
    x = torch.randn(2, 5, width)
    outputs, gradients = [], []
    for student in models:
        torch.manual_seed(2)
        out = student(x)
        out.square().sum().backward()
        outputs.append(out)
        gradients.append([w.grad for w in student.parameters() if w.grad is not None])
    assert torch.equal(*outputs)
    assert len(gradients[0]) == 2
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(*gradients))
    merged = [student.eval().merge_and_unload(safe_merge=True) for student in models]
    assert torch.equal(merged[0].layer.weight.t(), merged[1].layer.weight)
    before = twins(width=width)[1]  # another draw: only its shape is of use
    assert merged[1].layer.weight.shape == before.weight.shape


def test_merge_of_a_conv1d_is_held_to_its_mask_and_undone_to_the_bit():
    conv, _ = twins()
    dense = conv.weight.clone()
    config = SparseLoraConfig(r=2, target_modules=["layer"])
    student = get_peft_model(Two(conv), config)
    adapted = student.base_model.model.layer
    nn.init.normal_(adapted.lora_B["default"].weight)
    adapted.merge()
    assert not torch.equal(conv.weight, dense)
    assert torch.equal(conv.weight == 0, dense == 0)
    adapted.unmerge()
    assert torch.equal(conv.weight, dense)
    conv.weight.data[dense == 0] = 1.0
    with pytest.raises(ValueError, match="other zeros"):
        adapted.merge()


@pytest.mark.parametrize("adapter", ["sparselora", "lora", "full", "bias"])
def test_a_model_with_gpt_2_is_trained_in_each_way(adapter):
    model, batch = odd("ViT and GPT-2")
    prune(model, batch, sparsity=0.5, progress=False)
    masks = zero_masks(model)
    assert set(masks) >= set(modality_map(model).linears["language"])
    student = adapt(copy.deepcopy(model), adapter)
    loss = student(**batch).loss
    loss.backward()
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    torch.optim.SGD(trained, lr=0.1).step()
    torch.optim.SGD(trained, lr=0.1).step()
    if hasattr(student, "merge_and_unload"):
        student = student.merge_and_unload(safe_merge=True)
    if adapter == "lora":
        remask(student, masks)
    assert zeros_filled(masks, student) == 0
    assert student(**batch).loss < loss
