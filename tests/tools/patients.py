"""A pruned model and its dense past, made alike in every process of a test."""

import copy
import functools

import torch

from ressa.adaptation.repair import repair
from ressa.data.collate import calibration_batch
from ressa.data.easy_vqa import load_easy_vqa
from ressa.models.bundled import load_bundled
from ressa.pruning.engine import prune

torch.set_num_threads(1)  # sums are taken in one order


@functools.cache
def _made():
    dense, processor = load_bundled("cpu")
    train = load_easy_vqa("train")
    model = copy.deepcopy(dense)
    prune(model, calibration_batch(train, processor, n=8), sparsity=0.7, progress=False)
    return model, dense, processor, train


def patient_and_dense():
    "A fresh pruned model, the dense one, the processor, and the training rows."
    model, *rest = _made()
    return copy.deepcopy(model), *rest


def long_answers(rows):
    "The rows, some of them with longer answers."
    return rows.map(
        lambda row, i: {"answer": " ".join([row["answer"]] * (1 + i % 4))},
        with_indices=True,
    )


def repaired(folder, held_out=6, patience=None, **options):
    "The same repair in whatever process."
    model, dense, processor, train = patient_and_dense()
    if patience:
        options |= dict(
            patience=patience, held_out=train.select(range(20, 20 + held_out))
        )
    return repair(
        model, train, processor, teacher=dense, folder=folder, **options
    ).model


def weights_of(model, checkpoint, adapter):
    "The model that a checkpoint of the trainer holds, merged."
    from safetensors.torch import load_file

    if adapter in ("full", "bias"):
        model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, checkpoint).merge_and_unload(
        safe_merge=True
    )
