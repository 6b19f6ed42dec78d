"""The rules of allocation on whole models: budgets, refusals, and what they measure."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ressa import (
    Statistics,
    by_modality,
    calibration_batch,
    ecoflap,
    load_bundled,
    owl,
    prune,
    uniform,
)
from ressa.allocation.budgets import (
    achieved_sparsity,
    allocate,
    layer_groups,
    shapes_of,
    zeros_by_part,
)
from ressa.allocation.rules import (
    calibration_loss,
    outlier_share,
    proportional_sparsity,
    random_slope,
)


@pytest.fixture(scope="module")
def ready(data):
    model, processor = load_bundled("cpu")
    return model.eval(), calibration_batch(data[0], processor, n=8, seed=0)


RULES = {
    "uniform": lambda model, batch, sparsity, **options: uniform(
        model, sparsity, **options
    ),
    "owl": owl,
    "ecoflap": functools.partial(ecoflap, seed=1, pieces=2),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("sparsity", [0.5, 0.77])
def test_a_rule_meets_its_budget_and_leaves_the_model(ready, rule, sparsity):
    model, batch = ready
    before = [p.clone() for p in model.parameters()]
    shapes = shapes_of(model)
    found = rule(model, batch, sparsity)
    weights = sum(math.prod(shape) for shape in shapes.values())
    half_step = max(rows for rows, _ in shapes.values()) / 2
    assert abs(achieved_sparsity(found, shapes) - sparsity) * weights <= half_step
    assert found == rule(model, batch, sparsity)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))

    pruned, _ = load_bundled("cpu")
    report = prune(pruned, batch, sparsity=found, progress=False)
    zeros = sum(layer.sparsity * math.prod(layer.shape) for layer in report.layers)
    assert round(zeros) == zeros_by_part(model, found)["all"]["zeros"]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_impossible_budgets_are_refused_by_name(ready, rule):
    model, batch = ready
    with pytest.raises(ValueError, match="sparsity=0.9 cannot be met"):
        rule(model, batch, 0.9, max_sparsity=0.9, fixed={"vision": 0.5})
    with pytest.raises(ValueError, match="no layer matches"):
        rule(model, batch, 0.5, fixed={"langauge": 0.5})
    with pytest.raises(ValueError, match="width divisible by 7"):
        rule(model, batch, 0.5, m=7)


def test_by_modality(ready):
    model, _ = ready
    found = by_modality(model, vision=0.7, language="2:4", interface=0.3)
    table = zeros_by_part(model, found)
    assert table["vision"]["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert table["interface"]["sparsity"] == pytest.approx(0.3, abs=1e-3)
    assert table["language"]["sparsity"] == 0.5
    assert by_modality(model) == {}
    with pytest.raises(ValueError, match="cannot be met"):
        by_modality(model, vision=0.7, max_sparsity=0.6)


def test_outliers_are_counted():
    scale = torch.tensor([1.0, 1.0, 1.0, 30.0])
    stats = Statistics.of(scale[None])
    assert outlier_share([torch.ones(2, 4)], [stats], factor=2) == 0.25
    weights = [torch.randn(3, 4), torch.randn(5, 4)]
    scores = torch.cat(weights).abs() * scale
    want = (scores > 3 * scores.mean()).double().mean().item()
    assert outlier_share(weights, [stats, stats], factor=3) == pytest.approx(want)
    for factor in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="factor"):
            outlier_share(weights, [stats, stats], factor)


def test_owl_prunes_equal_blocks_equally(ready):
    "A factor that no score reaches: no block has an outlier."
    model, batch = ready
    assert owl(model, batch, 0.7, factor=1e6) == uniform(model, 0.7)
    with pytest.raises(ValueError, match="spread"):
        owl(model, batch, 0.7, spread=1.0)


def test_slope_of_a_linear_loss():
    slopes = torch.randn(4, 6, dtype=torch.double)
    weight = torch.randn(4, 6, dtype=torch.double)
    before = weight.clone()
    found = random_slope(
        lambda: (slopes * weight).sum().item(),
        [weight],
        torch.Generator().manual_seed(3),
    )
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).double()
    assert found == pytest.approx((slopes * z).sum().abs().item())
    assert torch.equal(weight, before)


def test_weights_come_back_if_the_loss_fails():
    weight = torch.randn(4, 6)
    before = weight.clone()

    def failing():
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        random_slope(failing, [weight], torch.Generator())
    assert torch.equal(weight, before)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 1000)), min_size=1, max_size=8),
    st.floats(0.05, 0.85),
)
def test_shares_in_proportion(groups, sparsity):
    worth = {number: group[0] for number, group in enumerate(groups)}
    sizes = {number: group[1] for number, group in enumerate(groups)}
    found = proportional_sparsity(worth, sizes, sparsity, max_sparsity=0.9)
    assert all(-1e-9 <= share <= 0.9 + 1e-9 for share in found.values())
    zeros = sum(found[number] * sizes[number] for number in sizes)
    assert zeros == pytest.approx(sparsity * sum(sizes.values()), rel=1e-4)


@pytest.mark.parametrize("rule", [owl, ecoflap])
def test_a_budget_is_refused_before_the_model_runs(ready, monkeypatch, rule):
    model, batch = ready
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(ValueError, match="cannot be met"):
        rule(model, batch, 0.3, fixed={"language": 0.9})


def test_ecoflap_refuses_what_it_cannot_use(ready):
    model, batch = ready
    without_labels = {name: v for name, v in batch.items() if name != "labels"}
    with pytest.raises(ValueError, match="needs labels"):
        ecoflap(model, without_labels, 0.5)
    for option in (dict(pieces=0), dict(step=0.0), dict(step=math.nan)):
        with pytest.raises(ValueError, match=next(iter(option))):
            ecoflap(model, batch, 0.5, **option)
    assert calibration_loss(model, batch) > 0


def test_probing_each_layer_adds_up_the_slopes_of_a_block(ready):
    "A plain loop: the direction of each layer alone, both ways, and the sum by block."
    model, batch = ready
    shapes = shapes_of(model)
    generator = torch.Generator().manual_seed(5)
    worth, sizes, names_of = {}, {}, layer_groups(model, shapes, "block")
    for block, names in names_of.items():
        worth[block] = 0.0
        for name in names:
            weight = model.get_submodule(name).weight
            dense = weight.detach().clone()
            z = torch.randn(weight.shape, generator=generator)
            losses = []
            for shift in (1e-3, -1e-3):
                with torch.no_grad():
                    weight.copy_(dense + shift * z)
                    losses.append(model(**batch).loss.item())
                    weight.copy_(dense)
            worth[block] += abs(losses[0] - losses[1]) / 2e-3
        sizes[block] = sum(math.prod(shapes[name]) for name in names)
    share = proportional_sparsity(worth, sizes, 0.6, 0.7)
    preferred = {
        name: share[block] for block, names in names_of.items() for name in names
    }
    wanted = allocate(model, preferred, 0.6, max_sparsity=0.7)
    found = ecoflap(model, batch, 0.6, pieces=1, seed=5, probe="layer")
    assert found == pytest.approx(wanted)
    assert found != ecoflap(model, batch, 0.6, pieces=1, seed=5)
