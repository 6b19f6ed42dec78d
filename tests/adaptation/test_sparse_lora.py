"""SparseLoRA: exact gradients, zeros that stay to the bit, and a good PEFT citizen."""

import copy
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ressa.adaptation import fast_mask
from ressa.adaptation.adapters import zero_masks, zeros_filled
from ressa.adaptation.fast_mask import masked_weight
from ressa.adaptation.masked_update import sparse_lora_linear
from ressa.adaptation.sparse_lora import (
    SparseLoraConfig,
    SparseLoraLinear,
    peft_targets,
)
from ressa.data.collate import calibration_batch
from ressa.pruning.scores import magnitude


def layer(out=8, width=12, r=3, config=None, sparsity=0.5, kind=SparseLoraLinear):
    linear = nn.Linear(width, out).requires_grad_(False)
    linear.weight.data = magnitude(linear.weight.data, sparsity=sparsity)
    config = config or SparseLoraConfig(r=r)
    adapted = kind(linear, "default", config=config, r=r, lora_alpha=16)
    nn.init.normal_(adapted.lora_B["default"].weight, std=0.1)
    return adapted


def bits_of_zeros(weight):
    "Where the weight is +0.0, to the bit."
    return (weight == 0) & ~torch.signbit(weight)


def test_gradient_equals_the_plain_formula_and_not_the_one_without_mask():
    weight = magnitude(torch.randn(8, 12), sparsity=0.5)
    x = torch.randn(5, 12)
    A = torch.randn(2, 12, requires_grad=True)
    B = torch.randn(8, 2, requires_grad=True)
    outputs = {
        "ours": sparse_lora_linear(x, weight, None, A, B),
        "masked": F.linear(x, weight + (B @ A) * (weight != 0)),
        "plain LoRA": F.linear(x, weight + B @ A),
    }
    gradients_of = {
        name: torch.autograd.grad(output.square().sum(), (A, B))
        for name, output in outputs.items()
    }
    for ours, masked, plain in zip(*gradients_of.values()):
        torch.testing.assert_close(ours, masked, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours, plain, atol=1e-2)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None])
def test_zeros_stay_to_the_bit_in_16_bits(dtype, adapter_dtype):
    adapted = layer(32, 64)
    adapted.base_layer.to(dtype)
    if adapter_dtype is None:
        adapted.to(dtype)
    base = adapted.base_layer.weight.clone()
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    zeros = bits_of_zeros(base)
    out = adapted(x)
    assert out.dtype == dtype
    out.square().sum().backward()
    assert torch.isfinite(adapted.lora_A["default"].weight.grad).all()
    assert x.grad.dtype == dtype
    for safe in (True, False):
        adapted.merge(safe_merge=safe)
        merged = adapted.base_layer.weight
        assert merged.dtype == dtype
        assert (merged[zeros].view(torch.int16) == 0).all()
        torch.testing.assert_close(adapted(x), out, rtol=0.05, atol=0.05)
        adapted.unmerge()
        assert (adapted.base_layer.weight[zeros].view(torch.int16) == 0).all()
        torch.testing.assert_close(
            adapted.base_layer.weight, base, rtol=0.05, atol=0.01
        )
        adapted.base_layer.weight.data = base.clone()


def test_merged_and_adapted_agree_and_disabled_is_the_base():
    adapted, x = layer(), torch.randn(5, 12)
    out = adapted(x)
    adapted.enable_adapters(False)
    assert torch.equal(adapted(x), adapted.base_layer(x))
    adapted.enable_adapters(True)
    adapted.merge()
    torch.testing.assert_close(adapted(x), out)


BOTH = ("default", "other")


@pytest.fixture
def layer_of_two():
    "A layer with two active adapters, of ranks 3 and 2."
    adapted = layer()
    adapted.update_layer("other", 2, lora_alpha=4, config=SparseLoraConfig(r=2))
    nn.init.normal_(adapted.lora_B["other"].weight)
    adapted.set_adapter(list(BOTH))
    return adapted


def test_two_adapters_are_the_sum_of_both(layer_of_two):
    adapted, x = layer_of_two, torch.randn(5, 12)
    update = sum(adapted.get_delta_weight(name) for name in BOTH)
    weight = adapted.base_layer.weight + update
    torch.testing.assert_close(adapted(x), F.linear(x, weight, adapted.base_layer.bias))


def test_gradients_of_two_adapters(layer_of_two):
    adapted, x = layer_of_two, torch.randn(5, 12)
    weight = adapted.base_layer.weight
    parameters, update = [], 0
    for name in BOTH:
        A, B = adapted.lora_A[name].weight, adapted.lora_B[name].weight
        parameters += [A, B]
        update = update + B @ A * adapted.scaling[name]
    plain = F.linear(x, weight + update * (weight != 0), adapted.base_layer.bias)
    want = torch.autograd.grad(plain.square().sum(), parameters)
    got = torch.autograd.grad(adapted(x).square().sum(), parameters)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


