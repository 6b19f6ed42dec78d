import pytest
import torch
from hypothesis import given
from matrices import TARGETS, few, plain_mask, seeds, shapes, targets

from ressa.pruning.masks import (
    apply_mask,
    has_pattern,
    pruned_count,
    select,
    sparsity_of,
)

every_target = pytest.mark.parametrize(
    "target", TARGETS, ids=lambda target: str(*target.values())
)


# select


@few
@given(shape=shapes, target=targets, seed=seeds)
def test_masks_are_those_of_sorting_each_row(shape, target, seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(shape, generator=generator)
    for scores in (score, (2 * score).round()):  # without ties, and with many
        assert torch.equal(select(scores, **target), plain_mask(scores, **target))


@every_target
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32]
)
def test_masks_of_every_dtype(target, dtype):
    score = (3 * torch.randn(8, 40)).round().to(dtype)
    assert torch.equal(select(score, **target), plain_mask(score, **target))


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.77])
def test_one_threshold_for_the_whole_layer(sparsity):
    score = (3 * torch.randn(12, 40)).round()
    expected = plain_mask(score.reshape(1, -1), sparsity).reshape(12, 40)
    assert torch.equal(select(score, sparsity, group="layer"), expected)


@pytest.mark.parametrize("width", [3, 16, 17, 40])
@pytest.mark.parametrize("group", ["row", "layer"])
def test_of_equal_scores_the_leftmost_are_pruned(group, width):
    mask = select(torch.ones(3, width), 0.5, group=group)
    compared = mask if group == "row" else mask.reshape(1, -1)
    pruned = compared.shape[1] // 2
    assert not compared[:, :pruned].any()
    assert compared[:, pruned:].all()


@pytest.mark.parametrize("dtype, large", [(torch.float32, 3e38), (torch.float16, 6e4)])
def test_finite_scores_with_an_infinite_sum_are_accepted(dtype, large):
    assert select(torch.full((2, 8), large, dtype=dtype), 0.5).sum() == 8


@pytest.mark.parametrize("shape", [(0, 8), (0, 40), (3, 0)])
def test_a_score_without_entries_has_an_empty_mask(shape):
    assert select(torch.rand(shape), 0.5).shape == shape


@pytest.mark.parametrize(
    "score, options, message",
    [
        (torch.rand(8), {}, "real matrix"),
        (torch.rand(2, 4, 8), {}, "real matrix"),
        (torch.randn(4, 8).to(torch.complex64), {}, "real matrix"),
        (torch.full((4, 8), torch.nan), {}, "NaN or infinity"),
        (torch.full((4, 8), -torch.inf), {}, "NaN or infinity"),
        (torch.rand(4, 8), {"group": "column"}, "group must be"),
        (torch.rand(4, 8), {"sparsity": 1}, r"\[0, 1\)"),
    ],
)
def test_select_refuses(score, options, message):
    with pytest.raises(ValueError, match=message):
        select(score, **({"sparsity": 0.5} | options))


# pruned_count


@pytest.mark.parametrize("percent", range(100))
def test_a_count_is_what_the_decimal_says(percent):
    for n in (10, 90, 100, 336, 4096):
        assert pruned_count(percent / 100, n) == percent * n // 100


# apply_mask


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8]
)
def test_pruned_is_plus_zero_and_kept_is_the_same_to_the_bit(dtype):
    weight = (10 * torch.randn(6, 8)).to(dtype)
    mask = torch.rand(6, 8) < 0.5
    pruned = apply_mask(weight, mask)
    assert pruned.dtype == dtype
    assert torch.equal(pruned[mask], weight[mask])
    assert not pruned[~mask].any()
    if dtype.is_floating_point:
        assert not torch.signbit(pruned[~mask]).any()


def test_a_kept_minus_zero_stays():
    pruned = apply_mask(torch.tensor([[-0.0, -0.0]]), torch.tensor([[True, False]]))
    assert torch.signbit(pruned).tolist() == [[True, False]]


@pytest.mark.parametrize(
    "mask",
    [
        torch.rand(4, 8),
        torch.ones(8, dtype=torch.bool),
        torch.ones(4, 1, dtype=torch.bool),
    ],
)
def test_what_is_no_mask_of_the_weight_is_refused(mask):
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(4, 8\)"):
        apply_mask(torch.randn(4, 8), mask)


# Reading zeros


def test_sparsity_counts_both_zeros():
    assert sparsity_of(torch.tensor([0.0, -0.0, 1.0, -1.0])) == 0.5
    assert sparsity_of(torch.rand(0)) == 0


def test_a_pattern_allows_more_zeros_but_not_fewer():
    assert has_pattern(torch.tensor([[0.0, 1, 0, 1, 0, 0, 0, 1]]), "2:4")
    assert not has_pattern(torch.tensor([[0.0, 1, 1, 1, 0, 0, 0, 1]]), "2:4")
    assert not has_pattern(torch.zeros(2, 6), "2:4")  # no group may be cut
