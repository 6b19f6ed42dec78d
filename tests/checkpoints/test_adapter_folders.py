"""An adapter folder opens on its base, keeps the zeros, and is whole or refused."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from ressa.adaptation.adapters import zero_masks, zeros_filled
from ressa.adaptation.sparse_lora import SparseLoraConfig
from ressa.checkpoints.sparse import save_sparse
from ressa.files import save_model
from ressa.models.load_model import load_model
from ressa.parts import modality_map
from ressa.pruning.scores import magnitude


def pruned_base(folder, packed):
    model, processor = load_model("bundled", "cpu")
    for layer in modality_map(model).layers.values():
        layer.weight.data = magnitude(layer.weight.data, sparsity=0.5)
    save = save_sparse if packed else save_model
    save(model, processor, folder)
    return load_model(folder, "cpu")[0]


def trained(model, config, base, folder):
    "An adapter that changes the model, saved; returns the model with it."
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize("packed", [True, False])
def test_it_is_the_model_that_was_trained(tmp_path, packed):
    base = tmp_path / "base"
    model = pruned_base(base, packed)
    masks = zero_masks(model)
    adapted = trained(model, SparseLoraConfig(), base, tmp_path / "adapter")
    opened, processor = load_model(tmp_path / "adapter", "cpu")
    expected = adapted.merge_and_unload().state_dict()
    for name, weight in opened.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert zeros_filled(masks, opened) == 0
    assert processor.tokenizer.padding_side == "left"


def lora():
    return LoraConfig(target_modules=r"language_model.*q_proj")


def test_plain_lora_does_not_fill_the_zeros_of_a_pruned_base(tmp_path):
    model = pruned_base(tmp_path / "base", packed=True)
    trained(model, lora(), tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(ValueError, match="LORA adapter would fill .* zeros"):
        load_model(tmp_path / "adapter", "cpu")


def test_plain_lora_on_a_dense_base(tmp_path):
    model, processor = load_model("bundled", "cpu")
    save_model(model, processor, tmp_path / "base")
    adapted = trained(model, lora(), tmp_path / "base", tmp_path / "adapter")
    opened, _ = load_model(tmp_path / "adapter", "cpu")
    expected = adapted.merge_and_unload().state_dict()
    assert all(torch.equal(w, expected[k]) for k, w in opened.state_dict().items())


def no_weights(folder, weights):
    (folder / "adapter_model.safetensors").unlink()


def a_weight_less(folder, weights):
    weights.pop(next(iter(weights)))
    save_file(weights, folder / "adapter_model.safetensors")


def a_weight_more(folder, weights):
    save_file(weights | {"spare": torch.ones(2)}, folder / "adapter_model.safetensors")


def not_finite(folder, weights):
    first = next(iter(weights))
    weights[first] = weights[first] * float("nan")
    save_file(weights, folder / "adapter_model.safetensors")


def another_shape(folder, weights):
    first = next(iter(weights))
    weights[first] = torch.ones(3, 3)
    save_file(weights, folder / "adapter_model.safetensors")


def cut_off(folder, weights):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def with_config(**changes):
    def damage(folder, weights):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


@pytest.mark.parametrize(
    "damage, message",
    [
        (no_weights, "holds no adapter_model.safetensors"),
        (a_weight_less, "missing: .*lora_"),
        (a_weight_more, "unexpected: spare"),
        (not_finite, "NaN or infinite: .*lora_"),
        (another_shape, "the adapter cannot be opened"),
        (cut_off, "the adapter cannot be opened"),
        (with_config(base_model_name_or_path=None), "names no base_model_name_or_path"),
        (with_config(base_model_name_or_path="/gone"), "base .* cannot be loaded"),
        (with_config(peft_type="NOTHING"), "cannot be opened: .*Save it again"),
        (with_config(r=3), "cannot be opened: .*size mismatch"),
        (with_config(lora_alpha=float("nan")), "NaN or infinite"),
    ],
)
def test_what_is_damaged_is_refused(tmp_path, damage, message):
    model, _ = load_model("bundled", "cpu")
    folder = tmp_path / "adapter"
    trained(model, lora(), "bundled", folder)
    load_model(folder, "cpu")  # it is sound before
    damage(folder, load_file(folder / "adapter_model.safetensors"))
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder, "cpu")
    assert str(folder) in str(caught.value)


def test_an_adapter_on_an_adapter_is_refused(tmp_path):
    model, _ = load_model("bundled", "cpu")
    trained(model, lora(), tmp_path / "adapter", tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter too"):
        load_model(tmp_path / "adapter", "cpu")
