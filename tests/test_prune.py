"""Pruning in flight, against slow and plain ways to the same result."""

import copy

import pytest
import torch
from torch import nn

from ressa.data.collate import calibration_batch
from ressa.devices import to_device
from ressa.parts import modality_map
from ressa.pruning.engine import prune
from ressa.pruning.masks import has_pattern, sparsity_of
from ressa.pruning.passes import before_first_call
from ressa.pruning.scores import wanda
from ressa.pruning.statistics import Statistics


def layers_of(model):
    linears = modality_map(model).linears
    return linears["vision"] | linears["language"]


def one_at_a_time(model, batch, sparsity):
    "The slow way: for each layer a whole forward pass of the model as pruned so far."
    mask, order = batch["attention_mask"].bool(), []
    with (
        before_first_call(layers_of(model), lambda name, *_: order.append(name)),
        torch.no_grad(),
    ):
        model(**batch)
    for name in order:
        caught = []
        module = model.get_submodule(name)
        hook = module.register_forward_pre_hook(
            lambda m, inputs: caught.append(inputs[0])
        )
        with torch.no_grad():
            model(**batch)
        hook.remove()
        x = caught[0]
        if x.shape[:-1] == mask.shape:
            x = x[mask]
        module.weight.data = wanda(
            module.weight.data, Statistics.of(x), sparsity=sparsity
        )
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
    monkeypatch.setattr(
        Statistics,
        "of",
        classmethod(lambda cls, x, **k: seen.append(1) or original(cls, x, **k)),
    )
    report = prune(
        model, calibration_batch(data[0], processor, n=4), sparsity=0.5, progress=False
    )
    # each Llama block: q, k, v share one input and gate, up another: four inputs for seven layers
    assert len(report.layers) == 12 + 21 and len(seen) == 12 + 3 * 4


def test_padding_does_not_count(bundled, data):
    model, processor = bundled
    rows = calibration_batch(data[0], processor, n=4)
    padded = dict(rows)
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        padded[name] = nn.functional.pad(rows[name], (0, 5), value=fill)
    other = copy.deepcopy(model)
    reports = [
        prune(m, b, sparsity=0.5, progress=False)
        for m, b in ((model, rows), (other, padded))
    ]
    assert [line.tokens for line in reports[0].layers] == [
        line.tokens for line in reports[1].layers
    ]
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits(data, dtype):
    from ressa.models.bundled import load_bundled

    model, processor = load_bundled("cpu", dtype=dtype)
    report = prune(
        model, calibration_batch(data[0], processor, n=4), pattern="2:4", progress=False
    )
    for layer in layers_of(model).values():
        assert layer.weight.dtype == dtype and has_pattern(layer.weight, "2:4")
        assert not torch.signbit(layer.weight[layer.weight == 0]).any()
    assert all(abs(line.sparsity - 0.5) < 0.01 for line in report.layers)


def test_targets_by_part_layer_and_pattern(bundled, data):
    model, processor = bundled
    name = "vision_model.encoder.layers.0.mlp.fc1"
    prune(
        model,
        calibration_batch(data[0], processor, n=4),
        progress=False,
        sparsity={"vision": 0.25, name: 0.75, r"language_model.*mlp.*": "1:4"},
    )
    layers = layers_of(model)
    assert sparsity_of(layers[name].weight) == 0.75
    assert sparsity_of(layers["vision_model.encoder.layers.1.mlp.fc1"].weight) == 0.25
    assert has_pattern(
        layers["language_model.model.layers.1.mlp.up_proj"].weight, "1:4"
    )
    assert (
        sparsity_of(layers["language_model.model.layers.1.self_attn.q_proj"].weight)
        == 0
    )


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
    with before_first_call(
        {"shared": shared}, lambda name, module, x: calls.append(name)
    ):
        shared(shared(torch.randn(3, 4)))
    assert calls == ["shared"]


def test_nothing_changes_when_the_wish_is_impossible(bundled, data):
    model, processor = bundled
    before = {name: p.clone() for name, p in model.named_parameters()}
    batch = calibration_batch(data[0], processor, n=4)
    for wish in (
        dict(sparsity=1.0),
        dict(sparsity=-0.1),
        dict(pattern="2:5"),
        dict(sparsity={"ears": 0.5}),
        dict(sparsity=0.5, pattern="2:4"),
        dict(),
        dict(sparsity=0.5, method="none"),
    ):
        with pytest.raises(ValueError):
            prune(model, batch, progress=False, **wish)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_training_mode_is_restored(bundled, data):
    model, processor = bundled
    prune(
        model.train(),
        calibration_batch(data[0], processor, n=4),
        sparsity=0.5,
        progress=False,
    )
    assert model.training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_gpu_prunes_the_same_weights(data):
    from ressa.models.bundled import load_bundled

    masks = []
    for device in ("cpu", "cuda"):
        model, processor = load_bundled(device)
        prune(
            model,
            to_device(calibration_batch(data[0], processor, n=16), device),
            sparsity=0.6,
            progress=False,
        )
        masks.append(
            torch.cat(
                [(m.weight != 0).flatten().cpu() for m in layers_of(model).values()]
            )
        )
    assert (masks[0] == masks[1]).float().mean() > 0.999


def mask_of(model):
    return torch.cat([(m.weight != 0).flatten() for m in layers_of(model).values()])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "ria+dsnot"])
