"""The search meets its budget, is never worse than uniform, and leaves the model as it was."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from ressa import calibration_batch, load_bundled, modality_map, prune, search, uniform
from ressa.allocation.budgets import achieved_sparsity, shapes_of, zeros_by_part
from ressa.allocation.rules import calibration_loss
from ressa.allocation.search import (
    TrialModel,
    before_language,
    cheapest_first,
    language_with_head,
)
from ressa.pruning.masks import has_pattern


def copies(model):
    return [p.clone() for p in model.parameters()]


@pytest.fixture(scope="module")
def ready(data):
    model, processor = load_bundled("cpu")
    return model.eval(), calibration_batch(data[0], processor, n=8, seed=0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(0.01, 5), min_size=4, max_size=4), min_size=2, max_size=3
    ),
    st.integers(0, 8),
)
def test_greedy_is_best_where_losses_are_convex(slopes, wanted):
    "Separate convex losses and equal steps: the greedy choice is the best of all."
    curves = [[0, *itertools.accumulate(sorted(rises))] for rises in slopes]
    wanted = min(wanted, 4 * len(curves))

    def loss(counts):
        return sum(curves[group][count] for group, count in counts.items())

    groups = range(len(curves))
    found = cheapest_first(
        loss, dict.fromkeys(groups, 1), dict.fromkeys(groups, 0), wanted, limit=4
    )
    every_choice = (
        dict(enumerate(counts))
        for counts in itertools.product(range(5), repeat=len(curves))
        if sum(counts) == wanted
    )
    assert sum(found.values()) == wanted
    assert loss(found) == pytest.approx(min(map(loss, every_choice)))


def test_a_group_stops_at_its_limit():
    found = cheapest_first(
        lambda counts: counts["b"], dict(a=1, b=1), dict(a=0, b=0), wanted=9, limit=3
    )
    assert found == dict(a=3, b=3)


@pytest.mark.slow
def test_search_is_better_than_uniform_and_leaves_the_model(ready):
    model, batch = ready
    before = copies(model)
    even = uniform(model, 0.75)
    found = search(model, batch, 0.75, steps=8)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    with TrialModel(model, batch) as trial:
        assert trial.loss(found) < trial.loss(even)
    zeros = [zeros_by_part(model, each)["all"]["zeros"] for each in (found, even)]
    assert zeros[0] == zeros[1]


def test_search_by_part(ready):
    model, batch = ready
    found = search(model, batch, 0.75, by="part", steps=16)
    assert found == search(model, batch, 0.75, by="part", steps=16)
    shapes = shapes_of(model)
    half_step = max(rows for rows, _ in shapes.values()) / 2
    weights = sum(math.prod(shape) for shape in shapes.values())
    assert abs(achieved_sparsity(found, shapes) - 0.75) * weights <= half_step


def test_search_with_a_mixture(ready):
    "Language is 2:4 already, and vision is searched among N:8 patterns."
    model, batch = ready
    found = search(model, batch, 0.55, by="block", m=8, fixed={"language": "2:4"})
    pruned, _ = load_bundled("cpu")
    linears = modality_map(pruned).linears
    assert all(found[name] == "2:4" for name in linears["language"])
    assert abs(zeros_by_part(model, found)["all"]["sparsity"] - 0.55) < 0.01
    prune(pruned, batch, sparsity=found, progress=False)
    for name, layer in linears["vision"].items():
        assert has_pattern(layer.weight, found[name])


def test_search_refuses_before_it_tries(ready, monkeypatch):
    model, batch = ready
    monkeypatch.setattr(TrialModel, "__init__", None)  # a trial would fail
    with pytest.raises(ValueError, match="cannot be met"):
        search(model, batch, 0.3, fixed={"language": 0.9})
    with pytest.raises(ValueError, match="by must be"):
        search(model, batch, 0.5, by="head")
    with pytest.raises(ValueError, match="steps must be"):
        search(model, batch, 0.5, steps=1)
    with pytest.raises(ValueError, match="start must be"):
        search(model, batch, 0.5, start=-0.1)


def test_the_model_is_dense_again_when_a_trial_fails(ready):
    model, batch = ready
    before = copies(model)
    with pytest.raises(ValueError), TrialModel(model, batch) as trial:
        trial.apply(uniform(model, 0.5))
        trial.apply(dict.fromkeys(shapes_of(model), 2.0))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_a_trial_has_the_loss_of_the_pruned_model(ready):
    "Also one that changes only language, after one that changed the front too."
    model, batch = ready
    allocations = [
        uniform(model, 0.6),
        uniform(model, 0.6)
        | dict.fromkeys(modality_map(model).linears["language"], 0.3),
        {},
    ]
    with TrialModel(model, batch) as trial:
        for allocation in allocations:
            found = trial.loss(allocation)
            pruned, _ = load_bundled("cpu")
            if allocation:
                options = dict(dense_statistics=True, progress=False)
                prune(pruned, batch, sparsity=allocation, **options)
            assert found == pytest.approx(
                calibration_loss(pruned.eval(), batch), rel=1e-5
            )


def test_loss_from_the_language_model_on_is_the_loss(ready):
    model, batch = ready
    language, inputs = before_language(model, batch)
    assert language is model.language_model
    assert calibration_loss(language, inputs) == pytest.approx(
        calibration_loss(model, batch), abs=1e-7
    )


def tiny_llava():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    text = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=39)
    ).eval()
    ids = torch.randint(1, 38, (6, 10))
    ids[:, :4] = 39
    batch = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.randn(6, 3, 16, 16),
        labels=ids,
    )
    return model, batch


def test_a_model_whose_head_lies_outside_its_language_part():
    model, batch = tiny_llava()
    assert language_with_head(model) is None
    assert before_language(model, batch)[0] is model
    before = copies(model)
    shapes = shapes_of(model)
    found = search(model, batch, 0.6, by="block", steps=8)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    weights = sum(math.prod(shape) for shape in shapes.values())
    assert abs(achieved_sparsity(found, shapes) - 0.6) * weights <= 32


def test_steps_finer_than_a_layer_is_wide():
    "The last step of a layer of 32 inputs would round to all of them."
    model, batch = tiny_llava()
    found = search(model, batch, 0.9, by="part", steps=128, start=0.98)
    assert max(found.values()) < 1
