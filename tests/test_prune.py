"""Pruning in flight, against slow and plain ways to the same result."""
import copy
import warnings

import pytest
import torch
from torch import nn

from ressa.data import calibration_batch, to_device
from ressa.masks import has_pattern, sparsity_of
from ressa.modality import modality_map
from ressa.prune import before_first_call, prune
from ressa.scores import Statistics, wanda


def layers_of(model):
    linears = modality_map(model).linears
    return linears["vision"] | linears["language"]


def one_at_a_time(model, batch, sparsity):
    "The slow way: for each layer a whole forward pass of the model as pruned so far."
    mask, order = batch["attention_mask"].bool(), []
    with before_first_call(layers_of(model), lambda name, *_: order.append(name)), torch.no_grad(): model(**batch)
    for name in order:
        caught = []
        module = model.get_submodule(name)
        hook = module.register_forward_pre_hook(lambda m, inputs: caught.append(inputs[0]))
        with torch.no_grad(): model(**batch)
        hook.remove()
        x = caught[0]
        if x.shape[:-1] == mask.shape: x = x[mask]
        module.weight.data = wanda(module.weight.data, Statistics.of(x), sparsity=sparsity)
    return model


def test_one_pass_equals_one_pass_per_layer(bundled, data):
    model, processor = bundled
    batch = calibration_batch(data[0], processor, n=16)
    slow = one_at_a_time(copy.deepcopy(model), batch, 0.6)
    prune(model, batch, sparsity=0.6, progress=False)
    for (name, a), (_, b) in zip(layers_of(model).items(), layers_of(slow).items()):
        assert torch.equal(a.weight, b.weight), name


def test_layers_that_share_an_input_share_its_statistics(bundled, data, monkeypatch):
    model, processor = bundled
    seen = []
    original = Statistics.of.__func__
    monkeypatch.setattr(Statistics, "of", classmethod(lambda cls, x, **k: seen.append(1) or original(cls, x, **k)))
    report = prune(model, calibration_batch(data[0], processor, n=4), sparsity=0.5, progress=False)
    # each Llama block: q, k, v share one input and gate, up another: four inputs for seven layers
    assert len(report.layers) == 12 + 21 and len(seen) == 12 + 3 * 4


def test_padding_does_not_count(bundled, data):
    model, processor = bundled
    rows = calibration_batch(data[0], processor, n=4)
    padded = dict(rows)
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        padded[name] = nn.functional.pad(rows[name], (0, 5), value=fill)
    other = copy.deepcopy(model)
    reports = [prune(m, b, sparsity=0.5, progress=False) for m, b in ((model, rows), (other, padded))]
    assert [line.tokens for line in reports[0].layers] == [line.tokens for line in reports[1].layers]
    for a, b in zip(model.parameters(), other.parameters()): assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits(data, dtype):
    from ressa.bundled import load_bundled
    model, processor = load_bundled("cpu", dtype=dtype)
    report = prune(model, calibration_batch(data[0], processor, n=4), pattern="2:4", progress=False)
    for layer in layers_of(model).values():
        assert layer.weight.dtype == dtype and has_pattern(layer.weight, "2:4")
        assert not torch.signbit(layer.weight[layer.weight == 0]).any()
    assert all(abs(line.sparsity - 0.5) < 0.01 for line in report.layers)


def test_targets_by_part_layer_and_pattern(bundled, data):
    model, processor = bundled
    name = "vision_model.encoder.layers.0.mlp.fc1"
    prune(model, calibration_batch(data[0], processor, n=4), progress=False,
          sparsity={"vision": 0.25, name: 0.75, r"language_model.*mlp.*": "1:4"})
    layers = layers_of(model)
    assert sparsity_of(layers[name].weight) == 0.75
    assert sparsity_of(layers["vision_model.encoder.layers.1.mlp.fc1"].weight) == 0.25
    assert has_pattern(layers["language_model.model.layers.1.mlp.up_proj"].weight, "1:4")
    assert sparsity_of(layers["language_model.model.layers.1.self_attn.q_proj"].weight) == 0


def test_what_cannot_be_judged_is_left_dense_and_named(bundled, data):
    model, processor = bundled
    batch = calibration_batch(data[0], processor, n=4)
    model.language_model.model.layers[1].mlp.gate_proj.weight.data[0, 0] = float("inf")
    before = copy.deepcopy(model.language_model.model.layers[2].state_dict())
    with pytest.warns(UserWarning, match="left dense"):
        report = prune(model, batch, sparsity={"language": 0.5}, progress=False)
    assert "language_model.model.layers.2.mlp.up_proj" in report.left_dense
    for name, value in model.language_model.model.layers[2].state_dict().items():
        assert torch.equal(value, before[name])


def test_a_layer_called_twice_is_pruned_once():
    shared = nn.Linear(4, 4, bias=False)
    calls = []
    with before_first_call({"shared": shared}, lambda name, module, x: calls.append(name)):
        shared(shared(torch.randn(3, 4)))
    assert calls == ["shared"]


def test_nothing_changes_when_the_wish_is_impossible(bundled, data):
    model, processor = bundled
    before = {name: p.clone() for name, p in model.named_parameters()}
    batch = calibration_batch(data[0], processor, n=4)
    for wish in (dict(sparsity=1.0), dict(sparsity=-0.1), dict(pattern="2:5"), dict(sparsity={"ears": 0.5}),
                 dict(sparsity=0.5, pattern="2:4"), dict(), dict(sparsity=0.5, method="none")):
        with pytest.raises(ValueError): prune(model, batch, progress=False, **wish)
    for name, p in model.named_parameters(): assert torch.equal(p, before[name])


def test_training_mode_is_restored(bundled, data):
    model, processor = bundled
    prune(model.train(), calibration_batch(data[0], processor, n=4), sparsity=0.5, progress=False)
    assert model.training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_gpu_prunes_the_same_weights(data):
    from ressa.bundled import load_bundled
    masks = []
    for device in ("cpu", "cuda"):
        model, processor = load_bundled(device)
        prune(model, to_device(calibration_batch(data[0], processor, n=16), device), sparsity=0.6, progress=False)
        masks.append(torch.cat([(m.weight != 0).flatten().cpu() for m in layers_of(model).values()]))
    assert (masks[0] == masks[1]).float().mean() > 0.999
