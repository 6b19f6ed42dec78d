"""SparseLoRA: exact gradients, zeros that stay to the bit, and a good PEFT citizen."""

import copy
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ressa import sparselora
from ressa.adaptation.adapters import zero_masks, zeros_filled
from ressa.adaptation.sparse_lora import (
    SparseLoraConfig,
    SparseLoraLinear,
    masked_weight,
    peft_targets,
    sparse_lora_linear,
)
from ressa.data.collate import calibration_batch
from ressa.pruning.engine import prune
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


def gradcheck(weight, r, tokens, scale):
    out, width = weight.shape
    inputs = [
        torch.randn(shape, dtype=torch.double, requires_grad=True)
        for shape in ((*tokens, width), (out,), (r, width), (out, r))
    ]
    return torch.autograd.gradcheck(
        lambda x, c, a, b: sparse_lora_linear(x, weight, c, a, b, scale), inputs
    )


@pytest.mark.parametrize("seed", range(8))
def test_gradcheck(seed):
    torch.manual_seed(seed)
    out, width, r, tokens = (int(torch.randint(1, high, ())) for high in (7, 9, 4, 6))
    share = torch.rand(())
    weight = (torch.randn(out, width) * (torch.rand(out, width) < share)).double()
    shape = ((2, tokens), (tokens,), ())[seed % 3]
    assert gradcheck(weight, r, shape, 0.7)
    assert gradcheck(
        weight, r, shape, torch.randint(0, 3, (r,)).double()
    )  # a scale for each rank, as in dropout


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "4:8"])
def test_gradcheck_with_patterns(pattern):
    weight = magnitude(torch.randn(5, 16), pattern=pattern).double()
    assert gradcheck(weight, 2, (3,), 0.7)


def test_gradients_of_gradients_are_refused_and_not_wrong():
    weight = magnitude(torch.randn(4, 6), sparsity=0.5)
    A, B, x = (
        torch.randn(2, 6, requires_grad=True),
        torch.randn(4, 2, requires_grad=True),
        torch.randn(3, 6),
    )
    loss = sparse_lora_linear(x, weight, None, A, B).square().sum()
    (dA,) = torch.autograd.grad(loss, A, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dA.sum().backward()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
def test_mask_in_place_is_the_mask_to_the_bit(dtype):
    weight = magnitude(torch.randn(33, 65), sparsity=0.5).to(dtype)
    update = torch.randn(33, 65).to(dtype)
    update[0], update[1], update[2] = float("inf"), float("nan"), -0.0
    weight[3], weight[4] = -0.0, torch.finfo(dtype).smallest_normal / 4
    for w in (weight, weight.T.contiguous().T):
        want = torch.where(w != 0, update, 0)
        got = sparselora._masked_(update.clone(), w)
        assert torch.equal(
            got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8)
        )


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16, torch.float16])
def test_quick_and_plain_masked_weight_are_equal(weights, adapters):
    weight = magnitude(torch.randn(32, 48), sparsity=0.5).to(weights)
    A, B = torch.randn(4, 48).to(adapters), torch.randn(32, 4).to(adapters)
    quick, plain = sparselora._rebuilt(weight, A, B), masked_weight(weight, A, B)
    assert quick.dtype == plain.dtype == torch.promote_types(weights, adapters)
    assert torch.equal(quick, plain) and bits_of_zeros(quick)[weight == 0].all()


def test_gradient_equals_the_plain_formula_and_not_the_one_without_mask():
    weight = magnitude(torch.randn(8, 12), sparsity=0.5)
    x, A, B = (
        torch.randn(5, 12),
        torch.randn(2, 12, requires_grad=True),
        torch.randn(8, 2, requires_grad=True),
    )
    want = torch.autograd.grad(
        (F.linear(x, weight + (B @ A) * (weight != 0)) ** 2).sum(), (A, B)
    )
    got = torch.autograd.grad(
        (sparse_lora_linear(x, weight, None, A, B) ** 2).sum(), (A, B)
    )
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None])
def test_zeros_stay_to_the_bit_in_16_bits(dtype, adapter_dtype):
    adapted = layer(32, 64)
    adapted.base_layer.to(dtype)
    if adapter_dtype is None:
        adapted.to(dtype)
    base, x = (
        adapted.base_layer.weight.clone(),
        torch.randn(5, 64, dtype=dtype, requires_grad=True),
    )
    zeros = bits_of_zeros(base)
    out = adapted(x)
    assert out.dtype == dtype
    out.square().sum().backward()
    assert (
        torch.isfinite(adapted.lora_A["default"].weight.grad).all()
        and x.grad.dtype == dtype
    )
    for safe in (True, False):
        adapted.merge(safe_merge=safe)
        merged = adapted.base_layer.weight
        assert merged.dtype == dtype and (merged[zeros].view(torch.int16) == 0).all()
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


