"""DSnoT against the plain loop over rows, swaps and pairs in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import TARGETS, example, few, group_of, seeds, shapes, targets

from ressa.pruning.dsnot import dsnot, dsnot_as_published
from ressa.pruning.scores import magnitude, ria, wanda
from ressa.pruning.sparsegpt import sparsegpt
from ressa.pruning.statistics import Statistics

STARTS = [magnitude, wanda, ria, sparsegpt]
every_target = pytest.mark.parametrize(
    "target", TARGETS, ids=lambda target: str(*target.values())
)


# The same as the plain loop


def plain_dsnot(weight, stats, start, m, max_cycles=50, tolerance=0.1):
    "One output row and one swap at a time; both weights lie in one group of m."
    mean, norm, var = stats.mean.double(), stats.norm.double(), stats.var.double()
    var = var.clamp_min(1e-6 * var.mean()) if var.any() else torch.ones_like(var)
    kept = start != 0
    dense = weight.double()
    value = torch.where(kept, start, weight).double()
    inputs = range(len(mean))
    for i in range(len(weight)):
        for _ in range(max_cycles):
            error = (dense[i] * mean).sum() - (value[i] * mean)[kept[i]].sum()
            shift = error.sign() * value[i] * mean
            may_prune = [p for p in inputs if kept[i, p] and shift[p] < 0]
            open_groups = {p // m for p in may_prune}
            may_grow = [
                g
                for g in inputs
                if not kept[i, g] and shift[g] > 0 and g // m in open_groups
            ]
            if error.abs() <= tolerance or not may_grow:
                break
            grow = max(may_grow, key=lambda j: shift[j] / var[j])
            prune = min(
                (p for p in may_prune if p // m == grow // m),
                key=lambda j: value[i, j].abs() * norm[j],
            )
            after = error - value[i, grow] * mean[grow] + value[i, prune] * mean[prune]
            if after.abs() >= error.abs():
                break
            kept[i, grow] = True
            kept[i, prune] = False
    return value.masked_fill(~kept, 0).to(weight.dtype)


@every_target
@pytest.mark.parametrize("method", STARTS, ids=lambda method: method.__name__)
def test_it_agrees_with_the_plain_loop(method, target):
    weight, x = example((10, 72))
    stats = Statistics.of(x)
    start = method(weight, stats, **target)
    expected = plain_dsnot(weight, stats, start, group_of(target, 72), tolerance=0.02)
    options = {"pattern": target.get("pattern"), "tolerance": 0.02}
    assert torch.equal(dsnot(weight, stats, start=start, **options), expected)


@every_target
@pytest.mark.parametrize("method", STARTS, ids=lambda method: method.__name__)
def test_a_method_may_stand_for_its_result(method, target):
    weight, x = example((10, 72))
    stats = Statistics.of(x)
    expected = dsnot(weight, stats, **target, start=method(weight, stats, **target))
    assert torch.equal(dsnot(weight, stats, **target, start=method), expected)


@few
@given(
    shape=shapes,
    target=targets,
    seed=seeds,
    method=st.sampled_from(STARTS),
    tolerance=st.sampled_from([0.0, 0.1, 0.5]),
    cycles=st.sampled_from([0, 1, 2, 50]),
)
def test_it_agrees_with_the_plain_loop_in_small(
    shape, target, seed, method, tolerance, cycles
):
    weight, x = example(shape, seed=seed)
    stats = Statistics.of(x)
    start = method(weight, stats, **target)
    options = {"tolerance": tolerance, "max_cycles": cycles}
    m = group_of(target, shape[1])
    expected = plain_dsnot(weight, stats, start, m, **options)
    pattern = target.get("pattern")
    found = dsnot(weight, stats, pattern=pattern, start=start, **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(1, 72) + torch.arange(72) % 5,
        torch.randn(30, 72) * (torch.arange(72) > 9),
    ],
    ids=["single token", "constant inputs"],
)
def test_inputs_that_do_not_vary(x):
    weight = example((10, 72))[0]
    stats = Statistics.of(x + 0.5)
    start = wanda(weight, stats, sparsity=0.5)
    expected = plain_dsnot(weight, stats, start, 72)
    assert torch.equal(dsnot(weight, stats, sparsity=0.5), expected)


# What a repair promises


@few
@given(shape=shapes, target=targets, seed=seeds, method=st.sampled_from(STARTS))
def test_no_row_error_grows_and_no_count_changes(shape, target, seed, method):
    weight, x = example(shape, seed=seed)
    stats = Statistics.of(x)
    before = method(weight, stats, **target)
    pattern = target.get("pattern")
    after = dsnot(weight, stats, pattern=pattern, start=before, tolerance=0.0)
    mean = stats.mean.double()
    error_before = ((weight - before).double() @ mean).abs()
    error_after = ((weight - after).double() @ mean).abs()
    assert (error_after <= error_before + 1e-6).all()
    assert torch.equal((after == 0).sum(1), (before == 0).sum(1))


@few
@given(shape=shapes, target=targets, seed=seeds)
def test_a_finished_repair_stays_finished(shape, target, seed):
    weight, x = example(shape, seed=seed)
    stats = Statistics.of(x)
    once = dsnot(weight, stats, **target)
    pattern = target.get("pattern")
    assert torch.equal(dsnot(weight, stats, pattern=pattern, start=once), once)


def test_a_repair_that_was_cut_short_goes_on():
    weight, x = example((6, 40))
    stats = Statistics.of(x)
    short = dsnot(weight, stats, sparsity=0.5, max_cycles=1, tolerance=0.01)
    assert not torch.equal(dsnot(weight, stats, start=short, tolerance=0.01), short)


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_a_start_without_zeros_has_nothing_to_swap(factor):
    weight, x = example((60, 16))
    start = factor * weight
    found = dsnot(weight, Statistics.of(x), sparsity=0, start=start, tolerance=0.0)
    assert torch.equal(found, start)


def test_float64_stays_float64():
    weight, x = example((8, 40))
    assert dsnot(weight.double(), Statistics.of(x), sparsity=0.5).dtype == torch.float64


# Errors


def test_a_missing_mean_is_named():
    weight, x = example((4, 8))
    with pytest.raises(ValueError, match=r"no mean.*Statistics\.of\(x, mean=True\)"):
        dsnot(weight, Statistics.of(x, mean=False), sparsity=0.5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start": torch.zeros(2, 8)}, "shape"),
        ({"start": "wanda", "sparsity": 0.5}, "start must be"),
        ({"start": wanda}, "exactly one"),
        ({"start": torch.ones(40, 80), "pattern": "2:4"}, "not 2:4"),
        ({"start": torch.ones(40, 80), "sparsity": 0.7}, "fewer"),
        ({"start": torch.ones(40, 80), "sparsity": 2}, r"\[0, 1\)"),
        ({"sparsity": 0.5, "max_cycles": -1}, "max_cycles must be"),
        ({"sparsity": 0.5, "tolerance": float("nan")}, "tolerance must be"),
        ({"sparsity": 0.5, "power": float("inf")}, "power must be"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    weight, x = example((40, 80))
    with pytest.raises(ValueError, match=message):
        dsnot(weight, Statistics.of(x), **options)


# The rules of the authors' program


def published_by_hand(weight, x, sparsity, cycles=50, threshold=0.1):
    """One row after the other, as the authors' program is described.

    ε is summed over the tokens of an example (a mean over examples); both lists of
    candidates are sorted once, and a weight is taken from a list at most once.
    """
    x = x.double()
    weight = weight.double()
    mean_of_sums = x.sum(1).mean(0)
    variance = x.var(1, correction=0).mean(0)  # examples of equal length
    norm = x.flatten(0, 1).norm(dim=0)
    n_pruned = int(sparsity * weight.shape[1])
    kept = torch.ones_like(weight, dtype=torch.bool)
    for row, w in enumerate(weight):
        order = (w.abs() * norm).argsort()
        kept[row, order[:n_pruned]] = False
        product = w * mean_of_sums
        grow = sorted(
            (i for i in range(len(w)) if not kept[row, i]),
            key=lambda i: (product[i] / variance[i]).item(),
        )
        cheapest_first = [i for i in order.tolist() if kept[row, i]]
        error = product[~kept[row]].sum()
        for _ in range(cycles):
            if error.abs() <= threshold:
                break
            grown = grow.pop() if error > 0 else grow.pop(0)
            taken = next(i for i in cheapest_first if product[i] * error < 0)
            cheapest_first.remove(taken)
            kept[row, grown] = True
            kept[row, taken] = False
            error = error - product[grown] + product[taken]
    return kept


def test_published_rules_equal_a_plain_loop():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(12, 80, generator=generator)
    x = torch.randn(4, 20, 80, generator=generator)
    x = x + torch.randn(80, generator=generator)
    x = x + 2 * torch.randn(4, 1, 80, generator=generator)  # examples differ
    stats = Statistics.of_examples(list(x))
    cycles = 12  # so few that no list of candidates ends
    found = dsnot_as_published(weight, stats, sparsity=0.5, max_cycles=cycles)
    wanted = published_by_hand(weight, x, 0.5, cycles)
    assert torch.equal(found != 0, wanted)
    assert not torch.equal(dsnot(weight, stats, sparsity=0.5) != 0, wanted)


def test_without_examples_all_tokens_are_one():
    weight, x = example((4, 8))
    found = dsnot_as_published(weight, Statistics.of(x), sparsity=0.5)
    one = dsnot_as_published(weight, Statistics.of_examples([x]), sparsity=0.5)
    assert torch.equal(found, one)
