"""Pruning a model in one pass, against slow and plain ways to the same result."""

import copy

import pytest
import torch
from torch import nn

from ressa.data.collate import calibration_batch
from ressa.models.bundled import load_bundled
from ressa.parts import modality_map
from ressa.pruning.engine import input_statistics, layer_targets, prune, prune_layers
from ressa.pruning.masks import has_pattern, sparsity_of
from ressa.pruning.passes import before_first_call
from ressa.pruning.scores import wanda
from ressa.pruning.statistics import Statistics


def layers_of(model):
    "The layers that a bare target means: vision and language."
    linears = modality_map(model).linears
    return linears["vision"] | linears["language"]


def masks_of(model):
    "All weights of these layers, True where kept, as one vector."
    return torch.cat([(m.weight != 0).flatten() for m in layers_of(model).values()])


def prune_one_at_a_time(model, batch, sparsity):
    "The slow way: for each layer a whole forward pass of the model as pruned so far."
    mask = batch["attention_mask"].bool()
    order = []

    def note(name, module, x):
        order.append(name)

    with before_first_call(layers_of(model), note), torch.no_grad():
        model(**batch)
    for name in order:
        inputs = []
        module = model.get_submodule(name)
        hook = module.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
        with torch.no_grad():
            model(**batch)
        hook.remove()
        x = inputs[0]
        if x.shape[:-1] == mask.shape:
            x = x[mask]
        stats = Statistics.of(x)
        module.weight.data = wanda(module.weight.data, stats, sparsity=sparsity)


def test_one_pass_equals_one_pass_per_layer(bundled, data):
    model, processor = bundled
    slow = copy.deepcopy(model)
    batch = calibration_batch(data[0], processor, n=16)
    prune_one_at_a_time(slow, batch, 0.6)
    prune(model, batch, sparsity=0.6, progress=False)
    for (name, a), b in zip(layers_of(model).items(), layers_of(slow).values()):
        assert torch.equal(a.weight, b.weight), name


def test_layers_that_share_an_input_share_its_statistics(bundled, data, monkeypatch):
    model, processor = bundled
    calls = []
    original = Statistics.of.__func__

    def counting(cls, x, **options):
        calls.append(x.shape)
        return original(cls, x, **options)

    monkeypatch.setattr(Statistics, "of", classmethod(counting))
    batch = calibration_batch(data[0], processor, n=4)
    report = prune(model, batch, sparsity=0.5, progress=False)
    # A Llama block has four inputs for its seven layers: query, key and value share one,
    # and so do gate and up.
    assert len(report.layers) == 12 + 21
    assert len(calls) == 12 + 3 * 4


def test_padding_does_not_count(bundled, data):
    model, processor = bundled
    other = copy.deepcopy(model)
    batch = calibration_batch(data[0], processor, n=4)
    padded = dict(batch)
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        padded[name] = nn.functional.pad(batch[name], (0, 5), value=fill)
    report = prune(model, batch, sparsity=0.5, progress=False)
    of_padded = prune(other, padded, sparsity=0.5, progress=False)
    assert [line.tokens for line in report.layers] == [
        line.tokens for line in of_padded.layers
    ]
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits(data, dtype):
    model, processor = load_bundled("cpu", dtype=dtype)
    batch = calibration_batch(data[0], processor, n=4)
    report = prune(model, batch, pattern="2:4", progress=False)
    for layer in layers_of(model).values():
        assert layer.weight.dtype == dtype
        assert has_pattern(layer.weight, "2:4")
        assert not torch.signbit(layer.weight[layer.weight == 0]).any()
    assert all(abs(line.sparsity - 0.5) < 0.01 for line in report.layers)


def test_targets_by_part_layer_and_pattern(bundled, data):
    model, processor = bundled
    first = "vision_model.encoder.layers.0.mlp.fc1"
    targets = {"vision": 0.25, first: 0.75, r"language_model.*mlp.*": "1:4"}
    batch = calibration_batch(data[0], processor, n=4)
    prune(model, batch, sparsity=targets, progress=False)
    layers = layers_of(model)
    block = "language_model.model.layers.1"
    assert sparsity_of(layers[first].weight) == 0.75
    assert sparsity_of(layers["vision_model.encoder.layers.1.mlp.fc1"].weight) == 0.25
    assert has_pattern(layers[f"{block}.mlp.up_proj"].weight, "1:4")
    assert sparsity_of(layers[f"{block}.self_attn.q_proj"].weight) == 0


