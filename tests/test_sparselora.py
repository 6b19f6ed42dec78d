"""SparseLoRA: exact gradients, zeros that stay to the bit, and a good PEFT citizen."""
import copy
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

from ressa.data import calibration_batch
from ressa.prune import prune
from ressa.repair import zero_masks, zeros_filled
from ressa.scores import magnitude
from ressa.sparselora import SparseLoraConfig, SparseLoraLinear, peft_targets, sparse_lora_linear


def layer(out=8, width=12, r=3, config=None, sparsity=0.5):
    linear = nn.Linear(width, out)
    linear.weight.data = magnitude(linear.weight.data, sparsity=sparsity)
    config = config or SparseLoraConfig(r=r)
    adapted = SparseLoraLinear(linear, "default", config=config, r=r, lora_alpha=16)
    nn.init.normal_(adapted.lora_B["default"].weight, std=0.1)
    return adapted


def bits_of_zeros(weight):
    "Where the weight is +0.0, to the bit."
    return (weight == 0) & ~torch.signbit(weight)


@pytest.mark.parametrize("seed", range(5))
def test_gradcheck(seed):
    torch.manual_seed(seed)
    out, width, r, tokens = (int(torch.randint(1, high, ())) for high in (7, 9, 4, 6))
    weight = (torch.randn(out, width) * (torch.rand(out, width) < 0.5)).double()
    inputs = [torch.randn(shape, dtype=torch.double, requires_grad=True)
              for shape in ((2, tokens, width), (out,), (r, width), (out, r))]
    assert torch.autograd.gradcheck(lambda x, c, a, b: sparse_lora_linear(x, weight, c, a, b, 0.7), inputs)


def test_gradient_equals_the_plain_formula_and_not_the_one_without_mask():
    weight = magnitude(torch.randn(8, 12), sparsity=0.5)
    x, A, B = torch.randn(5, 12), torch.randn(2, 12, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    want = torch.autograd.grad((F.linear(x, weight + (B @ A) * (weight != 0)) ** 2).sum(), (A, B))
    got = torch.autograd.grad((sparse_lora_linear(x, weight, None, A, B) ** 2).sum(), (A, B))
    plain = torch.autograd.grad((F.linear(x, weight + B @ A) ** 2).sum(), (A, B))
    for g, w, p in zip(got, want, plain):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(g, p, atol=1e-2)


def test_zeros_stay_to_the_bit_through_merge_and_unmerge():
    adapted = layer()
    zeros = bits_of_zeros(adapted.base_layer.weight)
    before = adapted.base_layer.weight.clone()
    for safe in (True, False):
        adapted.merge(safe_merge=safe)
        assert torch.equal(bits_of_zeros(adapted.base_layer.weight), zeros)
        assert not torch.equal(adapted.base_layer.weight, before)
        adapted.unmerge()
        assert torch.equal(bits_of_zeros(adapted.base_layer.weight), zeros)
        torch.testing.assert_close(adapted.base_layer.weight, before)


def test_merged_and_adapted_agree_and_disabled_is_the_base():
    adapted, x = layer(), torch.randn(5, 12)
    out = adapted(x)
    adapted.enable_adapters(False)
    assert torch.equal(adapted(x), adapted.base_layer(x))
    adapted.enable_adapters(True)
    adapted.merge()
    torch.testing.assert_close(adapted(x), out)


def test_two_adapters_are_the_sum_of_both():
    adapted, x = layer(), torch.randn(5, 12)
    adapted.update_layer("other", 2, lora_alpha=4, config=SparseLoraConfig(r=2))
    nn.init.normal_(adapted.lora_B["other"].weight)
    adapted.set_adapter(["default", "other"])
    weight = adapted.base_layer.weight + sum(adapted.get_delta_weight(name) for name in ("default", "other"))
    torch.testing.assert_close(adapted(x), F.linear(x, weight, adapted.base_layer.bias))


def test_dropout_drops_ranks_and_only_in_training():
    adapted, x = layer(config=SparseLoraConfig(r=3, lora_dropout=0.5)), torch.randn(5, 12)
    adapted.train()
    outs = {tuple(adapted(x).flatten().tolist()) for _ in range(20)}
    assert 1 < len(outs) <= 8  # each of three ranks is there or not
    adapted.eval()
    assert torch.equal(adapted(x), adapted(x))


def test_autocast_gives_16_bit_outputs_and_float32_gradients():
    adapted, x = layer(16, 32), torch.randn(5, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16): out = adapted(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), adapted(x), rtol=0.05, atol=0.05)
    out.float().square().sum().backward()
    assert adapted.lora_A["default"].weight.grad.dtype == torch.float32 and x.grad.dtype == torch.float32


