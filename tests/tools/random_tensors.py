"""Tensors of random bits, and a comparison that looks at every bit."""

import torch

from ressa.checkpoints.packing import bits_of

WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same(a, b):
    "Whether two tensors agree in dtype, shape and every bit."
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bool((bits_of(a) == bits_of(b)).all())
    )


def random_bits(dtype, shape, sparsity):
    "A tensor of any bits at all, NaN and -0.0 among them; bools stay bools."
    if dtype == torch.bool:
        return torch.rand(shape) >= sparsity
    number = WHOLE_NUMBERS[dtype.itemsize]
    width = 8 * dtype.itemsize
    low = 0 if width == 8 else -(2 ** (width - 1))
    high = low + 2**width if width < 64 else 2**63 - 1
    bits = torch.randint(low, high, shape).to(number)
    only_the_sign = -128 if width == 8 else -(2 ** (width - 1))  # of floats: -0.0
    sign = torch.tensor(only_the_sign).to(number)
    bits = torch.where(torch.rand(shape) < 0.1, sign, bits)
    zero = torch.zeros((), dtype=number)
    return torch.where(torch.rand(shape) < sparsity, zero, bits).view(dtype)
