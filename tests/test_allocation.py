"""Budgets for any layers, targets and mixtures; allocations on whole models; the quick way to a point of the surface."""

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

from ressa.allocation.budgets import (
    account,
    achieved,
    by_modality,
    exact,
    shapes_of,
    steps_of,
    uniform,
    zeros_of,
)
from ressa.allocation.rules import ecoflap, in_proportion, loss_of, owl
from ressa.allocation.search import (
    ALLOCATIONS,
    Trials,
    allocation_named,
    before_language,
    cheapest_first,
    search,
)
from ressa.course.allocation_study import Staged, sensitivity
from ressa.course.bench import bench
from ressa.data.collate import calibration_batch
from ressa.parts import modality_map
from ressa.pruning.engine import prune
from ressa.pruning.masks import validate_target, has_pattern, select
from ressa.pruning.methods import target_keywords

widths = st.integers(1, 16).map(lambda n: 8 * n)
any_shapes = st.lists(
    st.tuples(st.integers(1, 90), widths), min_size=1, max_size=12
).map(lambda shapes: {f"layer {i}": shape for i, shape in enumerate(shapes)})
any_target = st.one_of(
    st.floats(0, 0.99), st.sampled_from(["2:4", "4:8", "1:4", "1:2", "3:8"])
)


def total_of(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


@settings(max_examples=400, deadline=None)
@given(any_shapes, st.data())
def test_a_budget_is_met_or_refused(shapes, data):
    "Any layers, any budget, any wishes, cap, pattern and any of them fixed."
    sparsity, m = (
        data.draw(st.floats(0, 1)),
        data.draw(st.sampled_from([None, 2, 4, 8])),
    )
    cap = data.draw(st.floats(0.3, 1))
    wishes = {name: data.draw(st.floats(0, 1)) for name in shapes}
    fixed = {name: data.draw(any_target) for name in shapes if data.draw(st.booleans())}
    free = {name: shape for name, shape in shapes.items() if name not in fixed}
    gone = sum(zeros_of(target, shapes[name]) for name, target in fixed.items())
    steps = steps_of(free, cap, m)
    most = gone + sum(math.prod(pair) for pair in steps.values())
    options = dict(max_sparsity=cap, m=m, fixed=fixed)
    if not gone - 0.5 <= sparsity * total_of(shapes) <= most + 0.5:
        with pytest.raises(ValueError, match="cannot be met"):
            exact(wishes, shapes, sparsity, **options)
        return
    got = exact(wishes, shapes, sparsity, **options)
    bound = max((size for size, _ in steps.values()), default=0) / 2 + 0.5 + 1e-6
    assert abs(achieved(got, shapes) - sparsity) * total_of(shapes) <= bound
    assert list(got) == list(shapes) and {name: got[name] for name in fixed} == fixed
    for name, shape in free.items():
        validate_target(**target_keywords(got[name]), in_features=shape[1])
        assert zeros_of(got[name], shape) <= cap * math.prod(shape) + 1e-6
        assert isinstance(got[name], str) == (
            m is not None and zeros_of(got[name], shape) > 0
        )


@settings(max_examples=60, deadline=None)
@given(any_target, st.integers(1, 9), widths)
def test_what_is_counted_is_what_falls(target, out, width):
    mask = select(torch.rand(out, width), **target_keywords(target))
    assert (~mask).sum().item() == zeros_of(target, (out, width))


@settings(max_examples=60, deadline=None)
@given(any_shapes, st.floats(0.05, 0.9), st.data())
def test_wishes_keep_their_order(shapes, sparsity, data):
    "Of two equal layers among layers of one height, the one that wishes for more gets no less, to rounding both."
    shapes = {name: (7, width) for name, (_, width) in shapes.items()}
    wishes = {name: data.draw(st.floats(0, 1)) for name in shapes}
    try:
        got = exact(wishes, shapes, sparsity, max_sparsity=0.95)
    except ValueError:
        return
    for a, b in itertools.permutations(shapes, 2):
        if shapes[a] == shapes[b] and wishes[a] >= wishes[b]:
            assert got[a] >= got[b] - 2.01 / shapes[a][1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 1000)), min_size=1, max_size=8),
    st.floats(0.05, 0.85),
)
def test_shares_in_proportion(groups, sparsity):
    worth, sizes = ({i: group[k] for i, group in enumerate(groups)} for k in (0, 1))
    got = in_proportion(worth, sizes, sparsity, max_sparsity=0.9)
    assert all(-1e-9 <= share <= 0.9 + 1e-9 for share in got.values())
    assert sum(got[i] * sizes[i] for i in sizes) == pytest.approx(
        sparsity * sum(sizes.values()), rel=1e-4
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(0.01, 5), min_size=4, max_size=4), min_size=2, max_size=3
    ),
    st.integers(0, 8),
)
def test_greedy_is_best_where_losses_are_convex(slopes, want):
    "Separate convex losses and equal steps: the greedy choice is the best of all."
    curves = [[0, *itertools.accumulate(sorted(rises))] for rises in slopes]
    want = min(want, 4 * len(curves))

    def loss(counts):
        return sum(curves[g][k] for g, k in counts.items())

    groups = range(len(curves))
    got = cheapest_first(
        loss, dict.fromkeys(groups, 1), dict.fromkeys(groups, 0), want, most=4
    )
    every = (
        dict(enumerate(ks))
        for ks in itertools.product(range(5), repeat=len(curves))
        if sum(ks) == want
    )
    assert sum(got.values()) == want and loss(got) == pytest.approx(
        min(map(loss, every))
    )


def weights_of(model):
    return [p.clone() for p in model.parameters()]


