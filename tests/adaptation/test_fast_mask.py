"""The masked weight: plain, and in place without branches, to the same bits."""

import pytest
import torch

from ressa.adaptation import fast_mask
from ressa.adaptation.fast_mask import masked_weight
from ressa.pruning.scores import magnitude


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
def test_mask_in_place_is_the_mask_to_the_bit(dtype):
    weight = magnitude(torch.randn(33, 65), sparsity=0.5).to(dtype)
    update = torch.randn(33, 65).to(dtype)
    update[0] = float("inf")
    update[1] = float("nan")
    update[2] = -0.0
    weight[3] = -0.0
    weight[4] = torch.finfo(dtype).smallest_normal / 4
    for w in (weight, weight.T.contiguous().T):
        want = torch.where(w != 0, update, 0).contiguous()
        got = fast_mask.mask_update_(update.clone(), w).contiguous()
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16, torch.float16])
def test_fast_and_plain_masked_weight_are_equal(weights, adapters):
    weight = magnitude(torch.randn(32, 48), sparsity=0.5).to(weights)
    A, B = torch.randn(4, 48).to(adapters), torch.randn(32, 4).to(adapters)
    fast = fast_mask.fast_masked_weight(weight, A, B)
    plain = masked_weight(weight, A, B)
    assert fast.dtype == plain.dtype == torch.promote_types(weights, adapters)
    assert torch.equal(fast, plain)
    assert (fast[weight == 0] == 0).all()
    assert not torch.signbit(fast[weight == 0]).any()
