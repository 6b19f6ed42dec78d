"""A pruned model and the dense one, and the same repair of it, alike in every process of a test."""

import copy
import functools

import torch
from peft import PeftModel
from safetensors.torch import load_file

from ressa.adaptation.repair import repair
from ressa.adaptation.trainer import RessaArguments
from ressa.data.collate import calibration_batch
from ressa.data.easy_vqa import load_easy_vqa
from ressa.models.bundled import load_bundled
from ressa.pruning.engine import prune

torch.set_num_threads(1)  # sums are taken in one order


def three_steps(folder, batch_size, **options):
    "The arguments of a repair of three steps on the CPU."
    return RessaArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=int(batch_size),
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **options,
    )


@functools.cache
def _pruned_and_dense():
    dense, processor = load_bundled("cpu")
    # each repair looks for its held-out pictures among all that it trains on
    train = load_easy_vqa("train").select(range(400))
    batch = calibration_batch(train, processor, n=8)
    pruned = copy.deepcopy(dense)
    prune(pruned, batch, sparsity=0.7, progress=False)
    return pruned, dense, processor, train


def pruned_and_dense():
    "A fresh pruned model, the dense one, the processor, and the training examples."
    pruned, dense, processor, train = _pruned_and_dense()
    return copy.deepcopy(pruned), dense, processor, train


def long_answers(examples):
    "The examples, three of four with longer answers."

    def repeat(example, i):
        return {"answer": " ".join([example["answer"]] * (1 + i % 4))}

    return examples.map(repeat, with_indices=True)


def repaired(folder, held_out=6, patience=None, **options):
    "The same repair in whatever process; with `patience` it is judged on held-out examples."
    pruned, dense, processor, train = pruned_and_dense()
    if patience:
        options["patience"] = patience
        options["held_out"] = train.select(range(20, 20 + held_out))
    report = repair(pruned, train, processor, teacher=dense, folder=folder, **options)
    return report.model


def equal(a, b):
    "Whether two models have the same weights, to the bit."
    weights = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in weights)


def weights_of(model, checkpoint, adapter):
    "The model that a checkpoint of the trainer holds, merged."
    if adapter in ("full", "bias"):
        model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
        return model
    adapted = PeftModel.from_pretrained(model, checkpoint)
    return adapted.merge_and_unload(safe_merge=True)
