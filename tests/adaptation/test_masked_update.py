"""The masked update: its gradients against finite differences, and no second derivative."""

import pytest
import torch

from ressa.adaptation.masked_update import sparse_lora_linear
from ressa.pruning.scores import magnitude


def gradcheck(weight, r, tokens, scale):
    out, width = weight.shape
    shapes = (*tokens, width), (out,), (r, width), (out, r)
    inputs = [
        torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes
    ]

    def layer(x, bias, A, B):
        return sparse_lora_linear(x, weight, bias, A, B, scale)

    return torch.autograd.gradcheck(layer, inputs)


@pytest.mark.parametrize("seed", range(8))
def test_gradcheck(seed):
    torch.manual_seed(seed)
    out, width, r, tokens = (int(torch.randint(1, high, ())) for high in (7, 9, 4, 6))
    is_kept = torch.rand(out, width) < torch.rand(())
    weight = (torch.randn(out, width) * is_kept).double()
    shape = ((2, tokens), (tokens,), ())[seed % 3]
    assert gradcheck(weight, r, shape, 0.7)
    scale_per_rank = torch.randint(0, 3, (r,)).double()  # as in dropout
    assert gradcheck(weight, r, shape, scale_per_rank)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "4:8"])
def test_gradcheck_with_patterns(pattern):
    weight = magnitude(torch.randn(5, 16), pattern=pattern).double()
    assert gradcheck(weight, 2, (3,), 0.7)


def test_gradients_of_gradients_are_refused_and_not_wrong():
    weight = magnitude(torch.randn(4, 6), sparsity=0.5)
    A = torch.randn(2, 6, requires_grad=True)
    B = torch.randn(4, 2, requires_grad=True)
    x = torch.randn(3, 6)
    loss = sparse_lora_linear(x, weight, None, A, B).square().sum()
    (dA,) = torch.autograd.grad(loss, A, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dA.sum().backward()
