"""Intervals: coverage, pairing, and the numbers that stored studies were judged by."""

from math import erf, sqrt

import numpy as np
import pytest

from ressa.evaluation.intervals import (
    _drawn_counts,
    bootstrap_means,
    interval,
    paired_interval,
    wilson,
    won_back,
    won_back_interval,
)


def answers(shape, share, seed=0):
    "Zeros and ones of the given shape, of which a share are ones."
    return (np.random.default_rng(seed).random(shape) < share).astype(float)


def by_counts(values, draws, seed):
    "Bootstrap means sample by sample, with the same draws."
    generator = np.random.default_rng(seed)
    seeds, questions = values.shape
    asked = generator.multinomial(questions, np.full(questions, 1 / questions), draws)
    drawn = generator.multinomial(seeds, np.full(seeds, 1 / seeds), draws)
    means = []
    for question_counts, seed_counts in zip(asked, drawn):
        rows = np.repeat(np.arange(seeds), seed_counts)
        columns = np.repeat(np.arange(questions), question_counts)
        means.append(values[rows][:, columns].mean())
    return np.array(means)


@pytest.mark.parametrize("shape", [(1, 7), (2, 1), (3, 40)])
def test_bootstrap_means_are_those_of_the_samples(shape):
    values = np.random.default_rng(1).normal(size=shape)
    found = bootstrap_means(values, draws=20, seed=5)
    assert found == pytest.approx(by_counts(values, 20, 5))


def test_intervals_are_those_by_which_stored_studies_were_judged():
    generator = np.random.default_rng(1)
    a = (generator.random((3, 888)) < 0.9).astype(float)
    b = (generator.random((3, 888)) < 0.8).astype(float)
    exactly = 1e-12  # sums over another number of threads may round differently
    assert interval(a) == pytest.approx(
        (0.8813719969969948, 0.9117867867867846), rel=exactly
    )
    assert interval(a[0]) == pytest.approx(
        (0.8783502252252243, 0.9166948198198189), rel=exactly
    )
    assert paired_interval(a, b) == pytest.approx(
        (0.06756756756756756, 0.1227665165165165), rel=exactly
    )


def test_a_row_and_a_table_of_one_seed_have_the_same_interval():
    row = answers(200, 0.9)
    assert interval(row) == interval(row[None]) == interval(row.tolist())
    assert interval(row, seed=1) != interval(row)
    narrow, wide = interval(row, level=0.5), interval(row)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_a_paired_interval_is_that_of_the_difference():
    a, b, dense = answers((3, 50), 0.8), answers((3, 50), 0.6, 1), answers(50, 0.9, 2)
    assert paired_interval(a, b) == interval(a - b)
    assert paired_interval(a, dense) == interval(a - dense)  # one row for all seeds
    assert paired_interval(a[0], b[0], draws=50) == interval(a[0] - b[0], draws=50)


@pytest.mark.parametrize("shape", [(49,), (2, 50), (1, 50), ()])
def test_other_questions_or_seeds_cannot_be_paired(shape):
    with pytest.raises(ValueError, match="same questions and seeds"):
        paired_interval(np.ones((3, 50)), np.ones(shape))


@pytest.mark.parametrize(
    "values, options, message",
    [
        ([], {}, "values is empty"),
        ([np.nan], {}, "values must be finite"),
        (np.ones((2, 2, 2)), {}, "values must be finite"),
        ([1.0], dict(level=1.5), "level must be in"),
        ([1.0], dict(level=np.nan), "level must be in"),
        ([1.0], dict(draws=0), "draws must be 1 or more"),
    ],
)
def test_values_without_an_interval_are_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        interval(values, **options)


