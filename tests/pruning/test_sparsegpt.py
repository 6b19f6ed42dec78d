"""SparseGPT against the plain loop over columns in float64."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import (
    TARGETS,
    example,
    few,
    group_of,
    plain_mask,
    seeds,
    shapes,
    share_of_equal_zeros,
    sparsities,
)

from ressa.pruning.masks import has_pattern
from ressa.pruning.sparsegpt import inverse_factor, sparsegpt
from ressa.pruning.statistics import Statistics

every_target = pytest.mark.parametrize(
    "target", TARGETS, ids=lambda target: str(*target.values())
)


# The same as the plain loop


def plain_inverses(x, damp=0.01):
    "Row 0 of the inverse of each corner H[j:, j:], corner by corner; and dead inputs."
    x = x.double()
    H = 2 / len(x) * x.T @ x
    dead = H.diagonal() == 0
    H += damp * H.diagonal()[~dead].mean() * torch.eye(len(H))
    H[dead, dead] = 1
    return [H[j:, j:].inverse()[0] for j in range(len(H))], dead


def plain_sparsegpt(weight, inverses, dead, sparsity=None, pattern=None):
    "One column after the other, every correction at once, no factorisation."
    W = weight.double().masked_fill(dead, 0)
    mask = torch.ones_like(W, dtype=torch.bool)
    chosen_at_once = group_of({"pattern": pattern}, 128)
    for j, inverse in enumerate(inverses):
        if j % chosen_at_once == 0:
            block = slice(j, j + chosen_at_once)
            cost = torch.stack([each[0] for each in inverses[block]])
            score = W[:, block].square() / cost
            if pattern:
                mask[:, block] = plain_mask(score, pattern=pattern)
            else:
                all_rows = plain_mask(score.reshape(1, -1), sparsity)
                mask[:, block] = all_rows.reshape(score.shape)
        removed = W[:, j].masked_fill(mask[:, j], 0)
        W[:, j:] -= torch.outer(removed / inverse[0], inverse)
    return W.masked_fill(~mask, 0)


@pytest.fixture(scope="module")
def hard_inputs():
    x = example((1, 136), tokens=300)[1]
    cases = {
        "plenty": x,
        "rank-deficient": x[:40],
        "single token": x[:1],
        "dead input": x.index_fill(1, torch.tensor([5, 130]), 0),
    }
    return {name: (x, *plain_inverses(x)) for name, x in cases.items()}


@every_target
@pytest.mark.parametrize(
    "case", ["plenty", "rank-deficient", "single token", "dead input"]
)
def test_it_agrees_with_the_plain_loop(case, target, hard_inputs):
    weight = example((16, 136))[0]
    x, inverses, dead = hard_inputs[case]
    ours = sparsegpt(weight, Statistics.of(x), **target).double()
    plain = plain_sparsegpt(weight, inverses, dead, **target)
    assert share_of_equal_zeros(ours, plain) >= 0.999
    rows = ((ours == 0) == (plain == 0)).all(1)
    assert (ours - plain)[rows].norm() / plain[rows].norm() < 1e-4


# Blocks and groups


@few
@given(
    shape=shapes,
    sparsity=sparsities,
    blocksize=st.sampled_from([1, 5, 8, 24]),
    seed=seeds,
)
def test_exact_count_of_each_block(shape, sparsity, blocksize, seed):
    weight, x = example(shape, seed=seed)
    stats = Statistics.of(x)
    zeros = sparsegpt(weight, stats, sparsity=sparsity, blocksize=blocksize) == 0
    for block in zeros.split(blocksize, 1):
        assert block.sum().item() == int(sparsity * block.numel() + 1e-9)


@pytest.mark.parametrize("pattern", ["1:3", "2:5", "3:7"])
def test_groups_that_do_not_divide_a_block_are_not_cut(pattern):
    n, m = map(int, pattern.split(":"))
    weight, x = example((6, 128 // m * m + 8 * m), tokens=300)
    pruned = sparsegpt(weight, Statistics.of(x), pattern=pattern)
    assert has_pattern(pruned, pattern)
    assert ((pruned.reshape(-1, m) == 0).sum(1) == m - n).all()


# The factor


def test_factor_is_the_factor_of_the_inverse():
    x = example((1, 600), tokens=900)[1]  # wide enough for the inverse by halves
    stats = Statistics.of(x)
    U = inverse_factor(stats, dtype=torch.float64)
    H = stats.hessian.double()
    H += 0.01 * H.diagonal().mean() * torch.eye(600)
    assert torch.equal(U, U.triu())
    assert (U.diagonal() > 0).all()
    assert torch.allclose(U.T @ U @ H, torch.eye(600).double(), atol=1e-8)


@every_target
def test_factor_may_be_shared(target):
    weight, x = example((12, 40))
    stats = Statistics.of(x)
    without_gram = Statistics.of(x, gram=False)
    expected = sparsegpt(weight, stats, **target)
    shared = sparsegpt(weight, without_gram, factor=inverse_factor(stats), **target)
    assert torch.equal(shared, expected)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_with_a_pattern_output_rows_do_not_see_each_other(pattern):
    weight, x = example((12, 40))
    stats = Statistics.of(x)
    parts = [sparsegpt(part, stats, pattern=pattern) for part in weight.split(5)]
    whole = sparsegpt(weight, stats, pattern=pattern)
    assert torch.allclose(torch.cat(parts), whole, atol=1e-5)


# Hessians that are hard


def test_a_dead_input_does_not_disturb_the_others():
    weight, x = example((8, 24))
    x[:, -1] = 0
    stats = Statistics.of(x)
    assert (sparsegpt(weight, stats, pattern="2:4")[:, -1] == 0).all()
    others = inverse_factor(Statistics.of(x[:, :-1]))
    assert torch.allclose(inverse_factor(stats)[:-1, :-1], others, atol=1e-5)


def test_a_singular_hessian_is_damped_with_a_warning():
    weight, x = example((4, 24), tokens=3)
    with pytest.warns(UserWarning, match="does not factor"):
        pruned = sparsegpt(weight, Statistics.of(x), sparsity=0.5, damp=0.0)
    assert pruned.isfinite().all()


def test_the_usual_damping_is_enough_without_a_warning():
    weight, x = example((4, 24), tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned = sparsegpt(weight, Statistics.of(x), sparsity=0.5)
        all_dead = sparsegpt(weight, Statistics.of(0 * x), sparsity=0.5)
    assert pruned.isfinite().all()
    assert not all_dead.any()


def test_scaling_the_inputs_changes_nothing():
    weight, x = example((8, 40))
    expected = sparsegpt(weight, Statistics.of(x), sparsity=0.5)
    for scale in (1e-6, 1e6):
        scaled = sparsegpt(weight, Statistics.of(x * scale), sparsity=0.5)
        assert share_of_equal_zeros(scaled, expected) == 1
        assert torch.allclose(scaled, expected, rtol=1e-3, atol=1e-4)


def test_float64_is_computed_in_float64():
    weight, x = example((8, 40))
    stats = Statistics.of(x)
    exact = sparsegpt(weight.double(), stats, sparsity=0.5)
    assert exact.dtype == torch.float64
    difference = (exact - sparsegpt(weight, stats, sparsity=0.5)).abs().max()
    assert 0 < difference < 1e-4


# Errors


def test_a_missing_gram_matrix_is_named():
    weight, x = example((4, 8))
    with pytest.raises(ValueError, match=r"no gram.*Statistics\.of\(x, gram=True\)"):
        sparsegpt(weight, Statistics.of(x, gram=False), sparsity=0.5)


@pytest.mark.parametrize("damp", [-1, float("nan"), float("inf")])
def test_damping_that_is_no_number_of_0_or_more_is_refused(damp):
    stats = Statistics.of(torch.randn(9, 4))
    with pytest.raises(ValueError, match="damp must be"):
        inverse_factor(stats, damp)


@pytest.mark.parametrize(
    "options, message",
    [({"factor": torch.eye(12)}, "8 inputs"), ({"blocksize": 0}, "blocksize must be")],
)
def test_options_that_do_not_fit_are_refused(options, message):
    weight, x = example((4, 8))
    with pytest.raises(ValueError, match=message):
        sparsegpt(weight, Statistics.of(x), sparsity=0.5, **options)