@pytest.mark.parametrize("micro_batch", [1, 5, 16])
def test_in_pieces_the_same_weights_fall(data, method, micro_batch):
    from ressa.models.bundled import load_bundled

    masks = []
    for options in ({}, dict(micro_batch=micro_batch)):
        model, processor = load_bundled("cpu")
        report = prune(
            model,
            calibration_batch(data[0], processor, n=16),
            method,
            sparsity=0.6,
            progress=False,
            **options,
        )
        assert len(report.layers) == 33
        masks.append(mask_of(model))
    assert (masks[0] != masks[1]).float().mean() <= 1e-3


def test_block_by_block_differs_a_little_and_prunes_all(bundled, data):
    from ressa.models.bundled import load_bundled

    model, processor = bundled
    batch, other = calibration_batch(data[0], processor, n=16), load_bundled("cpu")[0]
    prune(model, batch, sparsity=0.6, progress=False)
    report = prune(
        other, batch, sparsity=0.6, progress=False, micro_batch=4, recompute="block"
    )
    assert (
        len(report.layers) == 33
        and 0 < (mask_of(model) != mask_of(other)).float().mean() < 0.05
    )


def test_dense_statistics_is_pruning_on_the_dense_models_inputs(bundled, data):
    model, processor = bundled
    batch = calibration_batch(data[0], processor, n=8)
    want, mask = {}, batch["attention_mask"].bool()

    def note(name, module, x):
        x = x[mask] if x.shape[:-1] == mask.shape else x
        want[name] = wanda(module.weight.data, Statistics.of(x), sparsity=0.6)

    with before_first_call(layers_of(model), note), torch.no_grad():
        model(**batch)
    prune(model, batch, sparsity=0.6, progress=False, dense_statistics=True)
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.weight, want[name]), name


def test_layers_outside_blocks_are_pruned_in_pieces_too(bundled, data):
    model, processor = bundled
    report = prune(
        model,
        calibration_batch(data[0], processor, n=8),
        sparsity={"interface": 0.5, "vision": 0.5},
        progress=False,
        micro_batch=3,
    )
    assert (
        not report.left_dense and sparsity_of(model.language_projection.weight) == 0.5
    )


def test_sparsegpt_prunes_a_group_as_one_tall_weight(bundled, data):
    model, processor = bundled
    prune(
        model,
        calibration_batch(data[0], processor, n=16),
        "sparsegpt",
        sparsity={"language": 0.5},
        progress=False,
    )
    attention = model.language_model.model.layers[0].self_attn
    parts = [
        sparsity_of(m.weight)
        for m in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    assert abs(sum(parts) / 3 - 0.5) < 1e-6 and max(parts) - min(parts) > 0.01


def test_weights_that_accelerate_keeps_on_the_cpu_are_pruned(bundled, data):
    from accelerate import cpu_offload

    model, processor = bundled
    batch, want = calibration_batch(data[0], processor, n=4), copy.deepcopy(model)
    prune(want, batch, sparsity=0.5, progress=False)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.language_projection.weight.device.type == "meta"
    prune(model, batch, sparsity=0.5, progress=False)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, want(**batch).logits)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(micro_batch=0),
        dict(micro_batch=2, recompute="layer"),
        dict(micro_batch=2, dense_statistics=True),
    ],
)
def test_ways_that_are_not_there(bundled, data, wrong):
    model, processor = bundled
    with pytest.raises(
        ValueError, match=next(iter(wrong)) if len(wrong) == 1 else list(wrong)[1]
    ):
        prune(
            model,
            calibration_batch(data[0], processor, n=4),
            sparsity=0.5,
            progress=False,
            **wrong,
        )


def test_the_model_is_as_it_was_even_after_an_error(bundled, data):
    model, processor = bundled

    def broken(weight, stats, **options):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        prune(
            model,
            calibration_batch(data[0], processor, n=4),
            broken,
            sparsity=0.5,
            progress=False,
            micro_batch=2,
        )
    assert all(
        "forward" not in vars(m) and not m._forward_pre_hooks for m in model.modules()
    )
    assert model.language_model.config.use_cache


class PackedTower(nn.Module):
    "Images of different size in one long row: the first axis counts patches, as in Qwen's vision tower."

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, patches):
        return self.blocks[1](self.blocks[0](patches))


class PackedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower, self.layers = (
            PackedTower(),
            nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)]),
        )

    def forward(self, input_ids, patches):
        h = self.tower(patches).mean(0) + nn.functional.one_hot(input_ids, 4).float()
        for layer in self.layers:
            h = layer(h)
        return h


def test_a_tower_without_rows_is_given_everything_at_once():
    from ressa.pruning.engine import prune_layers

    batch = {"input_ids": torch.randint(0, 4, (6, 3)), "patches": torch.randn(17, 4)}
    whole, cut = PackedModel(), PackedModel()
    cut.load_state_dict(whole.state_dict())
    for model, options in ((whole, {}), (cut, dict(micro_batch=2))):
        layers = {
            name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)
        }
        report = prune_layers(
            model, batch, layers, dict.fromkeys(layers, 0.5), progress=False, **options
        )
        assert len(report.layers) == 4
    for a, b in zip(whole.parameters(), cut.parameters()):
        assert torch.equal(a, b)