def test_a_paired_interval_covers_the_true_difference_and_is_narrower():
    "Coverage over seeds and questions, on drawn studies with a known difference."
    generator = np.random.default_rng(0)
    covered = 0
    relative_widths = []
    for _ in range(200):
        hard = generator.normal(size=300)
        luck = generator.normal(size=(12, 1)) * 0.3
        noise = [0.3 * generator.normal(size=(12, 300)) for _ in range(2)]
        a, b = (
            (hard + luck + shift + own > 0).astype(float)
            for shift, own in zip((0.3, 0.1), noise)
        )
        low, high = paired_interval(a, b, draws=300)
        shuffled = a[generator.permutation(12)][:, generator.permutation(300)]
        unpaired = paired_interval(shuffled, b, draws=100)
        spread = sqrt(1.18)  # the standard deviation of hard + luck + noise
        true = normal_cdf(0.3 / spread) - normal_cdf(0.1 / spread)
        covered += low <= true <= high
        relative_widths.append((high - low) / (unpaired[1] - unpaired[0]))
    assert 0.88 <= covered / 200 <= 1
    assert np.median(relative_widths) < 0.7


def normal_cdf(x):
    return (1 + erf(x / sqrt(2))) / 2


def test_wilson_solves_its_equation_and_is_not_a_point_at_the_edge():
    for right in ([1] * 180 + [0] * 20, [1] * 51, [0] * 4, [True, False]):
        share, n = np.mean(right), len(right)
        low, high = wilson(right)
        for end in (low, high):
            error = 1.96 * np.sqrt(end * (1 - end) / n)
            assert abs(share - end) == pytest.approx(error, abs=1e-6)
        assert low < high


@pytest.mark.parametrize(
    "right, z", [([0.5], 1.96), ([], 1.96), ([[1, 0]], 1.96), ([1], 0), ([1], np.nan)]
)
def test_wilson_wants_zeros_and_ones(right, z):
    with pytest.raises(ValueError, match="zeros and ones|z positive"):
        wilson(right, z)


def test_won_back_is_a_share_of_what_was_lost():
    assert won_back(0.9, 0.5, 1.0) == pytest.approx(0.8)
    assert won_back(0.4, 0.5, 1.0) < 0
    for dense in (0.5, 0.4, np.nan):
        with pytest.raises(ValueError, match="nothing was lost"):
            won_back(0.9, 0.5, dense)


def test_the_interval_of_what_was_won_back():
    repaired, pruned, dense = answers((3, 400), 0.9), answers((3, 400), 0.4, 1), 1.0
    dense = np.ones(400)
    low, high = won_back_interval(repaired, pruned, dense)
    assert low < won_back(repaired.mean(), pruned.mean(), 1.0) < high
    from_level = (bootstrap_means(repaired) - 0.5) / 0.5
    expected = np.quantile(from_level, (0.025, 0.975))
    assert won_back_interval(repaired, 0.5, dense) == pytest.approx(expected)
    with pytest.raises(ValueError, match="so little was lost"):
        won_back_interval(repaired, np.ones((3, 400)), dense)


def test_whole_groups_are_drawn():
    "The means are those of a plain loop that draws pictures and takes all their questions."
    generator = np.random.default_rng(3)
    groups = np.array(list("aabbbcdddd"))
    values = generator.random((3, 10))
    found = bootstrap_means(values, groups=groups, draws=50, seed=4)
    counts, seed_counts = _drawn_counts(3, 4, 50, 4)
    for mean, of_groups, of_seeds in zip(found, counts, seed_counts):
        columns = np.concatenate(
            [
                np.flatnonzero(groups == "abcd"[g])
                for g in np.repeat(range(4), of_groups)
            ]
        )
        rows = np.repeat(np.arange(3), of_seeds)
        assert mean == pytest.approx(values[rows][:, columns].mean())


def test_groups_widen_the_interval_of_questions_that_go_together():
    pictures = np.repeat(np.arange(50), 10)
    together = (pictures % 5 > 0).astype(float)
    alone = interval(together)
    by_picture = interval(together, groups=pictures)
    assert by_picture[0] < alone[0] < alone[1] < by_picture[1]
    other = np.zeros(500)
    assert paired_interval(together, other, groups=pictures) == by_picture


def test_groups_of_another_length_are_refused():
    with pytest.raises(ValueError, match="one label for each of the 3 questions"):
        bootstrap_means([1, 0, 1], groups=[1, 2])
