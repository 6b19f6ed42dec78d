"""A small repair that may run on several processes: `torchrun two_processes.py FOLDER BATCH_SIZE`."""

import json
import sys
from pathlib import Path

from peft import get_peft_model
from safetensors.torch import save_file
from same_repair import long_answers, pruned_and_dense, three_steps
from transformers import set_seed

from ressa.adaptation.adapters import zero_masks, zeros_filled
from ressa.adaptation.sparse_lora import SparseLoraConfig
from ressa.adaptation.trainer import RessaTrainer


def main(folder, batch_size):
    model, dense, processor, train = pruned_and_dense()
    masks = zero_masks(model)
    set_seed(0)
    student = get_peft_model(model, SparseLoraConfig(r=2))
    args = three_steps(folder, batch_size)
    trainer = RessaTrainer(
        student,
        args,
        dense,
        processor,
        train_dataset=long_answers(train.select(range(24))),
    )
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    trainer.train()
    if trainer.accelerator.is_main_process:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(
            {name: p.detach().clone() for name, p in trained.items()},
            Path(folder) / "weights.safetensors",
        )
        save_file(start, Path(folder) / "start.safetensors")
        found = dict(
            processes=trainer.accelerator.num_processes,
            log=[row for row in trainer.state.log_history if "loss" in row],
            zeros_filled=zeros_filled(masks, student.merge_and_unload()),
        )
        (Path(folder) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
