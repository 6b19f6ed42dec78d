"""An adapter fits one mask alone; merging and casting make no zero and lose none."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from ressa.adaptation.kept_masks import mask_record
from ressa.adaptation.sparse_lora import SparseLoraConfig
from ressa.pruning.scores import magnitude


def pruned_layer(seed=0, out=16, width=24, dtype=torch.float32):
    torch.manual_seed(seed)
    linear = nn.Linear(width, out).requires_grad_(False)
    linear.weight.data = magnitude(linear.weight.data, sparsity=0.5).to(dtype)
    linear.bias.data = linear.bias.data.to(dtype)
    return nn.Sequential(linear)


def student_of(model, **options):
    config = SparseLoraConfig(r=2, target_modules=["0"], **options)
    return get_peft_model(model, config)


def randomize(student):
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)


def test_a_saved_adapter_is_refused_by_a_base_with_other_zeros(tmp_path):
    base = pruned_layer()
    dense = nn.Sequential(nn.Linear(24, 16))
    fits, other = copy.deepcopy(base), pruned_layer(seed=1)
    student = student_of(base)
    randomize(student)
    student.save_pretrained(tmp_path)
    for model in (dense, other):
        with pytest.raises(
            ValueError, match="made for other zeros in 1 of 1 layers: 0"
        ):
            PeftModel.from_pretrained(model, tmp_path)
        assert type(model[0]) is nn.Linear
    elsewhere = nn.Sequential(nn.ReLU(), nn.Linear(24, 16))
    with pytest.raises(ValueError, match="no layer '0'|a layer 0|adapts linear layers"):
        PeftModel.from_pretrained(elsewhere, tmp_path)
    x = torch.randn(3, 24)
    assert torch.equal(PeftModel.from_pretrained(fits, tmp_path)(x), student.eval()(x))


def test_the_mask_is_stored_with_the_adapter(tmp_path):
    base = pruned_layer()
    record = mask_record(base[0].weight)
    student = student_of(base)
    assert student.peft_config["default"].masks == {"0": record}
    student.save_pretrained(tmp_path)
    again = SparseLoraConfig.from_pretrained(tmp_path)
    assert again.masks == {"0": record}


@pytest.mark.parametrize("way", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("change", ["fill", "prune"])
def test_a_base_that_changed_is_refused_before_the_first_layer_is_merged(way, change):
    two = nn.Sequential(pruned_layer()[0], nn.Linear(16, 16))
    config = SparseLoraConfig(r=2, target_modules=["0", "1"])
    student = get_peft_model(two, config)
    randomize(student)
    last = student.base_model.model[1].base_layer
    if change == "fill":
        student.base_model.model[0].base_layer.weight.data.fill_(1.0)
    else:
        last.weight.data[0] = 0
    before = [p.clone() for p in student.parameters()]
    with pytest.raises(ValueError, match="other zeros"):
        getattr(student, way)()
    for p, b in zip(student.parameters(), before, strict=True):
        assert torch.equal(p, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge_give_back_the_same_weight(dtype, safe):
    student = student_of(pruned_layer(dtype=dtype))
    randomize(student)
    weight = student.base_model.model[0].base_layer.weight
    before = weight.clone()
    for _ in range(3):
        student.merge_adapter(safe_merge=safe)
        assert not torch.equal(weight, before)
        assert torch.equal(weight == 0, before == 0)
        student.unmerge_adapter()
        assert torch.equal(weight, before)
    assert "weight_before_merge" not in dict(student.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("safe", [False, True])
def test_a_kept_weight_that_cancels_out_is_kept_and_stays_trainable(dtype, safe):
    linear = nn.Linear(2, 2, bias=False).requires_grad_(False)
    linear.weight.data = torch.tensor([[1.0, 0.0], [2.0, 4.0]], dtype=dtype)
    config = SparseLoraConfig(r=1, lora_alpha=1, target_modules=["0"])
    student = get_peft_model(nn.Sequential(linear), config)
    layer = student.base_model.model[0]
    layer.lora_A["default"].weight.data = torch.tensor([[1.0, 1.0]])
    layer.lora_B["default"].weight.data = torch.tensor([[-1.0], [-2.0]])
    merged = student.merge_and_unload(safe_merge=safe)
    weight = merged[0].weight
    assert torch.equal(weight != 0, torch.tensor([[True, False], [True, True]]))
    assert weight[0, 0].abs() < 1e-7
    assert weight[1, 1] == 2
    # A second repair moves them again, and still not the pruned one.
    again = get_peft_model(merged, SparseLoraConfig(r=1, target_modules=["0"]))
    randomize(again)
    delta = again.base_model.model[0].get_delta_weight("default")
    assert torch.equal(delta != 0, torch.tensor([[True, False], [True, True]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_kept_weight_that_underflows_in_a_cast_is_kept(dtype):
    model = pruned_layer()
    kept = model[0].weight != 0
    model[0].weight.data[kept.nonzero()[0][0], kept.nonzero()[0][1]] = 1e-45
    student = student_of(model).to(dtype)
    weight = student.base_model.model[0].base_layer.weight
    assert torch.equal(weight != 0, kept)
    student.merge_and_unload()
    assert torch.equal(model[0].weight != 0, kept)


def test_two_adapters_merge_and_unmerge_to_the_same_weight():
    student = student_of(pruned_layer(dtype=torch.bfloat16))
    student.add_adapter("other", SparseLoraConfig(r=3, target_modules=["0"]))
    student.base_model.set_adapter(["default", "other"])
    randomize(student)
    weight = student.base_model.model[0].base_layer.weight
    before = weight.clone()
    student.merge_adapter()
    assert torch.equal(weight == 0, before == 0)
    student.unmerge_adapter()
    assert torch.equal(weight, before)
