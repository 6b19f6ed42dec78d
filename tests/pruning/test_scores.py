"""Magnitude, Wanda and RIA against their formulas in float64."""

import pytest
import torch
from matrices import METHODS, TARGETS, example, plain_mask

from ressa.pruning.scores import (
    magnitude,
    reconstruction_error,
    ria,
    wanda,
)
from ressa.pruning.statistics import Statistics, validate_inputs


def plain_score(name, weight, x, power=0.5):
    size = weight.double().abs()
    norm = x.double().norm(dim=0)
    if name == "magnitude":
        return size
    if name == "wanda":
        return size * norm
    relative = size / size.sum(0) + size / size.sum(1, keepdim=True)
    return relative * norm**power


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(*target.values()))
@pytest.mark.parametrize("name", ["magnitude", "wanda", "ria"])
def test_masks_are_those_of_the_formula(name, target):
    weight, x = example((16, 136))
    mask = plain_mask(plain_score(name, weight, x), **target)
    pruned = METHODS[name](weight, Statistics.of(x), **target)
    assert torch.equal(pruned, weight.masked_fill(~mask, 0))


def test_wanda_over_the_whole_layer():
    weight, x = example((16, 40))
    score = plain_score("wanda", weight, x).reshape(1, -1)
    mask = plain_mask(score, sparsity=0.5).reshape(16, 40)
    pruned = wanda(weight, Statistics.of(x), sparsity=0.5, group="layer")
    assert torch.equal(pruned != 0, mask)
    with pytest.raises(ValueError, match="group must be"):
        wanda(weight, Statistics.of(x), sparsity=0.5, group="column")


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_the_power_of_ria(power):
    weight, x = example((16, 40))
    mask = plain_mask(plain_score("ria", weight, x, power), sparsity=0.5)
    pruned = ria(weight, Statistics.of(x), sparsity=0.5, power=power)
    assert torch.equal(pruned != 0, mask)


def test_ria_with_a_row_and_a_column_of_zeros():
    weight, x = example((4, 8))
    weight[1] = 0
    weight[:, 2] = 0
    pruned = ria(weight, Statistics.of(x), sparsity=0.5)
    assert pruned.isfinite().all()
    assert (pruned == 0).sum(1).tolist() == [4, 8, 4, 4]


def test_magnitude_needs_no_statistics():
    weight = torch.tensor([[3.0, -1.0, 2.0, -4.0]])
    assert magnitude(weight, sparsity=0.5).tolist() == [[3, 0, 0, -4]]


@pytest.mark.parametrize(
    "weight, message",
    [
        (torch.randn(8), "matrix"),
        (torch.randn(2, 4, 8), "matrix"),
        (torch.ones(4, 8, dtype=torch.int32), "floats of 16 bits or more"),
        (torch.ones(4, 8).to(torch.float8_e4m3fn), "floats of 16 bits or more"),
        (torch.randn(4, 7), "stats must be of 7 inputs as weight has, not of 8"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(weight, message):
    stats = Statistics.of(torch.randn(5, 8))
    with pytest.raises(ValueError, match=message):
        validate_inputs(weight, stats)


def test_reconstruction_error_is_relative():
    x = torch.randn(9, 6)
    weight = torch.randn(4, 6)
    assert reconstruction_error(x, weight, torch.zeros(4, 6)) == pytest.approx(1)
    assert reconstruction_error(x, weight, weight) == 0
    assert reconstruction_error(x, 3 * weight, 1.5 * weight) == pytest.approx(0.5)


@pytest.mark.parametrize("method", [magnitude, wanda, ria])
def test_over_the_layer_the_lowest_scores_of_all_rows_go(method):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    size, norm = weight.abs(), x.norm(dim=0)
    relative = size / size.sum(0) + size / size.sum(1, keepdim=True)
    score = {magnitude: size, wanda: size * norm, ria: relative * norm.sqrt()}[method]
    threshold = score.flatten().sort().values[int(0.55 * score.numel()) - 1]
    pruned = method(weight, Statistics.of(x), sparsity=0.55, group="layer")
    assert torch.equal(pruned == 0, score <= threshold)
