"""The table of pruning methods, and weights that share an input."""

import pytest
import torch

from ressa.pruning.masks import apply_mask, has_pattern, select, sparsity_of
from ressa.pruning.methods import (
    METHODS,
    Method,
    method_of,
    prune_weights,
    target_keywords,
)
from ressa.pruning.scores import wanda
from ressa.pruning.statistics import Statistics


@pytest.mark.parametrize("name", [*METHODS, *(f"{name}+dsnot" for name in METHODS)])
@pytest.mark.parametrize("target", [0.5, "2:4"])
def test_each_method_needs_no_more_than_it_declares(name, target):
    "It is given the statistics that it declares, and computes what it computes with all."
    weight, x = torch.randn(8, 16), torch.randn(40, 16)
    method = method_of(name)
    few = method.statistics(x)
    assert (few.mean is not None) == method.mean
    assert (few.gram is not None) == method.gram
    (pruned,) = prune_weights([weight], few, target, method)
    everything = Statistics.of_examples([x])
    (with_all,) = prune_weights([weight], everything, target, method)
    assert torch.equal(pruned, with_all)
    assert sparsity_of(pruned) == 0.5
    assert target == 0.5 or has_pattern(pruned, target)


def test_a_function_is_given_all_statistics():
    def by_variance(weight, stats, *, sparsity=None, pattern=None):
        assert stats.gram is not None
        return apply_mask(weight, select(weight.abs() * stats.var, sparsity, pattern))

    method = method_of(by_variance)
    assert method == Method(by_variance, mean=True, gram=True, stacked=False)
    stats = method.statistics(torch.randn(40, 16))
    (pruned,) = prune_weights([torch.randn(8, 16)], stats, 0.25, method)
    assert sparsity_of(pruned) == 0.25
    assert method_of(method) is method


@pytest.mark.parametrize("name", ["none", "wanda+ria", "+dsnot", ""])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match="one of magnitude, wanda.*not"):
        method_of(name)


@pytest.mark.parametrize("name", METHODS)
def test_weights_that_share_an_input(name):
    "A stacked method prunes them as one weight, any other prunes each by itself."
    weights = [torch.randn(8, 16), torch.randn(4, 16)]
    stats, method = Statistics.of(torch.randn(40, 16)), method_of(name)
    pruned = prune_weights(weights, stats, 0.5, method)
    assert [weight.shape for weight in pruned] == [weight.shape for weight in weights]
    if method.stacked:
        whole = method.function(torch.cat(weights), stats, sparsity=0.5, pattern=None)
        assert torch.equal(torch.cat(pruned), whole)
    else:
        for weight, mine in zip(weights, pruned):
            alone = method.function(weight, stats, sparsity=0.5, pattern=None)
            assert torch.equal(mine, alone)


def test_options_reach_the_method():
    seen = []

    def noting(weight, stats, *, sparsity, pattern, **options):
        seen.append((sparsity, pattern, options))
        return wanda(weight, stats, sparsity=sparsity, pattern=pattern)

    stats = Statistics.of(torch.randn(40, 16))
    prune_weights([torch.randn(8, 16)], stats, "2:4", Method(noting), strength=3)
    assert seen == [(None, "2:4", {"strength": 3})]


def test_a_target_as_keywords():
    assert target_keywords(0.5) == {"sparsity": 0.5, "pattern": None}
    assert target_keywords("2:4") == {"sparsity": None, "pattern": "2:4"}


@pytest.mark.parametrize("name", [*METHODS, "wanda+dsnot"])
@pytest.mark.parametrize("sparsity", [0.01, 0.6, 1 / 3, 0.99])
@pytest.mark.parametrize("shape", [(37, 30), (5, 7), (64, 64)])
def test_exact_is_right_to_one_weight(name, sparsity, shape):
    weight, x, method = torch.randn(shape), torch.randn(90, shape[1]), method_of(name)
    stats = method.statistics(x)
    (pruned,) = prune_weights([weight], stats, sparsity, method, exact=True)
    wanted = sparsity * weight.numel()
    zeros = int((pruned == 0).sum())
    if int(sparsity * shape[1]) + 1 < shape[1]:  # no output row is all zero
        assert abs(zeros - wanted) <= 1
    else:
        assert zeros <= wanted
    (plain,) = prune_weights([weight], stats, sparsity, method)
    if not method.stacked:  # in each row at most one more
        more = (plain != 0).sum(1) - (pruned != 0).sum(1)
        assert set(more.tolist()) <= {0, 1}
    (pattern,) = prune_weights(
        [torch.randn(4, 8)], Statistics.of(torch.randn(9, 8)), "2:4", method, exact=True
    )
    assert has_pattern(pattern, "2:4")
