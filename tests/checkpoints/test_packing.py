"""Packing one tensor: exact to the bit, and parts that do not fit are refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tensors import random_bits, same

from ressa.checkpoints.packing import (
    TENSOR_DTYPES,
    Packed,
    pack_tensor,
    packed_bytes,
    unpack_tensor,
)
from ressa.pruning.scores import magnitude


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(list(TENSOR_DTYPES.values())),
    st.lists(st.integers(0, 9), max_size=4),
    st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    st.integers(0, 2**30),
)
def test_any_tensor_survives(dtype, shape, sparsity, seed):
    torch.manual_seed(seed)
    tensor = random_bits(dtype, tuple(shape), sparsity)
    packed = pack_tensor(tensor)
    assert same(unpack_tensor(packed, dtype, tensor.shape), tensor)
    assert packed.index.nbytes + packed.values.nbytes <= tensor.nbytes
    if tensor.dim() > 1:
        transposed = tensor.mT
        again = unpack_tensor(pack_tensor(transposed), dtype, transposed.shape)
        assert same(again, transposed)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 15), min_size=1, max_size=200), st.integers(0, 2**30))
def test_groups_of_four(masks, seed):
    torch.manual_seed(seed)
    kept = torch.tensor([[mask >> i & 1 for i in range(4)] for mask in masks])
    tensor = torch.randn(len(masks), 4) * kept
    packed = pack_tensor(tensor)
    assert same(unpack_tensor(packed, tensor.dtype, tensor.shape), tensor)
    if max(mask.bit_count() for mask in masks) > 2:
        assert packed.how != "2:4"


@pytest.mark.parametrize("n", [1, 7, 8, 9, 2**15 - 1, 2**15, 2**15 + 4, 2**17 + 20])
def test_chunks(n):
    for tensor in (
        random_bits(torch.bfloat16, (n,), 0.7),
        magnitude(torch.randn(1, n // 4 * 4), pattern="2:4"),
    ):
        packed = pack_tensor(tensor)
        assert same(unpack_tensor(packed, tensor.dtype, tensor.shape), tensor)


def test_the_smallest_way_is_taken_and_its_size_is_known():
    large = torch.randn(64, 64).bfloat16()
    for tensor, how in (
        (large, "dense"),
        (magnitude(large, sparsity=0.5), "bitmask"),
        (magnitude(large, pattern="2:4"), "2:4"),
    ):
        packed = pack_tensor(tensor)
        kept = int((tensor != 0).sum())
        assert packed.how == how
        size = packed.index.nbytes + packed.values.nbytes
        assert size == packed_bytes(how, tensor.numel(), kept, 2)


def test_packed_bytes():
    assert packed_bytes("dense", 10, 3, 2) == 20
    assert packed_bytes("bitmask", 65, 3, 2) == 16 + 6  # 9 bytes of mask, padded to 16
    assert packed_bytes("2:4", 64, 3, 2) == 8 + 64  # 16 codes of 3 bits, padded to 8
    with pytest.raises(ValueError, match="0 ≤ kept ≤ n"):
        packed_bytes("bitmask", 8, 9, 2)


def test_masks_that_lie():
    tensor = magnitude(torch.randn(5, 3), sparsity=0.7)
    how, index, values = pack_tensor(tensor)
    assert how == "bitmask"
    more = index.copy()
    more[1] |= 0x80  # the sixteenth of fifteen weights
    for bad, why in (
        (Packed(how, more, values), "more weights than"),
        (Packed(how, index, values[:-1]), "as many weights"),
        (Packed(how, index[:4], values), "index and shape"),
        (Packed("dense", index[:0], values), "values and shape"),
    ):
        with pytest.raises(ValueError, match=why):
            unpack_tensor(bad, tensor.dtype, tensor.shape)
    codes = Packed("2:4", np.full(8, 255, np.uint8), np.ones(2, np.int32))
    with pytest.raises(ValueError, match="six patterns"):
        unpack_tensor(codes, torch.float32, (4,))


def test_an_unknown_way_is_refused():
    message = "how must be 'dense', 'bitmask' or '2:4', not 'zip'"
    with pytest.raises(ValueError, match=message):
        packed_bytes("zip", 8, 4, 2)
    packed = pack_tensor(torch.eye(8))._replace(how="zip")
    with pytest.raises(ValueError, match=message):
        unpack_tensor(packed, torch.float32, (8, 8))


def test_what_has_no_bits_is_refused():
    with pytest.raises(ValueError, match="meta device"):
        pack_tensor(torch.empty(3, device="meta"))
    with pytest.raises(ValueError, match="sparse"):
        pack_tensor(torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match="complex128"):
        pack_tensor(torch.ones(3, dtype=torch.complex128))