def test_dropout_drops_ranks_and_only_in_training():
    adapted = layer(config=SparseLoraConfig(r=3, lora_dropout=0.5)).train()
    x = torch.randn(5, 12)
    outs = {tuple(adapted(x).flatten().tolist()) for _ in range(20)}
    assert 1 < len(outs) <= 8  # each of three ranks is there or not
    adapted.eval()
    assert torch.equal(adapted(x), adapted(x))


def test_autocast_gives_16_bit_outputs_and_float32_gradients():
    adapted, x = layer(16, 32), torch.randn(5, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = adapted(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), adapted(x), rtol=0.05, atol=0.05)
    out.float().square().sum().backward()
    assert adapted.lora_A["default"].weight.grad.dtype == torch.float32
    assert x.grad.dtype == torch.float32


def test_autocast_around_backward_costs_no_precision():
    adapted, x = layer(16, 32), torch.randn(5, 32)
    grads = []
    for around in (False, True):
        adapted.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = adapted(x).float().square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
            loss.backward()
        grads.append(adapted.lora_A["default"].weight.grad.clone())
    assert torch.equal(*grads)


def gradients(run, adapted, x, seed=0):
    "Output and all gradients of one pass; the same seed drops the same ranks."
    torch.manual_seed(seed)
    adapted.zero_grad()
    x.grad = None
    out = run(x)
    out.float().square().sum().backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    return [out.detach(), x.grad.clone(), *(p.grad.clone() for p in trained)]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(dropout, reentrant):
    adapted = layer(config=SparseLoraConfig(r=3, lora_dropout=dropout)).train()
    x = torch.randn(5, 12, requires_grad=True)
    plain = gradients(adapted, adapted, x)

    def checkpointed(x):
        return checkpoint(adapted, x, use_reentrant=reentrant)

    again = gradients(checkpointed, adapted, x)
    for a, b in zip(plain, again):
        assert torch.equal(a, b)


compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler",
)


