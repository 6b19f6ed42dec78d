"""Staged pruning equals the whole way; allocations by name; stored points; drawings."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from ressa import (
    by_modality,
    calibration_batch,
    ecoflap,
    load_bundled,
    modality_map,
    owl,
    prune,
    uniform,
)
from ressa.allocation.rules import calibration_loss
from ressa.allocation.search import TrialModel
from ressa.course import allocation_study
from ressa.course.allocation_study import (
    StagedModel,
    StoredPoints,
    draw_explorer,
    error_bars,
    named_allocation,
    sensitivity,
    splits_of_sum,
)
from ressa.course.bench import bench


@pytest.fixture(scope="module")
def ready(data):
    model, processor = load_bundled("cpu")
    return model.eval(), calibration_batch(data[0], processor, n=8, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("point", [(0.6, 0.5), ("2:4", 0.7), (0.8, "1:4")])
def test_staged_equals_the_whole_way(bundled, point):
    model, processor = bundled
    vision, language = point
    few = bench(100)
    batch = calibration_batch(few.train, processor, n=32, seed=3)
    front = by_modality(model, vision=vision)
    last = by_modality(model, language=language)
    staged = StagedModel(model, batch, few.questions)
    staged.right(  # must leave nothing behind
        by_modality(model, vision=0.3), by_modality(model, language=0.9)
    )
    right = staged.right(front, last)

    whole, _ = load_bundled("cpu")
    prune(whole, batch, sparsity=front | last, progress=False)
    layers = modality_map(model).layers
    for name, layer in modality_map(whole).layers.items():
        assert torch.equal(layers[name].weight, layer.weight), name
    assert (right == few.right(whole)).all()


def test_an_unknown_method_is_refused_at_the_first_pruning(bundled):
    model, processor = bundled
    few = bench(100)
    batch = calibration_batch(few.train, processor, n=4, seed=0)
    staged = StagedModel(model, batch, few.questions, method="wander")
    with pytest.raises(ValueError, match="wander"):
        staged.right(by_modality(model, vision=0.5), {})


def test_allocations_by_name(ready, monkeypatch):
    model, batch = ready
    assert named_allocation("uniform", model, batch, 0.7) == uniform(model, 0.7)
    assert named_allocation("owl", model, batch, 0.7) == owl(model, batch, 0.7)
    by_slope = ecoflap(model, batch, 0.7, seed=3)
    assert named_allocation("ecoflap", model, batch, 0.7, seed=3) == by_slope
    with pytest.raises(ValueError, match="not 'searching'"):
        named_allocation("searching", model, batch, 0.7)

    def options_of(model, batch, sparsity, **options):
        return options

    monkeypatch.setattr(allocation_study, "search", options_of)
    for name, options in (
        ("search", {}),
        ("search by block", dict(by="block", steps=32)),
        ("search by part", dict(by="part", steps=64)),
    ):
        assert named_allocation(name, model, batch, 0.7) == options


def test_splits_of_a_sum():
    assert splits_of_sum(120) == [(v / 100, (120 - v) / 100) for v in range(30, 91, 10)]
    assert splits_of_sum(40, step=20) == [(0.1, 0.3), (0.3, 0.1)]


def test_stored_points(tmp_path):
    path = tmp_path / "points.json"
    points = [
        dict(
            setting=dict(vision=0.5, language="2:4"),
            accuracy=0.9,
            accuracy_ci=[0.8, 0.95],
        ),
        dict(setting=dict(vision=0.6), accuracy=0.7, accuracy_ci=[0.6, 0.9]),
    ]
    path.write_text(json.dumps(dict(blind=0.6, points=points)))
    stored = StoredPoints(path)
    assert stored.about == dict(blind=0.6)
    assert stored.accuracy(language="2:4", vision=0.5) == 0.9
    with pytest.raises(ValueError, match="no stored point"):
        stored.at(vision=0.5)
    middle, distances = error_bars(points)
    assert middle.tolist() == [0.9, 0.7]
    np.testing.assert_allclose(distances, [[0.1, 0.1], [0.05, 0.2]])


def test_sensitivity_leaves_the_model_dense(ready):
    model, batch = ready
    before = [p.clone() for p in model.parameters()]
    names = list(modality_map(model).linears["vision"])[:2]
    groups = {name: [name] for name in names} | {"both": names}
    losses = sensitivity(TrialModel(model, batch), groups, levels=(0.0, 0.5, 0.9))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    dense_loss = calibration_loss(model, batch)
    assert list(losses) == [*names, "both"]
    for at_0, _, at_90 in losses.values():
        assert at_0 == pytest.approx(dense_loss, abs=1e-7)
        assert at_90 > at_0


def test_the_picture_of_the_explorer(ready):
    surface = dict(grid=[0, 0.5, 0.9], accuracy=[[1, 0.9, 0.3]] * 3)
    trial = TrialModel(*ready)
    titles = {
        "vision": "75% pruned",
        "interface": "0% pruned",
        "language": "50% pruned",
    }
    for part, layers in modality_map(ready[0]).linears.items():
        state = dict(vision=0.75, language=0.5, layer=next(iter(layers)))
        left, right, *_ = draw_explorer(state, surface, trial).axes
        assert left.get_title().startswith("135,168 of 344,064")
        assert right.get_title().endswith(titles[part])
    plt.close("all")
