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


def test_under_autocast_the_input_is_low_and_the_update_is_not():
    x, weight = torch.randn(3, 6), torch.randn(4, 6)
    assert fast_mask.to_autocast(x) is x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast_mask.to_autocast(x).dtype == torch.bfloat16
        assert (x @ weight.T).dtype == torch.bfloat16
        with fast_mask.no_autocast("cpu"):
            assert (x @ weight.T).dtype == torch.float32


def test_an_output_that_is_no_view_has_the_same_memory():
    view = torch.randn(6, 4).view(2, 3, 4)
    own = fast_mask.not_a_view(view)
    assert view._is_view() and not own._is_view()
    assert own.data_ptr() == view.data_ptr()
    assert torch.equal(own, view)