def test_layers_of_one_group_may_have_different_targets(bundled, data):
    model, processor = bundled
    attention = "language_model.model.layers.0.self_attn"
    targets = {f"{attention}.q_proj": 0.25, f"{attention}.[kv]_proj": 0.75}
    batch = calibration_batch(data[0], processor, n=4)
    prune(model, batch, "sparsegpt", sparsity=targets, progress=False)
    layers = layers_of(model)
    key, value = (layers[f"{attention}.{name}_proj"].weight for name in "kv")
    assert sparsity_of(layers[f"{attention}.q_proj"].weight) == 0.25
    assert sparsity_of(torch.cat([key, value])) == 0.75


def test_targets_are_resolved_to_layers(bundled):
    parts = modality_map(bundled[0])
    targets = layer_targets(parts, {"vision": 0.7, "language": "2:4"})
    assert targets == {
        **dict.fromkeys(parts.linears["vision"], 0.7),
        **dict.fromkeys(parts.linears["language"], "2:4"),
    }
    assert layer_targets(parts, pattern="2:4") == layer_targets(parts, "2:4")


def test_what_cannot_be_judged_is_left_dense_and_named(bundled, data):
    model, processor = bundled
    batch = calibration_batch(data[0], processor, n=4)
    blocks = model.language_model.model.layers
    blocks[1].mlp.gate_proj.weight.data[0, 0] = float("inf")
    before = copy.deepcopy(blocks[2].state_dict())
    with pytest.warns(UserWarning, match="left dense"):
        report = prune(model, batch, sparsity={"language": 0.5}, progress=False)
    name = "language_model.model.layers"
    weight, inputs = f"{name}.1.mlp.gate_proj", f"{name}.2.mlp.up_proj"
    assert report.left_dense[weight] == "its weight holds NaN or infinity"
    assert report.left_dense[inputs] == "its inputs hold NaN or infinity"
    for key, value in blocks[2].state_dict().items():
        assert torch.equal(value, before[key])


class Experts(nn.Module):
    "Two experts, and one that is never asked. An example's first entry decides for one."

    def __init__(self):
        super().__init__()
        self.positive, self.negative, self.unused = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        out = torch.zeros_like(x)
        for sign, expert in ((1, self.positive), (-1, self.negative)):
            chosen = x[:, 0] * sign > 0
            if chosen.any():
                out[chosen] = expert(x[chosen])
        return out


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Experts()])

    def forward(self, x):
        return self.layers[0](x)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize(
    "options",
    [{}, {"micro_batch": 3}, {"micro_batch": 3, "recompute": "block"}]
    + [{"dense_statistics": True}],
    ids=["in flight", "pieces", "blocks", "dense"],
)
def test_layers_that_only_some_examples_reach(method, options):
    "Groups are found on the first example alone; it reaches one expert."
    x = torch.randn(8, 4)
    x[:, 0] = torch.tensor([1.0, -1.0] * 4)
    model = Mixture()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    targets = dict.fromkeys(layers, 0.5)
    batch = {"x": x}
    report = prune_layers(
        model, batch, layers, targets, method, progress=False, **options
    )
    tokens = {line.name: line.tokens for line in report.layers}
    assert tokens == {"layers.0.positive": 4, "layers.0.negative": 4}
    assert report.left_dense == {"layers.0.unused": "no calibration token reached it"}