@pytest.mark.slow
@compiler
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_a_graph_break(autocast):
    adapted, x = layer(32, 64), torch.randn(2, 5, 64, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(adapted, fullgraph=True)

    def cast(run):
        def wrapped(x):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                return run(x)

        return wrapped

    plain = gradients(cast(adapted), adapted, x)
    for a, b in zip(plain, gradients(cast(compiled), adapted, x)):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@compiler
def test_dropout_compiles_without_a_graph_break_and_drops_whole_ranks():
    adapted = layer(8, 12, config=SparseLoraConfig(r=3, lora_dropout=0.5)).train()
    torch._dynamo.reset()
    compiled, x = torch.compile(adapted, fullgraph=True), torch.randn(5, 12)
    outs = {tuple(compiled(x).flatten().tolist()) for _ in range(30)}
    assert 1 < len(outs) <= 8


@pytest.mark.slow
@compiler
def test_compiled_product_equals_the_plain_one(monkeypatch):
    monkeypatch.setattr(fast_mask, "_compiled_devices", {"cpu"})
    torch._dynamo.reset()
    for out, width, dtype in (
        (32, 48, torch.float32),
        (7, 5, torch.float32),
        (64, 64, torch.bfloat16),
    ):
        weight = magnitude(torch.randn(out, width), sparsity=0.4).to(dtype)
        A, B = torch.randn(3, width), torch.randn(out, 3)
        fused = fast_mask.fast_masked_weight(weight, A, B)
        assert torch.equal(fused == 0, weight == 0)
        assert not torch.signbit(fused[weight == 0]).any()
        torch.testing.assert_close(fused, masked_weight(weight, A, B))
    adapted, x = layer(), torch.randn(5, 12, requires_grad=True)
    fused = gradients(adapted, adapted, x)
    assert fast_mask._compiled_devices == {"cpu"}  # nothing went wrong on the way
    monkeypatch.setattr(fast_mask, "_compiled_devices", set())
    for a, b in zip(fused, gradients(adapted, adapted, x)):
        torch.testing.assert_close(a, b)


def test_goes_on_where_the_compiler_does_not_work(monkeypatch):
    def broken(*args):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(fast_mask, "_compiled_devices", {"cpu"})
    monkeypatch.setattr(fast_mask, "_compiled_masked_weight", lambda: broken)
    adapted, x = layer(), torch.randn(5, 12)
    with pytest.warns(UserWarning, match="no compiler here"):
        out = adapted(x)
    weight = adapted.base_layer.weight + adapted.get_delta_weight("default")
    torch.testing.assert_close(out, F.linear(x, weight, adapted.base_layer.bias))
    assert fast_mask._compiled_devices == set()


def test_inputs_of_any_shape():
    adapted = layer()
    for x in (
        torch.randn(12),
        torch.randn(0, 12),
        torch.randn(12, 5).T,
        torch.randn(2, 1, 12).expand(2, 3, 12),
    ):
        x = x.detach().requires_grad_()
        out = adapted(x)
        assert out.shape == (*x.shape[:-1], 8)
        grads = torch.autograd.grad(out.sum(), (x, adapted.lora_A["default"].weight))
        assert grads[0].shape == x.shape
        assert torch.isfinite(grads[1]).all()


def held(adapted, x, autocast=False):
    "Bytes that autograd holds between forward and backward, by storage; parameters and x not counted."
    known = {t.untyped_storage().data_ptr() for t in (x, *adapted.parameters())}
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = adapted(x)
    assert output.requires_grad  # and alive: no storage was used twice
    return sum(n for pointer, n in sizes.items() if pointer not in known)


def test_holds_nothing_but_its_input_and_references():
    x = torch.randn(8, 256, requires_grad=True)
    bytes_in_16_bits = 2 * x.numel()
    for dropout in (0.0, 0.5):
        config = SparseLoraConfig(r=4, lora_dropout=dropout)
        adapted = layer(256, 256, 4, config).train()
        plain = layer(256, 256, 4, config, kind=LoraLinear).train()
        assert held(adapted, x) == 0 < held(plain, x)
        assert held(adapted, x, autocast=True) == bytes_in_16_bits
        assert held(plain, x, autocast=True) > bytes_in_16_bits


def test_what_cannot_be_masked_is_refused(bundled):
    with pytest.raises(ValueError, match="use_dora"):
        SparseLoraConfig(use_dora=True)
    with pytest.raises(ValueError, match="lora_alpha"):
        peft_targets(bundled[0], {"vision": 4}, {"language": 8})
    with pytest.raises(ValueError, match="visoin"):
        peft_targets(bundled[0], {"visoin": 4})
    with pytest.raises(ValueError, match="mix adapters"):
        layer()(torch.randn(1, 12), adapter_names=["default"])


def test_layers_it_cannot_mask_are_refused():
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(
        torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False
    )
    for module in (packed, nn.Conv1d(4, 4, 1)):
        model = nn.Sequential(module)
        with pytest.raises(ValueError, match=type(module).__name__):
            get_peft_model(model, SparseLoraConfig(r=2, target_modules=["0"]))


class Trained(NamedTuple):
    "A pruned model with an adapter after a few steps."

    student: PeftModel
    base: nn.Module  # what was pruned
    masks: dict
    batch: dict


@pytest.fixture
def trained(case):
    batch = calibration_batch(case.train, case.processor, n=8)
    masks, base = zero_masks(case.pruned), copy.deepcopy(case.pruned)
    config = SparseLoraConfig(r={"vision": 2, "language": 3, "interface": 1})
    student = get_peft_model(case.pruned, config)
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    for _ in range(3):
        student(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return Trained(student.eval(), base, masks, batch)


def test_ranks_by_part(trained):
    model = trained.student.base_model.model
    ranks = {
        "vision_model.encoder.layers.0.mlp.fc1": 2,
        "language_model.model.layers.2.mlp.up_proj": 3,
        "language_projection": 1,
    }
    for name, rank in ranks.items():
        assert model.get_submodule(name).r == {"default": rank}


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


def test_training_leaves_the_base_and_merging_back_and_forth_the_zeros(trained):
    student, base, masks, batch = trained
    inner = student.base_model.model
    adapted = {name: inner.get_submodule(name) for name in masks}
    layers = {
        name: module.base_layer
        for name, module in adapted.items()
        if hasattr(module, "base_layer")
    }
    assert layers
    want = student(**batch).logits
    before = {name: m.weight.clone() for name, m in layers.items()}
    for name, m in layers.items():
        assert torch.equal(m.weight, base.get_submodule(name).weight)
    student.merge_adapter(safe_merge=True)
    torch.testing.assert_close(student(**batch).logits, want)
    for name, m in layers.items():
        assert torch.equal(bits_of_zeros(m.weight), before[name] == 0)
    student.unmerge_adapter()
    for name, m in layers.items():
        assert torch.equal(bits_of_zeros(m.weight), before[name] == 0)
        torch.testing.assert_close(m.weight, before[name])
    with student.disable_adapter():
        off = student(**batch).logits
    torch.testing.assert_close(off, base(**batch).logits)
    assert not torch.allclose(off, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_to_the_bit_on_disk(trained, tmp_path, dtype):
    student, base, masks, batch = trained
    pruned = {
        name: module.weight.to(dtype)
        for name, module in base.named_modules()
        if name in masks
    }
    merged = student.to(dtype).merge_and_unload(safe_merge=True)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path, dtype=dtype)
    for name, weight in pruned.items():
        got = again.get_submodule(name).weight
        assert got.dtype == dtype
        assert torch.equal(got, merged.get_submodule(name).weight)
        assert (got[weight == 0].view(torch.uint8) == 0).all()


@pytest.mark.slow
def test_plain_peft_refuses_the_adapter(trained, tmp_path):
    trained.student.save_pretrained(tmp_path)
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert alone.returncode != 0
    assert "SPARSELORA" in alone.stderr


def test_default_alpha_is_the_papers(bundled):
    from ressa.adaptation.sparse_lora import peft_targets

    assert peft_targets(bundled[0], 4)["lora_alpha"] == 16