def test_gradient_checkpointing_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint
    adapted, x, grads = layer(), torch.randn(5, 12, requires_grad=True), []
    for run in (adapted, lambda x: checkpoint(adapted, x, use_reentrant=False)):
        adapted.zero_grad()
        run(x).square().sum().backward()
        grads.append(adapted.lora_A["default"].weight.grad.clone())
    assert torch.equal(*grads)


def test_holds_no_matrix_of_the_weights_size():
    adapted, x = layer(256, 256, r=4), torch.randn(8, 256, requires_grad=True)
    known = {adapted.base_layer.weight.untyped_storage().data_ptr()}
    sizes = {}
    def pack(t): sizes[t.untyped_storage().data_ptr()] = t.numel(); return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): adapted(x)
    held = sum(n for pointer, n in sizes.items() if pointer not in known)
    assert held <= x.numel() + 4 * 4 * 256  # x, A, B and B times its scale


def test_wishes_it_cannot_meet_are_refused(bundled):
    with pytest.raises(ValueError, match="use_dora"): SparseLoraConfig(use_dora=True)
    with pytest.raises(ValueError, match="lora_alpha"): peft_targets(bundled[0], {"vision": 4}, {"language": 8})
    with pytest.raises(ValueError, match="visoin"): peft_targets(bundled[0], {"visoin": 4})
    with pytest.raises(ValueError, match="mix adapters"): layer()(torch.randn(1, 12), adapter_names=["default"])


@pytest.fixture
def trained(bundled, data):
    "A pruned model with an adapter after a few steps; its masks; a batch."
    model, processor = bundled
    batch = calibration_batch(data[0], processor, n=8)
    prune(model, batch, sparsity=0.6, progress=False)
    masks, base = zero_masks(model), copy.deepcopy(model)
    student = get_peft_model(model, SparseLoraConfig(r={"vision": 2, "language": 3, "interface": 1}))
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        student(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return student.eval(), base, masks, batch


def test_ranks_by_part(trained):
    model = trained[0].base_model.model
    ranks = {"vision_model.encoder.layers.0.mlp.fc1": 2, "language_model.model.layers.2.mlp.up_proj": 3,
             "language_projection": 1}
    for name, rank in ranks.items(): assert model.get_submodule(name).r == {"default": rank}


def test_save_load_merge(trained, tmp_path):
    student, base, masks, batch = trained
    want = student(**batch).logits
    student.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(again(**batch).logits, want)
    merged = again.merge_and_unload(safe_merge=True)
    assert zeros_filled(masks, merged) == 0
    torch.testing.assert_close(merged(**batch).logits, want)


def test_plain_peft_refuses_the_adapter(trained, tmp_path):
    trained[0].save_pretrained(tmp_path)
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert alone.returncode != 0 and "SPARSELORA" in alone.stderr


def test_plain_lora_fills_the_zeros(bundled, data):
    model, processor = bundled
    prune(model, calibration_batch(data[0], processor, n=4), sparsity=0.6, progress=False)
    masks = zero_masks(model)
    student = get_peft_model(model, LoraConfig(**peft_targets(model, 4)))
    for name, p in student.named_parameters():
        if "lora_B" in name: nn.init.normal_(p)
    filled = zeros_filled(masks, student.merge_and_unload())
    assert filled > 0.99 * sum(int((~mask).sum()) for mask in masks.values())
