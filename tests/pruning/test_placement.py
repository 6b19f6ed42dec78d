"""Weights that accelerate keeps in the layer, on the CPU or on disk, alone and in a whole model that is pruned."""

import copy
import hashlib

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import attach_align_device_hook
from accelerate.utils import OffloadedWeightsLoader, offload_state_dict
from peft import get_peft_model
from torch import nn
from transformers import InstructBlipForConditionalGeneration as Model

from ressa.adaptation.sparse_lora import SparseLoraConfig
from ressa.data.collate import calibration_batch
from ressa.parts import modality_map
from ressa.pruning.engine import prune
from ressa.pruning.masks import sparsity_of
from ressa.pruning.placement import StoredWeight

CPU = torch.device("cpu")


def in_memory(model, folder):
    return model


def on_cpu(model, folder):
    return cpu_offload(model, execution_device=CPU)


def on_disk(model, folder):
    return disk_offload(model, folder / "offload", execution_device=CPU)


def language_on_disk(model, folder):
    "The rest is in memory: what `device_map='auto'` makes where memory is short."
    parts = {name: "cpu" for name, _ in model.named_children()}
    parts |= {"query_tokens": "cpu", "language_model": "disk"}
    return dispatch_model(model, parts, offload_dir=folder / "offload")


def from_checkpoint(model, folder):
    "Language read from a checkpoint as transformers does it."
    model.save_pretrained(folder / "checkpoint")
    return loaded(folder / "checkpoint", folder / "offload")


def loaded(checkpoint, offload_folder):
    places = dict.fromkeys(
        ("vision_model", "qformer", "query_tokens", "language_projection"), "cpu"
    )
    return Model.from_pretrained(
        checkpoint,
        device_map=places | {"language_model": "disk"},
        offload_folder=offload_folder,
    )


def digest(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "offload, place", [(in_memory, "layer"), (on_cpu, "cpu"), (on_disk, "disk")]
)
def test_a_weight_is_read_and_replaced(tmp_path, offload, place, dtype):
    layer = nn.Linear(4, 3, bias=False, dtype=dtype)
    dense = layer.weight.detach().clone()
    model = offload(nn.Sequential(layer), tmp_path)
    weight = StoredWeight(model[0])
    weight.require_place("0")
    assert weight.place == place
    assert torch.equal(weight.read(), dense)
    new = torch.randn(4, 3).T  # of another dtype, and not contiguous
    weight.replace(new)
    assert torch.equal(StoredWeight(model[0]).read(), new.to(dtype))
    x = torch.eye(4, dtype=dtype)
    assert torch.equal(model(x), x @ new.to(dtype).T)


def test_one_loader_for_the_cpu_and_the_disk(tmp_path):
    "What `device_map='auto'` makes where neither the card nor the CPU holds the model."
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    dense = [layer.weight.detach().clone() for layer in model]
    on_cpu = {f"0.{key}": value.clone() for key, value in model[0].state_dict().items()}
    offload_state_dict(
        tmp_path, {f"1.{key}": value for key, value in model[1].state_dict().items()}
    )
    loader = OffloadedWeightsLoader(on_cpu, tmp_path)
    attach_align_device_hook(model, CPU, offload=True, weights_map=loader)
    assert [StoredWeight(layer).place for layer in model] == ["cpu", "disk"]
    for layer, weight in zip(model, dense):
        assert torch.equal(StoredWeight(layer).read(), weight)
        StoredWeight(layer).replace(weight * 2)
        assert torch.equal(StoredWeight(layer).read(), weight * 2)
    assert torch.equal(on_cpu["0.weight"], dense[0] * 2)


def test_a_placeholder_without_a_place_is_refused():
    empty = nn.Linear(4, 4, device="meta")
    assert StoredWeight(empty).place is None
    with pytest.raises(ValueError, match="^head holds a placeholder.*offload_folder"):
        StoredWeight(empty).require_place("head")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"micro_batch": 3}, {"dense_statistics": True}],
    ids=["plain", "pieces", "dense"],
)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("place", [on_cpu, on_disk, language_on_disk, from_checkpoint])
def test_an_offloaded_model_is_pruned_like_any_other(
    bundled, data, tmp_path, place, method, options
):
    dense, processor = bundled
    wanted = copy.deepcopy(dense)
    batch = calibration_batch(data[0], processor, n=6)
    model = place(dense, tmp_path)
    lines = []
    for each in (wanted, model):
        report = prune(each, batch, method, sparsity=0.5, progress=False, **options)
        lines.append([(x.name, x.sparsity, x.tokens) for x in report.layers])
    assert lines[0] == lines[1]
    assert any(layer.weight.is_meta for layer in modality_map(model).layers.values())
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, wanted(**batch).logits)


def test_a_checkpoint_on_disk_is_never_changed_and_the_pruned_model_can_be_saved(
    bundled, data, tmp_path
):
    dense, processor = bundled
    batch = calibration_batch(data[0], processor, n=4)
    model = from_checkpoint(dense, tmp_path)
    before = digest(tmp_path / "checkpoint")
    prune(model, batch, sparsity=0.5, progress=False)
    assert digest(tmp_path / "checkpoint") == before
    with torch.no_grad():
        wanted = model(**batch).logits
    model.save_pretrained(tmp_path / "pruned")
    opened = Model.from_pretrained(tmp_path / "pruned")
    linears = modality_map(opened).linears
    for layer in (*linears["vision"].values(), *linears["language"].values()):
        assert sparsity_of(layer.weight) >= 0.49
    with torch.no_grad():
        assert torch.equal(opened(**batch).logits, wanted)


def test_a_dense_model_offloaded_to_the_same_folder_again_is_dense(
    bundled, data, tmp_path
):
    dense, processor = bundled
    again = copy.deepcopy(dense)
    batch = calibration_batch(data[0], processor, n=4)
    with torch.no_grad():
        wanted = dense(**batch).logits
    prune(on_disk(dense, tmp_path), batch, sparsity=0.5, progress=False)
    with torch.no_grad():
        assert torch.equal(on_disk(again, tmp_path)(**batch).logits, wanted)


def test_what_cannot_be_written_is_refused_before_a_weight_changes(
    bundled, data, tmp_path
):
    dense, processor = bundled
    batch = calibration_batch(data[0], processor, n=4)
    with torch.no_grad():
        wanted = dense(**batch).logits
    dense.save_pretrained(tmp_path / "checkpoint")
    model = loaded(tmp_path / "checkpoint", offload_folder=None)
    message = "language_model.*place for a pruned.*offload_folder"
    with pytest.raises(ValueError, match=message):
        prune(model, batch, sparsity=0.5, progress=False)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, wanted)
    with torch.device("meta"):
        empty = Model(dense.config)
    with pytest.raises(ValueError, match="placeholder.*no place"):
        prune(empty, batch, sparsity=0.5, progress=False)


def test_blocks_that_are_fetched_whole_are_refused(bundled, data):
    "`preload_module_classes`: the block's hook fetches what its layers hold, and throws it away again."
    dense, processor = bundled
    batch = calibration_batch(data[0], processor, n=4)
    whole = ["InstructBlipMLP"]
    model = cpu_offload(dense, execution_device=CPU, preload_module_classes=whole)
    with pytest.raises(ValueError, match="placeholder.*no place"):
        prune(model, batch, sparsity=0.5, progress=False)


def test_adapters_on_placeholders_are_refused(bundled, tmp_path):
    "They would compute with whatever lies there, and raise no error."
    with pytest.raises(ValueError, match="offloaded layer"):
        get_peft_model(on_disk(bundled[0], tmp_path), SparseLoraConfig())
