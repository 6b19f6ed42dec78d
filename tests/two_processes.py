"""A small repair that may run on several processes: `accelerate launch two_processes.py FOLDER BATCH_SIZE`."""
import sys
from pathlib import Path

import torch
from patients import long_answers, patient_and_dense
from peft import get_peft_model
from transformers import set_seed

from ressa.repair import RessaArguments, RessaTrainer, zero_masks, zeros_filled
from ressa.sparselora import SparseLoraConfig


def main(folder, batch_size):
    model, dense, processor, train = patient_and_dense()
    masks = zero_masks(model)
    set_seed(0)
    student = get_peft_model(model, SparseLoraConfig(r=2))
    args = RessaArguments(str(folder), max_steps=3, per_device_train_batch_size=int(batch_size), learning_rate=1e-2,
                          logging_steps=1, save_strategy="no", disable_tqdm=True, use_cpu=True, seed=0)
    trainer = RessaTrainer(student, args, dense, processor, train_dataset=long_answers(train.select(range(24))))
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    trainer.train()
    if trainer.accelerator.is_main_process:
        Path(folder).mkdir(parents=True, exist_ok=True)
        found = dict(weights={name: p.detach() for name, p in trained.items()}, start=start,
                     processes=trainer.accelerator.num_processes,
                     log=[row for row in trainer.state.log_history if "loss" in row],
                     zeros_filled=zeros_filled(masks, student.merge_and_unload()))
        torch.save(found, Path(folder) / "weights.pt")


if __name__ == "__main__": main(*sys.argv[1:])
