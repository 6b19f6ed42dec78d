"""Intervals of a score: never empty, never outside the possible values, and as wide as they promise."""

import numpy as np
import pytest

from ressa.evaluation.answers import Evaluation
from ressa.evaluation.intervals import interval, paired_interval, wilson
from ressa.evaluation.score_intervals import (
    FEW,
    difference_interval,
    score_interval,
)


@pytest.mark.parametrize("n", [1, 3, FEW - 1, FEW, 1280])
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_equal_values_have_an_interval(n, value):
    low, high = score_interval([value] * n)
    assert 0 <= low <= value <= high <= 1 and low < high


def test_the_two_methods():
    right = (np.random.default_rng(0).random(200) < 0.9).astype(float)
    assert score_interval(right) == pytest.approx(interval(right))
    assert score_interval(right[:10]) == pytest.approx(wilson(right[:10]))
    assert score_interval([1, 1, 1]) == pytest.approx((0.438, 1), abs=1e-3)


def test_no_rounding_beyond_the_edge():
    "A bootstrap mean of 1279 ones and a nearly right one used to be above 1."
    for n in (1257, 1280, 5201):
        low, high = score_interval([1.0] * (n - 1) + [0.9])
        assert 0 <= low <= high <= 1


def test_cider_has_another_highest_value():
    low, high = score_interval([10.0, 10.0, 10.0], highest=10)
    assert low == pytest.approx(4.38, abs=0.01) and high == 10


def test_an_evaluation_of_three_right_answers():
    result = Evaluation(
        answers=["a"] * 3,
        references=[["a"]] * 3,
        values=np.ones(3),
        types=["other"] * 3,
        metric="exact match",
    )
    assert result.interval == pytest.approx((0.438, 1), abs=1e-3)


@pytest.mark.parametrize("values", [[], [2.0], [-1.0], [float("nan")], [[1.0]]])
def test_values_that_are_none(values):
    with pytest.raises(ValueError, match="values must be"):
        score_interval(values)


def test_the_difference_of_two_models():
    generator = np.random.default_rng(0)
    first = (generator.random(300) < 0.8).astype(float)
    second = np.where(generator.random(300) < 0.1, 1 - first, first)
    assert difference_interval(first, second) == paired_interval(first, second)
    # Newcombe 1998, table II, example (36, 12, 2, 0) of 50 pairs: .0569 to .3404
    first = np.repeat([1, 1, 0, 0], [36, 12, 2, 0])
    second = np.repeat([1, 0, 1, 0], [36, 12, 2, 0])
    from ressa.evaluation.score_intervals import _newcombe

    assert _newcombe(first, second) == pytest.approx((0.0569, 0.3404), abs=2e-3)


@pytest.mark.parametrize("n", [1, 3, 100])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_equal_models_are_not_proved_equal(n, share):
    right = np.arange(n) < share * n
    low, high = difference_interval(right, right)
    assert -1 <= low < 0 < high <= 1


def test_rows_of_different_length():
    with pytest.raises(ValueError, match="same examples"):
        difference_interval([1, 0], [1])
