"""Weights, inputs and targets for the tests of pruning methods, and plain masks."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

from ressa.pruning.dsnot import dsnot
from ressa.pruning.scores import magnitude, ria, wanda
from ressa.pruning.sparsegpt import sparsegpt

METHODS = {
    method.__name__: method for method in (magnitude, wanda, ria, sparsegpt, dsnot)
}
BY_ROW = ["magnitude", "wanda", "ria", "dsnot"]  # same count in every output row
TARGETS = [
    *({"sparsity": sparsity} for sparsity in (0.3, 0.5, 0.7, 0.9)),
    *({"pattern": pattern} for pattern in ("2:4", "4:8", "1:4")),
]

few = settings(max_examples=50, deadline=None, derandomize=True)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 5).map(lambda k: 8 * k))
sparsities = st.sampled_from([0, 0.1, 0.25, 0.3, 0.5, 0.6, 0.7, 0.9, 0.95])
patterns = st.sampled_from(["2:4", "4:8", "1:4", "3:4", "1:2", "5:8"])
targets = st.one_of(
    sparsities.map(lambda sparsity: {"sparsity": sparsity}),
    patterns.map(lambda pattern: {"pattern": pattern}),
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
seeds = st.integers(0, 2**16)


def example(shape, dtype=torch.float32, seed=0, tokens=64):
    "A weight without zeros, and inputs that are correlated and not centred."
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight = torch.where(weight.abs() < 1e-3, 1e-3, weight).to(dtype)
    width = shape[1]
    mix = torch.randn(width, width, generator=generator) / width**0.5
    x = torch.randn(tokens, width, generator=generator) @ (mix + torch.eye(width))
    return weight, x + torch.randn(width, generator=generator)


def group_of(target, width):
    "How many weights are compared with each other: M of an N:M pattern, or all."
    pattern = target.get("pattern")
    return int(pattern.split(":")[1]) if pattern else width


def share_of_equal_zeros(a, b):
    return ((a == 0) == (b == 0)).double().mean().item()


def plain_mask(score, sparsity=None, pattern=None):
    "Sort every row, or group of a row, and drop the lowest; of equal ones the leftmost."
    width = score.shape[1]
    if pattern:
        n, m = map(int, pattern.split(":"))
        dropped = m - n
    else:
        m = width
        dropped = int(sparsity * width + 1e-9)
    mask = torch.ones_like(score, dtype=torch.bool)
    for row in range(len(score)):
        for start in range(0, width, m):
            group = range(start, start + m)
            upwards = sorted(group, key=lambda j: score[row, j].item())
            mask[row, upwards[:dropped]] = False
    return mask
