"""Pruning a model whose weights accelerate keeps on the CPU or on disk."""

import copy
import hashlib

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import InstructBlipForConditionalGeneration as Model

from ressa.data.collate import calibration_batch
from ressa.parts import modality_map
from ressa.pruning.engine import prune
from ressa.pruning.masks import sparsity_of

CPU = torch.device("cpu")


def on_cpu(model, folder):
    return cpu_offload(model, execution_device=CPU)


def on_disk(model, folder):
    return disk_offload(model, folder / "offload", execution_device=CPU)


def mixed(model, folder):
    "Language on disk, the rest in memory: what `device_map='auto'` makes where memory is short."
    parts = dict.fromkeys((name for name, _ in model.named_children()), "cpu")
    parts |= {"query_tokens": "cpu", "language_model": "disk"}
    return dispatch_model(model, parts, offload_dir=folder / "offload")


def from_checkpoint(model, folder):
    "Language read from a checkpoint as transformers does it."
    model.save_pretrained(folder / "checkpoint")
    return loaded(folder / "checkpoint", folder / "offload")


def loaded(checkpoint, offload):
    map_ = {
        "vision_model": "cpu",
        "qformer": "cpu",
        "query_tokens": "cpu",
        "language_projection": "cpu",
        "language_model": "disk",
    }
    return Model.from_pretrained(checkpoint, device_map=map_, offload_folder=offload)


def digest(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


@pytest.mark.parametrize(
    "options",
    [{}, dict(micro_batch=3), dict(dense_statistics=True)],
    ids=["plain", "pieces", "dense"],
)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("place", [on_cpu, on_disk, mixed, from_checkpoint])
def test_an_offloaded_model_is_pruned_like_any_other(
    bundled, data, tmp_path, place, method, options
):
    dense, processor = bundled
    batch, want = calibration_batch(data[0], processor, n=6), copy.deepcopy(dense)
    model = place(dense, tmp_path)
    reports = [
        prune(m, batch, method, sparsity=0.5, progress=False, **options)
        for m in (want, model)
    ]
    lines = [
        [(line.name, line.sparsity, line.tokens) for line in report.layers]
        for report in reports
    ]
    assert lines[0] == lines[1]
    assert any(
        m.weight.device.type == "meta" for m in modality_map(model).layers.values()
    )
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, want(**batch).logits)


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
        want = model(**batch).logits
    model.save_pretrained(tmp_path / "pruned")
    opened = Model.from_pretrained(tmp_path / "pruned")
    assert all(
        sparsity_of(m.weight) >= 0.49
        for part in ("vision", "language")
        for m in modality_map(opened).linears[part].values()
    )
    with torch.no_grad():
        assert torch.equal(opened(**batch).logits, want)


def test_a_dense_model_offloaded_to_the_same_folder_again_is_dense(
    bundled, data, tmp_path
):
    dense, processor = bundled
    batch, again = calibration_batch(data[0], processor, n=4), copy.deepcopy(dense)
    with torch.no_grad():
        want = dense(**batch).logits
    prune(on_disk(dense, tmp_path), batch, sparsity=0.5, progress=False)
    with torch.no_grad():
        assert torch.equal(on_disk(again, tmp_path)(**batch).logits, want)


def test_what_cannot_be_written_is_refused_before_a_weight_changes(
    bundled, data, tmp_path
):
    dense, processor = bundled
    batch = calibration_batch(data[0], processor, n=4)
    with torch.no_grad():
        want = dense(**batch).logits
    dense.save_pretrained(tmp_path / "checkpoint")
    model = loaded(tmp_path / "checkpoint", None)
    with pytest.raises(
        ValueError, match="language_model.*place for a pruned.*offload_folder"
    ):
        prune(model, batch, sparsity=0.5, progress=False)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, want)
    with torch.device("meta"):
        empty = Model(dense.config)
    with pytest.raises(ValueError, match="placeholder.*no place"):
        prune(empty, batch, sparsity=0.5, progress=False)


def test_blocks_that_are_fetched_whole_are_refused(bundled, data, tmp_path):
    "`preload_module_classes`: the block's hook fetches what its layers hold, and throws it away again."
    dense, processor = bundled
    model = cpu_offload(
        dense, execution_device=CPU, preload_module_classes=["InstructBlipMLP"]
    )
    with pytest.raises(ValueError, match="placeholder.*no place"):
        prune(
            model,
            calibration_batch(data[0], processor, n=4),
            sparsity=0.5,
            progress=False,
        )


def test_adapters_on_placeholders_are_refused(bundled, data, tmp_path):
    "They would compute with whatever lies there, and say nothing."
    from peft import get_peft_model

    from ressa.adaptation.sparse_lora import SparseLoraConfig

    with pytest.raises(ValueError, match="offloaded layer"):
        get_peft_model(on_disk(bundled[0], tmp_path), SparseLoraConfig())