def test_nothing_changes_when_an_argument_is_invalid(bundled, data):
    model, processor = bundled
    before = {name: p.clone() for name, p in model.named_parameters()}
    batch = calibration_batch(data[0], processor, n=4)
    for wrong, message in (
        (dict(sparsity=1.0), "sparsity must be in"),
        (dict(sparsity=-0.1), "sparsity must be in"),
        (dict(pattern="2:5"), "divisible by 5"),
        (dict(sparsity={"ears": 0.5}), "no layer matches 'ears'"),
        (dict(sparsity=0.5, pattern="2:4"), "exactly one of sparsity and pattern"),
        (dict(), "exactly one of sparsity and pattern"),
        (dict(sparsity=0.5, method="none"), "method must be one of"),
        (dict(sparsity=0.5, micro_batch=0), "micro_batch must be 1 or more"),
        (dict(sparsity=0.5, micro_batch=1.5), "micro_batch must be 1 or more"),
        (dict(sparsity={}), "sparsity names nothing to prune"),
        (dict(sparsity=0.5, recompute="layer"), "recompute must be 'group' or 'block'"),
        (
            dict(sparsity=0.5, micro_batch=2, dense_statistics=True),
            "leave micro_batch out",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            prune(model, batch, progress=False, **wrong)
    with pytest.raises(ValueError, match="batch must have a name for each tensor"):
        prune(model, [batch], sparsity=0.5)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_gpu_prunes_the_same_weights(data):
    masks = []
    for device in ("cpu", "cuda"):
        model, processor = load_bundled(device)
        batch = calibration_batch(data[0], processor, n=16)
        prune(model, batch, sparsity=0.6, progress=False)
        masks.append(masks_of(model).cpu())
    assert (masks[0] == masks[1]).float().mean() > 0.999


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "ria+dsnot"])
@pytest.mark.parametrize("micro_batch", [1, 5, 16])
def test_in_pieces_the_same_weights_are_pruned(data, method, micro_batch):
    masks = []
    for options in ({}, {"micro_batch": micro_batch}):
        model, processor = load_bundled("cpu")
        batch = calibration_batch(data[0], processor, n=16)
        report = prune(model, batch, method, sparsity=0.6, progress=False, **options)
        assert len(report.layers) == 33
        masks.append(masks_of(model))
    assert (masks[0] != masks[1]).float().mean() <= 1e-3  # near ties


def test_block_by_block_differs_a_little_and_prunes_all(bundled, data):
    model, processor = bundled
    other, _ = load_bundled("cpu")
    batch = calibration_batch(data[0], processor, n=16)
    prune(model, batch, sparsity=0.6, progress=False)
    by_block = {"micro_batch": 4, "recompute": "block"}
    report = prune(other, batch, sparsity=0.6, progress=False, **by_block)
    assert len(report.layers) == 33
    assert 0 < (masks_of(model) != masks_of(other)).float().mean() < 0.05


def test_dense_statistics_is_pruning_on_the_dense_models_inputs(bundled, data):
    model, processor = bundled
    batch = calibration_batch(data[0], processor, n=8)
    statistics = input_statistics(model, batch)
    mask = batch["attention_mask"].bool()
    wanted = {}

    def note(name, module, x):
        x = x[mask] if x.shape[:-1] == mask.shape else x
        assert torch.equal(Statistics.of(x).norm, statistics[name].norm)
        wanted[name] = wanda(module.weight.data, Statistics.of(x), sparsity=0.6)

    with before_first_call(layers_of(model), note), torch.no_grad():
        model(**batch)
    prune(model, batch, sparsity=0.6, progress=False, dense_statistics=True)
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.weight, wanted[name]), name


def test_statistics_are_those_that_the_method_needs(bundled, data):
    model, processor = bundled
    batch = calibration_batch(data[0], processor, n=4)
    for method, mean, gram in (("wanda", False, False), ("sparsegpt", False, True)):
        for stats in input_statistics(model, batch, method).values():
            assert (stats.mean is not None, stats.gram is not None) == (mean, gram)


def test_layers_outside_blocks_are_pruned_in_pieces_too(bundled, data):
    model, processor = bundled
    batch = calibration_batch(data[0], processor, n=8)
    targets = {"interface": 0.5, "vision": 0.5}
    report = prune(model, batch, sparsity=targets, progress=False, micro_batch=3)
    assert not report.left_dense
    assert sparsity_of(model.language_projection.weight) == 0.5


def test_sparsegpt_prunes_a_group_as_one_tall_weight(bundled, data):
    model, processor = bundled
    batch = calibration_batch(data[0], processor, n=16)
    prune(model, batch, "sparsegpt", sparsity={"language": 0.5}, progress=False)
    attention = model.language_model.model.layers[0].self_attn
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    sparsities = [sparsity_of(layer.weight) for layer in layers]
    assert abs(sum(sparsities) / 3 - 0.5) < 1e-6
    assert max(sparsities) - min(sparsities) > 0.01


