import pytest
import torch

from ressa.pruning.targets import (
    SHORT_ROW,
    kth_lowest,
    parse_pattern,
    require_scores,
    validate_target,
)


@pytest.mark.parametrize("pattern, expected", [("2:4", (2, 4)), ("12:16", (12, 16))])
def test_patterns_are_read(pattern, expected):
    assert parse_pattern(pattern) == expected


@pytest.mark.parametrize(
    "pattern", ["4:2", "0:4", "2:2", "two of four", "2:4:8", " 2:4", "", 24, None]
)
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="N < M"):
        parse_pattern(pattern)


@pytest.mark.parametrize(
    "sparsity, pattern, message",
    [
        (None, None, "exactly one"),
        (0.5, "2:4", "exactly one"),
        (1.0, None, r"\[0, 1\)"),
        (-0.1, None, r"\[0, 1\)"),
        (float("nan"), None, r"\[0, 1\)"),
        ([0.5], None, r"\[0, 1\)"),
        (None, "2:5", "divisible by 5"),
    ],
)
def test_impossible_targets_are_refused(sparsity, pattern, message):
    with pytest.raises(ValueError, match=message):
        validate_target(sparsity, pattern, in_features=8)


def test_possible_targets_are_accepted():
    validate_target(0, None, in_features=7)
    validate_target(0.999, None, in_features=7)
    validate_target(None, "2:4", in_features=8)


@pytest.mark.parametrize("bad", [torch.rand(8), torch.full((2, 2), torch.nan)])
def test_scores_without_an_order_are_refused(bad):
    with pytest.raises(ValueError, match="score"):
        require_scores(bad)


@pytest.mark.parametrize("width", [2, SHORT_ROW, SHORT_ROW + 1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_the_kth_lowest_is_that_of_sorting(width, dtype):
    score = (9 * torch.randn(5, width)).round().to(dtype)
    for k in (1, width // 2, width):
        assert torch.equal(kth_lowest(score, k), score.sort(1).values[:, k - 1 : k])