@pytest.fixture
def ready(bundled, data):
    model, processor = bundled
    return model.eval(), calibration_batch(data[0], processor, n=8, seed=0)


@pytest.mark.parametrize("name", [name for name in ALLOCATIONS if name != "search"])
@pytest.mark.parametrize("sparsity", [0.5, 0.77])
def test_named_allocations_meet_their_budget(ready, name, sparsity):
    model, batch = ready
    before, shapes = weights_of(model), shapes_of(model)
    got = allocation_named(name, model, batch, sparsity, seed=1)
    assert (
        abs(achieved(got, shapes) - sparsity) * total_of(shapes)
        <= max(out for out, _ in shapes.values()) / 2
    )
    assert got == allocation_named(name, model, batch, sparsity, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    report = prune(model, batch, sparsity=got, progress=False)
    zeros = sum(layer.sparsity * math.prod(layer.shape) for layer in report.layers)
    assert round(zeros) == account(got, model)["all"]["zeros"]


def test_search_is_no_worse_than_even_and_leaves_the_model(ready):
    model, batch = ready
    before, even = weights_of(model), uniform(model, 0.75)
    got = search(model, batch, 0.75, parts=8)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    trials = Trials(model, batch)
    assert trials.loss(got) < trials.loss(even)
    assert account(got, model)["all"]["zeros"] == account(even, model)["all"]["zeros"]


def test_search_with_a_mixture(ready):
    "Language is 2:4 already, and vision is searched among N:8 patterns."
    model, batch = ready
    got = search(model, batch, 0.55, by="block", m=8, fixed={"language": "2:4"})
    linears = modality_map(model).linears
    assert all(got[name] == "2:4" for name in linears["language"])
    assert abs(account(got, model)["all"]["sparsity"] - 0.55) < 0.01
    prune(model, batch, sparsity=got, progress=False)
    for name, layer in linears["vision"].items():
        assert has_pattern(layer.weight, got[name])


@pytest.mark.parametrize(
    "make", [uniform, lambda model, s, **k: owl(model, k.pop("batch"), s, **k)]
)
def test_impossible_budgets_are_refused_by_name(ready, make):
    model, batch = ready
    more = {} if make is uniform else {"batch": batch}
    with pytest.raises(ValueError, match="sparsity=0.9 cannot be met"):
        make(model, 0.9, max_sparsity=0.8, **more)
    with pytest.raises(ValueError, match="no layer matches"):
        make(model, 0.5, fixed={"langauge": 0.5}, **more)
    with pytest.raises(ValueError, match="width divisible by 7"):
        make(model, 0.5, m=7, **more)


def test_search_refuses_before_it_tries(ready):
    model, batch = ready
    with pytest.raises(ValueError, match="cannot be met"):
        search(model, batch, 0.3, fixed={"language": 0.9})
    with pytest.raises(ValueError, match="by must be"):
        search(model, batch, 0.5, by="head")
    with pytest.raises(ValueError, match="needs labels"):
        ecoflap(model, {k: v for k, v in batch.items() if k != "labels"}, 0.5)


def test_loss_from_the_door_is_the_loss(ready):
    model, batch = ready
    language, given = before_language(model, batch)
    assert language is model.language_model
    assert loss_of(language, given) == pytest.approx(loss_of(model, batch), abs=1e-7)


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
    assert before_language(model, batch)[0] is model
    before, shapes = weights_of(model), shapes_of(model)
    got = search(model, batch, 0.6, by="block", parts=8)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert abs(achieved(got, shapes) - 0.6) * total_of(shapes) <= 32


@pytest.mark.parametrize("point", [(0.6, 0.5), ("2:4", 0.7), (0.8, "1:4")])
def test_staged_equals_the_whole_way(bundled, point):
    model, processor = bundled
    few, (vision, language) = bench(100), point
    batch = calibration_batch(few.train, processor, n=32, seed=3)
    front, last = (
        by_modality(model, vision=vision),
        by_modality(model, language=language),
    )
    staged = Staged(model, batch, few.questions)
    staged.right(
        by_modality(model, vision=0.3), by_modality(model, language=0.9)
    )  # leaves nothing behind
    got = staged.right(front, last)
    from ressa.models.bundled import load_bundled

    whole, _ = load_bundled("cpu")
    prune(whole, batch, sparsity=front | last, progress=False)
    for (name, a), b in zip(
        modality_map(model).layers.items(), modality_map(whole).layers.values()
    ):
        assert torch.equal(a.weight, b.weight), name
    assert (got == few.right(whole)).all()


def test_sensitivity_leaves_the_model_dense(ready):
    model, batch = ready
    before = weights_of(model)
    names = list(modality_map(model).linears["vision"])[:2]
    losses = sensitivity(Trials(model, batch), names, levels=(0.0, 0.5, 0.9))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(
        row[0] == pytest.approx(loss_of(model, batch), abs=1e-7) and row[2] > row[0]
        for row in losses.values()
    )


def test_explorer_picture(ready):
    import matplotlib.pyplot as plt

    from ressa.course.allocation_study import draw

    surface, trials = (
        dict(grid=[0, 0.5, 0.9], accuracy=[[1, 0.9, 0.3]] * 3),
        Trials(*ready),
    )
    for part, layers in modality_map(ready[0]).linears.items():
        state = dict(vision=0.75, language=0.5, layer=list(layers)[0])
        left, right, *_ = draw(state, surface, trials).axes
        assert left.get_title().startswith("135,168 of 344,064")
        assert right.get_title().endswith(
            {"vision": "75% gone", "interface": "0% gone", "language": "50% gone"}[part]
        )
    plt.close("all")