def test_training_mode_and_cache_are_restored(bundled, data):
    model, processor = bundled
    batch = calibration_batch(data[0], processor, n=4)
    prune(model.train(), batch, sparsity=0.5, progress=False)
    assert model.training
    assert model.language_model.config.use_cache


def test_the_model_is_as_it_was_even_after_an_error(bundled, data):
    model, processor = bundled
    batch = calibration_batch(data[0], processor, n=4)

    def broken(weight, stats, **options):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        prune(model, batch, broken, sparsity=0.5, progress=False, micro_batch=2)
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks
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
        self.tower = PackedTower()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])

    def forward(self, input_ids, patches):
        h = self.tower(patches).mean(0) + nn.functional.one_hot(input_ids, 4).float()
        for layer in self.layers:
            h = layer(h)
        return h


def test_a_tower_without_examples_is_given_everything_at_once():
    batch = {"input_ids": torch.randint(0, 4, (6, 3)), "patches": torch.randn(17, 4)}
    whole, cut = PackedModel(), PackedModel()
    cut.load_state_dict(whole.state_dict())
    for model, options in ((whole, {}), (cut, {"micro_batch": 2})):
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        targets = dict.fromkeys(layers, 0.5)
        report = prune_layers(model, batch, layers, targets, progress=False, **options)
        assert len(report.layers) == 4
    for a, b in zip(whole.parameters(), cut.parameters()):
        assert torch.equal(a, b)


# Compared within rows, or over the layer


def lowest_are_zero(score, share):
    "What of a score (out, in) is pruned, one row of it after the other, by sorting."
    pruned = torch.zeros_like(score, dtype=torch.bool)
    for row, scores in enumerate(score):
        lowest = scores.sort().indices[: int(share * len(scores) + 1e-9)]
        pruned[row, lowest] = True
    return pruned


def test_vision_by_layer_and_language_by_row(bundled, data):
    model, processor = bundled
    model = copy.deepcopy(model)
    batch = calibration_batch(data[0], processor, n=8)
    stats = input_statistics(model, batch)
    linears = modality_map(model).linears
    wanted = {}
    for name, layer in linears["vision"].items():
        score = layer.weight.detach().abs() * stats[name].norm
        flat = lowest_are_zero(score.reshape(1, -1), 0.6)
        wanted[name] = flat.reshape(score.shape)
    for name, layer in linears["language"].items():
        score = layer.weight.detach().abs() * stats[name].norm
        wanted[name] = lowest_are_zero(score, 0.6)
    prune(
        model,
        batch,
        sparsity=0.6,
        group={"vision": "layer", "language": "row"},
        dense_statistics=True,
        progress=False,
    )
    for name, pruned in wanted.items():
        assert torch.equal(model.get_submodule(name).weight == 0, pruned), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "column"}, "group must be 'row' or 'layer'"),
        ({"group": {"hearing": "row"}}, "hearing"),
        ({"group": "row", "method": "sparsegpt"}, "leave group out"),
    ],
)
def test_groups_that_do_not_fit_are_refused_before(bundled, data, options, message):
    model, processor = bundled
    batch = calibration_batch(data[0], processor, n=2)
    before = masks_of(model)
    with pytest.raises(ValueError, match=message):
        prune(model, batch, sparsity=0.5, progress=False, **options)
    assert torch.equal(masks_of(model), before)


def test_published_dsnot_sees_examples_without_their_padding(bundled, data):
    model, processor = bundled
    batch = calibration_batch(data[0], processor, n=6)
    stats = input_statistics(model, batch, "dsnot-published")
    name, layer = next(iter(modality_map(model).linears["language"].items()))
    seen = []
    hook = layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    kept = batch["attention_mask"].bool()
    examples = [row[mask] for row, mask in zip(seen[0], kept)]
    variances = [len(x) * x.var(0, correction=0) for x in examples]
    wanted = sum(variances) / sum(map(len, examples))
    assert stats[name].examples == 6
    assert torch.allclose(stats[name].var_within, wanted, rtol=1e-4, atol=1e-6)
    micro = copy.deepcopy(model), copy.deepcopy(model)
    for copied, options in zip(micro, ({"micro_batch": 2}, {"micro_batch": 6})):
        prune(copied, batch, "dsnot-published", sparsity=0.5, progress=False, **options)
    equal = masks_of(micro[0]) == masks_of(micro[1])
    assert equal.float().mean() > 0.999  # sums in another order
