"""The rules of allocation on whole models: budgets, refusals, and what they measure."""

import copy
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_models import alone as odd_alone
from odd_models import odd

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
from ressa.allocation import rules
from ressa.allocation.budgets import (
    achieved_sparsity,
    allocate,
    layer_groups,
    shapes_of,
    zeros_by_part,
)
from ressa.allocation.rules import (
    calibration_loss,
    loss_pieces,
    outlier_share,
    proportional_sparsity,
    random_slope,
)
from ressa.allocation.search import TrialModel, search


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


# --- rows with several pictures or none, and layers that they do not reach

OF_THREE_ROWS = ["DeepseekVL", "Glm4v", "Florence-2", "ViT and GPT-2"]
RULES_ON_ROWS = {
    "owl": owl,
    "ecoflap": ecoflap,
    "search": functools.partial(search, by="part", steps=4),
}


@pytest.mark.parametrize("name", OF_THREE_ROWS)
def test_ecoflap_cuts_rows_out_with_their_pictures(name):
    model, batch = odd(name)
    pieces = loss_pieces(model, batch, 3)
    assert [len(piece["labels"]) for piece in pieces] == [1, 1, 1]
    for i, piece in enumerate(pieces):
        alone = calibration_loss(model, odd_alone(batch, i))
        assert calibration_loss(model, piece) == pytest.approx(alone, rel=1e-4)


def test_rows_that_cannot_be_cut_out_have_their_own_labels():
    "Pictures of different size, whose places are no share of the tokens."
    model, batch = odd("Video-LLaVA")
    pieces = loss_pieces(model, batch, 3)
    for i, piece in enumerate(pieces):
        labels = piece["labels"]
        assert len(labels) == 3
        assert [bool((row != -100).any()) for row in labels] == [
            j == i for j in range(3)
        ]
        alone = calibration_loss(model, odd_alone(batch, i))
        assert calibration_loss(model, piece) == pytest.approx(alone, rel=1e-4)


def test_a_wrong_cut_is_noticed_by_its_loss(monkeypatch):
    model, batch = odd("DeepseekVL")
    examples = rules.examples_between

    def with_others_pictures(batch, start, end, token):
        piece = examples(batch, start, end, token)
        if "pixel_values" in piece:
            piece["pixel_values"] = piece["pixel_values"] + 1.0
        return piece

    monkeypatch.setattr(rules, "examples_between", with_others_pictures)
    assert [len(piece["labels"]) for piece in loss_pieces(model, batch, 3)] == [3, 3, 3]


def test_a_model_without_picture_tokens_falls_back_on_the_whole_batch(monkeypatch):
    "If no cut is accepted, each piece is the whole batch with the labels of a few."
    model, batch = odd("DeepseekVL")
    monkeypatch.setattr(rules, "picture_token_of", lambda model: None)
    monkeypatch.setattr(rules, "examples_between", lambda *_: None)
    losses = iter([1.0, 2.0, 3.0, 4.0])  # of the whole batch, and of a wrong cut
    monkeypatch.setattr(rules, "calibration_loss", lambda *_: next(losses))
    assert [len(piece["labels"]) for piece in loss_pieces(model, batch, 3)] == [3, 3, 3]


def test_rows_without_labels_drop_out():
    model, batch = odd("DeepseekVL")
    batch["labels"][1] = -100
    assert len(loss_pieces(model, batch, 3)) == 2
    batch["labels"][:] = -100
    for rule in (ecoflap, RULES_ON_ROWS["search"]):
        with pytest.raises(ValueError, match="all -100"):
            rule(model, batch, 0.5)


@pytest.mark.parametrize("rule", RULES_ON_ROWS)
def test_layers_that_no_row_reaches_are_named_unless_they_are_set(rule):
    model, batch = odd("DeepseekVL")
    text_alone = odd_alone(batch, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=f"{rule} cannot judge 12 layers.*vision_model"
    ):
        RULES_ON_ROWS[rule](model, text_alone, 0.3)
    found = RULES_ON_ROWS[rule](
        model, text_alone, 0.3, fixed={"vision": 0.0}, max_sparsity=0.9
    )
    assert achieved_sparsity(found, shapes_of(model)) == pytest.approx(0.3, abs=5e-3)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_a_part_without_layers_is_an_error():
    model, _ = odd("Donut")
    with pytest.raises(ValueError, match="interface part has no linear layer"):
        by_modality(model, interface=0.5)


def test_a_search_has_the_loss_of_the_model_where_its_decoder_shifts_labels_again():
    model, batch = odd("ViT and GPT-2")
    trial = TrialModel(model, batch)
    assert not trial.from_language_alone
    assert trial.loss({}) == calibration_loss(model, batch)
    assert TrialModel(*odd("DeepseekVL")).from_language_alone


@pytest.mark.parametrize("rule", RULES_ON_ROWS)
def test_modes_are_as_before(rule):
    model, batch = odd("DeepseekVL")
    model.train()
    RULES_ON_ROWS[rule](model, batch, 0.3)
    assert all(module.training for module in model.modules())
