"""Kept weights in 8 or 4 bits: the zeros stay, the error is bounded, damage is named."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ressa.checkpoints.quantized import BITS, GROUP, dequantize, quantize
from ressa.checkpoints.sparse import load_sparse, pack, packed_tensors, unpack
from ressa.models.bundled import load_bundled
from ressa.parts import modality_map
from ressa.pruning.scores import magnitude


def random_weight(shape, seed=0, **target):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return magnitude(weight, **target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "target", [{"sparsity": 0.7}, {"pattern": "2:4"}, {"sparsity": 0.97}]
)
@pytest.mark.parametrize("shape", [(33, 100), (64, 64), (1, 8)])
def test_values_come_back_within_half_a_step(dtype, bits, target, shape):
    weight = random_weight(shape, **target).to(dtype)
    quantized = quantize(weight, bits)
    if quantized is None:
        assert shape == (1, 8)
        return
    again = dequantize(quantized, dtype, shape)
    assert again.dtype == dtype
    assert torch.equal(again == 0, weight == 0)
    kept = weight != 0
    values, found = weight[kept].float(), again[kept].float()
    for start in range(0, len(values), GROUP):
        group = slice(start, start + GROUP)
        scale = values[group].abs().max() / ((2**bits - 1) / 2)
        # half a step, and what 16 bits of scale and weight round
        allowed = scale / 2 + values[group].abs() * 2**-7
        assert ((values[group] - found[group]).abs() <= allowed).all()


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.22), (4, 0.15)])
def test_size_of_whole_linear_layers_at_70_percent(tmp_path, bits, limit):
    layers = {
        f"layer{i}.weight": random_weight((512, 1000), i, sparsity=0.7).bfloat16()
        for i in range(3)
    }
    (tmp_path / "dense").mkdir()
    save_file(layers, tmp_path / "dense" / "model.safetensors")
    sizes = pack(tmp_path / "dense", tmp_path / "packed", bits=bits)
    assert sizes["packed"] <= limit * sizes["dense"]
    unpack(tmp_path / "packed", tmp_path / "again")
    for name, again in load_file(tmp_path / "again" / "model.safetensors").items():
        wanted = dequantize(quantize(layers[name], bits), torch.bfloat16, (512, 1000))
        assert torch.equal(again, wanted)


def test_odd_sizes_and_other_tensors_beside_them(tmp_path):
    "Only pruned matrices are rounded; whatever follows them stays readable."
    tensors = {
        "wide": random_weight((7, 9), 1, sparsity=0.5),
        "odd": random_weight((5, 33), 2, sparsity=0.6).bfloat16(),
        "dense": torch.randn(6, 6).bfloat16(),
        "vector": random_weight((1, 64), 3, sparsity=0.9)[0].half(),
        "double": random_weight((3, 50), 4, sparsity=0.8).double(),
        "numbers": torch.tensor([[0, 0, 0, 0, 0, 7]] * 40),
    }
    (tmp_path / "dense").mkdir()
    save_file(tensors, tmp_path / "dense" / "model.safetensors")
    for bits in BITS:
        pack(tmp_path / "dense", tmp_path / str(bits), bits=bits)
        stored = packed_tensors(tmp_path / str(bits))
        for name, tensor in tensors.items():
            again = stored[name].read()
            assert torch.equal(again == 0, tensor == 0)
            exact = name in ("dense", "vector", "numbers")
            assert torch.equal(again, tensor) == exact


def test_a_model_is_loaded_with_ordinary_weights(tmp_path):
    model, processor = load_bundled("cpu", dtype=torch.bfloat16)
    for layer in modality_map(model).linears["language"].values():
        layer.weight.data = magnitude(layer.weight.data, sparsity=0.7)
    model.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    pack(tmp_path / "plain", tmp_path / "packed", bits=8)
    again, _ = load_sparse(tmp_path / "packed")
    for name, weight in model.state_dict().items():
        found = again.state_dict()[name]
        assert torch.equal(found == 0, weight == 0), name
        assert torch.allclose(found.float(), weight.float(), rtol=0.05, atol=0.01)


def test_every_changed_byte_of_a_quantized_tensor_is_found(tmp_path):
    (tmp_path / "dense").mkdir()
    weight = random_weight((4, 50), sparsity=0.5)
    save_file({"w": weight}, tmp_path / "dense" / "model.safetensors")
    pack(tmp_path / "dense", tmp_path / "packed", bits=4)
    file = next((tmp_path / "packed").glob("sparse-*"))
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in range(start, len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 16
        file.write_bytes(changed)
        with pytest.raises(ValueError):
            packed_tensors(tmp_path / "packed")["w"].read()


@pytest.mark.parametrize("bits", [5, 16, 0, "8"])
def test_other_bits_are_refused(tmp_path, bits):
    with pytest.raises(ValueError, match="bits must be one of"):
        quantize(torch.zeros(4, 4), bits)
    with pytest.raises(ValueError, match="bits must be one of"):
        pack(tmp_path, tmp_path / "out", bits=bits)


def test_nan_is_refused():
    weight = random_weight((4, 40), sparsity=0.5)
    weight[0, weight[0] != 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        quantize(weight, 8)