def test_two_adapters_are_the_sum_of_both():
    adapted, x = layer(), torch.randn(5, 12)
    adapted.update_layer("other", 2, lora_alpha=4, config=SparseLoraConfig(r=2))
    nn.init.normal_(adapted.lora_B["other"].weight)
    adapted.set_adapter(["default", "other"])
    weight = adapted.base_layer.weight + sum(
        adapted.get_delta_weight(name) for name in ("default", "other")
    )
    torch.testing.assert_close(adapted(x), F.linear(x, weight, adapted.base_layer.bias))


def test_gradients_of_two_adapters():
    adapted, x = layer(), torch.randn(5, 12)
    adapted.update_layer("other", 2, lora_alpha=4, config=SparseLoraConfig(r=2))
    nn.init.normal_(adapted.lora_B["other"].weight)
    adapted.set_adapter(["default", "other"])
    names, weight = ("default", "other"), adapted.base_layer.weight
    parameters = [
        side[name].weight for name in names for side in (adapted.lora_A, adapted.lora_B)
    ]
    update = sum(
        adapted.lora_B[n].weight @ adapted.lora_A[n].weight * adapted.scaling[n]
        for n in names
    )
    plain = F.linear(x, weight + update * (weight != 0), adapted.base_layer.bias)
    want = torch.autograd.grad(plain.square().sum(), parameters)
    got = torch.autograd.grad(adapted(x).square().sum(), parameters)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


def test_dropout_drops_ranks_and_only_in_training():
    adapted, x = (
        layer(config=SparseLoraConfig(r=3, lora_dropout=0.5)),
        torch.randn(5, 12),
    )
    adapted.train()
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
    assert (
        adapted.lora_A["default"].weight.grad.dtype == torch.float32
        and x.grad.dtype == torch.float32
    )


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
    return [out.detach(), x.grad.clone()] + [
        p.grad.clone() for p in adapted.parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(dropout, reentrant):
    adapted = layer(config=SparseLoraConfig(r=3, lora_dropout=dropout)).train()
    x = torch.randn(5, 12, requires_grad=True)
    plain = gradients(adapted, adapted, x)
    again = gradients(
        lambda x: checkpoint(adapted, x, use_reentrant=reentrant), adapted, x
    )
    for a, b in zip(plain, again):
        assert torch.equal(a, b)


compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler",
)


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

    for a, b in zip(
        gradients(cast(adapted), adapted, x), gradients(cast(compiled), adapted, x)
    ):
        torch.testing.assert_close(a, b)


@compiler
def test_dropout_compiles_without_a_graph_break_and_drops_whole_ranks():
    adapted = layer(8, 12, config=SparseLoraConfig(r=3, lora_dropout=0.5)).train()
    torch._dynamo.reset()
    compiled, x = torch.compile(adapted, fullgraph=True), torch.randn(5, 12)
    outs = {tuple(compiled(x).flatten().tolist()) for _ in range(30)}
    assert 1 < len(outs) <= 8


@compiler
def test_compiled_product_equals_the_plain_one(monkeypatch):
    monkeypatch.setattr(sparselora, "_fuse_on", {"cpu"})
    torch._dynamo.reset()
    for out, width, dtype in (
        (32, 48, torch.float32),
        (7, 5, torch.float32),
        (64, 64, torch.bfloat16),
    ):
        weight = magnitude(torch.randn(out, width), sparsity=0.4).to(dtype)
        A, B = torch.randn(3, width), torch.randn(out, 3)
        fused, plain = sparselora._rebuilt(weight, A, B), masked_weight(weight, A, B)
        assert (
            torch.equal(fused == 0, weight == 0)
            and not torch.signbit(fused[weight == 0]).any()
        )
        torch.testing.assert_close(fused, plain)
    adapted, x = layer(), torch.randn(5, 12, requires_grad=True)
    fused = gradients(adapted, adapted, x)
    assert sparselora._fuse_on == {"cpu"}  # nothing went wrong on the way
    monkeypatch.setattr(sparselora, "_fuse_on", set())
    for a, b in zip(fused, gradients(adapted, adapted, x)):
        torch.testing.assert_close(a, b)


