"""Budgets are met to half a step, or refused, for any layers, targets and mixtures."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ressa import load_bundled
from ressa.allocation.budgets import (
    LayerSteps,
    achieved_sparsity,
    allocate,
    layer_groups,
    meet_budget,
    shapes_of,
    solve_increasing,
    zeros_by_part,
    zeros_of,
)
from ressa.pruning.masks import select
from ressa.pruning.targets import validate_target

widths = st.integers(1, 16).map(lambda n: 8 * n)
any_shapes = st.lists(
    st.tuples(st.integers(1, 90), widths), min_size=1, max_size=12
).map(lambda shapes: {f"layer {i}": shape for i, shape in enumerate(shapes)})
any_target = st.one_of(
    st.floats(0, 0.99), st.sampled_from(["2:4", "4:8", "1:4", "1:2", "3:8"])
)


def weights_of(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


def as_keyword(target):
    return {"pattern" if isinstance(target, str) else "sparsity": target}


@pytest.fixture(scope="module")
def model():
    model, _ = load_bundled("cpu")
    return model


@settings(max_examples=200, deadline=None)
@given(any_shapes, st.data())
def test_a_budget_is_met_or_refused(shapes, data):
    "Any layers, budget, preferences, limit and pattern, and any layers fixed."
    sparsity = data.draw(st.floats(0, 1))
    m = data.draw(st.sampled_from([None, 2, 4, 8]))
    limit = data.draw(st.floats(0.3, 1))
    preferred = {name: data.draw(st.floats(0, 1)) for name in shapes}
    fixed = {name: data.draw(any_target) for name in shapes if data.draw(st.booleans())}
    free = {name: shape for name, shape in shapes.items() if name not in fixed}
    steps = {name: LayerSteps.of(shape, limit, m) for name, shape in free.items()}
    least = sum(zeros_of(target, shapes[name]) for name, target in fixed.items())
    most = least + sum(layer.most_zeros for layer in steps.values())
    options = dict(max_sparsity=limit, m=m, fixed=fixed)

    if not least - 0.5 <= sparsity * weights_of(shapes) <= most + 0.5:
        with pytest.raises(ValueError, match="cannot be met"):
            meet_budget(shapes, preferred, sparsity, **options)
        return
    found = meet_budget(shapes, preferred, sparsity, **options)
    largest_step = max((layer.size for layer in steps.values()), default=0)
    missed = abs(achieved_sparsity(found, shapes) - sparsity) * weights_of(shapes)
    assert missed <= largest_step / 2 + 0.5 + 1e-6
    assert list(found) == list(shapes)
    assert {name: found[name] for name in fixed} == fixed
    for name, shape in free.items():
        target = found[name]
        is_pattern = isinstance(target, str)
        validate_target(
            None if is_pattern else target, target if is_pattern else None, shape[1]
        )
        zeros = zeros_of(target, shape)
        assert zeros <= limit * math.prod(shape) + 1e-6
        assert is_pattern == (m is not None and zeros > 0)


@settings(max_examples=60, deadline=None)
@given(any_target, st.integers(1, 9), widths)
def test_what_is_counted_is_what_is_pruned(target, rows, width):
    mask = select(torch.rand(rows, width), **as_keyword(target))
    assert (~mask).sum().item() == zeros_of(target, (rows, width))


@settings(max_examples=60, deadline=None)
@given(any_shapes, st.floats(0.05, 0.9), st.data())
def test_preferences_keep_their_order(shapes, sparsity, data):
    "Of two equal layers, the one with the higher preference gets no less, to rounding both."
    shapes = {name: (7, width) for name, (_, width) in shapes.items()}
    preferred = {name: data.draw(st.floats(0, 1)) for name in shapes}
    try:
        found = meet_budget(shapes, preferred, sparsity, max_sparsity=0.95)
    except ValueError:
        return
    for a, b in itertools.permutations(shapes, 2):
        if shapes[a] == shapes[b] and preferred[a] >= preferred[b]:
            assert found[a] >= found[b] - 2.01 / shapes[a][1]


def test_only_differences_between_preferences_matter():
    shapes = {"a": (4, 60), "b": (3, 60)}
    want = meet_budget(shapes, {"a": 0.2, "b": 0.5}, 0.6)
    for shift in (-20, -1, 3, 100):
        preferred = {"a": 0.2 + shift, "b": 0.5 + shift}
        assert meet_budget(shapes, preferred, 0.6) == want


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "2:4"])
def test_a_preference_must_be_a_number(value):
    shapes = {"a": (4, 8), "b": (4, 8)}
    preferred = {"a": 0.5} if value is None else {"a": 0.5, "b": value}
    with pytest.raises(ValueError, match="preferred must give b a sparsity"):
        meet_budget(shapes, preferred, 0.5)


def test_all_layers_fixed():
    shapes = {"a": (4, 8), "b": (4, 8)}
    fixed = {"a": 0.5, "b": "1:2"}
    assert meet_budget(shapes, {}, 0.5, fixed=fixed) == fixed
    with pytest.raises(ValueError, match="cannot be met"):
        meet_budget(shapes, {}, 0.7, fixed=fixed)


def test_steps_and_targets_are_inverse():
    for m, width in ((None, 24), (8, 24), (4, 8)):
        steps = LayerSteps.of((5, width), m=m)
        for count in range(steps.group):
            assert zeros_of(steps.target(count), (5, width)) == count * steps.size
    for count in (-1, 24):
        with pytest.raises(ValueError, match="count must be in"):
            LayerSteps.of((5, 24)).target(count)


@given(st.floats(-3, 3), st.floats(0.1, 9))
def test_where_an_increasing_function_reaches_a_value(wanted, slope):
    found = solve_increasing(lambda x: slope * x**3, wanted, -4.0, 4.0)
    assert slope * found**3 == pytest.approx(wanted, abs=1e-6)


def test_a_value_out_of_reach_gives_the_nearest_end():
    assert solve_increasing(lambda x: x, 7.0, -1.0, 2.0) == 2.0
    assert solve_increasing(lambda x: x, -7.0, -1.0, 2.0) == pytest.approx(-1.0)


def test_a_model_with_a_fixed_part(model):
    shapes = shapes_of(model)
    found = allocate(model, dict.fromkeys(shapes, 0.5), 0.6, fixed={"vision": 0.5})
    table = zeros_by_part(model, found)
    assert list(table) == ["vision", "language", "all"]
    assert table["vision"]["sparsity"] == 0.5
    assert table["all"]["sparsity"] == achieved_sparsity(found, shapes)
    assert (
        table["all"]["zeros"] == table["vision"]["zeros"] + table["language"]["zeros"]
    )


def test_groups_of_layers(model):
    shapes = shapes_of(model)
    for by, number in (("layer", len(shapes)), ("block", 6), ("part", 2)):
        groups = layer_groups(model, shapes, by)
        assert len(groups) == number
        assert sorted(itertools.chain(*groups.values())) == sorted(shapes)
    with pytest.raises(ValueError, match="by must be"):
        layer_groups(model, shapes, "head")


def test_an_empty_allocation_has_no_sparsity(model):
    with pytest.raises(ValueError, match="allocation is empty"):
        achieved_sparsity({}, {"a": (4, 8)})
    with pytest.raises(ValueError, match="allocation is empty"):
        zeros_by_part(model, {})