def test_goes_on_where_the_compiler_does_not_work(monkeypatch):
    def broken(*args):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(sparselora, "_fuse_on", {"cpu"})
    monkeypatch.setattr(sparselora, "_fused", lambda: broken)
    adapted, x = layer(), torch.randn(5, 12)
    with pytest.warns(UserWarning, match="no compiler here"):
        out = adapted(x)
    weight = adapted.base_layer.weight + adapted.get_delta_weight("default")
    torch.testing.assert_close(out, F.linear(x, weight, adapted.base_layer.bias))
    assert sparselora._fuse_on == set()


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
        assert grads[0].shape == x.shape and torch.isfinite(grads[1]).all()


def held(adapted, x, autocast=False):
    "Bytes that autograd holds between forward and backward, by storage; parameters and x not counted."
    known = {t.untyped_storage().data_ptr() for t in (x, *adapted.parameters())}
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = adapted(x)
    return sum(n for pointer, n in sizes.items() if pointer not in known)


def test_holds_nothing_but_its_input_and_references():
    x = torch.randn(8, 256, requires_grad=True)
    for dropout in (0.0, 0.5):
        adapted, plain = (
            layer(
                256, 256, 4, SparseLoraConfig(r=4, lora_dropout=dropout), kind=kind
            ).train()
            for kind in (SparseLoraLinear, LoraLinear)
        )
        assert held(adapted, x) == 0 < held(plain, x)
        assert (
            held(adapted, x, autocast=True)
            == 2 * x.numel()
            < held(plain, x, autocast=True)
        )  # x in 16 bits


def test_wishes_it_cannot_meet_are_refused(bundled):
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
    for layer in (packed, nn.Conv1d(4, 4, 1)):
        model = nn.Sequential(layer)
        with pytest.raises(ValueError, match=type(layer).__name__):
            get_peft_model(model, SparseLoraConfig(r=2, target_modules=["0"]))


@pytest.fixture
def trained(bundled, data):
    "A pruned model with an adapter after a few steps; its masks; a batch."
    model, processor = bundled
    batch = calibration_batch(data[0], processor, n=8)
    prune(model, batch, sparsity=0.6, progress=False)
    masks, base = zero_masks(model), copy.deepcopy(model)
    student = get_peft_model(
        model, SparseLoraConfig(r={"vision": 2, "language": 3, "interface": 1})
    )
    optimizer = torch.optim.AdamW(
        [p for p in student.parameters() if p.requires_grad], lr=1e-2
    )
    for _ in range(3):
        student(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return student.eval(), base, masks, batch


def test_ranks_by_part(trained):
    model = trained[0].base_model.model
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
    layers = {
        name: student.base_model.model.get_submodule(name).base_layer
        for name in masks
        if hasattr(student.base_model.model.get_submodule(name), "base_layer")
    }
    assert layers
    want, before = (
        student(**batch).logits,
        {name: m.weight.clone() for name, m in layers.items()},
    )
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
        assert got.dtype == dtype and torch.equal(
            got, merged.get_submodule(name).weight
        )
        assert (got[weight == 0].view(torch.uint8) == 0).all()


def test_plain_peft_refuses_the_adapter(trained, tmp_path):
    trained[0].save_pretrained(tmp_path)
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert alone.returncode != 0 and "SPARSELORA" in alone.stderr


def test_plain_lora_fills_the_zeros(bundled, data):
    model, processor = bundled
    prune(
        model, calibration_batch(data[0], processor, n=4), sparsity=0.6, progress=False
    )
    masks = zero_masks(model)
    student = get_peft_model(model, LoraConfig(**peft_targets(model, 4)))
    for name, p in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    filled = zeros_filled(masks, student.merge_and_unload())
    assert filled > 0.99 * sum(int((~mask).sum()) for mask in masks.values())
